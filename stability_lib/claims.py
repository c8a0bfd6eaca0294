"""The papers' claims as data, and the one rule that turns an estimate into a verdict.

A claim says what is measured and which side of a threshold supports it. The verdict is mechanical: `reproduced` where
the whole 95% interval lies on the claimed side, `partly` where only the value does, `not reproduced` where it does
not, `out of reach here` where nothing could be measured. An interval of zero width over seeds means a measurement too
coarse to vary, not certainty: it gives `partly` at most.
"""

import dataclasses
import json
import math

import pandas as pd
from IPython.display import display

from .config import unknown
from .evaluate import Estimate
from .runs import project_root

MIME = "application/vnd.stability-lib.claims+json"
"""Under this type a notebook publishes its verdicts for the report."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's `statement` with its `source` and value, and our criterion: `quantity` `side` `threshold`."""

    id: str
    source: str
    statement: str
    paper_value: str
    quantity: str
    side: str
    threshold: float

    @property
    def criterion(self) -> str:
        return f"{self.quantity} {self.side} {self.threshold:g}"


CLAIMS = {
    "01_attention_logit_growth": (
        Claim("P1.instability", "P Fig. 1", "without qk-norm, training fails at a high learning rate",
              "the loss at high LR explodes",
              "final loss without minus with qk-norm at the highest LR (nats)", ">", 0.3),
        Claim("P1.lr-falls", "P Fig. 1", "the failing learning rate falls as the model grows",
              "at a lower LR the larger the model",
              "slope of log10 failing LR per decade of N, without qk-norm", "<", 0.0),
        Claim("P1.qk-norm-trains", "P Fig. 1", "with qk-norm, models train across the whole range of learning rates",
              "three orders of magnitude of LR", "share of runs with qk-norm that do not fail", ">", 0.8),
        Claim("P1.sensitivity-falls", "P Fig. 1", "qk-norm lowers LR sensitivity",
              "falls with qk-norm", "LR sensitivity with minus without qk-norm (nats)", "<", 0.0),
        Claim("P1.sensitivity-grows", "P Fig. 1", "without qk-norm, LR sensitivity grows with size",
              "grows with N", "slope of LR sensitivity per decade of N, without qk-norm (nats)", ">", 0.0),
        Claim("P1.sensitivity-grows-qk", "P Fig. 1", "with qk-norm, LR sensitivity still grows with size",
              "still grows with N", "slope of LR sensitivity per decade of N, with qk-norm (nats)", ">", 0.0),
        Claim("P2.logits-blow-up", "P Fig. 2", "the largest attention logit of block 0 blows up where the loss does",
              "the logit blows up where the loss does",
              "log10 ratio of the peak logit at the highest LR to that at LR 1e-2, without qk-norm", ">", 1.0),
        Claim("P9.failing-above-1e4", "P Figs 2, 9", "failing runs have attention logits above about 1e4",
              "above 1e4", "log10 of the peak attention logit, mean over failing runs without qk-norm", ">", 4.0),
        Claim("P9.above-1e4-fails", "P Fig. 9", "every run with an attention logit above 1e4 fails",
              "all points above 1e4 diverged", "share of runs above 1e4 that fail", ">", 0.75),
        Claim("PE1.norms", "P Fig. E.1", "it is the norms of q and k that make logits large, not their alignment",
              "norms grow, cosine similarity does not",
              "share of the largest logit's log growth due to |q||k|, failing runs without qk-norm", ">", 0.5),
    ),
}


def verdict(claim: Claim, estimate: Estimate | None) -> str:
    """The verdict on `claim`; None stands for something that could not be measured at this scale."""
    if estimate is None:
        return "out of reach here"
    holds = (lambda x: x > claim.threshold) if claim.side == ">" else (lambda x: x < claim.threshold)
    if not holds(estimate.value):
        return "not reproduced"
    coarse = math.isclose(estimate.low, estimate.high)
    return "reproduced" if holds(estimate.low) and holds(estimate.high) and not coarse else "partly"


def scoreboard(chapter: str, estimates: dict[str, Estimate | None]) -> pd.DataFrame:
    """One row per claim of the chapter. Raises `ValueError` where an estimate is missing or belongs to no claim."""
    if chapter not in CLAIMS:
        raise ValueError(unknown("chapter", chapter, CLAIMS))
    known = [claim.id for claim in CLAIMS[chapter]]
    for name in estimates:
        if name not in known:
            raise ValueError(unknown("claim", name, known))
    absent = set(known) - set(estimates)
    if absent:
        raise ValueError(f"no estimate for {', '.join(sorted(absent))}: give one, or None where it is out of reach")
    rows = []
    for claim in CLAIMS[chapter]:
        estimate = estimates[claim.id]
        rows.append({"claim": claim.id, "source": claim.source, "statement": claim.statement,
                     "paper": claim.paper_value, "criterion": claim.criterion,
                     "ours": str(estimate) if estimate else "", "n": estimate.n if estimate else 0,
                     "verdict": verdict(claim, estimate)})
    return pd.DataFrame(rows)


def publish(board: pd.DataFrame) -> None:
    """Show the scoreboard as a table and leave it in the notebook as data for the report."""
    with pd.option_context("display.max_colwidth", None):
        table = board.to_html(index=False, escape=True)
        display({"text/html": table, "text/plain": board.to_string(index=False),
                 MIME: board.to_dict("records")}, raw=True)


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
