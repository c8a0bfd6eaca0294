"""The scorecard says what the boards in the committed notebooks say now."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from stability_lib import advice, claims, runs, scorecard, studies
from stability_lib.chapters import c99_scorecard as c99

ROOT = runs.project_root()


@pytest.fixture(scope="module")
def found():
    return scorecard.table()


def test_every_claim_of_every_chapter_stands_in_the_table_once(found):
    stated = [claim.id for stem in studies.modules() for claim in claims.of_chapter(stem)]
    assert found["claim"].tolist() == stated
    assert set(found["of"]) == set(scorecard.ORDER)
    assert set(found["verdict"]) | set(found["adjusted"]) <= set(claims.VERDICTS)


def test_boards_read_from_notebooks_have_the_recorded_verdicts(found):
    recorded = json.loads((ROOT / "data" / "verdicts.json").read_text(encoding="utf-8"))
    for scale, column in (("cpu", "verdict"), ("gpu", "verdict, gpu")):
        shown = dict(found.loc[found[column] != "", ["claim", column]].itertuples(index=False))
        accepted = recorded.get(scale, {})
        assert not {name: verdict for name, verdict in shown.items()
                    if name in accepted and verdict not in accepted[name]}


def test_the_figure_has_a_tile_for_each_claim(found):
    drawn = scorecard.figure(found)
    again = int((found["verdict, gpu"] != "").sum())
    assert len(drawn.axes[0].patches) == len(found) + again
    plt.close(drawn)


def test_each_paper_gets_ten_sentences_in_which_nothing_is_typed():
    for templates in (c99.PAPER_P, c99.PAPER_K):
        assert len(templates) == 10
        for template in (*templates, *c99.FINDINGS):
            typed = re.sub(r"\{\{.*?\}\}", "", template)
            words = " ".join(re.findall(r'\w+="([^"]*)"', template))
            assert not re.search(r"\d", typed + words), template
        said = scorecard.sentences(templates)
        assert all(text.endswith(".") and "{{" not in text for text in said)


def a_board(monkeypatch, verdict):
    row = {"criterion": known("P1.instability").criterion, "verdict": verdict, "adjusted": verdict, "claim": "x",
           "ours": "0.5 [0.4, 0.6]"}
    monkeypatch.setattr(advice, "board", lambda stem, scale=None: {"P1.instability": row})


def known(name):
    return next(claim for stem in studies.modules() for claim in claims.of_chapter(stem) if claim.id == name)


def test_words_follow_the_verdict_and_a_verdict_without_words_fails(monkeypatch):
    words = {"reproduced": "it holds", "undecided": "it is open"}
    a_board(monkeypatch, "reproduced")
    assert scorecard.says("P1.instability", "nats", **words).startswith("it holds (0.5 [0.4, 0.6] nats; chapter [01](")
    a_board(monkeypatch, "undecided")
    assert scorecard.says("P1.instability", **words).startswith("it is open (0.5 [0.4, 0.6]; chapter [01](")
    a_board(monkeypatch, "contradicted")
    with pytest.raises(ValueError, match="is 'contradicted', and its sentence has words for reproduced, undecided"):
        scorecard.says("P1.instability", **words)
    with pytest.raises(ValueError, match=r"unknown claim .P1\.instabilit."):
        scorecard.says("P1.instabilit", **words)
    assert scorecard.reported("KT3.fair") == "12.5% against 66.7%"


def test_a_board_by_another_criterion_is_refused(monkeypatch):
    monkeypatch.setattr(advice, "board", lambda stem, scale=None: {})
    with pytest.raises(ValueError, match=r"does not hold P1\.instability by its criterion of now"):
        scorecard.table()


def test_unknown_groups_verdicts_and_names_are_named():
    with pytest.raises(ValueError, match="unknown group 'paper Q'"):
        scorecard.tally("paper Q", "reproduced")
    with pytest.raises(ValueError, match="unknown verdict 'proved'"):
        scorecard.tally("paper P", "proved")
    with pytest.raises(ValueError, match="a sentence of the scorecard: 'say' is undefined: known are"):
        scorecard.sentences(["{{ say() }}"])


@pytest.mark.parametrize("held, failed, words", [(30, 10, "we would build on it"), (25, 12, "its measurements and not"),
                                                 (20, 17, "the count is even"), (17, 20, "the count is even"),
                                                 (10, 22, "we would not build on it")])
def test_what_we_would_do_with_a_paper_follows_from_its_counts(monkeypatch, held, failed, words):
    numbers = {"reproduced": held, "contradicted": failed, "any": 57}
    monkeypatch.setattr(scorecard, "tally", lambda of, verdict: numbers[verdict])
    said = scorecard.overall("paper P")
    assert words in said and str(held) in said and str(failed) in said


def test_the_readme_has_the_findings_of_now():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert scorecard.findings() in text, "run `python -m stability_lib findings`"
