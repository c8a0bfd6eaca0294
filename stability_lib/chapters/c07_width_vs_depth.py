"""Chapter 07, width against depth (paper P, Figs 7, E.2, E.3)."""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import PAPER_LRS, check_scale, short, size


def width_and_depth(scale: str) -> list[RunConfig]:
    """LR against loss as width, depth or both grow from one model, the first of the list, to about the same
    number of parameters (paper P, Figs 7, E.2, E.3)."""
    sizes = {"quick": [size(32, 1), size(64, 1), size(32, 4), size(48, 2)],
             "cpu": [size(32, 2), size(64, 2), size(96, 2), size(32, 8), size(32, 16), size(48, 3), size(64, 4)],
             "gpu": [size(d, n, 32) for d, n in [(128, 2), (256, 2), (384, 2), (128, 8), (128, 16), (192, 3),
                                                 (256, 4)]],
             "paper": [size(d, n, 64) for d, n in [(512, 6), (1024, 6), (1536, 6), (2048, 6), (512, 24), (512, 48),
                                                   (512, 96), (768, 9), (1024, 12), (1280, 15)]]}[check_scale(scale)]
    setting = replace(short(scale), batch_size=16) if scale in ("quick", "cpu") else short(scale)
    return grid(setting, size=sizes, qk_norm=["none", "head"],
                lr=PAPER_LRS[2::2] if scale == "quick" else PAPER_LRS[2:], seed=[0, 1, 2])


STUDIES = (width_and_depth,)

CLAIMS = (
    Claim("P7.depth-raises", "P Fig. 7", "LR sensitivity grows with depth",
          "depth raises LR sensitivity",
          "slope of LR sensitivity per decade of N, depth grown, with qk-norm (nats)", ">", 0.0),
    Claim("P7.depth-faster", "P Fig. 7", "depth raises LR sensitivity faster than width",
          "depth faster than width",
          "slope of LR sensitivity per decade of N, depth minus width, with qk-norm (nats)", ">", 0.0),
    Claim("P7.depth-faster-above", "ours", "the same where only learning rates from the best one up count",
          "not tested",
          "slope of LR sensitivity above the best LR per decade of N, depth minus width, with qk-norm (nats)",
          ">", 0.0),
    Claim("PE2.depth-faster", "P Fig. E.2", "without qk-norm too, depth raises LR sensitivity faster than width",
          "the same without qk-norm",
          "slope of LR sensitivity per decade of N, depth minus width, without qk-norm (nats)", ">", 0.0),
    Claim("PE3.lowest-loss", "P Fig. E.3", "growing width and depth together gives the lowest loss at the largest "
          "size", "joint scaling lowest at the largest scale",
          "best loss at the largest size, both grown minus the lower of width and depth, with qk-norm (nats)",
          "<", 0.0),
    Claim("PE3.extrapolates", "P Fig. E.3", "and its loss can be extrapolated best from smaller sizes",
          "joint scaling extrapolates best",
          "error of a power law's forecast of the best loss at the largest size, both grown minus the smaller "
          "error of width and depth, with qk-norm (nats)", "<", 0.0),
)
