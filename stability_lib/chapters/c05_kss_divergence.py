"""Chapter 05, does shaping spectra prevent divergence? (Paper K, Fig. 2, Tables 3, 6.)

Scale `gpu` asks the same of models 256 wide, as wide as the paper's. Its learning rates were moved, before any of its
runs, to where pilots of `fair` on seeds 100 and 101 had none diverge (0.0014, 94% and 100% of recall learned), one
(0.002) and both (0.004), and to where two of three of `kss_wider` do; the criteria of the claims are those of scale
`cpu`. Three learning rates with three seeds an arm (`kss_divergence`) or eight (`kss_fair`) can exclude half of the
paper's effect only where the two arms hardly differ within a seed.
"""

from collections.abc import Mapping

import pandas as pd

from ..claims import Claim
from ..config import CHOICES, RunConfig, grid
from ..studies import RECALL, SCALES, check_scale

CONTROL = {
    "quick": dict(d_model=64, n_layers=4, seq_len=16, batch_size=16, steps=120, warmup_steps=50, eval_sequences=128),
    "cpu": dict(d_model=64, n_layers=4, seq_len=16, steps=300, warmup_steps=100),
    "gpu": dict(d_model=256, n_layers=4, seq_len=64, steps=300, warmup_steps=100),
    "paper": dict(d_model=256, n_layers=6, seq_len=64, steps=10_000, warmup_steps=1000),
}
"""Models without norms on associative recall, in which divergence is to be prevented (paper K, Sec. 3.3, Table 3)."""

EVERY_STEP = dict(shaping="kss", shaping_every=1, shaping_alpha=5.0)
"""KSS at a dose that does something here: paper K's is 0.15 at every tenth step."""

PENALTY_ALPHAS = dict(near_unit=290.0, random_l2=1160.0, residual_norm=1200.0, activation_variance=3600.0,
                      jacobian=235.0)
"""alpha at which a penalty's gradient at initialization is as large as that of KSS at alpha 5 (`CONTROL`, cpu)."""

JACOBIAN_FAIR = 20.0
"""alpha at which the Jacobian penalty's gradient at initialization is as large as that of KSS at 0.5 (`fair`, cpu)."""

FAIR = {
    "quick": dict(steps=150, warmup_steps=100),
    "cpu": dict(steps=1400, warmup_steps=1000),
    "gpu": dict(d_model=256, steps=2400, warmup_steps=1000),
    "paper": dict(steps=10_000, warmup_steps=1000),
}
"""Steps and the paper's longest warm-up, with which the models of `fair` learn before the rate is too high."""
FAIR_LRS = {"quick": [1.2e-2], "gpu": [1.6e-3, 1.9e-3, 2.3e-3]}
"""Where pilots (seeds 100, 101) had none diverge up to all; scale `cpu`: 0.0085 to 0.0112."""
LOWER = 3
"""By how much one arm of `kss_fair` divides the learning rate."""
WIDER = {128: ([3.5e-3, 4e-3, 4.5e-3], range(6)), 256: ([2e-3], range(3))}
"""Learning rates and seeds of `kss_wider` by width, around where pilots had half diverge."""


def control(scale: str, **changes) -> RunConfig:
    """A model without norms and without control against divergence, read six times on its way, at scale `gpu`, where a
    reading takes longer than the steps between, twice."""
    settings = RECALL | CONTROL[check_scale(scale)] | dict(norm="no_norm")
    readings = 2 if scale == "gpu" else 6
    return RunConfig(**settings | dict(spectra_every=settings["steps"] // readings) | changes)


def control_lrs(scale: str) -> list[float]:
    """Within paper K's range, LR 0.005 to 0.01; higher ones where a run is too short to diverge there, lower ones where
    models are wider: at 256 two of three in `kss_wider` diverge at 0.002."""
    few = {"quick": [8e-3, 1e-2, 1.2e-2], "gpu": [1.6e-3, 2e-3, 2.5e-3]}
    return few.get(scale, [5e-3, 5.5e-3, 6.1e-3, 6.7e-3, 7.4e-3, 8.2e-3, 9.1e-3, 1e-2])


def control_seeds(scale: str) -> list[int]:
    """The paper's seeds."""
    return [42, 123] if scale == "quick" else [42, 123, 456]


def control_name(run: Mapping) -> str:
    """What a run of the grids below does against divergence, in words: `no control`, `clip 0.5`, `KSS 0.15 every 10`,
    `SAM 0.1 + KSS 5`. `run` holds the fields of `RunConfig`, as a row of `ensure`'s table does."""
    penalties = dict(kss="KSS", unstable="unstable term", near_unit="near-unit term", random_l2="random l2",
                     residual_norm="stream norm", activation_variance="activation variance", jacobian="Jacobian")
    default = RunConfig()
    fields = {**{name: getattr(default, name) for name in CHOICES}, **run}
    warm_ups = [CONTROL[scale]["warmup_steps"] for scale in SCALES]
    steps = [CONTROL[scale]["steps"] for scale in SCALES]
    names = [
        {"lion": "Lion", "lamb": "LAMB"}.get(fields["optimizer"]),
        {"spectral_norm": "spectral norm", "weight_norm": "weight norm"}.get(fields["reparametrization"]),
        fields["gradient_penalty"] and f"gradient penalty {fields['gradient_penalty']:g}",
        fields["sam_rho"] and f"SAM {fields['sam_rho']:g}",
        fields["parametrization"] != "standard" and "muParam",
        {"pre_ln": "Pre-LN", "rmsnorm": "RMSNorm"}.get(fields["norm"]),
        fields["qk_norm"] != "none" and "qk-norm",
        {"scaled": "residual scaling", "rezero": "ReZero"}.get(fields["residual"]),
        fields["steps"] in steps and fields["warmup_steps"] not in warm_ups and "longer warm-up",
        pd.notna(fields["clip_norm"]) and f"clip {fields['clip_norm']:g}",
        fields["shaping"] != "none" and f"{penalties[fields['shaping']]} {fields['shaping_alpha']:g}"
        + (f" every {fields['shaping_every']}" if fields["shaping_every"] > 1 else "")]
    return " + ".join(name for name in names if name) or "no control"


def kss_divergence(scale: str) -> list[RunConfig]:
    """Divergence without control, with clipping, with KSS at paper K's doses and applied at every
    step; 24 runs each (paper K, Table 3, Fig. 2)."""
    at_paper = [dict(shaping="kss", shaping_alpha=alpha) for alpha in (0.10, 0.15, 0.20)]
    at_every_step = [EVERY_STEP | dict(shaping_alpha=alpha) for alpha in (0.15, 1.5, 5.0)]
    arms = [{}, dict(clip_norm=0.5), dict(clip_norm=1.0), *at_paper, *at_every_step]
    if scale in ("quick", "gpu"):
        arms = [{}, dict(clip_norm=1.0), at_paper[1], at_every_step[2]]
    return grid(control(scale), arm=arms, lr=control_lrs(scale), seed=control_seeds(scale))


def kss_more_seeds(scale: str) -> list[RunConfig]:
    """No control at the rates of `kss_divergence` with six more seeds: is it really most that diverge?"""
    seeds = range(6) if scale == "cpu" else range(3)
    lrs = control_lrs(scale) if scale == "cpu" else control_lrs(scale)[-1:]
    return grid(control(scale, spectra_every=0), lr=lrs, seed=seeds)


def kss_dose(scale: str) -> list[RunConfig]:
    """Divergence against alpha and how often KSS is applied, beside what `kss_divergence` has of it."""
    alphas, everies = {"quick": ([0.15, 5.0], [1, 10]), "gpu": ([0.15, 5.0], [1])}.get(
        scale, ([0.15, 0.5, 1.5, 5.0, 20.0, 100.0], [1, 3, 10]))
    cells = grid(control(scale, shaping="kss"), shaping_alpha=alphas, shaping_every=everies, **_few(scale))
    beside = kss_divergence(scale)
    return [config for config in cells if config not in beside]


def _few(scale: str) -> dict:
    """Fewer learning rates and seeds, as axes of `grid`; at least three runs where one learning rate is left."""
    return dict(lr=control_lrs(scale)[3::2] or control_lrs(scale)[-1:],
                seed=control_seeds(scale)[:3 if scale == "gpu" else 2])


def kss_readings(scale: str) -> list[RunConfig]:
    """KSS at every step under other readings of the paper's text, at two alphas."""
    readings = [dict(shaping_dmd="random"), dict(shaping_dmd="whitened"), dict(shaping_gradient="input"),
                dict(shaping_gradient="output"), dict(shaping_reduction="mean"), dict(shaping_beta=10.0)]
    if scale == "gpu":  # the chapter's time is spent elsewhere: some that `kss_dose` has
        return kss_dose(scale)
    if scale == "quick":
        readings = readings[1:3]
    return grid(control(scale, **EVERY_STEP), reading=readings, shaping_alpha=[0.5, 5.0][scale == "quick":],
                **_few(scale))


def kss_ablations(scale: str) -> list[RunConfig]:
    """One term of KSS alone, and other penalties on the same states, at alpha 5 and, but for the unstable
    term, at an alpha that gives the same gradient at initialization (paper K, Table 6)."""
    arms = [dict(shaping="unstable"), *(dict(shaping=name, shaping_alpha=alpha) for name, matched in
                                        PENALTY_ALPHAS.items() for alpha in (5.0, matched))]
    if scale in ("quick", "gpu"):
        arms = [dict(shaping="unstable"), dict(shaping="residual_norm", shaping_alpha=1200.0)][:2 - (scale == "gpu")]
    return grid(control(scale, **EVERY_STEP), arm=arms, lr=control_lrs(scale)[1::2], seed=control_seeds(scale))


def kss_learning(scale: str) -> list[RunConfig]:
    """What prevention costs where recall is learned, with larger initial weights, fewer symbols, longer.
    The gradient's norm has no limit, as that of the penalty starts near 100 and would end runs whose loss is fine."""
    setting = control(scale, n_layers=2, init="fan_in", vocab_size=32, seq_len=12, diverge_grad_norm=None)
    arms = [{}, dict(clip_norm=1.0), dict(shaping="kss"), EVERY_STEP, EVERY_STEP | dict(shaping_alpha=0.5)]
    if scale == "quick":
        return grid(setting, arm=[{}, EVERY_STEP], lr=[6e-3], seed=control_seeds(scale))
    steps = max(1500, setting.steps)
    arms, lrs = ([{}, EVERY_STEP], [1e-3]) if scale == "gpu" else (arms, [1.5e-3, 3e-3, 6e-3, 1.2e-2])
    every = 0 if scale == "gpu" else steps // 5
    return grid(setting, steps=[steps], spectra_every=[every], arm=arms, lr=lrs, seed=control_seeds(scale))


def fair(scale: str, **changes) -> RunConfig:
    """Models without norms that learn recall where they survive, and of which a good part diverges by the loss alone:
    larger initial weights, fewer symbols, shorter sequences and a longer warm-up than in `control`."""
    settings = dict(n_layers=2, init="fan_in", vocab_size=32, seq_len=12, diverge_grad_norm=None) | FAIR[
        check_scale(scale)]
    return control(scale, **settings | dict(spectra_every=settings["steps"] // 14) | changes)


def fair_lrs(scale: str) -> list[float]:
    """A step of a tenth apart."""
    return FAIR_LRS.get(scale, [8.5e-3, 9.3e-3, 1.02e-2, 1.12e-2])


def kss_fair(scale: str) -> list[RunConfig]:
    """No control, clipping, KSS at the paper's dose and at every step, and plain remedies, where recall is learned and
    a good part diverges without control; 24 runs each (paper K, Tables 3, 4). With 15 of 24 in one arm, 8 or fewer in
    another are told from it; at scale `gpu` eight seeds at the spread of `cpu`'s (0.41) give +-0.34 for a difference of
    shares. What needs no reading of spectra trains as replicas."""
    at_every_step = [dict(shaping="kss", shaping_every=1, shaping_alpha=alpha) for alpha in (0.15, 0.5, 1.5)]
    read = [{}, dict(shaping="kss"), at_every_step[1], dict(reparametrization="weight_norm"), at_every_step[0],
            at_every_step[2], dict(reparametrization="spectral_norm"),
            dict(shaping="jacobian", shaping_every=1, shaping_alpha=JACOBIAN_FAIR)]
    unread = [dict(clip_norm=1.0), dict(clip_norm=0.5), dict(residual="scaled"), dict(residual="rezero"),
              dict(norm="pre_ln")]
    lrs, seeds, apart = fair_lrs(scale), _seeds(scale, 6), fair(scale, spectra_every=0)
    if scale == "quick":
        read, unread = read[:3], unread[:1]
    if scale == "gpu":  # what its time allows: the paper's dose and what it is held against, with as many runs
        read, unread, seeds = [], [*read[:2], *unread[:1]], range(8)
    return [*grid(fair(scale), arm=read, lr=lrs, seed=seeds), *grid(apart, arm=unread, lr=lrs, seed=seeds),
            *grid(apart, lr=[round(lr / LOWER, 7) for lr in lrs], seed=seeds)]


def kss_fair_seeds(scale: str) -> list[RunConfig]:
    """16 more seeds of no control, clipping and the paper's dose in `kss_fair`, whose six left the paper's dose open.
    At the spread between those (0.41 in shares, 0.34 in accuracy) 22 seeds give intervals of 18 and 15 points to each
    side, which tell half of the paper's effect from none. Fixed before these runs: the three claims that compare these
    arms are judged by all 22 seeds. At scale `gpu` eight seeds left it open at -0.13 [-0.55, 0.30] (and clipping
    decided); by the same rule 48 more of the other two arms give 0.14 to each side."""
    if scale == "quick":
        return kss_fair(scale)
    arms, seeds = [{}, dict(clip_norm=1.0), dict(shaping="kss")], range(6, 22)
    if scale == "gpu":
        arms, seeds = arms[::2], range(8, 56)
    return grid(fair(scale, spectra_every=0), arm=arms, lr=fair_lrs(scale), seed=seeds)


def fair_arms(runs: pd.DataFrame, scale: str) -> pd.DataFrame:
    """`kss_fair`'s runs with their `arm`, whether they `diverged`, and accuracy in percent; those at a third of a rate
    are `lower LR` and stand at the rate they are a third of, with which they pair."""
    runs = runs.assign(arm=[control_name(run) for run in runs.to_dict("records")],
                       diverged=runs["status"] == "diverged", accuracy=100 * runs["accuracy_final"])
    third = {round(lr / LOWER, 7): lr for lr in fair_lrs(scale)}
    return runs.assign(arm=runs["arm"].mask(runs["lr"].isin(third), "lower LR"), lr=runs["lr"].replace(third))


def _seeds(scale: str, n: int) -> list[int]:
    """The first n at scale `cpu`, else those of `control_seeds`."""
    return list(range(n)) if scale == "cpu" else control_seeds(scale)


def kss_window(scale: str) -> list[RunConfig]:
    """`kss_fair`'s model at learning rates below and above: how far up the paper's dose, clipping and weight norm take
    it, and what each learns at its own best rate."""
    unread, read = [{}, dict(clip_norm=1.0)], [dict(shaping="kss"), dict(reparametrization="weight_norm")]
    if scale == "gpu":
        return kss_fair(scale)
    lrs = [3e-3] if scale == "quick" else [6e-3, 1.35e-2, 1.75e-2, 2.4e-2]
    return grid(fair(scale, spectra_every=0), arm=unread + read, lr=lrs, seed=_seeds(scale, 6))


def kss_warm_up(scale: str) -> list[RunConfig]:
    """`kss_fair`'s model after warm-ups of 100 and 300 steps: no control, clipping and the paper's dose. With 8
    of 12 in one arm, 3 or fewer in another are told from it; with 12 of 18, 6 or fewer."""
    arms = [{}, dict(clip_norm=1.0), dict(shaping="kss")]
    if scale in ("quick", "gpu"):
        shorter = dict(steps=1200, warmup_steps=300) if scale == "gpu" else dict(warmup_steps=50)
        return grid(fair(scale, spectra_every=0, **shorter), arm=arms, lr=fair_lrs(scale)[-2:][:1],
                    seed=_seeds(scale, 3))
    setting = fair(scale, spectra_every=0, steps=fair(scale).steps - 200)
    return [*grid(setting, warmup_steps=[100], arm=arms, lr=[1.2e-2], seed=_seeds(scale, 12)),
            *grid(setting, warmup_steps=[300], arm=arms, lr=[1.05e-2, 1.15e-2, 1.25e-2], seed=_seeds(scale, 6)),
            *grid(setting, warmup_steps=[100], arm=arms, lr=[1.05e-2, 1.38e-2], seed=_seeds(scale, 6))]


def kss_matched(scale: str) -> list[RunConfig]:
    """In `control`'s setting without a limit on the gradient's norm: every penalty at every step with the first
    gradient of KSS at 0.15, a dose that prevents some and not all; rare large doses; directions that the gradient goes
    through. 48 runs of what is compared at small differences, else 24 (paper K, Table 6)."""
    kss = dict(shaping="kss", shaping_alpha=0.15)
    every = dict(shaping_every=1)
    first = [{}, kss, kss | every, dict(shaping="unstable", shaping_alpha=0.15) | every]
    others = [dict(shaping=name, shaping_alpha=round(0.03 * alpha, 4)) | every
              for name, alpha in PENALTY_ALPHAS.items()]
    rare = [dict(shaping="kss", shaping_alpha=alpha) for alpha in (5.0, 20.0)]
    moving = [kss | every | dict(shaping_dmd="pod_moving")]
    if scale in ("quick", "gpu"):
        first, others, rare = first[::2], others[2:3], rare[1:]
    if scale == "gpu":
        others = rare = moving = []
    setting, seeds = control(scale, spectra_every=0, diverge_grad_norm=None), _seeds(scale, 12)
    lrs = control_lrs(scale)[1::2]
    return [*grid(setting, arm=first, lr=lrs, seed=seeds),
            *grid(setting, arm=[*others, *rare, *moving], lr=lrs, seed=seeds[:6])]


def kss_wider(scale: str) -> list[RunConfig]:
    """The paper's dose in wider models, on sequences as long as the paper's and with its 2048 token states a layer."""
    arms, setting = [{}, dict(shaping="kss")], control(scale, spectra_every=0, diverge_grad_norm=None)
    if scale in ("quick", "gpu"):
        return grid(setting, d_model=[96 if scale == "quick" else 832], arm=arms,
                    lr=[3e-3 if scale == "quick" else 6e-4], seed=control_seeds(scale))
    return [config for width, (lrs, seeds) in WIDER.items() for config in grid(
        setting, seq_len=[64], d_model=[width], arm=arms, lr=lrs, seed=seeds)]


def kss_longer(scale: str) -> list[RunConfig]:
    """The doses at every step that in `kss_learning` learned late or not at all, four times as long."""
    steps = 300 if scale == "quick" else 6000
    setting = fair(scale, spectra_every=0, steps=steps, warmup_steps=CONTROL[scale]["warmup_steps"],
                   lr=1e-3 if scale == "gpu" else 3e-3)
    doses = [5.0] if scale in ("quick", "gpu") else [5.0, 0.5]
    return grid(setting, arm=[EVERY_STEP], shaping_alpha=doses, seed=control_seeds(scale))


def kss_open_seeds(scale: str) -> list[RunConfig]:
    """More seeds of two claims that three and six left open. Fixed before these runs, the others known: `KT3.late` is
    judged by ten seeds of alpha 5 in `kss_longer`, which would tell 0.78 from a half at the spread of three (0.37);
    `KF2.rare` by fifteen of rare large doses and of no control in `kss_matched`, 0.17 to each side at the spread of
    six (0.26)."""
    if scale in ("quick", "gpu"):
        return [*kss_longer(scale), *kss_matched(scale)]
    rare = [dict(shaping="kss", shaping_alpha=alpha) for alpha in (5.0, 20.0)]
    setting = control(scale, spectra_every=0, diverge_grad_norm=None)
    lrs, late = control_lrs(scale)[1::2], kss_longer(scale)[0]
    return [*grid(late, seed=range(7)), *grid(setting, arm=rare, lr=lrs, seed=range(6, 15)),
            *grid(setting, lr=lrs, seed=range(12, 15))]


def kss_parts_seeds(scale: str) -> list[RunConfig]:
    """54 new seeds of KSS 0.15 at every step, its near-unit term and the stream's norm at equal first gradients, which
    the six of `kss_matched` left open at -0.08 and +0.13. Fixed before these runs: they alone judge `KT6.near-unit-
    matched` and `KT6.norm-matched`, criteria unchanged. At the spreads of six (0.20, 0.26) the intervals are 0.055 and
    0.072 to each side: such differences show in eight and in nine of ten such samples."""
    if scale in ("quick", "gpu"):
        return kss_matched(scale)
    parts = [dict(shaping="kss"), dict(shaping="near_unit"), dict(shaping="residual_norm")]
    alphas = [0.15, *(round(0.03 * PENALTY_ALPHAS[part["shaping"]], 4) for part in parts[1:])]
    arms = [part | dict(shaping_alpha=alpha, shaping_every=1) for part, alpha in zip(parts, alphas, strict=True)]
    setting = control(scale, spectra_every=0, diverge_grad_norm=None)
    return grid(setting, arm=arms, lr=control_lrs(scale)[1::2], seed=range(12, 66))


STUDIES = (kss_divergence, kss_more_seeds, kss_dose, kss_readings, kss_ablations, kss_learning, kss_fair,
           kss_fair_seeds, kss_window, kss_matched, kss_warm_up, kss_wider, kss_longer, kss_open_seeds,
           kss_parts_seeds)

AT_PAPER = "KSS 0.15 at every tenth step minus"
CLAIMS = (
    Claim("KT3.uncontrolled", "K Table 3",
          "without norms and without control, training diverges at LR 0.005 to 0.01", "66.7%",
          "share of runs without control that diverge", ">", 0.5),
    Claim("KT3.clipping", "K Table 3", "clipping helps little", "58.3% with clipping at 1.0, 50.0% at 0.5",
          "share of runs with clipping, at 0.5 and 1.0, that diverge", ">", 0.33),
    Claim("KT3.kss-half", "K Table 3", "KSS at the paper's dose prevents at least half as much as there",
          "12.5% against 66.7%", f"diverged share, {AT_PAPER} no control, LR 0.0055 to 0.01", "<", -0.271),
    Claim("KT3.kss-every-step", "ours", "KSS with alpha 5 at every step prevents divergence", "not tested",
          "diverged share, KSS at alpha 5 and every step minus no control", "<", 0.0),
    Claim("KT3.near-unit-mass", "K Table 3", "KSS lowers near-unit mass", "0.58 against 0.85",
          "M1 at the last reading, KSS at alpha 5 and every step minus no control", "<", 0.0),
    Claim("KT3.fair", "K Table 3", "where recall is learned, KSS prevents at least half as much as there",
          "12.5% against 66.7%", f"diverged share where recall is learned, {AT_PAPER} no control", "<", -0.271),
    Claim("KT3.fair-accuracy", "K Table 3", "and raises accuracy at least half as much", "48.2% against 28.5%",
          f"final accuracy of all runs where recall is learned, {AT_PAPER} no control", ">", 0.0985),
    Claim("KT3.fair-clipping", "K Table 3", "and prevents more than clipping", "12.5% against 58.3%",
          f"diverged share where recall is learned, {AT_PAPER} clipping at 1", "<", 0.0),
    Claim("KT3.fair-every-step", "ours", "KSS 0.5 at every step prevents divergence there", "not tested",
          "diverged share where recall is learned, KSS 0.5 at every step minus no control", "<", 0.0),
    Claim("KF2.fair-dose", "ours", "there, more KSS prevents more", "25.0%, 12.5%, 8.3% at alpha 0.10, 0.15, 0.20",
          "diverged share where recall is learned, KSS 1.5 minus 0.15 at every step", "<", 0.0),
    Claim("KT3.warm-up-100", "K Table 3", "after a warm-up of 100 steps KSS at the paper's dose prevents divergence",
          "12.5% against 66.7%", f"diverged share at LR 0.012, {AT_PAPER} no control", "<", 0.0),
    Claim("KT3.warm-up-300", "K Table 3", "after one of 300 steps it prevents at least half as much as in the paper",
          "12.5% against 66.7%", f"diverged share at LR 0.0105 to 0.0125, {AT_PAPER} no control", "<", -0.271),
    Claim("KT3.window", "K Table 5", "KSS at the paper's dose raises the largest stable LR at least half as far",
          "0.002 to 0.005", "log10 ratio of largest stable LRs, KSS 0.15 at every tenth step over no control", ">",
          0.199),
    Claim("KT3.window-clipping", "ours", "and further than clipping does", "not tested",
          "log10 ratio of largest stable LRs, KSS 0.15 at every tenth step over clipping at 1", ">", 0.0),
    Claim("KT3.wider", "K Sec. 5.1", "at width 128, on sequences of 64, it prevents at least half as much",
          "12.5% against 66.7%", f"diverged share at width 128, {AT_PAPER} no control", "<", -0.271),
    Claim("KT3.learning", "ours", "where recall is learned, preventing divergence costs no accuracy", "not tested",
          "final accuracy at each arm's best LR, KSS at alpha 5 and every step minus no control", ">", -0.05),
    Claim("KT3.late", "ours", "KSS at alpha 5 and every step only delays learning", "not tested",
          "final accuracy after 6000 steps, KSS at alpha 5 and every step", ">", 0.5),
    Claim("KF2.rare", "ours", "a larger alpha makes up for a rare application", "not tested",
          "diverged share by the loss, the better of KSS 5 and 20 at every tenth step minus no control", "<", -0.271),
    Claim("KF2.moving", "ours", "KSS prevents more where its gradient goes through the fit's directions",
          "not tested", "diverged share, KSS 0.15 at every step, moving minus fixed directions", "<", -0.104),
    Claim("KT6.unstable-matched", "K Table 6", "full KSS prevents more than its unstable term, by half of that gap",
          "12.5% against 33.3%", "diverged share, KSS 0.15 at every step minus its unstable term", "<", -0.104),
    Claim("KT6.near-unit-matched", "K Table 6", "full KSS prevents more than its near-unit term alone",
          "12.5% against 41.7%", "diverged share at equal first gradient, KSS 0.15 minus near-unit term", "<", 0.0),
    Claim("KT6.random-l2-matched", "K Table 6", "KSS prevents more than a random l2 penalty on residuals",
          "12.5% against 54.2%", "diverged share at equal first gradient, KSS 0.15 minus random l2", "<", 0.0),
    Claim("KT6.jacobian-matched", "K Table 6", "KSS prevents more than a penalty on the layers' Jacobians",
          "12.5% against 45.8%", "diverged share at equal first gradient, KSS 0.15 minus Jacobian penalty", "<", 0.0),
    Claim("KT6.variance-matched", "K Table 6", "KSS prevents more than a penalty on the activations' variance",
          "12.5% against 50.0%", "diverged share at equal first gradient, KSS 0.15 minus variance penalty", "<", 0.0),
    Claim("KT6.random-l2", "K Table 6", "KSS prevents more than a random l2 penalty on residuals",
          "12.5% against 54.2%", "diverged share, KSS minus random l2 at the better of two doses", "<", 0.0),
    Claim("KT6.activation-variance", "K Table 6", "KSS prevents more than a penalty on the activations' variance",
          "12.5% against 50.0%", "diverged share, KSS minus variance penalty at the better of two doses", "<", 0.0),
    Claim("KT6.norm-matched", "ours", "KSS prevents more than a plain penalty on the residual stream's norm",
          "not tested", "diverged share at equal first gradient, KSS 0.15 minus norm penalty", "<", 0.0),
    Claim("KT6.foretells", "ours", "within an arm and LR, near-unit mass foretells which runs diverge",
          "r = -0.87 between falls of both", "AUROC of M1 halfway through the warm-up where recall is learned", ">",
          0.7),
)
"""Differences of shares are taken over pairs of one learning rate and seed (`evaluate.share_difference`)."""
