"""The estimates against numbers derived by hand, known tables and scipy."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

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


def parabola(centre: float, lrs, curvature: float = 0.3, bottom: float = 2.0, **columns) -> pd.DataFrame:
    losses = [bottom + curvature * (math.log10(lr) - math.log10(centre)) ** 2 for lr in lrs]
    return sweep(losses, lrs=lrs, size=1, **columns)


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("lrs", [(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (1e-3, 4e-3, 2e-2, 5e-2, 2e-1, 1.0)])
@pytest.mark.parametrize("centre", [5e-3, 1e-2, 3.7e-2])
def test_the_best_lr_of_a_parabola_is_its_vertex_wherever_the_grid_lies(centre, lrs, reach):
    row = evaluate.best_lr(parabola(centre, lrs).iloc[::-1], ["size"], reach=reach).iloc[0]
    assert (row["best_lr"], row["best_loss"]) == pytest.approx((centre, 2.0), rel=1e-6)
    assert not row["at_edge"]


@pytest.mark.parametrize("centre, edge", [(1e-4, 1e-3), (10.0, 1e-1)])
def test_a_minimum_at_the_edge_of_the_grid_is_flagged_and_not_extrapolated(centre, edge):
    curve = parabola(centre, LRS)
    row = evaluate.best_lr(curve, ["size"]).iloc[0]
    assert row["at_edge"]
    assert (row["best_lr"], row["best_loss"]) == pytest.approx((edge, curve["loss_final"].min()))


# Through 3, 2, 2 the vertex lies half way to the third LR; all five losses are symmetric about the middle one. The
# humped curve's parabola opens downwards.
def test_a_wider_reach_averages_a_flat_bottom_and_a_flat_curve_keeps_the_grids_best():
    lrs = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    flat_bottom = sweep([3.0, 2.0, 2.0, 2.0, 3.0], lrs=lrs, size=1)
    assert evaluate.best_lr(flat_bottom, ["size"]).iloc[0]["best_lr"] == pytest.approx(10**-2.5)
    assert evaluate.best_lr(flat_bottom, ["size"], reach=3).iloc[0]["best_lr"] == pytest.approx(1e-2)
    humped = sweep([2.0, 1.9, 3.0, 2.5, 2.0], lrs=lrs, size=1)
    assert evaluate.best_lr(humped, ["size"], reach=3).iloc[0][["best_lr", "best_loss"]].to_list() == [1e-3, 1.9]


def test_a_fitted_vertex_never_leaves_the_lrs_it_was_fitted_to():
    falling = sweep([9.0, 5.0, 2.9, 2.0, 2.1], lrs=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), init=10.0, size=1)
    for reach in (1, 2, 3):
        assert 1e-4 <= evaluate.best_lr(falling, ["size"], reach=reach).iloc[0]["best_lr"] <= 1.0


def test_the_best_lr_is_found_for_each_group_and_seed_and_a_diverged_run_counts_as_its_initial_loss():
    runs = pd.concat([parabola(centre, (1e-3, 1e-2, 1e-1), seed=seed, clip_norm=clip)
                      for clip in (1.0, None) for seed, centre in enumerate([8e-3, 1e-2])])
    table = evaluate.best_lr(runs, ["clip_norm"])
    assert len(table) == 4 and table["best_lr"].to_list() == pytest.approx([8e-3, 1e-2] * 2)
    diverged = sweep([4.0, 2.0, math.nan], status=["ok", "ok", "diverged"], size=1)
    assert evaluate.best_lr(diverged, ["size"]).iloc[0]["best_lr"] == pytest.approx(1e-2)


@pytest.mark.parametrize("lrs", [(1e-3, 1e-2), (1e-3, 1e-2, 1e-2)])
def test_a_minimum_of_two_lrs_or_of_mixed_runs_is_an_error(lrs):
    with pytest.raises(ValueError, match="three or more LRs with one run each"):
        evaluate.best_lr(sweep([2.0] * len(lrs), lrs=lrs, size=1), ["size"])


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


def test_the_window_of_learning_rates_ends_where_the_loss_passes_the_margin_linear_in_log_lr():
    """Losses 2.4, 2.0, 2.2, 2.3 at LRs a decade apart: 0.1 above the best lies a quarter of a decade below it, half of
    one above."""
    runs = sweep([2.4, 2.0, 2.2, 2.3], lrs=(1e-3, 1e-2, 1e-1, 1.0), size=1)
    row = evaluate.lr_window(runs, ["size"]).iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((10**-2.25, 10**-1.5)) and row["decades"] == pytest.approx(0.75)
    assert not row["open_low"] and not row["open_high"]


def test_a_window_ends_with_its_grid_and_at_a_run_that_diverged():
    row = evaluate.lr_window(sweep([2.05, 2.0, math.nan], status=["ok", "ok", "diverged"], size=1), ["size"]).iloc[0]
    assert row["low"] == pytest.approx(1e-3) and row["open_low"] and not row["open_high"]
    assert row["high"] == pytest.approx(10 ** (-2 + 0.1 / 2))  # it counts as its loss at init, 4.0
    with pytest.raises(ValueError, match="more than one run per LR"):
        evaluate.lr_window(pd.concat([sweep([2.0, 2.1, 2.2], size=1)] * 2), ["size"])


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


def test_slopes_are_taken_within_each_group():
    frame = pd.DataFrame([{"arm": arm, "seed": s, "x": x, "y": s * x + (arm == "b") * 3 * x}
                          for arm in "ab" for s in (1, 2) for x in (0.0, 1.0, 4.0)])
    found = evaluate.slopes(frame, "x", "y", ["arm", "seed"])
    assert found.to_dict() == pytest.approx({("a", 1): 1, ("a", 2): 2, ("b", 1): 4, ("b", 2): 5})


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
    assert str(evaluate.estimate(0.51234, 3, lambda level: (0.4, 0.6))) == "0.512 [0.4, 0.6]"


def test_the_crossing_lr_lies_where_the_loss_passes_the_margin_on_a_log_axis():
    table = pd.DataFrame({"size": 1, "seed": 0, "lr": [0.01, 0.1, 1.0], "status": "ok", "loss_init": 9.0,
                          "loss_final": [2.0, 2.2, 3.2], "key": list("abc")})
    found = evaluate.stable_lr(table, ["size"], margin=0.7).iloc[0]
    assert (found["failing_lr"], found["largest_stable_lr"]) == (1.0, 0.1)
    assert found["crossing_lr"] == pytest.approx(0.1 * 10**0.5)  # 2.7 is halfway from 2.2 to 3.2
    assert evaluate.stable_lr(table, ["size"], margin=0.1).iloc[0]["crossing_lr"] == pytest.approx(0.01 * 10**0.5)
    assert np.isinf(evaluate.stable_lr(table, ["size"], margin=5.0).iloc[0]["crossing_lr"])


@given(st.integers(0, 10_000))
def test_an_auroc_is_the_mann_whitney_statistic_and_sklearns(seed):
    rng = np.random.default_rng(seed)
    failed, score = np.arange(30) < 11, rng.integers(0, 12, size=30).astype(float)
    found = evaluate.auroc(failed, score, resamples=50)
    assert found.value == pytest.approx(stats.mannwhitneyu(score[failed], score[~failed]).statistic / (11 * 19))
    assert found.value == pytest.approx(roc_auc_score(failed, score))
    assert found.low <= found.value <= found.high and found.n == 30


def test_an_aurocs_interval_is_the_percentile_bootstraps():
    rng = np.random.default_rng(3)
    failed = rng.uniform(size=60) < 0.4
    score = rng.normal(size=60) + failed
    found = evaluate.auroc(failed, score, resamples=4000)
    peer = stats.bootstrap((failed, score), roc_auc_score, paired=True, vectorized=False, n_resamples=2000,
                           method="percentile", rng=np.random.default_rng(4)).confidence_interval
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=0.02)


def test_an_auroc_is_known_for_perfect_reversed_constant_and_infinite_scores():
    failed = [True, True, False, False]
    for score, value in (([3, 4, 1, 2], 1), ([1, 2, 3, 4], 0), ([5, 5, 5, 5], 0.5), ([math.inf, 1, 2, 0], 0.75)):
        assert evaluate.auroc(failed, score).value == value


def test_an_auroc_within_groups_counts_only_their_pairs():
    """Between the groups the score is perfect, within them it is 1 of 1 and 0 of 2 pairs."""
    failed, score, norm = [1, 0, 0, 1, 0, 0], [9, 8, 5, 1, 2, 3], list("aabbbc")
    assert evaluate.auroc(failed, score, within=norm).value == pytest.approx(1 / 3)
    assert evaluate.auroc([1, 1, 0, 0], [3, 4, 1, 2], within=list("abab")).value == 1


def test_a_difference_of_aurocs_is_paired():
    failed, score = [1, 1, 0, 0, 1, 0], [5, 2, 1, 3, 6, 2]
    same = evaluate.auroc(failed, score, minus=score)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    other = [1, 0, 1, 0, 1, 0]
    expected = evaluate.auroc(failed, score).value - evaluate.auroc(failed, other).value
    assert evaluate.auroc(failed, score, minus=other).value == pytest.approx(expected)


def test_copies_of_a_run_add_no_evidence_where_they_are_resampled_together():
    rng = np.random.default_rng(5)
    failed = np.arange(40) < 20
    score, copies = rng.normal(size=40) + failed, np.repeat(np.arange(40), 9)
    once, together = evaluate.auroc(failed, score), evaluate.auroc(failed[copies], score[copies], clusters=copies)
    apart = evaluate.auroc(failed[copies], score[copies])
    assert (together.value, together.low, together.high, together.n) == pytest.approx(
        (once.value, once.low, once.high, 40))
    assert apart.high - apart.low < (once.high - once.low) / 2


@pytest.mark.parametrize("failed, score, options, message", [
    ([1, 1], [1, 2], {}, "2 failed and 0 other"), ([0, 0], [1, 2], {}, "0 failed and 2 other"),
    ([1, 0], [1, 2], {"within": ["a", "b"]}, "no pairs"), ([1, 0], [1, math.nan], {}, "1 are NaN"),
    ([1, 0], [1], {}, "for each of 2 runs, got 1")])
def test_an_auroc_without_pairs_or_scores_is_an_error(failed, score, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.auroc(failed, score, **options)


def test_the_calibration_error_weighs_the_bins_by_their_runs():
    """Two runs at 0.2 of which one fails, three at 0.9 that all do, one at 1 in the last bin too."""
    failed, probability = [1, 0, 1, 1, 1, 1], [0.2, 0.2, 0.9, 0.9, 0.9, 1.0]
    assert evaluate.calibration_error(failed, probability) == pytest.approx((2 * 0.3 + abs(4 - 3.7)) / 6)
    assert evaluate.calibration_error([1, 0], [1, 0]) == 0


def test_what_is_calibrated_honestly_has_next_to_no_calibration_error():
    rng = np.random.default_rng(6)
    probability = rng.uniform(size=100_000)
    assert evaluate.calibration_error(rng.uniform(size=100_000) < probability, probability) < 0.01


@pytest.mark.parametrize("probability", [[-0.1], [1.1], [math.nan], []])
def test_a_calibration_error_needs_probabilities(probability):
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        evaluate.calibration_error([True] * len(probability), probability)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(0.5, 7))
def test_extrapolation_is_exact_for_a_parabola_in_logs_and_for_a_power_law(coefficients, at):
    sizes = np.array([1e3, 2e4, 3e5, 1e6])
    parabola = lambda n: 10 ** np.polyval(coefficients, np.log10(n) - 3)  # noqa: E731
    assert evaluate.extrapolate(sizes, parabola(sizes), [10**at]) == pytest.approx(parabola(10**at), rel=1e-6)
    assert evaluate.extrapolate(sizes, 7 * sizes**-0.3, [10**at], 1) == pytest.approx(7 * 10 ** (-0.3 * at))


def test_two_sizes_are_extrapolated_by_a_line_and_one_by_a_constant():
    assert evaluate.extrapolate([10, 100], [2, 20], [1000]) == pytest.approx(200)
    assert evaluate.extrapolate([10, 10], [2, 8], [1000]) == pytest.approx(4)  # the mean in logs


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, math.nan], [1.0, math.inf], []])
def test_only_positive_finite_values_can_be_extrapolated(values):
    with pytest.raises(ValueError, match="positive, finite"):
        evaluate.extrapolate([10, 100][: len(values)], values, [1000])


def growing(sizes=(10, 100, 1000, 10_000)) -> pd.DataFrame:
    """A logit that follows a parabola in log N, steeper at the higher LR, the same for both seeds but for a factor."""
    return pd.DataFrame([{"seed": seed, "lr": lr, "n_params": n, "logit": (1 + seed) * 10 ** (lr * math.log10(n) ** 2)}
                         for n in sizes for lr in (0.1, 0.2) for seed in (0, 1)])


def test_forecasts_see_only_the_sizes_they_are_fitted_on():
    runs = growing()
    table = evaluate.forecasts(runs, "logit")
    assert len(table) == 2 * 2 * (2 + 1)  # seeds, LRs, larger sizes after two and three fitted ones
    assert (table["last_size"] < table["n_params"]).all()
    three = table[table["fitted"] == 3]
    assert three["quadratic"].to_numpy() == pytest.approx(three["logit"].to_numpy())
    assert (three["line"] < three["logit"]).all() and (three["last"] < three["line"]).all()
    two = table[table["fitted"] == 2]
    assert two["quadratic"].to_numpy() == pytest.approx(two["line"].to_numpy())
    changed = runs.assign(logit=runs["logit"].where(runs["n_params"] < 10_000, 1.0))
    columns = ["quadratic", "line", "last"]
    pd.testing.assert_frame_equal(evaluate.forecasts(changed, "logit")[columns], table[columns])


@pytest.mark.parametrize("runs, message", [
    (growing().iloc[:-1], "seed 1 at LR 0.2 has"), (pd.concat([growing(), growing()]), "need one run of each"),
    (growing((10, 100)), "need 3 or more")])
def test_forecasts_need_one_run_of_each_size(runs, message):
    with pytest.raises(ValueError, match=message):
        evaluate.forecasts(runs, "logit")


def test_the_probability_of_failing_rises_with_the_score_and_is_a_constant_where_nothing_failed():
    score = np.linspace(0, 8, 40)
    at_threshold, above = evaluate.failure_probability(score > 4, score, [4, 7])
    assert at_threshold == pytest.approx(0.5, abs=0.05) and above > 0.95
    assert evaluate.failure_probability([0, 0, 0], [1, 2, 3], [0, 9]) == pytest.approx([1 / 5, 1 / 5])
    assert evaluate.failure_probability([1, 1], [1, 2], [0]) == pytest.approx([3 / 4])


def test_a_failure_probability_of_standardised_scores_does_not_depend_on_their_unit():
    score = np.random.default_rng(0).normal(size=(60, 2))
    failed = score[:, 0] + 0.3 * score[:, 1] > 0.2
    chance = lambda unit, **rule: evaluate.failure_probability(failed, unit * score, unit * score, **rule)  # noqa: E731
    assert chance(1.0, standardise=True) == pytest.approx(chance(0.1, standardise=True))
    assert np.abs(chance(0.1) - chance(1.0)).max() > 0.1
    sure = np.abs(chance(1.0, penalty=1e-3) - 0.5).mean()
    assert sure > np.abs(chance(1.0, penalty=1.0) - 0.5).mean() + 0.05
    with pytest.raises(ValueError, match="no variance to be scaled by: leave it out"):
        evaluate.failure_probability([0, 1], [2.0, 2.0], [2.0], standardise=True)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.999])
def test_every_estimate_gives_its_interval_at_any_level(level):
    x = [1.0, 2.0, 4.0]
    assert evaluate.mean(x).bounds(level) == pytest.approx(stats.t.interval(level, 2, np.mean(x), stats.sem(x)))
    logs = stats.t.interval(level, 2, np.mean(np.log(x)), stats.sem(np.log(x)))
    assert evaluate.geometric_mean(x).bounds(level) == pytest.approx(np.exp(logs))
    exact = stats.binomtest(3, 8).proportion_ci(level)
    assert evaluate.proportion(3, 8).bounds(level) == pytest.approx((exact.low, exact.high))
    draws = np.arange(101.0)
    assert evaluate.resampled(50, draws, 7).bounds(level) == pytest.approx((50 - 50 * level, 50 + 50 * level))


def test_intervals_at_higher_levels_hold_those_at_lower_ones():
    score = np.random.default_rng(0).normal(size=40)
    failed = score + np.random.default_rng(1).normal(size=40) > 0
    for found in (evaluate.mean([1.0, 2.0, 4.0]), evaluate.proportion_difference((3, 12), (8, 12)),
                  evaluate.proportion(0, 12), evaluate.auroc(failed, score), evaluate.mean([1.0])):
        assert found.bounds(0.95) == (found.low, found.high)
        (outer_low, outer_high), (inner_low, inner_high) = found.bounds(0.999), found.bounds(0.8)
        assert outer_low <= found.low <= inner_low <= found.value <= inner_high <= found.high <= outer_high


def test_a_geometric_mean_has_positive_bounds_where_the_plain_ones_cross_zero():
    x = [1.0, 10.0, 100.0]
    assert evaluate.mean(x).low < 0
    found = evaluate.geometric_mean(x)
    assert found.value == pytest.approx(10)
    assert 0 < found.low < 10 < found.high
    with pytest.raises(ValueError, match="needs positive values"):
        evaluate.geometric_mean([1.0, 0.0])


def clipped() -> pd.DataFrame:
    """Two seeds without clipping and with, which a DataFrame holds as NaN and 1.0; the first two diverge."""
    return pd.DataFrame({"clip_norm": [None, None, 1.0, 1.0], "seed": [0, 1, 0, 1], "loss": [4.0, 5.0, 1.0, 3.0],
                         "status": ["diverged", "diverged", "ok", "ok"]})


def test_a_field_that_is_none_is_a_group_like_any_other():
    rates = evaluate.divergence_rates(clipped(), ["clip_norm"])
    assert list(rates["runs"]) == [2, 2]
    assert list(rates["diverged"]) == [2, 0]
    gap = evaluate.difference(clipped(), "loss", "clip_norm", None, 1.0, ["seed"])
    assert gap.value == pytest.approx(((4 - 1) + (5 - 3)) / 2)
    assert evaluate.difference(clipped(), "loss", "clip_norm", 1.0, None, ["seed"]).value == pytest.approx(-gap.value)
    frame = clipped().assign(x=[0.0, 1.0, 0.0, 1.0])
    assert len(evaluate.slopes(frame, "x", "loss", ["clip_norm"])) == 2


@pytest.mark.parametrize("failed", [[True, np.nan, False], [1, None, 0], [2, 0, 1], [[True], [False], [True]]])
def test_labels_that_are_not_true_or_false_are_refused(failed):
    with pytest.raises(ValueError, match="labels must be"):
        evaluate.auroc(failed, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="labels must be"):
        evaluate.calibration_error(failed, [0.1, 0.2, 0.3])


def test_calibration_refuses_to_broadcast():
    with pytest.raises(ValueError, match="a probability for each run"):
        evaluate.calibration_error([True, False, True], [0.5])


def test_a_largest_stable_lr_of_two_runs_at_one_lr_is_refused():
    runs = pd.concat([sweep([3.0, 2.0, 2.6]), sweep([3.0, 2.0, 3.6])]).assign(size=1)
    with pytest.raises(ValueError, match="more than one run per LR"):
        evaluate.stable_lr(runs, ["size"])


@pytest.mark.parametrize("question", [evaluate.divergence_rates, evaluate.lr_sensitivity, evaluate.best_lr,
                                      evaluate.beyond_best, evaluate.mark_failing, evaluate.stable_lr])
def test_a_bare_column_name_is_refused_with_the_remedy(question):
    with pytest.raises(TypeError, match=r"name columns in a list, got 'arm': write \['arm'\]"):
        question(sweep([3.0, 2.0, 2.6]).assign(arm="a"), "arm")


def test_a_rank_correlation_is_spearmans_with_fishers_interval():
    x, y = [1.0, 2.0, 2.0, 5.0, 9.0, 7.0], [0.1, 0.0, 0.4, 0.3, 0.9, 0.3]
    found, r = evaluate.rank_correlation(x, y), stats.spearmanr(x, y).statistic
    assert (found.value, found.n) == (pytest.approx(r), 6)
    half = 1.959964 / math.sqrt(6 - 3)
    assert (found.low, found.high) == pytest.approx((math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)))


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([], [])])
def test_no_rank_correlation_of_few_or_equal_values(x, y):
    assert evaluate.rank_correlation(x, y) is None


@pytest.mark.parametrize("y", [[1, 2, 3, math.nan], [1, 2, 3]])
def test_a_rank_correlation_refuses_what_does_not_pair_up(y):
    with pytest.raises(ValueError, match="leave such pairs out"):
        evaluate.rank_correlation([1, 2, 3, 4], y)


def test_a_bootstrap_resamples_runs_whole():
    counts, steps = np.array([0, 2, 0, 4]), np.array([100.0, 200, 100, 200])
    found = evaluate.bootstrap(lambda a, b: a.sum() / b.sum(), counts, steps)
    assert found.value == 0.01 and found.n == 4
    assert found.low == 0 and 0.01 < found.high <= 0.02  # no resample has more alarms a step than the worst run
    assert evaluate.bootstrap(np.median, [1, 1, 1]).high == 1
    for too_few in ([3.0], [1.0, np.nan]):
        with pytest.raises(ValueError):
            evaluate.bootstrap(np.median, too_few)


def test_a_difference_of_shares_is_taken_over_pairs_and_keeps_a_width():
    """Two arms of four learning rates and six seeds; which of them diverges depends mostly on the rate."""
    cells = pd.MultiIndex.from_product([range(6), [1, 2, 3, 4]], names=["seed", "lr"]).to_frame(index=False)
    none = cells.assign(arm="none", diverged=cells["lr"] > 2)
    some = cells.assign(arm="some", diverged=(cells["lr"] > 2) & ((cells["lr"] > 3) | (cells["seed"] > 1)))
    found = evaluate.share_difference(pd.concat([none, some]), "diverged", "arm", "some", "none", ["lr", "seed"])
    by_seed = [-0.25, -0.25, 0, 0, 0, 0]
    assert (found.value, found.low, found.high) == pytest.approx(
        (evaluate.mean(by_seed).value, evaluate.mean(by_seed).low, evaluate.mean(by_seed).high))
    assert found.n == 48
    never = cells.assign(arm="never", diverged=False)
    same = evaluate.share_difference(pd.concat([none, never]), "diverged", "arm", "never", "none", ["lr", "seed"])
    assert (same.low, same.high) == (lambda e: (e.low, e.high))(evaluate.proportion_difference((0, 24), (12, 24)))
    assert evaluate.share_difference(none, "diverged", "arm", "some", "none", ["lr", "seed"]) is None


def test_means_without_pairs_have_welchs_interval():
    a, b = [1.0, 2.0, 4.0, 3.5], [0.5, 0.7, 0.4]
    errors = [np.var(x, ddof=1) / len(x) for x in (a, b)]
    freedom = sum(errors) ** 2 / sum(e**2 / (len(x) - 1) for e, x in zip(errors, (a, b), strict=True))
    centre, half = np.mean(a) - np.mean(b), stats.t.ppf(0.95, freedom) * np.sqrt(sum(errors))
    found = evaluate.unpaired(a, b)
    assert found.bounds(0.9) == pytest.approx((centre - half, centre + half))
    assert (found.value, found.n) == (pytest.approx(centre), 4)


def test_means_without_pairs_are_unbounded_for_one_value_and_exact_without_scatter():
    assert evaluate.unpaired([1.0, 2.0], [1.0]).low == -np.inf
    assert (evaluate.unpaired([2.0, 2.0], [1.0, 1.0]).low, evaluate.unpaired([2.0, 2.0], [1.0, 1.0]).high) == (1, 1)


def test_the_largest_lr_lies_below_the_first_mark_of_each_seed():
    marks = {0: [0, 0, 1], 1: [0, 1, 0], 2: [1, 0, 0], 3: [0, 0, 0]}  # what comes after a mark does not count
    runs = pd.DataFrame([{"seed": seed, "lr": lr, "diverged": bool(mark)} for seed, of_seed in marks.items()
                         for lr, mark in zip([0.1, 0.2, 0.8], of_seed, strict=True)])
    found = evaluate.largest_lr(runs.sample(frac=1, random_state=0), "diverged")
    assert (10**found).to_dict() == pytest.approx({0: 0.2, 1: 0.1, 2: 0.05, 3: 0.8})
    for wrong in (runs[1:], pd.concat([runs, runs[:1]]), runs[runs["lr"] == 0.1]):
        with pytest.raises(ValueError):
            evaluate.largest_lr(wrong, "diverged")
