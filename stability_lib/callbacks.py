"""Spectral shaping in the training loop of Hugging Face's `Trainer`: see `shaping.trainer_callback`."""

import math
import sys
import warnings
import weakref
from collections.abc import Mapping

import torch
from torch import nn
from transformers import TrainerCallback

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
