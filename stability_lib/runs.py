"""`ensure`: train what is missing, keep every finished run (see `store`), return one tidy row per run."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import math
import multiprocessing
import numbers
import os
import pkgutil
import platform
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable

import loky
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import __version__, data, models, replicas
from .cluster import check_name, check_version, lend
from .config import SCHEMA, RunConfig, from_dict, non_default, replace, run_key
from .store import (  # noqa: F401 (some only for those who use this module)
    DENSE,
    OUTCOME,
    MissingRuns,
    Store,
    StoreError,
    check_new,
    commit,
    keyed,
    load,
    locate,
    project_root,
    promote,
    read,
    reference_path,
    steps_of,
    waits,
    writer,
)
from .train import RunResult, prepare, resolve_device, train_run

CURVE_POINTS = 100
"""Curves recorded at every step (`DENSE`) are thinned to about this many points in the store."""
HEADLESS = "STABILITY_LIB_HEADLESS"
"""Set to 1 (the batch runner does) to silence progress bars."""
FRESH_SINCE = "STABILITY_LIB_FRESH_SINCE"
"""Set to an ISO time (the batch runner does): `recompute` leaves alone what was trained since, so that chapters which
share runs train them once."""


def ensure(configs: Iterable[RunConfig], study: str | Store, *, device: str = "cpu",
           executor: concurrent.futures.Executor | None = None, workers: int | None = None,
           max_new: int | None = None, recompute: bool = False, cluster: str = "") -> pd.DataFrame:
    """One row per config, in order, training only the runs that the store lacks.

    Args:
        study: a study's name, or a `Store`.
        device: `auto`, `cpu`, `cuda` or `mps`, for missing runs; cached runs are used whatever trained them. On an
            accelerator runs that differ only in numbers train together, see `replicas`.
        executor: any `concurrent.futures.Executor`; threads take turns, as a process trains one run at a time; default
            loky processes with one CPU thread each.
        workers: how many default processes; default one per core on the CPU, one on an accelerator.
        max_new: raise `MissingRuns` before any training if more runs than this are missing.
        recompute: train every run again (see FRESH_SINCE); the new rows replace the stored ones.
        cluster: train on the workers of a Dask scheduler (`tcp://host:8786`), or of `local:4`: see `cluster.lend`.

    Raises `StoreError`, `ClusterError`, `DataError`, `ValueError` or `TypeError` before any training where store,
    cluster, data, config or an option cannot serve; a run that fails for another reason, or comes from another version
    of this library, stops the sweep. Finished runs are kept whatever happens.
    """
    _check_options(executor, workers, max_new, recompute, cluster)
    store, asked = _store(study), keyed(configs)
    wanted = dict(asked)
    if waits(store.local):
        with writer(store.local):
            pass
    known = load(store)
    fresh = known if not recompute else {key for key in known.keys() & wanted if _is_fresh(known[key])}
    missing = {key: config for key, config in wanted.items() if key not in fresh}
    name = store.local.stem
    if not missing:
        print(f"{name}: all {len(wanted)} runs are cached")
        return frame([known[key] for key, _ in asked])
    if max_new is not None and len(missing) > max_new:
        raise MissingRuns(f"{name}: {len(missing)} of {len(wanted)} runs are not cached and max_new allows {max_new}: "
                          "raise max_new, or recompute='missing' in a notebook, to train them")
    shapes = {replace(c, seed=0, lr=1.0): c for c in missing.values()}.values()
    with (lend(cluster, shapes, device) if cluster else _here(shapes, device, executor, workers)) as (
            executor, device, workers), writer(store.local) as file:
        if not recompute:
            known |= file.rows
            missing = {key: config for key, config in missing.items() if key not in known}
        if missing:
            about = f"{workers} workers of {cluster}" if cluster else "about " + readable(
                estimate_seconds(list(missing.values()), device) / workers)
            print(f"{name}: {len(wanted) - len(missing)} of {len(wanted)} runs are cached, training "
                  f"{len(missing)} on {device}, {about}")

        def keep(rows: dict[str, dict]) -> None:
            known.update(rows)
            file.write(rows)

        _train(missing, keep, device, executor, workers)
    return frame([known[key] for key, _ in asked])


def _store(study: str | Store) -> Store:
    return study if isinstance(study, Store) else locate(study)


@contextlib.contextmanager
def _here(configs, device, executor, workers):
    """What `cluster.lend` gives, of this machine; its `device` is asked for the same."""
    device = resolve_device(device)
    for config in configs:
        prepare(config, device)
    yield executor, device, workers or _default_workers(device)


def _check_options(executor, workers, max_new, recompute, cluster="") -> None:
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be True or False, got {type(recompute).__name__} {recompute!r} (a notebook's "
                        "'missing' is False here, its 'none' is max_new=0)")
    if executor is not None and not isinstance(executor, concurrent.futures.Executor):
        raise TypeError(f"executor must be a concurrent.futures.Executor, got {type(executor).__name__} {executor!r}: "
                        "leave it out for loky processes, and for Dask give cluster='tcp://HOST:8786'")
    if cluster != "":
        check_name(cluster)
        if executor is not None or workers is not None:
            raise ValueError(f"cluster {cluster!r} has its own workers: leave out executor and workers")
    for name, value, least in (("workers", workers, 1), ("max_new", max_new, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise TypeError(f"{name} must be a whole number or None, got {type(value).__name__} {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def frame(rows: list[dict]) -> pd.DataFrame:
    """Tidy rows: key, every config field, `n_params`, `status`, `stop_step`, `reason`, `loss_init`, `loss_final`,
    `accuracy_final` (NaN in runs from before it was recorded), the dicts `curves` (see `curve`), `patterns` and
    `extremes` (smallest and largest finite value of each `DENSE` curve over all steps; None in older runs), `seconds`,
    `device`, and the dict `provenance`."""
    table = []
    for row in rows:
        config, made = from_dict(row["config"]), row["provenance"]
        table.append({"key": row["key"], **dataclasses.asdict(config), "n_params": models.n_params(config),
                      **{name: row[name] for name in OUTCOME}, "accuracy_final": row.get("accuracy_final"),
                      "extremes": row.get("extremes"), "seconds": made["seconds"], "device": made["device"],
                      "provenance": made})
    columns = ["key", *(field.name for field in dataclasses.fields(RunConfig)), "n_params", *OUTCOME,
               "accuracy_final", "extremes", "seconds", "device", "provenance"]
    return pd.DataFrame(table, columns=columns).astype({"loss_init": float, "loss_final": float,
                                                        "accuracy_final": float})


def curve(runs: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One row per run and recorded step: the run's scalar columns, `step` and `value` of one quantity.

    What is recorded at every step (`DENSE`) is thinned to about `CURVE_POINTS` of them, both ends among them; its
    extremes over all steps are in the column `extremes`, see `peak`. Raises `KeyError` that lists what was recorded
    where no run has the quantity.
    """
    steps = steps_of(quantity)
    have = runs[_recorded(runs, quantity)]
    scalars = have.drop(columns=["curves", "patterns", "extremes", "provenance"])
    long = scalars.assign(step=[c[steps] for c in have["curves"]], value=[c[quantity] for c in have["curves"]])
    return long.explode(["step", "value"]).astype({"step": int, "value": float}).reset_index(drop=True)


def reading(runs: pd.DataFrame, quantity: str, at: int = -1) -> pd.Series:
    """Per run, the finite value number `at` (0: the first, -1: the last) of a curve; NaN where the run has none.

    Of a `DENSE` curve only the kept steps count (see `curve`). Raises `KeyError` as `curve` does.
    """
    _recorded(runs, quantity)
    finite = [[value for value in curves.get(quantity, ()) if value is not None] for curves in runs["curves"]]
    return pd.Series([values[at] if values else math.nan for values in finite], runs.index, float, quantity)


def _recorded(runs: pd.DataFrame, quantity: str) -> list[bool]:
    """Which runs recorded a quantity; `KeyError` that lists what was recorded where none did."""
    have = [quantity in curves for curves in runs["curves"]]
    if not any(have):
        recorded = sorted({name.split("/")[0] for curves in runs["curves"] for name in curves if "step" not in name})
        raise KeyError(f"no run recorded {quantity!r}: recorded are {', '.join(recorded)} (per block as name/block0)")
    return have


def peak(runs: pd.DataFrame, quantity: str) -> pd.Series:
    """Per run, the largest finite value over training of all curves called `quantity` or `quantity/...`; NaN where the
    run recorded none.

    It is that of all steps where every step is recorded (`DENSE`), else of those probed. Runs from before `extremes`
    were recorded kept a thinned `DENSE` curve only: theirs may be too low, and a `UserWarning` counts them.
    """
    def largest(curves, extremes):
        if extremes and quantity in extremes:
            return extremes[quantity][1]
        values = [v for name, curve in curves.items() if name.split("/")[0] == quantity or name == quantity
                  for v in curve if v is not None]
        return max(values, default=math.nan)

    rows = list(zip(runs["curves"], runs["extremes"], strict=True))
    if quantity in DENSE:
        thinned = sum(extremes is None and len(curves["step"]) <= curves["step"][-1] for curves, extremes in rows)
        if thinned:
            warnings.warn(f"{thinned} of {len(runs)} runs were stored before extremes were recorded: their peak of "
                          f"{quantity} is that of a thinned curve, and may be too low (recompute=True trains them "
                          "again)", stacklevel=2)
    return pd.Series([largest(*row) for row in rows], runs.index, float, quantity)


def plan(configs: Iterable[RunConfig], study: str | Store, device: str = "cpu", workers: int | None = None,
         recompute: bool = False) -> dict:
    """How many runs are `cached` and `missing`, and the missing ones' `flops` and `seconds` on this machine.

    Raises `ValueError` where the device is not here: nothing is said of one that was not measured.
    """
    _check_options(None, workers, None, recompute)
    store, configs = _store(study), dict(keyed(configs))
    known = {} if recompute else load(store)
    missing = [config for key, config in configs.items() if key not in known]
    device = resolve_device(device)
    workers = workers or _default_workers(device)
    return {"cached": len(configs) - len(missing), "missing": len(missing),
            "flops": sum(models.training_flops(config, data.vocab_size(config)) for config in missing),
            "seconds": estimate_seconds(missing, device) / workers if missing else 0.0}


def estimate_seconds(configs: list[RunConfig], device: str) -> float:
    """About how long `configs` take in one process on this device, from two short measurements on it: on the CPU one
    after the other, at a + b FLOPs per step; on an accelerator with replicas, see `replicas.reckoned_seconds`. What
    `models.training_flops` does not count comes on top. Raises `ValueError` where there is no such device."""
    device = resolve_device(device)
    if device != "cpu":
        return replicas.reckoned_seconds(configs, replicas.measured(device))
    overhead, per_flop = _step_cost(device)
    return sum(config.steps * overhead + per_flop * models.training_flops(config, data.vocab_size(config))
               for config in configs)


@functools.lru_cache
def _step_cost(device: str) -> tuple[float, float]:
    flops, seconds = [], []
    for shape in (dict(d_model=16, n_layers=1, n_heads=1), dict(d_model=96, n_layers=3, n_heads=6)):
        short, long = (RunConfig(**shape, warmup_steps=0, steps=steps, eval_sequences=1, probe_every=0)
                       for steps in (3, 10))
        train_run(short, device)  # pays for what only the first run of a process or shape costs
        taken = train_run(long, device).seconds - train_run(short, device).seconds
        flops.append(models.training_flops(long, data.vocab_size(long)) / long.steps)
        seconds.append(max(taken, 1e-6) / (long.steps - short.steps))
    per_flop = max((seconds[1] - seconds[0]) / (flops[1] - flops[0]), 1e-15)
    return max(0.0, seconds[0] - per_flop * flops[0]), per_flop


def _default_workers(device: str) -> int:
    return loky.cpu_count() if device == "cpu" else 1


def readable(seconds: float) -> str:
    """A duration in the largest unit that fits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"


def _is_fresh(row: dict) -> bool:
    since = os.environ.get(FRESH_SINCE)
    return bool(since) and row["provenance"]["date"] >= since


# training what is missing

def _train(missing: dict[str, RunConfig], keep: Callable[[dict[str, dict]], None], device: str,
           executor: concurrent.futures.Executor | None, workers: int) -> None:
    """Train the missing runs and `keep` each row as it finishes. A killed worker of the default pool is replaced and
    its run retried, until a pool dies twice without finishing anything."""
    todo = dict(sorted(missing.items(), key=lambda item: -models.training_flops(item[1], 0)))
    barren, sweep = 0, uuid.uuid4().hex
    with tqdm(total=len(todo), unit="run", disable=os.environ.get(HEADLESS) == "1") as bar:

        def collect(rows: dict[str, dict]) -> None:
            keep(rows)
            for key in rows:
                del todo[key]
            bar.update(len(rows))

        while todo:
            pool = executor or loky.get_reusable_executor(
                max_workers=min(workers, len(missing)), initializer=_start_worker, initargs=(os.getpid(),),
                env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
            futures, before = {}, len(todo)
            try:
                if executor is not None:
                    _check_version(executor)
                for batch in _batches(todo, device, executor, workers):
                    given = [todo[key] for key in batch]
                    given = given if len(batch) > 1 else given[0]
                    futures[pool.submit(_work, given, device, os.getpid(), sweep)] = batch
                for future in concurrent.futures.as_completed(futures):
                    batch = futures[future]
                    collect(_result(future, {key: todo[key] for key in batch}))
                    del futures[future]  # Dask trains again what a dead worker held, unless nobody holds it here
            except BaseException as error:
                if executor is None:
                    pool.shutdown(wait=False, kill_workers=True)  # it chokes on futures that were cancelled before
                else:
                    for future in futures:
                        future.cancel()
                collect({key: row for future, batch in futures.items() for key, row in _fitting(future, batch).items()
                         if key in todo})
                if not isinstance(error, concurrent.futures.BrokenExecutor):
                    raise
                barren = 0 if len(todo) < before else barren + 1
                if executor is not None or barren == 2:
                    remedy = "give a fresh executor" if executor else "set fewer workers if memory is short"
                    raise RuntimeError(f"worker processes died (killed, or out of memory) with {len(todo)} runs to go; "
                                       f"finished runs are kept: call again, {remedy}") from None


def _check_version(executor: concurrent.futures.Executor) -> None:
    """Ask one of the workers for its version, in words that it understands without the library."""
    try:
        version = executor.submit(pkgutil.resolve_name, f"{__package__}:__version__").result()
    except ImportError as error:
        version = error
    check_version("a worker of the executor", version)


def _batches(todo: dict[str, RunConfig], device: str, executor: concurrent.futures.Executor | None,
             workers: int) -> list[list[str]]:
    """The keys of runs that are trained together: replicas on an accelerator, on the CPU each run by itself. How many
    fit is measured where they will be trained."""
    if device == "cpu":
        return [[key] for key in todo]
    key_of = {config: key for key, config in todo.items()}
    asked = (replicas.batches, [*key_of], device, workers)
    found = executor.submit(*asked).result() if executor else replicas.batches(*asked[1:])
    if sorted(key_of[config] for batch in found for config in batch) != sorted(todo):
        raise RuntimeError("a worker did not group the runs it was asked to: install this stability_lib there")
    return [[key_of[config] for config in batch] for batch in found]


def _fitting(future: concurrent.futures.Future, keys: list[str]) -> dict[str, dict]:
    """The finished rows among those of some keys that are what was asked for."""
    if not future.done() or future.cancelled() or future.exception() is not None:
        return {}
    found = {}
    for key, row in zip(keys, _listed(future), strict=False):
        with contextlib.suppress(StoreError):
            check_new(row, key)
            found[key] = row
    return found


def _listed(future: concurrent.futures.Future) -> list[dict]:
    found = future.result()
    return found if isinstance(found, list) else [found]


def _result(future: concurrent.futures.Future, batch: dict[str, RunConfig]) -> dict[str, dict]:
    """The rows of runs that were trained together, by key."""
    try:
        rows = dict(zip(batch, _listed(future), strict=True))
    except concurrent.futures.BrokenExecutor:
        raise
    except Exception as error:
        named = "; ".join(str(non_default(config)) for config in batch.values())
        raise RuntimeError(f"the run{'s' * (len(batch) > 1)} {named} failed with {type(error).__name__}: {error}; "
                           "finished runs are kept") from error
    for key, row in rows.items():
        check_new(row, key)
    return rows


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _exit_with(parent)


@functools.cache
def _exit_with(parent: int) -> None:
    """End this worker when the process that started it is gone."""
    def watch():
        try:
            if os.getppid() != parent:  # multiprocessing's fork server lies between
                multiprocessing.parent_process().join()
            while os.getppid() == parent:
                time.sleep(0.5)
        finally:
            os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _work(given: RunConfig | list[RunConfig], device: str, sweeper: int, sweep: str) -> dict | list[dict]:
    """Train a run where this is called and return its row, or replicas and return the list of theirs.

    A worker that the process `sweeper` started ends with its parent: idle ones of the standard library would stay.
    `sweep` makes the call another one than any before it: Dask answers the same call with what it remembers of it,
    be it that it was cancelled.
    """
    starter = multiprocessing.parent_process()
    if starter is not None and starter.pid == sweeper:
        _exit_with(sweeper)
    if isinstance(given, RunConfig):
        return to_row(train_run(given, device), device)
    return [to_row(result, device) for result in replicas.train_replicas(given, device)]


def to_row(result: RunResult, device: str) -> dict:
    """A result as the store keeps it: thinned curves with 5 digits, non-finite values as null, their extremes before
    thinning, and provenance."""
    every = max(1, math.ceil(len(result.curves["step"]) / CURVE_POINTS))
    last = len(result.curves["step"]) - 1
    keep = sorted({*range(0, last + 1, every), last})
    dense = DENSE | {"step"}
    curves = {name: [_rounded(values[i]) for i in keep] if name in dense else [_rounded(v) for v in values]
              for name, values in result.curves.items()}
    finite = lambda value: value if math.isfinite(value) else None  # noqa: E731
    reached = {name: [v for v in result.curves[name] if math.isfinite(v)] for name in sorted(DENSE & {*result.curves})}
    return {"schema": SCHEMA, "key": run_key(result.config), "config": non_default(result.config),
            "status": result.status, "stop_step": result.stop_step, "reason": result.reason,
            "loss_init": finite(result.loss_init), "loss_final": finite(result.loss_final),
            "accuracy_final": _rounded(result.accuracy_final), "curves": curves,
            "extremes": {name: [_rounded(min(v)), _rounded(max(v))] for name, v in reached.items() if v},
            "patterns": [[[round(p, 3) for p in line] for line in pattern] for pattern in result.patterns],
            "provenance": {**_machine(), "device": device, "seconds": round(result.seconds, 2),
                           "replicas": result.replicas,
                           "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}}


def _rounded(value: float) -> float | None:
    return value if isinstance(value, int) else float(f"{value:.5g}") if math.isfinite(value) else None


@functools.cache
def _machine() -> dict:
    return {"torch": torch.__version__, "python": platform.python_version(), "stability_lib": __version__,
            "commit": commit(), "platform": platform.platform()}
