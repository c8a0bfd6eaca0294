"""Chapter 09, the scale of gradients and AdamW's eps (paper P, Figs 11 to 13, C.1, E.12, E.13, E.15).

Restated before the runs of `adam_epsilon_seeds`, `decay_by_size` and `adam_epsilon_switch`, the runs of the two other
grids having been seen:
- P12.smaller-eps read the smallest eps above the mean gradient RMS, 1e-5, under the gradients in two of three seeds. It
  now reads 1e-4, ten times the gradient RMS, by new seeds alone; so does PE15.diverges, 1e-3.
- P13.collapse compared runs at a large eps from the first step, which keeps the stream from growing, so that there is
  nothing that could collapse. It now switches eps in mid-run, and so do P12.switch and PE15.switch.
- PC1.grows-with-depth read the residual stream, a sum over blocks that grows with depth in an untrained model, too;
  PC1.depth takes that off.
- The decay of chapter 01's runs shrinks a weight by 1.6% in all of a run, the paper's by some five e-folds. PC1.depth,
  PC1.flat-decay and P11.decay-n, P11.decay-lr are judged where decay x steps = 10, as in the paper.

What these runs can decide, by the scatter of three seeds (95% intervals, half of a width):
- P12.smaller-eps: a standard deviation of 0.10 nats in the difference by pair; 24 seeds give +-0.04.
- PE15.diverges: 0.043; +-0.02, against a threshold of 0.4.
- P13.collapse: 0.18 in log10 of the gradient RMS at eps 1e-4 from the start; ten seeds give +-0.13, against -0.3.
- P13.collapse-decay: by the same scatter. One seed that no study uses had been run, without a switch.
- P12.switch, PE15.switch: by 0.10 and 0.04 over ten seeds +-0.07 and +-0.03.
- PC1.flat-decay: 0.036 in the slope without decay; three seeds give +-0.09, against a margin of 0.15.
- P11.decay-n, P11.decay-lr, PC1.depth: 0.01 to 0.03 without decay; three seeds give +-0.03 to +-0.08.
"""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import SIZES, base, short
from .c01_attention_logit_growth import attention_logit_growth


def adam_epsilon(scale: str) -> list[RunConfig]:
    """AdamW's eps from far below the gradients to above them (paper P, Figs 12, 13, E.15)."""
    setting = replace(short(scale), **SIZES[scale][1], probe_every=short(scale).steps // 10)
    if scale == "quick":
        return grid(setting, eps=[1e-8, 1e-3], lr=[1e-1], seed=[0, 1, 2])
    return grid(setting, eps=[1e-15, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2], lr=[1e-2, 1e-1, 3e-1], seed=[0, 1, 2])


def adam_epsilon_seeds(scale: str) -> list[RunConfig]:
    """New seeds at the highest learning rate: the default eps, and ten and a hundred times the gradient RMS."""
    setting = replace(adam_epsilon(scale)[0], lr=3e-1)
    seeds = range(3, 27) if scale in ("cpu", "paper") else range(3, 6)
    return grid(setting, eps=[1e-8, 1e-3] if scale == "quick" else [1e-8, 1e-4, 1e-3], seed=seeds)


def decay_by_size(scale: str) -> list[RunConfig]:
    """Three sizes with weight decay in the paper's dose, decay x steps = 10, about five e-folds."""
    setting = base(scale)
    lrs = {"quick": [1e-2, 1e-1], "gpu": [1e-2]}.get(scale, [3e-3, 1e-2, 1e-1, 3e-1])
    return grid(replace(setting, weight_decay=DOSE / setting.steps), size=SIZES[scale], lr=lrs, seed=[0, 1, 2])


def adam_epsilon_switch(scale: str) -> list[RunConfig]:
    """An eps of 1e-15 for half of the run, then 3, 10 and 100 times the gradient RMS that one-seed runs had at that
    time, at the highest learning rate: 1e-5 with the paper's coefficient of decay, which hardly acts in so short a run,
    4e-5 with its dose."""
    first = adam_epsilon(scale)[0]
    steps = first.steps if scale == "quick" else 2 * first.steps
    setting = replace(first, lr=3e-1, eps=1e-15, steps=steps, warmup_steps=steps // 20, probe_every=steps // 20)
    dose = replace(setting, weight_decay=DOSE / steps)
    if scale == "quick":
        return grid(setting, eps_late=[None, 1e-4, 1e-3], seed=range(3))
    seeds = range(10) if scale in ("cpu", "paper") else range(3)
    return [*grid(setting, eps_late=[None, *(times * 1e-5 for times in TIMES)], seed=seeds),
            *grid(dose, eps_late=[None, *(times * 4e-5 for times in TIMES[1:])], seed=seeds)]


DOSE = 10.0
"""Coefficient x steps of paper P's weight decay: 1e-4 x 1e5."""

TIMES = (3, 10, 100)
"""What the gradient RMS is multiplied with, to give the eps that a run switches to."""

STUDIES = (attention_logit_growth, adam_epsilon, adam_epsilon_seeds, decay_by_size, adam_epsilon_switch)

CLAIMS = (
    Claim("P11.falls-with-n", "P Fig. 11", "the gradient RMS of the first MLP layer falls as the model grows",
          "falls with N", "slope of log10 gradient RMS of block 0's first MLP layer per decade of N, mean over LRs",
          "<", 0.0),
    Claim("P11.falls-with-lr", "P Fig. 11", "and falls as the learning rate grows", "falls with LR",
          "slope of log10 gradient RMS of block 0's first MLP layer per decade of LR, mean over sizes", "<", 0.0),
    Claim("PE12.falls-with-n", "P Fig. E.12", "so does that of the key projection, with size", "as Fig. 11",
          "slope of log10 gradient RMS of block 0's key projection per decade of N, mean over LRs", "<", 0.0),
    Claim("PE12.falls-with-lr", "P Fig. E.12", "and with the learning rate", "as Fig. 11",
          "slope of log10 gradient RMS of block 0's key projection per decade of LR, mean over sizes", "<", 0.0),
    Claim("PC1.flat-in-n", "P Fig. C.1", "the output RMS of a block hardly depends on the size of the model",
          "hardly depends on N", "slope of log10 output RMS of block 0 per decade of N, mean over LRs", "within", 0.15),
    Claim("PC1.grows-with-lr", "P Fig. C.1", "it grows with the learning rate", "grows with LR",
          "slope of log10 output RMS of block 0 per decade of LR, mean over sizes", ">", 0.0),
    Claim("PC1.flat-decay", "P Fig. C.1", "with a decay that acts as in the paper it hardly depends on the size",
          "hardly depends on N",
          "slope of log10 output RMS of block 0 per decade of N, mean over LRs, decay x steps = 10", "within", 0.15),
    Claim("PC1.depth", "ours", "it grows with depth, by more than an untrained model's", "grows with depth",
          "log10 ratio of the last block's output RMS to block 0's, at the end minus at the start, largest model, mean "
          "over LRs, decay x steps = 10", ">", 0.0),
    Claim("P11.decay-n", "P Fig. 11", "with a decay that acts the gradient RMS falls as the model grows",
          "falls with N", "slope of log10 gradient RMS of block 0's first MLP layer per decade of N, mean over LRs, "
          "decay x steps = 10", "<", 0.0),
    Claim("P11.decay-lr", "P Fig. 11", "and as the learning rate grows", "falls with LR",
          "slope of log10 gradient RMS of block 0's first MLP layer per decade of LR, mean over sizes, decay x steps "
          "= 10", "<", 0.0),
    Claim("PC.final-norm", "P App. C", "where the output RMS is larger, gradients are smaller",
          "the final LayerNorm divides gradients by it",
          "slope of log10 gradient RMS of block 0's first MLP layer per decade of the last block's output RMS",
          "<", 0.0),
    Claim("P13.update-shrinks", "P Fig. 13", "where the gradient RMS falls under eps, the update RMS shrinks",
          "the update RMS shrinks",
          "log10 ratio of update RMS (block 0's first MLP layer) to that under the smallest eps, runs with "
          "gradient RMS under eps", "<", -0.3),
    Claim("P12.smaller-eps", "P Fig. 12", "at the highest learning rate, an eps well under the gradients gives a "
          "lower loss than one above them", "eps 1e-15 in place of 1e-8 improves the loss at LR 0.3",
          "final loss at eps 1e-8 minus that at 1e-4, ten times the gradient RMS, highest LR, new seeds (nats)",
          "<", 0.0),
    Claim("P12.at-1e-2", "ours", "the same at a learning rate that suits the model", "not tested",
          "final loss at eps 1e-8 minus that at the smallest eps above the gradient RMS, LR 1e-2 (nats)", "<", 0.0),
    Claim("P12.switch", "ours", "so does keeping it, where a run would go on at an eps above the gradients",
          "eps 1e-15 in place of 1e-8 improves the loss at LR 0.3",
          "final loss at eps 1e-15 minus that switched to 10 times the gradient RMS at half time, highest LR (nats)",
          "<", 0.0),
    Claim("P13.smaller-eps", "P Fig. 13", "a smaller eps stops a collapse of the gradient RMS", "stops it",
          "log10 ratio of gradient RMS after a switch to a smaller eps over that of a collapsed run", ">", 0.3),
    Claim("P13.collapse", "ours", "once eps is above the gradients, the gradient RMS collapses",
          "a smaller eps stops a collapse of the gradient RMS",
          "log10 ratio of gradient RMS (block 0's first MLP layer) in the last tenth, switched to 10 times the "
          "gradient RMS at half time over eps 1e-15, highest LR", "<", -0.3),
    Claim("P13.collapse-decay", "ours", "and so it does with a decay that acts", "decay in the paper's dose",
          "the same ratio, decay x steps = 10", "<", -0.3),
    Claim("PE15.diverges", "P Fig. E.15", "with eps two decades above the gradients, training fails",
          "1e-6 diverges",
          "final loss at eps 1e-3, 100 times the gradient RMS, minus that at 1e-8, highest LR, new seeds (nats)",
          ">", 0.4),
    Claim("PE15.switch", "ours", "nor does training survive a switch to such an eps", "1e-6 diverges",
          "final loss switched to 100 times the gradient RMS at half time minus that at eps 1e-15, highest LR (nats)",
          ">", 0.4),
)
