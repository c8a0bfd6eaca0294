"""Every claim with its verdict, from the boards in the committed notebooks: the table, the figure and the sentences of
the notebook 99_scorecard and of the README.

A sentence is a template (jinja2). Numbers and verdicts in it are asked for by the functions here and in `advice`;
`says` chooses the words by the verdict, so that a verdict that changes changes the sentence, or, where there are no
words for it, makes rendering fail.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from . import advice, batch, claims, runs, studies
from .chapters.c99_scorecard import FINDINGS
from .config import unknown

GROUPS = {"P ": "paper P", "K ": "paper K", "ours": "ours"}
"""Whose claim it is, by how its source begins; all others are of later papers."""
LATER = "later papers"
ORDER = ("paper P", "paper K", LATER, "ours")
COLOURS = {("reproduced", True): "#0b4f8a", ("reproduced", False): "#8db8dc", ("undecided", True): "#e3e3e3",
           ("contradicted", False): "#eec08f", ("contradicted", True): "#b8560b",
          ("out of reach here", True): "#ffffff"}
"""By verdict and whether it stays when all claims of a chapter are judged at once, in the order of the figure."""


def group(source: str) -> str:
    """Whose claim it is."""
    return next((name for start, name in GROUPS.items() if source.startswith(start)), LATER)


def table() -> pd.DataFrame:
    """A row a claim: its chapter, group and criterion, the paper's value, and, by scale, ours and the verdicts.

    `quick` is what the verdicts recorded for that scale accept, as nobody's runs of it are committed. Raises
    `ValueError` where a notebook does not show a claim of its chapter by the criterion of now.
    """
    recorded, rows = json.loads((runs.project_root() / "data" / "verdicts.json").read_text(encoding="utf-8")), []
    for stem in studies.modules():
        home, larger = advice.board(stem), advice.board(stem, "gpu")
        for claim in claims.of_chapter(stem):
            row, of_gpu = home.get(claim.id), larger.get(claim.id, {})
            if row is None or row["criterion"] != claim.criterion:
                raise ValueError(f"the board of notebooks/{stem}.ipynb does not hold {claim.id} by its criterion of "
                                 "now: execute the notebook again")
            rows.append({"chapter": stem[:2], "claim": claim.id, "of": group(claim.source), "source": claim.source,
                         "statement": claim.statement, "paper": claim.paper_value or "not tested",
                         "criterion": claim.criterion, "ours": row["ours"], "verdict": row["verdict"],
                         "adjusted": row["adjusted"], "ours, gpu": of_gpu.get("ours", ""),
                         "verdict, gpu": of_gpu.get("verdict", ""), "adjusted, gpu": of_gpu.get("adjusted", ""),
                         "quick": " or ".join(recorded["quick"].get(claim.id, []))})
    return pd.DataFrame(rows)


def counts(found: pd.DataFrame) -> pd.DataFrame:
    """How many claims have each verdict, by group, and how many keep it when judged at once with their chapter's."""
    groups = [name for name in ORDER if (found["of"] == name).any()]
    lines = {}
    for name in groups:
        of = found[found["of"] == name]
        lines[name] = {"claims": len(of)} | {
            verdict: f"{(of['verdict'] == verdict).sum()} ({(of['adjusted'] == verdict).sum()})"
            for verdict in claims.VERDICTS}
    return pd.DataFrame(lines).T


def figure(found: pd.DataFrame) -> Figure:
    """A tile a claim, by group and verdict, pale where the verdict does not stay when all claims of its chapter are
    judged at once; claims judged at scale gpu too stand in a line of their own."""
    groups = {name: found[found["of"] == name] for name in ORDER if (found["of"] == name).any()}
    larger = found[found["verdict, gpu"] != ""]
    if len(larger):
        groups["again at scale gpu"] = larger.drop(columns=["verdict", "adjusted"]).rename(
            columns={"verdict, gpu": "verdict", "adjusted, gpu": "adjusted"})
    drawn, ax = plt.subplots(figsize=(13, 1.35 * len(groups) + 1.3))
    high = 4
    for line, (name, of) in enumerate(groups.items()):
        column, top = 0, line * (high + 2.2)
        ax.text(-0.6, top + high / 2, f"{name}\n{len(of)} claims", ha="right", va="center", fontweight="bold")
        for (verdict, stays), colour in COLOURS.items():
            same = of["verdict"] == of["adjusted"]
            tiles = int(((of["verdict"] == verdict) & ((same == stays) | (verdict not in claims.VERDICTS[:2]))).sum())
            for i in range(tiles):
                ax.add_patch(Rectangle((column + i // high, top + i % high), 0.88, 0.88, fc=colour, ec="0.35", lw=0.6))
            if tiles:
                width = -(-tiles // high)
                ax.text(column + width / 2, top - 0.25, tiles, ha="center", va="bottom", fontsize="small")
                column += width + 0.5
    ax.set(xlim=(-8, max(30, ax.dataLim.x1, *(patch.get_x() + 1 for patch in ax.patches))),
           ylim=(len(groups) * (high + 2.2) - 1.5, -1.6), aspect="equal", title=title(found))
    ax.axis("off")
    words = {True: "", False: ", a lead"}
    drawn.legend(handles=[Patch(fc=colour, ec="0.35", label=verdict + words[stays])
                          for (verdict, stays), colour in COLOURS.items()], loc="outside lower center", ncols=6,
                 frameon=False, fontsize="small")
    return drawn


def title(found: pd.DataFrame) -> str:
    """What the figure shows, in numbers."""
    share = {name: (int((of["verdict"] == "reproduced").sum()), len(of)) for name, of in found.groupby("of")}
    return ", ".join(f"{share[name][0]} of {share[name][1]} claims of {name}" for name in ORDER[:2]
                     if name in share) + " hold in small models"


# sentences

def says(name: str, unit: str = "", scale: str | None = None, **words: str) -> str:
    """The words for a claim's verdict of now, keyword by verdict with _ for spaces, and after them the estimate in a
    unit of `advice.UNITS` and the chapter; `scale` as in `advice.claim`. Raises `ValueError` where there are none for
    it."""
    home = {claim.id: stem for stem in studies.modules() for claim in claims.of_chapter(stem)}
    if name not in home:
        raise ValueError(unknown("claim", name, home))
    verdict = advice.board(home[name], scale).get(name, {}).get("verdict", "out of reach here")
    key = verdict.replace(" ", "_")
    if key not in words:
        raise ValueError(f"{name} is {verdict!r}, and its sentence has words for {', '.join(words)}: write some for it")
    if verdict == "out of reach here":
        return words[key]
    estimate, rest = advice.claim(name, verdict, unit, scale).split(" ([", 1)
    return f"{words[key]} ({estimate}; chapter [{rest}"


def reported(name: str) -> str:
    """What the source of a claim has, in its words: `12.5% against 66.7%`."""
    return {claim.id: claim.paper_value for stem in studies.modules() for claim in claims.of_chapter(stem)}[name]


def tally(of: str, verdict: str) -> int:
    """How many claims of a group have a verdict; `any` counts them all."""
    if of not in ORDER:
        raise ValueError(unknown("group", of, ORDER))
    if verdict not in (*claims.VERDICTS, "any"):
        raise ValueError(unknown("verdict", verdict, (*claims.VERDICTS, "any")))
    found = table()
    found = found[found["of"] == of]
    return len(found) if verdict == "any" else int((found["verdict"] == verdict).sum())


def overall(of: str) -> str:
    """What we would do with a paper, by how many of its claims hold. Counts that differ by less than their spread, the
    root of their sum, are even."""
    held, failed, every = (tally(of, verdict) for verdict in ("reproduced", "contradicted", "any"))
    if 2 * held > every:
        return (f"we would build on it: more than half of what it says, {held} of {every}, can be seen on a laptop, "
                f"and {failed} go the other way")
    if abs(held - failed) <= (held + failed) ** 0.5:
        return (f"we would decide claim by claim, as the count is even: {held} of {every} hold, {failed} go the other "
                "way, and the rest stays open at our size")
    if held > failed:
        return (f"we would take its measurements and not its promises: {held} of {every} claims hold, {failed} go the "
                "other way, and the rest stays open at our size")
    return f"we would not build on it: {failed} of {every} claims go the other way and {held} hold"


def sentences(templates: Iterable[str]) -> list[str]:
    """The templates rendered by the committed state. Raises `ValueError` that names what is unknown or has no words."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    known = {function.__name__: function for function in (*advice.NUMBERS, says, reported, tally, overall)}
    try:
        return [environment.from_string(text).render(known) for text in templates]
    except (jinja2.TemplateError, LookupError) as error:
        raise ValueError(f"a sentence of the scorecard: {error}: known are {', '.join(known)}") from error


START, END = "<!-- findings: python -m stability_lib findings -->\n", "<!-- end of findings -->"
"""Between them README.md holds `findings`."""


def findings() -> str:
    """The findings as the README holds them, its marks included, links from the root."""
    lines = [f"{i}. {text}" for i, text in enumerate(sentences(FINDINGS), 1)]
    return START + "\n".join(lines).replace("(../notebooks/", "(notebooks/") + "\n" + END


def write_findings() -> Path:
    """Put the findings of now into README.md. Raises `ValueError` where it has no place for them."""
    path = batch.checkout() / "README.md"
    text = path.read_text(encoding="utf-8")
    before, mark, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"{path} has no lines {START.strip()!r} and {END!r}: put them where the findings belong")
    path.write_text(before + findings() + after, encoding="utf-8")
    return path
