"""Thresholds on what a monitor reads, and what happens where a reading passes one."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

from .config import unknown

ACTIONS = ("warn", "stop")


class StabilityStop(RuntimeError):
    """Raised by `StabilityMonitor.step` before the optimizer's step; `alarm` is what was raised."""

    def __init__(self, alarm: "Raised"):
        super().__init__(str(alarm))
        self.alarm = alarm


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Goes off where a reading of `quantity` is above or below a threshold, or not finite.

    `quantity` of "*" stands for all. `action` is "warn", "stop" (raises `StabilityStop` before the optimizer's step;
    for `update_*` and `gradient_over_eps`, which are known only then, after it) or a function of the `Raised`, as one
    that saves. Of several alarms that one reading sets off the first counts. `per_1000` is how many false alarms came
    in a thousand steps of runs that did not fail, in chapter 16, most of them trained near failing; None: not counted.
    """

    quantity: str
    above: float = math.inf
    below: float = -math.inf
    remedy: str = ""
    chapter: str = ""
    action: str | Callable[["Raised"], object] = "warn"
    per_1000: float | None = None

    def __post_init__(self):
        if not callable(self.action) and self.action not in ACTIONS:
            raise ValueError(unknown("action", self.action, (*ACTIONS, "a function of the alarm")))

    def watches(self, name: str) -> bool:
        return self.quantity in ("*", name.partition("/")[0])

    def goes_off(self, value: float) -> bool:
        # a gradient of exactly zero is not a small one: at the first step whatever feeds a zero weight has it
        return not math.isfinite(value) or value > self.above or (value < self.below and value != 0)

    def severity(self, value: float) -> float:
        return math.inf if math.isnan(value) else -value if value < self.below else value


@dataclasses.dataclass(frozen=True)
class Raised:
    """An alarm that went off: at `reading`, of this `value`, in `step`, and without a break `since` that step."""

    alarm: Alarm
    reading: str
    value: float
    step: int
    since: int
    others: int = 0
    """How many more layers the same alarm went off in."""

    def __str__(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        limit = ("is not finite" if not math.isfinite(self.value) else f"is above {self.alarm.above:g}"
                 if self.value > self.alarm.above else f"is below {self.alarm.below:g}")
        advice = f": {self.alarm.remedy}" if self.alarm.remedy else ""
        rate = (f"; {self.alarm.per_1000:g} false alarms per 1000 steps in chapter 16"
                if self.alarm.per_1000 is not None else "")
        chapter = f" (chapter {self.alarm.chapter}{rate}; more in docs/which_remedy.md)" if self.alarm.chapter else ""
        return (f"step {self.step}: {self.reading}{more}, {self.value:.4g}, {limit}, since step {self.since}"
                f"{advice}{chapter}")


ALARMS = (
    Alarm("*", remedy="go back to weights from before and train on at a lower learning rate", chapter="01"),
    Alarm("attention_logit_max", above=1e4, chapter="01", per_1000=0.93,
          remedy="nearly all runs on text that passed this failed; train with qk-norm or at a lower learning rate"),
    Alarm("attention_logit_max", above=1e3, chapter="08", per_1000=2.4,
          remedy="logits forced to this size raise the loss; train with qk-norm or at a lower learning rate"),
    Alarm("gradient_over_eps", below=10.0, chapter="09",
          remedy="AdamW's steps begin to shrink; lower its eps"))
"""The thresholds are those of paper P, figures 9 and 10, and of the chapters named. Chapter 16 fitted thresholds to
these and other signals, found none that tells failing runs from others on architectures it was not fitted to, and so
adds none (`chapters.c16_early_warning.monitored`); it counts the false alarms of the two. Of a drift of the output
logits there is none: in chapter 02 it was not shown to cost loss."""


def acting(action: str | Callable[[Raised], object], alarms: Sequence[Alarm] = ALARMS) -> tuple[Alarm, ...]:
    """The alarms with another action."""
    return tuple(dataclasses.replace(alarm, action=action) for alarm in alarms)


class Watch:
    """Holds readings against alarms; `raised` are those that went off."""

    def __init__(self, alarms: Sequence[Alarm]):
        self.alarms, self.raised = tuple(alarms), []
        self._since: dict[tuple[int, str], int] = {}

    def judge(self, row: Mapping[str, float], step: int) -> None:
        """Raises `StabilityStop` where an alarm says so; others act once in a stretch of readings that set them off."""
        stop, taken = None, set()
        for i, alarm in enumerate(self.alarms):
            watched = {name: value for name, value in row.items() if alarm.watches(name) and "/head" not in name}
            off = {name for name, value in watched.items() if alarm.goes_off(value)}
            fresh = {name for name in off if (i, name) not in self._since} - taken
            for name in watched:
                if name in off:
                    self._since.setdefault((i, name), step)
                else:
                    self._since.pop((i, name), None)
            shown = (off if alarm.action == "stop" else fresh) - taken
            taken |= off
            if shown:
                worst = max(sorted(shown), key=lambda name: alarm.severity(watched[name]))
                raised = Raised(alarm, worst, watched[worst], step, self._since[i, worst], len(shown) - 1)
                stop = self._act(raised) or stop
        if stop:
            raise StabilityStop(stop)

    def _act(self, raised: Raised) -> Raised | None:
        """Do what the alarm says; returned is one that wants training to stop."""
        self.raised.append(raised)
        if raised.alarm.action == "stop":
            return raised
        if raised.alarm.action == "warn":
            warnings.warn(str(raised), stacklevel=4)
        else:
            raised.alarm.action(raised)
        return None
