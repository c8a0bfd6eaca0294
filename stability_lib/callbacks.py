"""Spectral shaping and the monitor in other people's training loops: see `shaping.trainer_callback`,
`monitor.trainer_callback` and `monitor.lightning_callback`."""

import math
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import TrainerCallback

from .alarms import StabilityStop
from .monitor import StabilityMonitor
from .probes import compiled, unhook, weak_hook
from .shaping import KSS

_HOOKED: "weakref.WeakSet[ShapingCallback]" = weakref.WeakSet()


class ShapingCallback(TrainerCallback):
    """Adds the penalty to the loss that the model returns.

    An interrupted `train()` tells its callbacks nothing. So the hooks are on the model only from the beginning of a
    step, or of a further micro-batch, to its backward pass; and a forward pass takes them off that finds itself outside
    of a training step, or that the one before it never came to its end.
    """

    def __init__(self, settings=None, layers=None, positions=None):
        self.kss: KSS | None = None
        self._make = lambda model: KSS(model, settings, layers=layers, positions=positions)
        self._hooks: list = []
        weakref.finalize(self, unhook, self._hooks)

    def on_train_begin(self, args, state, control, model, train_dataloader=None, **kwargs):
        if args.torch_compile or compiled(model):
            raise ValueError("shaping sees no layers in a compiled model: train without torch_compile, or in a loop of "
                             "your own where KSS is made before the model's first pass")
        for other in list(_HOOKED):
            if other is self or (other.kss._model is model and other._state is not state):  # of an interrupted train()
                other._stop()
        self._model, self._state, self._warned = model, state, False
        self.kss = self._make(model)
        self.kss.detach()
        self._penalty, self._logged = torch.zeros(()), state.global_step
        try:
            self._batches = len(train_dataloader)
        except TypeError:  # of a stream nobody knows the length
            self._batches = None
        # the window, in its epoch, of micro-batches that make one step
        windows = math.ceil((self._batches or 0) / args.gradient_accumulation_steps)
        self._window = 0 if args.ignore_data_skip or not windows else state.global_step % windows

    def on_step_begin(self, args, state, control, **kwargs):
        self.kss._seek(state.global_step)
        self._parts = args.gradient_accumulation_steps
        if self._batches:  # the last window of an epoch has what is left
            self._parts = max(1, min(self._parts, self._batches - self._window * self._parts))
        # a loss over the items of all micro-batches is not divided by their number, and multiplied by that of processes
        self._divisor = self._parts * (args.world_size if args.average_tokens_across_devices else 1)
        self._start()

    def on_substep_end(self, args, state, control, **kwargs):
        self._end_pass()
        self._start()

    def on_step_end(self, args, state, control, **kwargs):
        self._end_pass()
        self.kss.step()
        self._window += 1

    def on_epoch_end(self, args, state, control, **kwargs):
        self._window = 0

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.kss and logs and "loss" in logs:
            penalty = float(self._penalty) / max(1, state.global_step - self._logged)
            self._penalty, self._logged = torch.zeros(()), state.global_step
            for shown in (logs, *state.log_history[-1:]):
                shown |= {"task_loss": logs["loss"] - penalty, "penalty": penalty}

    def _start(self) -> None:
        self._inside = self._unused = False
        if self.kss.due and not self._hooks:
            self.kss._attach()
            self._hooks += [self._model.register_forward_pre_hook(weak_hook(self._enter)),
                            self._model.register_forward_hook(weak_hook(self._add), with_kwargs=True)]
            _HOOKED.add(self)

    def _stop(self) -> None:
        unhook(self._hooks)
        if self.kss:
            self.kss.detach()
        _HOOKED.discard(self)

    def _end_pass(self) -> None:
        self._stop()
        if self._unused and not self._warned:
            self._warned = True
            warnings.warn("the penalty had no effect: the loss that was minimised is not the one that the model "
                          "returned", stacklevel=2)

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if module.training and torch.is_grad_enabled():
            if self._inside or not _in_training_step():
                self._stop()
            self._inside = True

    def _add(self, module: nn.Module, args: tuple, named: dict, output) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        self._inside = False
        if not isinstance(output, Mapping) or output.get("loss") is None:
            raise ValueError("the model's output has no loss to add the penalty to: pass labels in the inputs, "
                             "and no label smoothing or compute_loss_func")
        penalty = self.kss.penalty()
        self._penalty = self._penalty + penalty.detach() / self._parts
        divisor = self._divisor if named.get("num_items_in_batch") is not None else 1
        output["loss"] = output["loss"] + penalty / divisor
        if output["loss"].requires_grad:
            self._unused = penalty.requires_grad
            output["loss"].register_hook(weak_hook(self._reached))

    def _reached(self, gradient: torch.Tensor) -> None:
        self._unused = False
        self._stop()


def _in_training_step() -> bool:
    """Whether `Trainer.training_step`, or what overrides it, has called what runs now."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "training_step":
        frame = frame.f_back
    return frame is not None


class MonitorCallback(TrainerCallback):
    """See `monitor.trainer_callback`."""

    def __init__(self, **settings):
        self.monitor: StabilityMonitor | None = None
        self._settings = settings

    def on_train_begin(self, args, state, control, model, **kwargs):
        if self.monitor is not None:
            self.monitor.close()  # of a train() before
        self.monitor = StabilityMonitor(_wrapped(model), **self._settings)
        self.monitor.steps = state.global_step
        self._late = _late_stops(self.monitor)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.monitor.steps = state.global_step
        if _stops(lambda: self.monitor.step(), optimizer):
            control.should_training_stop = True
        return control

    def on_step_end(self, args, state, control, **kwargs):
        if self._late:
            control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.monitor.close()


def _wrapped(model: nn.Module) -> nn.Module:
    """What the `Trainer` that has called calls in place of its model: a compiled or parallel one."""
    frame = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if getattr(trainer, "model", None) is model and isinstance(getattr(trainer, "model_wrapped", None), nn.Module):
            return trainer.model_wrapped
        frame = frame.f_back
    return model


def _stops(step: Callable[[], object], optimizer) -> bool:
    """Whether an alarm ends training; then there are no gradients left, so that the optimizer's step moves nothing."""
    try:
        step()
    except StabilityStop as stop:
        warnings.warn(f"training stops before this step is made. {stop}", stacklevel=3)
        optimizer.zero_grad(set_to_none=True)
        return True
    return False


def _late_stops(monitor: StabilityMonitor) -> list[StabilityStop]:
    """What will hold the stops that come from within the optimizer's step, where no exception may leave a `Trainer`."""
    late = []

    def keep(stop: StabilityStop) -> None:
        warnings.warn(f"training stops after this step. {stop}", stacklevel=3)
        late.append(stop)

    monitor._on_late_stop = keep
    return late


def lightning_monitor(module: Callable[[nn.Module], nn.Module] | None, settings: Mapping):
    """See `monitor.lightning_callback`."""
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

    class LightningMonitor(Callback):
        monitor: StabilityMonitor | None = None
        loss = None

        def on_train_start(self, trainer, pl_module):
            if self.monitor is not None:
                self.monitor.close()
            self.monitor = StabilityMonitor((module or _called)(pl_module), **settings)
            self.late = _late_stops(self.monitor)

        def on_before_backward(self, trainer, pl_module, loss):
            self.loss = loss.detach() * trainer.accumulate_grad_batches  # it comes divided by their number

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.monitor.steps = trainer.global_step
            if _stops(lambda: self.monitor.step(self.loss), optimizer):
                trainer.should_stop = True

        def on_train_batch_end(self, trainer, pl_module, *_):
            if self.late:
                trainer.should_stop = True

        def on_train_end(self, trainer, pl_module):
            if self.monitor is not None:  # an exception may come before training does
                self.monitor.close()

        def on_exception(self, trainer, pl_module, exception):
            self.on_train_end(trainer, pl_module)

    return LightningMonitor()


def _called(pl_module: nn.Module) -> nn.Module:
    base = next(kind for kind in type(pl_module).__mro__ if kind.__name__ == "LightningModule")
    if type(pl_module).forward is not base.forward:
        return pl_module
    children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    if len(children) != 1:
        raise ValueError(f"{type(pl_module).__name__} has no forward and {len(children)} children with weights: pass "
                         "module=, a function that takes the one from it that training calls")
    return children[0]
