"""Verdicts follow from criterion and interval alone."""

import json
import math

import pytest

from stability_lib import claims
from stability_lib.claims import Claim
from stability_lib.evaluate import Estimate

RISES = Claim("X.rises", "X Fig. 1", "it rises", "rises", "slope", ">", 0.5)
FALLS = Claim("X.falls", "X Fig. 2", "it falls", "falls", "slope", "<", -0.5)


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "chapter", (RISES, FALLS))
    estimates = {"X.rises": Estimate(1.0, 0.6, 1.4, 3), "X.falls": Estimate(-1.0, -2.0, 0.0, 3)}
    return claims.scoreboard("chapter", estimates)


@pytest.mark.parametrize("low, value, high, expected", [
    (0.6, 1.0, 1.4, "reproduced"), (0.4, 1.0, 1.6, "partly"), (0.1, 0.4, 0.9, "not reproduced"),
    (-math.inf, 1.0, math.inf, "partly"), (0.5, 0.5, 0.5, "not reproduced"), (1.0, 1.0, 1.0, "partly")])
def test_a_verdict_needs_the_whole_interval_on_the_claimed_side(low, value, high, expected):
    assert claims.verdict(RISES, Estimate(value, low, high, 3)) == expected
    assert claims.verdict(FALLS, Estimate(-value, -high, -low, 3)) == expected


def test_what_could_not_be_measured_is_out_of_reach():
    assert claims.verdict(RISES, None) == "out of reach here"


def test_a_scoreboard_wants_exactly_the_chapters_claims(board):
    assert list(board["verdict"]) == ["reproduced", "partly"]
    with pytest.raises(ValueError, match=r"no estimate for X\.falls"):
        claims.scoreboard("chapter", {"X.rises": None})
    with pytest.raises(ValueError, match=r"unknown claim 'X\.rise': did you mean 'X\.rises'"):
        claims.scoreboard("chapter", {"X.rise": None, "X.falls": None})
    with pytest.raises(ValueError, match="unknown chapter"):
        claims.scoreboard("chaptre", {})


def test_a_flipped_verdict_fails_the_check_and_an_unrecorded_scale_does_not(board, monkeypatch, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    recorded = {"cpu": {"X.rises": ["reproduced"], "X.falls": ["reproduced"]},
                "quick": {"X.falls": ["partly", "reproduced"]}}
    (tmp_path / "data" / "verdicts.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    with pytest.raises(AssertionError, match=r"X\.falls is 'partly', recorded for scale 'cpu': reproduced"):
        claims.check(board, "cpu")
    claims.check(board, "quick")
    claims.check(board, "gpu")
    assert capsys.readouterr().out.splitlines()[:2] == ["X.rises  reproduced", "X.falls  partly"]


def test_claim_ids_are_unique_and_every_recorded_verdict_belongs_to_one():
    ids = [claim.id for chapter in claims.CLAIMS.values() for claim in chapter]
    assert len(ids) == len(set(ids))
    recorded = json.loads((claims.project_root() / "data" / "verdicts.json").read_text())
    known = {"reproduced", "partly", "not reproduced", "out of reach here"}
    for verdicts in recorded.values():
        assert set(verdicts) <= set(ids)
        assert all(set(accepted) <= known for accepted in verdicts.values())
    assert set(recorded["cpu"]) == set(ids), "every claim has a recorded verdict at the committed scale"
