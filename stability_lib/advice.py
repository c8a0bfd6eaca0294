"""The page docs/which_remedy.md: its template, and every number on it from the chapters' boards and committed runs.

The text is docs/which_remedy.md.in (jinja2). It asks for numbers by the functions here: `{{ claim("P5.loss",
"reproduced") }}` is a row of the board in the executed notebook, the others are counted from the committed runs of
scale cpu. A number that its chapter shows too is computed as it is there.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from . import batch, claims, evaluate, models, plotting, runs, signals, studies
from .chapters import c16_early_warning as c16
from .chapters import c17_later_remedies as c17
from .chapters.c05_kss_divergence import control_name, fair_arms
from .chapters.c11_language_models import LADDER
from .config import RunConfig, replace, unknown

PAGE, TEMPLATE = Path("docs/which_remedy.md"), Path("docs/which_remedy.md.in")
UNITS = {"": lambda x: x, "nats": lambda x: x, "%": lambda x: 100 * x, "points": lambda x: 100 * x,
         "10**": lambda x: 10**x, "exp": np.exp}
"""How to show an estimate: as it is, a share or a difference of shares in percent, a difference of log10 or of natural
logs as a ratio."""


def render() -> str:
    """The page by the committed state. Raises `ValueError` that names the place where the template asks for something
    unknown, or where a verdict is no longer the one that its sentence was written for."""
    text = (batch.checkout() / TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    known = {function.__name__: function for function in NUMBERS}
    try:
        page = environment.from_string(text).render(known)
    except (jinja2.TemplateError, LookupError) as error:
        raise ValueError(f"{TEMPLATE}: {error}: known are {', '.join(known)}") from error
    return page + scales(sorted(set(re.findall(r"\(\.\./notebooks/(\w+)\.ipynb", page))))


def write() -> Path:
    """Render the page to its place."""
    path, text = batch.checkout() / PAGE, render()
    path.write_text(text, encoding="utf-8")
    return path


# what the chapters' boards say

def claim(name: str, expected: str, unit: str = "", scale: str | None = None) -> str:
    """The estimate on a claim's board, in `unit`, and after it the chapter, and whether it is undecided or a lead.
    `scale` asks for the board of another scale in the same notebook.

    Raises `ValueError` where there is no such claim, its chapter's notebook does not show it or shows it by another
    criterion, it was not measured, or its verdict is not `expected`.
    """
    known = {found.id: (stem, found) for stem in studies.modules() for found in claims.of_chapter(stem)}
    if name not in known:
        raise ValueError(unknown("claim", name, known))
    home, stated = known[name]
    row = board(home, scale).get(name)
    if row is None or row["criterion"] != stated.criterion:
        raise ValueError(f"the board of notebooks/{home}.ipynb does not hold {name} by its criterion of now: "
                         "execute the notebook again")
    if row["verdict"] != expected:
        raise ValueError(f"{name} is {row['verdict']!r}, and {TEMPLATE} was written for {expected!r}: write the "
                         "sentence around it anew, and the verdict in it")
    value = re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", row["ours"])
    if value is None:
        raise ValueError(f"{name} has no estimate on the board of notebooks/{home}.ipynb ({row['ours']!r}): leave "
                         "it out")
    mark = ", undecided" if expected == "undecided" else ", a lead" if row["adjusted"] != expected else ""
    told = f"{name}{f' at scale {scale}' if scale else ''}: {expected}"
    return f"{_shown(*map(float, value.groups()), unit)} ({_link(home, told)}{mark})"


def chapter(number: str) -> str:
    """A link to a chapter's notebook."""
    (path,) = batch.notebooks([number])
    return _link(path.stem)


def _link(stem: str, title: str = "") -> str:
    shown = f' "{title}"' if title else ""
    return f"[{stem[:2]}](../notebooks/{stem}.ipynb{shown})"


def scales(stems: list[str]) -> str:
    """A table of the data, sizes, lengths and seeds of chapters' runs at scale cpu; seeds of one setting in a study."""
    lines = ["| chapter | data | parameters | steps | seeds of a setting, in one study |", "|---|---|---|---|---|"]
    for stem in stems:
        grids = [grid for study in studies.of_chapter(stem) if (grid := [c for c in _grid(study) if c.steps > 1])]
        made = [config for grid in grids for config in grid]
        shapes = {replace(config, seed=0, lr=1.0) for config in made}
        lines.append(f"| {_link(stem)} | {', '.join(dict.fromkeys(config.data for config in made))} | "
                     f"{_span(filter(None, map(models.n_params, shapes)), plotting.size_label)} | "
                     f"{_span({config.steps for config in made})} | "
                     f"{_span(n for grid in grids for n in Counter(replace(c, seed=0) for c in grid).values())} |")
    return "\n".join(lines) + "\n"


def _span(values: Iterable[float], show: Callable[[float], str] = "{:g}".format) -> str:
    ordered = sorted(values)
    return " to ".join(dict.fromkeys(map(show, ordered[:1] + ordered[-1:])))


@functools.cache
def board(stem: str, scale: str | None = None) -> dict[str, dict]:
    """The rows that `claims.publish` left in a chapter's committed notebook, by claim; none where there is no board.
    `scale` asks for a board beside the notebook's own."""
    path = batch.notebook_folder() / f"{stem}.ipynb"
    if not path.exists():
        return {}
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {row["claim"]: row for cell in cells for output in cell.get("outputs", [])
            for row in output.get("data", {}).get(claims.MIME, []) if row.get("scale") == scale}


def _shown(value: float, low: float, high: float, unit: str = "") -> str:
    if unit not in UNITS:
        raise ValueError(unknown("unit", unit, UNITS))
    sign, word = "%" if unit == "%" else "", f" {unit}" if unit in ("nats", "points") else ""
    value, low, high = (f"{UNITS[unit](x):.3g}{sign}" for x in (value, low, high))
    return f"{value} [{low}, {high}]{word}"


def _estimate(found: evaluate.Estimate, unit: str = "") -> str:
    return _shown(found.value, found.low, found.high, unit)


# what is counted from the committed runs

@functools.cache
def _grid(study: str) -> list[RunConfig]:
    return studies.configs(study, "cpu")


@functools.cache
def _committed(study: str) -> pd.DataFrame:
    """The committed runs of a study's grid at scale cpu, with their capped `loss`."""
    path = runs.reference_path(study)
    rows, keys = runs.read(path), [key for key, _ in runs.keyed(_grid(study))]
    if missing := [key for key in keys if key not in rows]:
        raise ValueError(f"{path.name} lacks {len(missing)} of {len(keys)} runs ({missing[0]}, ...): train them with "
                         f"`stability-lib reference {study}`")
    table = runs.frame([rows[key] for key in keys])
    return table.assign(loss=evaluate.capped_loss(table))


def limit(which: str) -> str:
    """The size of the `smallest` or `largest` model, and the learning rate from which it fails without qk-norm (chapter
    01)."""
    growth = _committed("attention_logit_growth")
    found = evaluate.stable_lr(growth[growth["qk_norm"] == "none"], ["n_params"])
    ends = {"smallest": found["n_params"].min(), "largest": found["n_params"].max()}
    if which not in ends:
        raise ValueError(unknown("size", which, ends))
    n = ends[which]
    rate = evaluate.geometric_mean(found.loc[found["n_params"] == n, "crossing_lr"])
    return f"{plotting.size_label(n)} parameters from {_estimate(rate)}"


def passes_after(logit: float) -> str:
    """After what share of their steps runs that pass a logit in any block do so (chapter 01)."""
    growth = _committed("attention_logit_growth")
    plain = growth[growth["qk_norm"] == "none"]
    logits = pd.concat([runs.curve(plain[plain["n_layers"] > block], f"attention_logit_max/block{block}")
                        for block in range(plain["n_layers"].max())])
    first = logits[logits["value"] > logit].groupby(["seed", "key"]).agg(step=("step", "min"), of=("steps", "first"))
    return _estimate(evaluate.mean((first["step"] / first["of"]).groupby("seed").mean()), "%")


def best_loss_with_qk_norm() -> str:
    """The best loss of a curve with qk-norm minus that without (chapter 01)."""
    found = evaluate.lr_sensitivity(_committed("attention_logit_growth"), ["n_params", "qk_norm"])
    return _estimate(evaluate.difference(found, "best_loss", "qk_norm", "head", "none", ["n_params", "seed"]), "nats")


def forced(kappa: float) -> str:
    """The largest logit in a model whose attention logits are forced to `kappa`, and its final loss minus that at 1
    (chapter 08)."""
    table = _committed("logit_transplant")
    largest = evaluate.mean(runs.peak(table[table["logit_transplant"] == kappa], "attention_logit_max")).value
    cost = evaluate.difference(table, "loss", "logit_transplant", kappa, 1.0, ["seed"])
    return f"{float(f'{largest:.2g}'):g} cost {_estimate(cost, 'nats')}"


def kept_lr(parametrization: str, qk_norm: str = "head") -> str:
    """What the narrowest model's best learning rate costs the widest one (chapter 03)."""
    swept = _committed("mu_parametrization")
    swept = swept[(swept["parametrization"] == parametrization) & (swept["qk_norm"] == qk_norm)
                  & (swept["attention_scale"] == "parametrization")]
    best = swept.groupby(["d_model", "lr"])["loss"].mean().groupby("d_model").idxmin().str[1]
    wide = swept[swept["d_model"] == best.index.max()].pivot(index="seed", columns="lr", values="loss")
    return _estimate(evaluate.mean(wide[best.iloc[0]] - wide[best.iloc[-1]]), "nats")


def eps_over_gradient(eps: float) -> str:
    """An eps in units of the gradient RMS of the first MLP layer at LR 0.01 (chapter 09)."""
    late = runs.curve(_suited(1e-8), "gradient_rms/block0.mlp_up")
    late = late[late["step"] >= 0.9 * late["steps"]].groupby("key")["value"].mean()
    return f"{eps / evaluate.geometric_mean(late).value:.2g}"


def eps_costs(eps: float) -> str:
    """Final loss at an eps minus that at 1e-8, LR 0.01 (chapter 09)."""
    return _estimate(evaluate.difference(_suited(eps, 1e-8), "loss", "eps", eps, 1e-8, ["seed"]), "nats")


def _suited(*eps: float) -> pd.DataFrame:
    tried = _committed("adam_epsilon")
    return tried[(tried["lr"] == 1e-2) & tried["eps"].isin(eps)]


def diverged(arm: str, study: str = "kss_baselines") -> str:
    """How many models without norms diverge under an arm, at learning rates and seeds that `study` shares with
    `kss_divergence` (chapter 10; `kss_dose`: chapter 05)."""
    found, both = _tried("kss_divergence", study), [_committed("kss_divergence"), _committed(study)]
    for axis in ("lr", "seed"):
        found = found[found[axis].isin(set(both[0][axis]) & set(both[1][axis]))]
    return _count(_of_arm(found, arm)["status"] != "ok")


def fair_diverged(arm: str) -> str:
    """How many models without norms diverge under an arm where initial weights are large and recall is learned
    (chapters 05 and 10)."""
    return _count(_of_arm(fair_arms(_committed("kss_fair"), "cpu"), arm)["diverged"])


def gains(arm: str) -> str:
    """Final loss of an arm at its best learning rate minus that of no control at its own (chapter 10)."""
    found = _tried("kss_divergence", "kss_baselines")
    found = found[found["lr"].isin(_committed("kss_baselines")["lr"])]

    def at_best(name: str) -> pd.Series:
        table = _of_arm(found, name)
        return table[table["lr"] == table.groupby("lr")["loss"].mean().idxmin()].set_index("seed")["loss"]
    return _estimate(evaluate.mean(at_best(arm) - at_best("no control")), "nats")


def recall(arm: str) -> str:
    """Accuracy of an arm, lowest to highest seed, at its best learning rate where recall can be learned (chapter
    05)."""
    table = _of_arm(_tried("kss_learning"), arm)
    best = table.groupby("lr")["loss"].mean().idxmin()
    return _span(table.loc[table["lr"] == best, "accuracy_final"], "{:.0%}".format)


@functools.cache
def _tried(*names: str) -> pd.DataFrame:
    """The runs of studies, each once, with their arm."""
    table = pd.concat([_committed(study) for study in names]).drop_duplicates("key")
    return table.assign(arm=[control_name(run) for run in table.to_dict("records")])


def _of_arm(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    if arm not in set(table["arm"]):
        raise ValueError(unknown("arm", arm, sorted(set(table["arm"]))))
    return table[table["arm"] == arm]


def _language(arm: str, source: str) -> pd.DataFrame:
    found = _committed(f"language_{source}")
    arms = {"no control": "shaping == 'none' and clip_norm.isna() and reparametrization == 'none' and "
                          "qk_norm == 'none'",
            "clip 1": "clip_norm == 1", "weight norm": "reparametrization == 'weight_norm'",
            "KSS at the paper's dose": "shaping == 'kss' and shaping_every == 10"}
    if arm not in arms:
        raise ValueError(unknown("arm", arm, arms))
    return found[found["d_model"] == 64].query(arms[arm])


def language_diverged(arm: str, source: str) -> str:
    """How many language models of size M diverge, by their loss, at the edge (chapter 11)."""
    found = _language(arm, source)
    return _count(found.loc[found["lr"] > LADDER[-1], "status"] != "ok")


def perplexity(arm: str, source: str) -> str:
    """Perplexity of an arm over that of no control, size M, each at its best learning rate (chapter 11)."""
    found = pd.concat([_language(name, source).assign(arm=name) for name in (arm, "no control")])
    best = evaluate.best_lr(found[found["lr"] <= LADDER[-1]], ["arm"])
    return _estimate(evaluate.difference(best, "best_loss", "arm", arm, "no control", ["seed"]), "exp")


def collapsed(load_balance: float) -> str:
    """How many mixtures have, at some reading once training has begun, an expert with over half of all tokens (chapter
    14)."""
    found = _committed("router_collapse")
    found = found[found["load_balance"] == load_balance]
    blocks = sorted({name for curves in found["curves"] for name in curves if name.startswith("expert_load_max/")})
    read = pd.concat([runs.curve(found, block) for block in blocks])
    return _count(read[read["step"] > 0].groupby("key")["value"].max() > 0.5)


def less_sensitive(arm: str, study: str = "later_remedies") -> str:
    """LR sensitivity under a later remedy minus that under none, at one size (chapter 17)."""
    tried = _committed(study)
    tried = tried.assign(arm=[c17.arm(run) for run in tried.to_dict("records")])
    found = evaluate.lr_sensitivity(tried[tried["lr"] >= 1e-2], ["arm"])
    return _estimate(evaluate.difference(found, "lr_sensitivity", "arm", arm, c17.NONE, ["seed"]), "nats")


def warned_in_time(logit: float) -> str:
    """How many runs that fail, on text and without qk-norm, an alarm at this largest attention logit warns in time
    (chapter 16)."""
    near = _committed("near_failing")
    about, series = c16.about(near), signals.series(near)
    text = about[(about["task"] == "P") & ~about["name"].str.contains("qk-norm")]
    judged = signals.judge(series[series["signal"] == "attention_logit_max"], text, logit)
    return _count(judged["lead"].dropna() >= c16.TIME_TO_ACT)


def _count(failed: pd.Series) -> str:
    share = evaluate.proportion(int(failed.sum()), len(failed))
    return f"{failed.sum()} of {len(failed)} [{share.low:.0%}, {share.high:.0%}]"


NUMBERS = (claim, chapter, limit, passes_after, forced, best_loss_with_qk_norm, kept_lr, eps_over_gradient, eps_costs,
           diverged, fair_diverged, gains, recall, language_diverged, perplexity, collapsed,
           less_sensitive, warned_in_time)
