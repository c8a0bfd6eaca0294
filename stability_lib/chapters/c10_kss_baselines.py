"""Chapter 10, KSS against other optimizers, norms and plain remedies (paper K, Tables 4, 5, 13, 14)."""

from ..claims import Claim
from ..config import RunConfig, grid
from ..studies import check_scale
from .c05_kss_divergence import (
    CONTROL,
    EVERY_STEP,
    control,
    control_lrs,
    control_seeds,
    kss_divergence,
    kss_fair,
    kss_more_seeds,
    kss_window,
)


def kss_baselines(scale: str) -> list[RunConfig]:
    """Paper K's baselines with and without KSS, and plain remedies, at the learning rates of
    `kss_divergence` and at a lower and a higher one (paper K, Tables 4, 13, 14)."""
    sam, width = dict(sam_rho=0.1), CONTROL[check_scale(scale)]["d_model"]
    mup = dict(parametrization="mup_full", base_width=width // 4)
    controls = [dict(reparametrization="spectral_norm"), dict(reparametrization="weight_norm"),
                dict(gradient_penalty=0.1), sam, dict(optimizer="lion"), dict(optimizer="lamb"), mup]
    remedies = [dict(sam_rho=0.05), dict(clip_norm=1.0), dict(warmup_steps=2 * CONTROL[scale]["warmup_steps"]),
                dict(qk_norm="head"), dict(residual="scaled"), dict(residual="rezero"), dict(norm="pre_ln")]
    shaped = [arm | EVERY_STEP for arm in controls if scale != "gpu" or "gradient_penalty" not in arm]
    arms = [*controls, *shaped, *remedies]
    lrs = control_lrs(scale)[1::2]
    if scale == "quick":
        return grid(control(scale), arm=[sam, sam | EVERY_STEP, dict(optimizer="lion"), dict(residual="scaled")],
                    lr=lrs, seed=control_seeds(scale))
    around = [1e-3, 3e-2]
    plain = grid(control(scale), arm=[{}, EVERY_STEP], lr=around, seed=control_seeds(scale))
    lrs = lrs if scale == "gpu" else [around[0], *lrs, around[1]]  # most train one run at a time
    return [*plain, *grid(control(scale), arm=arms, lr=lrs, seed=control_seeds(scale)),
            *grid(control(scale, optimizer="lion"), arm=[{}, EVERY_STEP], lr=[1e-4], seed=control_seeds(scale))]


def kss_largest_stable_lr(scale: str) -> list[RunConfig]:
    """Divergence against learning rate for three norms without and with KSS (paper K, Table 5)."""
    arms = [{}, EVERY_STEP]
    if scale == "quick":
        return grid(control(scale), arm=arms, lr=[5e-3, 1e-2, 2e-2, 4e-2], seed=control_seeds(scale))
    lrs, normed = [2.5e-3, 3.5e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 2.8e-2, 4e-2, 8e-2], [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    seeds = range(5)
    if scale == "gpu":
        lrs, normed, seeds = [1e-3, 2e-3, 4e-3], [0.1, 0.4], range(3)
    return [*grid(control(scale), arm=arms, lr=lrs, seed=seeds),
            *grid(control(scale), norm=["pre_ln", "rmsnorm"], arm=arms, lr=normed, seed=seeds)]


MATCHED = {"pre_ln": 0.12, "rmsnorm": 0.11}
"""alpha at which the first gradient of KSS is as large with norms as at alpha 5 without (7.3 over all layers)."""


def kss_normed(scale: str) -> list[RunConfig]:
    """`kss_largest_stable_lr` with norms once more, without a limit on the gradient's norm, which the penalty's own
    passed there: KSS at every step at a matched alpha, and at the paper's dose (paper K, Table 5)."""
    lrs = {"pre_ln": [0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8], "rmsnorm": [0.2, 0.28, 0.4, 0.56, 0.8, 1.1, 1.6, 2.3]}
    seeds = range(5)
    if scale in ("quick", "gpu"):
        lrs, seeds = {"pre_ln": [0.1, 1.6 if scale == "quick" else 0.4]}, control_seeds(scale)[:3]
    setting = control(scale, spectra_every=0, diverge_grad_norm=None)
    return [config for norm, of_norm in lrs.items() for config in grid(
        setting, norm=[norm], arm=[{}, dict(shaping="kss"), EVERY_STEP | dict(shaping_alpha=MATCHED[norm])], lr=of_norm,
        seed=seeds)]


def kss_normed_finer(scale: str) -> list[RunConfig]:
    """`kss_normed` with new seeds in steps of 7% to 16% around the limits found there, which with Pre-LN were one for
    all seeds. Where seeds differ by a step, five tell a tenth of a decade with Pre-LN, six with RMSNorm. Fixed before
    these runs: the three claims on largest stable rates with norms are judged by these seeds alone."""
    setting, at_paper = control(scale, spectra_every=0, diverge_grad_norm=None), dict(shaping="kss")
    if scale == "gpu":  # the chapter's time is spent elsewhere: some that `kss_normed` has
        return grid(setting, norm=["pre_ln"], lr=[0.1], seed=control_seeds(scale)[:3])
    if scale == "quick":
        return grid(setting, norm=["pre_ln"], arm=[{}, at_paper], lr=[0.4], seed=[7, 8])
    matched = {norm: EVERY_STEP | dict(shaping_alpha=alpha) for norm, alpha in MATCHED.items()}
    return [*grid(setting, norm=["pre_ln"], arm=[{}, matched["pre_ln"], at_paper], lr=[0.3, 0.32, 0.345, 0.37],
                  seed=range(5, 10)),
            *grid(setting, norm=["rmsnorm"], arm=[{}, matched["rmsnorm"]], lr=[0.6, 0.7, 0.8, 0.92], seed=range(5, 11))]


def kss_rmsnorm_seeds(scale: str) -> list[RunConfig]:
    """30 new seeds of what `kss_normed_finer` has with RMSNorm, whose six left KSS open at 0.04 decades. Fixed before
    these runs: they alone judge `KT5.rmsnorm-matched`, criterion unchanged. At the spread of six (0.10) the interval is
    0.037 to each side: 0.04 is told from the criterion's 0.1 in nine of ten such samples."""
    if scale in ("quick", "gpu"):
        return kss_normed_finer(scale)
    setting = control(scale, spectra_every=0, diverge_grad_norm=None, norm="rmsnorm")
    return grid(setting, arm=[{}, EVERY_STEP | dict(shaping_alpha=MATCHED["rmsnorm"])], lr=[0.6, 0.7, 0.8, 0.92],
                seed=range(11, 41))


def kss_beyond(scale: str) -> list[RunConfig]:
    """`kss_baselines` where it could not tell: muParam and LAMB at learning rates at which they diverge, with and
    without KSS, and more seeds of Lion at the shared rates."""
    if scale in ("quick", "gpu"):
        return grid(control(scale, parametrization="mup_full", base_width=CONTROL[scale]["d_model"] // 4, lr=3e-2,
                            spectra_every=0), arm=[{}, EVERY_STEP], seed=control_seeds(scale))
    setting, seeds = control(scale, spectra_every=0), range(8)
    arms, mup = [{}, EVERY_STEP], dict(parametrization="mup_full", base_width=CONTROL[scale]["d_model"] // 4)
    return [*grid(setting, arm=arms, more=[mup], lr=[2e-2, 3e-2, 4.5e-2], seed=seeds),
            *grid(setting, arm=arms, more=[dict(optimizer="lamb")], lr=[3.5e-2, 4.5e-2, 5.5e-2], seed=seeds),
            *grid(setting, optimizer=["lion"], lr=control_lrs(scale)[1::2], seed=range(6))]


STUDIES = (kss_divergence, kss_more_seeds, kss_fair, kss_window, kss_baselines, kss_largest_stable_lr, kss_normed,
           kss_normed_finer, kss_rmsnorm_seeds, kss_beyond)

CLAIMS = (
    Claim("KT4.fair-baselines", "K Table 4", "where recall is learned, KSS prevents more than each baseline",
          "12.5% against 41.7% and 54.2%",
          "diverged share, KSS 0.15 at every tenth step minus the better of spectral and weight norm", "<", 0.0),
    Claim("KT4.baselines-help", "K Table 4", "each baseline prevents some divergence", "33.3% to 54.2%, from 66.7%",
          "diverged share at LR 0.005 to 0.01, the worst of those minus no control", "<", 0.0),
    Claim("KT4.kss-sam", "K Table 4", "KSS on top of SAM prevents more than SAM", "8.3% against 33.3%",
          "diverged share at LR 0.005 to 0.01, SAM 0.1 with minus without KSS (alpha 5, every step)", "<", 0.0),
    Claim("KT5.no-norm", "K Table 5", "KSS raises the largest stable learning rate without norms", "0.002 to 0.005",
          "log10 of its ratio, with over without KSS (alpha 5, every step)", ">", 0.0),
    Claim("KT5.pre-ln-matched", "K Table 5", "and with Pre-LN, at least half as far as there", "0.005 to 0.008",
          "log10 of its ratio by the loss alone, with over without KSS (0.12, every step), Pre-LN", ">", 0.1),
    Claim("KT5.rmsnorm-matched", "K Table 5", "and with RMSNorm, at least half as far as there", "0.003 to 0.005",
          "log10 of its ratio by the loss alone, with over without KSS (0.11, every step), RMSNorm", ">", 0.1),
    Claim("KT5.pre-ln-paper", "K Table 5", "with Pre-LN also at the paper's dose", "0.005 to 0.008",
          "log10 of its ratio by the loss alone, with over without KSS (0.15, every tenth step), Pre-LN", ">", 0.1),
    Claim("KT13.mup", "K Table 13", "muParam prevents some divergence", "41.7% against 66.7%",
          "diverged share at LR 0.005 to 0.01, muParam minus standard", "<", 0.0),
    Claim("KT13.mup-kss-higher", "K Table 13", "KSS on top of muParam prevents more than muParam",
          "8.3% against 41.7%",
          "diverged share at LR 0.02 to 0.045, muParam with minus without KSS (alpha 5, every step)", "<", 0.0),
    Claim("KT14.lamb", "K Table 14", "LAMB prevents some divergence", "45.8% against 66.7%",
          "diverged share at LR 0.005 to 0.01, LAMB minus AdamW", "<", 0.0),
    Claim("KT14.lamb-kss-higher", "K Table 14", "KSS on top of LAMB prevents more than LAMB", "8.3% against 45.8%",
          "diverged share at LR 0.035 to 0.055, LAMB with minus without KSS (alpha 5, every step)", "<", 0.0),
    Claim("KT14.fair-tuned", "ours", "each at its best learning rate, KSS lowers the loss where recall is learned",
          "not tested", "final loss at the best LR, KSS 0.15 at every tenth step minus no control (nats)", "<", -0.05),
    Claim("KT14.fair-remedies", "ours", "where recall is learned, KSS at its best dose learns more than weight norm",
          "not tested", "final accuracy, the best of four doses of KSS minus weight norm", ">", 0.0),
    Claim("KT14.fair-lower-lr", "ours", "there, a third of the learning rate learns more than KSS", "not tested",
          "final accuracy, no control at a third of the LR minus the best of four doses of KSS", ">", 0.0),
)
"""Differences of shares and accuracies are taken over pairs of one learning rate and seed."""
