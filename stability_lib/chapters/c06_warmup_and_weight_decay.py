"""Chapter 06, warm-up, weight decay, steps and batch size (paper P, Figs 5, 6, E.7, E.9, E.10).

`warm_up_long`, `weight_decay_long`, `longer_runs` and their claims (`long`, `longer`, `beyond-memory`) were set when
the first three grids were known, before their own runs: there the shortest warm-ups, 2 and 10 steps, lie within Adam's
memory of 20, and independent decay comes to 0.01 factors of e. PE10.best-lr kept its criterion: over decays of 1e-4 to
1e-2 three seeds had left it undecided, so it is judged on decays that act and ten new seeds (`best_lr_by_decay`). Those
runs were trained twice, first from other initial weights, with a slope of 0.57 [0.50, 0.64].

Pilot, seed 100, 4000 steps: without warm-up, with 5% and with 25% of the run a loss of 2.025, 1.993 and 1.975 at LR
0.1, of 2.252, 2.149 and 2.028 at LR 0.3.

Seen after the runs, criteria as they were: P6.long-above-best counts more of the grid for PyTorch's form, whose best LR
is lower; and LR 0.01, the lowest of `warm_up_long`, is the best in every run.

What these runs can decide, by the scatter of those before them (95% intervals, so half of a width): the loss at one LR
has a standard deviation over seeds of 0.02 nats at the best LRs and of 0.04 at the highest, LR sensitivity one of 0.02;
their differences over ten seeds come to +-0.02, over eight to +-0.03. The best LR scatters by 0.1 decades, and its
slope per decade of lambda, over ten seeds and 1.5 decades, is known to +-0.08. The relative change of LR sensitivity,
standard deviation 0.05, is known to +-0.08 from four seeds, against a margin of 0.25.
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


def _long(scale: str) -> RunConfig:
    """The smallest model for twenty times as long: a warm-up of 5% is ten times Adam's memory, 1 / (1 - beta2)."""
    setting = short(scale)
    length = {"quick": setting.steps, "cpu": 4000, "gpu": 4000}.get(scale, setting.steps)
    return replace(setting, **_two_sizes(scale)[0], steps=length, warmup_steps=length // 20,
                   batch_size=8 if scale == "cpu" else setting.batch_size)


def warm_up_long(scale: str) -> list[RunConfig]:
    """No warm-up, the paper's 5% and 25% of the run, where both are far beyond Adam's memory, on the upper four LRs
    (paper P, Fig. 5)."""
    setting = _long(scale)
    return grid(setting, warmup_steps=[0, setting.warmup_steps, setting.steps // 4], lr=PAPER_LRS[3:],
                seed=range(10, 20) if scale == "cpu" else range(3))


def weight_decay_long(scale: str) -> list[RunConfig]:
    """Decay by about five factors of e, as in the paper's runs, independent and PyTorch's with the same effect at LR
    1e-2, over the paper's two LR ranges (paper P, Fig. 6). A tenth of it at `quick`, where a step of the latter would
    else turn weights over."""
    setting, seeds = _long(scale), range(10, 18) if scale == "cpu" else range(3)
    decay, lrs = (0.96 if scale == "quick" else 9.6) / setting.steps, _lrs(scale)
    return [*grid(setting, weight_decay=[decay], lr=lrs, seed=seeds),
            *grid(setting, decay=["pytorch"], weight_decay=[round(100 * decay, 8)],
                  lr=lrs if scale == "quick" else (1e-4, *lrs), seed=seeds)]


def best_lr_by_decay(scale: str) -> list[RunConfig]:
    """Independent decays that act in a short run, 0.1 to 3 factors of e, on the LRs around the best (paper P, Fig.
    E.10)."""
    setting = replace(short(scale), **_two_sizes(scale)[0])
    times = setting.steps / 200
    decays = [1e-2, 3e-2] if scale == "quick" else [round(decay / times, 8) for decay in (1e-3, 3e-3, 1e-2, 3e-2)]
    return grid(setting, weight_decay=decays, lr=PAPER_LRS[2:], seed=range(3, 13) if scale == "cpu" else range(3))


def longer_runs(scale: str) -> list[RunConfig]:
    """Two, four and eight times the steps (paper P, Fig. E.7)."""
    setting = replace(short(scale), **_two_sizes(scale)[0])
    changes = [dict(steps=setting.steps * x, warmup_steps=setting.warmup_steps * x)
               for x in {"quick": (2,), "cpu": (2, 4, 8)}.get(scale, (2, 4))]
    return grid(setting, change=changes, lr=_lrs(scale), seed=range(3, 7) if scale == "cpu" else range(3))


def _two_sizes(scale: str) -> list[dict]:
    return {"quick": [size(32, 2)], "cpu": [size(32, 2), size(64, 3)], "gpu": SIZES["gpu"][:2]}.get(
        scale, SIZES[scale][:3])


def _lrs(scale: str) -> tuple[float, ...]:
    return PAPER_LRS[2::2] if scale == "quick" else PAPER_LRS


STUDIES = (warm_up, weight_decay, steps_and_batch, warm_up_long, weight_decay_long, best_lr_by_decay, longer_runs)

CLAIMS = (
    Claim("P5.sensitivity", "P Fig. 5", "a longer warm-up lowers LR sensitivity", "lowers LR sensitivity",
          "LR sensitivity with the longest minus with the shortest warm-up (nats)", "<", 0.0),
    Claim("P5.loss", "P Fig. 5", "a longer warm-up lowers the loss", "lowers loss",
          "best loss over the LRs with the longest minus with the shortest warm-up (nats)", "<", 0.0),
    Claim("P5.long-sensitivity", "P Fig. 5", "in a long run a longer warm-up lowers LR sensitivity",
          "lowers LR sensitivity",
          "LR sensitivity over LRs from 0.01 with a warm-up of 25% minus with none, 4000 steps (nats)", "<", 0.0),
    Claim("P5.long-loss", "P Fig. 5", "in a long run a longer warm-up lowers the loss", "lowers loss",
          "best loss over LRs from 0.01 with a warm-up of 25% minus with none, 4000 steps (nats)", "<", 0.0),
    Claim("P5.beyond-memory", "ours", "a warm-up of fifty times Adam's memory beats one of ten times",
          "longer is better",
          "mean loss at LRs 0.1 and 0.3 with a warm-up of 25% minus with 5%, 4000 steps (nats)", "<", 0.0),
    Claim("P5.larger", "P Fig. 5", "it helps the larger model more", "most for the larger models",
          "change of LR sensitivity from the shortest to the longest warm-up, largest minus smallest size (nats)",
          "<", 0.0),
    Claim("P6.sensitivity", "P Fig. 6", "independent weight decay lowers LR sensitivity",
          "lower than with PyTorch-style decay",
          "LR sensitivity with independent minus with PyTorch-style decay, the latter over the better of the "
          "paper's two LR ranges (nats)", "<", 0.0),
    Claim("P6.long-sensitivity", "P Fig. 6", "so it does where decay comes to about five factors of e",
          "lower than with PyTorch-style decay",
          "LR sensitivity with independent minus with PyTorch-style decay, the latter over the better of the "
          "paper's two LR ranges, 4000 steps (nats)", "<", 0.0),
    Claim("P6.long-above-best", "ours", "and where slow learning at low learning rates does not count", "not tested",
          "the same over LRs from each seed's best one up, usual range", "<", 0.0),
    Claim("PE10.best-lr", "P Fig. E.10", "more weight decay moves the best learning rate slightly up",
          "slightly right", "slope of log10 best LR per decade of lambda, independent decay", ">", 0.0),
    Claim("PE7.steps", "P Figs E.7, E.9", "LR sensitivity hardly depends on the number of steps",
          "hardly changes",
          "LR sensitivity with double minus half the steps, over that with the usual number", "within", 0.25),
    Claim("PE7.longer", "P Figs E.7, E.9", "nor does it in longer runs", "hardly changes",
          "LR sensitivity at 1600 minus at 400 steps, over that at 800", "within", 0.25),
    Claim("PE9.batch", "P Figs E.7, E.9", "LR sensitivity hardly depends on the batch size", "hardly changes",
          "LR sensitivity with double minus half the batch, over that with the usual size", "within", 0.25),
)
