"""`train_replicas`: runs that differ only in what is a number to the training step, trained together as replicas.

The weights of all replicas are one tensor, and `torch.func.vmap` runs the unchanged model over it. A replica has its
own initialisation, batches, schedule, clipping and end, and its trajectory is that of `train_run` to rounding. The
recipe is `train.train_runs` for both. Nothing passes from one replica to another: not even NaN.

Dimensions: R replicas, P parameters of one of them, G parameter groups; others as in `models`.
"""

import dataclasses
import functools
import itertools
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from . import blocks, data, models, optim, probes, train
from .config import RunConfig, non_default, replace
from .train import RunResult

NUMBERS = {"seed": 0, "lr": 1e-9, "lr_final": 0.0, "warmup_steps": 0, "beta1": 0.0, "beta2": 0.0, "eps": 1.0,
           "eps_late": None, "weight_decay": 0.0, "clip_norm": None, "diverge_loss": None, "diverge_grad_norm": None}
"""In what replicas may differ, with a value that stands for all; also in `z_loss`, where all have one or none has."""
ALONE = {"optimizer": "adamw", "sam_rho": 0.0, "gradient_penalty": 0.0, "shaping": "none", "spectra_every": 0,
         "reparametrization": "none", "mixer": "attention", "mlp": "gelu", "qk_clip": None, "qk_lr": "own",
         "sharpness_every": 0, "alarm": "none"}
"""A run with another value than these trains by itself."""
LIMIT = 180.0
"""Seconds a batch of replicas may take, by an estimate: a killed process loses no more than that."""


def batches(configs: list[RunConfig], device: str | None = None, workers: int = 1) -> list[list[RunConfig]]:
    """The configs in groups that can train together, in order of their first members; where a device is given, none
    larger than `most` there, or than leaves something for every worker."""
    by_shape: dict[RunConfig, list[RunConfig]] = {}
    for config in configs:
        by_shape.setdefault(shape(config), []).append(config)
    found = []
    for alike in by_shape.values():
        size = len(alike)
        if not trains_with_others(alike[0]):
            size = 1
        elif device is not None and size > 1:
            size = min(size, most(alike[0], device), math.ceil(len(configs) / workers))
        parts = math.ceil(len(alike) / size)
        found += [alike[len(alike) * i // parts:len(alike) * (i + 1) // parts] for i in range(parts)]
    return found


def trains_with_others(config: RunConfig) -> bool:
    return all(getattr(config, name) == value for name, value in ALONE.items())


def shape(config: RunConfig) -> RunConfig:
    """The config with everything reset in which replicas may differ."""
    return replace(config, **NUMBERS, z_loss=float(config.z_loss > 0))


def train_replicas(configs: list[RunConfig], device: str = "cpu", threads: int | None = 1) -> list[RunResult]:
    """Train `configs` together and return their results, in order; one alone as `train_run` does.

    Where the device runs out of memory, each half trains by itself. Raises `ValueError` for configs that are not one
    batch, and otherwise as `train_run`.
    """
    device = train.resolve_device(device)
    if len(batches(configs)) > 1:
        raise ValueError("these runs cannot train together as replicas, one of " + " and ".join(
            str(non_default(batch[0])) for batch in batches(configs)[:2]) + ": group them by replicas.batches")
    if len(configs) < 2:
        return [train.train_run(config, device, threads) for config in configs]
    try:
        with train.alone(device, threads):
            return _train(configs, device)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
    _give_back_memory(device)  # here, where the error no longer holds the tensors of what failed
    half = len(configs) // 2
    return [result for part in (configs[:half], configs[half:]) for result in train_replicas(part, device, threads)]


def _train(configs: list[RunConfig], device: str) -> list[RunResult]:
    started, pinned = time.perf_counter(), data.pin(configs[0])
    configs = [replace(config, data=pinned.data, data_digest=pinned.data_digest) for config in configs]
    vocab, windows = train.prepare(pinned, device)
    return train.train_runs(Replicas(configs, vocab, device), windows, started)


def _out_of_memory(error: RuntimeError) -> bool:
    """Also as mps, cuBLAS and cuDNN say it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "STATUS_ALLOC_FAILED"))


def _give_back_memory(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).empty_cache()


def most(config: RunConfig, device: str) -> int:
    """How many replicas of the config's shape to train together on a device, see `_fitting`."""
    return _fitting(config, *step_seconds(shape(config), device), train.memory(device))


def _fitting(config: RunConfig, overhead: float, each: float, memory: float) -> int:
    """How many replicas, of a step of `overhead + each * n` seconds: as many as take `LIMIT`, or twice the time of one
    where that is more, and no more than the memory has room for by the least estimate, or than 65535 sequences, the
    largest grid of a CUDA kernel in all but its first dimension."""
    time_for_a_step = max(LIMIT / config.steps, 2 * (overhead + each))
    room = memory / models.least_memory(config)
    return max(1, int(min((time_for_a_step - overhead) / each, room, 65535 / config.batch_size)))


@functools.lru_cache
def step_seconds(config: RunConfig, device: str) -> tuple[float, float]:
    """(a, b) of a + b n, about the seconds of a training step of n replicas: from a few steps of 2 and of 8, or of 32
    where 8 take hardly longer than 2, as on a GPU that waits for its launches."""
    device = train.resolve_device(device)
    with train.alone(device, 1):
        few = _fastest_step(config, 2, device)
        for n in (8, 32):
            try:
                many = _fastest_step(config, n, device)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                many = n / 2 * few
                break
            if many > 1.5 * few:
                break
    _give_back_memory(device)
    each = max((many - few) / (n - 2), 1e-7)
    return max(0.0, few - 2 * each), each


def _fastest_step(config: RunConfig, n: int, device: str) -> float:
    """Seconds from step to step; the first ones pay for what only they cost."""
    configs = [replace(config, seed=seed, steps=8, probe_every=0, attention_maps=0) for seed in range(n)]
    learner, marks = Replicas(configs, data.vocab_size(config), device), []
    for step in range(8):
        train.take_step(learner, step, learner.draw())
        marks.append(time.perf_counter())
    return min(end - start for start, end in itertools.pairwise(marks[2:]))


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of a device, what the time of many runs is reckoned from: the seconds that one operation of a step takes to be
    launched, the FLOP/s of replicas in bf16 at width 64 and at 512, a power of the width between them and constant
    beyond, the most they come to in fp32, and the bytes of memory."""

    launch: float
    flops_at_64: float
    flops_at_512: float
    flops_fp32: float
    memory: float

    def flops(self, config: RunConfig) -> float:
        """FLOP/s at the config's width and precision."""
        share = math.log(min(max(config.d_model, 64), 512) / 64) / math.log(8)
        rate = self.flops_at_64 ** (1 - share) * self.flops_at_512 ** share
        return min(rate, self.flops_fp32) if config.precision == "fp32" else rate


H100_ASSUMED = Speed(launch=6e-6, flops_at_64=2.5e13, flops_at_512=2e14, flops_fp32=3e13, memory=80e9)
"""Nobody measured this. A quarter of the card's dense bf16 rate at width 512 is the aim of `benchmarks/replicas.py`;
narrower models, whose time goes into elementwise work, are taken to fall short in proportion to their width, and fp32
(without TF32) to reach half of the card's rate."""
HOST, HOST_MADE_UP = 5e-5, 2e-4
"""Seconds of the host for a step of one replica, its batch included: of text, and where `data` makes it up."""
BUILD = 1e-7
"""Seconds in which the host initialises one parameter."""
PROFILE, KREISS = 0.1, 1.0
"""Seconds of a spectral profile of a layer, and more where its Kreiss constants are searched."""


def reckoned_seconds(configs: list[RunConfig], speed: Speed = H100_ASSUMED) -> float:
    """About how long `configs` take on one accelerator, from the first step to the last: a step launches its
    operations, then computes, and the two do not overlap. By default on an H100 as it is assumed, not measured, to
    be."""
    return sum(_reckoned(alike, speed) for alike in batches(configs))


def _reckoned(alike: list[RunConfig], speed: Speed) -> float:
    """Of runs of one shape, or of one that trains by itself."""
    config, n = alike[0], len(alike)
    flops = models.training_flops(config, data.vocab_size(config)) / config.steps
    each = flops / speed.flops(config) + (HOST if config.textual else HOST_MADE_UP)
    made, launch = BUILD * models.n_params(config), speed.launch * operations(config)
    if not trains_with_others(config):
        every = config.spectra_every
        read = every and math.ceil(config.steps / every) + bool((config.steps - 1) % every)
        profiles = read * config.n_layers * (PROFILE + config.spectra_kreiss * KREISS)
        return n * (config.steps * (launch + each) + made + profiles)
    parts = math.ceil(n / _fitting(config, launch, each, speed.memory))
    return config.steps * (parts * launch + n * each) + n * made


def operations(config: RunConfig) -> float:
    """About how many operations a training step dispatches, as counted in bf16 for replicas, and for runs by themselves
    with each of what such runs have."""
    if trains_with_others(config):
        return 224 * config.n_layers + 150
    times = 1 + 1 / config.shaping_every if config.shaping != "none" else 1
    times *= 6 if config.gradient_penalty else 1
    times *= 2.3 if config.sam_rho else 1
    times *= 1.7 if config.reparametrization != "none" else 1
    times *= 1.9 if config.optimizer == "muon" else 1
    times *= 1.1 if config.qk_clip is not None else 1
    times += 12 / config.sharpness_every if config.sharpness_every else 0
    return times * (144 * config.n_layers + 90)


@functools.lru_cache
def measured(device: str) -> Speed:
    """The speed of a device that is here, from a few steps of replicas of three shapes."""
    base = RunConfig(n_layers=1, n_heads=4, seq_len=256, precision="bf16")
    launch, rates = [], []
    for config in (replace(base, d_model=64), replace(base, d_model=512), replace(base, d_model=512, precision="fp32")):
        overhead, each = step_seconds(shape(config), device)
        launch.append(overhead / operations(config))
        flops = models.training_flops(config, data.vocab_size(config)) / config.steps
        rates.append(flops / max(each - HOST, each / 4))
    return Speed(max(launch), *rates, train.memory(train.resolve_device(device)))


class Replicas:
    """The models of many runs of one shape and all that trains them, see `train.Single`."""

    def __init__(self, configs: list[RunConfig], vocab: int, device: str):
        self.config, self.device = configs[0], device
        self.runs = self._all = [train.Run(config) for config in configs]
        self._ended: dict[train.Run, Tensor] = {}
        self._tokens = data.text(self.config).train.to(device) if self.config.textual else None
        weights, self._groups = [], []
        for config in configs:
            model = models.build(config, vocab)
            weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
            groups = optim.build(model, config).param_groups
            self._groups.append([(group["peak"], group["weight_decay"]) for group in groups])
        self._shapes = {f"model.{name}": weight.shape for name, weight in model.named_parameters()}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        group_of = {id(weight): i for i, group in enumerate(groups) for weight in group["params"]}
        self._group_P = torch.tensor([group_of[id(weight)] for weight in model.parameters()]).repeat_interleave(
            torch.tensor(self._sizes)).to(device)
        for block in model.blocks:
            block.attention.core = _Core(self.config)
        self._host = _Host(model.to(device))
        self._weights_RxP = torch.stack(weights).to(device).requires_grad_()
        self._mean_RxP, self._square_RxP = (torch.zeros_like(self._weights_RxP, requires_grad=False) for _ in range(2))

    def each(self, function, *inputs: Tensor, weights_RxP: Tensor | None = None):
        """`function(model, *inputs)` for every replica; inputs and results have a leading axis R."""
        weights_RxP = self._weights_RxP if weights_RxP is None else weights_RxP
        parts = weights_RxP.split(self._sizes, dim=1)
        named = {name: part.unflatten(1, shape) if shape else part.squeeze(1)
                 for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        return vmap(lambda weights, *given: functional_call(self._host, weights, (function, *given)))(named, *inputs)

    def draw(self) -> Tensor:
        """The next training batch of each, as `data.sample` gives it; texts are cut on the device, all at once."""
        if self._tokens is None:
            batches = [data.sample(self.config, run.batch_order) for run in self.runs]
            return train.sent(torch.stack(batches), self.device)
        start_RxBx1 = train.sent(torch.stack([data.starts(self.config, run.batch_order) for run in self.runs]),
                                 self.device)
        return data.cut(self._tokens, start_RxBx1, self.config)

    def evaluate(self, windows: Tensor) -> list[list[float]]:
        """Of all replicas, also those that have ended."""
        going = {run: self._weights_RxP[i] for i, run in enumerate(self.runs)}
        weights_RxP = torch.stack([(self._ended | going)[run] for run in self._all]).detach()

        def scores(chunk: Tensor) -> Tensor:
            return self.each(lambda model: train.score(model, chunk, self.config, self.device), weights_RxP=weights_RxP)
        return train.mean_over(windows, scores, self.config, self.device)

    def patterns(self, tokens_1xT: Tensor) -> Tensor:
        with torch.no_grad():
            return self.each(lambda model: train.pattern(model, tokens_1xT, self.config, self.device))

    def losses(self, step: int, batch: Tensor, probe: bool) -> tuple[Tensor, Tensor, probes.Readings]:
        def of_one(model, batch_BxT, z_loss=0.0):
            return train.losses(model, batch_BxT, self.config, z_loss, self.device, probe)
        return self.each(of_one, batch, *([self._column("z_loss")] if self.config.z_loss else []))

    def backward(self, objective: Tensor) -> None:
        self._weights_RxP.grad = None
        objective.sum().backward()

    def read_weights(self) -> probes.Readings:
        return self._rms("parameter_rms", self._weights_RxP) | self._rms("gradient_rms", self._weights_RxP.grad)

    def _rms(self, quantity: str, values_RxP: Tensor) -> probes.Readings:
        """The RMS of every weight matrix where the weights are replaced by these values."""
        with torch.no_grad():
            found = self.each(probes.parameters, weights_RxP=values_RxP)
        return {name.replace("parameter_rms", quantity): value for name, value in found.items()}

    def clip(self) -> Tensor:
        """As `nn.utils.clip_grad_norm_`, replica by replica."""
        gradient_RxP = self._weights_RxP.grad
        norm_R = torch.linalg.vector_norm(gradient_RxP, dim=1)
        gradient_RxP *= (self._column("clip_norm") / (norm_R + 1e-6)).clamp(max=1.0).unsqueeze(1)
        return norm_R

    def extras(self) -> dict[str, float]:
        return {}

    def keep(self, going: list[int]) -> None:
        for i in {*range(len(self.runs))}.difference(going):
            self._ended[self.runs[i]] = self._weights_RxP[i].detach().clone()
        self.runs, self._groups = ([values[i] for i in going] for values in (self.runs, self._groups))
        gradient_RxP, self._mean_RxP, self._square_RxP = (
            values[going] for values in (self._weights_RxP.grad, self._mean_RxP, self._square_RxP))
        self._weights_RxP = self._weights_RxP.detach()[going].requires_grad_()
        self._weights_RxP.grad = gradient_RxP

    def after(self, step: int, batch: Tensor) -> None:
        """Replicas neither read sharpness nor act on alarms."""

    def lr_factor(self, step: int) -> list[float]:
        return [optim.schedule(run.config, step) for run in self.runs]

    @torch.no_grad()
    def update(self, step: int, batch: Tensor, probe: bool) -> probes.Readings:
        """AdamW as torch computes it, with LR, betas, eps and decay of each replica and parameter group."""
        factor_Rx1 = _host_column(self.lr_factor(step))
        beta1, beta2 = (_host_column([getattr(run.config, name) for run in self.runs]) for name in ("beta1", "beta2"))
        eps = _host_column([optim.eps(run.config, step) for run in self.runs])
        peak_RxG, decay_RxG = torch.tensor(self._groups, dtype=torch.float64).unbind(-1)
        lr_RxG, t = factor_Rx1 * peak_RxG, step + 1
        numbers = [1 - beta1, beta2, 1 - beta2, (1 - beta2**t).sqrt(), eps, lr_RxG / (1 - beta1**t),
                   1 - lr_RxG * decay_RxG]
        sent = torch.cat(numbers, dim=1).to(self.device, self._weights_RxP.dtype)
        new1, old2, new2, correction, eps, size, kept = sent.split([number.shape[1] for number in numbers], dim=1)
        if size.shape[1] > 1:
            size, kept = size[:, self._group_P], kept[:, self._group_P]
        weights_RxP, gradient_RxP = self._weights_RxP, self._weights_RxP.grad
        before_RxP = weights_RxP.clone() if probe else None
        self._mean_RxP.lerp_(gradient_RxP, new1)
        self._square_RxP.mul_(old2).add_(gradient_RxP.square().mul_(new2))
        weights_RxP.mul_(kept)
        weights_RxP -= (self._square_RxP.sqrt() / correction).add_(eps).reciprocal_().mul_(self._mean_RxP).mul_(size)
        return self._rms("update_rms", weights_RxP - before_RxP) if probe else {}

    def _column(self, name: str) -> Tensor:
        """A number of each run's config, [R]; infinite where it is None."""
        values = [getattr(run.config, name) for run in self.runs]
        values = [math.inf if value is None else value for value in values]
        return torch.tensor(values, dtype=self._weights_RxP.dtype, device=self.device)


def _host_column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


class _Host(nn.Module):
    """Runs any function of a model where `functional_call` puts other weights in its place."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function, *inputs):
        return function(self.model, *inputs)


class _Core(blocks.AttentionCore):
    """Attention that stays fused over replicas, where vmap would fall back to materialised logits."""

    def forward(self, q_BxHxTxE: Tensor, k_BxHxTxE: Tensor, v_BxHxTxE: Tensor) -> Tensor:
        if not self.fused:
            return super().forward(q_BxHxTxE, k_BxHxTxE, v_BxHxTxE)
        return _Fused.apply(q_BxHxTxE, k_BxHxTxE, v_BxHxTxE, self.causal, self.scale)


class _Fused(torch.autograd.Function):
    """F.scaled_dot_product_attention with the replicas folded into the batch: one call, its backward pass torch's own.
    """

    @staticmethod
    def forward(q, k, v, causal, scale):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing to keep: under vmap autograd sees the call below and not this function."""

    @staticmethod
    def vmap(info, in_dims, q, k, v, causal, scale):
        q, k, v = (x.movedim(axis, 0).flatten(0, 1) for x, axis in zip((q, k, v), in_dims[:3], strict=True))
        return _Fused.forward(q, k, v, causal, scale).unflatten(0, (info.batch_size, -1)), 0
