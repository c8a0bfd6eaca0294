"""What a spectral profile is: a layer's numbers, the paper's verdict on a model, its table, file and figure.

Dimensions: D model, N snapshots (token states), M modes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .stream import ProfileError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = ("near_unit_mass", "expansive_mass", "contractive_mass", "mid_mass", "spectral_radius",
           "eigenvector_condition", "nonlinearity", "kreiss", "kreiss_scaled", "reliable_share", "update_size")
"""What Alg. 1 aggregates over layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where modes are counted (Alg. 1), unreliable (eq. 10) or degenerate (App. J), and how Fig. 7 decides.

    Ours, as the paper gives no number: `identity`, the relative size of Yt - Xt that counts as vanishing, and the two
    kappas (stable Pre-LN models at initialisation have hundreds to thousands, more with width).
    """

    near_low: float = 0.90
    near_high: float = 1.05
    contractive: float = 0.80
    residual: float = 0.1
    identity: float = 1e-3
    go_mass: float = 0.3
    high_mass: float = 0.5
    modest_kappa: float = 1e4
    large_kappa: float = 1e6

    def __post_init__(self):
        if any(math.isnan(value) for value in vars(self).values()):
            raise ProfileError(f"{self} holds a NaN: every threshold is a number")
        if not self.contractive <= self.near_low <= self.near_high:
            raise ProfileError(f"contractive {self.contractive}, near_low {self.near_low} and near_high "
                               f"{self.near_high} must not fall: a mode would be counted twice")


PAPER = Thresholds()
FLOW_RECORD = {"high risk": ((15, 72), (6, 18)), "in between": ((0, 36), (0, 9)), "go": ((0, 144), (6, 36))}
"""Chapter 04 at learning rates up to 0.03: by the verdict on the untrained model, how many runs diverged, of how many,
in its sweep and of its architectures outside of it. A test counts them again."""
STATES_PER_MODE = 4
"""In-sample eta is about sqrt(1 - M/N) of what states not seen would show: 0.87 at N = 4 M."""


def flow(m1: float, kappa: float, limits: Thresholds = PAPER) -> str:
    """The decision flow of paper K's Fig. 7 on mean M1 and mean kappa: `high risk`, `go`, or, where it does not decide,
    `in between`."""
    if m1 > limits.high_mass or kappa > limits.large_kappa:
        return "high risk"
    return "go" if m1 < limits.go_mass and kappa <= limits.modest_kappa else "in between"


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProfile:
    """One layer's A over the `modes` directions that the data determine.

    `eigenvalues` (complex, largest modulus first) and their ResDMD `residuals` r_j (eq. 10) are [M]; the four masses
    sum to one. `eigenvector_condition` is kappa; `nonlinearity` eta in [0, 1] (eq. 5), where what leaves the span of X
    weighs eps^(-1/2); `kreiss` K(A) (eq. 29), infinite where `spectral_radius` > 1; `kreiss_scaled`
    K(A / max(1, rho)), finite there too: growth beyond rho^n; `reliable_share` the share of r_j up to 0.1;
    `update_size` ||Y - X||_F / ||X||_F, not centred. eta and residuals are in-sample: with N <= M + 1 both are 0.
    A `degenerate` layer leaves all its states as they are (App. J): its masses are no score and its eta is NaN.
    """

    layer: int
    width: int
    snapshots: int
    modes: int
    near_unit_mass: float
    expansive_mass: float
    contractive_mass: float
    mid_mass: float
    spectral_radius: float
    eigenvector_condition: float
    nonlinearity: float
    kreiss: float
    kreiss_scaled: float
    reliable_share: float
    update_size: float
    degenerate: bool
    eigenvalues: np.ndarray = dataclasses.field(repr=False)
    residuals: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """The layers of one forward pass in the order in which they ran, and the `rank` that they were projected on."""

    layers: tuple[LayerProfile, ...]
    thresholds: Thresholds
    rank: int | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"Profile({len(self)} layers, mean M1 {self.risk:.2f})"

    def table(self) -> pd.DataFrame:
        """One row per layer with every number of `LayerProfile`."""
        names = [f.name for f in dataclasses.fields(LayerProfile) if f.name not in ("eigenvalues", "residuals")]
        return pd.DataFrame([{name: getattr(layer, name) for name in names} for layer in self.layers])

    def summary(self) -> pd.DataFrame:
        """Mean, max, min and (population) std of each metric over the layers that are not degenerate (Alg. 1)."""
        table = self.table()
        values = table.loc[~table["degenerate"], list(METRICS)]
        with np.errstate(invalid="ignore"):  # the std of an infinite Kreiss constant is NaN
            std = values.std(ddof=0)
        return pd.DataFrame({"mean": values.mean(), "max": values.max(), "min": values.min(), "std": std})

    @property
    def risk(self) -> float:
        """The risk score, mean M1 (Alg. 1); NaN where all layers are degenerate."""
        return float(self.summary().loc["near_unit_mass", "mean"])

    @property
    def states_wanted(self) -> int:
        """How many token states the profile should have: four times the modes that width and rank admit."""
        return STATES_PER_MODE * min(max(layer.width for layer in self.layers), self.rank or math.inf)

    @property
    def fitted_exactly(self) -> LayerProfile | None:
        """The first layer whose states are no more than its modes fit exactly, N <= M + 1, whatever it does."""
        return next((layer for layer in self.layers if layer.snapshots <= layer.modes + 1), None)

    def verdict(self) -> str:
        """The decision flow of Fig. 7 in a line, with its reasons, what it does not cover and what it depends on; a
        second line says how many runs of chapter 04 with that verdict diverged."""
        skipped = sum(layer.degenerate for layer in self.layers)
        if skipped == len(self):
            return (f"not scored: all {skipped} layers are near the identity, as Fixup and ReZero start "
                    "(M1 near 1 though training is stable, App. J)")
        m1, kappa = self.risk, float(self.summary().loc["eigenvector_condition", "mean"])
        word = flow(m1, kappa, self.thresholds)
        advice = {"go": "", "in between": "; the paper's flow does not decide",
                  "high risk": "; the paper advises KSS for learning rates over 2x standard, without norms, "
                               "for new designs, where norms or weight norm did as well (chapter 10)"}[word]
        if skipped:
            advice += f"; {skipped} of {len(self)} layers near the identity not scored"
        (failed, runs), (failed_outside, runs_outside) = FLOW_RECORD[word]
        return (f"{word}: mean M1 {m1:.3f}, mean kappa {kappa:.3g}{advice}{self._reach()}; the flow is meant for "
                f"models at initialization\n"
                f"chapter 04, LR up to 0.03: {failed} of {runs} such runs diverged, outside its sweep {failed_outside} "
                f"of {runs_outside}")

    def _reach(self) -> str:
        """Which modes the numbers are of, where not of all, and whether they were fitted without a remainder."""
        text, fewest = "", min(self.layers, key=lambda layer: layer.modes / layer.width)
        if fewest.modes == self.rank < fewest.width:
            text = (f"; rank={self.rank} keeps {fewest.modes} of {fewest.width} modes, those of the largest states, "
                    "and the verdict depends on it")
        elif fewest.modes < fewest.width:
            text = (f"; {fewest.snapshots} token states determine {fewest.modes} of {fewest.width} modes of "
                    f"layer {fewest.layer}")
        exact = self.fitted_exactly
        thin = min(self.layers, key=lambda layer: layer.snapshots / layer.modes)
        if exact:
            text += (f"; warning: {exact.snapshots} token states are fitted exactly by {exact.modes} modes, "
                     "whatever the layer does (eta and residuals 0, kappa without meaning): use "
                     f"{self.states_wanted} token states or more, in several batches")
        elif thin.snapshots < STATES_PER_MODE / 2 * thin.modes:
            text += (f"; {thin.snapshots} token states are few for {thin.modes} modes, eta and residuals look smaller "
                     f"than they are: better {self.states_wanted}")
        return text

    def plot(self) -> "Figure":
        """A figure: the eigenvalues of all layers, and M1, M>1 and M<1 against depth."""
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
        draw_eigenvalues(left, self)
        draw_depth(right, self).set(ylabel="share of modes", ylim=(-0.03, 1.03))
        plt.close(figure)  # a notebook shows what a cell returns, and would show an open figure once more
        return figure

    def to_dict(self) -> dict:
        """All of it in lists, numbers and strings; not finite numbers as "inf", "-inf" and "nan", which JSON lacks."""
        return {"rank": self.rank, "thresholds": _plain(vars(self.thresholds)),
                "layers": [_plain(vars(layer)) for layer in self.layers]}

    @staticmethod
    def from_dict(values: Mapping) -> "Profile":
        """The inverse of `to_dict`. Raises `ProfileError` for what it did not make."""
        try:
            layers = tuple(LayerProfile(**{field.name: _restored(layer[field.name], field.type)
                                           for field in dataclasses.fields(LayerProfile)})
                           for layer in values["layers"])
            thresholds = Thresholds(**{name: float(value) for name, value in values["thresholds"].items()})
            return Profile(layers, thresholds, values["rank"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"not a profile as to_dict makes it ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path, **about) -> None:
        """Write it as JSON, with what else `about` says beside it; numbers come back exactly. An older file stays until
        the new one is whole."""
        write_whole(path, json.dumps(self.to_dict() | about, allow_nan=False))

    @staticmethod
    def load(path: str | Path) -> "Profile":
        """What `save` wrote. Raises `ProfileError` for another file."""
        try:
            return Profile.from_dict(json.loads(Path(path).read_text()))
        except ValueError as error:  # ProfileError, no JSON, no text
            raise ProfileError(f"{path} holds no profile: {error}") from error


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file so that nobody finds half of it."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _plain(value):
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in ([value.real, value.imag] if np.iscomplexobj(value) else value.tolist())]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value, kind: type):
    if kind is not np.ndarray:
        return kind(value)
    numbers = np.array(value, dtype=float)  # of eigenvalues the real and the imaginary parts
    return np.ascontiguousarray(numbers.T).view(complex)[:, 0] if numbers.ndim == 2 else numbers


def draw_eigenvalues(ax: "Axes", profile: Profile, bar: bool = True) -> "Axes":
    """Every layer's eigenvalues in the complex plane, darker with depth, the unit circle and, shaded, the ring of M1
    (paper K, Fig. 1); `bar`: with a bar of colours for the layers."""
    from matplotlib.cm import ScalarMappable  # drawing libraries take seconds to import: not in training processes
    from matplotlib.colors import Normalize
    from matplotlib.patches import Wedge
    from matplotlib.ticker import MaxNLocator
    from seaborn import color_palette

    hue = ScalarMappable(Normalize(0, max(len(profile.layers) - 1, 1)), color_palette("crest", as_cmap=True))
    low, high = profile.thresholds.near_low, profile.thresholds.near_high
    ax.add_patch(Wedge((0, 0), high, 0, 360, width=high - low, color="0.88", zorder=0))
    circle = np.exp(1j * np.linspace(0, math.tau, 361))
    ax.plot(circle.real, circle.imag, color="0.3", linewidth=1)
    for layer in profile.layers:
        ax.scatter(layer.eigenvalues.real, layer.eigenvalues.imag, s=8, alpha=0.6, linewidths=0,
                   color=hue.to_rgba(layer.layer))
    if bar:
        ax.figure.colorbar(hue, ax=ax, label="layer", ticks=MaxNLocator(integer=True))
    ax.set(xlabel="real part", ylabel="imaginary part", aspect="equal")
    return ax


def draw_depth(ax: "Axes", profile: Profile, *metrics: str) -> "Axes":
    """Metrics, columns of `table` (none named: M1, M>1, M<1), against depth; hollow where a layer is degenerate."""
    from matplotlib.ticker import MaxNLocator
    from seaborn import color_palette

    from .plotting import MARKERS

    table = profile.table()
    metrics = metrics or ("near_unit_mass", "expansive_mass", "contractive_mass")
    for metric, colour, marker in zip(metrics, color_palette("deep", len(metrics)), cycle(MARKERS), strict=False):
        ax.plot(table["layer"], table[metric], marker + "-", color=colour, label=metric.replace("_", " "))
        for hollow in table[table["degenerate"]].to_dict("records"):
            ax.plot(hollow["layer"], hollow[metric], marker, color=colour, mfc="white")
    ax.set(xlabel="layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    return ax
