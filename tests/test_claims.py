"""Verdicts follow from criterion and interval alone."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stability_lib import claims, evaluate, studies
from stability_lib.claims import Claim

RISES = Claim("X.rises", "X Fig. 1", "it rises", "rises", "slope", ">", 0.5)
FALLS = Claim("X.falls", "X Fig. 2", "it falls", "falls", "slope", "<", -0.5)
SAME = Claim("X.same", "X Fig. 3", "it stays", "does not depend on it", "slope", "within", 0.5)


def interval(low: float, value: float, high: float):
    return evaluate.estimate(value, 3, lambda level: (low, high))


def observed(mean: float, p: float, n: int = 5):
    """The estimate of n observations whose mean differs from 0 with the two-sided p-value p of a t test."""
    x = np.linspace(-1, 1, n)
    return evaluate.mean(mean + x * abs(mean) / stats.sem(x) / stats.t.isf(p / 2, n - 1))


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr(studies, "modules", lambda: {"chapter": SimpleNamespace(STUDIES=(), CLAIMS=(RISES, FALLS))})
    return claims.scoreboard("chapter", {"X.rises": interval(0.6, 1.0, 1.4), "X.falls": interval(-2.0, -1.0, 0.0)})


@pytest.mark.parametrize("low, value, high, expected", [
    (0.6, 1.0, 1.4, "reproduced"), (0.4, 1.0, 1.6, "undecided"), (0.1, 0.4, 0.9, "undecided"),
    (0.1, 0.2, 0.4, "contradicted"), (-math.inf, 1.0, math.inf, "undecided"), (0.1, 0.3, 0.5, "undecided"),
    (0.5, 0.6, 0.7, "undecided")])
def test_a_verdict_needs_the_whole_interval_on_one_side(low, value, high, expected):
    assert claims.verdict(RISES, interval(low, value, high)) == expected
    assert claims.verdict(FALLS, interval(-high, -value, -low)) == expected


@pytest.mark.parametrize("low, value, high, expected", [
    (-0.4, 0.0, 0.4, "reproduced"), (0.1, 0.2, 0.4, "reproduced"), (-0.6, 0.0, 0.4, "undecided"),
    (0.4, 0.5, 0.6, "undecided"), (-2.0, 0.0, 2.0, "undecided"), (0.5, 0.7, 0.9, "undecided"),
    (0.6, 0.7, 0.8, "contradicted")])
def test_sameness_asks_for_the_whole_interval_within_the_margin_on_both_sides(low, value, high, expected):
    assert claims.verdict(SAME, interval(low, value, high)) == expected
    assert claims.verdict(SAME, interval(-high, -value, -low)) == expected
    assert SAME.criterion == "slope within ±0.5"


@pytest.mark.parametrize("value", [1.0, 0.5, 0.0])
def test_an_interval_without_width_decides_nothing(value):
    assert claims.verdict(RISES, evaluate.mean([value] * 3)) == "undecided"
    assert claims.verdict(SAME, evaluate.mean([value] * 3)) == "undecided"


def test_two_arms_without_a_failure_decide_nothing():
    fewer = Claim("X.fewer", "X", "fewer fail", "", "share that fails, with minus without", "<", 0.0)
    assert claims.verdict(fewer, evaluate.proportion_difference((0, 12), (0, 12))) == "undecided"


def test_what_could_not_be_measured_is_out_of_reach():
    assert claims.verdict(RISES, None) == "out of reach here"


def test_a_claim_of_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="unknown side '=': choose <, > or within"):
        Claim("X", "", "", "", "slope", "=", 0.0)


# Holm: the smallest of m p-values is held to 0.05 / m, the next to 0.05 / (m - 1), until one does not pass.
@pytest.mark.parametrize("p_values, decided", [
    ((0.01, 0.02, 0.04), 3), ((0.016, 0.024, 0.049), 3), ((0.016, 0.03, 0.04), 1), ((0.02, 0.02, 0.02), 0),
    ((0.2, 0.001, 0.03), 1), ((0.2, 0.001, 0.02), 2)])
def test_adjusted_verdicts_are_holms(p_values, decided):
    rises = [Claim(f"X.{i}", "X", "it rises", "", "slope", ">", 0.0) for i in range(len(p_values))]
    estimates = {f"X.{i}": observed((-1) ** i, p) for i, p in enumerate(p_values)}
    plain = [claims.verdict(claim, estimates[claim.id]) for claim in rises]
    found = claims.adjusted(rises, estimates)
    assert sum(verdict != "undecided" for verdict in plain) == sum(p < 0.05 for p in p_values)
    assert sum(verdict != "undecided" for verdict in found.values()) == decided
    for i, before in enumerate(plain):
        assert found[f"X.{i}"] in (before, "undecided")


def test_a_claim_out_of_reach_does_not_count_among_those_judged_together():
    rises = [Claim(name, "X", "it rises", "", "slope", ">", 0.0) for name in ("X.a", "X.b")]
    found = claims.adjusted(rises, {"X.a": observed(1.0, 0.04), "X.b": None})
    assert found == {"X.a": "reproduced", "X.b": "out of reach here"}


def test_a_scoreboard_wants_exactly_the_chapters_claims(board):
    assert list(board["verdict"]) == ["reproduced", "undecided"]
    with pytest.raises(ValueError, match=r"no estimate for X\.falls"):
        claims.scoreboard("chapter", {"X.rises": None})
    with pytest.raises(ValueError, match=r"unknown claim 'X\.rise': did you mean 'X\.rises'"):
        claims.scoreboard("chapter", {"X.rise": None, "X.falls": None})
    with pytest.raises(ValueError, match="unknown chapter"):
        claims.scoreboard("chaptre", {})


def test_a_published_board_counts_its_claims_and_both_kinds_of_verdict(board, monkeypatch):
    shown = {}
    monkeypatch.setattr(claims, "display", lambda bundle, raw: shown.update(bundle))
    claims.publish(board)
    line = ("2 claims: 1 reproduced, 1 undecided. Adjusted for judging 2 at once (Holm): 1 reproduced, 1 undecided.")
    assert shown["text/plain"].splitlines()[0] == line
    assert line in shown["text/html"]
    assert [row["adjusted"] for row in shown[claims.MIME]] == ["reproduced", "undecided"]
    assert not any("scale" in row for row in shown[claims.MIME])
    claims.publish(board, "gpu")
    assert [row["scale"] for row in shown[claims.MIME]] == ["gpu", "gpu"]
    assert shown["text/plain"].startswith("Scale gpu, 2 claims: ")


def test_a_board_as_html_names_the_adjusted_verdict_where_it_differs_and_escapes_what_it_prints(board):
    board = board.assign(criterion="share < 0.5", adjusted=["undecided", "undecided"])
    shown = claims.as_html(board)
    assert shown.count("<th>") == 5
    assert shown.count("after Holm undecided") == 1  # of the first claim: the second is undecided either way
    assert "share &lt; 0.5" in shown
    assert all(f"{claim}, " in shown for claim in board["claim"])


def test_a_flipped_verdict_fails_the_check_and_an_unrecorded_scale_does_not(board, monkeypatch, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    recorded = {"cpu": {"X.rises": ["reproduced"], "X.falls": ["reproduced"]},
                "quick": {"X.falls": ["undecided", "reproduced"]}}
    (tmp_path / "data" / "verdicts.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    with pytest.raises(AssertionError, match=r"X\.falls is 'undecided', recorded for scale 'cpu': reproduced"):
        claims.check(board, "cpu")
    claims.check(board, "quick")
    claims.check(board, "gpu")
    assert capsys.readouterr().out.splitlines()[:2] == ["X.rises  reproduced", "X.falls  undecided"]


def test_claim_ids_are_unique_and_every_recorded_verdict_belongs_to_one():
    ids = [claim.id for name in studies.modules() for claim in claims.of_chapter(name)]
    assert len(ids) == len(set(ids))
    recorded = json.loads((claims.project_root() / "data" / "verdicts.json").read_text())
    for verdicts in recorded.values():
        assert set(verdicts) <= set(ids)
        assert all(set(accepted) <= set(claims.VERDICTS) for accepted in verdicts.values())
    assert set(recorded["cpu"]) == set(ids), "every claim has a recorded verdict at the committed scale"


def test_a_papers_table_is_indexed_by_its_first_column_and_names_its_source():
    table = claims.paper_table("k_table_03")
    assert table.loc["KSS 0.15", "diverged_percent"] == 12.5
    assert pd.isna(table.loc["clip 1.0", "overhead_percent"])
    folder = claims.project_root() / "data" / "papers"
    for path in folder.glob("*.csv"):
        assert path.read_text().startswith("# Kim et al. (2026), arXiv 2602.22988, Table ")
        assert claims.paper_table(path.stem).index.is_unique
    with pytest.raises(ValueError, match="unknown table 'k_table_3': did you mean"):
        claims.paper_table("k_table_3")
