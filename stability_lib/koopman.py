"""Residual Koopman Spectral Profile (RKSP): what each layer does to the residual stream, as a linear map's spectrum.

Paper K (Sec. 3, Alg. 1) centres a layer's input and output states X and Y, whitens both with Sigma = cov(X) + eps I,
Xt = Sigma^(-1/2) Xc, Yt = Sigma^(-1/2) Yc, and fits Yt = A Xt by A = Yt Xt^+. Its columns are rows here. Sigma^(-1/2)
commutes with the projection on the range of Xc, so whitening is a similarity transform: the eigenvalues are those of
Yc Xc^+ whatever eps is; only kappa, eta, residuals and the Kreiss constant move.

Where the states span only M < D directions (few tokens, a norm that fixes their mean) the data determine M modes. The
D - M other eigenvalues are zeros of the pseudo-inverse: they are left out everywhere, masses are shares of the M modes,
and A stands for its restriction to those directions, which has the same left eigenvectors and residuals.

Dimensions: B batch, T position, D model, N snapshots (token states), M modes, K = min(N, 2 D).
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import linalg, ndimage, optimize
from scipy.sparse.linalg import LinearOperator, eigsh
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from .config import unknown
from .stream import ProfileError, input_states, residual_layers, stream_states

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 1e-12
"""The small number in the denominators of eqs. 5 and 10, which the paper does not name."""
RHO_TOLERANCE = 1e-8
"""For the Kreiss constant a spectral radius above 1 by no more than this is 1: a rotation fitted to data has one."""
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


PAPER = Thresholds()


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
    eigenvalues: np.ndarray
    residuals: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """The layers of one forward pass in the order in which they ran."""

    layers: tuple[LayerProfile, ...]
    thresholds: Thresholds

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

    def verdict(self) -> str:
        """One line by the decision flow of Fig. 7, with its reasons and what it does not cover."""
        limits, skipped = self.thresholds, sum(layer.degenerate for layer in self.layers)
        if skipped == len(self.layers):
            return (f"not scored: all {skipped} layers are near the identity, as Fixup and ReZero start "
                    "(M1 near 1 though training is stable, App. J)")
        m1, kappa = self.risk, float(self.summary().loc["eigenvector_condition", "mean"])
        text = f"mean M1 {m1:.2f}, mean kappa {kappa:.3g}"
        if m1 > limits.high_mass or kappa > limits.large_kappa:
            text = f"high risk: {text}; use KSS for learning rates over 2x standard, without norms, for new designs"
        elif m1 < limits.go_mass and kappa <= limits.modest_kappa:
            text = f"go: {text}"
        else:
            text = f"in between: {text}; the paper's flow does not decide"
        if skipped:
            text += f"; {skipped} of {len(self.layers)} layers near the identity not scored"
        fewest = min(self.layers, key=lambda layer: layer.modes / layer.width)
        if fewest.modes < fewest.width:
            text += (f"; {fewest.snapshots} token states determine {fewest.modes} of {fewest.width} modes of "
                     f"layer {fewest.layer}")
        return text


def profile(model: nn.Module, inputs: Tensor | Mapping | tuple, *, layers: str | Sequence[nn.Module] | None = None,
            positions: str | Sequence[int] | Callable = "all", snapshots: int | None = 2048, seed: int = 0,
            rank: int | None = None, eps: float = 1e-5, cutoff: float | None = None, thresholds: Thresholds = PAPER,
            kreiss: bool | None = None) -> Profile:
    """Profile the residual stream of `model` on one forward pass in eval mode; model and RNGs stay as they were.

    Args:
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments, on the model's device. What a
            mapping's `attention_mask` [B, T] hides is left out.
        layers: the stack that writes the stream, or its name; None: see `stream.residual_layers`.
        positions: token states to use: `all`, `last` of each sequence, positions along T, or a function of `inputs`
            that returns a bool mask [B, T].
        snapshots: N, at most so many token states, drawn from `seed` with a generator of their own; None: all.
        rank, eps, cutoff, thresholds, kreiss: as in `layer_profile`.

    The stream is the first layer's input, then each layer's output, before any final norm. Layers are reduced as they
    stream by: beside the forward pass, only a few times 2 D x N numbers are alive. Raises `ProfileError`.
    """
    stack, found = residual_layers(model, layers), []
    previous = rows = leading = None

    def snapshot(h: Tensor | None) -> Tensor:
        nonlocal rows, leading
        if h is None or leading not in (None, h.shape[:-1]):
            what = "no states [..., D]" if h is None else f"states {tuple(h.shape)} after {tuple(leading)}"
            raise ProfileError(f"layer {len(found)} passes on {what}: name layers that pass the same token states on")
        if rows is None:
            leading, rows = h.shape[:-1], _choose(h, inputs, positions, snapshots, seed).to(h.device)
        return h.detach().flatten(0, -2)[rows]

    def enter(module, args, kwargs):
        nonlocal previous
        if previous is None:
            previous = snapshot(input_states(args, kwargs))

    def leave(module, args, output):
        nonlocal previous
        current = snapshot(stream_states(output))
        found.append(layer_profile(previous, current, layer=len(found), rank=rank, eps=eps, cutoff=cutoff,
                                   thresholds=thresholds, kreiss=kreiss, seed=seed))
        previous = current

    args = () if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs.setdefault("use_cache", False)  # a key-value cache would keep something of every layer alive
    with _untouched(model), contextlib.ExitStack() as hooks:
        for module in dict.fromkeys(stack):  # a shared layer is hooked once and counts each time it runs
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        model(*args, **kwargs)
    if not found:
        raise ProfileError(f"{type(model).__name__} ran none of the {len(stack)} layers: name layers that it runs")
    return Profile(tuple(found), thresholds)


def layer_profile(x_NxD: Tensor | np.ndarray, y_NxD: Tensor | np.ndarray, *, layer: int = 0, rank: int | None = None,
                  eps: float = 1e-5, cutoff: float | None = None, thresholds: Thresholds = PAPER,
                  kreiss: bool | None = None, seed: int = 0) -> LayerProfile:
    """Profile one layer from its input and output states, a token state a row.

    Args:
        rank: project X and Y on the `rank` largest directions of X first, by randomized SVD seeded with `seed`, in
            O(D N rank); exact where both lie in that many directions, else a profile of the dynamics within them.
        eps: added to the covariance, in squared units of the states; positive.
        cutoff: singular values of centred X up to this are rounding; None: what rounding in the states' own dtype can
            make of them, 4 ulp ||X||_F (1/sqrt(N) + 1/sqrt(D)), and in the arithmetic here, 64 ulp ||X||_F of float64.
        kreiss: search the Kreiss constants; None: up to 256 modes (at 768 it takes longer than all the rest). Without,
            `kreiss` is still infinite where rho > 1, and NaN elsewhere.

    Raises `ProfileError` for states that are not finite, too few, without variance or of unequal shape.
    """
    if eps <= 0 or (rank is not None and rank < 1):
        raise ProfileError(f"eps must be positive and rank at least 1, got {eps} and {rank}: the paper's eps is 1e-5")
    x, y, cutoff = _states(x_NxD, y_NxD, layer, cutoff)
    update_size = float((y - x).norm() / x.norm())
    n, width = x.shape
    x, y = x - x.mean(0), y - y.mean(0)
    if rank is not None and rank < min(n, width):
        basis_DxM = _leading_directions(x, rank, seed)
        x, y = x @ basis_DxM, y @ basis_DxM

    x_KxD, y_KxD = _compress(x, y)
    p_KxM, s, w_DxD, modes = _factor(x_KxD, cutoff, layer)
    variance = torch.zeros_like(w_DxD[0])
    variance[: len(s)] = s.square() / (n - 1)
    whiten = (variance + eps).rsqrt()
    # Xt and Yt in the eigenbasis W of Sigma and the basis Q of _compress: rotations, which no number below notices
    xt_DxK, yt_DxK = (whiten[:, None] * (w_DxD @ states_KxD.T) for states_KxD in (x_KxD, y_KxD))
    update = float((yt_DxK - xt_DxK).norm())
    degenerate = update <= thresholds.identity * float(xt_DxK.norm())
    gain = (whiten[: len(s)] * s)[:modes]
    fitted_DxM = yt_DxK @ p_KxM
    a_MxM = (fitted_DxM[:modes] / gain).cpu().numpy()
    misfit_DxK = yt_DxK - fitted_DxM @ p_KxM.T  # Yt - A Xt

    with _blas().limit(limits=1, user_api="blas"):  # the threads of numpy's and torch's own only wait for each other
        values, left_MxM, kappa = _eigen(a_MxM)
        # u_j^* (Yt - lambda_j Xt) = u_j^* (Yt - A Xt): no cancellation as between Gram matrices, which squares errors
        off = _row_norms(left_MxM @ misfit_DxK[:modes].cpu().numpy(), values)
    residuals = off / (_row_norms(left_MxM * gain.cpu().numpy(), values) + SMALL)
    size = np.abs(values)
    rho, order = float(size.max()), np.lexsort((-values.imag, -size))
    near = (thresholds.near_low <= size) & (size <= thresholds.near_high)
    expansive, contractive = size > thresholds.near_high, size < thresholds.contractive
    search = modes <= 256 if kreiss is None else kreiss
    scaled = kreiss_constant(a_MxM / max(1.0, rho)) if search else math.nan
    return LayerProfile(
        layer=layer, width=width, snapshots=n, modes=modes, near_unit_mass=float(near.mean()),
        expansive_mass=float(expansive.mean()), contractive_mass=float(contractive.mean()),
        mid_mass=float((~(near | expansive | contractive)).mean()), spectral_radius=rho, eigenvector_condition=kappa,
        nonlinearity=math.nan if degenerate else float(misfit_DxK.norm()) / (update + SMALL),
        kreiss=math.inf if rho > 1 + RHO_TOLERANCE else scaled, kreiss_scaled=scaled,
        reliable_share=float((residuals <= thresholds.residual).mean()), update_size=update_size,
        degenerate=degenerate, eigenvalues=values[order], residuals=residuals[order])


def eigenvalues(x_NxD: Tensor | np.ndarray, y_NxD: Tensor | np.ndarray, *, cutoff: float | None = None) -> np.ndarray:
    """The eigenvalues of A alone, complex [M], largest modulus first, without whitening, which does not change them.

    `cutoff` and errors as in `layer_profile`.
    """
    x, y, cutoff = _states(x_NxD, y_NxD, 0, cutoff)
    x, y = x - x.mean(0), y - y.mean(0)
    a_MxM = _normal_equations(x.cpu().numpy(), y.cpu().numpy(), cutoff)
    if a_MxM is None:
        x_KxD, y_KxD = _compress(x, y)
        p_KxM, s, w_DxD, modes = _factor(x_KxD, cutoff, 0)
        a_MxM = (p_KxM.T @ y_KxD @ w_DxD[:modes].T / s[:modes, None]).cpu().numpy()
    values = np.linalg.eigvals(a_MxM).astype(complex)
    return values[np.lexsort((-values.imag, -np.abs(values)))]


def kreiss_constant(a_MxM: np.ndarray) -> float:
    """K(A) = sup over |z| > 1 of (|z| - 1) ||(zI - A)^-1|| (eq. 29), with 1 <= K(A) <= sup_n ||A^n|| <= e M K(A).

    Infinite where the spectral radius is above 1; A / rho has a finite one there. 1 where ||A|| <= 1. Else a grid, even
    in angle and in log(|z| - 1) plus the angles of the 32 largest eigenvalues, is ranked on the Schur form and its five
    highest peaks are climbed, each to 1e-6 relative: a lower bound where the grid misses a higher one. |z| - 1 goes
    from 1e-6, where a defective eigenvalue on the circle gives 1e5 or more for infinity, to 1000 ||A||; from there
    on the function is below 1.001.
    """
    a_MxM = np.asarray(a_MxM)
    schur = linalg.rsf2csf(*linalg.schur(a_MxM))[0]
    values, norm, m = schur.diagonal().copy(), np.linalg.norm(a_MxM, 2), len(schur)
    if np.abs(values).max() > 1 + RHO_TOLERANCE:
        return math.inf
    if norm <= 1 + 1e-12:
        return 1.0
    shifted = np.asfortranarray(-schur)  # zI - T, its diagonal set for each z
    start = np.random.default_rng(0).normal(size=(m, 2)) @ [1, 1j]

    def shift(angle: float, distance: float) -> complex:
        turn = complex(math.cos(angle), math.sin(angle))
        np.fill_diagonal(shifted, (1 + distance) * turn - values)
        return turn

    def solve(v: np.ndarray, adjoint: bool = False) -> np.ndarray:
        return linalg.lapack.ztrtrs(shifted, v, trans=2 * adjoint)[0]

    def rank(angle: float, log: float) -> float:
        """A lower bound of log (|z| - 1) ||(zI - T)^-1||, by three power steps."""
        shift(angle, math.exp(log))
        v = start
        for _ in range(3):
            v = solve(solve(v / np.linalg.norm(v)), adjoint=True)
        return log + math.log(np.linalg.norm(v)) / 2

    def height(point: np.ndarray) -> tuple[float, np.ndarray]:
        """-log (|z| - 1) ||(zI - T)^-1|| and its gradient, from the largest singular pair of the resolvent."""
        distance = math.exp(point[1])
        turn = shift(point[0], distance)
        if m <= 32:
            v = np.linalg.svd(shifted)[0][:, -1]
        else:
            gram = LinearOperator((m, m), lambda v: solve(solve(v), adjoint=True), dtype=complex)
            v = eigsh(gram, k=1, v0=start, tol=1e-10)[1][:, 0]
        u = solve(v)
        slope = np.vdot(v, u) * turn
        return (-math.log(distance * np.linalg.norm(u)),
                np.array([-((1 + distance) * slope).imag, distance * slope.real - 1]))

    half = 1 if np.isrealobj(a_MxM) else 2  # the resolvent norm of a real matrix is even in the angle
    largest = np.angle(values[np.argsort(-np.abs(values))[: 32 * half]])
    angles = np.unique([*np.linspace(0, half * math.pi, 24 * half + 1), *(abs(largest) if half == 1 else largest)])
    logs = np.linspace(math.log(1e-6), math.log(1e3 * norm), 16)
    grid = np.array([[rank(angle, log) for log in logs] for angle in angles])
    peaks = np.argwhere(grid == ndimage.maximum_filter(grid, 3, mode="nearest"))
    best = 1.0
    for i, j in sorted(peaks, key=lambda peak: -grid[tuple(peak)])[:5]:
        # a step off the real axis, where the slope across it is zero by symmetry also at a saddle
        top = optimize.minimize(height, (angles[i] + min(math.exp(logs[j]), 0.2) / 10, logs[j]), jac=True,
                                method="L-BFGS-B", bounds=((None, None), (logs[0], logs[-1])),
                                options={"ftol": 1e-13, "gtol": 1e-8})
        best = max(best, math.exp(-top.fun))
    return best


def draw_eigenvalues(ax: "Axes", profile: Profile) -> "Axes":
    """Every layer's eigenvalues in the complex plane, darker with depth, and the unit circle (paper K, Fig. 1)."""
    from matplotlib.cm import ScalarMappable  # drawing libraries take seconds to import: not in training processes
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator
    from seaborn import color_palette

    hue = ScalarMappable(Normalize(0, max(len(profile.layers) - 1, 1)), color_palette("crest", as_cmap=True))
    circle = np.exp(1j * np.linspace(0, math.tau, 361))
    ax.plot(circle.real, circle.imag, color="0.3", linewidth=1)
    for layer in profile.layers:
        ax.scatter(layer.eigenvalues.real, layer.eigenvalues.imag, s=8, alpha=0.6, linewidths=0,
                   color=hue.to_rgba(layer.layer))
    ax.figure.colorbar(hue, ax=ax, label="layer", ticks=MaxNLocator(integer=True))
    ax.set(xlabel="real part", ylabel="imaginary part", aspect="equal")
    return ax


def draw_depth(ax: "Axes", profile: Profile, *metrics: str) -> "Axes":
    """Metrics, columns of `table` (none named: M1, M>1, M<1), against depth; hollow where a layer is degenerate."""
    from seaborn import color_palette

    table = profile.table()
    metrics = metrics or ("near_unit_mass", "expansive_mass", "contractive_mass")
    for metric, colour in zip(metrics, color_palette("deep", len(metrics)), strict=True):
        ax.plot(table["layer"], table[metric], color=colour, label=metric.replace("_", " "))
        ax.scatter(table["layer"], table[metric], s=30, edgecolors=[colour], zorder=3,
                   facecolors=["none" if hollow else colour for hollow in table["degenerate"]])
    ax.set(xlabel="layer")
    ax.legend(frameon=False)
    return ax


def _states(x, y, layer: int, cutoff: float | None) -> tuple[Tensor, Tensor, float]:
    """The states in float64 on their own device (MPS has none: on the CPU), and the cutoff."""
    x, y = torch.as_tensor(x).detach(), torch.as_tensor(y).detach()
    if x.ndim != 2 or x.shape != y.shape:
        raise ProfileError(f"layer {layer} takes states {tuple(x.shape)} to {tuple(y.shape)}: name layers that keep "
                           "the stream's width, and pass states [N, D]")
    ulp = torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps
    x, y = (states.to("cpu" if states.device.type == "mps" else states.device).double() for states in (x, y))
    for name, states in (("input", x), ("output", y)):
        if not states.sum().isfinite() and (broken := int((~states.isfinite()).any(1).sum())):
            raise ProfileError(f"the {name} of layer {layer} is not finite in {broken} of {len(states)} token states: "
                               "profile the model before it diverges, or in higher precision")
    if len(x) < 2:
        raise ProfileError(f"layer {layer} has {len(x)} token states, too few for a covariance: pass more inputs or "
                           f"positions, preferably several times the width {x.shape[1]}")
    if cutoff is None:
        here = 64 * torch.finfo(torch.float64).eps
        cutoff = float(x.norm()) * (4 * ulp * (len(x) ** -0.5 + x.shape[1] ** -0.5) + here)
    return x, y, cutoff


def _normal_equations(x_NxD: np.ndarray, y_NxD: np.ndarray, cutoff: float) -> np.ndarray | None:
    """The least-squares solution of X A = Y; None where the SVD is needed: near the cutoff, or badly conditioned."""
    gram_DxD, cross_DxD = x_NxD.T @ x_NxD, x_NxD.T @ y_NxD
    probe_Dx10 = np.random.default_rng(0).normal(size=(len(gram_DxD), 10))
    try:
        solved = np.linalg.solve(gram_DxD, np.hstack([cross_DxD, probe_Dx10]))
    except np.linalg.LinAlgError:
        return None
    # of ten Gaussian vectors one has, all but surely, a component of a tenth along what the inverse stretches most, so
    # this is at least its norm, 1 / (smallest singular value of X)^2
    size = 10 * np.linalg.norm(solved[:, -10:], axis=0).max()
    condition = size * np.linalg.norm(gram_DxD, 1)
    if not (condition < 1e9 and size**-0.5 > cutoff):
        return None
    a_DxD = solved[:, :-10]  # its relative error is about 1e-16 times the condition
    if condition > 1e5:
        a_DxD = a_DxD + np.linalg.solve(gram_DxD, x_NxD.T @ (y_NxD - x_NxD @ a_DxD))
    return a_DxD


def _compress(x_NxD: Tensor, y_NxD: Tensor) -> tuple[Tensor, Tensor]:
    """The factors in X = Q x, Y = Q y, [K, D] each, Q orthonormal and never formed. N plays no part afterwards."""
    return torch.linalg.qr(torch.cat([x_NxD, y_NxD], 1), mode="r")[1].tensor_split(2, dim=1)


def _factor(x_KxD: Tensor, cutoff: float, layer: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The SVD x = P s W, P cut to M and W complete, and the number M of singular values above `cutoff`."""
    k, width = x_KxD.shape
    p, s, w_DxD = torch.linalg.svd(x_KxD[:width])  # the rows below are zero
    modes = int((s > cutoff).sum())
    if not modes:
        raise ProfileError(f"the input of layer {layer} does not vary over its token states: use more varied inputs")
    return nn.functional.pad(p[:, :modes], (0, 0, 0, k - len(p))), s, w_DxD, modes


def _leading_directions(x_NxD: Tensor, rank: int, seed: int) -> Tensor:
    """Orthonormal [D, rank] basis of the largest directions of X: randomized SVD, 10 vectors over, 2 power steps."""
    sketch = torch.randn(x_NxD.shape[1], min(rank + 10, *x_NxD.shape), dtype=x_NxD.dtype,
                         generator=torch.Generator().manual_seed(seed)).to(x_NxD.device)
    for _ in range(3):
        sketch = torch.linalg.qr(x_NxD.T @ torch.linalg.qr(x_NxD @ sketch)[0])[0]
    return sketch @ torch.linalg.svd(x_NxD @ sketch, full_matrices=False)[2].T[:, :rank]


@functools.cache
def _blas() -> ThreadpoolController:
    """Of the libraries loaded by now; made once, as finding them takes longer than an eigenvalue."""
    return ThreadpoolController()


def _eigen(a_MxM: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Eigenvalues, left eigenvectors in rows as LAPACK packs them (a pair: real part, imaginary part), and kappa(V)."""
    real, imaginary, left, right, info = linalg.lapack.dgeev(a_MxM)
    if info:
        raise ProfileError(f"the eigenvalues of a layer's A did not converge (LAPACK dgeev {info}): check its states")
    # a pair [v, conj v] is sqrt(2) [Re v, Im v] times a unitary matrix: real columns have the singular values of V
    sizes = np.linalg.svd(right * np.where(imaginary, math.sqrt(2), 1), compute_uv=False)
    return real + 1j * imaginary, left.T, float(sizes[0] / sizes[-1]) if sizes[-1] else math.inf


def _row_norms(packed_MxK: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Norms of complex rows packed as by `_eigen`."""
    squares, first = np.square(packed_MxK).sum(1), np.flatnonzero(values.imag > 0)
    squares[first] = squares[first + 1] = squares[first] + squares[first + 1]
    return np.sqrt(squares)


def _choose(h: Tensor, inputs, positions, snapshots: int | None, seed: int) -> Tensor:
    """Indices of the token states to use among the flattened leading dimensions of h [B, T, D]."""
    shape = h.shape[:-1]
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    keep = mask.bool().cpu() if mask is not None and mask.shape == shape else torch.ones(shape, dtype=torch.bool)
    if callable(positions):
        chosen = torch.as_tensor(positions(inputs)).cpu()
        if chosen.dtype != torch.bool or chosen.shape != shape:
            raise ProfileError(f"positions(inputs) must be a bool mask {tuple(shape)}, got {chosen.dtype} "
                               f"{tuple(chosen.shape)}: mark the token states to use")
    elif positions == "last":
        chosen = keep.flip(-1).cumsum(-1).flip(-1) == 1
    elif positions == "all":
        chosen = keep
    elif isinstance(positions, str):
        raise ProfileError(unknown("positions", positions, ("all", "last", "a list", "a function")))
    else:
        if not all(-shape[-1] <= i < shape[-1] for i in positions):
            raise ProfileError(f"positions {list(positions)} are not all within a sequence of {shape[-1]}: choose from "
                               f"{-shape[-1]} to {shape[-1] - 1}")
        chosen = torch.zeros_like(keep)
        chosen[..., list(positions)] = True
    keep = keep & chosen
    rows = keep.flatten().nonzero().squeeze(1)
    if snapshots is not None and len(rows) > snapshots:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = rows[order[:snapshots].sort().values]
    return rows


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards training flags, buffers and random states are what they were."""
    training = {module: module.training for module in model.modules()}
    buffers = [(module, name, buffer, buffer.clone()) for module in model.modules()
               for name, buffer in module._buffers.items() if buffer is not None]
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices), device_type=kind):
        try:
            yield model.eval()
        finally:
            for module, flag in training.items():
                module.training = flag
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
