"""Chapter 03, muParam across widths (paper P, Figs 8, E.4 to E.6), and weight decay under it.

Restated before the runs of the second and third grid: P8.mup-steady names its fit of the minimum, the one it had;
PE4.mup-fails is judged by new seeds alone, as the old ones had shown what its learning rate does.

What these runs can decide, by the scatter of three seeds (95% intervals, so half of a width):
- P8.sensitivity: standard deviation 0.003 over seeds on the grid without 3e-4, so that three seeds give +-0.01 with it.
- P8.loss: 0.019; ten seeds give +-0.014, and decide where the difference is below -0.034 or above -0.006.
- P8.mup-steady: 0.19; ten seeds give +-0.13, and decide where the slope is above -0.20 or below -0.46.
- PE4.mup-fails: 0.054; ten new seeds give +-0.04: decided where the difference is below 0.26 or above 0.34.
- WD.coupled, WD.scaled: relative updates of a whole half of a run vary by some 2% over seeds; three seeds give their
  exponent to +-0.1 or better, against a margin of 0.25 that lies half-way between the two predictions, -0.5 and 0.

Of `muparam_more_seeds`, planned after the verdicts of the grids before it:
- PE4.mup-fails, on its new seeds from 13 on alone: 0.064 over seeds, a hundred give +-0.013 around an old estimate of
  0.298. Where the difference lies within 0.287 to 0.313 no number in reach decides, as 0.3 was an unlucky threshold;
  so PE4.beyond asks the same one step of the grid further up, where ten seeds give +-0.05 by the same scatter.
- PE5.intermediate, on seeds that intermediate had not had, thirteen: 0.020 over three, +-0.012.
- PE6.smallest was "< 0", which cannot be judged where there is no effect: the twenty seeds gave 0.002 +-0.015. It now
  has a margin of 0.01 nats and is judged by sixty new seeds, +-0.008.
"""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import PAPER_LRS, check_scale, short


def mu_parametrization(scale: str) -> list[RunConfig]:
    """LR against final loss by width under muParam's variants (paper P, Figs 8, E.4, E.5, E.6)."""
    standard, simple = dict(parametrization="standard"), dict(parametrization="mup_simple")
    arms = [standard, simple, dict(parametrization="mup_full")]  # at the base width the first two are one model
    widths, lrs = {"quick": ([16, 64], [3e-3, 3e-2, 3e-1]), "cpu": ([24, 48, 96, 192], PAPER_LRS[1:]),
                   "gpu": ([80, 160, 320, 640], PAPER_LRS[1:]),
                   "paper": ([256, 512, 1024, 2048], PAPER_LRS)}[check_scale(scale)]
    setting = replace(short(scale), n_layers=2, base_width=widths[0])
    if scale != "paper":
        steps = {"quick": 80, "cpu": 120, "gpu": 1200}[scale]
        setting = replace(setting, batch_size=16, steps=steps, warmup_steps=60 if scale == "gpu" else 6)
    if scale != "quick":
        arms += [dict(parametrization="mup_intermediate"), simple | dict(attention_scale="1/d_h"),
                 standard | dict(qk_norm="none"), simple | dict(qk_norm="none")]
    return grid(setting, arm=arms, d_model=widths, lr=lrs, seed=[0, 1, 2])


def mu_parametrization_seeds(scale: str) -> list[RunConfig]:
    """What `mu_parametrization` lacks: the lowest LR of paper P, more seeds around the minima of standard and simple,
    and new seeds at the highest LR with and without qk-norm. At the base width standard and simple are one model."""
    first = mu_parametrization(scale)
    low = list(dict.fromkeys(replace(config, lr=PAPER_LRS[0]) for config in first if config.seed < 3))
    if scale in ("quick", "gpu"):
        return low
    widths = sorted({config.d_model for config in first})
    standard, simple = (replace(first[0], parametrization=name) for name in ("standard", "mup_simple"))
    minima = {standard: (PAPER_LRS[2:6], PAPER_LRS[2:5], PAPER_LRS[1:4]),
              simple: (PAPER_LRS[3:], PAPER_LRS[3:6], PAPER_LRS[2:6])}
    near = [config for arm, lrs in minima.items() for width, some in zip(widths[1:], lrs, strict=True)
            for config in grid(replace(arm, d_model=width), lr=some, seed=range(3, 10))]
    narrow = grid(simple, attention_scale=["parametrization", "1/d_h"], lr=PAPER_LRS[3:], seed=range(3, 20))
    top = grid(replace(simple, d_model=widths[-1], lr=PAPER_LRS[-1]), qk_norm=["head", "none"], seed=range(3, 13))
    return [*(low if scale == "cpu" else []), *near, *narrow, *top]


def muparam_more_seeds(scale: str) -> list[RunConfig]:
    """New seeds for what the grids before left undecided: with and without qk-norm at the highest LR, and at LR 1,
    muParam (intermediate) around its minimum, and attention scaled by 1/d_h at the smallest width."""
    first = mu_parametrization(scale)
    widest = max(config.d_model for config in first)
    simple = replace(first[0], parametrization="mup_simple")
    beyond = [dict(lr=1.0, seed=seed) for seed in (range(3) if scale in ("quick", "gpu") else range(13, 23))]
    further = [] if scale in ("quick", "gpu") else [dict(lr=PAPER_LRS[-1], seed=seed) for seed in range(13, 113)]
    top = grid(replace(simple, d_model=widest), qk_norm=["head", "none"], run=[*further, *beyond])
    if scale == "gpu":
        return [replace(config, steps=config.steps // 10, warmup_steps=config.warmup_steps // 10) for config in top]
    if scale == "quick":
        return top
    near = [*grid(replace(simple, d_model=widest, parametrization="mup_intermediate"), lr=PAPER_LRS[3:6],
                  seed=range(3, 16)),
            *grid(replace(simple, d_model=widest), lr=PAPER_LRS[3:6], seed=range(10, 16))]
    return [*top, *near,
            *grid(simple, attention_scale=["parametrization", "1/d_h"], lr=PAPER_LRS[3:], seed=range(20, 80))]


def muparam_weight_decay(scale: str) -> list[RunConfig]:
    """muParam (simple) with a decay whose memory is shorter than the run: coupled to the layer's own LR, independent of
    it, or scaled, coupled to the model's LR. All three are one at the base width and LR 3e-2, the last two at that LR
    whatever the width. The paper's 1e-4, which does nothing in so short a run, at that LR for comparison."""
    first = mu_parametrization(scale)
    setting = replace(first[0], parametrization="mup_simple", lr=3e-2,
                      probe_every=first[0].steps // (20 if scale != "quick" else 8))
    widths = sorted({config.d_model for config in first})
    widths = [widths[0], widths[-1]] if scale in ("quick", "gpu") else [widths[0], *widths[2:]]
    strength = 2.4 / setting.steps
    decays = [dict(decay="independent", weight_decay=strength),
              *(dict(decay=name, weight_decay=strength / setting.lr) for name in ("pytorch", "scaled"))]
    lrs = [setting.lr] if scale in ("quick", "gpu") else PAPER_LRS[3:6]
    return [*grid(setting, d_model=widths, seed=[0, 1, 2]),
            *grid(setting, decay=decays, d_model=widths, lr=lrs, seed=[0, 1, 2])]


STUDIES = (mu_parametrization, mu_parametrization_seeds, muparam_weight_decay, muparam_more_seeds)

CLAIMS = (
    Claim("P8.standard-drifts", "P Fig. 8", "in standard parametrization the best learning rate falls as "
          "width grows", "the best LR moves",
          "slope of log10 best LR per decade of width, standard, with qk-norm", "<", 0.0),
    Claim("P8.mup-steady", "P Fig. 8", "muParam (simple) holds the best learning rate steady as width grows",
          "stabilises the best LR",
          "slope of log10 best LR (parabola through 3) per decade of width, muParam (simple), with qk-norm", "within",
          0.33),
    Claim("P8.mup-steadier", "P Fig. 8", "muParam (simple) keeps the best learning rate from falling with width",
          "stabilises the best LR",
          "slope of log10 best LR per decade of width, muParam (simple) minus standard, with qk-norm", ">", 0.0),
    Claim("P8.loss", "P Fig. 8", "muParam (simple) does not lower the best loss",
          "no improvement in loss",
          "best loss at the largest width, muParam (simple) minus standard (nats)", ">", -0.02),
    Claim("P8.sensitivity", "P Fig. 8", "muParam (simple) does not lower LR sensitivity",
          "no reduction of LR sensitivity",
          "LR sensitivity at the largest width, muParam (simple) minus standard (nats)", ">", -0.02),
    Claim("PE4.steadier", "P Fig. E.4", "without qk-norm too, muParam (simple) keeps the best learning rate from "
          "falling with width", "stabilises the best LR",
          "slope of log10 best LR per decade of width, muParam (simple) minus standard, without qk-norm", ">", 0.0),
    Claim("PE4.mup-fails", "P Fig. E.4", "muParam (simple) does not replace qk-norm at high learning rates",
          "does not alleviate the need for qk-norm",
          "final loss without minus with qk-norm at the highest LR and largest width, muParam (simple), new seeds "
          "(nats)", ">", 0.3),
    Claim("PE4.beyond", "ours", "nor does it at a learning rate of 1, beyond the paper's", "not tested",
          "final loss without minus with qk-norm at LR 1 and the largest width, muParam (simple) (nats)", ">", 0.3),
    Claim("PE5.intermediate", "P Fig. E.5", "muParam (intermediate) is no better than (simple)",
          "no measurable improvement at the largest scale",
          "best loss at the largest width, muParam (intermediate) minus (simple), new seeds (nats)", ">", -0.02),
    Claim("PE5.full", "P Fig. E.5", "muParam (full) is no better than (simple)",
          "no measurable improvement at the largest scale",
          "best loss at the largest width, muParam (full) minus (simple) (nats)", ">", -0.02),
    Claim("PE6.smallest", "P Fig. E.6", "attention scaled by 1/d_h lowers the loss of the smallest model slightly",
          "slightly lower loss at the smallest scale",
          "best loss at the smallest width, 1/d_h minus 1/sqrt(d_h), new seeds (nats)", "<", -0.01),
    Claim("PE6.largest", "P Fig. E.6", "attention scaled by 1/d_h raises the loss of the largest model",
          "the reverse at the largest scale",
          "best loss at the largest width, 1/d_h minus 1/sqrt(d_h) (nats)", ">", 0.0),
    Claim("WD.coupled", "ours", "with a decay coupled to the layer's LR, relative updates fall as width grows",
          "not tested", "slope of log10 (update RMS / weight RMS) of hidden matrices per decade of width, second half "
          "of the run, LR 0.03, coupled", "<", -0.25),
    Claim("WD.scaled", "ours", "with a decay that muParam does not lower with the LR they stay as they are",
          "not tested", "slope of log10 (update RMS / weight RMS) of hidden matrices per decade of width, second half "
          "of the run, LR 0.03, scaled", "within", 0.25),
)
