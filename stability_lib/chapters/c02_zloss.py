"""Chapter 02, output-logit drift: how far logits sink, when that costs loss, and what z-loss does (paper P, Figs 3,
4).

Restated before the runs of the last two grids: P4.drift read the mean logit of all symbols, which sinks with any good
fit where most never occur, and now reads log Z, with P4.drift-next beside it; P4.near-zero had a z-loss 70 times weaker
by coefficient x steps than the paper's; P3.harm and P3.decay averaged LR 3 with LR 1, where log Z stays small, and took
the loss after the cosine had brought log Z back. Known by then: log Z near 5 at LR 0.1 on the old seeds, and, from a
run of scale quick on seed 100, that z-loss in the paper's dose hurts at LR 3 held; P3.harm took its coefficient then.

What these runs can decide, by the scatter of the ones before them (95% intervals, so half of a width):
- P3.harm, P3.decay are judged where |log Z| is in the hundreds: at LR 3 held to the end, and by the log of the loss
  over the second half, as it lies in the tens of nats and jumps from step to step. Over the steps of the annealed runs
  at LRs near 3 that log differs between cures with a standard deviation of 0.45 over seeds (z-loss 1e-4; 0.7 at a
  single step). Twenty seeds give it to +-0.21: a cure that divides the loss by 1.3 shows, one by 1.2 does not.
- P4.drift, P4.drift-next, P4.near-zero: log Z at the end scatters by 0.1 over seeds, so that ten give it to +-0.1.
- P4.speed: a standard deviation of 0.85 nats over seeds; ten give +-0.6, against an estimate 1.1 above the threshold.
- P4.vocabulary keeps the three seeds it had.

Of `output_logit_seeds`, planned after the verdicts of the grids before it (new seeds alone are judged):
- P3.harm: a standard deviation of 0.39 over twenty seeds, so that two hundred new ones give +-0.054. They decide where
  the log of the ratio is below 0 or above 0.1; where it is the 0.06 of the first twenty no number in reach does, and a
  setting in which nothing but the logits fails would have to.
- P3.no-cosine read the final loss of single runs, which at a rate that is held scatters by 0.4 nats: it now reads the
  log of the mean loss over the second half, as P3.harm does. That differed by 0.07 on the three old seeds, with a
  standard deviation of 0.10; fifty new ones give +-0.03, and +-0.09 if it is three times as much.
- P4.floor read runs of 1500 steps, in which the depth still changes, and its estimate lay on its margin; a floor is
  what longer runs end at, so it is judged by `output_logit_floor_long`, four times as long. The slope on ln eps had a
  standard deviation of 0.08 over three seeds; six give +-0.08. One seed that no study uses had been seen at that
  length, at eps 1e-8 and 1e-7: final log p of -19.0 and -17.8, a slope of a half.
- P4.z-loss: 0.14 over five seeds, thirty new ones give +-0.05, against an old estimate of -0.11.
"""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import check_scale


def output_logit_floor(scale: str) -> list[RunConfig]:
    """How far and how fast the logits of symbols that never occur sink, by AdamW's eps and beta2, by
    learning rate, by the number of such symbols, and with z-loss or weight decay (paper P, Fig. 4)."""
    steps = dict(quick=300, cpu=1500, gpu=15_000, paper=20_000)[check_scale(scale)]
    wider = dict(d_model=128, n_heads=4, seq_len=32) if scale == "gpu" else {}
    setting = RunConfig(**dict(d_model=32, n_heads=2, seq_len=16) | wider, n_layers=1, batch_size=8,
                        eval_sequences=128, lr=1e-2, vocab_size=2048, z_loss=0.0, weight_decay=0.0, **_length(steps))
    seeds = [0, 1, 2]
    if scale == "quick":  # too short for beta2 0.95
        return grid(setting, vocab_size=[1024], beta2=[0.9], eps=[1e-8, 1e-6, 1e-4], seed=seeds)
    return [*grid(setting, eps=[1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4], seed=seeds),
            *grid(setting, eps=[1e-10], beta2=[0.9, 0.99], seed=seeds),
            *grid(setting, vocab_size=[1024, 4096], eps=[1e-6], seed=seeds),
            *grid(setting, lr=[1e-3, 1e-1], seed=seeds),
            *grid(setting, lr=[1e-1], cure=[dict(z_loss=1e-4), dict(weight_decay=1e-3)], seed=seeds)]


def output_logit_floor_long(scale: str) -> list[RunConfig]:
    """The floor by eps in runs four times as long, with fewer symbols that never occur."""
    setting = output_logit_floor(scale)[0]
    if scale == "quick":
        return []
    if scale == "gpu":
        return grid(replace(setting, vocab_size=1024, **_length(6000)), eps=[1e-8, 1e-6], seed=range(3))
    return grid(replace(setting, vocab_size=1024, **_length(4 * setting.steps)), eps=[1e-8, 1e-7, 1e-6],
                seed=range(3, 9))


def output_logit_harm(scale: str) -> list[RunConfig]:
    """Where the drift could cost loss. High learning rates in bf16 with neither z-loss nor weight decay,
    with either (paper P, Fig. 3), and without z-loss and with in fp32, with a BPE vocabulary, a wider model, a smaller
    eps, a longer run and no cosine."""
    steps = dict(quick=200, cpu=1000, gpu=10_000, paper=100_000)[check_scale(scale)]
    width, seq_len = (256, 32) if scale == "gpu" else (64, 16)
    setting = RunConfig(d_model=width, n_layers=1, seq_len=seq_len, batch_size=8, weight_decay=0.0, precision="bf16",
                        **_length(steps))
    neither, z_loss, decay = dict(z_loss=0.0), dict(z_loss=1e-4), dict(z_loss=0.0, weight_decay=1e-4)
    if scale == "quick":
        return grid(setting, lr=[3e-1, 3.0], cure=[neither, z_loss], seed=[0, 1, 2])
    subwords = dict(tokenizer="bpe", vocab_size=2048, **_length(steps // 2))
    others = [subwords, subwords | dict(lr=3e-1), dict(d_model=2 * width, n_heads=8), dict(eps=1e-15),
              _length(3 * steps), dict(lr_final=1.0)]
    if scale == "gpu":  # all of the chapter within ten minutes
        others = [other for other in others if not {"lr", "lr_final", "eps"} & set(other)]
    return [*grid(setting, lr=[1e-1, 3e-1, 1.0, 3.0], cure=[neither, z_loss, decay], seed=range(5)),
            *grid(replace(setting, precision="fp32"), lr=[1.0, 3.0], cure=[neither, z_loss], seed=range(5)),
            *grid(replace(setting, lr=1.0), other=others, cure=[neither, z_loss], seed=[0, 1, 2])]


def output_logit_held(scale: str) -> list[RunConfig]:
    """Where |log Z| reaches the hundreds: the highest learning rate, held to the end, in bf16 and fp32. With neither
    cure, with z-loss at the paper's coefficient, with decay in the paper's dose, decay x steps = 10, and with z-loss in
    that dose, too."""
    steps = dict(quick=200, cpu=1000, gpu=10_000, paper=100_000)[check_scale(scale)]
    width, seq_len = (256, 32) if scale == "gpu" else (64, 16)
    setting = RunConfig(d_model=width, n_layers=1, seq_len=seq_len, batch_size=8, weight_decay=0.0, precision="bf16",
                        lr=3.0, lr_final=3.0, **_length(steps))
    cures = [dict(z_loss=0.0), dict(z_loss=1e-4), dict(z_loss=0.0, weight_decay=DOSE / steps)]
    if scale == "quick":
        return grid(setting, cure=cures, seed=range(3))
    few, many = (range(3), range(3)) if scale == "gpu" else (range(10), range(20))
    dose = grid(setting, precision=["bf16", "fp32"], z_loss=[DOSE / steps], seed=few) if scale == "cpu" else []
    return [*grid(setting, cure=cures, seed=many), *grid(replace(setting, precision="fp32"), cure=cures, seed=few),
            *dose]


def output_logit_seeds(scale: str) -> list[RunConfig]:
    """New seeds in bf16, with neither cure and with z-loss at the paper's coefficient: LR 3 and LR 1 held to the end,
    and both annealed. Those at a held rate are read by their loss and hardly probed."""
    held = output_logit_held(scale)[0]
    cures = [dict(z_loss=0.0), dict(z_loss=1e-4)]
    rare = replace(held, probe_every=held.steps // 4)
    if scale in ("quick", "gpu"):
        return grid(replace(held, lr=1.0, lr_final=1.0), cure=cures, seed=range(20, 23))
    return [*grid(rare, cure=cures, seed=range(20, 220)),
            *grid(replace(rare, lr=1.0, lr_final=1.0), cure=cures, seed=range(20, 70)),
            *grid(replace(held, lr_final=1e-5), lr=[1.0, 3.0], cure=cures, seed=range(20, 50))]


def output_logit_drift(scale: str) -> list[RunConfig]:
    """More seeds of `output_logit_floor`: at LR 0.1 with neither cure and with z-loss in the paper's dose, coefficient
    x steps = 10 (paper P, Fig. 4); and for the speed of sinking by beta2."""
    setting = output_logit_floor(scale)[0]
    new = range(3, 10) if scale in ("cpu", "paper") else range(3)
    length = {} if scale == "quick" else dict(eps=1e-8)
    drifting = replace(setting, lr=1e-1, **length)
    strong = grid(drifting, z_loss=[round(DOSE / setting.steps, 3 if scale == "cpu" else 6)],
                  seed=range(10) if scale in ("cpu", "paper") else new)
    if scale == "quick":
        return [*grid(drifting, seed=new), *strong]
    if scale == "gpu":
        return strong
    return [*grid(drifting, seed=new), *strong, *grid(setting, eps=[1e-10], beta2=[0.9, 0.99], seed=new)]


def _length(steps: int) -> dict:
    """A run's length with the schedule's proportions of paper P and twenty probes."""
    return dict(steps=steps, warmup_steps=steps // 20, probe_every=steps // 20)


DOSE = 10.0
"""Coefficient x steps of paper P's z-loss and weight decay: 1e-4 x 1e5."""

STUDIES = (output_logit_floor, output_logit_harm, output_logit_held, output_logit_drift, output_logit_seeds,
           output_logit_floor_long)

CLAIMS = (
    Claim("P4.drift", "P Fig. 4", "without z-loss and weight decay, output logits drift very negative",
          "very negative late in training", "log Z at the end, LR 0.1, neither cure", "<", -5.0),
    Claim("P4.drift-next", "P Fig. 4", "the logits of symbols that occur drift very negative as well",
          "very negative late in training",
          "mean logit of the symbol that comes next (log Z minus loss) at the end, LR 0.1, neither cure", "<", -5.0),
    Claim("P4.floor", "ours", "a symbol that never occurs sinks until its gradient is of the size of AdamW's eps",
          "not tested", "slope of its final log p on ln eps, less 1, eps 1e-8 to 1e-6, longer runs", "within", 0.1),
    Claim("P4.vocabulary", "ours", "that floor does not depend on how many such symbols there are", "not tested",
          "slope of its final log p on ln V, eps 1e-6", "within", 0.5),
    Claim("P4.speed", "ours", "the larger AdamW's beta2, the less far unseen symbols sink", "not tested",
          "final log p at beta2 0.99 minus at 0.9, eps 1e-10 (nats)", ">", 2.0),
    Claim("P4.z-loss", "P Fig. 4", "z-loss brings log Z closer to 0", "near 0",
          "log10 of mean |log Z| over the second half of the run, with z-loss minus with neither, LR 1 and above, "
          "bf16, new seeds", "<", 0.0),
    Claim("P4.near-zero", "P Fig. 4", "z-loss keeps log Z near 0", "near 0",
          "log Z at the end with z-loss of coefficient x steps = 10, LR 0.1", "within", 1.0),
    Claim("P3.harm", "P Fig. 3", "without weight decay, output-logit divergence hurts at high learning rates and "
          "z-loss mends it", "loss rises at high LR whatever the size; z-loss mends it",
          "ln of the mean loss over the second half, with neither minus with z-loss, LR 3 held, bf16, new seeds",
          ">", 0.05),
    Claim("P3.decay", "P Fig. 3", "weight decay mends it too", "for the larger models",
          "ln of the mean loss over the second half, with neither minus with weight decay x steps = 10, LR 3 held, "
          "bf16", ">", 0.05),
    Claim("P3.no-cosine", "ours", "without z-loss, a high learning rate that is not annealed costs more",
          "not tested", "ln of the mean loss over the second half, with neither minus with z-loss, LR 1 held, bf16, "
          "new seeds", ">", 0.05),
)
