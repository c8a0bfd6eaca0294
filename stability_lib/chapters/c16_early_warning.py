"""Chapter 16, early warning: which signal warns first that a run will fail, how often falsely, and is there time to act?

What was known before: learning rates were placed by the stored runs of chapters 01, 04, 07 and 14 and by pilots of seeds
100 and 101, of which failing and its step, never a signal's lead, were looked at. A run fails as its paper has it. On P's
task, from the step on which its smoothed loss stays more than 0.4 nats above that of the same run at a learning rate that
it can stand (chapter 01's margin); on K's, from where it stays as far above its own best, which there ends in a loss over
50, or not finite. Thresholds are fitted to one false alarm in a thousand steps on the part `fit`, all else is of the part
`test`, of other architectures, sizes, learning rates and seeds.

Power: with about 70 failing runs of the part `test` a median lead is known to some 6 steps, a share to 0.12, a difference
of shares between signals, paired, to 0.15; with about 35 that fail untreated, a difference between actions to 0.2.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd

from .. import signals
from ..claims import Claim
from ..config import SIGNALS, RunConfig, grid, replace
from ..studies import RECALL, check_scale, short, size

TIME_TO_ACT = 10
"""A warning is in time where it comes at least so many steps before the run fails."""
PER_1000 = 1.0
"""False alarms in a thousand steps that a threshold may have on the part that it is fitted to."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """An architecture on paper P's or K's task, learning rates around the one at which it begins to fail, and on P's
    task one that it can stand; `part` is `fit` or `test`."""

    task: str
    part: str
    fields: dict
    lrs: tuple[float, ...]
    twin: float | None = None


def _p(part: str, shape: dict, lrs: tuple, twin: float, **fields) -> Setting:
    return Setting("P", part, shape | dict(qk_norm="none") | fields, lrs, twin)


def _k(part: str, d_model: int, n_layers: int, lrs: tuple, **fields) -> Setting:
    return Setting("K", part, dict(d_model=d_model, n_layers=n_layers) | fields, lrs)


SETTINGS = {
    "P, Pre-LN, 32": _p("fit", size(32, 2), (0.14, 0.2, 0.28), 0.02),
    "P, qk-norm, 32": _p("fit", size(32, 2), (0.4, 0.8, 1.6), 0.02, qk_norm="head"),
    "P, Post-LN, 32": _p("fit", size(32, 2), (0.12, 0.24, 0.48), 0.02, norm="post_ln"),
    "K, No-Norm, 32": _k("fit", 32, 2, (0.012, 0.017, 0.024), norm="no_norm"),
    "K, Pre-LN, 32": _k("fit", 32, 2, (0.2, 0.4, 0.8)),
    "P, Pre-LN, 64": _p("test", size(64, 3), (0.05, 0.08, 0.12), 0.01),
}
NAMES = {"quick": ("P, Pre-LN, 32", "P, No-Norm, 32"), "gpu": ()}


def setting_name(run: Mapping) -> str:
    """The name in `SETTINGS` of a run's architecture and task."""
    task = "K" if run["data"] == "recall" else "P"
    fields = lambda setting: {"norm": "pre_ln", "qk_norm": "none", "residual": "plain"} | setting.fields  # noqa: E731
    return next(name for name, setting in SETTINGS.items() if setting.task == task
                and all(run[field] == value for field, value in fields(setting).items()))


def _tasks(scale: str) -> dict[str, RunConfig]:
    """Both tasks, 200 steps each at `cpu`; K's is chapter 14's, which can be learned in so few."""
    p = replace(short(scale), signals_every=2)
    k = RunConfig(**RECALL | dict(init="fan_in", diverge_grad_norm=None, vocab_size=16, seq_len=8, recall_pairs=3,
                                  steps=p.steps, warmup_steps=p.steps // 10, signals_every=2))
    return {"P": p, "K": k}


def near_failing(scale: str) -> list[RunConfig]:
    """Runs around the learning rate at which each architecture begins to fail, with every signal read at every second
    step, spectra and sharpness at every tenth."""
    read, found = dict(spectra_every=10, sharpness_every=10), []
    for setting in _settings(scale).values():
        lrs = [*setting.lrs, *([setting.twin] if setting.twin else [])]
        found += grid(replace(_tasks(scale)[setting.task], **setting.fields, **read), lr=lrs, seed=_seeds(scale))
    return found


def _seeds(scale: str) -> list[int]:
    return {"quick": [0, 1]}.get(scale, [0, 1, 2, 3])


def about(runs: pd.DataFrame) -> pd.DataFrame:
    """Of runs of this chapter, by key: setting `name`, `part`, `task`, `lr`, `seed`, armed `steps`, `failing_step`."""
    names = [setting_name(run) for run in runs.to_dict("records")]
    settings = [SETTINGS[name] for name in names]
    at = {(name, run.lr, run.seed): run.curves for name, run in zip(names, runs.itertuples(), strict=True)}
    rows = {}
    for name, setting, run in zip(names, settings, runs.itertuples(), strict=True):
        twin = at[name, setting.twin, run.seed] if setting.twin else None
        stop = None if run.status == "ok" else int(run.stop_step)
        fails = signals.failing_step(run.curves["signal_step"], run.curves["signal/loss"],
                                     twin and twin["signal/loss"], stop_step=stop)
        rows[run.key] = {"name": name, "part": setting.part, "task": setting.task, "lr": run.lr, "seed": run.seed,
                         "steps": (run.steps if stop is None else stop) - run.warmup_steps, "failing_step": fails}
    return pd.DataFrame.from_dict(rows, orient="index")


def thresholds(series: pd.DataFrame, about: pd.DataFrame) -> dict[str, float]:
    """By signal, the threshold fitted to the runs of the part `fit` that do not fail; leaves out what none of them
    read."""
    healthy = about[(about["part"] == "fit") & about["failing_step"].isna()]
    read = series[series["key"].isin(healthy.index)]
    return {name: signals.fit_threshold([run["value"] for _, run in group.groupby("key")], healthy["steps"].sum(),
                                        PER_1000) for name, group in read.groupby("signal", sort=False)}


def best_alarm(series: pd.DataFrame, about: pd.DataFrame) -> tuple[str, float]:
    """The signal and threshold that the actions use: of `SIGNALS`, that which warns most failing runs of the part
    `fit` in time; of equals the one with the longer mean lead."""
    known = about[about["part"] == "fit"]
    found = {}
    for name, threshold in thresholds(series, about).items():
        if name in SIGNALS:
            lead = signals.judge(series[series["signal"] == name], known, threshold)["lead"].dropna()
            found[name] = ((lead >= TIME_TO_ACT).mean(), lead.mean(), threshold)
    best = max(found, key=found.get)
    return best, found[best][2]
