"""Residual Koopman Spectral Profile (RKSP): what each layer does to the residual stream, as a linear map's spectrum.

Paper K (Sec. 3, Alg. 1) centres a layer's input and output states X and Y, whitens both with Sigma = cov(X) + eps I,
Xt = Sigma^(-1/2) Xc, Yt = Sigma^(-1/2) Yc, and fits Yt = A Xt by A = Yt Xt^+. Its columns are rows here. Sigma^(-1/2)
commutes with the projection on the range of Xc, so whitening is a similarity transform: the eigenvalues are those of
Yc Xc^+ whatever eps is; only kappa, eta, residuals and the Kreiss constant move.

Where the states span only M < D directions (few tokens, a norm that fixes their mean) the data determine M modes. The
D - M other eigenvalues are zeros of the pseudo-inverse: they are left out everywhere, masses are shares of the M modes,
and A stands for its restriction to those directions, which has the same left eigenvectors and residuals.

Dimensions: B batch, T position, D model, N snapshots (token states), M modes, K = min(N, 2 D), R = min(N, D).
"""

import contextlib
import functools
import inspect
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from . import lapack
from .config import unknown
from .kreiss import RHO_TOLERANCE, kreiss_constant
from .profiles import (  # noqa: F401
    METRICS,
    PAPER,
    STATES_PER_MODE,
    LayerProfile,
    Profile,
    Thresholds,
    draw_depth,
    draw_eigenvalues,
)
from .stream import (
    ProfileError,
    features_last,
    input_states,
    residual_layers,
    stream_states,
    token_mask,
    untouched,
    unwrapped,
)

SMALL = 1e-12
"""The small number in the denominators of eqs. 5 and 10, which the paper does not name."""
AT_ONCE = 2e9
"""Bytes that layers analysed side by side may take together, at 16 float64 arrays [N, D] each: two layers of
D = 768 by N = 2048 take 0.4 GB, one of D = 4096 is analysed alone."""


def profile(model: nn.Module, inputs: Tensor | Mapping | tuple | Iterable, *,
            layers: str | Sequence[nn.Module] | None = None, positions: str | Sequence[int] | Callable = "all",
            snapshots: int | None = 2048, seed: int = 0, rank: int | None = None, eps: float = 1e-5,
            cutoff: float | None = None, thresholds: Thresholds = PAPER, kreiss: bool | None = None,
            channel_dim: int | None = None, device: torch.device | str | None = None, progress: bool = False,
            kept: MutableMapping[int, LayerProfile] | None = None, allow_exact: bool = True) -> Profile:
    """Profile the residual stream of `model` on a forward pass in eval mode; model and RNGs stay as they were.

    Args:
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or several such batches, as a list or
            a `DataLoader`, of which as many are run as it takes to have N token states.
        layers: the stack that writes the stream, or its name; None: see `stream.residual_layers`.
        positions: token states to use: `all`, `last` of each sequence, positions along T, or a function of `inputs`
            that returns a bool mask [B, T]. What the call's masks hide (`stream.token_mask`) is left out.
        snapshots: N, at most so many token states, drawn from `seed` with a generator of their own; None: all.
        rank, eps, cutoff, thresholds, kreiss, device: as in `layer_profile`.
        channel_dim: which dimension of the states is D, where it is not the last: 1 for [B, C, H, W].
        progress: show a bar, but under the batch runner.
        kept: finished layers by their number, which are not analysed again, and into which others are put as they come.
        allow_exact: whether N <= M + 1 token states, which M modes fit exactly, are profiled, with a warning in the
            verdict, or an error.

    A layer's X is what it is called with, its Y the stream in its output, before any final norm. Compiled models run
    eagerly. Layers are reduced as they stream by, on a CPU as many at once as torch has threads and `AT_ONCE` allows:
    beside the forward pass, only a few times 2 D x N numbers of each are alive; with several batches, the 2 D x N of
    every layer. Raises `ProfileError`.
    """
    _whole("snapshots", snapshots, 2)
    if not isinstance(thresholds, Thresholds):
        raise ProfileError(f"thresholds must be Thresholds, got {thresholds!r}: leave it out for the paper's")
    _whole("seed", seed, 0)
    stack = residual_layers(model, layers)
    choose = functools.partial(_choose, positions=positions, seed=seed)
    watch = functools.partial(_watch, unwrapped(model), stack, channel_dim=channel_dim, side_by_side=layers is not None)
    analyse = functools.partial(layer_profile, rank=rank, eps=eps, cutoff=cutoff, device=device, thresholds=thresholds,
                                kreiss=kreiss, seed=seed)
    found, kept, waiting = [], {} if kept is None else kept, {}
    with _bar(len(stack), progress) as bar:
        def reduce(x: Tensor, y: Tensor) -> None:
            if not allow_exact:
                _check_enough(*x.shape, rank)
            if (layer := len(found)) not in kept:
                waiting[layer] = functools.partial(analyse, x, y, layer=layer)
            found.append(layer)
            if len(waiting) >= _at_once(x.numel(), x.device, device or x.device):
                finish()

        def finish() -> None:
            for layer, result in zip([*waiting], lapack.at_once([*waiting.values()]), strict=True):
                kept[layer] = result
            waiting.clear()
            bar.update(len(found) - bar.n)

        if isinstance(inputs, (Tensor, Mapping, tuple)):
            watch(inputs, functools.partial(choose, snapshots=snapshots), lambda _, x, y: reduce(x, y))
        else:
            for pairs in _gather(watch, inputs, choose, snapshots):
                reduce(*(torch.cat(states) for states in zip(*pairs, strict=True)))
        finish()
    return Profile(tuple(kept[layer] for layer in found), thresholds, rank)


def profile_checkpoint(path, prompts=None, **settings) -> Profile:
    """`checkpoint.profile`: of a model on disk, of any size, a layer at a time."""
    from .checkpoint import profile as of_checkpoint  # needs the extra `pretrained`

    return of_checkpoint(path, prompts, **settings)


def layer_profile(x_NxD: Tensor | np.ndarray, y_NxD: Tensor | np.ndarray, *, layer: int = 0, rank: int | None = None,
                  eps: float = 1e-5, cutoff: float | None = None, thresholds: Thresholds = PAPER,
                  kreiss: bool | None = None, seed: int = 0,
                  device: torch.device | str | None = None) -> LayerProfile:
    """Profile one layer from its input and output states, a token state a row.

    Args:
        rank: project X and Y on the `rank` largest directions of X first, by randomized SVD seeded with `seed`, in
            O(D N rank); exact where both lie in that many directions, else a profile of the dynamics within them.
        eps: added to the covariance, in squared units of the states; positive.
        cutoff: singular values of centred X up to this are rounding; None: what rounding in the states' own dtype can
            make of them, 4 ulp ||X||_F (1/sqrt(N) + 1/sqrt(D)), and in the arithmetic here, 64 ulp ||X||_F of float64.
        kreiss: search the Kreiss constants; None: up to 256 modes (at 768 it takes longer than all the rest). Without,
            `kreiss` is still infinite where rho > 1, and NaN elsewhere.
        device: where states are factored, in float64; None: where they are, but on the CPU for MPS, which has none. The
            eigenvalues are always LAPACK's, on the CPU.

    Raises `ProfileError` for states that are not finite, too few, without variance or of unequal shape.
    """
    _whole("rank", rank, 1)
    if not 0 < eps < math.inf:
        raise ProfileError(f"eps must be positive and finite, got {eps}: the paper's eps is 1e-5")
    x, y, cutoff = _states(x_NxD, y_NxD, layer, cutoff, device)
    update_size = float((y - x).norm() / x.norm())
    n, width = x.shape
    x, y = x - x.mean(0), y - y.mean(0)
    if rank is not None and rank < min(n, width):
        basis_DxM = _leading_directions(x, rank, seed, cutoff)
        x, y = x @ basis_DxM, y @ basis_DxM

    x_KxD, y_KxD = _compress(x, y)
    p_KxM, s, w_RxD, modes = _factor(x_KxD, cutoff, layer)
    whiten = (s.square() / (n - 1) + eps).rsqrt()
    # Xt and Yt in the eigenbasis W of Sigma and the basis Q of _compress: rotations, which no number below notices
    xt_RxK, yt_RxK = (whiten[:, None] * (w_RxD @ states_KxD.T) for states_KxD in (x_KxD, y_KxD))
    fitted_RxM = yt_RxK @ p_KxM
    misfit_RxK = yt_RxK - fitted_RxM @ p_KxM.T  # Yt - A Xt
    update, misfit = float((yt_RxK - xt_RxK).norm()), float(misfit_RxK.norm())
    if len(s) < x_KxD.shape[1]:  # what of Yt leaves the span of all states of X, where Sigma is eps
        outside_KxD = (y_KxD - (y_KxD @ w_RxD.T) @ w_RxD) / math.sqrt(eps)
        update = math.hypot(update, float(outside_KxD.norm()))
        misfit = math.hypot(misfit, float((outside_KxD - p_KxM @ (p_KxM.T @ outside_KxD)).norm()))
    degenerate = update <= thresholds.identity * float(xt_RxK.norm())
    gain = (whiten * s)[:modes]
    a_MxM = (fitted_RxM[:modes] / gain).cpu().numpy()

    with lapack.one_thread():  # the threads of numpy's and torch's own only wait for each other
        values, left_MxM, kappa = _eigen(a_MxM)
        # u_j^* (Yt - lambda_j Xt) = u_j^* (Yt - A Xt): no cancellation as between Gram matrices, which squares errors
        off = _row_norms(left_MxM @ misfit_RxK[:modes].cpu().numpy(), values)
    residuals = off / (_row_norms(left_MxM * gain.cpu().numpy(), values) + SMALL)
    size = np.abs(values)
    rho, order = float(size.max()), np.lexsort((-values.imag, -size))
    scaled = kreiss_constant(a_MxM / max(1.0, rho)) if (modes <= 256 if kreiss is None else kreiss) else math.nan
    return LayerProfile(
        layer=layer, width=width, snapshots=n, modes=modes, **_masses(size, thresholds), spectral_radius=rho,
        eigenvector_condition=kappa, nonlinearity=math.nan if degenerate else misfit / (update + SMALL),
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
        p_KxM, s, w_RxD, modes = _factor(x_KxD, cutoff, 0)
        a_MxM = (p_KxM.T @ y_KxD @ w_RxD[:modes].T / s[:modes, None]).cpu().numpy()
    values = np.linalg.eigvals(a_MxM).astype(complex)
    return values[np.lexsort((-values.imag, -np.abs(values)))]


def _states(x, y, layer: int, cutoff: float | None, device=None) -> tuple[Tensor, Tensor, float]:
    """The states in float64 on `device`, None: their own (MPS has none: on the CPU), and the cutoff."""
    x, y = (s.detach() if isinstance(s, Tensor) else torch.as_tensor(s, device="cpu") for s in (x, y))
    if x.ndim != 2 or x.shape != y.shape:
        raise ProfileError(f"layer {layer} takes states {tuple(x.shape)} to {tuple(y.shape)}: name layers that keep "
                           "the stream's width, and pass states [N, D]")
    if x.is_complex() or y.is_complex():
        raise ProfileError(f"layer {layer} has complex states: pass real ones, as real and imaginary parts side by "
                           "side, 2 D wide")
    for name, states in (("input", x), ("output", y)):
        if states.device.type == "meta" and type(states) is Tensor:
            raise ProfileError(f"the {name} of layer {layer} is on the meta device, without values: load the weights")
    if cutoff is not None and not 0 <= cutoff < math.inf:
        raise ProfileError(f"cutoff must be at least 0 and finite, got {cutoff}: None takes what rounding makes of X")
    ulp = torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps
    target = device or ("cpu" if x.device.type == "mps" else x.device)
    x, y = (states.to(target).double() for states in (x, y))
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
    """The SVD x = P s W of R = min(K, D) values, P cut to M, and the number M of singular values above `cutoff`."""
    k, width = x_KxD.shape
    p, s, w_RxD = torch.linalg.svd(x_KxD[:width], full_matrices=False)  # the rows below are zero
    modes = int((s > cutoff).sum())
    if not modes:
        raise ProfileError(f"the input of layer {layer} does not vary over its token states: use more varied inputs")
    return nn.functional.pad(p[:, :modes], (0, 0, 0, k - len(p))), s, w_RxD, modes


def _leading_directions(x_NxD: Tensor, rank: int, seed: int, cutoff: float) -> Tensor:
    """Orthonormal [D, up to rank] basis of the largest directions of X: randomized SVD, 10 vectors over, 2 power steps.
    Directions that X does not have would be random ones."""
    sketch = torch.randn(x_NxD.shape[1], min(rank + 10, *x_NxD.shape), dtype=x_NxD.dtype, device="cpu",
                         generator=torch.Generator().manual_seed(seed)).to(x_NxD.device)
    for _ in range(3):
        sketch = torch.linalg.qr(x_NxD.T @ torch.linalg.qr(x_NxD @ sketch)[0])[0]
    sizes, axes = torch.linalg.svd(x_NxD @ sketch, full_matrices=False)[1:]
    return sketch @ axes.T[:, :max(1, min(rank, int((sizes > cutoff).sum())))]


def _eigen(a_MxM: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Eigenvalues, left eigenvectors in rows as LAPACK packs them (a pair: real part, imaginary part), and kappa(V)."""
    real, imaginary, left, right, info = lapack.eig(a_MxM)
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


def _gather(watch: Callable, batches: Iterable, choose: Callable, snapshots: int | None) -> list[list[tuple]]:
    """Of each layer, in the order in which they ran, its input and output states [n, D] in each batch until N."""
    if isinstance(batches, (str, bytes, np.ndarray)) or not isinstance(batches, Iterable):
        raise ProfileError(f"inputs are of type {type(batches).__name__}: pass a tensor, a tuple or a mapping of the "
                           "model's arguments, or several of them in a list")
    pairs, left = defaultdict(list), snapshots
    for batch in batches:
        rows = watch(batch, functools.partial(choose, snapshots=left), lambda i, x, y: pairs[i].append((x, y)))
        left = None if left is None else left - rows
        if left == 0:
            break
    if not pairs:
        raise ProfileError("inputs hold no batch: pass at least one")
    return list(pairs.values())


def _watch(model: nn.Module, stack: list[nn.Module], batch, choose: Callable, receive: Callable, *,
           channel_dim: int | None, side_by_side: bool) -> int:
    """One forward pass, in which `receive(run, x, y)` gets the chosen token states [N, D] of each layer that runs; N.

    `side_by_side`: whether layers may share an input, as the members of the stream's stack never do.
    """
    args, kwargs = _call(model, batch)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs.setdefault("use_cache", False)  # a key-value cache would keep something of every layer alive
    entered, last = [], None
    rows = leading = None
    runs = 0

    def snapshot(h: Tensor | None, layer: nn.Module) -> Tensor:
        nonlocal rows, leading
        h = None if h is None else features_last(h, layer, channel_dim)
        if h is None or leading not in (None, h.shape[:-1]):
            what = "no states [..., D]" if h is None else f"states {tuple(h.shape)} after {tuple(leading)}"
            raise ProfileError(f"layer {runs} passes on {what}: name layers that pass the same token states on")
        if rows is None:
            leading, rows = h.shape[:-1], choose(model, batch, args, kwargs, h.shape[:-1], layer)
        return h.detach().flatten(0, -2)[rows.to(h.device)]

    def enter(layer, args, kwargs):
        entered.append(snapshot(input_states(args, kwargs), layer))

    def leave(layer, args, output):
        nonlocal last, runs
        x, y = entered.pop(), snapshot(stream_states(output), layer)
        if not side_by_side and last is not None and torch.equal(x, last[0]) and not torch.equal(x, last[1]):
            raise ProfileError(f"layers {runs - 1} and {runs} of {type(model).__name__}, {type(layer).__name__}, get "
                               "the same input, side by side: name the layers that follow each other with layers=")
        last = None if side_by_side else (x, y)
        receive(runs, x, y)
        runs += 1

    with untouched(model), contextlib.ExitStack() as hooks:
        for layer in dict.fromkeys(stack):  # a shared layer is hooked once and counts each time it runs
            hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(leave).remove)
        model(*args, **kwargs)
    if not runs:
        raise ProfileError(f"{type(model).__name__} ran none of the {len(stack)} layers: name layers that it runs")
    return len(rows)


def _call(model: nn.Module, batch) -> tuple[tuple, dict]:
    """Positional and keyword arguments of a batch, on the model's device."""
    args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    for name, value in [*enumerate(args), *kwargs.items()]:
        listed = isinstance(value, list) and not all(isinstance(part, Tensor) for part in value)
        refused = (str, bytes, np.ndarray, int, float) if isinstance(batch, list) else (str, bytes, np.ndarray)
        other = not isinstance(value, Tensor) if value is batch else isinstance(value, refused)
        if listed or other:
            raise ProfileError(f"argument {name!r} of the model is of type {type(value).__name__}: pass tensors, as "
                               'torch.as_tensor or a tokenizer with return_tensors="pt" makes them')
    devices = [weight.device for weight in model.parameters()]
    if any(device.type == "meta" for device in devices):
        if not any(hasattr(module, "_hf_hook") for module in model.modules()):  # accelerate's, which loads when called
            raise ProfileError(f"{type(model).__name__} has weights on the meta device, without values: load them")
        return args, kwargs
    if devices:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(devices[0]), (args, kwargs))
    return args, kwargs


def _check_enough(n: int, width: int, rank: int | None) -> None:
    modes = min(width, rank or width)
    if n <= modes + 1:
        fits, more = n // STATES_PER_MODE, f"pass {modes + 2 - n} more, better {STATES_PER_MODE * modes - n}"
        raise ProfileError(f"{n} token states are too few for {modes} modes, which fit them exactly whatever the "
                           f"layers do: {more}" + (f", or rank={fits} (--rank {fits})" if fits else ""))


def _at_once(numbers: int, *devices) -> int:
    """How many layers to analyse side by side, if X has so many numbers and states are on one and factored on another
    of the devices."""
    on_cpu = all(torch.device(device).type == "cpu" for device in devices)
    return max(1, min(torch.get_num_threads(), int(AT_ONCE / (16 * 8 * max(numbers, 1))))) if on_cpu else 1


def _whole(name: str, value, least: int) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if value is not None and not (whole and value >= least):
        raise ProfileError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _bar(layers: int, progress: bool) -> tqdm:
    from .runs import HEADLESS  # which itself imports what trains models, and so this module

    return tqdm(total=layers, unit="layer", disable=not progress or os.environ.get(HEADLESS) == "1")


def _masses(size: np.ndarray, thresholds: Thresholds) -> dict[str, float]:
    """Shares of modes by modulus, which sum to one."""
    near = (thresholds.near_low <= size) & (size <= thresholds.near_high)
    expansive, contractive = size > thresholds.near_high, size < thresholds.contractive
    return {"near_unit_mass": float(near.mean()), "expansive_mass": float(expansive.mean()),
            "contractive_mass": float(contractive.mean()),
            "mid_mass": float((~(near | expansive | contractive)).mean())}


def _choose(model: nn.Module, inputs, args: tuple, kwargs: Mapping, shape: torch.Size, layer: nn.Module, *, positions,
            snapshots: int | None, seed: int) -> Tensor:
    """Indices of the token states to use among the flattened leading dimensions [B, T] of the states."""
    try:
        keep = token_mask(model, args, kwargs, shape, layer=layer)
    except ProfileError:
        if isinstance(positions, str):
            raise
        keep = None  # the user says which
    keep = torch.ones(shape, dtype=torch.bool, device="cpu") if keep is None else keep.cpu()
    if callable(positions):
        chosen = torch.as_tensor(positions(inputs), device="cpu")
        if chosen.dtype != torch.bool or chosen.shape != shape:
            raise ProfileError(f"positions(inputs) must be a bool mask {tuple(shape)}, got {chosen.dtype} "
                               f"{tuple(chosen.shape)}: mark the token states to use")
    elif isinstance(positions, str):
        if positions not in ("all", "last"):
            raise ProfileError(unknown("positions", positions, ("all", "last", "a list", "a function")))
        chosen = keep.flip(-1).cumsum(-1).flip(-1) == 1 if positions == "last" else keep
    else:
        listed = np.asarray(positions)
        if listed.ndim != 1 or listed.dtype.kind not in "iu" or not (abs(listed + 0.5) < shape[-1]).all():
            raise ProfileError(f"positions {positions!r:.60} are not all whole numbers within a sequence of "
                               f"{shape[-1]}: choose from {-shape[-1]} to {shape[-1] - 1}")
        chosen = torch.zeros_like(keep)
        chosen[..., listed.tolist()] = True
    rows = (keep & chosen).flatten().nonzero().squeeze(1)
    if snapshots is not None and len(rows) > snapshots:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
        rows = rows[order[:snapshots].sort().values]
    return rows
