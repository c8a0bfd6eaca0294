"""The batch runner checks before it runs, goes on after failures and tells the truth about them."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from stability_lib import batch, claims, runs, store, studies
from stability_lib.__main__ import main
from stability_lib.config import RunConfig, replace, run_key

PARAMETERS = 'scale = "cpu"\ndevice = "auto"\nrecompute = "missing"'
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
PUBLISH = f"""from IPython.display import display
display({{{claims.MIME!r}: [{{'claim': 'X.1', 'verdict': 'undecided'}}]}}, raw=True)"""
ROW = dict(claim="X.1", source="P Fig. 1", statement="it grows", paper="grows", criterion="slope > 0", ours="1.0",
           verdict="reproduced")
TINY = RunConfig(d_model=16, n_layers=1, n_heads=2, seq_len=12, steps=2, warmup_steps=0, eval_sequences=8,
                 probe_every=0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A notebook folder to fill with `write`."""
    monkeypatch.setattr(batch, "notebook_folder", lambda: tmp_path)
    monkeypatch.setenv(runs.HEADLESS, "1")
    monkeypatch.setenv(runs.FRESH_SINCE, "")
    return tmp_path


def write(folder, name, *sources, parameters=PARAMETERS):
    cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}"),
             *([nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []),
             *map(nbformat.v4.new_code_cell, sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


def write_executed(folder, name, rows):
    """A notebook as papermill leaves it, with a figure and these verdict rows."""
    outputs = [nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="}),
               nbformat.v4.new_output("display_data", {claims.MIME: rows})]
    cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}"), nbformat.v4.new_code_cell("x", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")


def studied(monkeypatch, **grids):
    """Let these be the studies, each a list of configs at every scale."""
    made = []
    for name, grid in grids.items():
        made.append(lambda scale, grid=grid: grid)
        made[-1].__name__ = name
    monkeypatch.setattr(studies, "modules", lambda: {"00_made": SimpleNamespace(STUDIES=tuple(made))})


@pytest.fixture
def papermill_calls(monkeypatch):
    """In place of papermill's execution, a list of the calls: (source, target, options)."""
    calls = []
    monkeypatch.setattr("papermill.execute_notebook", lambda source, target, **options: calls.append(
        (source, target, options)))
    return calls


@pytest.mark.parametrize("arguments, message", [
    (["reproduce", "--scale", "fast"], "unknown scale 'fast': choose quick, cpu, gpu or paper"),
    (["reproduce", "--device", "tpu"], "unknown device 'tpu'.*choose auto, cpu, cuda or mps"),
    (["reproduce", "--recompute", "some"], "unknown recompute 'some'.*choose missing, all or none"),
    (["reproduce", "77"], "unknown notebook '77'"),
    (["reproduce", "01", "--set", "sclae", "3"], "unknown parameter 'sclae': did you mean 'scale'"),
    (["reproduce", "01", "--set", "scale", "gpu"], "--set scale: use --scale"),
    (["reproduce", "01", "--set", "lrs", "3"], "01_x: parameter lrs must be list, got int 3"),
    (["reproduce", "01", "--set", "lrs", "[1]", "--set", "lrs", "[2]"], "--set lrs is given twice"),
    (["reproduce", "01", "--set", "lrs", "[(1, 2)]"], r"lrs cannot be passed as \[\(1, 2\)\]: papermill knows"),
    (["reproduce", "01", "--set", "any", "{1}"], r"parameter any cannot be passed as \{1\}"),
    (["reproduce", "01", "--set", "any", "{1: 2}"], r"parameter any cannot be passed as \{1: 2\}"),
    (["reproduce", "01", "--set", "any", "b'x'"], "parameter any cannot be passed as b'x'"),
    (["reproduce", "--dry-run", "--set", "sclae", "3"], "unknown parameter 'sclae'"),
    (["reproduce", "--cell-timeout", "-5"], "--cell-timeout must be at least 1 second, got -5"),
    (["reproduce", "--cell-timeout", "0"], "--cell-timeout must be at least 1 second, got 0"),
    (["reproduce", "--kernel", "no-such"], "unknown kernel 'no-such': .*python3"),
    (["reproduce", "--output", __file__], f"--output {__file__}: {__file__} is not a folder"),
    (["reproduce", "--output", f"{__file__}/below"], f"{__file__} is not a folder that can be written: name another"),
    (["reproduce", "/elsewhere/01_x.ipynb"], "/elsewhere/01_x.ipynb is not in .*copy it there"),
    (["audit", "--n", "0"], "--n must be at least 1, got 0"),
    (["audit", "--tolerance", "nan"], "--tolerance must be a number of nats, 0 or more, got nan"),
    (["audit", "--tolerance", "inf"], "--tolerance must be .* got inf"),
    (["audit", "--tolerance", "-1"], "--tolerance must be .* got -1"),
    (["reference", "zlos"], "unknown study 'zlos'"),
    (["promote", "zlos"], "unknown study 'zlos'"),
    (["audit", "--device", "abacus"], "unknown device 'abacus'"),
])
def test_a_wrong_argument_is_named_with_its_remedy_before_anything_runs(folder, capsys, arguments, message):
    write(folder, "01_x", "raise SystemExit('this must not run')", parameters=f"{PARAMETERS}\nlrs = [1]\nany = None")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "..." not in captured.out


@pytest.mark.parametrize("arguments", [[], ["01"], ["--dry-run"]])
def test_a_folder_without_notebooks_is_named(folder, capsys, arguments):
    assert main(["reproduce", *arguments]) == 2
    assert re.search(f"no notebooks .* in {folder}: restore", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["reproduce"], ["reproduce", "01"], ["reproduce", "--dry-run"], ["reference"],
                                       ["reference", "first_look"], ["promote", "first_look"], ["audit"]])
def test_outside_of_a_checkout_a_command_says_so_and_trains_nothing(tmp_path, monkeypatch, capsys, arguments):
    (tmp_path / "data" / "runs").mkdir(parents=True)  # as `ensure` leaves it where a wheel's user trains
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    monkeypatch.setattr(runs, "ensure", lambda *args, **options: pytest.fail("it trains"))
    assert main(arguments) == 2
    assert re.search(f"needs a checkout of the project.*{tmp_path} is none: clone", capsys.readouterr().err)
    assert [*tmp_path.rglob("*")] == [tmp_path / "data", tmp_path / "data" / "runs"]


def test_the_notebooks_themselves_are_not_overwritten(folder, capsys, papermill_calls):
    write(folder, "01_x", "pass")
    assert main(["reproduce", "--output", str(folder)]) == 2
    assert "holds the notebooks themselves" in capsys.readouterr().err
    assert not papermill_calls


def test_a_notebook_named_twice_runs_once(folder, papermill_calls):
    write(folder, "01_x", "pass")
    assert batch.notebooks(["01", "01_x", "01_x.ipynb"]) == [folder / "01_x.ipynb"]


@pytest.mark.parametrize("parameters, message", [
    (None, "01_x: no cell tagged 'parameters' sets anything: tag the cell"),
    ("# nothing", "01_x: no cell tagged 'parameters' sets anything"),
    ("scale = (", "01_x.ipynb cannot be read .SyntaxError.*: mend or restore it"),
])
def test_a_notebook_that_takes_no_parameters_is_named(folder, capsys, papermill_calls, parameters, message):
    write(folder, "01_x", "pass", parameters=parameters)
    assert main(["reproduce"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not papermill_calls


@pytest.mark.parametrize("content", ["", "{", "[]", '{"nbformat": 4}', '{"nbformat": 4, "nbformat_minor": 5}'])
def test_a_malformed_notebook_is_named(folder, capsys, papermill_calls, content):
    (folder / "01_x.ipynb").write_text(content)
    assert main(["reproduce"]) == 2
    assert re.search("01_x.ipynb cannot be read", capsys.readouterr().err)
    assert not papermill_calls


def test_parameters_are_found_however_they_are_written(folder, tmp_path, capsys, papermill_calls):
    """With "=" in the default or a comment, over several lines, annotated, unpacked, or computed."""
    write(folder, "01_x", "pass", parameters=f"""{PARAMETERS}
label = "lr=0.1"
width = 3  # or width = 4
lrs: list[float] = [
    0.1,
]
low, high = 1, 2
table[0] = 1
root = Path("x") / "y"
steps = 2 * 50
free: int""")
    given = dict(label="a=b", width=5, lrs=[0.5], low="any", root="z", steps=0.5)
    settings = [text for name, value in given.items() for text in ("--set", name, repr(value))]
    assert main(["reproduce", "--output", str(tmp_path / "out"), *settings]) == 0
    ((_, _, options),) = papermill_calls
    assert options["parameters"] == dict(scale="cpu", device="auto", recompute="missing") | given
    assert main(["reproduce", "--set", "width", "'5'"]) == 2
    assert "parameter width must be int, got str '5'" in capsys.readouterr().err
    for name in ("table", "free", "Path"):
        assert main(["reproduce", "--set", name, "1"]) == 2
        assert f"unknown parameter '{name}'" in capsys.readouterr().err


def test_a_batch_leaves_the_environment_as_it_was(folder, tmp_path, monkeypatch):
    """FRESH_SINCE left behind would keep a later `recompute` in this process from training."""
    monkeypatch.setenv(runs.HEADLESS, "0")
    monkeypatch.delenv(runs.FRESH_SINCE)
    seen = []
    monkeypatch.setattr("papermill.execute_notebook", lambda *args, **options: seen.append(dict(os.environ)))
    write(folder, "01_x", "pass")
    batch.reproduce(batch.notebooks(), tmp_path / "out", {})
    assert seen[0][runs.HEADLESS] == "1" and seen[0][runs.FRESH_SINCE] > "2"
    assert os.environ[runs.HEADLESS] == "0" and runs.FRESH_SINCE not in os.environ


def test_a_failure_says_what_failed(folder, tmp_path, monkeypatch):
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    def execute(source, target, **options):
        if "01_x" in source:
            cell = nbformat.v4.new_code_cell("f()\ng()")
            raise CellTimeoutError.error_from_timeout_and_cell("Cell execution timed out", 20, cell)
        raise PapermillExecutionError(1, 2, "f()", "ValueError", "told you\nso", ["\x1b[31m..."])
    monkeypatch.setattr("papermill.execute_notebook", execute)
    write(folder, "01_x", "pass")
    write(folder, "02_x", "pass")
    late, failed = batch.reproduce(batch.notebooks(), tmp_path / "out", {})["error"]
    assert re.match("CellTimeoutError: A cell timed out .* after 20 seconds", late)
    assert failed == "ValueError: told you"


def test_a_kernel_is_handed_on_and_named_in_the_report(folder, tmp_path, papermill_calls):
    write(folder, "01_x", "pass")
    assert main(["reproduce", "--kernel", "python3", "--output", str(tmp_path / "out")]) == 0
    assert papermill_calls[0][2]["kernel_name"] == "python3"
    assert "python3 (the versions above are those of the process" in (tmp_path / "out" / "report.html").read_text()
    assert main(["reproduce", "--output", str(tmp_path / "out")]) == 0
    assert papermill_calls[1][2]["kernel_name"] is None


def test_what_could_not_start_is_not_reported_with_its_last_results(folder, tmp_path, monkeypatch):
    def execute(*arguments, **options):
        raise RuntimeError("Kernel died before replying to kernel_info")
    monkeypatch.setattr("papermill.execute_notebook", execute)
    write(folder, "01_x", "pass")
    output = tmp_path / "out"
    output.mkdir()
    write_executed(output, "01_x", [ROW])
    assert main(["reproduce", "--output", str(output)]) == 1
    page = (output / "report.html").read_text()
    assert "Kernel died" in page and "X.1" not in page and "base64" not in page


@pytest.mark.parametrize("at", [0, 1])
def test_after_ctrl_c_what_finished_gets_a_report(folder, tmp_path, monkeypatch, capsys, at):
    output = tmp_path / "out"
    output.mkdir()
    names = ["01_x", "02_x", "03_x"]
    done = []

    def execute(source, target, **options):
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(source)
        write_executed(output, Path(target).stem, [ROW | dict(claim=f"new {Path(target).stem}")])
    monkeypatch.setattr("papermill.execute_notebook", execute)
    for name in names:
        write(folder, name, "pass")
        write_executed(output, name, [ROW | dict(claim=f"old {name}")])
    assert main(["reproduce", "--output", str(output)]) == 130
    page = (output / "report.html").read_text()
    assert re.findall(r"(?:old|new) \w+", page) == [f"new {name}" for name in names[:at]]
    assert page.count(batch.INTERRUPTED) == 3 - at
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_ctrl_c_leaves_a_report_and_no_kernel(folder, tmp_path):
    write(folder, "01_works", PUBLISH)
    write(folder, "02_hangs", "import os, pathlib, time\npathlib.Path('kernel').write_text(str(os.getpid()))\n"
                              "time.sleep(600)")
    code = ("import sys, pathlib\nfrom stability_lib import batch\nfrom stability_lib.__main__ import main\n"
            "batch.notebook_folder = lambda: pathlib.Path(sys.argv[1])\n"
            "sys.exit(main(['reproduce', '--output', sys.argv[2]]))")
    with subprocess.Popen([sys.executable, "-c", code, str(folder), str(tmp_path / "out")], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (folder / "kernel").exists() or not (folder / "kernel").read_text():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 130, complaint
    page = (tmp_path / "out" / "report.html").read_text()
    assert "X.1" in page and page.count(batch.INTERRUPTED) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "kernel").read_text()), 0)


SUMMARY = pd.DataFrame([{"notebook": name, "seconds": 1.0, "error": ""} for name in ("01_x", "02_x")])


def test_the_report_shows_verdicts_plain_and_adjusted_each_in_its_colour(tmp_path):
    words = ["reproduced", "contradicted", "undecided", "out of reach here"]
    write_executed(tmp_path, "01_x", [ROW | dict(verdict=word, adjusted="undecided") for word in words])
    page = batch.write_report(SUMMARY[:1], tmp_path, {}).read_text()
    for word in words:
        assert f'<td class="{word.split()[0]}">{word}</td><td class="undecided">undecided</td>' in page
        assert f".{word.split()[0]} {{ color" in page.replace(", .failed", "")


@pytest.mark.parametrize("cut", ["", "{", None])
def test_a_truncated_notebook_costs_the_report_only_its_own_results(tmp_path, cut):
    write_executed(tmp_path, "01_x", [ROW | dict(claim="lost")])
    text = (tmp_path / "01_x.ipynb").read_text()
    (tmp_path / "01_x.ipynb").write_text(text[:-20] if cut is None else cut)
    write_executed(tmp_path, "02_x", [ROW | dict(claim="kept")])
    page = batch.write_report(SUMMARY, tmp_path, {}).read_text()
    assert "kept" in page and "Title of 02_x" in page and page.count("base64") == 1
    assert page.count("01_x.ipynb could not be read to its end (") == 1 and page.count("results incomplete") == 1


@pytest.mark.parametrize("row, said", [
    *(({name: value for name, value in ROW.items() if name != absent} | dict(claim=ROW["claim"] * (absent != "claim")),
       f"lacks {absent}") for absent in ROW if absent != "claim"),
    ({name: value for name, value in ROW.items() if name != "claim"}, r"the verdict on \? lacks claim"),
    (ROW | dict(verdict=None), "X.1 lacks verdict"), (ROW | dict(verdict=3, ours=1.5), ""),
    (ROW | dict(adjusted=None), ""), ({}, "lacks claim, source"), ("reproduced", "is no row: 'reproduced'"),
    (None, "is no row: None")])
def test_a_malformed_verdict_row_costs_the_report_nothing_else(tmp_path, row, said):
    write_executed(tmp_path, "01_x", [ROW | dict(claim="before"), row, ROW | dict(claim="after")])
    write_executed(tmp_path, "02_x", [ROW | dict(claim="kept")])
    page = batch.write_report(SUMMARY, tmp_path, {}).read_text().replace("&#39;", "'")
    assert re.search(said, page) and ("results incomplete" in page) == bool(said)
    assert all(claim in page for claim in ("before", "after", "kept")) and page.count("base64") == 2


def test_an_absent_device_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is not available here: choose auto or"):
        batch.Session(device="cuda")


@pytest.mark.parametrize("name", ["scale", "device", "recompute"])
def test_a_session_rejects_a_parameter_of_the_wrong_type(name):
    with pytest.raises(TypeError, match=f"{name} must be a string, got bool True"):
        batch.Session(**{name: True})


@pytest.mark.slow
def test_a_batch_goes_on_after_failures_and_reports_them(folder, tmp_path, capsys):
    write(folder, "01_fails", "raise ValueError('told you')")
    write(folder, "02_dies", "import os\nos._exit(3)")
    write(folder, "03_hangs", "import time\ntime.sleep(600)")
    write(folder, "04_works", "assert scale == 'quick'", PLOT, PUBLISH)
    output = tmp_path / "out"
    code = main(["reproduce", "--scale", "quick", "--cell-timeout", "20", "--output", str(output)])
    printed = capsys.readouterr().out
    assert code == 1
    assert len(re.findall(r"^0[123]_\w+ FAILED", printed, flags=re.M)) == 3
    assert "ValueError: told you" in printed
    assert re.search(r"04_works +[\d.]+ +ok", printed)
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    for text in ("told you", "X.1", "undecided", "Title of 04_works", "torch"):
        assert text in page


@pytest.mark.slow
def test_a_batch_of_working_notebooks_exits_with_zero(folder, tmp_path, monkeypatch, capfd):
    """In the kernel asked for, into a folder whose name holds braces, with parameters that papermill overlooks."""
    kernel = tmp_path / "jupyter" / "kernels" / "mine"
    kernel.mkdir(parents=True)
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "mine",
            "language": "python", "env": {"IN_KERNEL": "mine"}}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    write(folder, "01_works", "import os\nassert (label, os.environ['IN_KERNEL']) == ('a=b{x}', 'mine')",
          parameters=f'{PARAMETERS}\nlabel = "lr=0.1"')
    output = tmp_path / "{x} {scale}"
    arguments = ["--output", str(output), "--kernel", "mine", "--set", "label", "a=b{x}"]
    assert main(["reproduce", "01", *arguments]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["01_works.ipynb", "report.html"]
    assert "unknown parameter" not in capfd.readouterr().err


def test_chapters_that_share_runs_train_them_once_in_a_batch(folder, tmp_path, monkeypatch):
    config = RunConfig(d_model=16, n_layers=1, n_heads=1, seq_len=8, batch_size=4, eval_sequences=8, steps=2,
                       warmup_steps=0, probe_every=0)
    store = runs.Store(tmp_path / "shared.jsonl")

    def execute(*arguments, **options):
        with ThreadPoolExecutor(1) as executor:
            runs.ensure([config], store, executor=executor, recompute=True)
    execute()
    old = store.local.read_text().replace('"date":"2', '"date":"1')  # a thousand years ago
    store.local.write_text(old)
    monkeypatch.setattr("papermill.execute_notebook", execute)
    write(folder, "01_x", "pass")
    write(folder, "02_x", "pass")
    summary = batch.reproduce(batch.notebooks(), tmp_path / "out", {"recompute": "all"})
    assert summary["error"].eq("").all()
    assert len(store.local.read_text().splitlines()) == 2


def test_the_dry_run_counts_runs_and_estimates_the_missing(folder, capsys):
    write(folder, "01_attention_logit_growth", "raise SystemExit('this must not run')")
    assert main(["reproduce", "--dry-run"]) == 0
    assert re.search(r"01_attention_logit_growth +128 +0 +0 +none", capsys.readouterr().out)
    assert main(["reproduce", "--scale", "quick", "--recompute", "all", "--dry-run"]) == 0
    missing = sum(len(studies.configs(study, "quick")) for study in studies.of_chapter("01_attention_logit_growth"))
    printed = capsys.readouterr().out
    assert re.search(rf"01_attention_logit_growth +0 +{missing} +\S+e\+\d+ +\d+ (seconds|minutes)", printed)


def test_the_dry_run_counts_what_chapters_share_once_and_knows_chapters_without_studies(folder, monkeypatch):
    for name in ("00_none", "08_predicting_logit_growth", "09_gradient_scale_and_adam_eps"):
        write(folder, name, "pass")
    monkeypatch.setattr(runs, "_step_cost", lambda device: (0.0, 1e-12))
    table = batch.dry_run(batch.notebooks(), "quick", "cpu", "all").set_index("notebook")
    sizes = {name: len(studies.configs(name, "quick")) for name in studies.names()}
    assert table.loc["00_none"].to_list() == [0, 0, "0", "none"]
    assert table.loc["08_predicting_logit_growth", "cached"] == 0
    last = table.loc["09_gradient_scale_and_adam_eps"]
    own = sum(size for name, size in sizes.items()
              if name in studies.of_chapter("09_gradient_scale_and_adam_eps") and name != "attention_logit_growth")
    assert (last["cached"], last["missing"]) == (sizes["attention_logit_growth"], own)


@pytest.mark.parametrize("study", studies.names())
def test_the_committed_reference_is_exactly_the_cpu_grid_and_what_is_there_of_another_scale_is_of_that_grid(study):
    for scale in ("cpu", "gpu", "paper"):
        path = runs.reference_path(study, scale)
        if scale == "cpu" or path.exists():
            grid, there = [run_key(config) for config in studies.configs(study, scale)], list(runs.read(path))
            assert there == [key for key in grid if scale == "cpu" or key in there]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A clean checkout of its own with a library of one file and two studies of one short run each."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "stability_lib").mkdir()
    (tmp_path / "data" / "runs").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "stability_lib" / "a.py").write_text("1")
    (tmp_path / "pyproject.toml").write_text("")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    studied(monkeypatch, one=[replace(TINY, seed=0)], two=[replace(TINY, seed=1)])
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    monkeypatch.setattr("stability_lib.store.project_root", lambda: tmp_path)
    monkeypatch.delenv("STABILITY_LIB_RUNS", raising=False)
    monkeypatch.setenv(runs.HEADLESS, "1")
    runs._machine.cache_clear()
    yield tmp_path
    runs._machine.cache_clear()


def test_an_interrupted_reference_goes_on_where_it_stopped(checkout, monkeypatch, capsys):
    train = runs.ensure
    monkeypatch.setattr(runs, "ensure", lambda configs, store, **options: train(
        configs, store, executor=ThreadPoolExecutor(1), **options) if store.local.stem == "one" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.recompute_reference(["one", "two"], "cpu")
    assert (checkout / "data" / "runs" / "one.jsonl").exists()  # which makes the checkout differ from its commit
    monkeypatch.setattr(runs, "ensure", lambda *args, **options: train(
        *args, executor=ThreadPoolExecutor(1), **options))
    capsys.readouterr()
    batch.recompute_reference(["one", "two"], "cpu")
    printed = capsys.readouterr().out
    assert "one: all 1 runs are cached" in printed and "two: 0 of 1 runs are cached" in printed
    assert not [*checkout.glob("data/runs/local/*/*.jsonl")]
    (row,) = runs.read(checkout / "data" / "runs" / "two.jsonl").values()
    assert row["provenance"]["commit"] == runs.commit() and "dirty" not in runs.commit()


def test_the_reference_of_another_scale_is_trained_and_promoted_apart_and_a_session_reads_it(checkout, monkeypatch):
    made = [replace(TINY, seed=2)]
    monkeypatch.setattr(studies, "configs", lambda study, scale: made if scale == "gpu" else [replace(TINY, seed=0)])
    train = runs.ensure
    serial = lambda *args, **options: train(*args, executor=ThreadPoolExecutor(1), **options)  # noqa: E731
    monkeypatch.setattr(runs, "ensure", serial)
    for scale in ("gpu", "cpu"):
        assert main(["reference", "one", "--scale", scale, "--device", "cpu"]) == 0
    cpu, gpu = (checkout / "data" / "runs" / part / "one.jsonl" for part in (".", "gpu"))
    assert [*runs.read(gpu)] == [run_key(made[0])] and [*runs.read(cpu)] != [*runs.read(gpu)]
    table = batch.Session("gpu", recompute="none").runs("one")
    assert table["seed"].to_list() == [2]
    monkeypatch.setattr(runs, "_step_cost", lambda device: (0.0, 1e-12))
    planned = batch.dry_run([Path("00_made.ipynb")], "gpu", "cpu").iloc[0]
    assert (planned["cached"], planned["missing"]) == (1, 1)  # of two studies, one has this reference
    with pytest.raises(runs.MissingRuns):
        batch.Session("paper", recompute="none").runs("one")
    monkeypatch.setattr(runs, "commit", lambda of="HEAD": None)
    gpu.unlink()
    train(made, "one", executor=ThreadPoolExecutor(1))
    assert main(["promote", "one", "--scale", "gpu"]) == 0
    assert [*runs.read(gpu)] == [run_key(made[0])]


def test_a_scale_without_a_reference_is_refused_before_any_training(checkout, monkeypatch, capsys):
    monkeypatch.setattr(runs, "ensure", None)
    assert main(["reference", "one", "--scale", "quick"]) == 2
    assert "scale 'quick' has no reference" in capsys.readouterr().err


def test_a_reference_by_code_that_is_in_no_commit_is_refused(checkout):
    (checkout / "stability_lib" / "a.py").write_text("2")
    assert runs.commit().endswith("-dirty")
    with pytest.raises(runs.StoreError, match=r"in no commit.*commit or stash"):
        batch.recompute_reference(["one"], "cpu")


def test_a_study_named_twice_is_trained_once(checkout, monkeypatch, capsys):
    train = runs.ensure
    monkeypatch.setattr(runs, "ensure", lambda *args, **options: train(
        *args, executor=ThreadPoolExecutor(1), **options))
    assert main(["reference", "one", "one"]) == 0
    assert capsys.readouterr().out.count("runs are the reference now") == 1


@pytest.mark.parametrize("logits, loss, agrees", [
    ((10.0, 10.0), 0.01, True), ((10.0, 10.0), 0.1, False), ((1e5, 2e5), 0.1, True), ((1e5, 4e5), 0.1, False),
    ((4e5, 1e5), 0.1, False), ((1e5, 1e5), 0.4, False), ((math.nan, math.nan), 0.1, True),
    ((math.nan, math.nan), 0.4, False), ((0.0, 0.0), 0.01, True), ((-1.0, 0.0), 0.1, False), ((1e5, 0.0), 0.1, False)])
def test_the_audit_is_as_strict_as_a_run_is_stable(logits, loss, agrees):
    """Logits at their peak and how far the loss is off, before and again."""
    was, now = (pd.Series(dict(status="ok", loss_final=2.0 + off)) for off in (0.0, loss))
    assert batch._agree(was, now, list(logits), tolerance=0.02) is agrees
    assert batch._agree(was.replace("ok", "diverged"), now, list(logits), tolerance=0.02) is False


def reference_of(checkout, study, rows):
    (checkout / "data" / "runs" / f"{study}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_audit_retrains_reference_runs_and_notices_a_deviation(checkout, capsys):
    """The first run was not probed; the second's stored loss is off."""
    rows = [runs.to_row(runs.train_run(replace(TINY, seed=seed), "cpu"), "cpu") for seed in (0, 1)]
    rows[1]["loss_final"] += 0.4
    reference_of(checkout, "one", rows[:1])
    reference_of(checkout, "two", rows[1:])
    assert main(["audit", "--tolerance", "0.02"]) == 1
    printed = capsys.readouterr().out
    assert f"one {rows[0]['key']}: agrees" in printed and f"two {rows[1]['key']}: DISAGREES" in printed
    assert "1 of 2 agree" in printed and "nan / nan" in printed


def test_the_audit_names_a_run_that_the_reference_lacks_before_it_trains_any(checkout, monkeypatch, capsys):
    reference_of(checkout, "one", [runs.to_row(runs.train_run(TINY, "cpu"), "cpu")])
    monkeypatch.setattr(runs, "train_run", lambda *args: pytest.fail("it trains"))
    assert main(["audit"]) == 2
    key = run_key(replace(TINY, seed=1))
    assert re.search(f"two.jsonl lacks the run {key}: train it with .*reference two", capsys.readouterr().err)


def test_the_audit_and_the_reference_take_a_scale_and_a_cluster(checkout, monkeypatch, capsys):
    """The cluster stands for one: `ensure` is asked for it, and trains here."""
    asked, ensure = [], runs.ensure

    def noted(configs, store, *, device, cluster=""):
        asked.append((device, cluster))
        return ensure(configs, store, device=device, executor=ThreadPoolExecutor(1))
    monkeypatch.setattr(runs, "ensure", noted)
    monkeypatch.setattr(batch, "share", lambda cluster, device: contextlib.nullcontext(cluster))
    there = ["--device", "cpu", "--cluster", "tcp://127.0.0.1:8786", "--scale", "gpu"]
    assert main(["reference", *there]) == 0
    assert [*(checkout / "data" / "runs").glob("*.jsonl")] == []
    assert main(["audit", *there]) == 0
    assert "2 of 2 agree" in capsys.readouterr().out and asked == [("cpu", "tcp://127.0.0.1:8786")] * 3
    assert main(["audit"]) == 2 and "lacks the run" in capsys.readouterr().err  # of the other scale
    assert main(["audit", "--scale", "quick"]) == 2
    assert main(["audit", "--cluster", "nowhere"]) == 2


def test_a_session_reads_what_the_store_holds_of_another_scale_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("STABILITY_LIB_RUNS", str(tmp_path / "none"))
    monkeypatch.setattr(runs, "ensure", None)
    session = batch.Session("quick")
    assert len(session.stored("first_look", "cpu")) == len(studies.configs("first_look", "cpu"))
    assert len(session.stored("first_look", "paper")) == 0


@pytest.mark.slow
def test_chapters_whose_runs_of_scale_gpu_are_committed_render_at_it_on_any_machine(tmp_path, capsys):
    whole = [stem for stem in studies.modules() if studies.of_chapter(stem) and all(
        store.reference_path(study, "gpu").exists() for study in studies.of_chapter(stem))]
    assert whole == ["05_kss_divergence", "10_kss_baselines"]
    assert main(["reproduce", *whole, "--scale", "gpu", "--recompute", "none", "--output", str(tmp_path / "out")]) == 0
    assert len(re.findall(r"^\d\d_\w+ ok", capsys.readouterr().out, flags=re.M)) == len(whole)
