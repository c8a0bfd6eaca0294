"""Chapter 07, width against depth (paper P, Figs 7, E.2, E.3).

Restated before the runs of the second grid, which all claims are now judged on: the two paths of the first one meet at
width 32, far below the vocabulary of 84, and at 16 layers of it in a shape that nobody would train.
- PE3.as-low stands for PE3.lowest-loss, which took the lower of two noisy losses seed by seed, at unequal N: it
  compares at equal N and calls lowest what is so to 0.02 nats, a hundredth of the loss. PE3.extrapolates asked for any
  advantage, which errors of some hundredths of a nat can neither show nor exclude, and now asks for one of 0.02 nats.
- P7.width-raises, P7.best-loss and the FS claims are new.
Known by then: the first grid's estimates, and those of a pilot, on which this chapter had been judged before: 368 runs
on seeds 0 to 9 at LR 0.01 and above, 272 of them from other initial weights than the library draws now. They are in the
repository's history alone. There depth minus width was 0.009 [-0.005, 0.023] a decade in LR
sensitivity with qk-norm, 0.111 [0.049, 0.173] without, and 0.003 [-0.003, 0.009] in best loss; both grown ended 0.004
[-0.013, 0.006] below width. All its best LRs were the lowest, so that this grid begins at 0.003, as the first, and
takes new seeds.

The FS claims take no training. A pilot on seeds 100 to 105 gave 0.63 +-0.06 for width, 0.72 +-0.10 for depth; seeds 12
to 35, for which they were stated, 0.521 [0.468, 0.574] and 0.665 [0.600, 0.730], with FS.width over its border, whose
criterion stays. It is judged now by 200 new seeds, 236 to 435, at the two ends of its path, FS.depth-faster by the 24.

What these runs can decide, by the scatter of that pilot (95% intervals, half of a width):
- P7.* with qk-norm: slopes of LR sensitivity differ with a standard deviation of 0.021 over seeds; eleven give +-0.014.
  A difference as small as the pilot's would take 25. PE2.depth-faster: 0.062; five seeds give +-0.08.
- P7.best-loss: 0.009; eleven seeds give +-0.006. PE3.as-low: 0.013; eight give +-0.011.
- PE3.extrapolates: an error of a forecast varies by 0.01 to 0.02; eight seeds give the difference to +-0.015.
- FS.depth-faster: 24 seeds give +-0.045. FS.width: those vary by 0.126, so that 200 give +-0.018; it needs 0.021.
"""

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


def width_and_depth_wider(scale: str) -> list[RunConfig]:
    """The same from a wider model, three times as long, with more seeds: depth 2, 4, 8 against width 64, 96, 128; with
    qk-norm both grown, too, for figure E.3, and more seeds of the ends. At scales quick and paper the first grid."""
    if check_scale(scale) in ("quick", "paper"):
        return width_and_depth(scale)
    first, head = (64, 16) if scale == "cpu" else (256, 32)
    setting = replace(width_and_depth(scale)[0], steps=600, warmup_steps=30)
    lrs, seeds = (PAPER_LRS[2:], range(10, 18)) if scale == "cpu" else (PAPER_LRS[3:], range(10, 13))
    ends = [size(first, 2, head), size(first, 8, head), size(first * 2, 2, head)]
    middle = [size(first, 4, head), size(first * 3 // 2, 2, head)]
    both = [size(first * 5 // 4, 3, head), size(first * 3 // 2, 4, head)]
    more = grid(setting, size=ends, qk_norm=["head"], lr=lrs, seed=range(18, 21)) if scale == "cpu" else []
    return [*grid(setting, size=[*ends, *middle, *both], qk_norm=["head"], lr=lrs, seed=seeds), *more,
            *grid(setting, size=[*ends, *middle], qk_norm=["none"], lr=lrs, seed=seeds[:5])]


STUDIES = (width_and_depth, width_and_depth_wider)

CLAIMS = (
    Claim("P7.depth-raises", "P Fig. 7", "LR sensitivity grows with depth",
          "depth raises LR sensitivity",
          "slope of LR sensitivity per decade of N, depth grown, with qk-norm (nats)", ">", 0.0),
    Claim("P7.width-raises", "ours", "LR sensitivity grows with width", "not stated",
          "slope of LR sensitivity per decade of N, width grown, with qk-norm (nats)", ">", 0.0),
    Claim("P7.depth-faster", "P Fig. 7", "depth raises LR sensitivity faster than width",
          "depth faster than width",
          "slope of LR sensitivity per decade of N, depth minus width, with qk-norm (nats)", ">", 0.0),
    Claim("P7.depth-faster-above", "ours", "the same where only learning rates from the best one up count",
          "not tested",
          "slope of LR sensitivity above the best LR per decade of N, depth minus width, with qk-norm (nats)",
          ">", 0.0),
    Claim("P7.best-loss", "ours", "added layers and added width lower the best loss alike", "not tested",
          "best loss at the largest size, depth minus width, with qk-norm (nats)", "within", 0.02),
    Claim("PE2.depth-faster", "P Fig. E.2", "without qk-norm too, depth raises LR sensitivity faster than width",
          "the same without qk-norm",
          "slope of LR sensitivity per decade of N, depth minus width, without qk-norm (nats)", ">", 0.0),
    Claim("PE3.as-low", "P Fig. E.3", "growing width and depth together gives the lowest loss at the largest size, to "
          "a hundredth of it", "joint scaling lowest at the largest scale",
          "best loss at the largest size of width, both grown (read between its two largest sizes, in logs) minus the "
          "path of width or depth that is lower in the mean, with qk-norm (nats)", "<", 0.02),
    Claim("PE3.extrapolates", "P Fig. E.3", "and its loss can be extrapolated best from smaller sizes",
          "joint scaling extrapolates best",
          "error of a power law's forecast of the best loss at the largest size, both grown minus the smaller "
          "error of width and depth, with qk-norm (nats)", "<", -0.02),
    Claim("FS.width", "ours", "AdamW's first step moves a wider model by a power of N between 1/2 and 3/4",
          "not tested", "exponent of N of the first step's change of the logits, width grown, less 5/8", "within",
          0.125),
    Claim("FS.depth-faster", "ours", "and a deeper one by a higher power than a wider one", "not tested",
          "exponent of N of the first step's change of the logits, depth minus width", ">", 0.0),
)
