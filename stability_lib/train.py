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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import data, koopman, models, optim, probes, shaping
from .config import RunConfig, unknown

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
    `probe_step` all readings of `probes`, and at each of `spectra_step` those of `SPECTRA`. `patterns` holds the
    attention maps asked for, one [T][T] list each, taken at `pattern_step`.
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


def loss_terms(logits_BxTxV: Tensor, targets_BxT: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats, and the same plus z_loss * mean(log^2 Z) (paper P, Sec. 3.1.2)."""
    logits = logits_BxTxV.float()
    log_z = logits.logsumexp(-1)
    cross_entropy = (log_z - logits.gather(-1, targets_BxT.unsqueeze(-1)).squeeze(-1)).mean()
    return cross_entropy, cross_entropy + z_loss * log_z.square().mean() if z_loss else cross_entropy


def scored(config: RunConfig, logits_BxTxV: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets at the positions that count, out of sequences [B, T + 1]."""
    return logits_BxTxV[:, -config.scored_positions:], sequences[:, -config.scored_positions:]


def evaluate(model: nn.Module, windows: Tensor, config: RunConfig, device: str) -> tuple[float, float]:
    """Cross-entropy in nats per token and the share of tokens predicted right, on validation `windows` [n, T + 1]."""
    total, right = 0.0, 0.0
    with torch.no_grad(), _eval_mode(model):
        for chunk in windows.split(config.batch_size):
            chunk = chunk.to(device)
            with autocast(config, device):
                logits = model(chunk[:, :-1])
            logits, targets = scored(config, logits, chunk)
            total += float(loss_terms(logits, targets, 0.0)[0]) * len(chunk)
            right += float((logits.argmax(-1) == targets).float().mean()) * len(chunk)
    return total / len(windows), right / len(windows)


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
    probes.import_dynamo()
    with _one_run, cpu_threads(threads), _torch_as_imported(device):
        return _train(data.pin(config), device)


def prepare(config: RunConfig, device: str = "cpu") -> tuple[int, Tensor]:
    """The size of the vocabulary and the validation sequences, which a run asks for first.

    Raises `DataError` or `ValueError` where the config cannot be run, or not in the memory of this device.
    """
    needed, there = models.least_memory(config), _memory(device)
    if needed > there:
        default = RunConfig()
        large = [f"{name} {getattr(config, name)}" for name in (
            "d_model", "n_layers", "mlp_ratio", "vocab_size", "batch_size", "seq_len", "eval_sequences",
            "attention_maps") if (getattr(config, name) or 0) > (getattr(default, name) or 0)]
        raise ValueError(f"the run needs at least {needed / 1e9:.3g} GB and {device} has {there / 1e9:.3g}: lower "
                         f"{', '.join(large) or 'batch_size'}")
    return data.vocab_size(config), data.validation(config)


def _memory(device: str) -> float:
    """All the memory of a device in bytes; infinite where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """What the steps of a run share."""

    config: RunConfig
    device: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    kss: shaping.KSS | None
    curves: dict[str, list] = dataclasses.field(default_factory=lambda: defaultdict(list))

    def due(self, step: int, every: int) -> bool:
        """Every `every`-th step, the first and the last; none where `every` is 0."""
        return every > 0 and (step % every == 0 or step == self.config.steps - 1)


def _train(config: RunConfig, device: str) -> RunResult:
    started = time.perf_counter()
    vocab, windows = prepare(config, device)
    model = models.build(config, vocab).to(device)
    run = _Run(config, device, model, optim.build(model, config), shaping.attach(model, config))
    batch_order = torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, 1]).generate_state(1)[0]))
    to_map = set(np.linspace(0, config.steps - 1, config.attention_maps).round().astype(int).tolist())
    loss_init, _ = evaluate(model, windows, config, device)
    patterns, stop_step, reason = [], None, None
    for step in range(config.steps):
        batch = data.sample(config, batch_order).to(device)
        if step in to_map:
            patterns.append(_pattern(model, windows[:1, :-1].to(device), config, device))
            run.curves["pattern_step"].append(step)
        reason = _step(run, step, batch)
        if reason:
            stop_step = step
            break
    loss_final, accuracy_final = evaluate(model, windows, config, device)
    if not reason and not math.isfinite(loss_final):
        stop_step, reason = config.steps, "final validation loss is not finite"
    return RunResult(config, "diverged" if reason else "ok", stop_step, reason, loss_init,
                     loss_final if math.isfinite(loss_final) else math.nan, accuracy_final, dict(run.curves), patterns,
                     time.perf_counter() - started)


def _step(run: _Run, step: int, batch: Tensor) -> str | None:
    """One step of training with all that is recorded of it; the reason where the run ends here, before an update."""
    config, model, curves = run.config, run.model, run.curves
    optim.set_lr(run.optimizer, optim.schedule(config, step))
    if run.due(step, config.spectra_every):
        _read_spectra(curves, step, model, batch, config)
    probe = run.due(step, config.probe_every)
    with probes.watch(model) if probe else contextlib.nullcontext({}) as readings:
        logits = _forward(run, batch)
    loss, objective, penalty = _losses(run, logits, batch)
    run.optimizer.zero_grad(set_to_none=True)
    objective.backward()
    if probe:
        readings |= probes.parameters(model) | probes.gradients(model)
    loss, norm = torch.stack([loss.detach(), _clip(run).float()]).tolist()
    for name, value in (("step", step), ("loss", loss), ("gradient_norm", norm)):
        curves[name].append(value)
    if run.kss:
        curves["penalty"].append(float(penalty.detach()))
        curves["skipped_layers"].append(run.kss.skipped)
    if reason := _blow_up(config, loss, norm):
        return reason
    with probes.updates(model) if probe else contextlib.nullcontext({}) as moved:
        run.optimizer.step(*([lambda: _climb(run, batch)] if config.sam_rho else []))
    if run.kss:
        run.kss.step()
    if probe:
        curves["probe_step"].append(step)
        for name, value in probes.fetch(readings | moved).items():
            curves[name].append(value)
    return None


def _forward(run: _Run, batch: Tensor) -> Tensor:
    """Logits by fused attention, but where the gradient itself is differentiated."""
    kernel = sdpa_kernel(SDPBackend.MATH) if run.config.gradient_penalty else contextlib.nullcontext()
    with autocast(run.config, run.device), kernel:
        return run.model(batch[:, :-1])


def _losses(run: _Run, logits: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The task loss on a batch, what is minimised, and the part of it that shapes the layers."""
    config = run.config
    loss, objective = loss_terms(*scored(config, logits, batch), config.z_loss)
    if config.gradient_penalty:
        gradients = torch.autograd.grad(objective, [*run.model.parameters()], create_graph=True)
        objective = objective + config.gradient_penalty * sum(g.square().sum() for g in gradients)
    penalty = run.kss.penalty() if run.kss else torch.zeros(())
    return loss, objective + penalty if run.kss else objective, penalty


def _clip(run: _Run) -> Tensor:
    """Clip the gradient; its norm before that."""
    return nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_norm or math.inf)


def _climb(run: _Run, batch: Tensor) -> None:
    """The gradient at SAM's second point, clipped as the first."""
    _losses(run, _forward(run, batch), batch)[1].backward()
    _clip(run)


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


def _pattern(model: nn.Module, tokens_1xT: Tensor, config: RunConfig, device: str) -> list[list[float]]:
    with probes.watch_pattern(model) as patterns, torch.no_grad(), _eval_mode(model), autocast(config, device):
        model(tokens_1xT)
    return patterns[0].tolist()
