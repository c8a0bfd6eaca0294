"""Chapter 08, forecasts of attention logits scored on larger models, and transplanted logits (paper P, Figs 9, 10).

Restated before the runs of `logit_growth_new_rates`, on which alone the P9 claims are judged now, at learning rates no
run had before; a run fails by its size's whole LR curve, old rates included.
- P9.early-above-1e4 had two runs to go by and is gone. P9.above-1e4 asks by half of training: 21 of 21 in old runs.
- P9.lr-width is new: in the old runs LR x width, no fit and no logit, had an AUROC of 1.000, the quadratic 0.987.
- P9.brier turned with the penalty of the logistic regression against LR x width, though not against the LR alone. Its
  rule is now that each score, in logs, is brought to unit variance over the fitted runs, and the penalty is the
  library's own (C = 1), as a penalty on raw scores favours those that spread wide. Other penalties stand beside it.
Otherwise known of the old runs: between LR 0.01 and 0.1 the quadratic errs by 0.07 decades more than the last logit at
the largest size, and by 0.19 less over all settings. The new rates lie around those where the old ones had failing set
in (width x LR near 4.2). P10.head-size is new; kappa where the loss passes the bigram's was known for one head size.

What the new runs can decide (95% intervals, half of a width; scatter of the old runs):
- P9.forecast, P9.better-than-last: standard deviation 0.02 to 0.05 and 0.10 over seeds; five give +-0.05 and +-0.13.
- P9.auroc, P9.auroc-same, P9.lr-width, P9.brier: 28 held-out settings, twelve or more at rates where size decides; the
  old 24, four of them such, gave +-0.02 (LR), +-0.10 (same), +-0.02 (LR x width), +-0.09 (Brier).
- P9.above-1e4: 13 runs of which all fail would do.
- P10.head-size: kappa at the bigram's loss varies by 0.055 decades over seeds, its slope by 0.13; ten give +-0.1. The
  margin lies half-way between the two predictions, 0 (kappa, the size of a typical logit) and -0.5 (the largest).
"""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import PAPER_LRS, SIZES, base, check_scale, short, size
from .c01_attention_logit_growth import attention_logit_growth

_SIZES_BETWEEN = {
    "quick": [size(16, 1), size(48, 2)],
    "cpu": [size(16, 1), size(48, 3), size(80, 4)],
    "gpu": [size(64, 3), size(128, 4, 32), size(256, 5, 32)],
    "paper": [size(128, 2, 64), size(384, 4, 64), size(640, 9, 64), size(896, 18, 64)],
}
"""Sizes between and below those of chapter 01."""


def logit_growth_by_size(scale: str) -> list[RunConfig]:
    """Sizes between and below those of chapter 01, without qk-norm, so that forecasts have something to be
    fitted on and something to be held to (paper P, Fig. 9)."""
    return grid(base(scale), size=_SIZES_BETWEEN[scale], qk_norm=["none"], lr=PAPER_LRS[2:], seed=[0, 1, 2])


def logit_growth_near_failure(scale: str) -> list[RunConfig]:
    """All sizes at learning rates between the paper's, where failing sets in."""
    lrs = {"quick": [1.7e-1], "cpu": [5.5e-2]}.get(check_scale(scale), [5.5e-3, 1.7e-2, 5.5e-2])
    return grid(base(scale), size=SIZES[scale] + _SIZES_BETWEEN[scale], qk_norm=["none"], lr=lrs, seed=[0, 1, 2])


def logit_transplant(scale: str) -> list[RunConfig]:
    """Attention logits forced to a size kappa, and a model without layers (paper P, Fig. 10)."""
    kappas = [1e1, 1e3, 1e4] if scale == "quick" else [1e0, 1e1, 1e2, 3e2, 1e3, 3e3, 1e4, 1e5]
    setting = replace(short(scale), **SIZES[scale][1], qk_norm="none", probe_every=short(scale).steps // 10)
    return grid(setting, arm=[{}, dict(n_layers=0, probe_every=0), *(dict(logit_transplant=k) for k in kappas)],
                seed=[0, 1, 2])


def logit_growth_new_rates(scale: str) -> list[RunConfig]:
    """All sizes at learning rates that no run had before, close together where failing sets in."""
    if check_scale(scale) == "quick":
        return logit_growth_near_failure(scale)
    lrs = {"cpu": [1.7e-2, 4e-2, 4.7e-2, 6.5e-2, 7.5e-2, 8.7e-2, 1.7e-1]}.get(scale, [4e-2])
    setting = replace(base(scale), steps=300, warmup_steps=15, probe_every=10) if scale == "gpu" else base(scale)
    return grid(setting, size=SIZES[scale] + _SIZES_BETWEEN[scale], qk_norm=["none"], lr=lrs,
                seed=range(5) if scale == "cpu" else range(3))


def logit_transplant_heads(scale: str) -> list[RunConfig]:
    """Attention logits forced to kappa with heads of half, the same and twice the size."""
    few = scale in ("quick", "gpu")
    setting = replace(logit_transplant(scale)[0], probe_every=0, **dict(steps=200, warmup_steps=10) if few else {})
    if scale == "quick":
        setting = replace(setting, steps=short(scale).steps, warmup_steps=short(scale).warmup_steps)
    heads = [setting.n_heads * 2, setting.n_heads, setting.n_heads // 2]
    return grid(setting, n_heads=[heads[0], heads[-1]] if few else heads, logit_transplant=[3e1, 1e2, 3e2],
                seed=range(3 if scale == "gpu" else 2 if few else 10))


STUDIES = (attention_logit_growth, logit_growth_by_size, logit_growth_near_failure, logit_growth_new_rates,
           logit_transplant, logit_transplant_heads)

CLAIMS = (
    Claim("P9.forecast", "ours", "a quadratic in log N, fitted per learning rate to smaller models, foretells "
          "the early attention logit of the largest", "the fit foretells the 4.8B model's failure",
          "error of the forecast logit of the largest size minus that of the largest fitted size's logit, mean over "
          "LRs (decades)", "<", 0.0),
    Claim("P9.better-than-last", "ours", "the fit foretells logits of larger models better than the largest fitted "
          "model's own logit", "not tested",
          "error of the quadratic minus that of the largest fitted size's logit, all held-out settings (decades)",
          "<", 0.0),
    Claim("P9.above-1e4", "P Fig. 9", "a run whose attention logit passes 1e4 fails",
          "all points above 1e4 diverged", "share of runs with a logit above 1e4 by half of training that fail", ">",
          0.75),
    Claim("P9.auroc", "P Fig. 9", "the forecast logit foretells which larger models fail at which learning rate",
          "foretells that 4.8B diverges at LR 1e-2",
          "AUROC of the forecast logit over runs at held-out settings minus that of the LR alone", ">", 0.0),
    Claim("P9.auroc-same", "ours", "it does so better than 'the same as the largest fitted size'", "not tested",
          "AUROC of the forecast logit minus that of the share of failures at the largest fitted size and same LR",
          ">", 0.0),
    Claim("P9.lr-width", "ours", "learning rate times width, with no fit and no logit, ranks as well", "not tested",
          "AUROC of the forecast logit minus that of LR x width", "<", 0.01),
    Claim("P9.brier", "ours", "read as probabilities, its forecasts are closer to what happens than those from the "
          "learning rate alone", "not tested",
          "Brier score of logistic regression (unit variance, C = 1) on the logit minus that on log LR, both fitted on "
          "the smaller sizes", "<", 0.0),
    Claim("P10.worsens", "P Fig. 10", "typical attention logits forced to 1e3 raise the loss",
          "loss worsens at kappa about 1e3",
          "final loss at kappa 1e3 minus that at the best smaller kappa (nats)", ">", 0.1),
    Claim("P10.bigram", "P Fig. 10", "forced to 1e4, they make the model worse than one without layers",
          "worse than a zero-layer bigram model by 1e4",
          "final loss at kappa 1e4 minus that of the model without layers (nats)", ">", 0.0),
    Claim("P10.head-size", "ours", "what counts is kappa, the size of a typical logit, and not the largest, which "
          "grows with the root of the head size", "not tested",
          "slope of log10 kappa at which the loss passes that without layers (line in log kappa) per decade of head "
          "size", "within", 0.25),
)
