"""Sweeps on executors of all kinds, whatever is killed, interrupted or of another version."""

import concurrent.futures
import importlib
import math
import multiprocessing
import os
import signal
import threading

import pandas as pd
import pytest
from sweeps import (
    SWEEP,
    THREE,
    TINY,
    Dying,
    Serial,
    Untouched,
    alive,
    has_runs,
    keys,
    keys_in,
    wait_until,
    workers,
)

import stability_lib.store as files
from stability_lib import runs
from stability_lib.config import SCHEMA, RunConfig, replace
from stability_lib.runs import Store, StoreError

pytestmark = pytest.mark.usefixtures("no_progress_bar")


# executors

def test_a_given_executor_serves_and_stays_open(store):
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        runs.ensure(THREE, store, executor=executor)
        assert executor.submit(len, "open").result() == 4


def test_threads_give_the_same_bits_as_one_run_after_the_other(tmp_path):
    """Also where a run draws from torch's global random numbers, or chooses the attention kernel."""
    configs = [replace(TINY, seed=seed, init="pytorch", reparametrization=name, gradient_penalty=penalty)
               for seed in range(3) for name in ("none", "spectral_norm") for penalty in (0.0, 0.1)]
    serial = runs.ensure(configs, Store(tmp_path / "serial.jsonl"), executor=Serial())
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        threads = runs.ensure(configs, Store(tmp_path / "threads.jsonl"), executor=executor)
    made = ["seconds", "provenance"]
    pd.testing.assert_frame_equal(serial.drop(columns=made), threads.drop(columns=made), check_exact=True)


def test_a_given_executor_stays_open_after_a_failure(store):
    executor = Serial(before=lambda config: 1 / 0)
    with pytest.raises(RuntimeError):
        runs.ensure(THREE, store, executor=executor)
    assert not executor.was_shut_down


def test_a_given_executor_that_broke_is_a_clear_error_and_finished_runs_are_kept(store):
    with pytest.raises(RuntimeError, match=r"died .* with 1 runs to go; finished runs are kept: .*fresh executor"):
        runs.ensure(THREE, store, executor=Dying(2))
    assert len(keys_in(store.local)) == 2
    executor = Serial()
    runs.ensure(THREE, store, executor=executor)
    assert len(executor.trained) == 1


def test_a_default_pool_is_replaced_until_two_in_a_row_finish_nothing(store, monkeypatch):
    pools = [Dying(1), Dying(0), Dying(1), Dying(0), Dying(0)]
    monkeypatch.setattr(runs.loky, "get_reusable_executor", lambda **options: pools.pop(0))
    with pytest.raises(RuntimeError, match=r"with 1 runs to go; finished runs are kept: .*fewer workers"):
        runs.ensure(THREE, store)
    assert not pools and len(keys_in(store.local)) == 2


def test_a_run_that_raises_is_named_and_finished_runs_are_kept(store):
    def out_of_memory(config):
        if config == THREE[1]:
            raise MemoryError("no room for 3 GB")

    with pytest.raises(RuntimeError, match=r"the run .*'steps': 10.* failed with MemoryError: no room for 3 GB"):
        runs.ensure(THREE, store, executor=Serial(out_of_memory))
    assert sorted(keys_in(store.local)) == sorted(keys([THREE[0], THREE[2]]))


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupt_in_the_middle_of_writing_loses_no_finished_run(store, monkeypatch, call):
    calls = iter(range(1, 100))

    def interrupted(descriptor):
        if next(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.ensure(THREE, store, executor=Serial())
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))
    runs.ensure(THREE, store, executor=Untouched())


def test_an_interrupt_while_runs_are_handed_out_keeps_what_is_finished(store):
    def interrupt(config):
        if config == THREE[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.ensure(THREE, store, executor=Serial(interrupt))
    assert sorted(keys_in(store.local)) == sorted(keys(THREE[:2]))


# other versions

class Foreign(Serial):
    """Workers whose version differs: `change(row)` is what they return of the run with LR 0.01."""

    def __init__(self, change, version=runs.__version__):
        super().__init__()
        self.change, self.version = change, version

    def submit(self, work, config, *more):
        future = super().submit(work, config, *more)
        if not isinstance(config, RunConfig):
            future = concurrent.futures.Future()
            future.set_result(self.version)
        elif config == THREE[1]:
            changed = concurrent.futures.Future()
            changed.set_result(self.change(future.result()))
            return changed
        return future


@pytest.mark.parametrize("change, message", [
    (lambda row: row | {"schema": 2}, rf"schema 2, key .* and this process .* \(schema {SCHEMA},"),
    (lambda row: row | {"key": "0" * 16}, "key 0{16}"),
    (lambda row: row | {"provenance": row["provenance"] | {"stability_lib": "0.0.9"}},
     rf"a worker has stability_lib 0\.0\.9, commit .* and this process {runs.__version__},"),
    (lambda row: row | {"config": row["config"] | {"lr": 0.5}}, "config does not belong to the key"),
    (lambda row: row | {"config": {"lr_decay": 0.5}}, "unknown field 'lr_decay'"),
    (lambda row: row | {"loss_final": "low"}, "loss_final"), (lambda row: row | {"loss_final": math.nan}, "no run"),
    (lambda row: None, "returned no run"), (lambda row: {}, "returned no run")])
def test_a_row_of_another_version_is_never_written_and_all_others_are(store, change, message):
    with pytest.raises(StoreError, match=message):
        runs.ensure(THREE, store, executor=Foreign(change))
    assert sorted(keys_in(store.local)) == sorted(keys([THREE[0], THREE[2]]))
    executor = Serial()
    runs.ensure(THREE, store, executor=executor)
    assert executor.trained == THREE[1:2]


def test_workers_of_another_version_or_without_the_library_are_refused_before_they_train(store):
    executor = Foreign(lambda row: row, version="0.0.9")
    with pytest.raises(RuntimeError, match=rf"stability_lib 0\.0\.9 and this process {runs.__version__}"):
        runs.ensure(THREE, store, executor=executor)
    assert not executor.trained

    class Bare(Serial):
        def submit(self, *work):
            return super().submit(lambda *work: importlib.import_module("a_library_that_is_nowhere"), *work)

    with pytest.raises(RuntimeError, match=r"cannot import stability_lib .*: install version"):
        runs.ensure(THREE, store, executor=Bare())


# processes

@pytest.mark.slow
def test_processes_of_the_standard_library_serve_too(store):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        table = runs.ensure(THREE[:1], store, executor=executor)
        assert executor.submit(len, "open").result(60) == 4
    assert table["status"].to_list() == ["ok"]


@pytest.mark.slow
def test_the_default_processes_give_the_same_bits_as_this_one(tmp_path):
    configs = [*THREE, replace(TINY, lr=0.3, qk_norm="none", n_layers=2, attention_maps=2), replace(TINY, seed=1)]
    here = runs.ensure(configs, Store(tmp_path / "serial.jsonl"), executor=Serial())
    there = runs.ensure(configs, Store(tmp_path / "pool.jsonl"), workers=2)
    made = ["seconds", "provenance"]
    pd.testing.assert_frame_equal(here.drop(columns=made), there.drop(columns=made), check_exact=True)


# kills, interrupts and rivals

@pytest.mark.slow
def test_a_killed_worker_loses_no_run(store):
    victims = []

    def kill_one():
        wait_until(lambda: has_runs(store), 120, "no run finished")
        victims.append(workers(os.getpid())[0])
        victims[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    table = runs.ensure(SWEEP, store, workers=2)
    killer.join()
    assert victims and table["key"].to_list() == keys(SWEEP)
    assert sorted(keys_in(store.local)) == sorted(keys(SWEEP))


@pytest.mark.slow
def test_a_killed_parent_loses_no_finished_run_and_leaves_neither_orphans_nor_a_stale_lock(store, another_process):
    process = another_process(f"runs.ensure(SWEEP, Store({store.local!r}), workers=2)")
    wait_until(lambda: has_runs(store), 120, process.output)
    orphans = process.descendants()
    process.kill()
    process.wait()
    finished = keys_in(store.local)
    assert 0 < len(finished) < len(SWEEP) and len(orphans) >= 2
    wait_until(lambda: not alive(orphans), 30, f"still running: {orphans}")
    executor = Serial()
    runs.ensure(SWEEP, store, executor=executor)
    assert sorted(keys(executor.trained)) == sorted(set(keys(SWEEP)) - set(finished))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_given_processes_end_with_a_killed_parent_idle_or_not(store, another_process, method):
    process = another_process(f"""
        if __name__ == "__main__":
            context = concurrent.futures.process.mp.get_context({method!r})
            executor = concurrent.futures.ProcessPoolExecutor(2, context)
            runs.ensure(SWEEP[:2], Store({store.local!r}), executor=executor)
            print("idle", flush=True)
            sys.stdin.read()
    """)
    wait_until(lambda: "idle" in process.output(), 120, process.output)
    orphans = process.descendants()
    assert len(orphans) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not alive(orphans), 30, f"still running: {orphans}")


@pytest.mark.slow
def test_ctrl_c_while_torch_imports_its_compiler_leaves_a_kernel_that_works(store, another_process):
    process = another_process(f"""
        import signal

        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "torch._dynamo.device_interface":  # cut there, torch._dynamo is broken for good
                    sys.meta_path.remove(self)
                    signal.raise_signal(signal.SIGINT)

        sys.meta_path.insert(0, Interrupting())
        assert "torch._dynamo" not in sys.modules
        try:
            runs.ensure(THREE, Store({store.local!r}), executor=Serial())
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        assert len(runs.ensure(THREE, Store({store.local!r}), executor=Serial())) == 3
    """)
    assert process.wait(120) == 0, process.output()
    assert "interrupted" in process.output()


@pytest.mark.slow
def test_ctrl_c_returns_soon_keeps_finished_runs_and_ends_the_workers_while_the_session_goes_on(store, another_process):
    process = another_process(f"""
        try:
            more = [replace(SWEEP[0], seed=seed) for seed in range(6, 30)]  # more than the pool takes on at once
            runs.ensure(SWEEP + more, Store({store.local!r}), workers=2)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        sys.stdin.read()
    """)
    wait_until(lambda: has_runs(store), 120, process.output)
    children = process.descendants()
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: "interrupted" in process.output(), 10, process.output)
    wait_until(lambda: not alive(workers(process.pid)), 10, f"still running: {children}")
    assert 0 < len(keys_in(store.local)) < 30
    assert process.poll() is None
    assert "Traceback" not in process.output()


@pytest.mark.slow
def test_two_processes_on_one_study_train_each_run_once_and_both_get_all_rows(store, another_process, capsys):
    rival = another_process(f"""
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            table = runs.ensure(SWEEP, Store({store.local!r}), executor=executor)
        print("rows", table["key"].to_list() == keys(SWEEP))
    """)
    wait_until(lambda: has_runs(store), 120, rival.output)
    table = runs.ensure(SWEEP, store, executor=Untouched())
    assert "waiting for another process that trains this study" in capsys.readouterr().out
    assert rival.wait(60) == 0 and "rows True" in rival.output()
    assert table["key"].to_list() == keys(SWEEP)
    assert sorted(keys_in(store.local)) == sorted(keys(SWEEP))
