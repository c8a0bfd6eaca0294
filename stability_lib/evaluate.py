"""From runs to numbers: LR sensitivity, failing learning rates, and intervals over seeds.

Every estimate is an `Estimate`: a value with a 95% interval. Nothing here trains or draws.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression

from .config import unknown

FAILS_BY = 0.4
"""A run fails where its LR is above the best one of its LR curve and its final loss this far (nats per token) above
that curve's best mean loss. Fixed after a pilot with a seed that no study uses."""

LR_WEIGHTS = {
    "uniform": lambda decades: np.ones(len(decades)),
    "near_best": lambda decades: np.exp(-decades**2 / 2),
    "above_best": lambda decades: (decades >= 0).astype(float),
}
"""Weights of LR sensitivity by the distance, in decades, from the best LR."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval and how many independent observations it rests on.

    `bounds` gives the interval at any level, `bounds(0.95)` being `low` and `high`: verdicts on many claims need it.
    """

    value: float
    low: float
    high: float
    n: int
    bounds: Callable[[float], tuple[float, float]] = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def estimate(value: float, n: int, bounds: Callable[[float], tuple[float, float]]) -> Estimate:
    """An `Estimate` from its intervals: `bounds` takes a level such as 0.95 and returns low and high."""
    exact = lambda level: tuple(map(float, bounds(level)))  # noqa: E731
    return Estimate(float(value), *exact(0.95), int(n), exact)


def resampled(value: float, draws: Iterable[float], n: int) -> Estimate:
    """An `Estimate` whose intervals are the percentiles of its bootstrap `draws`."""
    draws = np.asarray(list(draws), dtype=float)
    _reject_nan(draws)
    return estimate(value, n, lambda level: np.percentile(draws, [50 - 50 * level, 50 + 50 * level]))


def bootstrap(statistic: Callable[..., float], *columns: Iterable[float], resamples: int = 1000,
              seed: int = 0) -> Estimate:
    """A statistic of columns that hold a number a run each, with the percentile bootstrap's interval: runs are
    resampled whole. Raises `ValueError` for fewer than two runs and for NaN."""
    columns = [np.asarray(list(column), dtype=float) for column in columns]
    for column in columns:
        _reject_nan(column)
    if len(columns[0]) < 2:
        raise ValueError("a bootstrap needs two runs or more: estimate nothing from one")
    found = stats.bootstrap(columns, statistic, paired=True, vectorized=False, n_resamples=resamples,
                            method="percentile", rng=seed)
    return resampled(statistic(*columns), found.bootstrap_distribution, len(columns[0]))


def mean(values: Iterable[float]) -> Estimate:
    """Mean with Student's t interval; with one value the interval is unbounded."""
    x = np.asarray(list(values), dtype=float)
    _reject_nan(x)
    if len(x) < 2:
        return estimate(x.mean(), len(x), lambda level: (-np.inf, np.inf))
    centre, error = x.mean(), stats.sem(x)

    def bounds(level: float) -> tuple[float, float]:
        half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * error
        return centre - half, centre + half
    return estimate(centre, len(x), bounds)


def unpaired(first: Iterable[float], second: Iterable[float]) -> Estimate:
    """Mean of the first minus mean of the second, of which no two belong together, with Welch's interval; unbounded
    where either has one value. `n` counts the first."""
    a, b = (np.asarray(list(values), dtype=float) for values in (first, second))
    _reject_nan(np.append(a, b))
    centre = a.mean() - b.mean()
    if min(len(a), len(b)) < 2:
        return estimate(centre, len(a), lambda level: (-np.inf, np.inf))
    if np.ptp(a) == np.ptp(b) == 0:
        return estimate(centre, len(a), lambda level: (centre, centre))
    return estimate(centre, len(a), stats.ttest_ind(a, b, equal_var=False).confidence_interval)


def geometric_mean(values: Iterable[float]) -> Estimate:
    """The mean of quantities that live on a log axis: of their logs, with Student's t interval there.

    Raises `ValueError` where a value is not positive.
    """
    x = np.asarray(list(values), dtype=float)
    if not (x > 0).all():
        raise ValueError(f"a geometric mean needs positive values, got {x[:6]}: leave others out, or use `mean`")
    logs = mean(np.log(x))
    return estimate(np.exp(logs.value), logs.n, lambda level: np.exp(logs.bounds(level)))


def proportion(successes: int, n: int) -> Estimate:
    """A share with its exact (Clopper-Pearson) interval. Raises `ValueError` where nothing was observed."""
    if n == 0:
        raise ValueError("a proportion of no observations: check that the runs it counts exist")
    test = stats.binomtest(successes, n)
    return estimate(successes / n, n, lambda level: test.proportion_ci(level, method="exact"))


def proportion_difference(first: tuple[int, int], second: tuple[int, int]) -> Estimate:
    """The first share minus the second, each given as (successes, n), with Newcombe's hybrid score interval (1998,
    method 10). Raises `ValueError` where one has no observations."""
    a, b = (proportion(*counts).value for counts in (first, second))

    def bounds(level: float) -> tuple[float, float]:
        of_a, of_b = (stats.binomtest(*counts).proportion_ci(level, method="wilson") for counts in (first, second))
        return (a - b - np.hypot(a - of_a.low, of_b.high - b), a - b + np.hypot(of_a.high - a, b - of_b.low))
    return estimate(a - b, first[1] + second[1], bounds)


def divergence_rates(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Per group, in the order of first appearance, `diverged` of how many `runs`, their share `rate` and its exact
    interval, `low` to `high`. Runs count as independent, as in paper K, though some share a seed or learning rate."""
    counts = (runs["status"] != "ok").groupby([runs[name] for name in _columns(by)], sort=False, dropna=False).agg(
        diverged="sum", runs="size")
    shares = [proportion(int(row.diverged), int(row.runs)) for row in counts.itertuples()]
    return counts.assign(rate=[s.value for s in shares], low=[s.low for s in shares], high=[s.high for s in shares])


def capped_loss(runs: pd.DataFrame) -> pd.Series:
    """min(final loss, loss at init), the loss that enters LR sensitivity (paper P, Sec. 2.2); a diverged run counts
    as its loss at init. Raises `ValueError` where a run has no loss at init or a finished one no final loss."""
    broken = runs[runs["loss_init"].isna() | ((runs["status"] == "ok") & runs["loss_final"].isna())]
    if len(broken):
        raise ValueError(f"runs without a loss at init, or finished without a final loss: {', '.join(broken['key'])}")
    return runs["loss_final"].where(runs["status"] == "ok", np.inf).clip(upper=runs["loss_init"]).rename("loss")


def lr_sensitivity(runs: pd.DataFrame, by: list[str], *, weights: str = "uniform",
                   normalised: bool = False) -> pd.DataFrame:
    """LR sensitivity of each group `by` and seed: the mean over the LR grid of min(final, init loss) minus the
    best loss on the grid (paper P, Sec. 2.2).

    Args:
        weights: `uniform` over the grid as in the paper; `near_best`: a Gaussian in log10 LR, one decade wide,
            around the seed's best LR, so that learning rates nobody would use count less; `above_best`: only the
            learning rates from the best one up, so that slow learning at low ones does not count.
        normalised: divide by the loss the best run took off the initial one (NaN where no run took any off).

    Returns one row per group and seed with `lr_sensitivity`, `best_lr` and `best_loss`.
    Raises `ValueError` where the groups do not share one LR grid.
    """
    if weights not in LR_WEIGHTS:
        raise ValueError(unknown("weights", weights, LR_WEIGHTS))
    groups = runs.assign(loss=capped_loss(runs)).sort_values("lr").groupby([*_columns(by), "seed"], dropna=False)
    grids = {tuple(group["lr"]) for _, group in groups}
    if any(len(set(grid)) < len(grid) for grid in grids):
        raise ValueError(f"more than one run per LR in a group: add to {by} the field that tells them apart")
    if len(grids) != 1:
        raise ValueError(f"LR sensitivity compares groups on one LR grid, these have {len(grids)}: select common LRs")

    def one(group: pd.DataFrame) -> pd.Series:
        best = group.iloc[group["loss"].argmin()]
        weight = LR_WEIGHTS[weights](np.log10(group["lr"] / best["lr"]))
        excess = np.average(group["loss"] - best["loss"], weights=weight)
        scale = (best["loss_init"] - best["loss"] or np.nan) if normalised else 1.0
        return pd.Series({"lr_sensitivity": excess / scale, "best_lr": best["lr"], "best_loss": best["loss"]})

    return groups.apply(one, include_groups=False).reset_index()


def best_lr(runs: pd.DataFrame, by: list[str], *, reach: int = 1) -> pd.DataFrame:
    """Per group `by` and seed the minimum of the LR curve: `best_lr` and `best_loss` at the vertex of a parabola in
    log10 LR through the best LR of the grid and `reach` neighbours on each side (least squares where that is more than
    three points).

    `at_edge` marks a grid whose best LR is its lowest or highest: the minimum is then not bracketed and the grid's own
    values stand, as they do where the parabola does not open upwards. A vertex outside the fitted LRs is moved to their
    edge. Raises `ValueError` where a group has fewer than three LRs or more than one run at an LR.
    """
    def one(group: pd.DataFrame) -> pd.Series:
        x, loss = np.log10(group["lr"].to_numpy()), group["loss"].to_numpy()
        if len(x) < 3 or (np.diff(x) == 0).any():
            raise ValueError(f"a minimum needs three or more LRs with one run each, got {group['lr'].to_list()}: add "
                             f"LRs, or add to {by} the field that tells the runs apart")
        i = loss.argmin()
        inside, near = 0 < i < len(x) - 1, slice(max(0, i - reach), i + reach + 1)
        vertex, lowest = 0.0, loss[i]
        fit = np.polyfit(x[near] - x[i], loss[near], 2) if inside else np.zeros(3)
        if fit[0] > 0:
            vertex = np.clip(-fit[1] / (2 * fit[0]), x[near][0] - x[i], x[near][-1] - x[i])
            lowest = np.polyval(fit, vertex)
        return pd.Series({"best_lr": 10 ** (x[i] + vertex), "best_loss": lowest, "at_edge": float(not inside)})

    groups = runs.assign(loss=capped_loss(runs)).sort_values("lr").groupby([*_columns(by), "seed"], dropna=False)
    return groups.apply(one, include_groups=False).reset_index().astype({"at_edge": bool})


def beyond_best(runs: pd.DataFrame, by: list[str]) -> pd.Series:
    """How far a run's loss lies above the best mean loss of its group where its LR is above the group's best LR (by
    the mean over seeds), else -inf: a run that learns too slowly at a low LR does not fail. Inf where it diverged."""
    loss, groups = capped_loss(runs), [runs[name] for name in _columns(by)]
    over_seeds = loss.groupby([*groups, runs["lr"]], dropna=False).transform("mean")
    best_loss = over_seeds.groupby(groups, dropna=False).transform("min")
    best_lr = runs["lr"].where(over_seeds == best_loss).groupby(groups, dropna=False).transform("min")
    excess = (loss - best_loss).where(runs["lr"] > best_lr, -np.inf)
    return excess.where(runs["status"] == "ok", np.inf).rename("excess")


def mark_failing(runs: pd.DataFrame, by: list[str], margin: float = FAILS_BY) -> pd.Series:
    """True where a run diverged, or ended more than `margin` above the best mean loss of its group at an LR above the
    group's best one."""
    return (beyond_best(runs, by) > margin).rename("failing")


def stable_lr(runs: pd.DataFrame, by: list[str], margin: float = FAILS_BY) -> pd.DataFrame:
    """Per group and seed: `failing_lr`, the lowest LR that fails, `largest_stable_lr`, the largest LR below it, and
    `crossing_lr` between the two, where the loss passes the margin, by linear interpolation in log LR.

    Where no LR fails, `failing_lr` and `crossing_lr` are infinite; where the lowest one does, `largest_stable_lr` is
    0. `crossing_lr` is the failing LR where there is nothing finite to interpolate. Raises `ValueError` where a group
    has more than one run at an LR.
    """
    runs = runs.assign(excess=beyond_best(runs, by), loss=capped_loss(runs))

    def one(group: pd.DataFrame) -> pd.Series:
        if group["lr"].duplicated().any():
            raise ValueError(f"more than one run per LR in a group: add to {by} the field that tells them apart")
        group = group.sort_values("lr")
        failing = group.loc[group["excess"] > margin, "lr"].min() if (group["excess"] > margin).any() else np.inf
        below, first = group[group["lr"] < failing], group[group["lr"] == failing]
        crossing = failing
        if len(below) and len(first) and np.isfinite(first["excess"].iloc[0]):
            rise = first["loss"].iloc[0] - below["loss"].iloc[-1]
            missing = margin - (first["excess"].iloc[0] - rise)  # how far the last stable loss is from the margin
            crossing = below["lr"].iloc[-1] * (failing / below["lr"].iloc[-1]) ** np.clip(missing / rise, 0, 1)
        return pd.Series({"failing_lr": failing, "largest_stable_lr": below["lr"].max() if len(below) else 0.0,
                          "crossing_lr": crossing})

    return runs.groupby([*_columns(by), "seed"], dropna=False).apply(one, include_groups=False).reset_index()


def lr_window(runs: pd.DataFrame, by: list[str], margin: float = 0.1) -> pd.DataFrame:
    """Per group and seed the learning rates around the best one of the grid whose loss stays within `margin` of its:
    from `low` to `high`, by linear interpolation in log LR, `decades` apart. Where `open_low` or `open_high`, the grid
    ends before the loss passes the margin, and the window with it. Raises `ValueError` where a group has more than one
    run at an LR."""
    def one(group: pd.DataFrame) -> pd.Series:
        if group["lr"].duplicated().any():
            raise ValueError(f"more than one run per LR in a group: add to {by} the field that tells them apart")
        x, excess = np.log10(group["lr"].to_numpy()), (group["loss"] - group["loss"].min()).to_numpy()
        ends, best = {}, excess.argmin()
        for name, side in (("low", slice(best, None, -1)), ("high", slice(best, None))):
            at, height = x[side], excess[side]
            over = height > margin
            i = over.argmax() if over.any() else len(at) - 1
            ends[f"open_{name}"] = not over.any()
            ends[name] = 10 ** (np.interp(margin, height[i - 1:i + 1], at[i - 1:i + 1]) if over.any() else at[i])
        return pd.Series({**ends, "decades": np.log10(ends["high"] / ends["low"])})

    groups = runs.assign(loss=capped_loss(runs)).sort_values("lr").groupby([*_columns(by), "seed"], dropna=False)
    return groups.apply(one, include_groups=False).reset_index().astype({"open_low": bool, "open_high": bool,
                                                                         "low": float, "high": float, "decades": float})


def slopes(frame: pd.DataFrame, x: str, y: str, by: Sequence[str] = ("seed",)) -> pd.Series:
    """The least-squares slope of y on x within each group `by`. Raises `ValueError` where a group has a value that is
    not finite, or only one x."""
    def one(group: pd.DataFrame) -> float:
        _reject_nan(group.to_numpy(dtype=float))
        if group[x].nunique() < 2:
            raise ValueError(f"a slope needs two values of {x}, got {group[x].unique()}: add a size, or leave it out")
        return np.polyfit(group[x], group[y], 1)[0]

    return frame.groupby(_columns(by), dropna=False)[[x, y]].apply(one).rename("slope")


def slope(frame: pd.DataFrame, x: str, y: str) -> Estimate:
    """The least-squares slope of y on x within each seed, averaged over seeds with a t interval."""
    return mean(slopes(frame, x, y))


def difference(frame: pd.DataFrame, value: str, between: str, high: object, low: object, pair: list[str]) -> Estimate:
    """Mean of value(high) - value(low) over pairs that agree in `pair` (`seed` is part of it), averaged within each
    seed first. Raises `ValueError` where a pair is incomplete or not finite."""
    at = lambda level: frame[between].isna() if pd.isna(level) else frame[between] == level  # noqa: E731
    frame = frame.assign(end=np.select([at(high), at(low)], ["high", "low"], ""))
    frame = frame[frame["end"] != ""]
    _reject_nan(frame[value].to_numpy(dtype=float))
    wide = frame.groupby([*_columns(pair), "end"], dropna=False)[value].mean().unstack("end")
    wide = wide.reindex(columns=["high", "low"])
    gap = (wide["high"] - wide["low"]).rename("gap")
    if gap.isna().any():
        raise ValueError(f"{between} {high!r} and {low!r} do not pair up at {gap[gap.isna()].index.to_list()[:3]}")
    return mean(gap.groupby("seed").mean())


def share_difference(frame: pd.DataFrame, marked: str, between: str, high: object, low: object,
                     pair: list[str]) -> Estimate | None:
    """The share of `marked` runs at `high` minus that at `low`, over pairs as in `difference`: its interval over seeds,
    or Newcombe's where all seeds have one difference, as an interval without width is no certainty. `n` counts runs.
    None where one side has no runs."""
    runs = frame.assign(marked=frame[marked].astype(float))
    sides = [runs.loc[runs[between] == level, "marked"] for level in (high, low)]
    if not all(map(len, sides)):
        return None
    paired = difference(runs, "marked", between, high, low, pair)
    if not (np.isfinite(paired.low) and paired.low < paired.high):
        return proportion_difference(*((int(side.sum()), len(side)) for side in sides))
    return estimate(paired.value, sum(map(len, sides)), paired.bounds)


def largest_lr(runs: pd.DataFrame, marked: str) -> pd.Series:
    """Per seed, log10 of the largest learning rate of the grid up to which no run is `marked`; one step of the grid
    under the lowest where that one is. Raises `ValueError` where a seed lacks a rate or has one twice."""
    grid = runs.pivot(index="seed", columns="lr", values=marked)
    if grid.isna().any(axis=None) or grid.shape[1] < 2:
        raise ValueError(f"the largest rate needs every seed at each of two rates or more, got {len(runs)} runs of "
                         f"{len(grid)} seeds at {list(grid.columns)}")
    lrs = np.log10(grid.columns.to_numpy(dtype=float))
    steps = grid.astype(bool).cummax(axis=1).eq(False).sum(axis=1)
    return pd.Series(np.concatenate([[2 * lrs[0] - lrs[1]], lrs])[steps], index=grid.index, name="log10_lr")


def auroc(failed: Iterable[bool], score: Iterable[float], *, minus: Iterable[float] | None = None,
          within: Iterable | None = None, clusters: Iterable | None = None, resamples: int = 1000,
          seed: int = 0) -> Estimate:
    """The share of pairs of a failed and another run in which the failed one has the higher score; ties count half.

    Args:
        minus: another score, whose AUROC is subtracted, on the same resamples.
        within: a label per run; only pairs with the same label count.
        clusters: a label per run; runs that share it are resampled together. None: runs are resampled one by one,
            which takes repetitions of one setting for independent evidence.

    The interval is the percentile bootstrap's (paper K, Sec. 5.1), unstratified; resamples without a pair are left out.
    `n` counts what is resampled. Raises `ValueError` where a score is NaN or no pair can be formed.
    """
    failed = _labels(failed)
    units = np.unique(np.arange(len(failed)) if clusters is None else list(clusters), return_inverse=True)[1]
    labels = np.zeros(len(failed)) if within is None else np.unique(list(within), return_inverse=True)[1]
    paired = np.equal.outer(labels[failed], labels[~failed])
    if not paired.any():
        raise ValueError(f"an AUROC of {failed.sum()} failed and {(~failed).sum()} other runs has no pairs to compare: "
                         "choose runs of which some fail and some do not")
    won = np.zeros(paired.shape)
    for sign, values in ((1, score), (-1, minus)):
        if values is not None:
            values = np.asarray(list(values), dtype=float)
            if len(values) != len(failed) or np.isnan(values).any():
                raise ValueError(f"an AUROC needs a score for each of {len(failed)} runs, got {len(values)} of which "
                                 f"{np.isnan(values).sum()} are NaN: leave such runs out on both sides")
            high, low = values[failed][:, None], values[~failed]
            won += sign * paired * ((high > low) + 0.5 * (high == low))
    n = units.max() + 1
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    times = np.vstack([np.ones(len(failed)), draws[:, units]])
    wins, pairs = (((times[:, failed] @ matrix) * times[:, ~failed]).sum(1) for matrix in (won, paired))
    return resampled(wins[0] / pairs[0], wins[1:][pairs[1:] > 0] / pairs[1:][pairs[1:] > 0], n)


def rank_correlation(x: Iterable[float], y: Iterable[float]) -> Estimate | None:
    """Spearman's rank correlation of paired values with Fisher's z interval; None where fewer than four pairs, or
    values that are all alike, allow for none. Raises `ValueError` for NaN and unequal lengths."""
    x, y = (np.asarray(list(values), dtype=float) for values in (x, y))
    if x.shape != y.shape or np.isnan(x + y).any():
        raise ValueError(f"a rank correlation needs pairs without NaN, got {x[:6]} and {y[:6]}: leave such pairs out")
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    found = stats.pearsonr(stats.rankdata(x), stats.rankdata(y))
    return estimate(found.statistic, len(x), found.confidence_interval)


def calibration_error(failed: Iterable[bool], probability: Iterable[float], bins: int = 10) -> float:
    """Expected calibration error: |share that failed - mean probability| over equally wide bins, weighted by their
    runs. Raises `ValueError` where a probability is not within [0, 1]."""
    failed, probability = _labels(failed), np.asarray(list(probability), dtype=float)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if failed.shape != probability.shape:
        raise ValueError(f"calibration needs a probability for each run, got {probability.shape} for {failed.shape}")
    if not len(probability) or not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(f"calibration needs probabilities within [0, 1], got {probability[:6]}: squash scores first")
    bin_of = np.minimum((probability * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of, failed - probability)).sum() / len(probability))


def extrapolate(sizes: Iterable[float], values: Iterable[float], at: Iterable[float], degree: int = 2) -> np.ndarray:
    """`values` continued to the sizes `at` by a least-squares polynomial of log10 value in log10 size (paper P, Fig. 9:
    degree 2). Two sizes give a line and one a constant, whatever the `degree`.

    Raises `ValueError` where a value is not positive and finite.
    """
    sizes, values = (np.asarray(list(x), dtype=float) for x in (sizes, values))
    if values.size == 0 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"extrapolation in logs needs positive, finite values, got {values[:6]}: leave others out")
    degree = min(degree, len(np.unique(sizes)) - 1)
    middle = np.log10(sizes).mean()
    fit = np.polyfit(np.log10(sizes) - middle, np.log10(values), degree)
    return 10 ** np.polyval(fit, np.log10(np.asarray(list(at), dtype=float)) - middle)


def forecasts(runs: pd.DataFrame, value: str, fewest: int = 2) -> pd.DataFrame:
    """Forecasts of `value` at larger sizes from the k smallest, for each seed, LR and k from `fewest` up.

    `runs` has one run per `seed`, `lr` and `n_params`. Returns one row per seed, LR, k and larger size with the run's
    own columns, `fitted` (k), `last_size` (the largest fitted), and the forecasts `quadratic`, `line` (see
    `extrapolate`) and `last`, the value at `last_size`. Raises `ValueError` where a seed and LR lack a size or have two
    runs of one.
    """
    sizes, rows = sorted(runs["n_params"].unique()), []
    for (seed, lr), group in runs.sort_values("n_params").groupby(["seed", "lr"]):
        if group["n_params"].to_list() != sizes:
            raise ValueError(f"forecasts need one run of each of {sizes} parameters, seed {seed} at LR {lr:g} has "
                             f"{group['n_params'].to_list()}: select common LRs and seeds")
        for k in range(fewest, len(sizes)):
            known, larger = group.iloc[:k], group.iloc[k:]
            fits = {name: extrapolate(known["n_params"], known[value], larger["n_params"], degree)
                    for name, degree in (("quadratic", 2), ("line", 1))}
            rows.append(larger.assign(fitted=k, last_size=sizes[k - 1], last=known[value].iloc[-1], **fits))
    if not rows:
        raise ValueError(f"forecasts from {fewest} sizes need {fewest + 1} or more, got {sizes}: add sizes")
    return pd.concat(rows, ignore_index=True)


def failure_probability(failed: Iterable[bool], score: np.ndarray, at: np.ndarray, *, penalty: float = 1.0,
                        standardise: bool = False) -> np.ndarray:
    """Probability of failing at the scores `at` by logistic regression (scikit-learn's, whose C is 1 / `penalty`) of
    `failed` on `score`, both [runs] or [runs, scores]. The penalty weighs on scores with little spread the most, unless
    they `standardise` to unit variance. Where all or none failed, a constant, (failures + 1) / (runs + 2)."""
    columns = lambda x: np.asarray(x, dtype=float).reshape(len(x), -1)  # noqa: E731
    failed, score, at = _labels(failed), columns(score), columns(at)
    if failed.min() == failed.max():
        return np.full(len(at), (failed.sum() + 1) / (len(failed) + 2))
    spread = score.std(0) if standardise else np.ones(score.shape[1])
    if (spread == 0).any():
        raise ValueError("a score that is the same for all runs has no variance to be scaled by: leave it out")
    return LogisticRegression(C=1 / penalty).fit(score / spread, failed).predict_proba(at / spread)[:, 1]


def _columns(names: Sequence[str]) -> list[str]:
    """The names in a list: a bare string would be taken for its letters."""
    if isinstance(names, str):
        raise TypeError(f"name columns in a list, got {names!r}: write [{names!r}]")
    return list(names)


def _labels(failed: Iterable) -> np.ndarray:
    """Whether each run failed; NaN, which as a bool would be True, and anything but 0 and 1 are refused."""
    values = np.asarray(list(failed), dtype=float)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"labels must be True or False, one a run, got {values.ravel()[:6]}: leave other runs out")
    return values.astype(bool)


def _reject_nan(values: np.ndarray) -> None:
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"an estimate needs finite observations, got {values.ravel()[:6]}: "
                         "drop or cap diverged runs first")
