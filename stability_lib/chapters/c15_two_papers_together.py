"""Chapter 15, the two papers held together: does a spectral profile (paper K) foresee what paper P measures, and do
the remedies of one do the other's work?

What these runs can decide, reckoned from chapter 07's runs of the same length and from pilots on seed 100: with four
seeds and three sizes a difference of 0.025 nats in LR sensitivity and of 0.02 in the best loss; with 27 models a rank
correlation beyond 0.38 and an AUROC about 0.15 from one half; with 18 pairs of remedy and size a rank correlation
beyond 0.47.

`remedies_seeds` came after all other runs. Of the sixteen claims on the remedies' arms four seeds of `remedies_of_both`
had left open PK.kss-loss, at 0.0114 nats [-0.0155, 0.0383], PK.kss-remedies, 0.044 [0.0143, 0.0736] against 0.02,
PK.kss-mass, -0.0204 [-0.0468, 0.00602], PK.warm-up-mass, -0.0246 [-0.0501, 0.0009], and PK.mass-explains, 0.102
[-0.383, 0.543], and as leads PK.qk-blind, PK.qk-norm-mass and PK.z-loss-mass; the other eight verdicts were known.
Twelve new seeds alone judge all sixteen now, criteria unchanged. By the scatter over the four they give the first four
to +-0.011, +-0.012, +-0.011 and +-0.010. Their grid was committed before they were trained, that they judge alone while
they were, before any was read. Section 4's models without remedies keep the four seeds that its claims had from the
start.
"""

from collections.abc import Mapping

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import PAPER_LRS, check_scale, short, size
from .c04_rksp_auroc import untrained
from .c07_width_vs_depth import width_and_depth
from .c08_predicting_logit_growth import attention_logit_growth, logit_growth_by_size, logit_growth_near_failure

SIZES = {
    "quick": [size(32, 2)],
    "cpu": [size(32, 2), size(48, 2), size(64, 3)],
    "gpu": [size(128, 2, 32), size(288, 2, 32)],
    "paper": [size(256, 3, 64), size(512, 6, 64), size(768, 12, 64)],
}
LRS = {"quick": PAPER_LRS[2::2], "cpu": PAPER_LRS[2:], "gpu": (1e-3, 1e-2, 1e-1), "paper": PAPER_LRS}
Z_LOSS, DECAY = 1e-2, 1e-2
"""Strong enough to act in runs of this length, where paper P's 1e-4 of each hardly does (chapters 02, 06)."""
MATCHED = (0.022, 0.040, 0.065)
"""By size, alpha at which the first gradient of KSS at every step is as large as the task's (scale `cpu`, six pilot
seeds)."""
GENTLE = 0.1
"""Share of it at which gentle KSS acts. A pilot (48 wide, three layers, one seed) at a share of 1 and 0.3 raised the
loss at LR 1e-2 by 0.38 and 0.12 nats, at 0.1 by 0.01."""


def plain(scale: str, **changes) -> RunConfig:
    """Paper P's recipe with none of the remedies, read at ten equal steps on its way."""
    setting = short(check_scale(scale))
    less = dict(steps=200, warmup_steps=10) if scale == "gpu" else dict(batch_size=16) if scale != "paper" else {}
    setting = replace(setting, **less, qk_norm="none", z_loss=0.0, weight_decay=0.0)
    return replace(setting, **dict(probe_every=setting.steps // 10, spectra_every=setting.steps // 10) | changes)


def remedies_of_both(scale: str) -> list[RunConfig]:
    """Each remedy of either paper by itself, at three sizes and over learning rates. KSS at paper K's dose, 0.15 at
    every tenth step, and gently at every step."""
    setting, last = plain(scale), 1e-4 if scale == "paper" else None
    arms = [{}, dict(qk_norm="head"), dict(z_loss=last or Z_LOSS), dict(warmup_steps=setting.steps // 4),
            dict(weight_decay=last or DECAY), dict(shaping="kss")]
    found = []
    for shape, alpha in zip(SIZES[scale], MATCHED, strict=False):
        found += grid(replace(setting, **shape), arm=[*arms, _gentle(alpha)], lr=LRS[scale], seed=_seeds(scale, 4))
    return found


def remedies_seeds(scale: str) -> list[RunConfig]:
    """The same on twelve new seeds. At all scales but cpu the first grid."""
    found = remedies_of_both(scale)
    if scale != "cpu":
        return found
    return [replace(config, seed=seed) for config in found if config.seed == 0 for seed in range(401, 413)]


def norm_placements(scale: str) -> list[RunConfig]:
    """Models that differ in where they are normalised, in initialization and in shape, without remedies."""
    norms = ["pre_ln", "rmsnorm", "post_ln", "deepnorm_pre", "subln", "no_norm"]
    shapes = {"quick": [size(32, 2)], "cpu": [size(64, 2), size(32, 4)], "gpu": [size(288, 2, 32)],
              "paper": [size(512, 3, 64), size(256, 12, 64)]}[check_scale(scale)]
    inits = ["fan_in", "gpt2"]
    if scale in ("quick", "gpu"):
        norms = norms[::5] if scale == "gpu" else norms[2::3]
    found = grid(plain(scale), norm=norms, init=inits, shape=shapes, lr=LRS[scale], seed=_seeds(scale, 1))
    return [config for config in found if config not in remedies_of_both(scale)]


def scored(scale: str) -> dict[str, list[RunConfig]]:
    """By study, the runs without qk-norm of chapters 07 and 08 whose failures a profile is to foresee; few at `quick`.
    """
    found = [logit_growth_near_failure] if scale == "quick" else SCORED
    return {study.__name__: [c for c in study(scale) if c.qk_norm == "none"] for study in found}


def profiles_at_start(scale: str) -> list[RunConfig]:
    """Profiles at initialization of the models of `scored`."""
    trained = [config for configs in scored(scale).values() for config in configs]
    return list(dict.fromkeys(untrained(config, probe_every=1) for config in trained))


def arm(run: Mapping) -> str:
    """What a run does for its stability, of its fields: `none`, `qk-norm`, `KSS` at paper K's dose, `gentle KSS`."""
    if run["shaping"] != "none":
        return "KSS" if run["shaping_every"] > 1 else "gentle KSS"
    if run["qk_norm"] != "none":
        return "qk-norm"
    if run["z_loss"] or run["weight_decay"]:
        return f"z-loss {run['z_loss']:g}" if run["z_loss"] else f"decay {run['weight_decay']:g}"
    return "long warm-up" if run["warmup_steps"] > run["steps"] / 5 else "none"


def _gentle(alpha: float) -> dict:
    return dict(shaping="kss", shaping_every=1, shaping_alpha=GENTLE * alpha)


def _seeds(scale: str, many: int) -> range:
    return range({"quick": min(many, 2), "cpu": many}.get(scale, 3))


SCORED = (width_and_depth, attention_logit_growth, logit_growth_by_size, logit_growth_near_failure)
STUDIES = (remedies_of_both, remedies_seeds, norm_placements, profiles_at_start, *SCORED)

CLAIMS = (
    Claim("PK.init-m1", "K Table 2", "near-unit mass at initialization ranks models by whether they fail",
          "AUROC 0.995", "AUROC of mean M1 among pairs of runs of equal LR, models of six norms", ">", 0.5),
    Claim("PK.init-beats-free", "ours", "it ranks them better than what is free to know", "not tested",
          "AUROC of mean M1 minus that of the best of 'has no norms', width and depth, each in its better direction, "
          "pairs of runs of equal LR, models of six norms", ">", 0.0),
    Claim("PK.init-sizes", "ours", "among models that differ in size alone it ranks them better than width",
          "not tested", "AUROC of mean M1 in its better direction minus that of width, pairs of runs of one study and "
          "equal LR, chapters 07 and 08 without qk-norm", ">", 0.0),
    Claim("PK.init-logits", "ours", "where it is higher, attention logits grow larger", "not tested",
          "rank correlation over models of mean M1 at initialization with log10 of the peak attention logit, mean over "
          "LRs", ">", 0.0),
    Claim("PK.init-drift", "ours", "and log Z of the output drifts further", "not tested",
          "rank correlation over models of mean M1 at initialization with log10 of mean |log Z| over the second half, "
          "mean over LRs", ">", 0.0),
    Claim("PK.init-sensitivity", "ours", "and LR sensitivity is higher", "not tested",
          "rank correlation over models of mean M1 at initialization with LR sensitivity", ">", 0.0),
    Claim("PK.init-best-lr", "ours", "and the best learning rate is lower", "not tested",
          "rank correlation over models of mean M1 at initialization with the best LR", "<", 0.0),
    Claim("PK.held-out-sensitivity", "ours", "a profile helps to foretell the LR sensitivity of models of other norms",
          "not tested", "error of a ridge regression on shape, norms and profile minus that of one on shape and norms, "
          "norm and initialization held out (nats)", "<", 0.0),
    Claim("PK.held-out-best-lr", "ours", "and their best learning rate", "not tested",
          "the same for log10 best LR (decades)", "<", 0.0),
    Claim("PK.qk-blind", "ours", "the profile of an untrained model does not show whether it has qk-norm",
          "not tested", "M1 at initialization, with minus without qk-norm, same size and seed", "within", 0.03),
    Claim("PK.qk-blind-early", "ours", "nor does that of one a tenth into training", "not tested",
          "M1 at 10% of the steps, with minus without qk-norm, mean over LRs and sizes", "within", 0.05),
    Claim("PK.early-m1", "ours", "near-unit mass a tenth into training ranks runs by whether they fail", "not tested",
          "AUROC of mean M1 at 10% of the steps, all LRs, runs without remedy", ">", 0.5),
    Claim("PK.early-beats-logit", "ours", "it does so better than the run's own attention logit at that step",
          "not tested", "AUROC of mean M1 in its better direction minus that of the largest attention logit, both at "
          "10% of the steps, all LRs", ">", 0.0),
    Claim("PK.early-beats-lr", "ours", "and better than learning rate times width", "not tested",
          "AUROC of mean M1 at 10% of the steps in its better direction minus that of LR x width, all LRs", ">", 0.0),
    Claim("PK.early-profile", "ours", "at one learning rate an early profile tells more than logit and loss of the "
          "same step", "not tested",
          "AUROC of the best of M1, rho, eta and kappa minus that of the better of largest attention logit and loss, "
          "each in its better direction, at 10% of the steps, pairs of runs of equal LR", ">", 0.0),
    Claim("PK.kss-logits", "ours", "KSS keeps attention logits smaller", "not tested",
          "log10 of the peak attention logit at LR 0.1 and above, gentle KSS minus none", "<", 0.0),
    Claim("PK.kss-logits-qk", "ours", "about as small as qk-norm does", "not tested",
          "log10 of the peak attention logit at LR 0.1 and above, gentle KSS minus qk-norm", "<", 0.3),
    Claim("PK.kss-log-z", "ours", "KSS brings log Z of the output closer to 0, as z-loss does", "not tested",
          "log10 of mean |log Z| over the second half, gentle KSS minus none, mean over LRs", "<", -0.1),
    Claim("PK.kss-sensitivity-paper", "ours", "KSS at the paper's dose lowers LR sensitivity", "not tested",
          "LR sensitivity, KSS at the paper's dose minus none, three sizes (nats)", "<", 0.0),
    Claim("PK.kss-sensitivity", "ours", "gentle KSS lowers LR sensitivity", "not tested",
          "LR sensitivity, gentle KSS minus none, three sizes (nats)", "<", 0.0),
    Claim("PK.kss-qk-norm", "ours", "by as much as qk-norm does", "not tested",
          "LR sensitivity, the better dose of KSS minus qk-norm, three sizes (nats)", "<", 0.02),
    Claim("PK.kss-loss", "ours", "each at its best learning rate, KSS lowers the loss", "not tested",
          "loss at the best LR, the better dose of KSS minus none, three sizes (nats)", "<", 0.0),
    Claim("PK.kss-remedies", "ours", "by as much as the best of paper P's remedies", "not tested",
          "loss at the best LR, the better dose of KSS minus the best of qk-norm, z-loss, long warm-up and decay, "
          "three sizes (nats)", "<", 0.02),
    Claim("PK.kss-mass", "K Table 3", "KSS lowers near-unit mass", "0.58 against 0.85",
          "M1 at the last reading, gentle KSS minus none, mean over LRs", "<", 0.0),
    Claim("PK.qk-norm-mass", "ours", "so does qk-norm", "not tested",
          "M1 at the last reading, qk-norm minus none, mean over LRs", "<", 0.0),
    Claim("PK.z-loss-mass", "ours", "so does z-loss", "not tested",
          "M1 at the last reading, z-loss minus none, mean over LRs", "<", 0.0),
    Claim("PK.warm-up-mass", "ours", "so does a long warm-up", "not tested",
          "M1 at the last reading, long warm-up minus none, mean over LRs", "<", 0.0),
    Claim("PK.decay-mass", "ours", "so does independent weight decay", "not tested",
          "M1 at the last reading, decay minus none, mean over LRs", "<", 0.0),
    Claim("PK.mass-explains", "K Table 6", "what lowers near-unit mass lowers LR sensitivity", "r = -0.87 with the "
          "fall in divergence", "rank correlation over remedies and sizes of the change in M1 with that in LR "
          "sensitivity", ">", 0.0),
)
