"""Files of runs: where they lie, what a row must hold, and how rows are read, appended and promoted.

A study has a committed reference, `data/runs/<study>.jsonl` (of scale `gpu` or `paper` in a folder of that name), and a
local file that git ignores and that receives every new run. One line of JSON is one run. One process at a time writes,
one fsynced line as each run ends, so a killed sweep loses no more than the runs in flight.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock

from . import __version__, data
from .config import SCHEMA, SOURCES, RunConfig, from_dict, replace, run_key, unknown
from .train import SPECTRA

MIN_FREE_BYTES = 20_000_000
DENSE = {"loss", "gradient_norm", "penalty", "skipped_layers"}
"""Curves recorded at every step."""
REFERENCES = {"quick": None, "cpu": ".", "gpu": "gpu", "paper": "paper"}
"""By scale, the folder of its committed runs; `quick` has none."""
OUTCOME = ("status", "stop_step", "reason", "loss_init", "loss_final", "curves", "patterns")
"""What every row holds besides schema, key, config and provenance (newer ones also `accuracy_final`, `extremes`)."""


class StoreError(RuntimeError):
    """The store cannot be read or written; the message names the file and the remedy."""


class MissingRuns(RuntimeError):
    """More runs are missing than `max_new` allows."""


@dataclasses.dataclass(frozen=True)
class Store:
    """Where a study's runs lie: `local` receives new runs, `reference` is only read."""

    local: Path
    reference: Path | None = None

    def __post_init__(self):
        for name in ("local", "reference"):
            path = getattr(self, name)
            if not isinstance(path, (str, os.PathLike)) and (path is not None or name == "local"):
                raise TypeError(f"{name} must be the path of a file, got {type(path).__name__} {path!r}")
            object.__setattr__(self, name, path if path is None else Path(path))


# places

def project_root() -> Path:
    """The checkout that holds the package, or the working directory where the package is installed without one."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def locate(study: str, scale: str = "cpu") -> Store:
    """The store of a study, its reference that of a scale (see REFERENCES).

    The environment variable STABILITY_LIB_RUNS names another folder for local runs (a relative one lies under
    `project_root`, so that notebooks and scripts mean the same; `~` is your home).
    """
    if not isinstance(study, str):
        raise TypeError(f"study must be a study's name or a Store, got {type(study).__name__} {study!r}")
    if not study or "\0" in study or Path(study).name != study or "\\" in study:
        raise ValueError(f"study {study!r} is no name for a file: choose letters, digits and _, or give a Store")
    if scale not in REFERENCES:
        raise ValueError(unknown("scale", scale, REFERENCES))
    folder, of_scale = project_root() / "data" / "runs", REFERENCES[scale]
    local = project_root() / os.path.expanduser(os.environ.get("STABILITY_LIB_RUNS") or folder / "local")
    return Store(local / f"{study}.jsonl", None if of_scale is None else folder / of_scale / f"{study}.jsonl")


def reference_path(study: str, scale: str = "cpu") -> Path:
    """Where the committed reference of a study at this scale lies. Raises `ValueError` where the scale has none."""
    path = locate(study, scale).reference
    if path is None:
        raise ValueError(f"scale {scale!r} has no reference: choose cpu, gpu or paper")
    return path


def commit(of: str = "HEAD") -> str | None:
    """The checkout's commit, `-dirty` where the library differs from it; None outside a checkout of this project.

    `of` may be another name of git's: `HEAD:./stability_lib` tells versions of the library apart, whatever else
    changed.
    """
    root = project_root()
    if not (root / "pyproject.toml").exists() or not (root / "stability_lib").is_dir():
        return None
    try:
        name, changed = (subprocess.run(["git", "-C", str(root), *git], capture_output=True, text=True, timeout=10,
                                        check=True).stdout.strip()
                         for git in (["rev-parse", "--short=12", of], ["status", "--porcelain", "stability_lib"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}-dirty" if changed else name


def keyed(configs: Iterable[RunConfig]) -> list[tuple[str, RunConfig]]:
    """(key, config) of each, a user's own text pinned to its content (`data.pin`). Raises `TypeError` for others."""
    if isinstance(configs, RunConfig) or not isinstance(configs, Iterable):
        raise TypeError(f"configs must be a list of RunConfig, got one {type(configs).__name__}: write [config]")
    pin = functools.cache(lambda text, digest: data.pin(RunConfig(data=text, data_digest=digest)))  # it reads the text
    found = []
    for config in configs:
        if not isinstance(config, RunConfig):
            raise TypeError(f"configs must hold RunConfig, got {type(config).__name__} {config!r:.80}: write "
                            "RunConfig(...), or config.from_dict for a dict")
        if config.data not in SOURCES:
            text = pin(config.data, config.data_digest)
            config = replace(config, data=text.data, data_digest=text.data_digest)
        found.append((run_key(config), config))
    return found


# reading

_NUMBER, _NOTHING = {int, float}, {type(None)}
_FIELDS = {"key": {str}, "config": {dict}, "status": {str}, "stop_step": {int} | _NOTHING, "reason": {str} | _NOTHING,
           "loss_init": _NUMBER | _NOTHING, "loss_final": _NUMBER | _NOTHING, "curves": {dict}, "patterns": {list},
           "provenance": {dict}}
_LATER_FIELDS = {"accuracy_final": _NUMBER | _NOTHING, "extremes": {dict}}
_PROVENANCE = {"seconds": _NUMBER, "device": {str}, "date": {str}, "stability_lib": {str}}


def steps_of(quantity: str) -> str:
    """The name of the curve that holds a curve's steps."""
    kind = quantity.split("/")[0]
    own = {"signal": "signal_step", "sharpness": "sharpness_step"}
    return "step" if quantity in DENSE else "spectra_step" if kind in SPECTRA else own.get(kind, "probe_step")


def check_row(row: dict) -> None:
    """Raises `ValueError` that names the field where a row of this schema is not as `runs.to_row` makes it."""
    _check_types(row, _FIELDS | {name: kinds for name, kinds in _LATER_FIELDS.items() if name in row})
    _check_types(row["provenance"], _PROVENANCE, "provenance: ")
    if row["status"] not in ("ok", "diverged"):
        raise ValueError(f"status is {row['status']!r}, not ok or diverged")
    if {row["stop_step"] is None, row["reason"] is None} != {row["status"] == "ok"}:
        raise ValueError(f"status is {row['status']} with stop_step {row['stop_step']} and reason {row['reason']!r}: "
                         "a diverged run has both, another neither")
    curves = row["curves"]
    for name, values in curves.items():
        is_steps = name.endswith("step")
        _check_numbers(f"curves: {name}", values, {int} if is_steps else _NUMBER | _NOTHING)
        if not is_steps and len(values) != len(curves.get(steps_of(name), ())):
            raise ValueError(f"curves: {name} has {len(values)} values, not one for each {steps_of(name)}")
    for name, ends in row.get("extremes", {}).items():
        _check_numbers(f"extremes: {name}", ends, _NUMBER)
        if len(ends) != 2:
            raise ValueError(f"extremes: {name} is {ends}, not smallest and largest")
    for pattern in row["patterns"]:
        for line in pattern if type(pattern) is list else [pattern]:
            _check_numbers("patterns: a line", line, _NUMBER)


def _check_types(values: dict, kinds: dict[str, set[type]], within: str = "") -> None:
    if absent := kinds.keys() - values.keys():
        raise ValueError(f"{within}it lacks {', '.join(sorted(absent))}")
    for name, allowed in kinds.items():
        value = values[name]
        if type(value) not in allowed or (type(value) is float and not math.isfinite(value)):
            raise ValueError(f"{within}{name} is {value!r:.40}, not {_kinds(allowed)}")


def _check_numbers(name: str, values: object, allowed: set[type]) -> None:
    if type(values) is not list or not set(map(type, values)) <= allowed or math.inf in values or -math.inf in values:
        raise ValueError(f"{name} is {values!r:.40}, not a list of {_kinds(allowed)}")


def _kinds(allowed: set[type]) -> str:
    return " or ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in allowed))


def _parse(line: bytes) -> object:
    """Raises `ValueError` where `line` is no JSON."""
    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")
    try:
        return json.loads(line, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_torn(line: bytes) -> bool:
    """Whether a last line without a line end was cut off: the beginning of a row is no JSON."""
    try:
        _parse(line)
    except ValueError:
        return True
    return False


def read(path: Path) -> dict[str, dict]:
    """The rows of one store file by key; a later line replaces an earlier one with the same key.

    A torn last line is skipped with a warning. Raises `StoreError` that names file and line where a line is corrupt,
    was edited so that its key no longer fits, or comes from a newer version.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error.strerror}): make it a file you may read") from error
    lines = content.splitlines()  # a line end is LF, CR LF or CR
    if lines and not content.endswith((b"\n", b"\r")) and _is_torn(lines[-1]):
        warnings.warn(f"{path}: the last line is torn (a run was cut off while it was written) and is skipped",
                      stacklevel=2)
        lines.pop()
    rows = {}
    for number, line in enumerate(lines, start=1):
        row = _row(line, f"{path} line {number}") if line.strip() else None
        if row is not None:
            rows[row["key"]] = row
    return rows


def _row(line: bytes, where: str) -> dict | None:
    """The row in a line, None where it is of an older schema."""
    try:
        row = _parse(line)
        if type(row) is not dict or type(row.get("schema")) is not int:
            raise ValueError("it is no run with a schema number")
        if row["schema"] == SCHEMA:
            check_row(row)
    except ValueError as error:
        raise StoreError(f"{where} is corrupt ({error}): delete that line, its run will be trained again") from None
    if row["schema"] > SCHEMA:
        raise StoreError(f"{where} was written by a newer version (schema {row['schema']}, this one reads up to "
                         f"{SCHEMA}): upgrade stability_lib")
    if row["schema"] < SCHEMA:
        return None
    try:
        fits = run_key(from_dict(row["config"])) == row["key"]
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{where}: {error}; upgrade stability_lib or delete that line") from None
    if not fits:
        raise StoreError(f"{where}: the config does not belong to the key {row['key']}: restore or delete that line")
    return row


def load(store: Store) -> dict[str, dict]:
    """All rows of a study by key; a local run takes precedence over the reference."""
    return (read(store.reference) if store.reference else {}) | read(store.local)


def check_new(row: dict, key: str) -> None:
    """Hold a row that a worker made against what was asked for, before it is written.

    Raises `StoreError` that names both versions where another stability_lib made it.
    """
    try:
        schema, found, version = row["schema"], row["key"], row["provenance"]["stability_lib"]
        line = _line(row)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"a worker returned no run ({type(error).__name__}: {error}): install stability_lib "
                         f"{__version__} where the workers are") from None
    if (schema, found, version) != (SCHEMA, key, __version__):
        raise StoreError(f"a worker has stability_lib {version}, commit {row['provenance'].get('commit')} (its run: "
                         f"schema {schema}, key {found}) and this process {__version__}, commit {commit()} (schema "
                         f"{SCHEMA}, key {key}): install this one where the workers are")
    _row(line, "what a worker returned")


# writing

_unsaved: dict[Path, dict[str, dict]] = {}
"""Finished rows by file and key until they are safely written. What could not be written (a full disk) waits here for
the next `writer` in this process."""


def real(path: Path) -> Path:
    """The file itself, whatever links lead to it: by that name it is locked."""
    return Path(os.path.realpath(path))


def waits(path: Path) -> bool:
    """Whether finished rows wait in memory to be written to this file."""
    return bool(_unsaved.get(real(path)))


@contextlib.contextmanager
def writer(path: Path) -> Iterator["Writer"]:
    """The only writer of a file while this is open: a second process waits here, then finds the first one's runs.

    Writes first what could not be written before. Raises `StoreError` where the file cannot be read or written.
    """
    path = real(path)
    _check_writable(path)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"{path.stem}: waiting for another process that trains this study (lock {lock.lock_file})", flush=True)
        lock.acquire()
    try:
        rows = read(path)
        with contextlib.closing(Writer(path, rows)) as opened:
            opened.write({})
            yield opened
            opened.write({})  # in case the file was deleted after the last row
    finally:
        lock.release()


class Writer:
    """Appends rows to a file, see `writer`. `rows` holds by key all that the file holds.

    Where the file is deleted, replaced or cut short meanwhile, the next `write` writes all of them again, with a
    warning.
    """

    def __init__(self, path: Path, rows: dict[str, dict]):
        self.path, self.rows = path, rows
        self._file = open(path, "a+b", buffering=0)  # kept open: a deleted file's number is not used again
        self._size = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()

    def write(self, rows: dict[str, dict]) -> None:
        """Append rows by key, each safely on the disk. Raises `StoreError`; rows not written wait in memory."""
        waiting = _unsaved.setdefault(self.path, {})
        waiting |= rows
        try:
            lost = self._lost()
            for key, row in lost.items():
                waiting.setdefault(key, row)
            for key in list(waiting):
                self._append(waiting[key])
                self.rows[key] = waiting.pop(key)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = "free some space" if full else "make it writable"
            raise StoreError(f"cannot write {self.path} ({error.strerror}): {remedy} and call again in this session; "
                             "all earlier runs are kept, and finished ones wait in memory") from None
        if lost:
            warnings.warn(f"{self.path} was deleted or changed while runs were trained: {len(lost)} runs that it had "
                          "held are written to it again", stacklevel=2)

    def _lost(self) -> dict[str, dict]:
        """The rows that the file held and no longer does."""
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self.path)
            if os.path.samestat(there, os.fstat(self._file.fileno())) and there.st_size >= self._size:
                return {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._file:
            self._file = open(self.path, "a+b", buffering=0)
        left = read(self.path)
        return {key: row for key, row in self.rows.items() if key not in left}

    def _append(self, row: dict) -> None:
        end, start = _tail(self._file)
        line = start + _line(row)
        self._file.truncate(end)
        try:
            while line:
                line = line[self._file.write(line):]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(end)
            raise
        finally:
            self._size = os.fstat(self._file.fileno()).st_size


def _tail(file) -> tuple[int, bytes]:
    """The offset behind the last whole line, a torn one left out, and the line end that it lacks."""
    size = file.seek(0, os.SEEK_END)
    tail, position = b"", size
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        tail = file.read(position - start) + tail
        found = max(tail.rfind(b"\n"), tail.rfind(b"\r"))
        if found >= 0:
            position, tail = start + found + 1, tail[found + 1:]
            break
        position = start
    return (position, b"") if not tail or _is_torn(tail) else (size, b"\n")


def _line(row: dict) -> bytes:
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


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


def promote(study: str, configs: Iterable[RunConfig], rows: dict[str, dict], scale: str = "cpu") -> int:
    """Make those of `rows` (from `read` or `load`) that belong to `configs` the committed reference of a scale, in grid
    order.

    Returns how many. What else the reference holds stays, behind them. Raises `MissingRuns` and leaves the reference
    alone where one of them is missing, `ValueError` where the scale has none.
    """
    target = real(reference_path(study, scale))
    keys = list(dict.fromkeys(key for key, _ in keyed(configs)))
    absent = [key for key in keys if key not in rows]
    if absent:
        raise MissingRuns(f"{len(absent)} of the {len(keys)} runs of {study!r} are missing: train them, then promote")
    others = {key: row for key, row in read(target).items() if key not in set(keys)}
    draft = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            file.writelines(_line(row) for row in [*(rows[key] for key in keys), *others.values()])
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StoreError(f"cannot write {target} ({error.strerror}): make room or make it writable; the reference is "
                         "as it was") from error
    if others:
        print(f"{study}: {len(others)} runs of the reference that are not in this grid stay in it")
    return len(keys)
