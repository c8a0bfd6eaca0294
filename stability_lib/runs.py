"""The run store and `ensure`: train what is missing, keep every finished run, return one tidy row per run.

A study has a committed reference, `data/runs/<study>.jsonl`, and a local file beside it that git ignores and
that receives every new run. One line of JSON is one run. Only the parent process writes, one fsynced line as
each run ends, so a killed sweep loses no more than the runs in flight.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock
import loky
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import __version__, data, models
from .config import SCHEMA, RunConfig, from_dict, non_default, replace, run_key
from .train import SPECTRA, RunResult, resolve_device, train_run

DENSE = {"loss", "gradient_norm", "penalty", "skipped_layers"}
"""Curves recorded at every step."""
CURVE_POINTS = 100
"""Those are thinned to about this many points in the store."""
MIN_FREE_BYTES = 20_000_000
HEADLESS = "STABILITY_LIB_HEADLESS"
"""Set to 1 (the batch runner does) to silence progress bars."""
FRESH_SINCE = "STABILITY_LIB_FRESH_SINCE"
"""Set to an ISO time (the batch runner does): `recompute` leaves alone what was trained since, so that chapters which
share runs train them once."""
OUTCOME = ("status", "stop_step", "reason", "loss_init", "loss_final", "curves", "patterns")
"""What every row holds besides schema, key, config and provenance (newer ones also `accuracy_final`)."""


class StoreError(RuntimeError):
    """The store cannot be read or written; the message names the file and the remedy."""


class MissingRuns(RuntimeError):
    """More runs are missing than `max_new` allows."""


@dataclasses.dataclass(frozen=True)
class Store:
    """Where a study's runs lie: `local` receives new runs, `reference` is only read."""

    local: Path
    reference: Path | None = None


def project_root() -> Path:
    """The checkout that holds the package, or the working directory where the package is installed without one."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def locate(study: str) -> Store:
    """The store of a study. The environment variable STABILITY_LIB_RUNS names another folder for local runs (a relative
    one lies under `project_root`, so that notebooks and scripts mean the same)."""
    folder = project_root() / "data" / "runs"
    local = project_root() / (os.environ.get("STABILITY_LIB_RUNS") or folder / "local")
    return Store(local / f"{study}.jsonl", folder / f"{study}.jsonl")


def read(path: Path) -> dict[str, dict]:
    """The rows of one store file by key; a later line replaces an earlier one with the same key.

    A torn last line (no line end) is skipped with a warning. Raises `StoreError` that names file and line where a
    line is corrupt, was edited so that its key no longer fits, or comes from a newer version.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error.strerror}): make it a file you may read") from error
    if rest:
        warnings.warn(f"{path}: the last line is torn (a run was cut off while it was written) and is skipped",
                      stacklevel=2)
    rows = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
            schema, key, fields = int(row["schema"]), row["key"], row["config"]
            if schema == SCHEMA and (absent := {*OUTCOME, "provenance"} - set(row)):
                raise ValueError(f"it lacks {', '.join(sorted(absent))}")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{where} is corrupt ({error}): delete that line, its run will be trained again") from None
        if schema > SCHEMA:
            raise StoreError(f"{where} was written by a newer version (schema {schema}, this one reads "
                             f"up to {SCHEMA}): upgrade stability_lib")
        if schema == SCHEMA:
            try:
                fits = run_key(from_dict(fields)) == key
            except (TypeError, ValueError) as error:
                raise StoreError(f"{where}: {error}; upgrade stability_lib or delete that line") from None
            if not fits:
                raise StoreError(f"{where}: the config does not belong to the key {key}: restore or delete that line")
            rows[key] = row
    return rows


def load(store: Store) -> dict[str, dict]:
    """All rows of a study by key; a local run takes precedence over the reference."""
    return (read(store.reference) if store.reference else {}) | read(store.local)


def ensure(configs: Iterable[RunConfig], study: str | Store, *, device: str = "cpu",
           executor: concurrent.futures.Executor | None = None, workers: int | None = None,
           max_new: int | None = None, recompute: bool = False) -> pd.DataFrame:
    """One row per config, in order, training only the runs that the store lacks.

    Args:
        study: a study's name, or a `Store`.
        device: `auto`, `cpu`, `cuda` or `mps`, for missing runs; cached runs are used whatever trained them.
        executor: any `concurrent.futures.Executor` (one of threads should have one worker: torch's number of threads
            belongs to the process); default loky processes with one CPU thread each.
        workers: how many default processes; default one per core on the CPU, one on an accelerator.
        max_new: raise `MissingRuns` before any training if more runs than this are missing.
        recompute: train every run again (see FRESH_SINCE); the new rows replace the stored ones.

    Raises `StoreError`, `DataError` or `ValueError` before any training where store, data or config cannot serve;
    a run that fails for another reason stops the sweep. Finished runs are kept whatever happens.
    """
    store = study if isinstance(study, Store) else locate(study)
    keyed = [(run_key(config), config) for config in configs]
    wanted = dict(keyed)
    if _unsaved.get(store.local):
        with _only_trainer(store.local):
            _write_unsaved(store.local)
    known = load(store)
    fresh = known if not recompute else {key for key in known.keys() & wanted if _is_fresh(known[key])}
    missing = {key: config for key, config in wanted.items() if key not in fresh}
    name = store.local.stem
    if not missing:
        print(f"{name}: all {len(wanted)} runs are cached")
        return frame([known[key] for key, _ in keyed])
    device = resolve_device(device)
    if max_new is not None and len(missing) > max_new:
        raise MissingRuns(f"{name}: {len(missing)} of {len(wanted)} runs are not cached and max_new allows {max_new}: "
                          "raise max_new, or recompute='missing' in a notebook, to train them")
    workers = workers or _default_workers(device)
    for config in {replace(c, seed=0, lr=1.0): c for c in missing.values()}.values():
        data.vocab_size(config), data.validation(config)
    with _only_trainer(store.local):
        if not recompute:
            known = load(store)
            missing = {key: config for key, config in missing.items() if key not in known}
        if missing:
            about = estimate_seconds(list(missing.values()), device) / workers
            print(f"{name}: {len(wanted) - len(missing)} of {len(wanted)} runs are cached, training "
                  f"{len(missing)} on {device}, about {readable(about)}")

        def keep(rows: list[dict]) -> None:
            finished = {row["key"]: row for row in rows}
            known.update(finished)
            _unsaved.setdefault(store.local, {}).update(finished)
            _write_unsaved(store.local)

        _train(missing, keep, device, executor, workers)
    return frame([known[key] for key, _ in keyed])


def frame(rows: list[dict]) -> pd.DataFrame:
    """Tidy rows: key, every config field, `n_params`, `status`, `stop_step`, `reason`, `loss_init`, `loss_final`,
    `accuracy_final` (NaN in runs from before it was recorded), the dicts `curves` (see `curve`) and `patterns`,
    `seconds`, `device`, and the dict `provenance`."""
    table = []
    for row in rows:
        config, made = from_dict(row["config"]), row["provenance"]
        table.append({"key": row["key"], **dataclasses.asdict(config), "n_params": models.n_params(config),
                      **{name: row[name] for name in OUTCOME}, "accuracy_final": row.get("accuracy_final"),
                      "seconds": made["seconds"], "device": made["device"], "provenance": made})
    columns = ["key", *(field.name for field in dataclasses.fields(RunConfig)), "n_params", *OUTCOME,
               "accuracy_final", "seconds", "device", "provenance"]
    return pd.DataFrame(table, columns=columns).astype({"loss_init": float, "loss_final": float,
                                                        "accuracy_final": float})


def curve(runs: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One row per run and recorded step: the run's scalar columns, `step` and `value` of one quantity.

    Raises `KeyError` that lists what was recorded where no run has the quantity.
    """
    steps = "step" if quantity in DENSE else "spectra_step" if quantity.split("/")[0] in SPECTRA else "probe_step"
    have = runs[_recorded(runs, quantity)]
    scalars = have.drop(columns=["curves", "patterns", "provenance"])
    long = scalars.assign(step=[c[steps] for c in have["curves"]], value=[c[quantity] for c in have["curves"]])
    return long.explode(["step", "value"]).astype({"step": int, "value": float}).reset_index(drop=True)


def reading(runs: pd.DataFrame, quantity: str, at: int = -1) -> pd.Series:
    """Per run, the finite value number `at` (0: the first, -1: the last) of a curve; NaN where the run has none.

    Raises `KeyError` as `curve` does.
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
    run recorded none."""
    def largest(curves):
        values = [v for name, curve in curves.items() if name.split("/")[0] == quantity or name == quantity
                  for v in curve if v is not None]
        return max(values, default=math.nan)
    return runs["curves"].map(largest).rename(quantity)


def plan(configs: Iterable[RunConfig], study: str | Store, device: str = "cpu", workers: int | None = None,
         recompute: bool = False) -> dict:
    """How many runs are `cached` and `missing`, and the missing ones' `flops` and `seconds` on this machine."""
    store = study if isinstance(study, Store) else locate(study)
    configs = {run_key(config): config for config in configs}
    known = {} if recompute else load(store)
    missing = [config for key, config in configs.items() if key not in known]
    device = resolve_device(device)
    workers = workers or _default_workers(device)
    return {"cached": len(configs) - len(missing), "missing": len(missing),
            "flops": sum(models.training_flops(config, data.vocab_size(config)) for config in missing),
            "seconds": estimate_seconds(missing, device) / workers if missing else 0.0}


def promote(study: str, configs: Iterable[RunConfig], rows: dict[str, dict]) -> int:
    """Make those of `rows` (from `read` or `load`) that belong to `configs` the committed reference, in grid order.

    Returns how many. Raises `MissingRuns` and leaves the reference alone where one of them is missing.
    """
    keys = list(dict.fromkeys(run_key(config) for config in configs))
    absent = [key for key in keys if key not in rows]
    if absent:
        raise MissingRuns(f"{len(absent)} of the {len(keys)} runs of {study!r} are missing: train them, then promote")
    target = locate(study).reference
    draft = target.with_suffix(".tmp")
    try:
        with open(draft, "wb") as file:
            file.writelines(_line(rows[key]) for key in keys)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StoreError(f"cannot write {target} ({error.strerror}): make room or make it writable; the reference is "
                         "as it was") from error
    return len(keys)


def estimate_seconds(configs: list[RunConfig], device: str) -> float:
    """About how long `configs` take one after the other here: a + b FLOPs per step, from two short measurements.
    What `models.training_flops` does not count comes on top."""
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

def _train(missing: dict[str, RunConfig], keep: Callable[[list[dict]], None], device: str,
           executor: concurrent.futures.Executor | None, workers: int) -> None:
    """Train the missing runs and `keep` each row as it finishes. A killed worker of the default pool is replaced and
    its run retried, until a pool dies twice without finishing anything."""
    todo = dict(sorted(missing.items(), key=lambda item: -models.training_flops(item[1], 0)))
    barren = 0
    with tqdm(total=len(todo), unit="run", disable=os.environ.get(HEADLESS) == "1") as bar:

        def collect(rows: list[dict]) -> None:
            keep(rows)
            for row in rows:
                del todo[row["key"]]
            bar.update(len(rows))

        while todo:
            pool = executor or loky.get_reusable_executor(
                max_workers=min(workers, len(missing)), initializer=_start_worker, initargs=(os.getpid(),),
                env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
            futures, before = {}, len(todo)
            try:
                for key, config in todo.items():
                    futures[pool.submit(_work, config, device)] = key
                for future in concurrent.futures.as_completed(futures):
                    collect([_result(future, todo[futures[future]])])
            except BaseException as error:
                if executor is None:
                    pool.shutdown(wait=False, kill_workers=True)  # it chokes on futures that were cancelled before
                else:
                    for future in futures:
                        future.cancel()
                collect([future.result() for future, key in futures.items() if key in todo and _has_row(future)])
                if not isinstance(error, concurrent.futures.BrokenExecutor):
                    raise
                barren = 0 if len(todo) < before else barren + 1
                if executor is not None or barren == 2:
                    remedy = "give a fresh executor" if executor else "set fewer workers if memory is short"
                    raise RuntimeError(f"worker processes died (killed, or out of memory) with {len(todo)} runs to go; "
                                       f"finished runs are kept: call again, {remedy}") from None


def _has_row(future: concurrent.futures.Future) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _result(future: concurrent.futures.Future, config: RunConfig) -> dict:
    try:
        return future.result()
    except concurrent.futures.BrokenExecutor:
        raise
    except Exception as error:
        raise RuntimeError(f"the run {non_default(config)} failed with {type(error).__name__}: {error}; "
                           "finished runs are kept") from error


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _work(config: RunConfig, device: str) -> dict:
    """Train one run where this is called and return its row."""
    return to_row(train_run(config, device), device)


def to_row(result: RunResult, device: str) -> dict:
    """A result as the store keeps it: thinned curves with 5 digits, non-finite values as null, and provenance."""
    every = max(1, math.ceil(len(result.curves["step"]) / CURVE_POINTS))
    last = len(result.curves["step"]) - 1
    keep = sorted({*range(0, last + 1, every), last})
    dense = DENSE | {"step"}
    curves = {name: [_rounded(values[i]) for i in keep] if name in dense else [_rounded(v) for v in values]
              for name, values in result.curves.items()}
    finite = lambda value: value if math.isfinite(value) else None  # noqa: E731
    return {"schema": SCHEMA, "key": run_key(result.config), "config": non_default(result.config),
            "status": result.status, "stop_step": result.stop_step, "reason": result.reason,
            "loss_init": finite(result.loss_init), "loss_final": finite(result.loss_final),
            "accuracy_final": _rounded(result.accuracy_final), "curves": curves,
            "patterns": [[[round(p, 3) for p in line] for line in pattern] for pattern in result.patterns],
            "provenance": {**_machine(), "device": device, "seconds": round(result.seconds, 2),
                           "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}}


def _rounded(value: float) -> float | None:
    return value if isinstance(value, int) else float(f"{value:.5g}") if math.isfinite(value) else None


@functools.cache
def _machine() -> dict:
    return {"torch": torch.__version__, "python": platform.python_version(), "stability_lib": __version__,
            "commit": commit(), "platform": platform.platform()}


def commit(of: str = "HEAD") -> str | None:
    """The checkout's commit, `-dirty` where the library differs from it; None outside a checkout of this project.

    `of` may be another name of git's: `HEAD:./stability_lib` tells versions of the library apart, whatever else
    changed.
    """
    root = project_root()
    if not (root / "pyproject.toml").exists():
        return None
    try:
        name, changed = (subprocess.run(["git", "-C", str(root), *git], capture_output=True, text=True, timeout=10,
                                        check=True).stdout.strip()
                         for git in (["rev-parse", "--short=12", of], ["status", "--porcelain", "stability_lib"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}-dirty" if changed else name


# writing

_unsaved: dict[Path, dict[str, dict]] = {}
"""Finished rows by file and key until they are safely written. What could not be written (a full disk) waits here for
the next `ensure` in this process."""


def _write_unsaved(path: Path) -> None:
    waiting = _unsaved[path]
    try:
        for key in list(waiting):
            _append(path, _line(waiting[key]))
            del waiting[key]
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise StoreError(f"cannot write {path} ({error.strerror}): {'free some space' if full else 'make it writable'} "
                         "and call again in this session; all earlier runs are kept, and finished ones wait in "
                         "memory") from None


def _append(path: Path, line: bytes) -> None:
    with open(path, "a+b", buffering=0) as file:
        end = _intact_end(file)
        file.truncate(end)
        try:
            while line:
                line = line[file.write(line):]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


def _intact_end(file) -> int:
    """The offset behind the last complete line; what follows it was torn."""
    size = file.seek(0, os.SEEK_END)
    position = size
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _line(row: dict) -> bytes:
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


@contextlib.contextmanager
def _only_trainer(path: Path) -> Iterator[None]:
    """Hold the study's file lock: a second process waits here, then finds the first one's runs in the store.

    Raises `StoreError` where the store cannot be written.
    """
    _check_writable(path)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{path.stem}: waiting for another process that trains this study (lock {lock.lock_file})", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_writable(path: Path) -> None:
    elsewhere = "or set STABILITY_LIB_RUNS to another folder"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_suffix(".lock")):
            with open(file, "ab"):
                pass
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise StoreError(f"cannot write {path} ({error.strerror}): make it writable, {elsewhere}") from error
    if free < MIN_FREE_BYTES:
        raise StoreError(f"less than {MIN_FREE_BYTES // 10**6} MB are free under {path.parent}: free some space, "
                         f"{elsewhere}")
