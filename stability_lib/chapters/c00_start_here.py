"""Chapter 00, a tour: one model at a high learning rate, without and with qk-norm. It makes no claims."""

from ..config import RunConfig, grid
from ..studies import SIZES, base


def first_look(scale: str) -> list[RunConfig]:
    """The smallest model at a high learning rate, without and with qk-norm."""
    return grid(base(scale), size=SIZES[scale][:1], qk_norm=["none", "head"], lr=[1e-2, 3e-1], seed=[0])


STUDIES = (first_look,)
