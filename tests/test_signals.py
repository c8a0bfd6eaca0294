"""Signals on known sequences, alarms inside of training, and sharpness against dense Hessians."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from stability_lib import models, probes, replicas, runs, signals
from stability_lib.alarms import ALARMS
from stability_lib.chapters import c16_early_warning as c16
from stability_lib.config import SIGNALS, RunConfig, replace, run_key
from stability_lib.train import loss_terms, train_run

TINY = RunConfig(d_model=16, n_layers=2, n_heads=2, seq_len=16, batch_size=8, steps=24, warmup_steps=4,
                 eval_sequences=8, probe_every=0, qk_norm="none", lr=0.05)
rng = np.random.default_rng(0)


# the arithmetic of signals

def test_a_z_score_looks_back_only_and_at_so_many():
    values = [1.0, 2.0, 3.0, 4.0, 10.0]
    found = signals.z_score(values, window=3, least=2)
    assert found.isna().tolist() == [True, True, False, False, False]
    assert found.iloc[2] == pytest.approx((3 - 1.5) / np.std([1, 2], ddof=1))
    assert found.iloc[4] == pytest.approx((10 - 3) / np.std([2, 3, 4], ddof=1))
    assert signals.z_score([5.0] * 9 + [6.0], least=2, floor=0.5).iloc[-1] == pytest.approx(2)


def test_cusum_adds_up_a_drift_and_forgets_a_fall():
    assert signals.cusum([math.nan, 1, 1, -9, 0.6, 0.4], slack=0.5).tolist() == pytest.approx([0, 0.5, 1, 0, 0.1, 0])


def test_growth_is_in_decades():
    assert signals.growth([1, 10, 1000, 10], span=2).tolist()[2:] == pytest.approx([3, 0])


def test_signals_of_the_beginning_are_those_of_the_whole():
    read = {name: rng.lognormal(size=60) for name in ("loss", "gradient_norm", *SIGNALS)}
    whole = signals.derive(read)
    assert set(whole) == set(SIGNALS)
    part = signals.derive({name: values[:31] for name, values in read.items()})
    pd.testing.assert_frame_equal(part, whole.iloc[:31])


def test_signals_that_were_not_read_are_left_out():
    assert list(signals.derive({"loss": [1.0, 2.0], "log_z": [0.0, 1.0]})) == ["loss_spike", "log_z"]


def test_readings_are_reduced_to_the_worst_layer():
    read = {"attention_logit_max/block0": 3.0, "attention_logit_max/block1": 5.0, "attention_entropy/block0": 1.0,
            "attention_entropy/block1": 2.0, "output_kurtosis/block0": 3.0, "update_rms/a": 0.1, "update_rms/b": 0.2,
            "log_z": -4.0, "q_rms/block0": 9.0}
    assert signals.reduced(read, 0.1, 4.0) == pytest.approx({
        "attention_logit_max": 5, "output_kurtosis": 3, "attention_collapse": 0.75, "update_rms": 2, "log_z": 4})
    assert signals.reduced(read | {"output_kurtosis/block0": math.nan}, 0.1, 4.0)["output_kurtosis"] == math.inf


# failing, alarms, leads

STEPS = list(range(0, 40, 2))


def test_a_run_has_failed_from_where_its_loss_stays_above_its_best():
    rises = [3.0] * 8 + [5.0] * 2 + [3.0] * 4 + [4.0] * 6  # the first excursion comes back
    assert signals.failing_step(STEPS, rises) == 28
    assert math.isnan(signals.failing_step(STEPS, [3.0] * 8 + [5.0] * 2 + [3.0] * 10))
    assert math.isnan(signals.failing_step(STEPS, [3.0] * 14 + [3.39] * 6))


def test_or_above_the_same_run_at_a_rate_it_can_stand():
    healthy, plateau = np.linspace(4, 2, 20), np.maximum(np.linspace(4, 2, 20), 3.0)
    step = signals.failing_step(STEPS, plateau, healthy)
    assert step == STEPS[np.flatnonzero(3.0 - healthy > 0.4)[0]]
    assert math.isnan(signals.failing_step(STEPS, plateau))


def test_a_run_that_ended_early_has_failed_by_then():
    assert signals.failing_step([0, 2, 4], [3.0, 3.0, 3.1], stop_step=5) == 5
    assert signals.failing_step(range(7), [3.0] * 4 + [None] * 3, stop_step=7) == 4


def test_first_alarm_and_onsets():
    values = [0, math.nan, 2, 3, 0, 5]
    assert signals.first_alarm(range(6), values, 1) == 2
    assert signals.onsets(values, 1) == 2
    assert signals.onsets([9, 9, 0], 1) == 1
    assert math.isnan(signals.first_alarm(range(6), values, 7))


@pytest.mark.parametrize("per_1000", [0.0, 3.0, 20.0])
def test_the_fitted_threshold_is_the_lowest_with_so_few_false_alarms_at_it_and_above(per_1000):
    healthy = [rng.integers(0, 30, size=50).astype(float) for _ in range(8)]
    healthy[0][:4] = math.nan
    found = signals.fit_threshold(healthy, steps=8 * 100, per_1000=per_1000)

    def rate(threshold):
        return 1000 * sum(signals.onsets(values, threshold) for values in healthy) / 800
    assert all(rate(threshold) <= per_1000 for threshold in np.arange(found, 31))
    assert found == 0 or rate(np.nextafter(found, -1)) > per_1000


def test_a_threshold_needs_a_healthy_run():
    with pytest.raises(ValueError, match="do not fail"):
        signals.fit_threshold([], 100)


def test_an_alarm_is_judged_run_by_run():
    series = pd.DataFrame({"key": ["a"] * 3 + ["b"] * 3 + ["c"] * 3, "step": [0, 5, 10] * 3,
                           "value": [0, 9, 9, 9, 0, 9, 0, 0, 9]})
    about = pd.DataFrame({"failing_step": [12.0, math.nan, 10.0, 7.0], "steps": 15}, index=["a", "b", "c", "d"])
    found = signals.judge(series, about, 1.0)
    assert found["lead"].tolist()[0] == 7 and found["warned"].tolist() == [True, False, False, False]
    assert found.loc["b", "false_alarms"] == 2 and math.isnan(found.loc["b", "lead"])
    assert found.loc["c", "lead"] == 0 and found.loc["d", "lead"] == 0 and math.isnan(found.loc["d", "alarm_step"])


# in training

def test_signals_are_read_along_the_way_and_change_nothing():
    plain, read = train_run(TINY), train_run(replace(TINY, signals_every=2, sharpness_every=8))
    assert read.curves["loss"] == plain.curves["loss"] and read.loss_final == plain.loss_final
    assert read.curves["signal_step"] == [*range(0, 24, 2), 23] and read.curves["sharpness_step"] == [0, 8, 16, 23]
    probed = train_run(replace(TINY, probe_every=2)).curves
    logits = np.max([probed[f"attention_logit_max/block{i}"] for i in range(2)], axis=0)
    assert read.curves["signal/attention_logit_max"] == logits.tolist()
    assert read.curves["signal/update_rms"][0] == pytest.approx(1, abs=0.05)  # Adam's first step
    row = runs.to_row(read, "cpu")
    runs.check_new(row, row["key"])


def test_replicas_read_the_same_signals():
    config = replace(TINY, signals_every=4, steps=9)
    found = replicas.train_replicas([config, replace(config, seed=1)])[0].curves
    alone = train_run(config).curves
    for name in set(SIGNALS) - {"loss_spike", "gradient_cusum", "logit_growth", "kurtosis_jump"}:
        assert found[f"signal/{name}"] == pytest.approx(alone[f"signal/{name}"], rel=2e-2), name


def test_runs_with_alarms_or_sharpness_train_alone():
    for fields in (dict(sharpness_every=5), dict(signals_every=2, alarm="step", alarm_above=3)):
        configs = [replace(TINY, seed=seed, **fields) for seed in range(2)]
        assert [len(batch) for batch in replicas.batches(configs)] == [1, 1]


def test_an_alarm_acts_once_after_the_step_that_set_it_off():
    plain = train_run(replace(TINY, signals_every=1))
    read = plain.curves["signal/attention_logit_max"]
    threshold = max(read[:10]) * 0.999
    step = next(i for i in range(signals.LEAST, 24) if read[i] > threshold)
    acted = train_run(replace(TINY, signals_every=1, alarm="attention_logit_max", alarm_above=threshold))
    assert acted.curves["alarm_step"] == [step]
    assert acted.curves["loss"][:step + 2] == plain.curves["loss"][:step + 2]
    assert acted.curves["loss"][step + 2:] != plain.curves["loss"][step + 2:]
    blind = train_run(replace(TINY, signals_every=1, alarm="step", alarm_above=step - 1))
    assert blind.curves["alarm_step"] == [step] and blind.curves["loss"] == acted.curves["loss"]


def test_an_alarm_that_never_goes_off_changes_nothing():
    quiet = train_run(replace(TINY, signals_every=1, alarm="gradient_cusum", alarm_above=1e9, on_alarm="roll_back"))
    assert "alarm_step" not in quiet.curves
    assert quiet.curves["loss"] == train_run(TINY).curves["loss"]


def test_halving_halves_the_steps():
    blind = replace(TINY, signals_every=1, alarm="step", alarm_above=11, weight_decay=0.0)
    halved, plain = (train_run(replace(blind, probe_every=1, alarm_above=at)).curves for at in (11, 99))
    assert halved["update_rms/head"][:13] == plain["update_rms/head"][:13]
    assert halved["update_rms/head"][13] == pytest.approx(plain["update_rms/head"][13] / 2, rel=1e-3)
    assert halved["signal/update_rms"][13] == pytest.approx(plain["signal/update_rms"][13], rel=1e-3)


def test_rolling_back_restores_weights_and_moments():
    back = replace(TINY, signals_every=1, alarm="step", alarm_above=11, on_alarm="roll_back", roll_back_by=5,
                   probe_every=1)
    curves, plain = train_run(back).curves, train_run(replace(back, alarm_above=99)).curves
    assert curves["alarm_step"] == [12]
    for name in ("parameter_rms/head", "parameter_rms/block0.q"):  # read before a step: at 13 as it was before step 7
        assert curves[name][13] == plain[name][7] != plain[name][13]
    # every moment was restored too: a run that had never gone on would take the very same step on that batch
    again = train_run(replace(back, alarm_above=11, roll_back_by=1)).curves
    assert again["parameter_rms/head"][13] == plain["parameter_rms/head"][11]


def test_qk_clip_begins_at_the_alarm():
    blind = replace(TINY, signals_every=1, alarm="step", alarm_above=11, on_alarm="qk_clip", qk_clip=3.0, probe_every=1)
    clipped, plain = train_run(blind).curves, train_run(replace(blind, alarm_above=99)).curves
    assert clipped["loss"][:14] == plain["loss"][:14]  # read at step 13, acted on after it
    read = "signal/attention_logit_max"
    assert min(plain[read][14:]) > 3 and clipped[read][13] == plain[read][13] and clipped[read][14] < plain[read][14]


@pytest.mark.parametrize(("fields", "words"), [
    (dict(alarm="kurtosis"), "alarm 'kurtosis' is unknown"),
    (dict(alarm="output_kurtosis"), "choose signals_every 1 or more"),
    (dict(alarm="logit_growth", signals_every=1, mixer="mamba"), "needs softmax attention"),
    (dict(alarm="attention_collapse", signals_every=1, attention="squared_relu"), "needs softmax attention"),
    (dict(alarm="kurtosis_jump", signals_every=1, n_layers=0), "needs blocks"),
    (dict(alarm="step", signals_every=1, on_alarm="roll_back", shaping="kss"), "choose shaping 'none'"),
    (dict(alarm="step", signals_every=1, on_alarm="roll_back", optimizer="muon"), "choose optimizer 'adamw'"),
    (dict(alarm="step", signals_every=1, on_alarm="qk_clip", qk_norm="none"), "choose qk_clip 100"),
    (dict(sharpness_every=5, optimizer="lion"), "choose optimizer 'adamw'"),
    (dict(eps_late=1e-3, optimizer="lion"), "eps_late 0.001 is worked out .* choose optimizer 'adamw'"),
    (dict(sharpness_every=5, parametrization="mup_simple"), "choose parametrization 'standard'"),
])
def test_what_cannot_be_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        RunConfig(**fields)


def test_old_keys_are_kept():
    assert run_key(RunConfig()) == run_key(RunConfig(alarm="none", signals_every=0, on_alarm="halve_lr"))


# sharpness

def test_sharpness_of_a_quadratic_is_its_largest_eigenvalue():
    root = torch.randn(30, 30)
    hessian, scale = root @ root.T, torch.rand(30) + 0.5
    x = torch.randn(30, requires_grad=True)
    value, vector = probes.sharpness(lambda: x @ hessian @ x / 2, [x], [scale], iterations=15)
    dense = torch.linalg.eigvals(hessian / scale[:, None]).real.max()
    assert value == pytest.approx(float(dense), rel=1e-4)
    assert probes.sharpness(lambda: x @ hessian @ x / 2, [x], [scale], vector, 2)[0] == pytest.approx(value, rel=1e-4)


def test_sharpness_is_the_most_positive_eigenvalue_not_the_largest():
    x = torch.zeros(2, requires_grad=True)
    value, _ = probes.sharpness(lambda: (x[0] ** 2 - 9 * x[1] ** 2) / 2, [x], [torch.ones(2)])
    assert value == pytest.approx(1, rel=1e-4)


def test_sharpness_of_a_model_is_that_of_its_dense_hessian():
    config = replace(TINY, d_model=8, n_layers=1, n_heads=1, seq_len=4)
    model, batch = models.build(config, 5), torch.randint(5, (4, 5))
    weights = [*model.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=0.1)

    def loss():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss_terms(model(batch[:, :-1]), batch[:, 1:], 0.0)[0]

    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    precondition = probes.adam_preconditioner(optimizer, weights)
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights, create_graph=True)])
    rows = [torch.cat([part.flatten() for part in torch.autograd.grad(g, weights, retain_graph=True)]) for g in flat]
    dense = torch.stack(rows).double() / torch.cat([p.flatten() for p in precondition]).double()[:, None]
    value, _ = probes.sharpness(loss, weights, precondition, iterations=20)
    assert value == pytest.approx(float(torch.linalg.eigvals(dense).real.max()), rel=1e-3)


def test_the_preconditioner_is_what_adam_divides_by():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        x.grad = x.detach() ** 3
        before = x.detach().clone()
        optimizer.step()
    (p,) = probes.adam_preconditioner(optimizer, [x])
    assert torch.allclose(before - x.detach(), 0.1 * optimizer.state[x]["exp_avg"] / p, rtol=1e-4)


# chapter 16, and what the monitor takes from it

@pytest.fixture(scope="module")
def near_failing():
    found = runs.frame([*runs.read(runs.reference_path("near_failing")).values()])
    assert set(found["key"]) == {run_key(config) for config in c16.near_failing("cpu")}
    return signals.series(found), c16.about(found)


def test_the_alarm_of_the_actions_is_the_best_of_the_fitting_part(near_failing):
    assert c16.best_alarm(*near_failing) == pytest.approx(c16.ALARM)


def test_the_monitors_alarms_are_those_of_chapter_16(near_failing):
    taken = {alarm.quantity: alarm.above for alarm in ALARMS if alarm.chapter == "16"}
    assert taken == c16.monitored(*near_failing)
    counted = [alarm for alarm in ALARMS if alarm.per_1000 is not None]
    assert {alarm.quantity for alarm in counted} >= {alarm.quantity for alarm in ALARMS} & set(SIGNALS)
    for alarm in counted:
        rate = c16.false_alarms(*near_failing, alarm.quantity, alarm.above)
        assert alarm.per_1000 == pytest.approx(rate, abs=0.05)


def test_nearly_all_runs_on_text_that_pass_1e4_fail(near_failing):
    series, about = near_failing
    passed = set(series.loc[(series["signal"] == "attention_logit_max") & (series["value"] > 1e4), "key"])
    passed = about[about.index.isin(passed) & (about["task"] == "P")]
    assert len(passed) > 10 and passed["failing_step"].notna().mean() > 0.9


def test_actions_begin_when_they_say():
    config = c16.untreated("cpu")[-1]
    assert c16.acted(config, "roll back", "from the start") is None
    assert c16.acted(replace(config, qk_norm="head"), "QK-clip", "at the alarm") is None
    assert c16.acted(config, "halve the LR", "from the start").lr == config.lr / 2
    blind = c16.acted(config, "halve the LR", "at a random step")
    assert blind.alarm == "step" and 10 <= blind.alarm_above < config.steps
    assert c16.acted(config, "QK-clip", "at the alarm").alarm == c16.ALARM[0]


def test_every_run_has_its_setting():
    for scale in ("quick", "cpu", "gpu"):
        names = {c16.setting_name(vars(config)) for config in c16.near_failing(scale)}
        assert names == set(c16._settings(scale))
