"""`ensure` and its tables: what is finished is never trained again, and a row says what happened."""

import dataclasses
import datetime
import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from sweeps import THREE, TINY, Serial, Untouched, edited, keys, keys_in

from stability_lib import data, models, replicas, runs, studies, train
from stability_lib.config import grid, replace
from stability_lib.runs import MissingRuns, Store
from stability_lib.train import RunResult

pytestmark = pytest.mark.usefixtures("no_progress_bar")


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
    (replace(TINY, eval_sequences=10**6), data.DataError), (replace(TINY, data="shakespear"), ValueError),
    (replace(TINY, vocab_size=2), ValueError)])
def test_a_config_that_cannot_be_run_stops_the_sweep_before_any_training(store, bad, error):
    with pytest.raises(error):
        runs.ensure([*THREE, bad], store, executor=Untouched())
    assert not store.local.exists()


def test_an_unknown_device_stops_the_sweep_before_any_training(store):
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        runs.ensure(THREE, store, device="gpu", executor=Untouched())


@pytest.mark.parametrize("options, error, message", [
    ({"recompute": "none"}, TypeError, "recompute must be True or False, got str 'none'"),
    ({"recompute": 1}, TypeError, "recompute must be True or False"),
    ({"workers": 0}, ValueError, "workers must be at least 1, got 0"), ({"workers": -1}, ValueError, "workers"),
    ({"workers": 1.5}, TypeError, "workers must be a whole number"), ({"workers": True}, TypeError, "workers"),
    ({"max_new": -1}, ValueError, "max_new must be at least 0"), ({"max_new": "none"}, TypeError, "max_new"),
    ({"executor": "loky"}, TypeError, r"executor must be a concurrent\.futures\.Executor, got str 'loky'"),
    ({"executor": Serial}, TypeError, "executor must be")])
def test_an_option_that_means_nothing_is_refused_before_any_training(store, options, error, message):
    with pytest.raises(error, match=message):
        runs.ensure(THREE, store, **{"executor": Untouched()} | options)
    if options.keys() & {"recompute", "workers"}:
        with pytest.raises(error, match=message):
            runs.plan(THREE, store, **options)
    assert not store.local.exists()


@pytest.mark.parametrize("configs, message", [
    (TINY, r"configs must be a list of RunConfig, got one RunConfig: write \[config\]"), (None, "got one NoneType"),
    ([{"lr": 0.1}], r"configs must hold RunConfig, got dict .*config\.from_dict"), ({"lr": 0.1}, "got str 'lr'"),
    ([*THREE, None], "got NoneType"), (pd.DataFrame({"lr": [0.1]}), "got str 'lr'")])
def test_what_are_no_configs_is_refused_before_any_training(store, configs, message):
    for ask in (runs.ensure, runs.plan):
        with pytest.raises(TypeError, match=message):
            ask(configs, store)
    with pytest.raises(TypeError, match=message):
        runs.promote("study", configs, {})


def test_a_text_of_ones_own_is_known_by_its_content(store, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 50)
    config = replace(TINY, data=str(text))
    first = runs.ensure([config], store, executor=Serial())
    assert runs.plan([config], store)["cached"] == 1
    pd.testing.assert_frame_equal(first, runs.ensure([config], store, executor=Untouched()))
    text.write_text("whether 'tis nobler in the mind to suffer\n" * 50)
    assert runs.plan([config], store)["missing"] == 1
    second = runs.ensure([config], store, executor=Serial())
    assert first["key"].item() != second["key"].item() and first["loss_init"].item() != second["loss_init"].item()


def test_a_grid_reads_its_text_once(store, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 50)
    read, pin = [], data.pin
    monkeypatch.setattr(data, "pin", lambda config: read.append(config) or pin(config))
    runs.plan([replace(TINY, data=str(text), seed=seed) for seed in range(20)], store)
    assert [config.data for config in read].count(str(text)) == 1


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
    extremes = [{"loss": [1.5, 3.5]}, None]  # the second is from before they were recorded, and was not thinned
    return runs.frame([json.loads(line) | {"curves": c, "extremes": e}
                       for line, c, e in zip(stored, curves, extremes, strict=False)])


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
    assert runs.peak(two_runs, "loss").to_list() == [3.5, 3.0]


def test_a_peak_of_what_is_recorded_at_every_step_is_that_of_all_steps():
    """A spike on one of 450 steps, which the stored curve leaves out."""
    norms = [3.01] * 450
    norms[7], norms[11], norms[13] = 11.41, 0.2, math.inf
    steps = list(range(450))
    row = runs.to_row(RunResult(TINY, "ok", None, None, 2.0, 1.0, 0.5, {"step": steps, "gradient_norm": norms,
                                                                       "loss": [math.nan] * 450}, [], 1.0), "cpu")
    assert max(row["curves"]["gradient_norm"]) == 3.01
    assert row["extremes"] == {"gradient_norm": [0.2, 11.41]}
    assert runs.peak(runs.frame([row]), "gradient_norm").to_list() == [11.41]
    assert runs.peak(runs.frame([row]), "loss").isna().all()


def test_a_peak_of_thinned_curves_says_so(store, stored):
    old = json.loads(stored[0])
    del old["extremes"]
    old["curves"] |= {"step": [0, 2, 4], "loss": [3.0, 2.0, 1.0]}
    table = runs.frame([old, json.loads(stored[1])])
    with pytest.warns(UserWarning, match="1 of 2 runs .*their peak of loss is that of a thinned curve"):
        assert runs.peak(table, "loss").iloc[0] == 3.0
    assert "extremes" not in runs.curve(table, "loss")
    runs.peak(table, "attention_logit_max")  # without a warning: it is recorded at probed steps only, and all are kept


def test_the_extremes_of_a_row_are_those_of_its_run(store):
    config = replace(TINY, steps=250, lr=1.0)
    row = runs.ensure([config], store, executor=Serial()).iloc[0]
    result = runs.train_run(config)
    for name in ("loss", "gradient_norm"):
        values = result.curves[name]
        assert row["extremes"][name] == [pytest.approx(min(values), rel=1e-4), pytest.approx(max(values), rel=1e-4)]
        assert len(row["curves"][name]) < 130

# plans

def test_an_estimate_is_measured_on_the_device_it_is_for(monkeypatch):
    """An accelerator in the place of which stands a rule: a step of n replicas launches its layers, 2 ms each and 1 ms
    more, and computes n times its FLOPs, at 3e10 FLOPs a second for each unit of width."""
    asked = []

    def step_seconds(config, device):
        asked.append(device)
        flops = models.training_flops(config, data.vocab_size(config)) / config.steps
        return 1e-3 + 2e-3 * config.n_layers, flops / (3e10 * config.d_model) + 5e-5

    monkeypatch.setattr(replicas, "step_seconds", step_seconds)
    monkeypatch.setattr(train, "memory", lambda device: 1e12)
    monkeypatch.setattr(runs, "resolve_device", lambda device: {"auto": "cuda"}.get(device, device))
    monkeypatch.setattr(train, "resolve_device", lambda device: device)
    monkeypatch.setattr(runs, "train_run", lambda *_: pytest.fail("trained single runs to time replicas"))
    replicas.measured.cache_clear()
    for size in studies.SIZES["gpu"]:
        config = replace(studies.base("gpu"), **size)
        overhead, each = step_seconds(config, "cuda")
        for n in (1, 2, 12):
            batches = math.ceil(n / replicas._fitting(config, overhead, each, 1e12))
            about = runs.estimate_seconds(grid(config, seed=range(n)), "auto")
            assert about == pytest.approx(config.steps * (batches * overhead + n * each), rel=0.35)
    assert {*asked} == {"cuda"}
    replicas.measured.cache_clear()


def test_an_estimate_for_a_device_that_is_not_here_is_a_named_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for estimate in (lambda: runs.estimate_seconds(THREE, "cuda"), lambda: runs.plan(THREE, "none", "cuda")):
        with pytest.raises(ValueError, match="device 'cuda' is not available here: choose auto or cpu"):
            estimate()


def test_a_plan_counts_cached_and_missing_runs_and_trains_nothing(store, stored, monkeypatch):
    store.local.write_bytes(stored[0])
    asked = [*THREE, THREE[2]]
    one = models.training_flops(TINY, data.vocab_size(TINY))
    plan = runs.plan(asked, store)
    assert (plan["cached"], plan["missing"], plan["flops"]) == (1, 2, 2 * one) and plan["seconds"] > 0
    assert runs.plan(THREE[:1], store) == {"cached": 1, "missing": 0, "flops": 0, "seconds": 0}
    assert runs.plan(asked, store, recompute=True)["missing"] == 3
    assert store.local.read_bytes() == stored[0]


@pytest.mark.parametrize("seconds, text", [(0.2, "1 seconds"), (90, "90 seconds"), (600, "10 minutes"),
                                           (7200, "2 hours"), (200_000, "2 days")])
def test_durations_read_in_the_largest_unit_that_fits(seconds, text):
    assert runs.readable(seconds) == text
