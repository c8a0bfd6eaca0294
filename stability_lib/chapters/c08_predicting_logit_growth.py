"""Chapter 08, forecasts of attention logits scored on larger models, and transplanted logits (paper P, Figs 9, 10).

Restated after these runs had been seen, as the first version measured the wrong thing:
- P9.forecast asked for an error under 0.3 decades and P9.auroc for more than 0.8, which what costs nothing meets.
- P9.early-above-1e4 had two runs to go by and is gone. P9.above-1e4 asks by half of training: 21 of 21 known.
- P9.lr-width is new: LR x width, no fit and no logit, was known to have an AUROC of 1.000, the quadratic 0.987.
- P9.brier turned with the penalty of the logistic regression against LR x width, though not against the LR alone. Its
  rule is now that each score, in logs, is brought to unit variance over the fitted runs, and the penalty is the
  library's own (C = 1), as a penalty on raw scores favours those that spread wide. Other penalties stand beside it.
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


STUDIES = (attention_logit_growth, logit_growth_by_size, logit_growth_near_failure, logit_transplant)

CLAIMS = (
    Claim("P9.forecast", "P Fig. 9", "a quadratic in log N, fitted per learning rate to smaller models, foretells "
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
    Claim("P10.worsens", "P Fig. 10", "attention logits forced to about 1e3 raise the loss",
          "loss worsens at kappa about 1e3",
          "final loss at kappa 1e3 minus that at the best smaller kappa (nats)", ">", 0.1),
    Claim("P10.bigram", "P Fig. 10", "forced to 1e4, the model is worse than one without layers",
          "worse than a zero-layer bigram model by 1e4",
          "final loss at kappa 1e4 minus that of the model without layers (nats)", ">", 0.0),
)
