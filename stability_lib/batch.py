"""Run the notebooks headlessly with papermill, plan what they would train, and write one HTML report.

`Session` is the notebooks' side: it checks the parameters and hands out runs. The rest serves
`python -m stability_lib`.
"""

import ast
import base64
import dataclasses
import datetime
import math
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import jinja2
import pandas as pd
import torch

from . import __version__, runs, studies
from .claims import MIME
from .config import RunConfig, unknown
from .train import resolve_device

RECOMPUTE = {"missing": {}, "all": {"recompute": True}, "none": {"max_new": 0}}
"""What a notebook trains: what the store lacks, everything again, or nothing (a missing run is an error)."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A notebook's checked parameters. Raises `TypeError` or `ValueError` that names the remedy."""

    scale: str = "cpu"
    device: str = "auto"
    recompute: str = "missing"

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {type(value).__name__} {value!r}")
        studies.check_scale(self.scale)
        resolve_device(self.device)
        if self.recompute not in RECOMPUTE:
            raise ValueError(unknown("recompute", self.recompute, RECOMPUTE))

    @property
    def headless(self) -> bool:
        """Whether nobody is watching: then widgets give way to the static figures beside them."""
        return os.environ.get(runs.HEADLESS) == "1"

    def runs(self, study: str, configs: Iterable[RunConfig] | None = None) -> pd.DataFrame:
        """The study's runs at this scale, or those of `configs`, trained where the store lacks them."""
        if configs is None:
            configs = studies.configs(study, self.scale)
        return runs.ensure(configs, study, device=self.device, **RECOMPUTE[self.recompute])


def notebook_folder() -> Path:
    return runs.project_root() / "notebooks"


def notebooks(names: Iterable[str] = ()) -> list[Path]:
    """The notebooks of these names (with or without `.ipynb`; their number is enough), or all of them, in order."""
    present = {path.stem: path for path in sorted(notebook_folder().glob("[0-9][0-9]_*.ipynb"))}
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        found = [known for known in present if known == stem or known.split("_")[0] == stem]
        if not found:
            raise ValueError(unknown("notebook", stem, present))
        chosen += [present[known] for known in found]
    return chosen or list(present.values())


def check_parameters(path: Path, parameters: dict) -> None:
    """Hold parameters against the notebook's own: papermill would only warn about a name that is not there,
    and would pass any type. Raises `ValueError` (unknown name) or `TypeError`."""
    import papermill  # papermill and nbformat take two seconds to import: not in every notebook's `Session`

    declared = papermill.inspect_notebook(str(path))
    for name, value in parameters.items():
        if name not in declared:
            raise ValueError(f"{path.stem}: {unknown('parameter', name, declared)}")
        default = ast.literal_eval(declared[name]["default"])
        if default is not None and type(value) is not type(default):
            raise TypeError(f"{path.stem}: parameter {name} must be {type(default).__name__}, "
                            f"got {type(value).__name__} {value!r}")


def reproduce(paths: list[Path], output: Path, parameters: dict, cell_timeout: int | None = None) -> pd.DataFrame:
    """Execute notebooks into `output`, going on after a failure; one row each with `error` empty where it passed.

    Every parameter is checked against every notebook before the first one runs.
    """
    import papermill

    for path in paths:
        check_parameters(path, parameters)
    Session(**{name: value for name, value in parameters.items() if name in Session.__dataclass_fields__})
    output.mkdir(parents=True, exist_ok=True)
    os.environ[runs.HEADLESS] = "1"
    os.environ[runs.FRESH_SINCE] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows = []
    for path in paths:
        print(f"{path.stem} ...", flush=True)
        started, error = time.perf_counter(), ""
        try:
            papermill.execute_notebook(str(path), str(output / path.name), parameters=parameters, progress_bar=False,
                                       cwd=str(path.parent), execution_timeout=cell_timeout, log_output=False)
        except Exception as failure:  # a failed cell, a dead kernel, a time-out: the batch goes on and reports it
            last = str(failure).strip().splitlines()[-1:] or [""]
            error = f"{type(failure).__name__}: {last[0]}"
        rows.append({"notebook": path.stem, "seconds": round(time.perf_counter() - started, 1), "error": error})
        print(f"{path.stem} {'FAILED ' + error if error else 'ok'} ({rows[-1]['seconds']} s)", flush=True)
    return pd.DataFrame(rows)


def dry_run(paths: list[Path], scale: str, device: str, recompute: str = "missing") -> pd.DataFrame:
    """Per notebook: runs cached and missing, the missing ones' FLOPs, and the time they will take here."""
    rows = []
    for path in paths:
        plans = [runs.plan(studies.configs(study, scale), study, device, recompute=recompute == "all")
                 for study in studies.of_chapter(path.stem)]
        total = {name: sum(plan[name] for plan in plans) for name in ("cached", "missing", "flops", "seconds")}
        rows.append({"notebook": path.stem, "cached": int(total["cached"]), "missing": int(total["missing"]),
                     "FLOPs": f"{total['flops']:.2g}" if total["flops"] else "0",
                     "time here": runs.readable(total["seconds"]) if total["missing"] else "none"})
    return pd.DataFrame(rows)


def recompute_reference(names: list[str], device: str) -> None:
    """Train the `cpu` grids again, study by study, and make each the committed reference once complete.

    It can be interrupted: until all are done, finished runs lie in data/runs/local/reference-<version of the library>,
    and the same code does not train them again. Raises `StoreError` where that version is in no commit.
    """
    version = runs.commit("HEAD:./stability_lib") or __version__
    if version.endswith("-dirty"):
        raise runs.StoreError("stability_lib has changes that are in no commit, which the reference could not name: "
                              "commit or stash them")
    folder = runs.locate(names[0]).local.parent / f"reference-{version}"
    for study in names:
        configs, store = studies.configs(study, "cpu"), runs.Store(folder / f"{study}.jsonl")
        runs.ensure(configs, store, device=device)
        print(f"{study}: {runs.promote(study, configs, runs.read(store.local))} runs are the reference now")
    for study in names:
        (folder / f"{study}.jsonl").unlink()


def audit(n: int, tolerance: float, device: str, seed: int | None = None) -> pd.DataFrame:
    """Train `n` random reference runs again and compare, one row each with `agrees`.

    A run whose attention logits stayed below 1e4 must reach its final loss within `tolerance` (nats). Past that the
    dynamics are chaotic and last bits differ between machines: such a run must end within 0.3 nats and its logits peak
    within a factor of 3. One whose logits were not probed may be either, and must end within 0.3 nats. A diverged run
    must diverge again. Raises `ValueError` where n is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rows = []
    everything = [(study, config) for study in studies.names() for config in studies.configs(study, "cpu")]
    for study, config in pd.Series(everything).sample(min(n, len(everything)), random_state=seed):
        reference = runs.ensure([config], runs.Store(runs.locate(study).reference), max_new=0).iloc[[0]]
        again = runs.frame([runs.to_row(runs.train_run(config, device), device)])
        was, now = reference.iloc[0], again.iloc[0]
        logits = [float(runs.peak(frame, "attention_logit_max").iloc[0]) for frame in (reference, again)]
        if was["status"] != "ok" or now["status"] != "ok":
            agrees = was["status"] == now["status"]
        else:
            stable, ratio = logits[0] <= 1e4, logits[1] / logits[0]  # neither, and NaN, where nothing was probed
            apart = abs(was["loss_final"] - now["loss_final"])
            agrees = apart <= (tolerance if stable else 0.3) and (stable or not abs(math.log(ratio)) >= math.log(3))
        rows.append({"study": study, "key": was["key"], "status": f"{was['status']} / {now['status']}",
                     "reference": was["loss_final"], "again": now["loss_final"],
                     "logit peak": f"{logits[0]:.3g} / {logits[1]:.3g}", "agrees": bool(agrees)})
    return pd.DataFrame(rows)


def write_report(summary: pd.DataFrame, output: Path, parameters: dict) -> Path:
    """One self-contained HTML page: times, verdicts, figures under their headings, versions."""
    chapters = [{"row": row, **_harvest(output / f"{row['notebook']}.ipynb")} for row in summary.to_dict("records")]
    facts = {"stability_lib": __version__, "torch": torch.__version__, "python": platform.python_version(),
             "platform": platform.platform(), **parameters,
             "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    page = jinja2.Environment(autoescape=True).from_string(_REPORT).render(chapters=chapters, facts=facts)
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def readme_figure() -> bytes:
    """The PNG of chapter 01's figure 1, which the README shows."""
    figures = _harvest(notebooks(["01"])[0])["figures"]
    return base64.b64decode(next(png for heading, png in figures if heading.startswith("Figure 1")))


def _harvest(path: Path) -> dict:
    """Title, verdict rows and (heading, PNG) figures of an executed notebook; nothing where it was not written."""
    import nbformat

    title, heading, verdicts, figures = path.stem, "", [], []
    notebook = nbformat.read(path, as_version=4) if path.exists() else nbformat.v4.new_notebook()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = [line for line in cell.source.splitlines() if line.startswith("#")]
            if headings:
                heading = headings[-1].lstrip("# ")
                title = heading if headings[-1].startswith("# ") else title
        for result in cell.get("outputs", []):
            bundle = result.get("data", {})
            verdicts += bundle.get(MIME, [])
            if "image/png" in bundle:
                figures.append((heading, "".join(bundle["image/png"].split())))
    return {"title": title, "verdicts": verdicts, "figures": figures}


_REPORT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Transformer training stability: report</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; margin: 1rem 0 } img { max-width: 100% }
 th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
 .reproduced { color: #176b2c } .partly { color: #8a6100 }
 .not, .failed { color: #a01818 } figure { margin: 1.5rem 0 } figcaption { font-weight: 600 }
</style>
<h1>Transformer training stability: report</h1>
<table>{% for name, value in facts.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Notebooks</h2>
<table><tr><th>notebook</th><th>seconds</th><th>result</th></tr>
{% for c in chapters %}<tr><td><a href="#{{ c.row.notebook }}">{{ c.title }}</a></td><td>{{ c.row.seconds }}</td>
<td class="{{ 'failed' if c.row.error else 'reproduced' }}">{{ c.row.error or 'ok' }}</td></tr>{% endfor %}</table>
{% for c in chapters %}<h2 id="{{ c.row.notebook }}">{{ c.title }}</h2>
{% if c.verdicts %}<table><tr><th>claim</th><th>source</th><th>statement</th><th>paper</th><th>criterion</th>
<th>ours [95%]</th><th>verdict</th></tr>
{% for v in c.verdicts %}<tr><td>{{ v.claim }}</td><td>{{ v.source }}</td><td>{{ v.statement }}</td>
<td>{{ v.paper }}</td><td>{{ v.criterion }}</td><td>{{ v.ours }}</td>
<td class="{{ v.verdict.split()[0] }}">{{ v.verdict }}</td></tr>{% endfor %}
</table>{% endif %}
{% for heading, png in c.figures %}<figure><figcaption>{{ heading }}</figcaption>
<img alt="{{ heading }}" src="data:image/png;base64,{{ png }}"></figure>{% endfor %}{% endfor %}
</html>
"""
