"""Koopman Spectral Shaping (KSS): a penalty on the spectra of a model's layers, for any training loop.

Paper K (Sec. 3.3, eqs. 14, 15) adds alpha times the mean of L_KSS over a sampled half of the layers to the task loss.
The eigenvalues are those of an operator of rank R fitted to a layer's input and output states, as in `koopman`. In use:

    with KSS(model, Settings(alpha=5, every=1)) as kss:
        for batch in batches:
            loss = task_loss(model, batch) + kss.penalty()
            loss.backward()
            optimizer.step()
            kss.step()

The penalties of paper K's Table 6 act on the same states in the same way. `trainer_callback` is for the Trainer of
Hugging Face.

Dimensions: B batch, T position, D model, N snapshots (token states), R rank.
"""

import dataclasses
import math
import typing
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import CHOICES, RunConfig, _coerce, unknown
from .probes import apart, full_precision, import_dynamo, unhook, weak_hook
from .stream import (
    ProfileError,
    convolves,
    features_last,
    input_states,
    residual_layers,
    stream_states,
    token_mask,
)

ROUNDING = 1e-6
"""Directions of X smaller than this, relative to its largest, are taken for rounding."""
LARGE = 1e15
"""States of a larger norm are skipped: products of their squares leave the range of fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to shape. The defaults are paper K's; `beta`, `dmd`, `gradient`, `eps` and `condition_max`, which it leaves
    open, and `gamma`, for which it gives a range, are ours.

    `penalty`: `kss` is L_KSS, `unstable` and `near_unit` one of its terms each; `random_l2`, the mean square of a
    random projection of Y - X; `residual_norm` and `activation_variance`, the mean square and the variance of Y;
    `jacobian`, the mean square of a layer's Jacobian times a random vector, by a finite difference.
    `alpha`: its weight. `every`: steps from one application to the next. `layer_share`: of the layers, drawn anew at
    each application. `snapshots`: at most so many token states of a layer (None: all). `rank`: R. `temperature`,
    `tau_u`, `tau_l`, `gamma`, `beta`: as in eq. 14. `dmd`: the R directions in which the operator is fitted, held fixed
    in the gradient: `pod`, the largest of X, `random` ones, or `whitened`, random ones after whitening; `pod_moving`,
    the largest of X again, and the gradient goes through them too. `gradient`: what it reaches, a layer's `input`
    states, its `output` states or `both`. `reduction`: whether the term of unstable modes is their `sum`, as in eq. 14,
    or `mean`. `eps`: added to the covariance under `whitened`. `condition_max`:
    layers whose eigenvectors have a larger condition number (Frobenius) are skipped. `seed`: of all random numbers
    drawn here; no others are touched.
    """

    penalty: str = "kss"
    alpha: float = 0.15
    every: int = 10
    layer_share: float = 0.5
    snapshots: int | None = 2048
    rank: int = 32
    temperature: float = 20.0
    tau_u: float = 1.05
    tau_l: float = 0.90
    gamma: float = 0.4
    beta: float = 1.0
    dmd: str = "pod"
    gradient: str = "both"
    reduction: str = "sum"
    eps: float = 1e-5
    condition_max: float = 1e6
    seed: int = 0

    def __post_init__(self):
        fields = {"penalty": "shaping"} | {name: f"shaping_{name}" for name in ("dmd", "gradient", "reduction")}
        least = {"every": 1, "rank": 1, "snapshots": 2, "condition_max": 1.0}
        for name, kind in typing.get_type_hints(Settings).items():
            value = _coerce(name, getattr(self, name), kind)
            object.__setattr__(self, name, value)
            known = [choice for choice in CHOICES.get(fields.get(name), ()) if choice != "none"]
            if known and value not in known:
                raise ValueError(unknown(name, value, known))
            if not known and value is not None and not least.get(name, 0) <= value < math.inf:
                raise ValueError(f"{name} must be at least {least.get(name, 0)} and finite, got {value}")
        if not 0 < self.layer_share <= 1:
            raise ValueError(f"layer_share must be above 0 and at most 1, got {self.layer_share}")
        if self.tau_l > self.tau_u:
            raise ValueError(f"tau_l {self.tau_l} is above tau_u {self.tau_u}: no mode would be near unit")
        if not self.temperature:
            raise ValueError("temperature must be above 0: at 0 every mode counts by half")
        if self.seed >= 2**63:
            raise ValueError(f"seed {self.seed} is too large for torch: choose one below 2**63")


class KSS:
    """Watches the layers of `model` and offers the penalty on their spectra.

    `layers` as in `stream.residual_layers`. In each forward pass in training mode with gradients, if the step is due,
    the states of the drawn layers are kept until `penalty`; of several passes in between, the last counts. Tokens that
    the masks in the model's call hide do not count; `positions`, a function of the call's arguments that returns a bool
    mask [B, T] of those that do, replaces the masks. `applied` and `skipped` count layers; a layer is skipped where its
    states are not finite or its operator or eigenvectors are too ill-conditioned for a gradient, so that none of them
    can bring a NaN into the parameters. `detach`, the end of a `with`, or that of the last reference take its hooks off
    the model.
    """

    def __init__(self, model: nn.Module, settings: Settings | None = None, *,
                 layers: str | Sequence[nn.Module] | None = None, positions: Callable[..., Tensor] | None = None):
        import_dynamo()
        self.settings = settings or Settings()
        self.steps = self.applied = self.skipped = 0
        self._model, self._positions = model, positions
        self._layers = list(dict.fromkeys(residual_layers(model, layers)))
        self._generator = torch.Generator().manual_seed(self.settings.seed)
        self._call: tuple[tuple, dict] | None = None  # what the model is called with, while it runs
        self._arguments: dict[nn.Module, tuple[tuple, dict]] = {}
        self._states: dict[nn.Module, tuple] = {}
        self._vain, self._said, self._checked = 0, set(), set()
        self._draw()
        self._hooks: list = []
        weakref.finalize(self, unhook, self._hooks)
        self._attach()

    def __enter__(self) -> "KSS":
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    @property
    def due(self) -> bool:
        return self.steps % self.settings.every == 0

    def penalty(self) -> Tensor:
        """alpha times the mean penalty of the drawn layers since the last call, a scalar; 0 where none is due.

        With gradient accumulation, add it to each micro-batch's loss and scale both alike. Raises `RuntimeError` where
        it is due and no forward pass in training mode came before it, `ProfileError` where a mask cannot be matched to
        the states. Warns once where it has no effect: no gradient, or layer after layer skipped.
        """
        states, _ = self._states, self._forget()
        self._draw()
        if not self.due or not self.settings.alpha:
            return torch.zeros((), device="cpu")
        if not states:
            raise RuntimeError(
                "no states were seen since the last penalty: call it after a forward pass in training mode with "
                "gradients, and kss.step() once after each optimizer.step(); of a model that had been compiled and run "
                "before, call torch.compiler.reset() once after making the KSS")
        values = []
        for layer, (x, y, args, kwargs, call) in states.items():
            rows = self._rows(layer, x, call)
            with full_precision(x.device.type):
                jacobian = self.settings.penalty == "jacobian"
                value = self._jacobian(layer, x, rows, args, kwargs) if jacobian else self._measure(x, y, rows)
            if value is None or not bool(value.isfinite()):
                self.skipped += 1
            else:
                values.append(value)
        self.applied += len(values)
        penalty = self.settings.alpha * torch.stack(values).mean() if values else torch.zeros((), device="cpu")
        self._vain += not self.applied
        if self._vain == 5:
            self._warn(f"KSS has skipped every layer so far, {self.skipped} of {self.skipped}: their states are not "
                       "finite or have too few directions for a gradient: choose a smaller rank or other layers")
        if values and not penalty.requires_grad:
            self._warn("the penalty of KSS has no gradient: the layers and what comes before them are frozen, or the "
                       "settings cut it off")
        return penalty

    def step(self) -> None:
        """Call once after each `optimizer.step()`."""
        self.steps += 1
        self._forget()

    def detach(self) -> None:
        """Take the hooks off the model."""
        unhook(self._hooks)
        self._forget()

    def state_dict(self) -> dict:
        """What a loop that is resumed needs, between two steps: numbers, a list and a tensor."""
        drawn = [i for i, layer in enumerate(self._layers) if layer in self._drawn]
        return {"steps": self.steps, "applied": self.applied, "skipped": self.skipped, "layers": len(self._layers),
                "drawn": drawn, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on where `state_dict` was called. Raises `ValueError` where it is of other layers or lacks something."""
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"the state of KSS lacks {', '.join(sorted(missing))}: pass what state_dict() returned")
        if state["layers"] != len(self._layers):
            raise ValueError(f"the state of KSS is of {state['layers']} layers, and here are {len(self._layers)}: pass "
                             "the same layers=")
        self.steps, self.applied, self.skipped = (int(state[name]) for name in ("steps", "applied", "skipped"))
        self._drawn = {self._layers[i] for i in state["drawn"]}
        self._generator.set_state(state["generator"].cpu())
        self._forget()

    def _seek(self, step: int) -> None:
        """Stand at the beginning of `step` with random numbers that depend on nothing before it."""
        self.steps = step
        self._generator.manual_seed(int(np.random.SeedSequence([self.settings.seed, step]).generate_state(1)[0]))
        self._draw()
        self._forget()

    def _attach(self) -> None:
        def put(register: Callable, method: Callable) -> None:
            self._hooks.append(register(weak_hook(method), with_kwargs=True))

        put(self._model.register_forward_pre_hook, self._enter)
        for layer in self._layers:
            if self.settings.penalty == "jacobian":
                put(layer.register_forward_pre_hook, self._set_apart)
            put(layer.register_forward_hook, self._keep)
        put(self._model.register_forward_hook, self._leave)

    def _forget(self) -> None:
        self._states, self._arguments, self._call = {}, {}, None

    def _warn(self, text: str) -> None:
        if text[:30] not in self._said:
            self._said.add(text[:30])
            warnings.warn(text, stacklevel=3)

    def _draw(self) -> None:
        """Choose the layers that the next forward pass keeps: the nearest whole number to `layer_share` of them."""
        n = max(1, round(self.settings.layer_share * len(self._layers)))
        order = torch.randperm(len(self._layers), generator=self._generator, device="cpu").tolist()
        self._drawn = {self._layers[i] for i in order[:n]}

    def _wanted(self, layer: nn.Module) -> bool:
        return bool(self._hooks) and self.due and layer in self._drawn and layer.training and torch.is_grad_enabled()

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self._call = args, kwargs

    def _leave(self, model: nn.Module, args: tuple, kwargs: dict, output) -> None:
        self._call = None

    def _set_apart(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._wanted(layer):
            self._arguments[layer] = apart((args, kwargs))

    def _keep(self, layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if self._wanted(layer):
            x, y = input_states(args, kwargs), stream_states(output)
            if layer not in self._checked and x is not None:
                self._checked.add(layer)
                if x.ndim <= 3 or convolves(layer):  # others may have a sequence in chunks
                    features_last(x, layer, remedy="name layers that pass on [..., D] with layers=")
            if x is None or y is None or x.shape != y.shape:
                raise ValueError(f"{type(layer).__name__} does not map states [..., D] to states of the same shape: "
                                 "name layers that do with layers=")
            self._states[layer] = x, y, *self._arguments.pop(layer, (args, kwargs)), self._call

    def _rows(self, layer: nn.Module, x: Tensor, call: tuple[tuple, dict] | None) -> Tensor | None:
        """Which of the token states count, as indices into N of them; None: all."""
        args, kwargs = call or ((), {})
        shape, who = x.shape[:-1], "positions=, a function of the model's arguments"
        if self._positions is not None:
            mask = self._positions(*args, **kwargs)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
                raise ProfileError(f"{who}, must return a bool mask {tuple(shape)} of the token states to use")
        else:
            if len(args) == 1 and isinstance(args[0], Mapping):  # a whole batch
                args, kwargs = (), {**args[0], **kwargs}
            mask = token_mask(self._model, args, kwargs, shape, layer=layer, remedy=f"pass {who} that marks the token "
                              "states to use") if len(args) + len(kwargs) > 1 else None  # one argument is the tokens
        return None if mask is None or bool(mask.all()) else mask.flatten().nonzero().squeeze(1).to(x.device)

    def _random(self, *shape: int, like: Tensor) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device="cpu").to(like)

    def _measure(self, x: Tensor, y: Tensor, rows: Tensor | None) -> Tensor | None:
        """The penalty on one layer's states, or on those in `rows`; None where it cannot be had."""
        x_NxD, y_NxD = x.flatten(0, -2), y.flatten(0, -2)
        n = len(x_NxD) if rows is None else len(rows)
        if n < (2 if self.settings.penalty == "activation_variance" else 1):
            return None
        if self.settings.snapshots is not None and n > self.settings.snapshots:
            drawn = torch.randperm(n, generator=self._generator, device="cpu")[: self.settings.snapshots].to(x.device)
            rows = drawn if rows is None else rows[drawn]
        if rows is not None:  # an index costs a quarter of all the time here
            x_NxD, y_NxD = x_NxD[rows], y_NxD[rows]
        x_NxD, y_NxD = (s if s.dtype == torch.float64 else s.float() for s in (x_NxD, y_NxD))
        if self.settings.gradient != "both":
            x_NxD, y_NxD = ((x_NxD, y_NxD.detach()) if self.settings.gradient == "input" else (x_NxD.detach(), y_NxD))
        if not float(x_NxD.detach().norm() + y_NxD.detach().norm()) < LARGE:
            return None
        if self.settings.penalty == "residual_norm":
            return y_NxD.square().mean()
        if self.settings.penalty == "activation_variance":
            return y_NxD.var(0).mean()
        if self.settings.penalty == "random_l2":
            return ((y_NxD - x_NxD) @ self._random(x.shape[-1], self.settings.rank, like=x_NxD)).square().mean()
        values = eigenvalues(x_NxD, y_NxD, directions(x_NxD, self.settings, self._generator),
                             self.settings.condition_max)
        return None if values is None else spectrum_penalty(values, self.settings).to(x_NxD)

    def _jacobian(self, layer: nn.Module, x: Tensor, rows: Tensor | None, args: tuple, kwargs: dict) -> Tensor | None:
        """Both passes here, as under autocast the rounding of y exceeds the difference, with the same random numbers,
        as otherwise dropout would, and the arguments as they were, as a key-value cache grows with each."""
        if rows is not None and not len(rows):
            return None
        counted = (lambda states: states) if rows is None else (lambda states: states.flatten(0, -2)[rows])
        size = 1e-2 * counted(x.detach()).square().mean().sqrt()
        noise = self._random(*counted(x).shape, like=x)
        if rows is not None:
            noise = torch.zeros_like(x).flatten(0, -2).index_copy(0, rows, noise).view_as(x)
        nearby = x + size * noise

        def through(states: Tensor) -> Tensor:
            put = lambda value: states if value is x else value  # noqa: E731
            given, named = apart((args, kwargs))
            on_gpu = x.device.type == "cuda"
            with torch.random.fork_rng([x.device] if on_gpu else []):
                torch.default_generator.manual_seed(self.settings.seed + self.steps)  # torch.manual_seed: of every GPU
                if on_gpu:
                    torch.cuda.default_generators[x.device.index].manual_seed(self.settings.seed + self.steps)
                return stream_states(layer.forward(*map(put, given), **{name: put(v) for name, v in named.items()}))

        y, moved = through(x), through(nearby)
        return counted((moved - y) / size).square().mean()


def spectrum_penalty(eigenvalues: Tensor, settings: Settings) -> Tensor:
    """L_KSS (eq. 14) of complex eigenvalues [R], or the one of its terms that `settings.penalty` names: a scalar.

    The sum over modes of sigmoid(T (|l| - tau_u)) softplus(|l| - tau_u)^2, plus beta (m - gamma)^2 with the soft
    near-unit mass m = mean of sigmoid(T (|l| - tau_l)) sigmoid(T (tau_u - |l|)).
    """
    modulus, sharp = eigenvalues.abs(), settings.temperature
    over = modulus - settings.tau_u
    modes = (sharp * over).sigmoid() * F.softplus(over).square()
    mass = ((sharp * (modulus - settings.tau_l)).sigmoid() * (-sharp * over).sigmoid()).mean()
    terms = {"unstable": modes.sum() if settings.reduction == "sum" else modes.mean(),
             "near_unit": settings.beta * (mass - settings.gamma).square()}
    return terms.get(settings.penalty, sum(terms.values()))


def eigenvalues(x_NxD: Tensor, y_NxD: Tensor, basis_DxR: Tensor, condition_max: float = 1e6) -> Tensor | None:
    """Eigenvalues of the least-squares operator from X to Y within the span of a basis, complex [up to R] on the CPU,
    in float64, differentiable in X, Y and the basis; None where their gradient is ill-conditioned.

    States are centred, and each direction is scaled to unit size, a similarity transform. The gradient of an
    eigenvalue is the product of its left and right eigenvectors: well defined for complex pairs and for repeated
    eigenvalues with full eigenvectors, unbounded where eigenvectors merge.
    """
    x_NxR, y_NxR = ((states - states.mean(0)) @ basis_DxR for states in (x_NxD, y_NxD))
    if x_NxR.device.type == "mps":  # has no float64
        x_NxR, y_NxR = x_NxR.cpu(), y_NxR.cpu()
    x_NxR, y_NxR = x_NxR.double(), y_NxR.double()
    size = x_NxR.detach().norm(dim=0)
    kept = size > ROUNDING * size.max()
    if not bool(kept.all()):  # an index costs a quarter of all the time here
        x_NxR, y_NxR, size = x_NxR[:, kept], y_NxR[:, kept], size[kept]
    x_NxR, y_NxR = x_NxR / size, y_NxR / size
    gram_RxR, cross_RxR = (x_NxR.mT @ x_NxR).cpu(), (x_NxR.mT @ y_NxR).cpu()
    inverse_RxR, singular = torch.linalg.inv_ex(gram_RxR.detach())
    if (not len(gram_RxR) or singular or not bool(cross_RxR.isfinite().all())
            or not float(gram_RxR.detach().norm() * inverse_RxR.norm()) < 1 / ROUNDING):
        return None
    values, vectors_RxR = torch.linalg.eig(torch.linalg.solve(gram_RxR, cross_RxR))
    inverse_RxR, singular = torch.linalg.inv_ex(vectors_RxR.detach())
    if singular or not float(vectors_RxR.detach().norm() * inverse_RxR.norm()) < condition_max:
        return None
    return values


def directions(x_NxD: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """The [D, R] directions in which the operator is fitted; all D of them where `rank` is no smaller."""
    width, rank = x_NxD.shape[1], settings.rank
    if settings.dmd == "pod_moving":
        return moving_directions(x_NxD, min(rank, width))
    x_NxD = x_NxD.detach()
    if rank >= width and settings.dmd != "pod":  # whose axes set directions apart that X does not have
        return torch.eye(width, dtype=x_NxD.dtype, device=x_NxD.device)
    extra = min(rank + 10, width) if settings.dmd == "pod" else rank
    sketch = torch.randn(width, extra, generator=generator, device="cpu").to(x_NxD)
    x_NxD = x_NxD - x_NxD.mean(0)
    if settings.dmd == "random":
        return torch.linalg.qr(sketch)[0]
    if settings.dmd == "whitened":
        covariance = x_NxD.mT @ x_NxD / (len(x_NxD) - 1)
        variance, axes = torch.linalg.eigh(covariance)
        return axes * (variance.clamp_min(0) + settings.eps).rsqrt() @ (axes.mT @ torch.linalg.qr(sketch)[0])
    for _ in range(2):
        sketch = torch.linalg.qr(x_NxD.mT @ (x_NxD @ sketch))[0]
    projected = x_NxD @ sketch
    return sketch @ torch.linalg.eigh(projected.mT @ projected)[1][:, -rank:]


def moving_directions(x_NxD: Tensor, rank: int) -> Tensor:
    """The [D, R] largest directions of X as a function of X: where X changes, one turns towards a direction left out by
    what is added to their covariance over the gap of their variances (first-order perturbation). Turns among the R
    change no eigenvalue and are left out."""
    centred_NxD = x_NxD - x_NxD.mean(0)
    centred_NxD = (centred_NxD.cpu() if x_NxD.device.type == "mps" else centred_NxD).double()
    covariance_DxD = centred_NxD.mT @ centred_NxD
    variance_D, axes_DxD = torch.linalg.eigh(covariance_DxD.detach())
    left_DxL, kept_DxR = axes_DxD[:, :-rank], axes_DxD[:, -rank:]
    gap_LxR = (variance_D[-rank:] - variance_D[:-rank, None]).clamp_min(ROUNDING * float(variance_D[-1]))
    turn_LxR = left_DxL.mT @ covariance_DxD @ kept_DxR / gap_LxR
    return (kept_DxR + left_DxL @ (turn_LxR - turn_LxR.detach())).to(x_NxD)


def attach(model: nn.Module, config: RunConfig) -> KSS | None:
    """The penalty that a run's config asks for, drawn from its seed; None where it asks for none."""
    if config.shaping == "none":
        return None
    names = ("alpha", "every", "beta", "dmd", "gradient", "reduction")
    seed = int(np.random.SeedSequence([config.seed, 2]).generate_state(1)[0])  # not the numbers of weights or batches
    return KSS(model, Settings(penalty=config.shaping, seed=seed,
                               **{name: getattr(config, f"shaping_{name}") for name in names}))


def trainer_callback(settings: Settings | None = None, layers: str | Sequence[nn.Module] | None = None,
                     positions: Callable[..., Tensor] | None = None):
    """A callback that adds the penalty to the loss of a Hugging Face `Trainer`: `Trainer(..., callbacks=[
    trainer_callback(Settings(alpha=5, every=1))])`. Its `kss` counts what was done.

    The model must compute its own loss, from labels in its inputs. What is printed and the Trainer's `log_history` show
    `loss`, which is minimised, and its parts `task_loss` and `penalty`. What is drawn depends on seed and global step
    alone, so that a resumed run goes on as one that was not interrupted.
    """
    from .callbacks import ShapingCallback  # transformers takes seconds to import, and only its users have it

    return ShapingCallback(settings, layers, positions)
