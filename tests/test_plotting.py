"""What `show` makes of a figure, and where marks and labels come to lie."""

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from stability_lib import evaluate, plotting


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(plotting, "display", found.append)
    return found


def test_a_shown_figure_is_one_picture_of_few_colours_that_looks_as_drawn(shown):
    figure, ax = plt.subplots()
    ax.imshow(np.random.default_rng(0).uniform(size=(40, 40)), cmap="viridis")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    plotting.show()
    (picture,) = shown
    small, large = PIL.Image.open(io.BytesIO(picture.data)), PIL.Image.open(drawn).convert("RGB")
    assert len(small.getcolors()) <= 256
    assert np.abs(np.asarray(small.convert("RGB"), float) - np.asarray(large, float)).mean() < 3
    assert len(picture.data) < len(drawn.getvalue()) / 2
    assert not plt.get_fignums()


def test_labels_at_line_ends_do_not_overlap(shown):
    _, ax = plt.subplots()
    ends = [(1.0, y, f"line {i}", "black") for i, y in enumerate((0.5, 0.5, 0.51, 0.9))]
    plotting.label_ends(ax, ends).set(xlim=(0, 1), ylim=(0, 1))
    plotting.show()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_forecasts_lie_in_the_line_of_their_group_at_their_value():
    frame = pd.DataFrame({"arm": ["b", "a", "b"], "limit": [0.1, 1.0, 0.2], "first": [0.3, 2.0, 0.4],
                          "second": [0.5, 3.0, 0.6]})
    _, ax = plt.subplots()
    assert plotting.forecasts_by_group(ax, frame, "arm", "limit", ["first", "second"]) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    bars, *dots = ax.collections
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[0.1, 0.1], [1.0, 1.0], [0.2, 0.2]]
    for name, points in zip(("first", "second"), dots, strict=True):
        offsets = points.get_offsets()
        assert offsets[:, 0].tolist() == frame[name].to_list()
        assert np.round(offsets[:, 1]).tolist() == [1, 0, 1]
    plt.close("all")


@pytest.mark.parametrize("values", [[None, 0.5], [None, "head"]])
def test_a_group_without_a_value_is_a_line_of_its_own(values):
    frame = pd.DataFrame({"x": [1, 2, 1, 2], "y": [1.0, 2.0, 3.0, 4.0],
                          "clip_norm": [values[0]] * 2 + [values[1]] * 2})
    ax = plotting.lines(plt.figure().gca(), frame, "x", "y", "clip_norm")
    assert len(ax.lines) == 2
    assert "none" in [text.get_text() for text in ax.texts]


def test_a_band_on_a_log_axis_stays_positive():
    frame = pd.DataFrame({"x": [1] * 3 + [2] * 3, "y": [1.0, 10.0, 100.0] * 2, "arm": "a"})
    ax = plotting.lines(plt.figure().gca(), frame, "x", "y", "arm", band="log interval")
    assert ax.lines[0].get_ydata() == pytest.approx([10, 10])
    assert ax.collections[0].get_datalim(ax.transData).y0 > 0


def test_shares_draw_a_line_for_each_of_many_groups():
    table = pd.DataFrame({"lr": [1e-3, 1e-2] * 12, "arm": np.repeat(range(12), 2)}).assign(rate=0.5, low=0.2, high=0.8)
    assert len(plotting.shares(plt.figure().gca(), table, "lr", "arm", str).lines) == 12


def test_heat_maps_and_shares_keep_the_group_without_a_value():
    runs = pd.DataFrame({"clip_norm": [None, None, 1.0, 1.0], "lr": [0.1, 0.2] * 2, "failed": [True, False] * 2})
    ax = plotting.counts(plt.figure().gca(), runs, "clip_norm", "lr", "failed")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["none", "1"]
    assert [text.get_text() for text in ax.texts] == ["1/1", "0/1"] * 2
    table = runs.assign(rate=0.5, low=0.1, high=0.9)
    ax = plotting.shares(plt.figure().gca(), table, "lr", "clip_norm", str)
    assert len(ax.lines) == 2


def test_intervals_stand_one_a_line_and_are_hollow_without_a_width():
    _, ax = plt.subplots()
    wide, none = evaluate.mean([1.0, 2.0, 3.0]), evaluate.mean([2.0, 2.0])
    plotting.intervals(ax, [wide, None, none])
    bars = [collection.get_segments()[0] for collection in ax.collections[::2]]
    assert np.allclose(bars[0][:, 0], [wide.low, wide.high]) and np.allclose(bars[0][:, 1], 0)
    assert np.allclose(bars[1], [[2, 2], [2, 2]])
    filled, hollow = (dots.get_facecolor()[0] for dots in ax.collections[1::2])
    assert np.allclose(hollow, 1) and not np.allclose(filled, 1)
    assert ax.get_ylim() == (2.5, -0.5)


def test_a_pattern_hides_the_keys_that_a_query_does_not_see():
    _, ax = plt.subplots()
    plotting.pattern(ax, [[1.0, 0.0], [0.25, 0.75]], "a")
    assert np.ma.filled(ax.images[0].get_array(), -1).tolist() == [[1.0, -1.0], [0.25, 0.75]]
