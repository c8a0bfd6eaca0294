"""Early-warning signals of a training run: what they are, when a run fails, and how well an alarm warns of it.

A signal is read every few steps, larger values being worse; an alarm goes off where it rises above a threshold. Its
lead is how many steps before the run fails that first happens. Everything here looks back only, but for
`failing_step`, which is a judgement on a finished run. Nothing here trains or draws.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd

from .config import SIGNALS
from .evaluate import FAILS_BY

WINDOW, LEAST = 20, 5
"""Earlier readings that a z-score looks back on, and the fewest: before them no alarm is armed."""
SPAN = 8
"""Readings back to which growth is counted."""
SLACK = 0.5
"""What CUSUM takes off each standardised value: drifts below it do not add up."""
SMOOTH = 5
"""Readings whose median, centred, is the smoothed loss."""


def z_score(values: Iterable[float], window: int = WINDOW, least: int = LEAST, floor: float = 0.0) -> pd.Series:
    """Distance of each value from the mean of the `window` values before it in their standard deviations, to whose
    square `floor`^2 is added; NaN where fewer than `least` came before."""
    values = pd.Series(values, dtype=float)
    before = values.shift(1).rolling(window, min_periods=least)
    return (values - before.mean()) / np.sqrt(before.var() + floor**2)


def cusum(standardised: Iterable[float], slack: float = SLACK) -> pd.Series:
    """Page's one-sided cumulative sum (1954): S_t = max(0, S_{t-1} + z_t - slack); a NaN adds nothing."""
    sums, total = [], 0.0
    for z in standardised:
        total = total if math.isnan(z) else max(0.0, total + z - slack)
        sums.append(total)
    return pd.Series(sums, dtype=float)


def growth(values: Iterable[float], span: int = SPAN) -> pd.Series:
    """Decades by which positive values rose over `span` readings; NaN where there is no earlier one."""
    logs = _log(values) / math.log(10)
    return logs - logs.shift(span)


def _log(values: Iterable[float]) -> pd.Series:
    return np.log(pd.Series(values, dtype=float).clip(1e-30, 1e30))


_DERIVED: dict[str, tuple[str, Callable[[Iterable[float]], pd.Series]]] = {
    "loss_spike": ("loss", lambda values: z_score(values, floor=0.02)),
    "gradient_cusum": ("gradient_norm", lambda values: cusum(z_score(_log(values), floor=0.05))),
    "logit_growth": ("attention_logit_max", growth),
    "kurtosis_jump": ("output_kurtosis", lambda values: z_score(_log(values), floor=0.05)),
}
"""Signals that are made of a reading, and of which; the others are the reading itself."""


def derive(read: Mapping[str, Iterable[float]]) -> pd.DataFrame:
    """All signals that the readings of one run allow, a column each and a row per reading, in order.

    `read` has lists under the names that `reduced` gives them, and `loss` and `gradient_norm`. Of readings a signal may
    be the value itself, its `growth`, its `z_score` (of logs but for the loss), or the `cusum` of that.
    """
    made = {name: _DERIVED.get(name, (name, lambda values: pd.Series(values, dtype=float))) for name in SIGNALS}
    return pd.DataFrame({name: make(read[of]) for name, (of, make) in made.items() if of in read})


def reduced(readings: Mapping[str, float], lr: float, even: float) -> dict[str, float]:
    """One number a quantity out of the readings of `probes` by layer, larger ones worse.

    `attention_logit_max`, `output_kurtosis` and `update_rms` are the largest of all layers, the last in units of the
    learning rate `lr` (Adam's first step is 1); `attention_collapse` is the share that the lowest attention entropy
    lacks of that of `even` attention (nats); `log_z` is |log Z|. What has no attention has no reading of it.
    """
    by_kind: dict[str, list[float]] = {}
    for name, value in readings.items():
        by_kind.setdefault(name.partition("/")[0], []).append(value)
    found = {kind: _worst(by_kind[kind]) for kind in ("attention_logit_max", "output_kurtosis") if kind in by_kind}
    if even and "attention_entropy" in by_kind:
        found["attention_collapse"] = _worst(1 - entropy / even for entropy in by_kind["attention_entropy"])
    return found | {"update_rms": _worst(by_kind["update_rms"]) / lr, "log_z": _worst(map(abs, by_kind["log_z"]))}


def _worst(values: Iterable[float]) -> float:
    """The largest, infinite where one is not finite: Python's max drops NaN or not by its place."""
    return max(value if math.isfinite(value) else math.inf for value in values)


def failing_step(steps: Iterable[int], loss: Iterable[float | None], reference: Iterable[float | None] | None = None, *,
                 stop_step: int | None = None, margin: float = FAILS_BY) -> float:
    """The step from which a run has failed, NaN where it has not.

    It is the first from which its smoothed loss stays more than `margin` nats above `reference` to the end: the
    smoothed loss of the same run at a learning rate it can stand, read at the same steps, or by default its own best
    so far. A run that ended early, at `stop_step`, has failed by then at the latest. `loss` may hold None where it was
    not finite.
    """
    steps = np.asarray(list(steps))
    own = _smoothed(loss)
    known = own.cummin() if reference is None else _smoothed(reference).iloc[:len(own)]
    above = (own - known > margin).to_numpy()
    below = np.flatnonzero(~above)
    first = below[-1] + 1 if len(below) else 0
    if first < len(steps):
        return float(steps[first])
    return math.nan if stop_step is None else float(stop_step)


def _smoothed(loss: Iterable[float | None]) -> pd.Series:
    huge = 1e30  # pandas leaves what is infinite out
    finite = [huge if value is None or not math.isfinite(value) else value for value in loss]
    return pd.Series(finite, dtype=float).rolling(SMOOTH, center=True, min_periods=1).median()


def first_alarm(steps: Iterable[int], values: Iterable[float], threshold: float) -> float:
    """The first step whose value is above the threshold, NaN where there is none."""
    above = np.flatnonzero(np.asarray(list(values), dtype=float) > threshold)
    return float(list(steps)[above[0]]) if len(above) else math.nan


def onsets(values: Iterable[float], threshold: float) -> int:
    """How often the values rise above the threshold: a stretch above it counts once. NaN is not above."""
    above = np.asarray(list(values), dtype=float) > threshold
    return int(above[:1].sum() + (above[1:] & ~above[:-1]).sum())


def fit_threshold(healthy: Iterable[Iterable[float]], steps: float, per_1000: float = 1.0) -> float:
    """The lowest threshold at which, and above which, runs that do not fail have at most `per_1000` alarms in a
    thousand steps. `healthy` holds the values of each such run, `steps` how many steps they took together.

    Raises `ValueError` where there is no such run, or no value.
    """
    low, high = [], []
    for values in healthy:
        values = np.nan_to_num(np.asarray(list(values), dtype=float), nan=-np.inf)
        before = np.concatenate([[-np.inf], values[:-1]])
        low.append(before[values > before])
        high.append(values[values > before])
    low, high = (np.sort(np.concatenate(ends or [np.empty(0)])) for ends in (low, high))
    if not len(high) or not steps > 0:
        raise ValueError("a threshold needs readings of runs that do not fail: choose runs of which some do not")
    # an alarm goes off between each low and high: those whose low is at most the threshold, less those all below it
    candidates = np.unique(high)
    counts = np.searchsorted(low, candidates, "right") - np.searchsorted(high, candidates, "right")
    too_many = np.flatnonzero(counts > per_1000 * steps / 1000)
    return float(candidates[too_many[-1] + 1 if len(too_many) else 0])


def judge(series: pd.DataFrame, runs: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """What an alarm at a threshold did in each run, indexed as `runs`, which has `failing_step` and `steps`.

    `series` has a row per reading, in order: `key` (an index of `runs`), `step` and `value`. Columns: `alarm_step`, the
    first or NaN; `lead`, of runs that fail, in steps, 0 where no alarm came before, NaN of others; `false_alarms`, of
    runs that do not fail, see `onsets`; `warned`, whether an alarm came before failing.
    """
    by_run = dict(tuple(series.groupby("key", sort=False)))
    rows = {}
    for key, run in runs.iterrows():
        read = by_run.get(key)
        values, steps = ([], []) if read is None else (read["value"].to_numpy(), read["step"].to_numpy())
        alarm, fails = first_alarm(steps, values, threshold), not math.isnan(run["failing_step"])
        warned = fails and alarm < run["failing_step"]
        rows[key] = {"alarm_step": alarm, "warned": warned,
                     "lead": (run["failing_step"] - alarm if warned else 0.0) if fails else math.nan,
                     "false_alarms": math.nan if fails else float(onsets(values, threshold))}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["alarm_step", "warned", "lead", "false_alarms"])


OTHERS = {"sharpness": "sharpness_step", "near_unit_mass": "spectra_step", "spectral_radius": "spectra_step"}
"""Readings at steps of their own, judged beside `SIGNALS`: AdamW's sharpness, M1 and rho (means over layers)."""


def series(runs: pd.DataFrame) -> pd.DataFrame:
    """Of rows of `runs.ensure`, every signal from when alarms are armed: `key`, `signal`, `step`, `value`.

    What was not finite is infinite, of a spectral profile that could not be made NaN.
    """
    found = []
    for run in runs.itertuples():
        curves = {name: [math.inf if value is None else value for value in values]
                  for name, values in run.curves.items() if name.startswith("signal/")}
        table = derive({name.removeprefix("signal/"): values for name, values in curves.items()})
        armed = run.curves["signal_step"][LEAST:][:1] or [math.inf]
        parts = [(name, run.curves["signal_step"], table[name]) for name in table]
        parts += [(name, run.curves[steps], pd.Series(run.curves[name], dtype=float))
                  for name, steps in OTHERS.items() if name in run.curves]
        tables = [pd.DataFrame({"key": run.key, "signal": name, "step": steps, "value": values.to_numpy()})
                  for name, steps, values in parts]
        found += [table[table["step"] >= armed[0]] for table in tables]
    return pd.concat(found, ignore_index=True)
