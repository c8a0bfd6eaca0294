"""What a claim is, the one rule that turns an estimate into a verdict, and the boards that show them.

A claim says what is measured and where the estimate has to lie. The verdict is mechanical: `reproduced` where the whole
95% interval lies there, `contradicted` where the whole interval lies elsewhere, `undecided` where it holds the
threshold or has no width, as a measure too coarse to vary over seeds is no certainty, `out of reach here` where nothing
could be measured. The claims themselves stand in `chapters`.
"""

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence

import pandas as pd
from IPython.display import display

from . import studies
from .config import unknown
from .evaluate import Estimate
from .runs import project_root

MIME = "application/vnd.stability-lib.claims+json"
"""Under this type a notebook publishes its verdicts for the report."""
VERDICTS = ("reproduced", "contradicted", "undecided", "out of reach here")
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's `statement` with its `source` and value, and our criterion: `quantity` `side` `threshold`.

    `side` is `<`, `>`, or `within`: between minus and plus the threshold, for claims that two things are the same.
    """

    id: str
    source: str
    statement: str
    paper_value: str
    quantity: str
    side: str
    threshold: float

    def __post_init__(self):
        if self.side not in ("<", ">", "within"):
            raise ValueError(unknown("side", self.side, ("<", ">", "within")))

    @property
    def criterion(self) -> str:
        return f"{self.quantity} {self.side} {'±' if self.side == 'within' else ''}{self.threshold:g}"

    def holds(self, low: float, high: float) -> bool | None:
        """Whether all of an interval lies where the claim says; None where only a part of it does."""
        least = -self.threshold if self.side == "within" else -math.inf if self.side == "<" else self.threshold
        most = math.inf if self.side == ">" else self.threshold
        return True if least < low and high < most else False if high < least or most < low else None


def of_chapter(chapter: str) -> tuple[Claim, ...]:
    """A chapter's claims by the name of its notebook; none where it makes none. Raises `ValueError` if unknown."""
    return getattr(studies.chapter(chapter), "CLAIMS", ())


def paper_table(name: str) -> pd.DataFrame:
    """What a paper reports, as printed there: `k_table_01` for paper K's Table 1, indexed by its first column.

    The first line of the file, in `data/papers`, says where the numbers are from. Raises `ValueError` if unknown.
    """
    folder = project_root() / "data" / "papers"
    if not folder.is_dir():
        raise ValueError(f"there is no {folder}: papers' tables come with a checkout of the project, run this in one")
    known = sorted(path.stem for path in folder.glob("*.csv"))
    if name not in known:
        raise ValueError(unknown("table", name, known))
    return pd.read_csv(folder / f"{name}.csv", comment="#", index_col=0)


def verdict(claim: Claim, estimate: Estimate | None, level: float = LEVEL) -> str:
    """The verdict on `claim`; None stands for something that could not be measured at this scale."""
    if estimate is None:
        return "out of reach here"
    low, high = (estimate.low, estimate.high) if level == LEVEL else estimate.bounds(level)
    if low >= high or math.isclose(low, high):
        return "undecided"
    return {True: "reproduced", False: "contradicted", None: "undecided"}[claim.holds(low, high)]


def adjusted(claims: Sequence[Claim], estimates: Mapping[str, Estimate | None]) -> dict[str, str]:
    """Verdicts that allow for the number of claims judged together, by Holm's method: the chance that any of them is
    decided wrongly stays at 5%. With m claims open, one is decided where its interval at 1 - 5% / m decides it."""
    found = {claim.id: verdict(claim, estimates[claim.id]) for claim in claims}
    left = [claim for claim in claims if estimates[claim.id] is not None]
    while left:
        at = {claim.id: verdict(claim, estimates[claim.id], 1 - (1 - LEVEL) / len(left)) for claim in left}
        found |= at
        still = [claim for claim in left if at[claim.id] == "undecided"]
        if len(still) == len(left):
            break
        left = still
    return found


def scoreboard(chapter: str, estimates: dict[str, Estimate | None]) -> pd.DataFrame:
    """One row per claim of the chapter, with its `verdict` and the one `adjusted` for their number.

    Raises `ValueError` where an estimate is missing or belongs to no claim.
    """
    claims = of_chapter(chapter)
    known = [claim.id for claim in claims]
    for name in estimates:
        if name not in known:
            raise ValueError(unknown("claim", name, known))
    absent = set(known) - set(estimates)
    if absent:
        raise ValueError(f"no estimate for {', '.join(sorted(absent))}: give one, or None where it is out of reach")
    strict, rows = adjusted(claims, estimates), []
    for claim in claims:
        estimate = estimates[claim.id]
        rows.append({"claim": claim.id, "source": claim.source, "statement": claim.statement,
                     "paper": claim.paper_value, "criterion": claim.criterion,
                     "ours": str(estimate) if estimate else "", "n": estimate.n if estimate else 0,
                     "verdict": verdict(claim, estimate), "adjusted": strict[claim.id]})
    return pd.DataFrame(rows)


def tally(verdicts: pd.Series) -> str:
    """How often each verdict occurs, in words."""
    return ", ".join(f"{(verdicts == name).sum()} {name}" for name in VERDICTS if (verdicts == name).any())


def publish(board: pd.DataFrame, scale: str | None = None) -> None:
    """Show the scoreboard as a table under a line that counts it, and leave it in the notebook as data for the report
    and the scorecard. Name the `scale` of a board that is not of the notebook's own: a second one beside it."""
    if scale is not None:
        board = board.assign(scale=scale)
    line = (f"{f'Scale {scale}, ' if scale else ''}{len(board)} claims: {tally(board['verdict'])}. "
            f"Adjusted for judging {len(board)} at once (Holm): "
            f"{tally(board['adjusted'])}.")
    with pd.option_context("display.max_colwidth", None):
        display({"text/html": f"<p>{html.escape(line)}</p>{as_html(board)}",
                 "text/plain": f"{line}\n{board.to_string(index=False)}", MIME: board.to_dict("records")}, raw=True)


def as_html(board: pd.DataFrame) -> str:
    """The scoreboard as a table of five columns, which a page of text has room for: what belongs together shares one,
    and the adjusted verdict is named where it differs."""
    text = board.astype(str).map(html.escape)
    small = lambda column: "<br><small>" + column + "</small>"  # noqa: E731
    lead = small("after Holm " + text["adjusted"]).where(board["adjusted"] != board["verdict"], "")
    return pd.DataFrame({
        "claim": text["statement"] + small(text["claim"] + ", " + text["source"]), "paper": text["paper"],
        "criterion": text["criterion"], "ours": text["ours"] + small("n = " + text["n"]),
        "verdict": text["verdict"] + lead}).to_html(index=False, escape=False, justify="left")


def check(board: pd.DataFrame, scale: str) -> None:
    """Print claim and verdict in fixed width, then hold them against the verdicts recorded for `scale`.

    `data/verdicts.json` lists the accepted verdicts per scale and claim; a claim or scale without an entry (another
    machine's GPU run, say) is printed and not judged. Raises `AssertionError` that names each deviation.
    """
    width = board["claim"].str.len().max()
    for row in board.itertuples():
        print(f"{row.claim:<{width}}  {row.verdict}")
    expected = json.loads((project_root() / "data" / "verdicts.json").read_text()).get(scale, {})
    off = [f"{row.claim} is {row.verdict!r}, recorded for scale {scale!r}: {' or '.join(expected[row.claim])}"
           for row in board.itertuples() if row.claim in expected and row.verdict not in expected[row.claim]]
    assert not off, "; ".join(off)
