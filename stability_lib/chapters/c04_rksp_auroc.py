"""Chapter 04, does one forward pass foretell divergence? (Paper K, Figs 1, 5, Tables 1, 2.)"""

from ..claims import Claim
from ..config import CHOICES, RunConfig, grid, replace
from ..studies import RECALL, check_scale

_SWEEP = {
    "quick": ([(32, 2)], [1e-2, 3e-2, 8e-1], 60),
    "cpu": ([(32, 2), (64, 2), (32, 4), (64, 4)], [3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 4e-1, 8e-1, 1.6], 200),
    "gpu": ([(128, 2), (288, 2)], [3e-3, 3e-2, 8e-1], 2000),
    "paper": ([(128, 4), (256, 8), (512, 12), (1024, 24)], [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 10_000),
}
"""Widths and depths, learning rates and steps of chapter 04."""


def divergence_sweep(scale: str) -> list[RunConfig]:
    """Which norm placements, shapes and learning rates diverge on associative recall (paper K, Table 1)."""
    sizes, lrs, steps = _SWEEP[check_scale(scale)]
    longer = dict(seq_len=64) if scale == "paper" else {}
    setting = RunConfig(**RECALL | longer, steps=steps, warmup_steps=steps // 10)
    return grid(setting, norm=CHOICES["norm"], size=[dict(d_model=d, n_layers=n) for d, n in sizes], lr=lrs,
                seed=[42] if scale == "quick" else [42, 123, 456])


def unseen_architectures(scale: str) -> list[RunConfig]:
    """Architectures and a size that `divergence_sweep` lacks, at its learning rates, to hold forecasts of
    the largest stable one to."""
    d_model, n_layers = {"quick": (32, 2), "cpu": (48, 3), "gpu": (160, 3), "paper": (384, 6)}[check_scale(scale)]
    without = [dict(init="xavier"), dict(init="fan_in"), dict(residual="scaled"), dict(residual="rezero"),
               dict(qk_norm="head")]
    arms = [*(dict(norm="no_norm") | arm for arm in without), dict(norm="pre_ln", init="fan_in"),
            dict(norm="pre_ln", residual="scaled"), dict(norm="post_ln", init="xavier")]
    first = replace(divergence_sweep(scale)[0], d_model=d_model, n_layers=n_layers)
    return grid(first, arm=arms[1:3] if scale == "quick" else arms, lr=_SWEEP[scale][1],
                seed=[42] if scale == "quick" else [42, 123, 456])


def untrained(config: RunConfig, **changes) -> RunConfig:
    """A run of one step that profiles 2048 token states of the model `config` starts from, before that step."""
    return replace(config, **dict(
        lr=1e-2, steps=1, warmup_steps=0, batch_size=2048 // config.seq_len, eval_sequences=32, diverge_loss=None,
        diverge_grad_norm=None, spectra_every=1) | changes)


def spectra_at_init(scale: str) -> list[RunConfig]:
    """Profiles of untrained models. By norm and, each alone, width, depth and initialization (paper K,
    Table 1), and with Kreiss constants of every model that the chapter trains."""
    setting = RunConfig(**RECALL | dict(seq_len=64, d_model=128, n_layers=4))
    inits = [dict(init="pytorch"), dict(init="xavier"), dict(init="fan_in")][:1 if scale == "gpu" else 3]
    shapes = [dict(d_model=64), dict(d_model=256), dict(n_layers=2), dict(n_layers=8)]
    changes = [{}, *(shapes if scale in ("cpu", "paper") else []), *inits]
    trained = [untrained(config, spectra_kreiss=True)
               for config in divergence_sweep(scale) + unseen_architectures(scale)]
    by_choice = grid(untrained(setting), norm=CHOICES["norm"], change=changes, seed=[42, 123, 456])
    return list(dict.fromkeys(by_choice + trained))


STUDIES = (divergence_sweep, unseen_architectures, spectra_at_init)

CLAIMS = (
    Claim("KT1.near-unit-mass", "K Table 1", "the norm placements differ in near-unit mass at initialization",
          "M1 0.16, 0.66, 0.16, 0.00, 0.13, 0.80",
          "mean distance of our M1 from Table 1's over its six norms (DeepNorm as `deepnorm_pre`), GPT-2's "
          "initialization", "<", 0.1),
    Claim("KT1.spectral-radius", "K Table 1", "and in spectral radius", "rho 2.29, 7.48, 2.28, 3.94, 2.23, 1.11",
          "mean |log10 (our rho / Table 1's)| over its six norms (DeepNorm as `deepnorm_pre`), GPT-2's "
          "initialization", "<", 0.1),
    Claim("KF1.radius-grows", "K Fig. 1", "early layers lie near the unit circle, late ones have a larger radius",
          "late layers larger", "rho of the last minus the first layer, Pre-LN at initialization", ">", 0.0),
    Claim("KT1.normed-stable", "K Table 1", "models with norms do not diverge",
          "0 of 130", "share of runs with norms that diverge at LR up to 3e-2", "<", 0.05),
    Claim("KT1.no-norm-diverges", "K Table 1", "models without norms diverge",
          "81 of 84", "share of runs without norms that diverge at LR up to 3e-2", ">", 0.5),
    Claim("KT2.m1-auroc", "K Table 2", "near-unit mass at initialization separates runs that diverge",
          "AUROC 0.995", "AUROC of mean M1, LR up to 3e-2", ">", 0.9),
    Claim("KT2.across-lrs", "K Table 2", "the same over all learning rates of the grid",
          "AUROC 0.995", "AUROC of mean M1, all LRs", ">", 0.9),
    Claim("KT2.beats-gradients", "K Table 2", "it does so better than what gradients show early in training",
          "0.995 against 0.62 to 0.76",
          "AUROC of mean M1 minus that of the best gradient baseline, each in its better direction and on the runs "
          "that outlast its window, LR up to 3e-2", ">", 0.0),
    Claim("KT2.beats-norm-type", "K Table 2", "it knows more than which norm the model has",
          "0.995; the bare indicator, from Table 1's counts: 0.989",
          "AUROC of mean M1 minus that of 'has no norms', LR up to 3e-2", ">", 0.0),
    Claim("KT2.within-norms", "K Table 2", "it ranks models of the same norm type",
          "not given", "AUROC of mean M1 among pairs of runs with equal norm and LR, all LRs", ">", 0.5),
    Claim("KF5.ece", "K Fig. 5", "read as a probability, the risk score is poorly calibrated",
          "ECE 0.283", "expected calibration error of mean M1, LR up to 3e-2", ">", 0.1),
    Claim("KT2.held-out-norms", "ours", "spectra help to predict divergence under norms not seen before",
          "not tested",
          "AUROC on held-out norms of a logistic model of LR, shape and spectra minus that of one of LR and shape, "
          "all LRs", ">", 0.0),
    Claim("KT2.largest-stable-lr", "ours", "and help to predict the largest stable learning rate",
          "not tested",
          "error (decades of LR) on held-out norms of a model of shape and spectra minus that of the median of the "
          "other norms", "<", 0.0),
    Claim("KO.kicks-close", "ours", "random kicks to the weights of an untrained model foretell the largest stable "
          "learning rate of architectures not seen before", "not tested",
          "error (decades of LR) of the kicks on architectures outside of the sweep", "<", 0.3),
    Claim("KO.kicks-beat-norm", "ours", "they do so better than what models of the same norm bore", "not tested",
          "error (decades of LR) of the kicks minus that of the sweep's median limit of the same norm, "
          "architectures outside of the sweep", "<", 0.0),
    Claim("KO.spectra-beat-norm", "ours", "spectra and Kreiss constants do so too", "not tested",
          "error (decades of LR) of a model of shape, spectra and Kreiss constants minus that of the sweep's "
          "median limit of the same norm, architectures outside of the sweep that have a profile", "<", 0.0),
)
