"""Run the notebooks headlessly with papermill, plan what they would train, and write one HTML report.

`Session` is the notebooks' side: it checks the parameters and hands out runs. The rest serves
`python -m stability_lib`.
"""

import ast
import base64
import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jinja2
import pandas as pd
import torch

from . import __version__, runs, studies
from .claims import MIME
from .cluster import CLUSTER, check_name, share
from .config import RunConfig, run_key, unknown
from .train import DEVICES, resolve_device

RECOMPUTE = {"missing": {}, "all": {"recompute": True}, "none": {"max_new": 0}}
"""What a notebook trains: what the store lacks, everything again, or nothing (a missing run is an error)."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A notebook's checked parameters. Raises `TypeError`, `ValueError` or `ClusterError` that names the remedy.

    With a `cluster` (see `runs.ensure`; by default that of the environment variable STABILITY_LIB_CLUSTER) the `device`
    is its workers'.
    """

    scale: str = "cpu"
    device: str = "auto"
    recompute: str = "missing"
    cluster: str = dataclasses.field(default_factory=lambda: os.environ.get(CLUSTER, ""))

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {type(value).__name__} {value!r}")
        studies.check_scale(self.scale)
        if self.cluster:
            check_name(self.cluster)
        if not self.cluster or self.device not in DEVICES:
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
        return runs.ensure(configs, runs.locate(study, self.scale), device=self.device, cluster=self.cluster,
                           **RECOMPUTE[self.recompute])

    def stored(self, study: str, scale: str) -> pd.DataFrame:
        """The runs of the study's grid at another scale that the store holds already; nothing is trained."""
        rows = runs.load(runs.locate(study, scale))
        return runs.frame([rows[key] for key, _ in runs.keyed(studies.configs(study, scale)) if key in rows])


def checkout() -> Path:
    """The folder of this project's checkout. Raises `ValueError` where the library is installed without one, which has
    neither notebooks nor committed runs."""
    root = runs.project_root()
    if not ((root / "stability_lib").is_dir() and (root / "notebooks").is_dir()):
        raise ValueError(f"this needs a checkout of the project, with its notebooks and committed runs, and {root} is "
                         "none: clone the repository and run the command in it")
    return root


def notebook_folder() -> Path:
    return checkout() / "notebooks"


def notebooks(names: Iterable[str] = ()) -> list[Path]:
    """The notebooks of these names (with or without `.ipynb`; their number is enough), or all of them, in order.

    Raises `ValueError` where there is none at all, none of that name, or the name is a path to another folder.
    """
    folder = notebook_folder()
    present = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not present:
        raise ValueError(f"no notebooks (such as 01_name.ipynb) in {folder}: restore them from the repository")
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        found = [known for known in present if known == stem or known.split("_")[0] == stem]
        if not found:
            raise ValueError(unknown("notebook", stem, present))
        if Path(name).parent != Path() and Path(name).parent.resolve() != folder.resolve():
            raise ValueError(f"{name} is not in {folder}: copy it there under another name to run it")
        chosen += [present[known] for known in found]
    return list(dict.fromkeys(chosen)) or list(present.values())


def declared(path: Path) -> dict[str, object]:
    """The names that a notebook's cell tagged `parameters` sets, with their defaults; `...` for one that is no literal.

    papermill's own inspection overlooks a default or a comment that holds "=". Raises `ValueError` where the notebook
    cannot be read or has no such cell: it would run as it stands, whatever scale was asked for.
    """
    import nbformat  # nbformat and papermill take two seconds to import: not in every notebook's `Session`

    try:
        cells = nbformat.read(path, as_version=4).cells
        tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        body = ast.parse("".join(tagged[:1])).body
    except Exception as error:  # nbformat lets through whatever a malformed file provokes
        raise ValueError(f"{path} cannot be read ({_first_line(error)}): mend or restore it") from error
    found = {}
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in getattr(node, "targets", None) or [node.target]:
                found |= {leaf.id: _literal(node.value) if leaf is target else ... for leaf in ast.walk(target)
                          if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)}
    if not found:
        raise ValueError(f"{path.stem}: no cell tagged 'parameters' sets anything: tag the cell that sets scale, "
                         "device and recompute")
    return found


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ...


def check_parameters(path: Path, parameters: dict) -> None:
    """Hold parameters against the notebook's own: papermill would only warn about a name that is not there, and would
    pass any type. Raises `ValueError` (unknown name) or `TypeError`."""
    defaults = declared(path)
    for name, value in parameters.items():
        if name not in defaults:
            raise ValueError(f"{path.stem}: {unknown('parameter', name, defaults)}")
        default = defaults[name]
        if default is not None and default is not ... and type(value) is not type(default):
            raise TypeError(f"{path.stem}: parameter {name} must be {type(default).__name__}, "
                            f"got {type(value).__name__} {value!r}")
        if not _is_json(value):
            raise TypeError(f"{path.stem}: parameter {name} cannot be passed as {value!r}: papermill knows numbers, "
                            "strings, None, lists, and dicts with strings for keys")


def _is_json(value) -> bool:
    """Whether a value survives JSON; papermill turns the others (a tuple, a set) into strings."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def check_batch(paths: list[Path], output: Path, parameters: dict, cell_timeout: int | None = None,
                kernel: str | None = None, cluster: str = "") -> None:
    """Raise a `ValueError`, `TypeError` or `ClusterError` for whatever would make `reproduce` fail or mislead."""
    for path in paths:
        check_parameters(path, parameters)
        if path.parent.resolve() == output.resolve():
            raise ValueError(f"--output {output} holds the notebooks themselves: name another folder")
    Session(**{"cluster": cluster} | {name: value for name, value in parameters.items()
                                      if name in Session.__dataclass_fields__})
    if cell_timeout is not None and not cell_timeout >= 1:
        raise ValueError(f"--cell-timeout must be at least 1 second, got {cell_timeout}")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--output {output}: {there} is not a folder that can be written: name another one")
    if kernel is not None:
        from jupyter_client.kernelspec import KernelSpecManager

        specs = KernelSpecManager().get_all_specs()
        known = sorted(name for name, found in specs.items() if found["spec"]["language"].lower() == "python")
        if kernel not in known:
            raise ValueError(unknown("kernel", kernel, known))


INTERRUPTED = "interrupted before it finished"


def reproduce(paths: list[Path], output: Path, parameters: dict, cell_timeout: int | None = None,
              kernel: str | None = None, cluster: str = "") -> pd.DataFrame:
    """Execute notebooks into `output`, going on after a failure; one row each with `error` empty where it passed.

    Everything is checked (`check_batch`) before the first one runs. `kernel` names an installed Jupyter kernel, by
    default the notebook's own. Their runs train on the `cluster`, if one is given, see `runs.ensure`. After Ctrl-C the
    rows of what did not finish say `INTERRUPTED`.
    """
    check_batch(paths, output, parameters, cell_timeout, kernel, cluster)
    output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that `declared` has found
    rows = []
    try:
        with share(cluster, parameters.get("device", "auto")) as address, _environment(
                {runs.HEADLESS: "1", runs.FRESH_SINCE: _now(), CLUSTER: address}):
            for path in paths:
                print(f"{path.stem} ...", flush=True)
                started = time.perf_counter()
                error = _execute(path, output / path.name, parameters, cell_timeout, kernel)
                seconds = round(time.perf_counter() - started, 1)
                print(f"{path.stem} {'FAILED ' + error if error else 'ok'} ({seconds} s)", flush=True)
                rows.append({"notebook": path.stem, "seconds": seconds, "error": error})
    except KeyboardInterrupt:
        rows += [{"notebook": path.stem, "seconds": 0.0, "error": INTERRUPTED} for path in paths[len(rows):]]
    return pd.DataFrame(rows, columns=["notebook", "seconds", "error"])


def _execute(path: Path, target: Path, parameters: dict, cell_timeout: int | None, kernel: str | None) -> str:
    """Run one notebook; returns what went wrong, or nothing. The outcome is told by exceptions, because papermill
    marks a notebook "completed" after a time-out or a killed kernel too."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # papermill formats paths with the parameters: double the braces
    source, destination = (str(name).replace("{", "{{").replace("}", "}}") for name in (path, target.absolute()))
    try:
        target.unlink(missing_ok=True)  # or what cannot even start would be reported with its last results
        papermill.execute_notebook(source, destination, parameters=parameters, progress_bar=False,
                                   cwd=str(path.parent), execution_timeout=cell_timeout, kernel_name=kernel,
                                   log_output=False)
    except PapermillExecutionError as failure:
        return _first_line(f"{failure.ename}: {failure.evalue}")
    except Exception as failure:  # a dead kernel, a time-out, a full disk: the batch goes on and reports it
        return _first_line(failure)
    return ""


def _first_line(error: Exception | str) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {str(error).strip()}"
    return text.strip().splitlines()[0]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while: FRESH_SINCE left behind would keep a later `recompute` from training."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def dry_run(paths: list[Path], scale: str, device: str, recompute: str = "missing") -> pd.DataFrame:
    """Per notebook: runs cached and missing, the missing ones' FLOPs, and the time they will take here.

    What an earlier notebook of the list trains counts as cached in a later one.
    """
    rows, trained = [], set()
    for path in paths:
        total = dict(cached=0, missing=0, flops=0.0, seconds=0.0)
        for study in studies.of_chapter(path.stem):
            plan = runs.plan(studies.configs(study, scale), runs.locate(study, scale), device,
                             recompute=recompute == "all")
            if study in trained:
                plan = dict(cached=plan["cached"] + plan["missing"], missing=0, flops=0.0, seconds=0.0)
            trained.add(study)
            total = {name: total[name] + plan[name] for name in total}
        rows.append({"notebook": path.stem, "cached": total["cached"], "missing": total["missing"],
                     "FLOPs": f"{total['flops']:.2g}" if total["flops"] else "0",
                     "time here": runs.readable(total["seconds"]) if total["missing"] else "none"})
    return pd.DataFrame(rows, columns=["notebook", "cached", "missing", "FLOPs", "time here"])


def recompute_reference(names: list[str], device: str, scale: str = "cpu", cluster: str = "") -> None:
    """Train a scale's grids of these studies, by default of all, again, here or on a `cluster` (see `runs.ensure`), and
    make each the committed reference of that scale once complete.

    It can be interrupted: until all are done, finished runs lie in data/runs/local/reference-<scale>-<version of the
    library>, and the same code does not train them again. Raises `StoreError` where that version is in no commit,
    `ValueError` outside of a checkout or where the scale has no reference.
    """
    checkout()
    names = list(dict.fromkeys(names)) or studies.names()
    version = runs.commit("HEAD:./stability_lib") or __version__
    if version.endswith("-dirty"):
        raise runs.StoreError("stability_lib has changes that are in no commit, which the reference could not name: "
                              "commit or stash them")
    runs.reference_path(names[0], scale)
    folder = runs.locate(names[0]).local.parent / f"reference-{scale}-{version}"
    with share(cluster, device) as address:
        for study in names:
            configs, store = studies.configs(study, scale), runs.Store(folder / f"{study}.jsonl")
            runs.ensure(configs, store, device=device, cluster=address)
            print(f"{study}: {runs.promote(study, configs, runs.read(store.local), scale)} runs are the reference now")
    for study in names:
        (folder / f"{study}.jsonl").unlink()


def audit(n: int, tolerance: float, device: str, seed: int | None = None, scale: str = "cpu",
          cluster: str = "") -> pd.DataFrame:
    """Train `n` random runs of a scale's reference again, one by one here or all on a `cluster` (see `runs.ensure`),
    and compare, one row each with `agrees`.

    A run whose attention logits stayed below 1e4 must reach its final loss within `tolerance` (nats). Past that the
    dynamics are chaotic and last bits differ between machines: such a run must end within 0.3 nats and its logits peak
    within a factor of 3. One whose logits were not probed may be either, and must end within 0.3 nats. A diverged run
    must diverge again. Raises `ValueError` where n is not positive, the tolerance no distance, or a run not in the
    reference.
    """
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"--tolerance must be a number of nats, 0 or more, got {tolerance}")
    if not cluster:
        resolve_device(device)
    checkout()
    everything = [(study, config) for study in studies.names() for config in studies.configs(study, scale)]
    chosen = [(study, config, _reference(study, config, scale))  # all of them are found before the first is trained
              for study, config in pd.Series(everything).sample(min(n, len(everything)), random_state=seed)]
    rows = []
    fresh = _trained_again([config for _, config, _ in chosen], device, cluster)
    for (study, _, reference), again in zip(chosen, fresh, strict=True):
        was, now = reference.iloc[0], again.iloc[0]
        logits = [float(runs.peak(frame, "attention_logit_max").iloc[0]) for frame in (reference, again)]
        agrees = _agree(was, now, logits, tolerance)
        rows.append({"study": study, "key": was["key"], "status": f"{was['status']} / {now['status']}",
                     "reference": was["loss_final"], "again": now["loss_final"],
                     "logit peak": f"{logits[0]:.3g} / {logits[1]:.3g}", "agrees": agrees})
        print(f"{study} {was['key']}: {'agrees' if agrees else 'DISAGREES'}", flush=True)  # should Ctrl-C come
    return pd.DataFrame(rows)


def _trained_again(configs: list[RunConfig], device: str, cluster: str) -> Iterator[pd.DataFrame]:
    """One row per config."""
    if not cluster:
        yield from (runs.frame([runs.to_row(runs.train_run(config, device), device)]) for config in configs)
        return
    with tempfile.TemporaryDirectory() as folder:
        table = runs.ensure(configs, runs.Store(Path(folder) / "audit.jsonl"), device=device, cluster=cluster)
    yield from (table.iloc[[i]] for i in range(len(table)))


def _reference(study: str, config: RunConfig, scale: str = "cpu") -> pd.DataFrame:
    path, key = runs.reference_path(study, scale), run_key(config)
    rows = runs.read(path)
    if key not in rows:
        raise ValueError(f"{path} lacks the run {key}: train it with `stability-lib reference {study}"
                         f"{' --scale ' + scale if scale != 'cpu' else ''}`")
    return runs.frame([rows[key]])


def _agree(was: pd.Series, now: pd.Series, logits: list[float], tolerance: float) -> bool:
    """Whether two trainings of a run agree; `logits` are their peaks, NaN where they were not probed."""
    if was["status"] != "ok" or now["status"] != "ok":
        return was["status"] == now["status"]
    apart = abs(was["loss_final"] - now["loss_final"])
    if logits[0] <= 1e4:
        return bool(apart <= tolerance)
    below, above = sorted(logits)
    return bool(apart <= 0.3 and not above >= 3 * below)  # NaN counts as near


def write_report(summary: pd.DataFrame, output: Path, parameters: dict, kernel: str | None = None) -> Path:
    """One self-contained HTML page: times, verdicts, figures under their headings, versions, and what of a notebook's
    results could not be read."""
    chapters = [{"row": row, **_harvest(output / f"{row['notebook']}.ipynb", row["error"] != INTERRUPTED)}
                for row in summary.to_dict("records")]
    facts = {"stability_lib": __version__, "torch": torch.__version__, "python": platform.python_version(),
             "platform": platform.platform(), **parameters, "written": _now()}
    if kernel is not None:
        facts["kernel"] = f"{kernel} (the versions above are those of the process that ran the batch)"
    page = jinja2.Environment(autoescape=True).from_string(_REPORT).render(chapters=chapters, facts=facts)
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def readme_figure() -> bytes:
    """The PNG of chapter 01's figure 1, which the README shows."""
    figures = _harvest(notebooks(["01"])[0])["figures"]
    return base64.b64decode(next(png for heading, png in figures if heading.startswith("Figure 1")))


_FIELDS = ("claim", "source", "statement", "paper", "criterion", "ours", "verdict")


def _harvest(path: Path, finished: bool = True) -> dict:
    """Title, verdict rows and (heading, PNG) figures of an executed notebook, and notes on what could not be read;
    nothing where it was not written or, being unfinished, may be an older batch's."""
    import nbformat

    found = {"title": path.stem, "verdicts": [], "figures": [], "notes": []}
    if not finished or not path.exists():
        return found
    heading = ""
    try:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                headings = [line for line in cell.source.splitlines() if line.startswith("#")]
                if headings:
                    heading = headings[-1].lstrip("# ")
                    found["title"] = heading if headings[-1].startswith("# ") else found["title"]
            for result in cell.get("outputs", []):
                bundle = result.get("data", {})
                if "image/png" in bundle:
                    found["figures"].append((heading, "".join(bundle["image/png"].split())))
                for row in bundle.get(MIME, []):
                    if isinstance(row, dict) and "scale" in row:  # a board beside the notebook's own
                        continue
                    if not isinstance(row, dict):
                        found["notes"].append(f"a verdict is no row: {row!r}")
                        continue
                    absent = [name for name in _FIELDS if row.get(name) is None]
                    if absent:
                        found["notes"].append(f"the verdict on {row.get('claim', '?')} lacks {', '.join(absent)}")
                    found["verdicts"].append({name: "" if value is None else str(value) for name, value in row.items()})
    except Exception as error:  # whatever is wrong with one notebook, the others keep their place in the report
        found["notes"].append(f"{path.name} could not be read to its end ({_first_line(error)})")
    return found


_REPORT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Transformer training stability: report</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; margin: 1rem 0 } img { max-width: 100% }
 th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
 .reproduced { color: #176b2c } .undecided { color: #8a6100 } .out { color: #666 }
 .contradicted, .failed { color: #a01818 } figure { margin: 1.5rem 0 } figcaption { font-weight: 600 }
</style>
<h1>Transformer training stability: report</h1>
<table>{% for name, value in facts.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Notebooks</h2>
<table><tr><th>notebook</th><th>seconds</th><th>result</th></tr>
{% for c in chapters %}<tr><td><a href="#{{ c.row.notebook }}">{{ c.title }}</a></td><td>{{ c.row.seconds }}</td>
<td class="{{ 'failed' if c.row.error or c.notes else 'reproduced' }}">
{{ c.row.error or ('results incomplete' if c.notes else 'ok') }}</td></tr>{% endfor %}</table>
{% for c in chapters %}<h2 id="{{ c.row.notebook }}">{{ c.title }}</h2>
{% for note in c.notes %}<p class="failed">{{ note }}</p>{% endfor %}
{% if c.verdicts %}<table><tr><th>claim</th><th>source</th><th>statement</th><th>paper</th><th>criterion</th>
<th>ours [95%]</th><th>verdict</th><th>adjusted</th></tr>
{% for v in c.verdicts %}<tr><td>{{ v.claim }}</td><td>{{ v.source }}</td><td>{{ v.statement }}</td>
<td>{{ v.paper }}</td><td>{{ v.criterion }}</td><td>{{ v.ours }}</td>
{% for word in (v.verdict or '', v.adjusted or '') %}<td class="{{ word.split() | first }}">{{ word }}</td>{% endfor %}
</tr>{% endfor %}
</table>{% endif %}
{% for heading, png in c.figures %}<figure><figcaption>{{ heading }}</figcaption>
<img alt="{{ heading }}" src="data:image/png;base64,{{ png }}"></figure>{% endfor %}{% endfor %}
</html>
"""
