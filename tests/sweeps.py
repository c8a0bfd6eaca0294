"""What the tests of sweeps share: small runs, executors that can be watched, and processes that can be killed."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from stability_lib import runs
from stability_lib.config import RunConfig, replace, run_key
from stability_lib.runs import Store

TINY = RunConfig(d_model=16, n_layers=1, n_heads=1, seq_len=8, batch_size=4, eval_sequences=8, steps=10, warmup_steps=0,
                 probe_every=5)
THREE = [replace(TINY, lr=lr) for lr in (0.1, 0.01, 0.03)]
SWEEP = [replace(TINY, steps=300, probe_every=0, seed=seed) for seed in range(6)]
"""Runs of about half a second each, long enough to be killed in."""


class Serial(concurrent.futures.Executor):
    """Does in this process whatever is submitted; `before(config)` may raise in a run's place."""

    def __init__(self, before=lambda config: None):
        self.before, self.trained, self.was_shut_down = before, [], False

    def submit(self, work, config, *more):
        future = concurrent.futures.Future()
        try:
            if isinstance(config, RunConfig):
                self.before(config)
            future.set_result(work(config, *more))
            if isinstance(config, RunConfig):
                self.trained.append(config)
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.was_shut_down = True


class Untouched(concurrent.futures.Executor):
    """Fails the test that submits anything."""

    def submit(self, work, *args):
        raise AssertionError(f"{args} was submitted")


class Dying(concurrent.futures.Executor):
    """Trains the first `n` runs; then its workers are dead."""

    def __init__(self, n: int):
        self.n = n

    def submit(self, work, config, *more):
        future = concurrent.futures.Future()
        if self.n > 0:
            future.set_result(work(config, *more))
        else:
            future.set_exception(concurrent.futures.process.BrokenProcessPool("a worker died"))
        self.n -= isinstance(config, RunConfig)
        return future

    def shutdown(self, wait=True, *, kill_workers=False):
        pass


def edited(line: bytes, **changes) -> bytes:
    return json.dumps(json.loads(line) | changes).encode() + b"\n"


def keys_in(path: Path) -> list[str]:
    """The keys in a store file, which must hold whole lines only."""
    content = path.read_bytes() if path.exists() else b""
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line)["key"] for line in content.splitlines()]


def keys(configs) -> list[str]:
    return [run_key(config) for config in configs]


class Process(subprocess.Popen):
    """A Python process in a group of its own, as a terminal would start it; what it prints goes to a file."""

    def __init__(self, code: str, log: Path):
        self.log = log
        lines = [line.removeprefix(" " * 8) for line in code.splitlines()]
        head = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                "from pathlib import *; from sweeps import *")
        with open(log, "wb") as output:
            super().__init__([sys.executable, "-c", "\n".join([head, *lines])], stdin=subprocess.PIPE, stdout=output,
                             stderr=output, start_new_session=True, env=os.environ | {runs.HEADLESS: "1"})

    def output(self) -> str:
        return self.log.read_text()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)


def wait_until(condition, seconds: float, what):
    """Guards against hanging: fails the test where `condition` does not come true in a generous time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.01)


def has_runs(store: Store) -> bool:
    return store.local.exists() and b"\n" in store.local.read_bytes()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a process may vanish between two questions about it."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def workers(parent: int) -> list[psutil.Process]:
    found = []
    for process in alive(psutil.Process(parent).children()):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("popen_loky" in part for part in process.cmdline()):
                found.append(process)
    return found
