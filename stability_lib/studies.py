"""The grids behind the chapters: `study(scale) -> list[RunConfig]`.

They stand here and not in the notebooks because five places need the same lists: the chapter, the dry run, the
recomputed reference, the audit and the tests.
"""

from collections.abc import Callable, Mapping

import pandas as pd

from .config import CHOICES, RunConfig, grid, replace, unknown

SCALES = ("quick", "cpu", "gpu", "paper")
PAPER_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Paper P, Sec. 2.2."""


def size(d_model: int, n_layers: int, d_head: int = 16) -> dict:
    """A model size at constant head size, as an axis value of `grid`."""
    return dict(d_model=d_model, n_layers=n_layers, n_heads=d_model // d_head)


# Sizes grow in width, depth and heads together, with the schedule's proportions of paper P (5% warm-up).
# The paper's smallest (2.4M) and largest (1.2B) size are its own; the ones between are ours, and so are bytes of C4 in
# place of its subwords.
_SIZES = {
    "quick": [size(32, 2), size(64, 3)],
    "cpu": [size(32, 2), size(64, 3), size(96, 5)],
    "gpu": [size(64, 3), size(128, 4, 32), size(256, 6, 32), size(512, 8, 64)],
    "paper": [size(256, 3, 64), size(512, 6, 64), size(768, 12, 64), size(1024, 24, 64), size(2048, 24, 64)],
}
_LENGTH = {
    "quick": dict(steps=100, warmup_steps=5, probe_every=5),
    "cpu": dict(steps=300, warmup_steps=15, probe_every=10),
    "gpu": dict(steps=5000, warmup_steps=250, probe_every=50, seq_len=256, batch_size=64, precision="bf16"),
    "paper": dict(steps=100_000, warmup_steps=5000, probe_every=500, seq_len=512, batch_size=256, precision="bf16",
                  data="c4", eval_sequences=2048),
}


def check_scale(scale: str) -> str:
    """`scale` itself, or `ValueError` that lists the known ones."""
    if scale not in SCALES:
        raise ValueError(unknown("scale", scale, SCALES))
    return scale


def base(scale: str) -> RunConfig:
    """Paper P's recipe at the length of `scale`."""
    return RunConfig(**_LENGTH[check_scale(scale)])


def first_look(scale: str) -> list[RunConfig]:
    """Chapter 00: the smallest model at a high learning rate, without and with qk-norm."""
    return grid(base(scale), size=_SIZES[scale][:1], qk_norm=["none", "head"], lr=[1e-2, 3e-1], seed=[0])


def attention_logit_growth(scale: str) -> list[RunConfig]:
    """Chapter 01: LR against final loss by size, without and with qk-norm, three seeds (paper P, Figs 1, 2, E.1)."""
    lrs = PAPER_LRS[2:] if check_scale(scale) == "quick" else PAPER_LRS
    return grid(base(scale), size=_SIZES[scale], qk_norm=["none", "head"], lr=lrs, seed=[0, 1, 2])


def attention_patterns(scale: str) -> list[RunConfig]:
    """Chapter 01: one head's attention pattern over training at the highest LR, without and with qk-norm."""
    return grid(base(scale), size=_SIZES[scale][1:2], qk_norm=["none", "head"], lr=[3e-1], seed=[0], attention_maps=[6])


# The chapters below compare settings rather than reproduce one figure at length: shorter sequences and runs.
_SHORT = {
    "quick": dict(steps=80, warmup_steps=4, seq_len=32, probe_every=0),
    "cpu": dict(steps=200, warmup_steps=10, seq_len=32, probe_every=0),
    "gpu": _LENGTH["gpu"] | dict(probe_every=0),
    "paper": _LENGTH["paper"] | dict(probe_every=0),
}


def short(scale: str) -> RunConfig:
    """Paper P's recipe, without probes, in the short runs of the chapters that compare many settings."""
    return RunConfig(**_SHORT[check_scale(scale)])


def output_logit_floor(scale: str) -> list[RunConfig]:
    """Chapter 02: how far and how fast the logits of symbols that never occur sink, by AdamW's eps and beta2, by
    learning rate, by the number of such symbols, and with z-loss or weight decay (paper P, Fig. 4)."""
    steps = dict(quick=300, cpu=1500, gpu=10_000, paper=20_000)[check_scale(scale)]
    setting = RunConfig(d_model=32, n_layers=1, n_heads=2, seq_len=16, batch_size=8, eval_sequences=128, lr=1e-2,
                        vocab_size=2048, z_loss=0.0, weight_decay=0.0, **_length(steps))
    seeds = [0, 1, 2]
    if scale == "quick":  # too short for beta2 0.95
        return grid(setting, vocab_size=[1024], beta2=[0.9], eps=[1e-8, 1e-6, 1e-4], seed=seeds)
    return [*grid(setting, eps=[1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4], seed=seeds),
            *grid(setting, eps=[1e-10], beta2=[0.9, 0.99], seed=seeds),
            *grid(setting, vocab_size=[1024, 4096], eps=[1e-6], seed=seeds),
            *grid(setting, lr=[1e-3, 1e-1], seed=seeds),
            *grid(setting, lr=[1e-1], cure=[dict(z_loss=1e-4), dict(weight_decay=1e-3)], seed=seeds)]


def output_logit_harm(scale: str) -> list[RunConfig]:
    """Chapter 02: where the drift could cost loss. High learning rates in bf16 with neither z-loss nor weight decay,
    with either (paper P, Fig. 3), and without z-loss and with in fp32, with a BPE vocabulary, a wider model, a smaller
    eps, a longer run and no cosine."""
    steps = dict(quick=200, cpu=1000, gpu=20_000, paper=100_000)[check_scale(scale)]
    setting = RunConfig(d_model=64, n_layers=1, seq_len=16, batch_size=8, weight_decay=0.0, precision="bf16",
                        **_length(steps))
    neither, z_loss, decay = dict(z_loss=0.0), dict(z_loss=1e-4), dict(z_loss=0.0, weight_decay=1e-4)
    if scale == "quick":
        return grid(setting, lr=[3e-1, 3.0], cure=[neither, z_loss], seed=[0, 1, 2])
    subwords = dict(tokenizer="bpe", vocab_size=2048, **_length(steps // 2))
    others = [subwords, subwords | dict(lr=3e-1), dict(d_model=128, n_heads=8), dict(eps=1e-15), _length(3 * steps),
              dict(lr_final=1.0)]
    return [*grid(setting, lr=[1e-1, 3e-1, 1.0, 3.0], cure=[neither, z_loss, decay], seed=range(5)),
            *grid(replace(setting, precision="fp32"), lr=[1.0, 3.0], cure=[neither, z_loss], seed=range(5)),
            *grid(replace(setting, lr=1.0), other=others, cure=[neither, z_loss], seed=[0, 1, 2])]


def _length(steps: int) -> dict:
    """A run's length with the schedule's proportions of paper P and twenty probes."""
    return dict(steps=steps, warmup_steps=steps // 20, probe_every=steps // 20)


def mu_parametrization(scale: str) -> list[RunConfig]:
    """Chapter 03: LR against final loss by width under muParam's variants (paper P, Figs 8, E.4, E.5, E.6)."""
    standard, simple = dict(parametrization="standard"), dict(parametrization="mup_simple")
    arms = [standard, simple, dict(parametrization="mup_full")]  # at the base width the first two are one model
    widths, lrs = {"quick": ([16, 64], [3e-3, 3e-2, 3e-1]), "cpu": ([24, 48, 96, 192], PAPER_LRS[1:]),
                   "gpu": ([64, 128, 256, 512], PAPER_LRS[1:]),
                   "paper": ([256, 512, 1024, 2048], PAPER_LRS)}[check_scale(scale)]
    setting = replace(short(scale), n_layers=2, base_width=widths[0])
    if scale in ("quick", "cpu"):
        setting = replace(setting, batch_size=16, steps=80 if scale == "quick" else 120, warmup_steps=6)
    if scale != "quick":
        arms += [dict(parametrization="mup_intermediate"), simple | dict(attention_scale="1/d_h"),
                 standard | dict(qk_norm="none"), simple | dict(qk_norm="none")]
    return grid(setting, arm=arms, d_model=widths, lr=lrs, seed=[0, 1, 2])


_RECALL = dict(data="recall", seq_len=32, n_heads=4, init="gpt2", positions="learned", biases=True, qk_norm="none",
               clip_norm=None, z_loss=0.0, beta2=0.999, weight_decay=0.01, decay="pytorch", diverge_loss=50.0,
               diverge_grad_norm=500.0, probe_every=0)
"""GPT-2 style models on associative recall with paper K's thresholds (Sec. 3.1, 5.1, App. D.1); torch's own AdamW
settings where the paper is silent. Sequences are half as long as the paper's but at scale `paper`."""


_SWEEP = {
    "quick": ([(32, 2)], [1e-2, 3e-2, 8e-1], 60),
    "cpu": ([(32, 2), (64, 2), (32, 4), (64, 4)], [3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 4e-1, 8e-1, 1.6], 200),
    "gpu": ([(128, 4), (256, 4), (128, 8), (256, 8)], [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], 2000),
    "paper": ([(128, 4), (256, 8), (512, 12), (1024, 24)], [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 10_000),
}
"""Widths and depths, learning rates and steps of chapter 04."""


def divergence_sweep(scale: str) -> list[RunConfig]:
    """Chapter 04: which norm placements, shapes and learning rates diverge on associative recall (paper K, Table 1)."""
    sizes, lrs, steps = _SWEEP[check_scale(scale)]
    longer = dict(seq_len=64) if scale == "paper" else {}
    setting = RunConfig(**_RECALL | longer, steps=steps, warmup_steps=steps // 10)
    return grid(setting, norm=CHOICES["norm"], size=[dict(d_model=d, n_layers=n) for d, n in sizes], lr=lrs,
                seed=[42] if scale == "quick" else [42, 123, 456])


def unseen_architectures(scale: str) -> list[RunConfig]:
    """Chapter 04: architectures and a size that `divergence_sweep` lacks, at its learning rates, to hold forecasts of
    the largest stable one to."""
    d_model, n_layers = {"quick": (32, 2), "cpu": (48, 3), "gpu": (192, 6), "paper": (384, 6)}[check_scale(scale)]
    without = [dict(init="xavier"), dict(init="fan_in"), dict(residual="scaled"), dict(residual="rezero"),
               dict(qk_norm="head")]
    arms = [*(dict(norm="no_norm") | arm for arm in without), dict(norm="pre_ln", init="fan_in"),
            dict(norm="pre_ln", residual="scaled"), dict(norm="post_ln", init="xavier")]
    first = replace(divergence_sweep(scale)[0], d_model=d_model, n_layers=n_layers)
    return grid(first, arm=arms[1:3] if scale == "quick" else arms, lr=_SWEEP[scale][1],
                seed=[42] if scale == "quick" else [42, 123, 456])


def untrained(config: RunConfig, **changes) -> RunConfig:
    """A run of one step that profiles 2048 token states of the model `config` starts from, before that step."""
    return replace(config, **dict(
        lr=1e-2, steps=1, warmup_steps=0, batch_size=2048 // config.seq_len, eval_sequences=32, diverge_loss=None,
        diverge_grad_norm=None, spectra_every=1) | changes)


def spectra_at_init(scale: str) -> list[RunConfig]:
    """Chapter 04: profiles of untrained models. By norm and, each alone, width, depth and initialization (paper K,
    Table 1), and with Kreiss constants of every model that the chapter trains."""
    setting = RunConfig(**_RECALL | dict(seq_len=64, d_model=128, n_layers=4))
    shapes = [] if scale == "quick" else [dict(d_model=64), dict(d_model=256), dict(n_layers=2), dict(n_layers=8)]
    changes = [{}, *shapes, dict(init="pytorch"), dict(init="xavier"), dict(init="fan_in")]
    trained = [untrained(config, spectra_kreiss=True)
               for config in divergence_sweep(scale) + unseen_architectures(scale)]
    by_choice = grid(untrained(setting), norm=CHOICES["norm"], change=changes, seed=[42, 123, 456])
    return list(dict.fromkeys(by_choice + trained))


_CONTROL = {
    "quick": dict(d_model=64, n_layers=4, seq_len=16, batch_size=16, steps=120, warmup_steps=50, eval_sequences=128),
    "cpu": dict(d_model=64, n_layers=4, seq_len=16, steps=300, warmup_steps=100),
    "gpu": dict(d_model=128, n_layers=4, seq_len=64, steps=1000, warmup_steps=100),
    "paper": dict(d_model=256, n_layers=6, seq_len=64, steps=10_000, warmup_steps=1000),
}
"""Models without norms on associative recall, in which divergence is to be prevented (paper K, Sec. 3.3, Table 3)."""
_EVERY_STEP = dict(shaping="kss", shaping_every=1, shaping_alpha=5.0)
"""KSS at a dose that does something here: paper K's is 0.15 at every tenth step."""
PENALTY_ALPHAS = dict(near_unit=290.0, random_l2=1160.0, residual_norm=1200.0, activation_variance=3600.0,
                      jacobian=235.0)
"""alpha at which a penalty's gradient at initialization is as large as that of KSS at alpha 5 (`_CONTROL`, cpu)."""


def _control(scale: str, **changes) -> RunConfig:
    settings = _RECALL | _CONTROL[check_scale(scale)] | dict(norm="no_norm")
    return RunConfig(**settings | dict(spectra_every=settings["steps"] // 6) | changes)


def _control_lrs(scale: str) -> list[float]:
    """Within paper K's range, LR 0.005 to 0.01; higher ones where a run is too short to diverge there."""
    return [8e-3, 1e-2, 1.2e-2] if scale == "quick" else [5e-3, 5.5e-3, 6.1e-3, 6.7e-3, 7.4e-3, 8.2e-3, 9.1e-3, 1e-2]


def _control_seeds(scale: str) -> list[int]:
    return [42, 123] if scale == "quick" else [42, 123, 456]


def control_name(run: Mapping) -> str:
    """What a run of the grids below does against divergence, in words: `no control`, `clip 0.5`, `KSS 0.15 every 10`,
    `SAM 0.1 + KSS 5`. `run` holds the fields of `RunConfig`, as a row of `ensure`'s table does."""
    penalties = dict(kss="KSS", unstable="unstable term", near_unit="near-unit term", random_l2="random l2",
                     residual_norm="stream norm", activation_variance="activation variance", jacobian="Jacobian")
    fields = {**{name: getattr(RunConfig(), name) for name in CHOICES}, **run}
    warm_ups = [_CONTROL[scale]["warmup_steps"] for scale in SCALES]
    steps = [_CONTROL[scale]["steps"] for scale in SCALES]
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
    """Chapters 05 and 10: divergence without control, with clipping, with KSS at paper K's doses and applied at every
    step; 24 runs each (paper K, Table 3, Fig. 2)."""
    at_paper = [dict(shaping="kss", shaping_alpha=alpha) for alpha in (0.10, 0.15, 0.20)]
    at_every_step = [_EVERY_STEP | dict(shaping_alpha=alpha) for alpha in (0.15, 1.5, 5.0)]
    arms = [{}, dict(clip_norm=0.5), dict(clip_norm=1.0), *at_paper, *at_every_step]
    if scale == "quick":
        arms = [{}, dict(clip_norm=1.0), at_paper[1], at_every_step[2]]
    return grid(_control(scale), arm=arms, lr=_control_lrs(scale), seed=_control_seeds(scale))


def kss_dose(scale: str) -> list[RunConfig]:
    """Chapter 05: divergence against alpha and how often KSS is applied, beside what `kss_divergence` has of it."""
    alphas, everies = ([0.15, 5.0], [1, 10]) if scale == "quick" else ([0.15, 0.5, 1.5, 5.0, 20.0, 100.0], [1, 3, 10])
    cells = grid(_control(scale, shaping="kss"), shaping_alpha=alphas, shaping_every=everies,
                 lr=_control_lrs(scale)[3::2] or _control_lrs(scale)[-1:], seed=_control_seeds(scale)[:2])
    return [config for config in cells if config not in kss_divergence(scale)]


def kss_readings(scale: str) -> list[RunConfig]:
    """Chapter 05: KSS at every step under other readings of the paper's text, at two alphas."""
    readings = [dict(shaping_dmd="random"), dict(shaping_dmd="whitened"), dict(shaping_gradient="input"),
                dict(shaping_gradient="output"), dict(shaping_reduction="mean"), dict(shaping_beta=10.0)]
    if scale == "quick":
        readings = readings[1:3]
    return grid(_control(scale, **_EVERY_STEP), reading=readings, shaping_alpha=[0.5, 5.0][scale == "quick":],
                lr=_control_lrs(scale)[3::2] or _control_lrs(scale)[-1:], seed=_control_seeds(scale)[:2])


def kss_ablations(scale: str) -> list[RunConfig]:
    """Chapter 05: one term of KSS alone, and other penalties on the same states, at alpha 5 and, but for the unstable
    term, at an alpha that gives the same gradient at initialization (paper K, Table 6)."""
    arms = [dict(shaping="unstable"), *(dict(shaping=name, shaping_alpha=alpha) for name, matched in
                                        PENALTY_ALPHAS.items() for alpha in (5.0, matched))]
    if scale == "quick":
        arms = [dict(shaping="unstable"), dict(shaping="residual_norm", shaping_alpha=1200.0)]
    return grid(_control(scale, **_EVERY_STEP), arm=arms, lr=_control_lrs(scale)[1::2], seed=_control_seeds(scale))


def kss_learning(scale: str) -> list[RunConfig]:
    """Chapter 05: what prevention costs where recall is learned, with larger initial weights, fewer symbols, longer.
    The gradient's norm has no limit, as that of the penalty starts near 100 and would end runs whose loss is fine."""
    setting = _control(scale, n_layers=2, init="fan_in", vocab_size=32, seq_len=12, diverge_grad_norm=None)
    arms = [{}, dict(clip_norm=1.0), dict(shaping="kss"), _EVERY_STEP, _EVERY_STEP | dict(shaping_alpha=0.5)]
    if scale == "quick":
        return grid(setting, arm=[{}, _EVERY_STEP], lr=[6e-3], seed=_control_seeds(scale))
    steps = max(1500, setting.steps)
    return grid(setting, steps=[steps], spectra_every=[steps // 5], arm=arms, lr=[1.5e-3, 3e-3, 6e-3, 1.2e-2],
                seed=_control_seeds(scale))


def kss_baselines(scale: str) -> list[RunConfig]:
    """Chapter 10: paper K's baselines with and without KSS, and plain remedies, at the learning rates of
    `kss_divergence` and at a lower and a higher one (paper K, Tables 4, 13, 14)."""
    sam, width = dict(sam_rho=0.1), _CONTROL[check_scale(scale)]["d_model"]
    mup = dict(parametrization="mup_full", base_width=width // 4)
    controls = [dict(reparametrization="spectral_norm"), dict(reparametrization="weight_norm"),
                dict(gradient_penalty=0.1), sam, dict(optimizer="lion"), dict(optimizer="lamb"), mup]
    remedies = [dict(sam_rho=0.05), dict(clip_norm=1.0), dict(warmup_steps=2 * _CONTROL[scale]["warmup_steps"]),
                dict(qk_norm="head"), dict(residual="scaled"), dict(residual="rezero"), dict(norm="pre_ln")]
    arms = [*controls, *(arm | _EVERY_STEP for arm in controls), *remedies]
    lrs = _control_lrs(scale)[1::2]
    if scale == "quick":
        return grid(_control(scale), arm=[sam, sam | _EVERY_STEP, dict(optimizer="lion"), dict(residual="scaled")],
                    lr=lrs, seed=_control_seeds(scale))
    plain = grid(_control(scale), arm=[{}, _EVERY_STEP], lr=[1e-3, 3e-2], seed=_control_seeds(scale))
    return [*plain, *grid(_control(scale), arm=arms, lr=[1e-3, *lrs, 3e-2], seed=_control_seeds(scale)),
            *grid(_control(scale, optimizer="lion"), arm=[{}, _EVERY_STEP], lr=[1e-4], seed=_control_seeds(scale))]


def kss_largest_stable_lr(scale: str) -> list[RunConfig]:
    """Chapter 10: divergence against learning rate for three norms without and with KSS (paper K, Table 5)."""
    arms = [{}, _EVERY_STEP]
    if scale == "quick":
        return grid(_control(scale), arm=arms, lr=[5e-3, 1e-2, 2e-2, 4e-2], seed=_control_seeds(scale))
    without = grid(_control(scale), arm=arms, lr=[2.5e-3, 3.5e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2, 2.8e-2, 4e-2, 8e-2],
                   seed=range(5))
    return [*without, *grid(_control(scale), norm=["pre_ln", "rmsnorm"], arm=arms,
                            lr=[0.1, 0.2, 0.4, 0.8, 1.6, 3.2], seed=range(5))]


def _two_sizes(scale: str) -> list[dict]:
    return {"quick": [size(32, 2)], "cpu": [size(32, 2), size(64, 3)]}.get(scale, _SIZES[scale][:3])


def warm_up(scale: str) -> list[RunConfig]:
    """Chapter 06: LR against loss by length of the warm-up, 1%, 5% and 25% of the run (paper P, Fig. 5)."""
    setting = short(scale)
    lengths = [max(1, setting.steps // 100), setting.warmup_steps, setting.steps // 4]
    return grid(setting, warmup_steps=lengths, size=_two_sizes(scale), lr=_lrs(scale), seed=[0, 1, 2])


def weight_decay(scale: str) -> list[RunConfig]:
    """Chapter 06: PyTorch-style decay over the paper's two LR ranges, and how much independent decay (paper P, Figs 6,
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
    """Chapter 06: half and double the steps, half and double the batch (paper P, Figs E.7, E.9), to compare with
    `warm_up`'s arm of 5%."""
    setting = short(scale)
    changes = [*(dict(steps=int(setting.steps * x), warmup_steps=int(setting.warmup_steps * x)) for x in (0.5, 2)),
               *(dict(batch_size=int(setting.batch_size * x)) for x in (0.5, 2))]
    return grid(setting, change=changes[:1] if scale == "quick" else changes, size=_two_sizes(scale)[:1],
                lr=_lrs(scale), seed=[0, 1, 2])


def other_optimizers(scale: str) -> list[RunConfig]:
    """Chapter 06: attention logits and qk-norm under AdamW, Lion and LAMB."""
    setting = replace(short(scale), probe_every=short(scale).steps // 10)
    return grid(setting, size=_two_sizes(scale)[:1], optimizer=CHOICES["optimizer"], qk_norm=["none", "head"],
                lr=_high_lrs(scale), seed=[0, 1, 2])


def digits(scale: str) -> list[RunConfig]:
    """Chapter 06: attention logits and qk-norm in a small Vision Transformer on scikit-learn's digits."""
    steps = short(scale).steps if scale in ("quick", "cpu") else 2000
    setting = RunConfig(data="digits", seq_len=64, positions="learned", steps=steps, warmup_steps=steps // 20,
                        probe_every=steps // 10)
    return grid(setting, size=[size(32, 2)], qk_norm=["none", "head"], lr=_high_lrs(scale), seed=[0, 1, 2])


def width_and_depth(scale: str) -> list[RunConfig]:
    """Chapter 07: LR against loss as width, depth or both grow from one model, the first of the list, to about the same
    number of parameters (paper P, Figs 7, E.2, E.3)."""
    sizes = {"quick": [size(32, 1), size(64, 1), size(32, 4), size(48, 2)],
             "cpu": [size(32, 2), size(64, 2), size(96, 2), size(32, 8), size(32, 16), size(48, 3), size(64, 4)],
             "gpu": [size(d, n, 32) for d, n in [(128, 3), (256, 3), (384, 3), (512, 3), (128, 12), (128, 24),
                                                 (128, 48), (192, 4), (256, 6), (320, 8)]],
             "paper": [size(d, n, 64) for d, n in [(512, 6), (1024, 6), (1536, 6), (2048, 6), (512, 24), (512, 48),
                                                   (512, 96), (768, 9), (1024, 12), (1280, 15)]]}[check_scale(scale)]
    setting = replace(short(scale), batch_size=16) if scale in ("quick", "cpu") else short(scale)
    return grid(setting, size=sizes, qk_norm=["none", "head"],
                lr=PAPER_LRS[2::2] if scale == "quick" else PAPER_LRS[2:], seed=[0, 1, 2])


_SIZES_BETWEEN = {
    "quick": [size(16, 1), size(48, 2)],
    "cpu": [size(16, 1), size(48, 3), size(80, 4)],
    "gpu": [size(32, 2), size(96, 3, 32), size(192, 5, 32), size(384, 7, 64)],
    "paper": [size(128, 2, 64), size(384, 4, 64), size(640, 9, 64), size(896, 18, 64)],
}
"""Sizes between and below those of chapter 01."""


def logit_growth_by_size(scale: str) -> list[RunConfig]:
    """Chapter 08: sizes between and below those of chapter 01, without qk-norm, so that forecasts have something to be
    fitted on and something to be held to (paper P, Fig. 9)."""
    return grid(base(scale), size=_SIZES_BETWEEN[scale], qk_norm=["none"], lr=PAPER_LRS[2:], seed=[0, 1, 2])


def logit_growth_near_failure(scale: str) -> list[RunConfig]:
    """Chapter 08: all sizes at learning rates between the paper's, where failing sets in."""
    lrs = {"quick": [1.7e-1], "cpu": [5.5e-2]}.get(check_scale(scale), [5.5e-3, 1.7e-2, 5.5e-2])
    return grid(base(scale), size=_SIZES[scale] + _SIZES_BETWEEN[scale], qk_norm=["none"], lr=lrs, seed=[0, 1, 2])


def logit_transplant(scale: str) -> list[RunConfig]:
    """Chapter 08: attention logits forced to a size kappa, and a model without layers (paper P, Fig. 10)."""
    kappas = [1e1, 1e3, 1e4] if scale == "quick" else [1e0, 1e1, 1e2, 3e2, 1e3, 3e3, 1e4, 1e5]
    setting = replace(short(scale), **_SIZES[scale][1], qk_norm="none", probe_every=short(scale).steps // 10)
    return grid(setting, arm=[{}, dict(n_layers=0, probe_every=0), *(dict(logit_transplant=k) for k in kappas)],
                seed=[0, 1, 2])


def adam_epsilon(scale: str) -> list[RunConfig]:
    """Chapter 09: AdamW's eps from far below the gradients to above them (paper P, Figs 12, 13, E.15)."""
    setting = replace(short(scale), **_SIZES[scale][1], probe_every=short(scale).steps // 10)
    if scale == "quick":
        return grid(setting, eps=[1e-8, 1e-3], lr=[1e-1], seed=[0, 1, 2])
    return grid(setting, eps=[1e-15, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2], lr=[1e-2, 1e-1, 3e-1], seed=[0, 1, 2])


def _lrs(scale: str) -> tuple[float, ...]:
    return PAPER_LRS[2::2] if scale == "quick" else PAPER_LRS


def _high_lrs(scale: str) -> tuple[float, ...]:
    return (1e-2, 3e-1) if scale == "quick" else PAPER_LRS[1:]


STUDIES: dict[str, Callable[[str], list[RunConfig]]] = {study.__name__: study for study in (
    first_look, attention_logit_growth, attention_patterns, output_logit_floor, output_logit_harm, mu_parametrization,
    divergence_sweep, unseen_architectures, spectra_at_init, kss_divergence, kss_dose, kss_readings, kss_ablations,
    kss_learning, warm_up, weight_decay, steps_and_batch, other_optimizers, digits, width_and_depth,
    logit_growth_by_size, logit_growth_near_failure, logit_transplant, adam_epsilon, kss_baselines,
    kss_largest_stable_lr)}

CHAPTERS = {
    "00_start_here": ("first_look",),
    "01_attention_logit_growth": ("attention_logit_growth", "attention_patterns"),
    "02_zloss": ("output_logit_floor", "output_logit_harm"),
    "03_muparam_lr_sensitivity": ("mu_parametrization",),
    "04_rksp_auroc": ("divergence_sweep", "unseen_architectures", "spectra_at_init"),
    "05_kss_divergence": ("kss_divergence", "kss_dose", "kss_readings", "kss_ablations", "kss_learning"),
    "06_warmup_and_weight_decay": ("warm_up", "weight_decay", "steps_and_batch", "other_optimizers", "digits"),
    "07_width_vs_depth": ("width_and_depth",),
    "08_predicting_logit_growth": ("attention_logit_growth", "logit_growth_by_size", "logit_growth_near_failure",
                                   "logit_transplant"),
    "09_gradient_scale_and_adam_eps": ("attention_logit_growth", "adam_epsilon"),
    "10_kss_baselines": ("kss_divergence", "kss_baselines", "kss_largest_stable_lr"),
}
"""Which studies a notebook uses."""


def configs(study: str, scale: str) -> list[RunConfig]:
    """The grid of a study by name. Raises `ValueError` for an unknown study or scale."""
    if study not in STUDIES:
        raise ValueError(unknown("study", study, STUDIES))
    return STUDIES[study](check_scale(scale))
