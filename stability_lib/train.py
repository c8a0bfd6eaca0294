"""`train_run(config) -> RunResult`: one training run as a pure function of its config.

A run that blows up is a result with its step and reason. On the same machine the same config gives the
same bits: initialisation and batches come from explicit generators and the CPU runs on a stated number of threads.
"""

import contextlib
import dataclasses
import math
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


def autocast(config: RunConfig, device: str):
    """The precision context of the forward pass."""
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16")


@contextlib.contextmanager
def cpu_threads(n: int | None):
    """Run the inside with `n` CPU threads (None: leave them as they are)."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_run(config: RunConfig, device: str = "cpu", threads: int | None = 1) -> RunResult:
    """Train `config` from scratch. `device` as in `resolve_device`; `threads` on the CPU (None: torch's own number).

    Raises `DataError` or `ValueError` before any training where the config cannot be run.
    """
    device, config = resolve_device(device), data.pin(config)
    with cpu_threads(threads):
        return _train(config, device)


def _train(config: RunConfig, device: str) -> RunResult:
    started = time.perf_counter()
    vocab, windows = data.vocab_size(config), data.validation(config)
    model = models.build(config, vocab).to(device)
    optimizer, kss = optim.build(model, config), shaping.attach(model, config)
    batch_order = torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, 1]).generate_state(1)[0]))
    to_probe = set(probes.probe_steps(config.steps, config.probe_every))
    to_profile = set(probes.probe_steps(config.steps, config.spectra_every))
    to_map = set(np.linspace(0, config.steps - 1, config.attention_maps).round().astype(int).tolist())

    loss_init, _ = evaluate(model, windows, config, device)
    curves, patterns, stop_step, reason = defaultdict(list), [], None, None

    def forward(batch: Tensor) -> Tensor:
        with autocast(config, device), _attention_kernel(config):
            return model(batch[:, :-1])

    def losses(logits: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The task loss on a batch, what is minimised, and the part of it that shapes the layers."""
        loss, objective = loss_terms(*scored(config, logits, batch), config.z_loss)
        if config.gradient_penalty:
            gradients = torch.autograd.grad(objective, [*model.parameters()], create_graph=True)
            objective = objective + config.gradient_penalty * sum(g.square().sum() for g in gradients)
        penalty = kss.penalty() if kss else torch.zeros(())
        return loss, objective + penalty if kss else objective, penalty

    def climb(batch: Tensor) -> None:
        """The gradient at SAM's second point, clipped as the first."""
        losses(forward(batch), batch)[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)

    for step in range(config.steps):
        batch = data.sample(config, batch_order).to(device)
        if step in to_map:
            patterns.append(_pattern(model, windows[:1, :-1].to(device), config, device))
            curves["pattern_step"].append(step)
        optim.set_lr(optimizer, optim.schedule(config, step))
        probe = step in to_probe
        if step in to_profile:
            _read_spectra(curves, step, model, batch, config)
        with probes.watch(model) if probe else contextlib.nullcontext({}) as readings:
            logits = forward(batch)
        loss, objective, penalty = losses(logits, batch)
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        if probe:
            readings |= probes.parameters(model) | probes.gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
        loss, norm = torch.stack([loss.detach(), norm.float()]).tolist()
        for name, value in (("step", step), ("loss", loss), ("gradient_norm", norm)):
            curves[name].append(value)
        if kss:
            curves["penalty"].append(float(penalty.detach()))
            curves["skipped_layers"].append(kss.skipped)
        reason = _blow_up(config, loss, norm)
        if reason:
            stop_step = step
            break
        with probes.updates(model) if probe else contextlib.nullcontext({}) as moved:
            optimizer.step(*([lambda batch=batch: climb(batch)] if config.sam_rho else []))
        if kss:
            kss.step()
        if probe:
            curves["probe_step"].append(step)
            for name, value in probes.fetch(readings | moved).items():
                curves[name].append(value)
    loss_final, accuracy_final = evaluate(model, windows, config, device)
    if not reason and not math.isfinite(loss_final):
        stop_step, reason = config.steps, "final validation loss is not finite"
    return RunResult(config, "diverged" if reason else "ok", stop_step, reason, loss_init,
                     loss_final if math.isfinite(loss_final) else math.nan, accuracy_final, dict(curves), patterns,
                     time.perf_counter() - started)


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


def _attention_kernel(config: RunConfig):
    """Fused attention, but where the gradient itself is differentiated."""
    return sdpa_kernel(SDPBackend.MATH) if config.gradient_penalty else contextlib.nullcontext()


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
