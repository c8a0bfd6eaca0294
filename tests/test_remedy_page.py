"""docs/which_remedy.md is what its template, the notebooks' boards and the committed runs give now."""

import json
import re

import pandas as pd
import pytest

from stability_lib import advice, alarms, batch, claims, evaluate, runs, store, studies
from stability_lib.__main__ import main
from stability_lib.chapters import c05_kss_divergence as c05

ROOT = runs.project_root()
PAGE = (ROOT / advice.PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rendered():
    return advice.render()


def outputs(chapter):
    """What the cells of a committed notebook print, and their tables, spaces and line breaks as one."""
    cells = json.loads(batch.notebooks([chapter])[0].read_text(encoding="utf-8"))["cells"]
    found = [text for cell in cells for output in cell.get("outputs", []) for text in (
        output.get("text", []), *(output.get("data", {}).get(f"text/{kind}", []) for kind in ("plain", "html")))]
    return re.sub(r"<style.*?</style>|<[^>]+>|\s+", " ", " ".join("".join(lines) for lines in found), flags=re.DOTALL)


def test_the_committed_page_is_what_rendering_gives_now(rendered):
    assert rendered == PAGE, "run `python -m stability_lib remedies-page` and read what changed"


def test_the_command_writes_the_page(rendered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(advice, "PAGE", tmp_path / "page.md")
    assert main(["remedies-page"]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == rendered
    assert str(tmp_path / "page.md") in capsys.readouterr().out


def test_every_link_of_the_page_leads_somewhere():
    links = re.findall(r"\]\(([^) ]+)", PAGE)
    headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in PAGE.splitlines() if line.startswith("#")]
    assert len(links) > 60
    for link in links:
        path, _, anchor = link.partition("#")
        assert not path or (ROOT / "docs" / path).exists(), link
        assert path or anchor in headings, link


def test_readme_alarms_and_chapter_09_name_the_page():
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").split("\n![")[0]
    assert str(advice.PAGE) in first_screen
    raised = alarms.Raised(alarms.ALARMS[0], "loss", float("nan"), 3, 2)
    assert str(raised).endswith(f"(chapter {alarms.ALARMS[0].chapter}; more in {advice.PAGE})")
    assert f"../{advice.PAGE}" in batch.notebooks(["09"])[0].read_text(encoding="utf-8")


def test_each_claim_on_the_page_has_the_recorded_verdict():
    recorded = json.loads((ROOT / "data" / "verdicts.json").read_text(encoding="utf-8"))["cpu"]
    shown = dict(re.findall(r'\.ipynb "([\w.-]+): ([\w ]+)"\)', PAGE))
    assert len(shown) > 30
    assert shown == {name: " or ".join(recorded[name]) for name in shown}


@pytest.mark.parametrize("chapter, number", [
    ("01", lambda: advice.claim("P1.instability", "reproduced")), ("03", lambda: advice.kept_lr("standard")),
    ("03", lambda: advice.kept_lr("standard", "none")), ("03", lambda: advice.kept_lr("mup_simple", "none")),
    ("09", lambda: advice.eps_costs(1e-4)), ("09", lambda: advice.eps_costs(1e-3)),
    ("10", lambda: advice.gains("weight norm")), ("10", lambda: advice.gains("Pre-LN"))])
def test_an_estimate_stands_in_its_chapter_too(chapter, number):
    (estimate,) = re.findall(r"[-\d.]+ \[[-\d.]+, [-\d.]+\]", number())
    assert estimate in outputs(chapter)


@pytest.mark.parametrize("arm", ["no control", "weight norm", "Pre-LN", "clip 1", "longer warm-up", "qk-norm",
                                 "SAM 0.1"])
def test_counts_of_divergence_are_those_of_chapter_10(arm):
    diverged, of = map(int, re.match(r"(\d+) of (\d+)", advice.diverged(arm)).groups())
    assert re.search(rf" {arm} {diverged} of {of} \[", outputs("10"))


def test_other_numbers_are_those_of_their_chapters():
    ratio = lambda text: "{:.2f} [{:.2f}, {:.2f}]".format(*map(float, re.findall(r"[\d.]+", text)))  # noqa: E731
    assert ratio(advice.perplexity("weight norm", "text")) == "0.75 [0.55, 1.04]"
    assert "0.75 [0.55, 1.04]" in outputs("11")
    assert advice.language_diverged("no control", "text").startswith("11 of 24 ")
    assert advice.language_diverged("clip 1", "text").startswith("0 of 24 ")
    assert all(re.search(rf"{arm} {count} {count} ", outputs("11")) for arm, count in (("M no control", 11),
                                                                                      ("clip 1", 0)))
    assert advice.diverged("KSS 0.5", "kss_dose").startswith("0 of 6 ")
    assert "without control on the same learning rates and seeds: 6/6" in outputs("05")
    assert advice.diverged("no control", "kss_dose").startswith("6 of 6 ")
    for arm in ("clip 1", "no control", "weight norm"):
        assert f" {arm} {advice.fair_diverged(arm).split(' [')[0]} [" in outputs("10")
    assert (advice.recall("KSS 0.5"), advice.recall("no control")) == ("57% to 99%", "100%")
    assert "94, 99, 57 " in outputs("05")
    assert advice.forced(300).startswith("1200 cost 0.53 ")
    forced = runs.frame([*runs.read(runs.reference_path("logit_transplant")).values()])
    losses = forced.groupby("logit_transplant")["loss_final"].mean()
    assert losses[300.0] - losses[1.0] == pytest.approx(0.53, abs=0.005)


def test_boards_agree_with_the_committed_runs():
    shaped, counts = advice._tried("kss_divergence"), {}
    for arm in ("no control", "KSS 5"):
        failed = shaped.loc[shaped["arm"] == arm, "status"] != "ok"
        counts[arm] = int(failed.sum()), len(failed)
    board = advice.board("05_kss_divergence")
    ours = str(evaluate.proportion_difference(counts["KSS 5"], counts["no control"]))
    assert board["KT3.kss-every-step"]["ours"] == ours
    growth = advice._committed("attention_logit_growth")
    high = growth[growth["lr"] == growth["lr"].max()]
    found = evaluate.difference(high, "loss", "qk_norm", "none", "head", ["n_params", "seed"])
    assert advice.board("01_attention_logit_growth")["P1.instability"]["ours"] == str(found)


def test_a_claim_at_scale_gpu_is_that_of_the_board_beside_the_notebook_s_own():
    tables = [runs.frame([*store.read(store.reference_path(study, "gpu")).values()])
              for study in ("kss_fair", "kss_fair_seeds")]
    rows = pd.concat(tables)
    rows = rows[rows["clip_norm"].isna() & rows["lr"].isin(c05.fair_lrs("gpu"))].assign(
        diverged=lambda table: table["status"] == "diverged")
    found = evaluate.share_difference(rows, "diverged", "shaping", "kss", "none", ["lr", "seed"])
    shown = advice.claim("KT3.fair", "contradicted", scale="gpu")
    assert shown == f'{found} ([05](../notebooks/05_kss_divergence.ipynb "KT3.fair at scale gpu: contradicted"))'
    assert shown != advice.claim("KT3.fair", "contradicted")


def a_board(monkeypatch, **changes):
    stem, stated = "05_kss_divergence", claims.of_chapter("05_kss_divergence")[0]
    row = dict(claim=stated.id, criterion=stated.criterion, ours="-0.5 [-1, 0.25]", verdict="undecided",
               adjusted="undecided") | changes
    monkeypatch.setattr(advice, "board", lambda asked, scale=None: {row["claim"]: row} if asked == stem else {})
    return lambda expected="undecided", unit="": advice.claim(stated.id, expected, unit)


@pytest.mark.parametrize("unit, shown", [
    ("", "-0.5 [-1, 0.25]"), ("nats", "-0.5 [-1, 0.25] nats"), ("%", "-50% [-100%, 25%]"),
    ("points", "-50 [-100, 25] points"), ("10**", "0.316 [0.1, 1.78]"), ("exp", "0.607 [0.368, 1.28]")])
def test_a_claim_is_shown_in_its_unit_with_chapter_and_verdict(unit, shown, monkeypatch):
    link = '[05](../notebooks/05_kss_divergence.ipynb "KT3.uncontrolled: {}")'
    assert a_board(monkeypatch)(unit=unit) == f"{shown} ({link.format('undecided')}, undecided)"
    sure = a_board(monkeypatch, verdict="reproduced")
    assert sure("reproduced", unit) == f"{shown} ({link.format('reproduced')}, a lead)"
    surest = a_board(monkeypatch, verdict="reproduced", adjusted="reproduced")
    assert surest("reproduced", unit) == f"{shown} ({link.format('reproduced')})"


@pytest.mark.parametrize("changes, expected, message", [
    ({}, "reproduced", "KT3.uncontrolled is 'undecided', and docs/which_remedy.md.in was written for 'reproduced'"),
    (dict(criterion="another > 1"), "undecided", "does not hold KT3.uncontrolled by its criterion of now: execute"),
    (dict(claim="KT3.clipping"), "undecided", "05_kss_divergence.ipynb does not hold KT3.uncontrolled"),
    (dict(ours=""), "undecided", "KT3.uncontrolled has no estimate on the board")])
def test_a_board_that_does_not_fit_is_an_error(changes, expected, message, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(message)):
        a_board(monkeypatch, **changes)(expected)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"unknown claim 'KT3.clippin'.*KT3\.clipping"):
        advice.claim("KT3.clippin", "reproduced")
    with pytest.raises(ValueError, match="unknown unit 'percent'"):
        advice.claim("KT3.clipping", "reproduced", "percent")
    with pytest.raises(ValueError, match="unknown arm 'clip 2'"):
        advice.diverged("clip 2")
    with pytest.raises(ValueError, match="unknown size 'middle'"):
        advice.limit("middle")


@pytest.mark.parametrize("text, message", [
    ("{{ divergd('clip 1') }}", "'divergd' is undefined: known are claim, chapter"), ("{{ claim( }}", "unexpected"),
    ("{{ kept_lr('mup') }}", "single positional indexer")])
def test_a_fault_in_the_template_names_it(text, message, tmp_path, monkeypatch):
    (tmp_path / "page.in").write_text(text)
    monkeypatch.setattr(advice, "TEMPLATE", tmp_path / "page.in")
    with pytest.raises(ValueError, match=rf"page\.in: {message}"):
        advice.render()


def test_a_changed_run_changes_the_number_and_a_lost_one_is_named(tmp_path, monkeypatch):
    lines = runs.reference_path("adam_epsilon").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if json.loads(line)["config"].get("eps") == 1e-3
              and json.loads(line)["config"].get("lr", 1e-2) == 1e-2)
    row = json.loads(lines[at])
    lines[at] = json.dumps(row | {"loss_final": row["loss_final"] + 0.3})
    monkeypatch.setattr(runs, "reference_path", lambda study: tmp_path / f"{study}.jsonl")
    before = advice.eps_costs(1e-3)
    try:
        (tmp_path / "adam_epsilon.jsonl").write_text("\n".join(lines) + "\n")
        advice._committed.cache_clear()
        assert advice.eps_costs(1e-3) != before
        (tmp_path / "adam_epsilon.jsonl").write_text("\n".join(lines[:at] + lines[at + 1:]) + "\n")
        advice._committed.cache_clear()
        with pytest.raises(ValueError, match=f"adam_epsilon.jsonl lacks 1 of {len(lines)} runs .{row['key']}"):
            advice.eps_costs(1e-3)
    finally:
        advice._committed.cache_clear()


def test_every_chapter_cited_has_its_scale_in_the_table():
    cited = set(re.findall(r"\(\.\./notebooks/(\w+)\.ipynb", PAGE))
    table = PAGE[PAGE.index("## Where the numbers are from"):]
    assert cited == set(re.findall(r"^\| \[\d\d\]\(\.\./notebooks/(\w+)\.ipynb\)", table, flags=re.M))
    assert cited <= set(studies.modules())
    row = advice.scales(["13_pretrained_models"]).splitlines()[-1]  # a chapter without runs
    assert row == "| [13](../notebooks/13_pretrained_models.ipynb) |  |  |  |  |"
