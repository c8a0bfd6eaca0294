"""Scales, the settings that several chapters share, and the look-up of chapters and their grids.

A chapter's grids, `study(scale) -> list[RunConfig]`, and its claims stand in `chapters`, in a module named after its
notebook, and not in the notebook because five places need the same lists: the chapter, the dry run, the recomputed
reference, the audit and the tests.
"""

import functools
import importlib
import pkgutil
from types import ModuleType

from . import chapters
from .config import RunConfig, unknown

SCALES = ("quick", "cpu", "gpu", "paper")
PAPER_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Paper P, Sec. 2.2."""


def size(d_model: int, n_layers: int, d_head: int = 16) -> dict:
    """A model size at constant head size, as an axis value of `grid`."""
    return dict(d_model=d_model, n_layers=n_layers, n_heads=d_model // d_head)


# Sizes grow in width, depth and heads together, with the schedule's proportions of paper P (5% warm-up).
# The paper's smallest (2.4M) and largest (1.2B) size are its own; the ones between are ours, and so are bytes of C4 in
# place of its subwords.
SIZES = {
    "quick": [size(32, 2), size(64, 3)],
    "cpu": [size(32, 2), size(64, 3), size(96, 5)],
    "gpu": [size(96, 3, 32), size(192, 4, 32), size(384, 5, 64)],
    "paper": [size(256, 3, 64), size(512, 6, 64), size(768, 12, 64), size(1024, 24, 64), size(2048, 24, 64)],
}
_LENGTH = {
    "quick": dict(steps=100, warmup_steps=5, probe_every=5),
    "cpu": dict(steps=300, warmup_steps=15, probe_every=10),
    "gpu": dict(steps=5000, warmup_steps=250, probe_every=50, seq_len=256, batch_size=8, precision="bf16"),
    "paper": dict(steps=100_000, warmup_steps=5000, probe_every=500, seq_len=512, batch_size=256, precision="bf16",
                  data="c4", eval_sequences=2048),
}
# Chapters that compare many settings rather than reproduce one figure at length: shorter sequences and runs.
_SHORT = {
    "quick": dict(steps=80, warmup_steps=4, seq_len=32, probe_every=0),
    "cpu": dict(steps=200, warmup_steps=10, seq_len=32, probe_every=0),
    "gpu": dict(steps=2000, warmup_steps=100, seq_len=128, batch_size=16, precision="bf16", probe_every=0),
    "paper": _LENGTH["paper"] | dict(probe_every=0),
}
RECALL = dict(data="recall", seq_len=32, n_heads=4, init="gpt2", positions="learned", biases=True, qk_norm="none",
              clip_norm=None, z_loss=0.0, beta2=0.999, weight_decay=0.01, decay="pytorch", diverge_loss=50.0,
              diverge_grad_norm=500.0, probe_every=0)
"""GPT-2 style models on associative recall with paper K's thresholds (Sec. 3.1, 5.1, App. D.1); torch's own AdamW
settings where the paper is silent. Sequences are half as long as the paper's but at scale `paper`."""


def check_scale(scale: str) -> str:
    """`scale` itself, or `ValueError` that lists the known ones."""
    if scale not in SCALES:
        raise ValueError(unknown("scale", scale, SCALES))
    return scale


def base(scale: str) -> RunConfig:
    """Paper P's recipe at the length of `scale`."""
    return RunConfig(**_LENGTH[check_scale(scale)])


def short(scale: str) -> RunConfig:
    """Paper P's recipe, without probes, in the short runs of the chapters that compare many settings."""
    return RunConfig(**_SHORT[check_scale(scale)])


@functools.cache
def modules() -> dict[str, ModuleType]:
    """The chapters' modules by the names of their notebooks, in order."""
    found = sorted(module.name for module in pkgutil.iter_modules(chapters.__path__))
    return {name.removeprefix("c"): importlib.import_module(f"{chapters.__name__}.{name}") for name in found}


def chapter(name: str) -> ModuleType:
    """The module of a chapter by its notebook's name. Raises `ValueError` where there is none."""
    if name not in modules():
        raise ValueError(unknown("chapter", name, modules()))
    return modules()[name]


def of_chapter(name: str) -> tuple[str, ...]:
    """The names of the studies a notebook uses; none where it has no module."""
    return tuple(study.__name__ for study in modules()[name].STUDIES) if name in modules() else ()


def names() -> list[str]:
    """All studies, in the order of the chapters that first use them."""
    return list(dict.fromkeys(study for name in modules() for study in of_chapter(name)))


def configs(study: str, scale: str) -> list[RunConfig]:
    """The grid of a study by name. Raises `ValueError` for an unknown study or scale."""
    known = {found.__name__: found for module in modules().values() for found in module.STUDIES}
    if study not in known:
        raise ValueError(unknown("study", study, known))
    return known[study](check_scale(scale))
