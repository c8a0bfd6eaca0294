"""The run store and `ensure`: what is finished is never lost and never trained again, whatever is killed or full."""

import ast
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import datetime
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from stability_lib import config, data, models, runs
from stability_lib.config import RunConfig, replace, run_key
from stability_lib.runs import MissingRuns, Store, StoreError
from stability_lib.train import RunResult

TINY = RunConfig(d_model=16, n_layers=1, n_heads=1, seq_len=8, batch_size=4, eval_sequences=8, steps=10, warmup_steps=0,
                 probe_every=5)
THREE = [replace(TINY, lr=lr) for lr in (0.1, 0.01, 0.03)]
SWEEP = [replace(TINY, steps=300, probe_every=0, seed=seed) for seed in range(6)]
"""Runs of about half a second each, long enough to be killed in."""


class Serial(concurrent.futures.Executor):
    """Trains in this process whatever is submitted; `before(config)` may raise in the run's place."""

    def __init__(self, before=lambda config: None):
        self.before, self.trained, self.was_shut_down = before, [], False

    def submit(self, work, config, device):
        future = concurrent.futures.Future()
        try:
            self.before(config)
            future.set_result(work(config, device))
            self.trained.append(config)
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.was_shut_down = True


class Untouched(concurrent.futures.Executor):
    """Fails the test that submits anything."""

    def submit(self, work, config, device):
        raise AssertionError(f"{config} was trained")


class Dying(concurrent.futures.Executor):
    """Trains the first `n` runs; then its workers are dead."""

    def __init__(self, n: int):
        self.n = n

    def submit(self, work, config, device):
        future = concurrent.futures.Future()
        if self.n > 0:
            future.set_result(work(config, device))
        else:
            future.set_exception(concurrent.futures.process.BrokenProcessPool("a worker died"))
        self.n -= 1
        return future

    def shutdown(self, wait=True, *, kill_workers=False):
        pass


@pytest.fixture(autouse=True)
def _no_progress_bar(monkeypatch):
    monkeypatch.setenv(runs.HEADLESS, "1")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "study.jsonl")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A project root without any runs."""
    monkeypatch.delenv("STABILITY_LIB_RUNS", raising=False)
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    (tmp_path / "data" / "runs").mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> list[bytes]:
    """The store lines of `THREE`, trained once."""
    store = Store(tmp_path_factory.mktemp("stored") / "study.jsonl")
    runs.ensure(THREE, store, executor=Serial())
    by_key = {json.loads(line)["key"]: line for line in store.local.read_bytes().splitlines(keepends=True)}
    return [by_key[run_key(config)] for config in THREE]


def edited(line: bytes, **changes) -> bytes:
    return json.dumps(json.loads(line) | changes).encode() + b"\n"


def keys_in(path: Path) -> list[str]:
    """The keys in a store file, which must hold whole lines only."""
    content = path.read_bytes() if path.exists() else b""
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line)["key"] for line in content.splitlines()]


def keys(configs) -> list[str]:
    return [run_key(config) for config in configs]


# what is trained

def test_a_second_ensure_trains_nothing_and_returns_the_same_table(store):
    first = runs.ensure(THREE, store, executor=Serial())
    second = runs.ensure(THREE, store, executor=Untouched())
    pd.testing.assert_frame_equal(first, second)


def test_only_what_is_missing_is_trained(store, capsys):
    runs.ensure(THREE[:2], store, executor=Serial())
    executor = Serial()
    runs.ensure(THREE, store, executor=executor)
    assert executor.trained == THREE[2:]
    assert "2 of 3 runs are cached, training 1 on cpu" in capsys.readouterr().out


def test_rows_come_in_the_order_of_the_configs_also_repeated_ones(store):
    asked = [THREE[2], THREE[0], THREE[2], THREE[1]]
    executor = Serial()
    table = runs.ensure(iter(asked), store, executor=executor)
    assert table["key"].to_list() == keys(asked)
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))
    assert len(executor.trained) == 3


def test_a_row_holds_every_field_of_its_config_and_the_outcome(store):
    row = runs.ensure([THREE[0]], store, executor=Serial()).iloc[0]
    assert all(row[name] == value for name, value in dataclasses.asdict(THREE[0]).items() if value is not None)
    assert row["n_params"] == models.n_params(THREE[0])
    assert (row["status"], row["stop_step"], row["reason"]) == ("ok", None, None)
    assert 0 < row["loss_final"] < row["loss_init"]


def test_no_configs_give_an_empty_table_with_every_column(store, stored):
    table = runs.ensure([], store, executor=Untouched())
    assert len(table) == 0
    assert list(table) == list(runs.frame([json.loads(stored[0])]))
    with pytest.raises(KeyError):
        runs.curve(table, "loss")


def test_more_missing_runs_than_allowed_raise_before_any_training(store):
    with pytest.raises(MissingRuns, match=r"3 of 3 runs are not cached and max_new allows 2: raise max_new"):
        runs.ensure(THREE, store, executor=Untouched(), max_new=2)
    assert not store.local.exists()
    assert len(runs.ensure(THREE, store, executor=Serial(), max_new=3)) == 3
    assert len(runs.ensure(THREE, store, executor=Untouched(), max_new=0)) == 3


def test_recompute_trains_every_run_again_and_keeps_the_old_lines(store):
    runs.ensure(THREE, store, executor=Serial())
    executor = Serial()
    runs.ensure(THREE[:2], store, executor=executor, recompute=True)
    assert sorted(keys(executor.trained)) == sorted(keys(THREE[:2]))
    assert len(keys_in(store.local)) == 5
    runs.ensure(THREE, store, executor=Untouched())


def test_recompute_leaves_alone_what_was_trained_since_the_batch_began(store, stored, monkeypatch):
    since = "2024-05-05T12:00:00+00:00"
    dated = [edited(line, provenance=json.loads(line)["provenance"] | {"date": date}) for line, date in
             zip(stored, ("2024-05-05T11:59:59+00:00", since, "2024-05-06T00:00:00+00:00"), strict=True)]
    store.local.write_bytes(b"".join(dated))
    monkeypatch.setenv(runs.FRESH_SINCE, since)
    executor = Serial()
    table = runs.ensure(THREE, store, executor=executor, recompute=True)
    assert executor.trained == THREE[:1]
    assert table["key"].to_list() == keys(THREE)
    runs.ensure(THREE, store, executor=Untouched(), recompute=True)  # what was just trained is fresh too
    monkeypatch.setenv(runs.FRESH_SINCE, "2999-01-01T00:00:00+00:00")
    runs.ensure(THREE, store, executor=(executor := Serial()), recompute=True)
    assert sorted(keys(executor.trained)) == sorted(keys(THREE))


def test_fresh_runs_of_the_reference_need_not_be_trained_again_either(tmp_path, stored, monkeypatch):
    store = Store(tmp_path / "local.jsonl", tmp_path / "reference.jsonl")
    store.reference.write_bytes(b"".join(stored))
    monkeypatch.setenv(runs.FRESH_SINCE, "2020-01-01T00:00:00+00:00")
    assert len(runs.ensure(THREE, store, executor=Untouched(), recompute=True)) == 3


def test_the_latest_line_of_a_key_wins(store, stored):
    store.local.write_bytes(stored[0] + stored[1] + edited(stored[0], loss_final=9.0))
    assert runs.ensure(THREE[:2], store, executor=Untouched())["loss_final"].iloc[0] == 9.0


def test_a_local_run_takes_precedence_over_the_reference(tmp_path, stored):
    store = Store(tmp_path / "local.jsonl", tmp_path / "reference.jsonl")
    store.local.write_bytes(edited(stored[0], loss_final=9.0))
    store.reference.write_bytes(stored[0] + stored[1])
    table = runs.ensure(THREE[:2], store, executor=Untouched())
    assert table["loss_final"].to_list() == [9.0, json.loads(stored[1])["loss_final"]]


def test_new_runs_go_to_the_local_file_and_leave_the_reference_alone(tmp_path, stored):
    store = Store(tmp_path / "local" / "study.jsonl", tmp_path / "study.jsonl")
    store.reference.write_bytes(stored[0])
    runs.ensure(THREE, store, executor=Serial())
    assert sorted(keys_in(store.local)) == sorted(keys(THREE[1:]))
    assert store.reference.read_bytes() == stored[0]


@pytest.mark.parametrize("bad, error", [
    (replace(TINY, eval_sequences=10**9), data.DataError), (replace(TINY, data="shakespear"), ValueError),
    (replace(TINY, vocab_size=2), ValueError)])
def test_a_config_that_cannot_be_run_stops_the_sweep_before_any_training(store, bad, error):
    with pytest.raises(error):
        runs.ensure([*THREE, bad], store, executor=Untouched())
    assert not store.local.exists()


def test_an_unknown_device_stops_the_sweep_before_any_training(store):
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        runs.ensure(THREE, store, device="gpu", executor=Untouched())


# what a row says

def test_a_run_records_what_made_it(store):
    made = runs.ensure([TINY], store, executor=Serial()).iloc[0]["provenance"]
    assert made["device"] == "cpu" and made["seconds"] > 0
    assert made["torch"].startswith("2.") and made["python"] == ".".join(map(str, sys.version_info[:3]))
    assert made["stability_lib"] and made["platform"]
    assert datetime.datetime.fromisoformat(made["date"]).tzinfo == datetime.UTC
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.startswith(made["commit"].removesuffix("-dirty"))


def test_a_run_that_blows_up_is_a_row_with_its_step_and_reason_and_no_loss(store):
    runs.ensure([replace(TINY, lr=1e30)], store, executor=Serial())
    line = json.loads(store.local.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss_final"] is None
    row = runs.ensure([replace(TINY, lr=1e30)], store, executor=Untouched()).iloc[0]
    assert row["status"] == "diverged" and 0 < row["stop_step"] < TINY.steps and "not finite" in row["reason"]
    assert math.isnan(row["loss_final"]) and math.isfinite(row["loss_init"])
    assert runs.curve(runs.ensure([replace(TINY, lr=1e30)], store), "loss")["value"].isna().sum() == 1


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 250, 5001])
def test_long_curves_are_thinned_to_about_100_points_with_both_ends(n):
    steps = list(range(n))
    values = [step + 1 / 3 for step in steps]
    row = runs.to_row(RunResult(TINY, "ok", None, None, 2.0, 1.0, 0.5,
                                {"step": steps, "loss": values, "gradient_norm": values,
                                 "probe_step": [0], "log_z": [math.inf]}, [[[1 / 3]]], 1.0), "cpu")
    kept = row["curves"]["step"]
    assert kept[0] == 0 and kept[-1] == n - 1 and kept == sorted(set(kept))
    assert min(n, 50) <= len(kept) <= 101
    assert row["curves"]["loss"] == pytest.approx([step + 1 / 3 for step in kept], rel=1e-4)
    assert row["curves"]["log_z"] == [None]


@pytest.fixture
def two_runs(stored) -> pd.DataFrame:
    """Two runs whose curves can be read at a glance; the second blew up before its first probe."""
    curves = [{"step": [0, 1, 2], "loss": [3.0, 2.5, 2.0], "probe_step": [0, 2], "log_z": [1.0, 4.0],
               "logit/block0": [5.0, None], "logit/block1": [6.0, 2.0], "logit_mean": [50.0, 50.0]},
              {"step": [0, 1], "loss": [3.0, None]}]
    return runs.frame([json.loads(line) | {"curves": c} for line, c in zip(stored, curves, strict=False)])


def test_accuracy_is_kept_and_is_nan_in_runs_from_before_it_was_recorded(store, stored):
    new, old = json.loads(stored[0]), json.loads(stored[1])
    assert 0 <= new["accuracy_final"] <= 1
    del old["accuracy_final"]
    store.local.write_bytes(stored[0] + json.dumps(old).encode() + b"\n")
    table = runs.ensure(THREE[:2], store, executor=Untouched())
    assert table["accuracy_final"].dtype == float
    assert table["accuracy_final"].iloc[0] == new["accuracy_final"] and math.isnan(table["accuracy_final"].iloc[1])
    older = runs.frame([old])
    assert older["accuracy_final"].dtype == float and older["accuracy_final"].isna().all()


def test_a_curve_has_one_row_per_run_and_recorded_step(two_runs):
    loss = runs.curve(two_runs, "loss")
    assert loss["step"].to_list() == [0, 1, 2, 0, 1]
    assert loss["value"].fillna(-1).to_list() == [3.0, 2.5, 2.0, 3.0, -1]
    assert loss["lr"].to_list() == [0.1] * 3 + [0.01] * 2
    probed = runs.curve(two_runs, "log_z")
    assert (probed["step"].to_list(), probed["value"].to_list()) == ([0, 2], [1.0, 4.0])


def test_an_unrecorded_curve_names_the_recorded_ones(two_runs):
    with pytest.raises(KeyError, match=r"no run recorded 'los': recorded are log_z, logit, logit_mean, loss"):
        runs.curve(two_runs, "los")


def test_a_reading_is_a_finite_value_of_a_curve_by_its_place(two_runs):
    curves = [{"rho": [None, 2.0, 3.0, None]}, {"rho": [None]}]
    table = two_runs.assign(curves=curves)
    assert runs.reading(table, "rho", 0).fillna(-1).to_list() == [2.0, -1]
    assert runs.reading(table, "rho").fillna(-1).to_list() == [3.0, -1]
    assert runs.reading(table.assign(curves=[curves[0], {}]), "rho").isna().to_list() == [False, True]
    with pytest.raises(KeyError, match="no run recorded 'rho/block0': recorded are rho"):
        runs.reading(table, "rho/block0")


def test_a_peak_is_the_largest_value_over_steps_and_blocks_and_nan_where_nothing_was_recorded(two_runs):
    assert runs.peak(two_runs, "logit").fillna(-1).to_list() == [6.0, -1]
    assert runs.peak(two_runs, "logit/block0").iloc[0] == 5.0
    assert runs.peak(two_runs, "loss").to_list() == [3.0, 3.0]


# damaged files

@pytest.mark.parametrize("bad", [
    b"{", b"", b"word", b"5", b"[]", b"null", b"\0\0\0\0", b"\xff\xfe", b"{}", b'{"schema":1,"key":"k"}',
    b'{"schema":"one","key":"k","config":{}}', b'{"schema":1,"key":"k","config":{}}'])
def test_a_corrupt_line_is_named_before_any_training_and_nothing_is_changed(store, stored, bad):
    content = stored[0] + bad + b"\n" + stored[1]
    store.local.write_bytes(content)
    for recompute in (False, True):
        with pytest.raises(StoreError, match=r"study\.jsonl line 2 is corrupt .*: delete that line"):
            runs.ensure(THREE, store, executor=Untouched(), recompute=recompute)
    assert store.local.read_bytes() == content


@pytest.mark.parametrize("values", [None, [], ["lr"], {"lr": "high"}, {"lr": -1.0}, {"learning_rate": 0.1}])
def test_a_config_that_cannot_be_read_is_named_with_file_and_line(store, stored, values):
    store.local.write_bytes(stored[0] + edited(stored[1], config=values))
    with pytest.raises(StoreError, match=r"study\.jsonl line 2"):
        runs.ensure(THREE, store, executor=Untouched())


def test_a_field_that_this_version_does_not_know_asks_for_an_upgrade(store, stored):
    store.local.write_bytes(edited(stored[0], config={"lr_decay": 0.1}))
    with pytest.raises(StoreError, match=r"line 1: unknown field 'lr_decay'.*upgrade stability_lib"):
        runs.ensure(THREE, store, executor=Untouched())


def test_a_line_whose_config_was_edited_no_longer_fits_its_key(store, stored):
    fields = json.loads(stored[1])["config"] | {"lr": 0.02}
    store.local.write_bytes(stored[0] + edited(stored[1], config=fields))
    with pytest.raises(StoreError, match=r"study\.jsonl line 2: the config does not belong to the key"):
        runs.ensure(THREE, store, executor=Untouched())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_store_of_a_newer_version_asks_for_an_upgrade(store, stored, recompute):
    newer = json.dumps({"schema": config.SCHEMA + 1, "key": "0", "config": {"new": 1}, "results": 1}).encode() + b"\n"
    store.local.write_bytes(stored[0] + newer)
    with pytest.raises(StoreError, match=r"line 2 was written by a newer version .*: upgrade stability_lib"):
        runs.ensure(THREE, store, executor=Untouched(), recompute=recompute)


def test_lines_of_an_older_version_are_passed_over(store, stored):
    store.local.write_bytes(edited(stored[0], schema=config.SCHEMA - 1) + stored[1])
    assert list(runs.read(store.local)) == keys(THREE[1:2])


def test_a_damaged_reference_is_named_too(tmp_path, stored):
    store = Store(tmp_path / "local.jsonl", tmp_path / "reference.jsonl")
    store.reference.write_bytes(stored[0] + b"{\n")
    with pytest.raises(StoreError, match=r"reference\.jsonl line 2"):
        runs.ensure(THREE, store, executor=Untouched())


@pytest.mark.filterwarnings("ignore:.*torn:UserWarning")
@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize("torn", [b'{"schema":1,"ke', b"\0" * 5000, b"x" * 200_000])
def test_a_torn_last_line_is_skipped_with_a_warning_and_gone_after_the_next_run(store, stored, whole, torn):
    store.local.write_bytes(b"".join(stored[:whole]) + torn)
    with pytest.warns(UserWarning, match=r"study\.jsonl: the last line is torn"):
        assert list(runs.read(store.local)) == keys(THREE[:whole])
    executor = Serial()
    runs.ensure(THREE, store, executor=executor)
    assert len(executor.trained) == 3 - whole
    assert store.local.read_bytes().startswith(b"".join(stored[:whole]))
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))


# folders and disks

def make_read_only(folder: Path):
    """A context in which nothing can be made under `folder`, even for root; skips the test where that cannot be had."""
    @contextlib.contextmanager
    def context():
        folder.chmod(0o555)
        chattr = shutil.which("chattr") if os.geteuid() == 0 else None
        immutable = chattr and subprocess.run([chattr, "+i", str(folder)], capture_output=True).returncode == 0
        try:
            if os.access(folder, os.W_OK) and not immutable:
                pytest.skip("this user can write anywhere")
            yield
        finally:
            if immutable:
                subprocess.run([chattr, "-i", str(folder)], check=True)
            folder.chmod(0o755)
    return context()


def test_a_read_only_folder_under_the_store_is_an_error_before_any_training_but_not_for_cached_runs(store, stored):
    store.local.parent.joinpath("elsewhere.jsonl").write_bytes(stored[0])
    with make_read_only(store.local.parent):
        with pytest.raises(StoreError, match=r"cannot write .*study\.jsonl .*STABILITY_LIB_RUNS"):
            runs.ensure(THREE, store, executor=Untouched())
        runs.ensure(THREE[:1], Store(store.local, store.local.with_name("elsewhere.jsonl")), executor=Untouched())


@pytest.mark.parametrize("depth", ["study.jsonl", "deeper/study.jsonl"])
def test_a_file_where_the_folder_should_be_is_an_error_before_any_training(tmp_path, depth):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot write .*study\.jsonl"):
        runs.ensure(THREE, Store(tmp_path / "runs" / depth), executor=Untouched())


def test_a_folder_where_the_file_should_be_is_an_error_before_any_training(store):
    store.local.mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*study\.jsonl"):
        runs.ensure(THREE, store, executor=Untouched())


def test_too_little_free_space_is_an_error_before_any_training(store, monkeypatch):
    monkeypatch.setattr(runs, "MIN_FREE_BYTES", 10**18)
    with pytest.raises(StoreError, match=r"MB are free under .*: free some space"):
        runs.ensure(THREE, store, executor=Untouched())


@pytest.mark.slow
def test_a_full_disk_keeps_earlier_runs_and_holds_the_finished_ones_until_there_is_room(store, another_process):
    process = another_process(f"""
        import resource
        store = Store({store.local!r})
        runs.ensure(THREE[:1], store, executor=Serial())
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.local.stat().st_size + 1000, unlimited[1]))
        for attempt in range(2):
            try:
                runs.ensure(THREE, store, executor=Serial() if attempt == 0 else Untouched())
            except StoreError as error:
                assert "free some space and call again in this session" in str(error), error
            else:
                raise AssertionError("the disk was not full")
            assert keys_in(store.local) == keys(THREE[:1])
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert len(runs.ensure(THREE, store, executor=Untouched())) == 3
    """)
    assert process.wait(120) == 0, process.output()
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))


# executors

def test_a_given_executor_serves_and_stays_open(store):
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        runs.ensure(THREE, store, executor=executor)
        assert executor.submit(len, "open").result() == 4


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

    monkeypatch.setattr(runs.os, "fsync", interrupted)
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

class Process(subprocess.Popen):
    """A Python process in a group of its own, as a terminal would start it; what it prints goes to a file."""

    def __init__(self, code: str, log: Path):
        self.log = log
        lines = [line.removeprefix(" " * 8) for line in code.splitlines()]
        head = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                "from pathlib import *; from test_runs import *")
        with open(log, "wb") as output:
            super().__init__([sys.executable, "-c", "\n".join([head, *lines])], stdin=subprocess.PIPE, stdout=output,
                             stderr=output, start_new_session=True, env=os.environ | {runs.HEADLESS: "1"})

    def output(self) -> str:
        return self.log.read_text()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)


@pytest.fixture
def another_process(tmp_path):
    """`another_process(code)` runs `code` with this module's names beside the test; nothing of it outlives the test."""
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


# places

def test_the_environment_names_another_folder_for_local_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("STABILITY_LIB_RUNS", str(tmp_path / "mine"))
    runs.ensure([TINY], "a_study_of_its_own", executor=Serial())
    assert keys_in(tmp_path / "mine" / "a_study_of_its_own.jsonl") == [run_key(TINY)]
    assert runs.locate("x").reference == runs.project_root() / "data" / "runs" / "x.jsonl"


@pytest.mark.parametrize("folder", [None, "my_runs"])
def test_where_runs_lie_does_not_depend_on_the_working_directory(tmp_path, monkeypatch, folder):
    if folder:
        monkeypatch.setenv("STABILITY_LIB_RUNS", folder)
    else:
        monkeypatch.delenv("STABILITY_LIB_RUNS", raising=False)
    here = runs.locate("study")
    monkeypatch.chdir(tmp_path)
    assert runs.locate("study") == here
    assert here.local.is_absolute() and here.reference.is_absolute()


def test_results_do_not_depend_on_the_working_directory(tmp_path, monkeypatch, stored):
    monkeypatch.chdir(tmp_path)
    table = runs.ensure([THREE[0]], Store(tmp_path / "study.jsonl"), executor=Serial())
    assert table["loss_final"].item() == json.loads(stored[0])["loss_final"]


# plans and promotion

def test_a_plan_counts_cached_and_missing_runs_and_trains_nothing(store, stored, monkeypatch):
    store.local.write_bytes(stored[0])
    asked = [*THREE, THREE[2]]
    one = models.training_flops(TINY, data.vocab_size(TINY))
    plan = runs.plan(asked, store)
    assert (plan["cached"], plan["missing"], plan["flops"]) == (1, 2, 2 * one) and plan["seconds"] > 0
    assert runs.plan(THREE[:1], store) == {"cached": 1, "missing": 0, "flops": 0, "seconds": 0}
    assert runs.plan(asked, store, recompute=True)["missing"] == 3
    assert store.local.read_bytes() == stored[0]


def test_promoting_writes_the_grid_in_its_order_and_nothing_else(checkout, stored):
    source = checkout / "source.jsonl"
    source.write_bytes(stored[2] + edited(stored[0], loss_final=9.0) + stored[1] + stored[0])
    assert runs.promote("study", [THREE[0], THREE[2], THREE[0]], runs.read(source)) == 2
    reference = checkout / "data" / "runs" / "study.jsonl"
    assert reference.read_bytes() == stored[0] + stored[2]
    assert list(reference.parent.iterdir()) == [reference]
    runs.ensure([THREE[2], THREE[0]], "study", executor=Untouched())


def test_an_incomplete_grid_is_not_promoted_and_the_reference_stays(checkout, stored):
    source, reference = checkout / "source.jsonl", checkout / "data" / "runs" / "study.jsonl"
    source.write_bytes(stored[0])
    reference.write_bytes(stored[1])
    with pytest.raises(MissingRuns, match=r"2 of the 3 runs of 'study' are missing"):
        runs.promote("study", THREE, runs.read(source))
    assert reference.read_bytes() == stored[1]


def test_a_promotion_that_cannot_be_written_leaves_the_reference_as_it_was(checkout, stored, monkeypatch):
    source, reference = checkout / "source.jsonl", checkout / "data" / "runs" / "study.jsonl"
    source.write_bytes(b"".join(stored))
    reference.write_bytes(stored[1])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left .*the reference is as it was"):
        runs.promote("study", THREE, runs.read(source))
    assert reference.read_bytes() == stored[1]
    assert list(reference.parent.iterdir()) == [reference]


@pytest.mark.parametrize("seconds, text", [(0.2, "1 seconds"), (90, "90 seconds"), (600, "10 minutes"),
                                           (7200, "2 hours"), (200_000, "2 days")])
def test_durations_read_in_the_largest_unit_that_fits(seconds, text):
    assert runs.readable(seconds) == text


# safety

UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", sorted(Path(runs.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_nothing_in_the_package_unpickles_or_evaluates_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found = {name.split(".")[0] for name in names} & UNPICKLERS
            assert not found, f"{path.name} line {node.lineno}: import {found}"
        if isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert name not in ("eval", "exec", "pd.read_pickle"), f"{path.name} line {node.lineno}: {name}"
            assert name != "torch.load" or options.get("weights_only") == "True", f"{path.name} line {node.lineno}"
            assert options.get("allow_pickle") != "True", f"{path.name} line {node.lineno}: {name}"
