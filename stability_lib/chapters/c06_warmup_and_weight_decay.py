"""Chapter 06, warm-up, weight decay, steps and batch size (paper P, Figs 5, 6, E.7, E.9, E.10).

PE10.best-lr kept its criterion and got other runs: over decays of 1e-4 to 1e-2, of which the smaller hardly act in 200
steps, three seeds had left it undecided; `best_lr_by_decay` has decays that act and ten new seeds. By the scatter of
the old runs, 0.1 decades of the best LR, ten seeds and 1.5 decades of lambda give the slope to +-0.08 (95% interval, so
half of its width). Its runs were trained on another machine under torch 2.11, whose initial weights are other draws
from the same law: they are compared with each other alone.
"""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import PAPER_LRS, SIZES, short, size


def warm_up(scale: str) -> list[RunConfig]:
    """LR against loss by length of the warm-up, 1%, 5% and 25% of the run (paper P, Fig. 5)."""
    setting = short(scale)
    lengths = [max(1, setting.steps // 100), setting.warmup_steps, setting.steps // 4]
    return grid(setting, warmup_steps=lengths, size=_two_sizes(scale), lr=_lrs(scale), seed=[0, 1, 2])


def weight_decay(scale: str) -> list[RunConfig]:
    """PyTorch-style decay over the paper's two LR ranges, and how much independent decay (paper P, Figs 6,
    E.10). Independent decay of 1e-4, to compare both with, is `warm_up`'s arm of 5%. As that hardly shrinks anything in
    a short run, there is a stronger pair too: the largest independent decay, and PyTorch's with the same effect at LR
    1e-2."""
    setting, lrs = short(scale), _lrs(scale) if scale == "quick" else (1e-4, *_lrs(scale))
    pytorch = grid(setting, size=_two_sizes(scale), decay=["pytorch"], weight_decay=[0.1], lr=lrs, seed=[0, 1, 2])
    if scale == "quick":
        return pytorch
    small, decays = replace(setting, **_two_sizes(scale)[0]), [1e-3, 1e-2] if scale == "cpu" else [1e-5, 1e-3]
    stronger = [*grid(small, weight_decay=[0.0, *decays], lr=_lrs(scale), seed=[0, 1, 2]),
                *grid(small, decay=["pytorch"], weight_decay=[100 * decays[-1]], lr=lrs, seed=[0, 1, 2])]
    return list(dict.fromkeys(pytorch + stronger))


def steps_and_batch(scale: str) -> list[RunConfig]:
    """Half and double the steps, half and double the batch (paper P, Figs E.7, E.9), to compare with
    `warm_up`'s arm of 5%."""
    setting = short(scale)
    changes = [*(dict(steps=int(setting.steps * x), warmup_steps=int(setting.warmup_steps * x)) for x in (0.5, 2)),
               *(dict(batch_size=int(setting.batch_size * x)) for x in (0.5, 2))]
    return grid(setting, change=changes[:1] if scale == "quick" else changes, size=_two_sizes(scale)[:1],
                lr=_lrs(scale), seed=[0, 1, 2])


def best_lr_by_decay(scale: str) -> list[RunConfig]:
    """Independent decays that act in a short run, 0.1 to 3 factors of e, on the LRs around the best (paper P, Fig.
    E.10)."""
    setting = replace(short(scale), **_two_sizes(scale)[0])
    times = setting.steps / 200
    decays = [1e-2, 3e-2] if scale == "quick" else [round(decay / times, 8) for decay in (1e-3, 3e-3, 1e-2, 3e-2)]
    return grid(setting, weight_decay=decays, lr=PAPER_LRS[2:], seed=range(3, 13) if scale == "cpu" else range(3))


def _two_sizes(scale: str) -> list[dict]:
    return {"quick": [size(32, 2)], "cpu": [size(32, 2), size(64, 3)], "gpu": SIZES["gpu"][:2]}.get(
        scale, SIZES[scale][:3])


def _lrs(scale: str) -> tuple[float, ...]:
    return PAPER_LRS[2::2] if scale == "quick" else PAPER_LRS


STUDIES = (warm_up, weight_decay, steps_and_batch, best_lr_by_decay)

CLAIMS = (
    Claim("P5.sensitivity", "P Fig. 5", "a longer warm-up lowers LR sensitivity", "lowers LR sensitivity",
          "LR sensitivity with the longest minus with the shortest warm-up (nats)", "<", 0.0),
    Claim("P5.loss", "P Fig. 5", "a longer warm-up lowers the loss", "lowers loss",
          "best loss over the LRs with the longest minus with the shortest warm-up (nats)", "<", 0.0),
    Claim("P5.larger", "P Fig. 5", "it helps the larger model more", "most for the larger models",
          "change of LR sensitivity from the shortest to the longest warm-up, largest minus smallest size (nats)",
          "<", 0.0),
    Claim("P6.sensitivity", "P Fig. 6", "independent weight decay lowers LR sensitivity",
          "lower than with PyTorch-style decay",
          "LR sensitivity with independent minus with PyTorch-style decay, the latter over the better of the "
          "paper's two LR ranges (nats)", "<", 0.0),
    Claim("PE10.best-lr", "P Fig. E.10", "more weight decay moves the best learning rate slightly up",
          "slightly right", "slope of log10 best LR per decade of lambda, independent decay", ">", 0.0),
    Claim("PE7.steps", "P Figs E.7, E.9", "LR sensitivity hardly depends on the number of steps",
          "hardly changes",
          "LR sensitivity with double minus half the steps, over that with the usual number", "within", 0.25),
    Claim("PE9.batch", "P Figs E.7, E.9", "LR sensitivity hardly depends on the batch size", "hardly changes",
          "LR sensitivity with double minus half the batch, over that with the usual size", "within", 0.25),
)
