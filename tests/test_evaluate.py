"""The estimates against numbers derived by hand, known tables and scipy."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stability_lib import evaluate

LRS = (1e-3, 1e-2, 1e-1)


def sweep(losses, *, seed=0, init=4.0, status="ok", lrs=LRS, **columns) -> pd.DataFrame:
    """One LR curve as `runs.ensure` would return it."""
    statuses = [status] * len(losses) if isinstance(status, str) else status
    return pd.DataFrame([{"key": f"{seed}-{lr:g}", "seed": seed, "lr": lr, "loss_init": init, "loss_final": loss,
                          "status": state, **columns} for lr, loss, state in zip(lrs, losses, statuses, strict=True)])


def sensitivity(runs: pd.DataFrame, **options) -> float:
    return evaluate.lr_sensitivity(runs.assign(size=1), ["size"], **options)["lr_sensitivity"].item()


# Losses 3.0, 2.0, 2.6 lie 1.0, 0 and 0.6 above the best.
def test_lr_sensitivity_is_the_mean_excess_over_the_best_loss():
    row = evaluate.lr_sensitivity(sweep([3.0, 2.0, 2.6]).assign(size=1), ["size"]).iloc[0]
    assert row["lr_sensitivity"] == pytest.approx(1.6 / 3)
    assert (row["best_lr"], row["best_loss"]) == (1e-2, 2.0)


def test_lr_sensitivity_near_the_best_lr_weighs_by_a_gaussian_one_decade_wide():
    w = math.exp(-0.5)
    assert sensitivity(sweep([3.0, 2.0, 2.6]), weights="near_best") == pytest.approx(1.6 * w / (1 + 2 * w))


def test_lr_sensitivity_above_the_best_lr_leaves_slow_learning_out():
    assert sensitivity(sweep([3.0, 2.0, 2.6]), weights="above_best") == pytest.approx(0.6 / 2)


def test_lr_sensitivity_is_zero_where_every_lr_reaches_the_same_loss():
    assert sensitivity(sweep([2.0, 2.0, 2.0])) == 0


@pytest.mark.parametrize("final", [7.5, math.inf])
def test_a_loss_above_its_initial_value_counts_as_the_initial_one(final):
    assert sensitivity(sweep([3.0, 2.0, final])) == pytest.approx((1 + 0 + 2) / 3)


@pytest.mark.parametrize("final", [math.nan, 2.1, 9.0])
def test_a_diverged_run_counts_as_its_initial_loss_whatever_loss_it_left(final):
    assert sensitivity(sweep([3.0, 2.0, final], status=["ok", "ok", "diverged"])) == pytest.approx(1.0)


@pytest.mark.parametrize("weights", evaluate.LR_WEIGHTS)
def test_normalised_lr_sensitivity_does_not_change_when_all_losses_are_scaled(weights):
    small = sensitivity(sweep([3.0, 2.0, 2.6], init=4.0), weights=weights, normalised=True)
    large = sensitivity(sweep([15.0, 10.0, 13.0], init=20.0), weights=weights, normalised=True)
    assert small == pytest.approx(large)


def test_normalised_lr_sensitivity_divides_by_what_the_best_run_took_off():
    assert sensitivity(sweep([3.0, 2.0, 2.6]), normalised=True) == pytest.approx(1.6 / 3 / 2.0)


def test_normalised_lr_sensitivity_is_undefined_where_no_run_learned():
    assert math.isnan(sensitivity(sweep([9.0, 9.0, 9.0]), normalised=True))


def test_lr_sensitivity_has_one_row_per_group_and_seed_also_where_a_group_is_none():
    runs = pd.concat([sweep([3.0, 2.0, 2.6 + seed], seed=seed, clip_norm=clip)
                      for seed in (0, 1) for clip in (1.0, None)])
    table = evaluate.lr_sensitivity(runs, ["clip_norm"])
    assert len(table) == 4 and table["clip_norm"].isna().sum() == 2
    assert table.groupby("seed")["lr_sensitivity"].first().to_list() == pytest.approx([1.6 / 3, 2.6 / 3])


def test_lr_sensitivity_does_not_depend_on_the_order_of_the_rows():
    runs = sweep([4.0, 2.0, 2.0]).assign(size=1)
    for options in ({}, {"weights": "above_best"}):
        ordered, reversed_ = (evaluate.lr_sensitivity(r, ["size"], **options) for r in (runs, runs.iloc[::-1]))
        pd.testing.assert_frame_equal(ordered, reversed_)


def test_groups_on_different_lr_grids_cannot_be_compared():
    runs = pd.concat([sweep([3.0, 2.0, 2.6], size=1), sweep([3.0, 2.0], size=2, lrs=LRS[:2])])
    with pytest.raises(ValueError, match="select common LRs"):
        evaluate.lr_sensitivity(runs, ["size"])


def test_unknown_weights_name_the_known_ones():
    with pytest.raises(ValueError, match=r"did you mean 'uniform'.*near_best"):
        sensitivity(sweep([3.0, 2.0, 2.6]), weights="uniforms")


def test_a_finished_run_without_a_final_loss_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"0-0\.1"):
        sensitivity(sweep([3.0, 2.0, math.nan]))


def test_a_run_without_an_initial_loss_is_an_error():
    with pytest.raises(ValueError, match="loss at init"):
        sensitivity(sweep([3.0, 2.0, 2.6], init=math.nan))


# The best LR is 1e-2 by the mean over seeds, its mean loss 2.0; 2.6 and 2.5 lie more than 0.4 above it, 2.3 does not.
def test_a_run_fails_where_its_lr_is_too_high_and_its_loss_far_above_the_best():
    runs = pd.concat([sweep([3.0, 1.9, 2.6], seed=0, size=1), sweep([3.0, 2.1, 2.3], seed=1, size=1),
                      sweep([3.0, 2.0, 2.5], seed=2, size=1)], ignore_index=True)
    failing = evaluate.mark_failing(runs, ["size"])
    assert runs.loc[failing, ["seed", "lr"]].to_records(index=False).tolist() == [(0, 0.1), (2, 0.1)]


def test_a_run_that_learns_too_slowly_at_a_low_lr_does_not_fail():
    assert not evaluate.mark_failing(sweep([3.9, 3.0, 2.0], size=1), ["size"]).any()


def test_a_diverged_run_fails_at_any_lr():
    runs = sweep([math.nan, 2.0, 2.1], status=["diverged", "ok", "ok"], size=1)
    assert evaluate.mark_failing(runs, ["size"]).to_list() == [True, False, False]


def test_failing_is_judged_within_each_group_also_where_a_group_is_none():
    runs = pd.concat([sweep([3.0, 2.0, 2.6], clip_norm=1.0), sweep([3.6, 2.6, 2.6], clip_norm=None)])
    assert evaluate.mark_failing(runs, ["clip_norm"]).to_list() == [False, False, True, False, False, False]
    runs = pd.concat([sweep([3.0, 2.0, 2.1], clip_norm=1.0), sweep([3.6, 2.6, 3.9], clip_norm=None)])
    assert evaluate.mark_failing(runs, ["clip_norm"]).to_list() == [False, False, False, False, False, True]


def test_the_failing_lr_is_the_lowest_that_fails_and_the_largest_stable_one_lies_below_it():
    runs = sweep([2.0, 2.2, 2.6, 2.2], lrs=(1e-3, 1e-2, 1e-1, 1.0), size=1)
    row = evaluate.stable_lr(runs, ["size"]).iloc[0]
    assert (row["failing_lr"], row["largest_stable_lr"]) == (1e-1, 1e-2)


def test_where_no_lr_fails_the_failing_one_is_infinite_and_the_highest_is_stable():
    row = evaluate.stable_lr(sweep([3.0, 2.5, 2.0], size=1), ["size"]).iloc[0]
    assert (row["failing_lr"], row["largest_stable_lr"]) == (math.inf, 1e-1)


def test_where_every_lr_fails_no_lr_is_stable():
    row = evaluate.stable_lr(sweep([math.nan] * 3, status="diverged", size=1), ["size"]).iloc[0]
    assert (row["failing_lr"], row["largest_stable_lr"]) == (1e-3, 0)


def test_stable_lr_has_one_row_per_group_and_seed():
    runs = pd.concat([sweep([3.0, 2.0, 2.1], seed=seed, size=size) for seed in range(3) for size in (1, 2)],
                     ignore_index=True)
    assert len(evaluate.stable_lr(runs, ["size"])) == 6


# 1, 2, 3: standard error 1 / sqrt(3), and Student's t at 0.975 with 2 degrees of freedom is 4.303.
def test_the_interval_of_a_mean_is_students():
    estimate = evaluate.mean([1, 2, 3])
    half = 4.3026527 / math.sqrt(3)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == pytest.approx((2, 2 - half, 2 + half, 3))


def test_the_interval_of_a_mean_agrees_with_scipy_and_nearly_with_the_bootstrap():
    x = np.random.default_rng(0).normal(3, 2, 200)
    estimate = evaluate.mean(x)
    assert (estimate.low, estimate.high) == pytest.approx(stats.t.interval(0.95, 199, x.mean(), stats.sem(x)))
    boot = stats.bootstrap((x,), np.mean, rng=np.random.default_rng(1), n_resamples=2000).confidence_interval
    assert (estimate.low, estimate.high) == pytest.approx((boot.low, boot.high), abs=0.05)


def test_the_interval_of_a_mean_of_three_covers_the_truth_in_95_of_100_cases():
    samples = np.random.default_rng(0).normal(1, 1, (2000, 3))
    covered = np.mean([e.low <= 1 <= e.high for e in map(evaluate.mean, samples)])
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors of 2000 draws


def test_one_value_says_nothing_about_its_spread():
    estimate = evaluate.mean([2.5])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (2.5, -math.inf, math.inf, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_a_mean_of_nothing_or_of_what_is_not_finite_is_an_error(values):
    with pytest.raises(ValueError, match="finite observations"):
        evaluate.mean(values)


# Clopper-Pearson: with no success in n the upper bound is 1 - 0.025^(1/n); 5 of 10 is in every table.
@pytest.mark.parametrize("successes, n, low, high", [
    (0, 10, 0, 0.3085), (10, 10, 0.6915, 1), (5, 10, 0.1871, 0.8129), (1, 1, 0.025, 1)])
def test_the_interval_of_a_proportion_is_the_exact_one(successes, n, low, high):
    estimate = evaluate.proportion(successes, n)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((successes / n, low, high), abs=5e-5)
    assert estimate.n == n


def test_a_proportion_of_no_observations_is_an_error():
    with pytest.raises(ValueError, match="no observations"):
        evaluate.proportion(0, 0)


def test_a_slope_is_recovered_whatever_the_seeds_intercepts():
    frame = pd.DataFrame([{"seed": s, "x": x, "y": 2 * x + 10 * s} for s in range(3) for x in (0.0, 1.0, 5.0)])
    estimate = evaluate.slope(frame, "x", "y")
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == pytest.approx((2, 2, 2, 3))


def test_the_interval_of_a_slope_comes_from_the_seeds():
    frame = pd.DataFrame([{"seed": s, "x": x, "y": s * x} for s in (1, 2, 3) for x in (0.0, 1.0)])
    assert evaluate.slope(frame, "x", "y").high == pytest.approx(evaluate.mean([1, 2, 3]).high)


@pytest.mark.parametrize("x, y, message", [
    ([1.0, 1.0], [1.0, 2.0], "two values of x"), ([1.0], [1.0], "two values of x"),
    ([1.0, 2.0], [1.0, math.inf], "finite observations")])
def test_a_slope_through_one_place_or_through_infinity_is_an_error(x, y, message):
    with pytest.raises(ValueError, match=message):
        evaluate.slope(pd.DataFrame({"seed": 0, "x": x, "y": y}), "x", "y")


def paired(values: dict) -> pd.DataFrame:
    return pd.DataFrame([{"seed": seed, "size": size, "norm": norm, "loss": loss}
                         for (seed, size, norm), loss in values.items()])


# Within seed 0 the gaps are 1 and 3 (mean 2), within seed 1 they are 4 and 4.
GAPS = {(0, 1, "a"): 5.0, (0, 1, "b"): 4.0, (0, 2, "a"): 8.0, (0, 2, "b"): 5.0,
        (1, 1, "a"): 9.0, (1, 1, "b"): 5.0, (1, 2, "a"): 6.0, (1, 2, "b"): 2.0}


def test_a_difference_pairs_runs_and_counts_each_seed_once():
    estimate = evaluate.difference(paired(GAPS), "loss", "norm", "a", "b", ["seed", "size"])
    expected = evaluate.mean([2.0, 4.0])
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == pytest.approx(
        (3.0, expected.low, expected.high, 2))


def test_a_difference_changes_its_sign_with_the_sides():
    there = evaluate.difference(paired(GAPS), "loss", "norm", "a", "b", ["seed", "size"])
    back = evaluate.difference(paired(GAPS), "loss", "norm", "b", "a", ["seed", "size"])
    assert there.value == -back.value


def test_a_difference_looks_only_at_the_two_sides_it_is_asked_for():
    more = paired({**GAPS, (7, 7, "c"): math.nan})
    assert evaluate.difference(more, "loss", "norm", "a", "b", ["seed", "size"]).n == 2


def test_a_difference_does_not_drop_half_a_pair_silently():
    half = {place: loss for place, loss in GAPS.items() if place != (1, 2, "b")}
    with pytest.raises(ValueError, match="do not pair up"):
        evaluate.difference(paired(half), "loss", "norm", "a", "b", ["seed", "size"])


def test_a_difference_does_not_drop_a_loss_that_is_not_finite_silently():
    with pytest.raises(ValueError, match="finite observations"):
        evaluate.difference(paired({**GAPS, (1, 2, "b"): math.nan}), "loss", "norm", "a", "b", ["seed", "size"])


def test_an_estimate_reads_as_a_value_with_its_interval():
    assert str(evaluate.Estimate(0.51234, 0.4, 0.6, 3)) == "0.512 [0.4, 0.6]"


def test_the_crossing_lr_lies_where_the_loss_passes_the_margin_on_a_log_axis():
    table = pd.DataFrame({"size": 1, "seed": 0, "lr": [0.01, 0.1, 1.0], "status": "ok", "loss_init": 9.0,
                          "loss_final": [2.0, 2.2, 3.2], "key": list("abc")})
    found = evaluate.stable_lr(table, ["size"], margin=0.7).iloc[0]
    assert (found["failing_lr"], found["largest_stable_lr"]) == (1.0, 0.1)
    assert found["crossing_lr"] == pytest.approx(0.1 * 10**0.5)  # 2.7 is halfway from 2.2 to 3.2
    assert evaluate.stable_lr(table, ["size"], margin=0.1).iloc[0]["crossing_lr"] == pytest.approx(0.01 * 10**0.5)
    assert np.isinf(evaluate.stable_lr(table, ["size"], margin=5.0).iloc[0]["crossing_lr"])
