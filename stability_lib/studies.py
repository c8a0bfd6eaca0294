"""The grids behind the chapters: `study(scale) -> list[RunConfig]`.

They stand here and not in the notebooks because five places need the same lists: the chapter, the dry run, the
recomputed reference, the audit and the tests.
"""

from collections.abc import Callable

from .config import RunConfig, grid, unknown

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


STUDIES: dict[str, Callable[[str], list[RunConfig]]] = {
    study.__name__: study for study in (first_look, attention_logit_growth, attention_patterns)}

CHAPTERS = {
    "00_start_here": ("first_look",),
    "01_attention_logit_growth": ("attention_logit_growth", "attention_patterns"),
}
"""Which studies a notebook uses."""


def configs(study: str, scale: str) -> list[RunConfig]:
    """The grid of a study by name. Raises `ValueError` for an unknown study or scale."""
    if study not in STUDIES:
        raise ValueError(unknown("study", study, STUDIES))
    return STUDIES[study](check_scale(scale))
