"""Chapter 16, early warning: which signal warns first that a run will fail, how often falsely, and is there time to
act?

Learning rates were placed by stored runs of chapters 01, 04, 07 and 14 and by pilots of seeds 100 and 101, of which
failing and its step was looked at and no signal's lead. A run fails as its paper has it: on P's task from the step on
which its smoothed loss stays more than 0.4 nats (chapter 01's margin) above that of the same run at a learning rate
that it can stand; on K's from where it stays as far above its own best, until the end or a loss over 50. Thresholds are
fitted to one false alarm in a thousand steps on the part `fit`; claims are judged on the part `test`, of other
architectures, sizes and learning rates.

Power: with some 50 failing runs of the part `test` a median lead is known to about 7 steps, a share to 0.14, a
difference of shares or leads between signals, paired, to 0.17 or 7 steps; of sharpness and M1, which two in three runs
read, to 0.22. With some 40 runs that fail untreated, a share that an action saves is known to 0.15, and with 30 of them
a difference between actions, paired, to 0.2: smaller ones these runs leave undecided.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd

from .. import signals
from ..claims import Claim
from ..config import SIGNALS, RunConfig, grid, replace
from ..evaluate import Estimate, proportion_difference
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
    "P, Pre-LN, 32": _p("fit", size(32, 2), (0.14, 0.2, 0.3), 0.02),
    "P, qk-norm, 32": _p("fit", size(32, 2), (1.0, 1.4, 2.0), 0.02, qk_norm="head"),
    "P, Post-LN, 32": _p("fit", size(32, 2), (0.08, 0.13, 0.2), 0.02, norm="post_ln"),
    "K, No-Norm, 32": _k("fit", 32, 2, (0.03, 0.04, 0.055), norm="no_norm"),
    "K, Pre-LN, 32": _k("fit", 32, 2, (0.4, 0.55, 0.8)),
    "P, Pre-LN, 64": _p("test", size(64, 3), (0.06, 0.12, 0.2), 0.01),
    "P, RMSNorm, 32": _p("test", size(32, 2), (0.14, 0.22, 0.35), 0.02, norm="rmsnorm"),
    "P, SubLN, 32 x 4": _p("test", size(32, 4), (0.1, 0.17, 0.25), 0.02, norm="subln"),
    "P, No-Norm, 32": _p("test", size(32, 2), (0.04, 0.07, 0.1), 0.01, norm="no_norm"),
    "P, qk-norm, 48": _p("test", size(48, 2), (0.7, 1.1, 1.7), 0.02, qk_norm="head"),
    "K, No-Norm, 64": _k("test", 64, 2, (0.016, 0.022, 0.03), norm="no_norm"),
    "K, No-Norm, qk-norm, 32 x 4": _k("test", 32, 4, (0.02, 0.025, 0.03), norm="no_norm", qk_norm="head"),
    "K, No-Norm, scaled, 64": _k("test", 64, 2, (0.022, 0.03, 0.04), norm="no_norm", residual="scaled"),
    "K, Post-LN, 64": _k("test", 64, 2, (0.3, 0.42, 0.6), norm="post_ln"),
    "K, RMSNorm, 64": _k("test", 64, 2, (0.4, 0.57, 0.8), norm="rmsnorm"),
}
"""Widths, and depths where they are not 2 (3 at width 64 on P's task)."""
AT_QUICK = ("P, Pre-LN, 32", "K, No-Norm, 32", "P, No-Norm, 32")
TIMES_WIDER = {"gpu": 6, "paper": 16}
AT_GPU = ("P, Pre-LN, 32", "K, No-Norm, 32", "P, Pre-LN, 64", "K, No-Norm, 64")


def setting_name(run: Mapping) -> str:
    """The name in `SETTINGS` of a run's architecture and task."""
    task = "K" if run["data"] == "recall" else "P"
    for name, setting in SETTINGS.items():
        fields = {"norm": "pre_ln", "qk_norm": "none", "residual": "plain"} | setting.fields
        width = fields.pop("d_model")
        wide = run["d_model"] in [times * width for times in (1, *TIMES_WIDER.values())]
        if setting.task == task and wide and all(run[field] == value for field, value in fields.items()):
            return name
    raise ValueError(f"no setting of chapter 16 has norm {run['norm']!r} and d_model {run['d_model']}")


def _base(setting: Setting, scale: str) -> RunConfig:
    """The learning rate rises over the first half of the run, so that it passes slowly what the model can stand, and
    falls over the second. K's task is chapter 14's, which can be learned in so few steps."""
    p = replace(short(scale), eval_sequences=64)
    if scale == "gpu":  # most train one run at a time
        p = replace(p, steps=200)
    p = replace(p, warmup_steps=p.steps // 2, signals_every=max(2, p.steps // 100))
    k = RunConfig(**RECALL | dict(init="fan_in", diverge_grad_norm=None, vocab_size=16, seq_len=8, recall_pairs=3,
                                  steps=p.steps, warmup_steps=p.warmup_steps, eval_sequences=64,
                                  signals_every=p.signals_every))
    wider = dict(d_model=TIMES_WIDER.get(scale, 1) * setting.fields["d_model"])
    return replace(p if setting.task == "P" else k, **setting.fields | wider)


def _settings(scale: str) -> dict[str, Setting]:
    chosen = {"quick": AT_QUICK, "gpu": AT_GPU}.get(check_scale(scale), SETTINGS)
    return {name: SETTINGS[name] for name in chosen}


def _seeds(scale: str) -> range:
    return range(1 if scale == "quick" else 3)


def near_failing(scale: str) -> list[RunConfig]:
    """Runs around the learning rate at which each architecture begins to fail, with every signal read at every second
    step; of the first two seeds spectra and sharpness, which take longer than the steps, at every tenth."""
    found = []
    for setting in _settings(scale).values():
        base = _base(setting, scale)
        lrs = [*setting.lrs[scale == "quick":], *([setting.twin] if setting.twin else [])]
        for config in grid(base, lr=lrs, seed=_seeds(scale)):
            every = base.steps // 20 if config.seed < 2 else 0
            found.append(replace(config, spectra_every=every, sharpness_every=every))
    return found


ALARM = ("kurtosis_jump", 3.325517194919942)
"""What `best_alarm` says of the part `fit` of `near_failing`, before any run of `acted_on`."""
CLIP_AT = 100.0
"""Kimi K2's threshold of QK-clip."""
ACTIONS = {"halve the LR": dict(on_alarm="halve_lr"), "roll back": dict(on_alarm="roll_back"),
           "QK-clip": dict(on_alarm="qk_clip", qk_clip=CLIP_AT)}
TIMES = ("at the alarm", "at a random step", "from the start")


def acted(config: RunConfig, action: str, time: str) -> RunConfig | None:
    """The run with an action at a time of `TIMES`; None where there is none such: of QK-clip under qk-norm, and of
    rolling back from the start."""
    if (action == "QK-clip" and config.qk_norm != "none") or (action, time) == ("roll back", "from the start"):
        return None
    if time == "from the start":
        fields = dict(qk_clip=CLIP_AT) if action == "QK-clip" else dict(lr=config.lr / 2)
        return replace(config, signals_every=0, **fields)
    if time == "at a random step":
        return replace(config, alarm="step", alarm_above=float(random_step(config)), signals_every=0, **ACTIONS[action])
    return replace(config, alarm=ALARM[0], alarm_above=ALARM[1], **ACTIONS[action])


def random_step(config: RunConfig) -> int:
    """Uniform over the run from when alarms are armed, from the run's own seed, learning rate and size."""
    seed = [16, config.seed, round(1e6 * config.lr), config.d_model, config.n_layers]
    return int(np.random.default_rng(seed).integers(config.signals_every * signals.LEAST, config.steps))


def untreated(scale: str) -> list[RunConfig]:
    """The runs of `near_failing` of the part `test` that actions are tried on, as they are without the slow readings:
    those of the two higher learning rates of each architecture."""
    return [config for setting in _settings(scale).values() if setting.part == "test"
            for config in grid(_base(setting, scale), lr=setting.lrs[-2:], seed=_seeds(scale))]


def times(config: RunConfig) -> tuple[str, ...]:
    """When actions are tried on a run: of each architecture's middle learning rate at the alarm alone."""
    highest = max(lr for lr in SETTINGS[setting_name(vars(config))].lrs) == config.lr
    return TIMES if highest else TIMES[:1]


def acted_on(scale: str) -> list[RunConfig]:
    """Each of `untreated` with every action at each of its `times`."""
    found = [acted(config, action, time) for config in untreated(scale) for action in ACTIONS for time in times(config)]
    return [config for config in found if config is not None]


STUDIES = (near_failing, acted_on)


def about(runs: pd.DataFrame) -> pd.DataFrame:
    """Of runs of this chapter, by key: setting `name`, `part`, `task`, `lr`, `seed`, `steps` taken, `failing_step`."""
    names = [setting_name(run) for run in runs.to_dict("records")]
    settings = [SETTINGS[name] for name in names]
    at = {(name, run.lr, run.seed): run.curves for name, run in zip(names, runs.itertuples(), strict=True)}
    rows = {}
    for name, setting, run in zip(names, settings, runs.itertuples(), strict=True):
        twin = at[name, setting.twin, run.seed]["loss"] if setting.twin else None
        stop = None if run.status == "ok" else int(run.stop_step)
        fails = signals.failing_step(run.curves["step"], run.curves["loss"], twin, stop_step=stop)
        rows[run.key] = {"name": name, "part": setting.part, "task": setting.task, "lr": run.lr, "seed": run.seed,
                         "steps": run.steps if stop is None else stop, "failing_step": fails}
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


MONITORED = ("attention_logit_max", "output_kurtosis", "gradient_norm", "log_z")
"""Signals that a monitor reads in the same unit, the worst layer's."""


def informs(judged: pd.DataFrame) -> Estimate | None:
    """Share of failing runs that an alarm warns minus the share of others in which it goes off, of `signals.judge`;
    None where there are not both."""
    fails = judged["lead"].notna()
    if fails.all() or not fails.any():
        return None
    hits = judged.loc[fails, "warned"], judged.loc[~fails, "false_alarms"] > 0
    return proportion_difference(*((int(of.sum()), len(of)) for of in hits))


def monitored(series: pd.DataFrame, about: pd.DataFrame) -> dict[str, float]:
    """What the monitor's default alarms take from this chapter: of `MONITORED`, the fitted thresholds (two digits) of
    those that inform on the part `test`, the interval of `informs` lying above 0."""
    fitted, unseen = thresholds(series, about), about[about["part"] == "test"]
    found = {name: informs(signals.judge(series[series["signal"] == name], unseen, fitted[name]))
             for name in MONITORED if name in fitted}
    return {name: float(f"{fitted[name]:.2g}") for name, gain in found.items() if gain and gain.low > 0}


def false_alarms(series: pd.DataFrame, about: pd.DataFrame, signal: str, threshold: float) -> float:
    """How many a threshold that was not fitted here gives in a thousand steps of all runs that do not fail."""
    calm = about[about["failing_step"].isna()]
    judged = signals.judge(series[series["signal"] == signal], calm, threshold)
    return 1000 * judged["false_alarms"].sum() / calm["steps"].sum()


CLAIMS = (
    Claim("W.kurtosis", "trainscope 1.1", "activation kurtosis warns 14 to 18 steps before the loss diverges",
          "14 to 18 steps, mean 16.7, one scenario",
          "median lead over failing runs of the kurtosis's jump over its own past (steps; 0 where it does not warn)",
          ">", 14.0),
    Claim("W.cusum", "trainscope 1.1", "CUSUM warns 9 to 11 steps before", "9 to 11 steps, mean 9.7, one scenario",
          "median lead over failing runs of CUSUM of the gradient norm (steps; 0 where it does not warn)", ">", 9.0),
    Claim("W.order", "trainscope 1.1", "kurtosis leads by more than CUSUM", "16.7 against 9.7 steps",
          "mean lead over failing runs, kurtosis's jump minus CUSUM of the gradient norm (steps)", ">", 0.0),
    Claim("E.logits-first", "P Fig. 2, 9", "the attention logit warns before the loss does",
          "all runs above 1e4 diverged",
          "mean lead over failing runs without qk-norm, largest attention logit minus loss spike (steps)", ">", 0.0),
    Claim("E.in-time", "ours", "the best signal warns most failing runs in time", "not tested",
          "share of failing runs that the fitting part's best signal warns 10 steps ahead or more", ">", 0.5),
    Claim("E.carries-over", "ours", "its threshold carries over to other architectures", "not tested",
          "its false alarms per 1000 steps of runs that do not fail (fitted to 1)", "<", 2.0),
    Claim("E.informs", "ours", "its alarm tells failing runs from others", "not tested",
          "share of failing runs it warns minus share of others with an alarm", ">", 0.25),
    Claim("S.edge", "Cohen et al. 2022", "AdamW trains at the edge of its stability", "sharpness near 38 / lr",
          "mean log10 of sharpness over 38 / lr in runs that do not fail, while the LR is at half its peak or more",
          "within", 0.3),
    Claim("S.warns", "ours", "sharpness warns of failing", "not tested",
          "share of failing runs that sharpness warns minus share of others with an alarm", ">", 0.0),
    Claim("M.warns", "ours", "near-unit mass along the way warns of failing", "K Table 2: AUROC 0.995 at the start",
          "share of failing runs that M1 warns minus share of others with an alarm", ">", 0.0),
    Claim("A.halve", "ours", "halving the learning rate at the alarm saves most runs", "not tested",
          "share of runs, failing untreated, that do not fail", ">", 0.5),
    Claim("A.blind", "ours", "it saves more than halving at a random step", "not tested",
          "share saved, at the alarm minus at a random step", ">", 0.0),
    Claim("A.start", "ours", "half the learning rate from the start saves more than the alarm", "not tested",
          "share saved, from the start minus at the alarm", ">", 0.0),
    Claim("A.back", "ours", "rolling back at the alarm saves more than halving alone", "not tested",
          "share saved, rolling back minus halving, at the alarm", ">", 0.0),
    Claim("A.clip", "ours", "without qk-norm, QK-clip from the alarm on saves more than halving", "not tested",
          "share saved of runs without qk-norm, QK-clip minus halving, at the alarm", ">", 0.0),
    Claim("A.cost", "ours", "the alarm costs nothing where the run would not have failed", "not tested",
          "final loss of runs that do not fail untreated, halving at the alarm minus untreated (nats)", "within", 0.05),
)
