"""What a run does, once, when one of its own signals passes a threshold: an alarm with a remedy, inside of training."""

import collections
import copy

import torch
from torch import nn

from . import signals
from .config import RunConfig


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> "Response | None":
    """The response that `config.alarm` asks for; None for none."""
    return Response(model, optimizer, config) if config.alarm != "none" else None


class Response:
    """Holds the readings of a run against `config.alarm_above`, and acts after the first step in which they pass it.

    `lr_factor` is what the learning rate is to be multiplied with, `clipping` whether QK-clip is on.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.lr_factor, self.clipping = 1.0, config.on_alarm != "qk_clip"
        self._acted = False
        self._kept = collections.deque(maxlen=config.roll_back_by + 1)

    def keep(self) -> None:
        """Keep weights and optimizer state as they are before a step, where they may be wanted back."""
        if self.config.on_alarm == "roll_back" and not self._acted:
            self._kept.append(copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict())))

    def judge(self, step: int, curves: dict[str, list]) -> None:
        """Act, and note `alarm_step`, where the alarm's reading of this step is above the threshold. A signal is armed
        after `signals.LEAST` readings: the first are large in every run."""
        if self._acted or self._reading(step, curves) <= self.config.alarm_above:
            return
        self._acted = True
        curves["alarm_step"].append(step)
        if self.config.on_alarm == "qk_clip":
            self.clipping = True
            return
        self.lr_factor = 0.5
        if self.config.on_alarm == "roll_back":
            weights, state = self._kept[0]
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(state)
            self._kept.clear()

    def _reading(self, step: int, curves: dict[str, list]) -> float:
        if self.config.alarm == "step":
            return step
        if len(curves["signal_step"]) <= signals.LEAST:
            return -torch.inf
        read = {name.removeprefix("signal/"): values for name, values in curves.items() if name.startswith("signal/")}
        latest = float(signals.derive(read)[self.config.alarm].iloc[-1])
        return latest if latest == latest else -torch.inf  # too early to tell
