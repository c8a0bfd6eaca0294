"""Shared by all tests: a run that takes a fraction of a second, and what a fresh process makes of the same configs."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from sweeps import THREE, Process, Serial
from torch.utils.flop_counter import FlopCounterMode

from stability_lib import data, models, runs
from stability_lib.config import RunConfig, non_default, replace, run_key
from stability_lib.runs import Store
from stability_lib.train import train_run

hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("steady")
torch.set_num_threads(1)  # at this size more threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored, and children inherit that


def step_flops(config: RunConfig) -> int:
    """FLOPs of a training step as PyTorch counts them; validation, the same in both runs, drops out."""
    def counted(steps: int) -> int:
        with FlopCounterMode(display=False) as counter:
            train_run(replace(config, steps=steps))
        return counter.get_total_flops()
    return counted(4) - counted(3)


@pytest.fixture
def tiny() -> RunConfig:
    return RunConfig(d_model=16, n_layers=2, n_heads=2, seq_len=12, batch_size=4, eval_sequences=8, steps=6,
                     warmup_steps=2, probe_every=0)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(1234)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def fingerprint(config: RunConfig) -> dict:
    """What must be the same in every process: batches, validation windows, initial weights and the losses of a run."""
    batches = torch.Generator().manual_seed(5)
    result = train_run(config)
    return {"batches": digest(*(data.sample(config, batches) for _ in range(3))),
            "validation": digest(data.validation(config)),
            "weights": digest(*models.build(config, data.vocab_size(config)).parameters()),
            "losses": [*result.curves["loss"], result.loss_init, result.loss_final]}


@pytest.fixture(scope="session")
def fresh_process():
    """`fresh_process(config)` is `fingerprint(config)` from a new process with other global random numbers."""
    found = {}

    def ask(config: RunConfig) -> dict:
        asked = json.dumps(non_default(config))
        if asked not in found:
            code = ("import json, sys, conftest, torch; torch.manual_seed(77); torch.set_num_threads(2); "
                    "config = conftest.RunConfig(**json.loads(sys.argv[1])); "
                    "print(json.dumps(conftest.fingerprint(config)))")
            done = subprocess.run([sys.executable, "-c", code, asked], cwd=Path(__file__).parent, text=True,
                                  env=os.environ | {"PYTHONHASHSEED": "99"}, capture_output=True, timeout=300)
            assert done.returncode == 0, done.stderr
            found[asked] = json.loads(done.stdout)
        return found[asked]

    return ask


# sweeps

@pytest.fixture
def no_progress_bar(monkeypatch):
    monkeypatch.setenv(runs.HEADLESS, "1")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "study.jsonl")


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> list[bytes]:
    """The store lines of `THREE`, trained once."""
    store = Store(tmp_path_factory.mktemp("stored") / "study.jsonl")
    runs.ensure(THREE, store, executor=Serial())
    by_key = {json.loads(line)["key"]: line for line in store.local.read_bytes().splitlines(keepends=True)}
    return [by_key[run_key(config)] for config in THREE]


@pytest.fixture
def another_process(tmp_path):
    """`another_process(code)` runs `code` with the names in `sweeps` beside the test; nothing of it outlives the test.
    """
    started = []

    def start(code: str) -> Process:
        started.append(Process(code, tmp_path / f"process{len(started)}.log"))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        process.stdin.close()
