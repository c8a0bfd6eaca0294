"""Chapter 10, KSS against other optimizers, norms and plain remedies (paper K, Tables 4, 5, 13, 14)."""

from ..claims import Claim
from ..config import RunConfig, grid
from ..studies import check_scale
from .c05_kss_divergence import CONTROL, EVERY_STEP, control, control_lrs, control_seeds, kss_divergence


def kss_baselines(scale: str) -> list[RunConfig]:
    """Paper K's baselines with and without KSS, and plain remedies, at the learning rates of
    `kss_divergence` and at a lower and a higher one (paper K, Tables 4, 13, 14)."""
    sam, width = dict(sam_rho=0.1), CONTROL[check_scale(scale)]["d_model"]
    mup = dict(parametrization="mup_full", base_width=width // 4)
    controls = [dict(reparametrization="spectral_norm"), dict(reparametrization="weight_norm"),
                dict(gradient_penalty=0.1), sam, dict(optimizer="lion"), dict(optimizer="lamb"), mup]
    remedies = [dict(sam_rho=0.05), dict(clip_norm=1.0), dict(warmup_steps=2 * CONTROL[scale]["warmup_steps"]),
                dict(qk_norm="head"), dict(residual="scaled"), dict(residual="rezero"), dict(norm="pre_ln")]
    arms = [*controls, *(arm | EVERY_STEP for arm in controls), *remedies]
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
        lrs, normed, seeds = [2.5e-3, 1e-2, 4e-2], [0.1, 1.6], range(3)
    return [*grid(control(scale), arm=arms, lr=lrs, seed=seeds),
            *grid(control(scale), norm=["pre_ln", "rmsnorm"], arm=arms, lr=normed, seed=seeds)]


STUDIES = (kss_divergence, kss_baselines, kss_largest_stable_lr)

CLAIMS = (
    Claim("KT4.kss-beats-baselines", "K Table 4", "KSS prevents more divergence than each baseline",
          "12.5% against 33.3% to 54.2%",
          "diverged share at LR 0.005 to 0.01, KSS (alpha 5, every step) minus the best of spectral norm, "
          "weight norm, gradient penalty, SAM and Lion", "<", 0.0),
    Claim("KT4.baselines-help", "K Table 4", "each baseline prevents some divergence", "33.3% to 54.2%, from 66.7%",
          "diverged share at LR 0.005 to 0.01, the worst of those minus no control", "<", 0.0),
    Claim("KT4.kss-sam", "K Table 4", "KSS on top of SAM prevents more than SAM", "8.3% against 33.3%",
          "diverged share at LR 0.005 to 0.01, SAM 0.1 with minus without KSS (alpha 5, every step)", "<", 0.0),
    Claim("KT5.no-norm", "K Table 5", "KSS raises the largest stable learning rate without norms", "0.002 to 0.005",
          "log10 of its ratio, with over without KSS (alpha 5, every step)", ">", 0.0),
    Claim("KT5.pre-ln", "K Table 5", "and with Pre-LN", "0.005 to 0.008",
          "log10 of its ratio, with over without KSS (alpha 5, every step), Pre-LN", ">", 0.0),
    Claim("KT5.rmsnorm", "K Table 5", "and with RMSNorm", "0.003 to 0.005",
          "log10 of its ratio, with over without KSS (alpha 5, every step), RMSNorm", ">", 0.0),
    Claim("KT13.mup", "K Table 13", "muParam prevents some divergence", "41.7% against 66.7%",
          "diverged share at LR 0.005 to 0.01, muParam minus standard", "<", 0.0),
    Claim("KT13.mup-kss", "K Table 13", "KSS on top of muParam prevents more than muParam", "8.3% against 41.7%",
          "diverged share at LR 0.005 to 0.01, muParam with minus without KSS (alpha 5, every step)", "<", 0.0),
    Claim("KT14.lamb", "K Table 14", "LAMB prevents some divergence", "45.8% against 66.7%",
          "diverged share at LR 0.005 to 0.01, LAMB minus AdamW", "<", 0.0),
    Claim("KT14.lamb-kss", "K Table 14", "KSS on top of LAMB prevents more than LAMB", "8.3% against 45.8%",
          "diverged share at LR 0.005 to 0.01, LAMB with minus without KSS (alpha 5, every step)", "<", 0.0),
    Claim("KT14.tuned", "ours", "at each one's best learning rate, KSS lowers the loss", "not tested",
          "final loss at the best LR, AdamW with minus without KSS (alpha 5, every step) (nats)", "<", 0.0),
    Claim("KT14.remedies", "ours", "KSS prevents more divergence than plain remedies", "not tested",
          "diverged share at LR 0.005 to 0.01, KSS (alpha 5, every step) minus the best of a longer warm-up, "
          "qk-norm, residual scaling, ReZero and Pre-LN", "<", 0.0),
)
