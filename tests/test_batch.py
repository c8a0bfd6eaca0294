"""The batch runner checks before it runs, goes on after failures and tells the truth about them."""

import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pandas as pd
import pytest

from stability_lib import batch, claims, runs, studies
from stability_lib.__main__ import main
from stability_lib.config import RunConfig, replace, run_key

PARAMETERS = 'scale = "cpu"\ndevice = "auto"\nrecompute = "missing"'
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
PUBLISH = f"""from IPython.display import display
display({{{claims.MIME!r}: [{{'claim': 'X.1', 'verdict': 'partly'}}]}}, raw=True)"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A notebook folder to fill with `write`."""
    monkeypatch.setattr(batch, "notebook_folder", lambda: tmp_path)
    monkeypatch.setenv(runs.HEADLESS, "1")
    monkeypatch.setenv(runs.FRESH_SINCE, "")
    return tmp_path


def write(folder, name, *sources):
    cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}"),
             nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             *map(nbformat.v4.new_code_cell, sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


@pytest.mark.parametrize("arguments, message", [
    (["reproduce", "--scale", "fast"], "unknown scale 'fast': choose quick, cpu, gpu or paper"),
    (["reproduce", "--device", "tpu"], "unknown device 'tpu'.*choose auto, cpu, cuda or mps"),
    (["reproduce", "--recompute", "some"], "unknown recompute 'some'.*choose missing, all or none"),
    (["reproduce", "77"], "unknown notebook '77'"),
    (["reproduce", "01", "--set", "sclae", "3"], "unknown parameter 'sclae': did you mean 'scale'"),
    (["reproduce", "01", "--set", "scale", "3"], "parameter scale must be str, got int 3"),
    (["reference", "zlos"], "unknown study 'zlos'"),
    (["promote", "zlos"], "unknown study 'zlos'"),
    (["audit", "--device", "abacus"], "unknown device 'abacus'"),
])
def test_a_wrong_argument_is_named_with_its_remedy_before_anything_runs(folder, capsys, arguments, message):
    write(folder, "01_x", "raise SystemExit('this must not run')")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "..." not in captured.out


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
    for text in ("told you", "X.1", "partly", "Title of 04_works", "torch"):
        assert text in page


@pytest.mark.slow
def test_a_batch_of_working_notebooks_exits_with_zero(folder, tmp_path):
    write(folder, "01_works", "pass")
    assert main(["reproduce", "01", "--output", str(tmp_path / "out")]) == 0


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
    missing = len(studies.attention_logit_growth("quick")) + len(studies.attention_patterns("quick"))
    printed = capsys.readouterr().out
    assert re.search(rf"01_attention_logit_growth +0 +{missing} +\S+e\+\d+ +\d+ (seconds|minutes)", printed)


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_committed_reference_is_exactly_the_cpu_grid(study):
    rows = runs.read(runs.locate(study).reference)
    assert list(rows) == [run_key(config) for config in studies.configs(study, "cpu")]


def test_no_two_runs_of_a_grid_are_the_same():
    for study in studies.STUDIES:
        for scale in studies.SCALES:
            keys = [run_key(config) for config in studies.configs(study, scale)]
            assert len(keys) == len(set(keys))


def test_every_study_belongs_to_a_chapter():
    assert {study for chapter in studies.CHAPTERS.values() for study in chapter} == set(studies.STUDIES)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A clean checkout of its own with a library of one file and two studies of one short run each."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "stability_lib").mkdir()
    (tmp_path / "data" / "runs").mkdir(parents=True)
    (tmp_path / "stability_lib" / "a.py").write_text("1")
    (tmp_path / "pyproject.toml").write_text("")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    tiny = RunConfig(d_model=16, n_layers=1, n_heads=2, seq_len=12, steps=2, warmup_steps=0, eval_sequences=8)
    monkeypatch.setattr(studies, "STUDIES", {name: lambda scale, seed=seed: [replace(tiny, seed=seed)]
                                             for seed, name in enumerate(("one", "two"))})
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


def test_a_reference_by_code_that_is_in_no_commit_is_refused(checkout):
    (checkout / "stability_lib" / "a.py").write_text("2")
    assert runs.commit().endswith("-dirty")
    with pytest.raises(runs.StoreError, match=r"in no commit.*commit or stash"):
        batch.recompute_reference(["one"], "cpu")


@pytest.mark.parametrize("logits, loss, agrees", [
    ((10.0, 10.0), 0.01, True), ((10.0, 10.0), 0.1, False), ((1e5, 2e5), 0.1, True), ((1e5, 4e5), 0.1, False),
    ((1e5, 1e5), 0.4, False), ((math.nan, math.nan), 0.1, True), ((math.nan, math.nan), 0.4, False)])
def test_the_audit_is_as_strict_as_a_run_is_stable(monkeypatch, logits, loss, agrees):
    """Logits at their peak and how far the loss is off, before and again."""
    row = dict(key="x", status="ok")
    frames = iter([pd.DataFrame([row | dict(loss_final=2.0)]), pd.DataFrame([row | dict(loss_final=2.0 + loss)])])
    peaks = iter(logits)
    monkeypatch.setattr(studies, "STUDIES", {"first_look": lambda scale: studies.first_look(scale)[:1]})
    monkeypatch.setattr(runs, "ensure", lambda *args, **options: next(frames))
    monkeypatch.setattr(runs, "train_run", lambda *args: None)
    monkeypatch.setattr(runs, "to_row", lambda *args: None)
    monkeypatch.setattr(runs, "frame", lambda rows: next(frames))
    monkeypatch.setattr(runs, "peak", lambda *args: pd.Series([next(peaks)]))
    assert batch.audit(1, tolerance=0.02, device="cpu")["agrees"].to_list() == [agrees]


@pytest.mark.slow
def test_the_audit_retrains_reference_runs_and_notices_a_deviation(monkeypatch):
    monkeypatch.setattr(studies, "STUDIES", {"first_look": lambda scale: studies.first_look(scale)[:1]})
    assert batch.audit(1, tolerance=0.02, device="cpu")["agrees"].all()
    assert not batch.audit(1, tolerance=-1.0, device="cpu")["agrees"].any()
