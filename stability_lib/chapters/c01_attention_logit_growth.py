"""Chapter 01, attention-logit growth: LR against loss by size, without and with qk-norm (paper P, Figs 1, 2, E.1)."""

from ..claims import Claim
from ..config import RunConfig, grid
from ..studies import PAPER_LRS, SIZES, base, check_scale


def attention_logit_growth(scale: str) -> list[RunConfig]:
    """LR against final loss by size, without and with qk-norm, three seeds (paper P, Figs 1, 2, E.1)."""
    lrs = PAPER_LRS[{"quick": 2, "gpu": 1}.get(check_scale(scale), 0):]
    return grid(base(scale), size=SIZES[scale], qk_norm=["none", "head"], lr=lrs, seed=[0, 1, 2])


def attention_patterns(scale: str) -> list[RunConfig]:
    """One head's attention pattern over training at the highest LR, without and with qk-norm."""
    return grid(base(scale), size=SIZES[scale][1:2], qk_norm=["none", "head"], lr=[3e-1], seed=[0], attention_maps=[6])


STUDIES = (attention_logit_growth, attention_patterns)

CLAIMS = (
    Claim("P1.instability", "P Fig. 1", "without qk-norm, training fails at a high learning rate",
          "the loss at high LR explodes",
          "final loss without minus with qk-norm at the highest LR (nats)", ">", 0.3),
    Claim("P1.lr-falls", "P Fig. 1", "the failing learning rate falls as the model grows",
          "at a lower LR the larger the model",
          "slope of log10 failing LR per decade of N, without qk-norm", "<", 0.0),
    Claim("P1.qk-norm-trains", "P Fig. 1", "with qk-norm, models train across the whole range of learning rates",
          "three orders of magnitude of LR", "share of runs with qk-norm that do not fail", ">", 0.8),
    Claim("P1.sensitivity-falls", "P Fig. 1", "qk-norm lowers LR sensitivity",
          "falls with qk-norm", "LR sensitivity with minus without qk-norm (nats)", "<", 0.0),
    Claim("P1.sensitivity-grows", "P Fig. 1", "without qk-norm, LR sensitivity grows with size",
          "grows with N", "slope of LR sensitivity per decade of N, without qk-norm (nats)", ">", 0.0),
    Claim("P1.sensitivity-grows-qk", "P Fig. 1", "with qk-norm, LR sensitivity still grows with size",
          "still grows with N", "slope of LR sensitivity per decade of N, with qk-norm (nats)", ">", 0.0),
    Claim("P2.logits-blow-up", "P Fig. 2", "the largest attention logit of block 0 blows up where the loss does",
          "the logit blows up where the loss does",
          "log10 ratio of the peak logit at the highest LR to that at LR 1e-2, without qk-norm", ">", 1.0),
    Claim("P9.failing-above-1e4", "P Figs 2, 9", "failing runs have attention logits above about 1e4",
          "above 1e4", "log10 of the peak attention logit, mean over failing runs without qk-norm", ">", 4.0),
    Claim("P9.above-1e4-fails", "P Fig. 9", "every run with an attention logit above 1e4 fails",
          "all points above 1e4 diverged", "share of runs above 1e4 that fail", ">", 0.75),
    Claim("PE1.norms", "P Fig. E.1", "it is the norms of q and k that make logits large, not their alignment",
          "norms grow, cosine similarity does not",
          "share of the largest logit's log growth due to |q||k|, failing runs without qk-norm", ">", 0.5),
)
