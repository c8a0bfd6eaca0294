"""One look for every figure, and functions that draw on an axis and return it.

Learning rate on a log axis, model size as a sequential hue, intervention as line style, 95% intervals as bands where
nothing else is said, labels at the lines themselves.
"""

import io
from collections.abc import Callable, Iterable
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.stats import gmean
from sklearn.isotonic import IsotonicRegression

from .evaluate import Estimate, extrapolate, geometric_mean, mean
from .runs import curve

LINE = {"none": "--", "head": "-", "model": ":", "head_fixed": "-.", "neither": "--", "z-loss": "-",
        "weight decay": ":", "stronger z-loss": "-.", "without KSS": "--", "with KSS": "-"}
"""Line style by qk-norm, by what holds the output logits, by KSS: dashed without."""
QK_LABEL = {"none": "without qk-norm", "head": "with qk-norm", "model": "qk-norm over the model",
            "head_fixed": "qk-norm, gains fixed"}
PARAMETRIZATION_LABEL = {"standard": "standard", "mup_simple": "muParam (simple)",
                         "mup_intermediate": "muParam (intermediate)", "mup_full": "muParam (full)"}
CURES = {name: sns.color_palette("dark")[i] for name, i in (("neither", 0), ("z-loss", 1), ("weight decay", 2),
                                                            ("stronger z-loss", 4))}
"""A colour by what holds the output logits, the same in every figure."""

MARKERS = "osD^vPX"
"""A marker by line, so that lines are told apart in grey too."""

_END = "line end"


def use_style() -> None:
    """Set the style of all figures; call once per notebook."""
    sns.set_theme(context="notebook", style="ticks", rc={
        "figure.dpi": 100, "savefig.dpi": 100, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "0.92", "axes.titlesize": "medium", "axes.titleweight": "bold",
        "figure.constrained_layout.use": True, "lines.linewidth": 2})


def shades(numbers: pd.Series, palette: str = "flare") -> dict[float, tuple]:
    """A colour per number, darker for larger ones, grey for none; sizes have the palette `crest`."""
    ordered = sorted(numbers.dropna().unique())
    return dict(zip(ordered, sns.color_palette(palette, len(ordered)), strict=True)) | {None: (0.5, 0.5, 0.5)}


def size_label(n: float) -> str:
    """A parameter count as people say it: 25k, 148k, 1.2B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}" if n < 10 * size else f"{n / size:.0f}{unit}"
    return f"{n:.0f}"


def lines(ax: Axes, frame: pd.DataFrame, x: str, y: str, hue: str, *, style: str | None = None, name: str = "",
          palette: dict | None = None, band: str = "interval", name_lines: bool = True, **drawn) -> Axes:
    """Mean over seeds of y against x, a line per value of the column `hue`, which stands at its right end.

    Numbers are darker the larger they are, and get `name` before them; `n_params` and `d_model` count as sizes. Strings
    keep the order of their first appearance, or the colours of `palette`. `style` is a column of keys of `LINE`. The
    `band` is the 95% t `interval` of the mean, the `log interval` of the geometric mean, for log axes, the `range` of
    the seeds, its `log range` about their geometric mean, or about the median their `middle` 80%. `drawn` goes to
    seaborn's lineplot; of a dict in it, such as a marker by line, each line gets its own.
    """
    sizes, numeric = hue in ("n_params", "d_model"), pd.api.types.is_numeric_dtype(frame[hue])
    names = [] if numeric else frame[hue].dropna().unique()
    colours = palette or (shades(frame[hue], "crest" if sizes else "flare") if numeric else
                          dict(zip([*names, None], sns.color_palette("dark", len(names) + 1), strict=True)))
    styled, ends, (centre, errorbar) = style not in (None, hue) and frame[style].nunique() > 1, [], _BANDS[band]
    keys = [hue, style] if style not in (None, hue) else [hue]
    for (value, *line), group in frame.groupby(keys, sort=numeric, dropna=False):
        value = None if pd.isna(value) else value
        text = (f"{name} none".strip() if value is None else size_label(value) if sizes else
                f"{name} {value:g}".strip() if numeric else QK_LABEL.get(value, value))
        sns.lineplot(group, x=x, y=y, ax=ax, color=colours[value], estimator=centre, errorbar=errorbar, legend=False,
                     linestyle=LINE[line[0] if line else value] if style else "-",
                     err_kws={"alpha": 0.15, "linewidth": 0},
                     **{key: given[value] if isinstance(given, dict) else given for key, given in drawn.items()})
        last = group[group[x] == group[x].max()]
        ends.append((last[x].iloc[0], last[y].agg(centre), f"{text}, {QK_LABEL[line[0]]}" if styled else text,
                     colours[value]))
    return label_ends(ax, ends) if name_lines else ax


def loss_against_lr(ax: Axes, runs: pd.DataFrame, *, size: str = "n_params", band: str = "interval") -> Axes:
    """Final loss (capped at the loss at init) against the learning rate, a line per `size`, dashed without qk-norm, and
    a `band` as in `lines`; `runs` needs the column `loss`."""
    lines(ax, runs, "lr", "loss", size, style="qk_norm", band=band)
    ax.set(xscale="log", xlabel="learning rate", ylabel="final validation loss (nats per byte)")
    return ax


def against_size(ax: Axes, frame: pd.DataFrame, y: str, label: str, *, name_lines: bool = True,
                 band: str = "interval") -> Axes:
    """A number per seed against the parameter count N: seeds as dots (hollow without qk-norm), mean, `band` as in
    `lines`."""
    lines(ax, frame, "n_params", y, "qk_norm", style="qk_norm", palette=dict.fromkeys(QK_LABEL, "0.25"),
          name_lines=name_lines, band=band)
    hollow = frame["qk_norm"] == "none"
    ax.scatter(frame["n_params"], frame[y], s=24, c=np.where(hollow, "white", "0.25"), edgecolors="0.25", zorder=3)
    size_axis(ax, frame["n_params"]).set_ylabel(label)
    return ax


def size_axis(ax: Axes, sizes: pd.Series) -> Axes:
    """The parameter count N on a log x axis, a tick at each size but those that would run into a smaller one."""
    ticks = []
    for n in sorted(sizes.unique()):
        if not ticks or n > 1.25 * ticks[-1]:
            ticks.append(n)
    ax.set_xlabel("parameters N without embedding and head")
    return log_ticks(ax, ticks, size_label)


def log_ticks(ax: Axes, ticks: Iterable[float], text: Callable = "{:g}".format) -> Axes:
    """A log x axis with a tick at each of `ticks` and nowhere else."""
    ax.set_xscale("log")
    ax.set_xticks(sorted(ticks), [text(tick) for tick in sorted(ticks)])
    ax.minorticks_off()
    return ax


def by_arm(ax: Axes, frame: pd.DataFrame, x: str, y: str, *, name_lines: bool = True, **drawn) -> Axes:
    """Mean over seeds of y against x on a log axis with its 95% interval, a colour per `arm`, a line style per qk-norm.

    `frame` has `arm` (a label), `qk_norm`, `seed`, x and y; `drawn` as in `lines`.
    """
    known = list(PARAMETRIZATION_LABEL.values())  # so that an arm keeps its colour from figure to figure
    arms = [*known, *(arm for arm in frame["arm"].unique() if arm not in known)]
    palette = dict(zip(arms, sns.color_palette("dark", len(arms)), strict=True))
    lines(ax, frame, x, y, "arm", style="qk_norm", palette=palette, name_lines=name_lines, **drawn).set_xscale("log")
    return ax


def against_width(ax: Axes, frame: pd.DataFrame, y: str, label: str, *, name_lines: bool = True) -> Axes:
    """`by_arm` with the width on the x axis."""
    by_arm(ax, frame, "d_model", y, name_lines=name_lines)
    ax.set_ylabel(label)
    ax.set_xlabel("width (d_model)")
    return log_ticks(ax, frame["d_model"].unique())


def coordinate_check(ax: Axes, moves: pd.DataFrame) -> Axes:
    """Change of activations (`activation`, `change`) against `width`, fainter the earlier the `step`; labels carry the
    exponent of the last step."""
    colours, ends = dict(zip(moves["activation"].unique(), sns.color_palette("dark"), strict=False)), []
    for (name, step), group in moves.groupby(["activation", "step"], sort=False):
        ax.plot(group["width"], group["change"], color=colours[name], alpha=step / moves["step"].max(), marker="o",
                markersize=4)
        if step == moves["step"].max():
            power = np.polyfit(np.log(group["width"]), np.log(group["change"]), 1)[0].round(2) + 0.0
            ends.append((group["width"].iloc[-1], group["change"].iloc[-1], f"{name}: {power:+.2f}", colours[name]))
    ax.set_yscale("log")
    ax.set_xlabel("width (d_model)")
    return label_ends(log_ticks(ax, moves["width"].unique()), ends)


def over_training(ax: Axes, runs: pd.DataFrame, quantity: str, label: str, hue: str = "lr", *, style: str | None = None,
                  band: str = "range", name_lines: bool = True) -> Axes:
    """One recorded quantity over training, as `lines`."""
    lines(ax, curve(runs, quantity).dropna(subset="value"), "step", "value", hue, style=style, band=band,
          name="LR" if hue == "lr" else "", name_lines=name_lines)
    ax.set(xlabel="training step", ylabel=label)
    return ax


def logit_forecast(ax: Axes, runs: pd.DataFrame, value: str, fitted: Iterable[int]) -> Axes:
    """`value` of each run against the parameter count, a colour per LR, crosses where `failing`; the quadratic in logs
    through the sizes `fitted`, dashed beyond them; 1e4 dotted (paper P, Fig. 9)."""
    colours, ends = shades(runs["lr"]), []
    last, at = max(fitted), np.geomspace(runs["n_params"].min(), runs["n_params"].max(), 61)
    for lr, group in runs.groupby("lr"):
        for failing, marker in ((False, "o"), (True, "x")):
            dots = group[group["failing"] == failing]
            ax.scatter(dots["n_params"], dots[value], s=26, marker=marker, color=colours[lr], zorder=3)
        known = group[group["n_params"].isin(fitted)]
        fit = extrapolate(known["n_params"], known[value], at)
        for part, style in ((at <= last, "-"), (at >= last, "--")):
            ax.plot(at[part], fit[part], style, color=colours[lr])
        ends.append((at[-1], fit[-1], f"LR {lr:g}", colours[lr]))
    ax.axhline(1e4, color="0.4", lw=1, ls=":")
    ax.set_yscale("log")
    return label_ends(size_axis(ax, runs["n_params"]), ends)


def reliability(ax: Axes, failed: pd.Series, probabilities: dict[str, pd.Series], bins: int = 5) -> Axes:
    """Share of runs that failed against the forecast probability, in equally wide bins, a line per forecast; the marks'
    area grows with the runs in a bin, the diagonal is perfect calibration."""
    ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":")
    for (name, chance), colour, marker in zip(probabilities.items(), sns.color_palette("dark"), MARKERS, strict=False):
        bin_of = np.minimum((chance * bins).astype(int), bins - 1)
        table = pd.DataFrame({"chance": chance, "failed": failed}).groupby(bin_of).agg(
            chance=("chance", "mean"), share=("failed", "mean"), runs=("failed", "size"))
        ax.plot(table["chance"], table["share"], color=colour, marker=marker, markersize=4, label=name)
        ax.scatter(table["chance"], table["share"], s=400 * table["runs"] / table["runs"].sum(), color=colour,
                   marker=marker)
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    ax.set(xlabel="forecast probability of failing", ylabel="share that failed")
    return ax


def rates(ax: Axes, table: pd.DataFrame, paper: pd.Series | None = None) -> Axes:
    """Divergence rates of `evaluate.divergence_rates` with their intervals, one arm a line from the top down, and the
    paper's rates, in percent by arm, as open diamonds."""
    heights = np.arange(len(table))[::-1]
    ax.hlines(heights, 100 * table["low"], 100 * table["high"], color="0.6", linewidth=2)
    ax.scatter(100 * table["rate"], heights, color=sns.color_palette("deep")[0], zorder=3, label="here")
    if paper is not None:
        ax.scatter(paper.reindex(table.index), heights, marker="D", facecolors="none",
                   edgecolors=sns.color_palette("deep")[3], zorder=3, label="paper K")
        ax.legend(frameon=False, loc="lower right")
    ax.set(yticks=heights, yticklabels=table.index, xlim=(-3, 103), xlabel="runs that diverge (%), 95% interval")
    return ax


def counts(ax: Axes, runs: pd.DataFrame, rows: str, columns: str, marked: str, label: str | None = None) -> Axes:
    """In how many of the runs with each pair of values of two columns `marked` holds: the share as colour, the counts
    as text. Rows stand in the order of first appearance, columns sorted; without a `label`, no colour bar."""
    groups = runs.groupby([rows, columns], sort=False, dropna=False)[marked]
    share, text = (found.unstack(columns).reindex(runs[rows].unique()).sort_index(axis=1) for found in (
        100 * groups.mean(), groups.sum().astype(int).astype(str) + "/" + groups.size().astype(str)))
    named = lambda values: [v if isinstance(v, str) else "none" if pd.isna(v) else f"{v:g}" for v in values]  # noqa: E731
    sns.heatmap(share, annot=text.fillna(""), fmt="", cmap="rocket_r", vmin=0, vmax=100, linewidths=1, ax=ax,
                xticklabels=named(share.columns), yticklabels=named(share.index), cbar=label is not None,
                cbar_kws={"label": label})
    ax.tick_params(length=0, labelrotation=0)
    return ax


def shares(ax: Axes, table: pd.DataFrame, x: str, hue: str, label: Callable, y: str = "rate") -> Axes:
    """y against x on a log axis, a line per value of the column `hue` with `label` of it at its end: of a table of
    `evaluate.divergence_rates` the `rate` with its exact interval, or another column without."""
    ends, groups = [], table.reset_index().sort_values(x).groupby(hue, dropna=False)
    for (value, group), colour, marker in zip(groups, sns.color_palette("dark", len(groups)), cycle(MARKERS),
                                              strict=False):
        ax.plot(group[x], group[y], LINE.get(label(value), "-"), color=colour, marker=marker, markersize=5)
        if y == "rate":
            ax.fill_between(group[x], group["low"], group["high"], color=colour, alpha=0.1, linewidth=0)
        ends.append((group[x].iloc[-1], group[y].iloc[-1], label(value), colour))
    ax.set_xscale("log")
    return label_ends(ax, ends)


def forecasts_by_group(ax: Axes, frame: pd.DataFrame, group: str, actual: str, forecasts: list[str]) -> Axes:
    """Learning rates, one `group` a line from the top down: the column `actual` as bars across the line, each column of
    `forecasts` as marks of its own shape, colour and height, one a row."""
    groups = list(frame[group].unique())[::-1]
    heights = frame[group].map({name: height for height, name in enumerate(groups)})
    ax.vlines(frame[actual], heights - 0.42, heights + 0.42, linewidth=2.5, color="0.2", label=actual)
    for name, shift, colour, marker in zip(forecasts, np.linspace(0.25, -0.25, len(forecasts)),
                                           sns.color_palette("deep", len(forecasts)), cycle(MARKERS), strict=False):
        ax.scatter(frame[name], heights + shift, s=32, linewidths=0, alpha=0.8, color=colour, marker=marker, zorder=3,
                   label=name)
    ax.set(xscale="log", yticks=range(len(groups)), yticklabels=groups)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return ax


def pattern(ax: Axes, weights: list[list[float]], title: str) -> Axes:
    """One causal attention pattern [query][key] as an image, colours by the square root of the weight, as most are
    small; keys that a query does not see are grey."""
    seen = np.tril(np.ones_like(weights, dtype=bool))
    ax.imshow(np.where(seen, weights, np.nan), cmap="rocket_r", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[], facecolor="0.85")
    ax.grid(False)
    return ax


def at_lr(axes: Iterable[Axes], runs: pd.DataFrame, lr: float) -> None:
    """What one learning rate does to one model, without and with qk-norm, on two axes: where it lies on the curve of
    final loss (`loss`), and the largest attention logit of block 0 over training; 1e4 dotted (paper P, Figs 1, 2)."""
    curves, logits = axes
    known, paint = curve(runs, "attention_logit_max/block0"), {"none": "#b8560b", "head": "#0b4f8a"}
    lines(curves, runs, "lr", "loss", "qk_norm", style="qk_norm", palette=paint)
    lines(logits, known[known["lr"] == lr], "step", "value", "qk_norm", style="qk_norm", palette=paint,
          band="log interval")
    dots = runs[runs["lr"] == lr]
    curves.scatter(dots["lr"], dots["loss"], s=36, color=dots["qk_norm"].map(paint), zorder=3)
    curves.axvline(lr, color="0.6", lw=1)
    logits.axhline(1e4, color="0.4", lw=1, ls=":")
    curves.set(xscale="log", xlabel="learning rate", ylabel="final validation loss (nats per byte)")
    logits.set(yscale="log", ylim=(known["value"].min() / 2, 2 * known["value"].max()), xlabel="training step",
               ylabel="largest attention logit, block 0", title=f"learning rate {lr:g}")


def intervals(ax: Axes, estimates: Iterable[Estimate | None], colour: object = "0.25",
              zero: float | None = 0.0) -> Axes:
    """Estimates with their 95% intervals, one a line from the top down, an empty line for None; hollow where an
    interval has no width, a line at `zero`."""
    found = list(estimates)
    for height, estimate in enumerate(found):
        if estimate is not None:
            exact = np.isclose(estimate.low, estimate.high)
            ax.hlines(height, estimate.low, estimate.high, color=colour, lw=2)
            ax.scatter(estimate.value, height, s=36, color="white" if exact else colour, edgecolors=colour, zorder=3)
    if zero is not None:
        ax.axvline(zero, color="0.4", lw=1)
    ax.set(ylim=(len(found) - 0.5, -0.5), yticks=range(len(found)))
    return ax


def label_ends(ax: Axes, ends: list[tuple[float, float, str, object]]) -> Axes:
    """Write each line's label right of its end, given as (x, y, text, colour); `show` pushes them apart."""
    for x, y, text, colour in ends:
        ax.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", color=colour, va="center",
                    fontsize="small", annotation_clip=False, gid=_END)
    return ax


def show() -> None:
    """Display the current figure and nothing else, as `picture` makes it."""
    display(Image(picture(plt.gcf())))


def picture(figure: Figure) -> bytes:
    """A figure as PNG, labels at line ends moved apart where they would overlap; the figure is closed.

    That can only be done last, when scales and limits are final. The picture has 256 colours, which a reader cannot
    tell from millions in a plot, and which make a notebook a third as large.
    """
    figure.canvas.draw()
    for ax in figure.axes:
        labels = [text for text in ax.texts if text.get_gid() == _END]
        heights = np.array([ax.transData.transform(label.xy)[1] for label in labels])
        spread = _apart(heights, 1.25 * labels[0].get_fontsize() * figure.dpi / 72) if labels else heights
        for label, shift in zip(labels, (spread - heights) * 72 / figure.dpi, strict=True):
            label.set_position((6, shift))
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    plt.close(figure)
    PIL.Image.open(drawn).convert("RGB").quantize(dither=PIL.Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def _apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """The heights moved as little as possible, in the least-squares sense, so that neighbours are `gap` apart."""
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    moved = np.empty_like(heights)
    moved[order] = IsotonicRegression().fit_transform(steps, heights[order] - steps) + steps
    return moved


def _interval(estimate_of: Callable) -> Callable:
    def band(values) -> tuple[float, float]:
        estimate = estimate_of(values)
        return (estimate.low, estimate.high) if estimate.n > 1 else (estimate.value, estimate.value)
    return band


_BANDS = {"interval": ("mean", _interval(mean)), "log interval": (gmean, _interval(geometric_mean)),
          "range": ("mean", ("pi", 100)), "log range": (gmean, ("pi", 100)), "middle": ("median", ("pi", 80))}
