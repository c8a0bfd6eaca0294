"""`train_run(config) -> RunResult`: one training run as a pure function of its config.

A run that blows up is a result with its step and reason. On the same machine the same config gives the
same bits: initialisation and batches come from explicit generators and the CPU runs on a stated number of threads.
"""

import contextlib
import dataclasses
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import data, koopman, models, moe, optim, probes, projections, response, shaping, signals
from .config import RunConfig, replace, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")
SPECTRA = tuple(metric for metric in koopman.METRICS if metric != "kreiss")
"""What is kept of a spectral profile, as means over layers and for each as `<metric>/block<i>`. K(A) itself is infinite
where rho > 1, which is nearly everywhere; `kreiss_scaled` only where the config asks for it."""



@dataclasses.dataclass(frozen=True)
class RunResult:
    """What one run left behind.

    `status` is `ok` or `diverged`; a diverged run has a `reason` and the 0-based `stop_step` at which it ended
    (`steps` where only the final validation showed it). `loss_init` and `loss_final` are cross-entropies in nats per
    token on the fixed validation set (`loss_final` is NaN where the loss was not finite), `accuracy_final` the share
    of tokens predicted right there. `curves` holds equally long lists per quantity: `step`, `loss`, `gradient_norm`
    (before clipping) at every step, of shaped runs also `penalty` and `skipped_layers` (so far), at each of
    `probe_step` all readings of `probes`, at each of `spectra_step` those of `SPECTRA`, at each of `signal_step` the
    loss, the gradient norm and what `signals.reduced` makes of the probes' readings, as `signal/<name>`, at each of
    `sharpness_step` the `sharpness`, in units of where AdamW turns unstable, and as `alarm_step` the step after which
    the run acted on its alarm, if it did. `patterns` holds the attention maps asked for, one [T][T] list each, taken at
    `pattern_step`. `replicas` says how many runs trained together, and `seconds` is the run's share of the time.
    """

    config: RunConfig
    status: str
    stop_step: int | None
    reason: str | None
    loss_init: float
    loss_final: float
    accuracy_final: float
    curves: dict[str, list[float]]
    patterns: list[list[list[float]]]
    seconds: float
    replicas: int = 1


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is one, else cpu (mps must be asked for). Raises `ValueError` where absent."""
    if device not in DEVICES:
        raise ValueError(unknown("device", device, DEVICES))
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return "cuda" if present["cuda"] else "cpu"
    if not present[device]:
        raise ValueError(f"device {device!r} is not available here: choose auto or "
                         + " or ".join(name for name, here in present.items() if here))
    return device


def sent(batch: Tensor, device: str) -> Tensor:
    """A batch on the device, where that is CUDA without waiting for it."""
    return batch.pin_memory().to(device, non_blocking=True) if device == "cuda" else batch.to(device)


def loss_terms(logits_BxTxV: Tensor, targets_BxT: Tensor, z_loss: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats, and the same plus z_loss * mean(log^2 Z) (paper P, Sec. 3.1.2)."""
    logits = logits_BxTxV.float()
    log_z = logits.logsumexp(-1)
    cross_entropy = (log_z - logits.gather(-1, targets_BxT.unsqueeze(-1)).squeeze(-1)).mean()
    if not isinstance(z_loss, Tensor) and z_loss == 0:
        return cross_entropy, cross_entropy
    return cross_entropy, cross_entropy + z_loss * log_z.square().mean()


def scored(config: RunConfig, logits_BxTxV: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets at the positions that count, out of sequences [B, T + 1]."""
    return logits_BxTxV[:, -config.scored_positions:], sequences[:, -config.scored_positions:]


def evaluate(model: nn.Module, windows: Tensor, config: RunConfig, device: str) -> tuple[float, float]:
    """Cross-entropy in nats per token and the share of tokens predicted right, on validation `windows` [n, T + 1]."""
    return tuple(mean_over(windows, lambda chunk: score(model, chunk, config, device), config, device))


def score(model: nn.Module, sequences: Tensor, config: RunConfig, device: str) -> Tensor:
    """Cross-entropy and the share of tokens predicted right on sequences [B, T + 1], as one tensor [2]."""
    with torch.no_grad(), _eval_mode(model), autocast(config, device):
        logits = model(sequences[:, :-1])
    logits, targets = scored(config, logits, sequences)
    return torch.stack([loss_terms(logits, targets, 0.0)[0], (logits.argmax(-1) == targets).float().mean()])


def mean_over(windows: Tensor, scores: Callable[[Tensor], Tensor], config: RunConfig, device: str) -> list:
    """The mean over all windows of what `scores` gives for a batch of them."""
    total = sum(scores(chunk.to(device)).cpu().double() * len(chunk) for chunk in windows.split(config.batch_size))
    return (total / len(windows)).tolist()


@contextlib.contextmanager
def autocast(config: RunConfig, device: str):
    """The precision context of the forward pass."""
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
        yield
    torch.clear_autocast_cache()  # within a caller's autocast torch itself would keep the first step's weights


@contextlib.contextmanager
def cpu_threads(n: int | None):
    """Run the inside with `n` CPU threads (None: leave them as they are)."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_one_run = threading.RLock()
"""Held by a run, as torch's random numbers, attention kernels and other settings belong to the process, not to a
thread."""
_KERNELS = [kernel for kernel in SDPBackend.__members__.values() if kernel != SDPBackend.ERROR]
_SETTINGS = ((torch.backends.mkldnn, "enabled", True), (torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),
             (torch.backends.cuda.matmul, "fp32_precision", "ieee"))


@contextlib.contextmanager
def _torch_as_imported(device: str):
    """What a caller may have changed and results depend on, as it is in a fresh process; afterwards as it was.

    Not the deterministic algorithms: CPU runs have the same bits with them, runs on a GPU may need them for that.
    """
    flushed = not float(torch.tensor(1e-40, dtype=torch.float32, device="cpu") * 1)
    with contextlib.ExitStack() as stack:
        for owner, name, value in _SETTINGS:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_flush_denormal, flushed)
        torch.set_flush_denormal(False)
        if torch.get_default_device().type != "cpu":  # a context that costs time at every call
            stack.enter_context(torch.device("cpu"))
        for context in (torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_detect_anomaly(False),
                        sdpa_kernel(_KERNELS), *map(probes.full_precision, {"cpu", device})):
            stack.enter_context(context)
        yield


def train_run(config: RunConfig, device: str = "cpu", threads: int | None = 1) -> RunResult:
    """Train `config` from scratch. `device` as in `resolve_device`; `threads` on the CPU (None: torch's own number).

    A process trains one run at a time: a call from another thread waits. Raises `DataError` or `ValueError` before any
    training where the config cannot be run.
    """
    device = resolve_device(device)
    with alone(device, threads):
        started, config = time.perf_counter(), data.pin(config)
        vocab, windows = prepare(config, device)
        return train_runs(Single(config, vocab, device), windows, started)[0]


@contextlib.contextmanager
def alone(device: str, threads: int | None):
    """The only training in this process, whatever its other threads do and its caller has set."""
    probes.import_dynamo()
    with _one_run, cpu_threads(threads), _torch_as_imported(device):
        yield


def prepare(config: RunConfig, device: str = "cpu") -> tuple[int, Tensor]:
    """The size of the vocabulary and the validation sequences, which a run asks for first.

    Raises `DataError` or `ValueError` where the config cannot be run, or not in the memory of this device.
    """
    needed, there = models.least_memory(config), memory(device)
    if needed > there:
        default, of_experts = RunConfig(), ("experts", "top_k") if config.mlp == "moe" else ()
        large = [f"{name} {getattr(config, name)}" for name in (
            "d_model", "n_layers", "mlp_ratio", *of_experts, "vocab_size", "batch_size", "seq_len", "eval_sequences",
            "grid_size", "spline_order", "state_size", "expansion", "attention_maps")
                 if (getattr(config, name) or 0) > (getattr(default, name) or 0)]
        raise ValueError(f"the run needs at least {needed / 1e9:.3g} GB and {device} has {there / 1e9:.3g}: lower "
                         f"{', '.join(large) or 'batch_size'}")
    return data.vocab_size(config), data.validation(config)


def memory(device: str) -> float:
    """All the memory of a device in bytes; infinite where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


@dataclasses.dataclass(eq=False)
class Run:
    """What a run has beside its weights: the order of its batches, and what is recorded of it."""

    config: RunConfig
    curves: dict[str, list] = dataclasses.field(default_factory=lambda: defaultdict(list))
    patterns: list = dataclasses.field(default_factory=list)
    stop_step: int | None = None
    reason: str | None = None

    def __post_init__(self):
        seed = np.random.SeedSequence([self.config.seed, 1]).generate_state(1)[0]
        self.batch_order = torch.Generator().manual_seed(int(seed))

    def record(self, **values: float) -> None:
        for name, value in values.items():
            self.curves[name].append(value)

    def end(self, step: int, reason: str | None) -> None:
        if reason:
            self.stop_step, self.reason = step, reason


class Single:
    """The model of one run and all that trains it. `replicas.Replicas` does the same for many: wherever a value or an
    input has a leading axis it is that of the runs, here of length one."""

    def __init__(self, config: RunConfig, vocab: int, device: str):
        self.config, self.device, self.runs = config, device, [Run(config)]
        self.model = models.build(config, vocab).to(device)
        self.optimizer = optim.build(self.model, config)
        self.kss = shaping.attach(self.model, config)
        self.response = response.attach(self.model, self.optimizer, config)
        self._sharpest: Tensor | None = None

    def draw(self) -> Tensor:
        """The next training batch."""
        return sent(data.sample(self.config, self.runs[0].batch_order), self.device).unsqueeze(0)

    def evaluate(self, windows: Tensor) -> list[tuple[float, float]]:
        return [evaluate(self.model, windows, self.config, self.device)]

    def patterns(self, tokens_1xT: Tensor) -> Tensor:
        return pattern(self.model, tokens_1xT, self.config, self.device).unsqueeze(0)

    def losses(self, step: int, batch: Tensor, probe: bool) -> tuple[Tensor, Tensor, probes.Readings]:
        if due(self.config, step, self.config.spectra_every):
            _read_spectra(self.runs[0].curves, step, self.model, batch[0], self.config)
        loss, objective, readings = self._losses(batch[0], probe)
        return loss.unsqueeze(0), objective.unsqueeze(0), _with_axis(readings)

    def _losses(self, batch: Tensor, probe: bool = False) -> tuple[Tensor, Tensor, probes.Readings]:
        config = self.config
        kernel = sdpa_kernel(SDPBackend.MATH) if config.gradient_penalty else contextlib.nullcontext()
        heads = probes.watch_heads(self.model) if self.clips else contextlib.nullcontext()
        with kernel, heads as self.head_maxima:  # the fused ones cannot be differentiated twice
            loss, objective, readings = losses(self.model, batch, config, config.z_loss, self.device, probe)
        if config.gradient_penalty:
            gradients = torch.autograd.grad(objective, [*self.model.parameters()], create_graph=True)
            objective = objective + config.gradient_penalty * sum(g.square().sum() for g in gradients)
        if self.kss:
            self.penalty = self.kss.penalty()
            objective = objective + self.penalty
        return loss, objective, readings

    def backward(self, objective: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        objective.sum().backward()

    def read_weights(self) -> probes.Readings:
        return _with_axis(probes.parameters(self.model) | probes.gradients(self.model))

    def clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf).unsqueeze(0)

    def extras(self) -> dict[str, float]:
        """What a step records besides loss and gradient norm."""
        return {"penalty": float(self.penalty.detach()), "skipped_layers": self.kss.skipped} if self.kss else {}

    def keep(self, going: list[int]) -> None:
        """Train on with these of the runs; the others keep the weights they have."""
        self.runs = [self.runs[i] for i in going]

    @property
    def clips(self) -> bool:
        """Whether this step is followed by QK-clip."""
        return self.config.qk_clip is not None and (self.response is None or self.response.clipping)

    def lr_factor(self, step: int) -> list[float]:
        """What the peak learning rate is multiplied with at a step."""
        return [optim.schedule(self.config, step) * (self.response.lr_factor if self.response else 1.0)]

    def update(self, step: int, batch: Tensor, probe: bool) -> probes.Readings:
        optim.set_lr(self.optimizer, self.lr_factor(step)[0])
        if self.config.eps_late is not None:
            for group in self.optimizer.param_groups:
                group["eps"] = optim.eps(self.config, step)
        if self.response:
            self.response.keep()
        with probes.updates(self.model) if probe else contextlib.nullcontext({}) as moved:
            self.optimizer.step(*([lambda: self._climb(batch[0])] if self.config.sam_rho else []))
        if self.clips:
            clipped = projections.clip(self.model, self.head_maxima, self.config.qk_clip)
            moved["clipped_heads"] = torch.tensor(float(sum(map(len, clipped.values()))), device=self.device)
        if self.kss:
            self.kss.step()
        return _with_axis(moved)

    def after(self, step: int, batch: Tensor) -> None:
        """What one run by itself reads and does once a step is taken."""
        config, curves = self.config, self.runs[0].curves
        if due(config, step, config.sharpness_every):
            edge = (1 - config.beta1) / (2 + 2 * config.beta1) * config.lr * self.lr_factor(step)[0]
            self.runs[0].record(sharpness_step=step, sharpness=edge * self._sharpness(batch[0]))
        if self.response and (config.alarm == "step" or due(config, step, config.signals_every)):
            self.response.judge(step, curves)

    def _sharpness(self, batch: Tensor) -> float:
        """Of the objective on the batch, without penalties on layers; each time from where the last one ended."""
        weights, plain = [*self.model.parameters()], replace(self.config, precision="fp32")
        precondition = probes.adam_preconditioner(self.optimizer, weights)
        with sdpa_kernel(SDPBackend.MATH), _eval_mode(self.model):  # the fused ones cannot be differentiated twice
            value, self._sharpest = probes.sharpness(
                lambda: losses(self.model, batch, plain, plain.z_loss, self.device, False)[1], weights, precondition,
                self._sharpest)
        return value

    def _climb(self, batch: Tensor) -> None:
        """The gradient at SAM's second point, clipped as the first."""
        self._losses(batch)[1].backward()
        self.clip()


def _with_axis(readings: probes.Readings) -> probes.Readings:
    return {name: value.unsqueeze(0) for name, value in readings.items()}


def due(config: RunConfig, step: int, every: int) -> bool:
    """Every `every`-th step, the first and the last; none where `every` is 0."""
    return every > 0 and (step % every == 0 or step == config.steps - 1)


def train_runs(learner, windows: Tensor, started: float) -> list[RunResult]:
    """Train all runs of a `Single` or of `replicas.Replicas` and return their results, in order."""
    runs, config = learner.runs, learner.config
    to_map = set(np.linspace(0, config.steps - 1, config.attention_maps).round().astype(int).tolist())
    at_start = learner.evaluate(windows)
    for step in range(config.steps):
        batch = learner.draw()
        if step in to_map:
            seen = learner.patterns(windows[:1, :-1].to(learner.device)).tolist()
            for run, pattern_TxT in zip(learner.runs, seen, strict=True):
                run.patterns.append(pattern_TxT)
                run.record(pattern_step=step)
        take_step(learner, step, batch)
        if not learner.runs:
            break
    at_end = learner.evaluate(windows)
    seconds = (time.perf_counter() - started) / len(runs)
    return [_result(*of_run, seconds, len(runs)) for of_run in zip(runs, at_start, at_end, strict=True)]


def _result(run: Run, at_start: tuple, at_end: tuple, seconds: float, replicas: int) -> RunResult:
    loss_final, accuracy_final = at_end
    if not math.isfinite(loss_final) and not run.reason:
        run.end(run.config.steps, "final validation loss is not finite")
    return RunResult(run.config, "diverged" if run.reason else "ok", run.stop_step, run.reason, at_start[0],
                     loss_final if math.isfinite(loss_final) else math.nan, accuracy_final, dict(run.curves),
                     run.patterns, seconds, replicas)


def take_step(learner, step: int, batch: Tensor) -> None:
    """One step of training with all that is recorded of it. Runs that blow up end here, before an update."""
    config = learner.config
    probe, signal = due(config, step, config.probe_every), due(config, step, config.signals_every)
    loss_R, objective_R, readings = learner.losses(step, batch, probe or signal)
    learner.backward(objective_R)
    if probe:
        readings |= learner.read_weights()
    values = torch.stack([loss_R.detach(), learner.clip().float()]).tolist()  # one transfer from the device
    for run, loss, norm in zip(learner.runs, *values, strict=True):
        run.record(step=step, loss=loss, gradient_norm=norm, **learner.extras())
        run.end(step, _blow_up(run.config, loss, norm))
    going = [i for i, run in enumerate(learner.runs) if not run.reason]
    if len(going) < len(learner.runs):
        learner.keep(going)
        batch, readings = batch[going], {name: value[going] for name, value in readings.items()}
    if not going:
        return
    factors = learner.lr_factor(step)
    moved = learner.update(step, batch, probe or signal)
    if probe or signal:
        found = probes.fetch(readings | moved)
        for i, run in enumerate(learner.runs):
            of_run = {name: values[i] for name, values in found.items()}
            if probe:
                run.record(probe_step=step, **of_run)
            if signal:
                _record_signals(run, step, of_run, factors[i])
    learner.after(step, batch)


def _record_signals(run: Run, step: int, readings: dict[str, float], lr_factor: float) -> None:
    config = run.config
    visible = np.arange(1, config.length + 1) if config.causal else np.full(1, config.length)
    found = signals.reduced(readings, config.lr * lr_factor, float(np.log(visible).mean()))
    now = {name: run.curves[name][-1] for name in ("loss", "gradient_norm")}
    run.record(signal_step=step, **{f"signal/{name}": value for name, value in (now | found).items()})


def losses(model: nn.Module, batch: Tensor, config: RunConfig, z_loss: float | Tensor, device: str,
           probe: bool) -> tuple[Tensor, Tensor, probes.Readings]:
    """The task loss of a model on a batch, the same with its z-loss and load-balance loss, and the readings of the
    forward pass."""
    balanced = config.mlp == "moe" and config.load_balance
    with (probes.watch(model) if probe else contextlib.nullcontext({}) as readings,
          moe.watch_balance(model) if balanced else contextlib.nullcontext({}) as imbalances, autocast(config, device)):
        logits = model(batch[:, :-1])
    loss, objective = loss_terms(*scored(config, logits, batch), z_loss)
    if imbalances:
        objective = objective + config.load_balance * torch.stack([*imbalances.values()]).mean()
    return loss, objective, readings


def _blow_up(config: RunConfig, loss: float, gradient_norm: float) -> str | None:
    """Why the run ends at this step, or None: non-finite values, or the thresholds of paper K (Sec. 3.1)."""
    for name, value, limit in (("loss", loss, config.diverge_loss),
                               ("gradient norm", gradient_norm, config.diverge_grad_norm)):
        if not math.isfinite(value):
            return f"{name} is not finite"
        if limit is not None and value > limit:
            return f"{name} over {limit:g}"
    return None


@contextlib.contextmanager
def _eval_mode(model: nn.Module):
    """Looking must not change the run: in training mode each pass moves the vectors of spectral_norm."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)


def _read_spectra(curves: dict[str, list], step: int, model: nn.Module, batch: Tensor, config: RunConfig) -> None:
    """The profile's metrics on a batch, means over layers and by block; NaN where its states cannot be profiled."""
    try:
        found = koopman.profile(model, batch[:, :-1], kreiss=config.spectra_kreiss)
        readings = {"": found.summary()["mean"]} | {f"/block{i}": row for i, row in found.table().iterrows()}
    except koopman.ProfileError:
        unknown_mean = defaultdict(lambda: math.nan)
        readings = {"": unknown_mean} | {f"/block{i}": unknown_mean for i in range(config.n_layers)}
    curves["spectra_step"].append(step)
    for where, values in readings.items():
        for metric in SPECTRA:
            if metric != "kreiss_scaled" or config.spectra_kreiss:
                curves[metric + where].append(float(values[metric]))


def pattern(model: nn.Module, tokens_1xT: Tensor, config: RunConfig, device: str) -> Tensor:
    """The attention pattern [T, T] of block 0, head 0."""
    with probes.watch_pattern(model) as patterns, torch.no_grad(), _eval_mode(model), autocast(config, device):
        model(tokens_1xT)
    return patterns[0]
