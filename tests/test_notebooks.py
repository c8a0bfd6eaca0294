"""Committed notebooks read as chapters, were run top to bottom, and notice when a verdict flips."""

import copy
import importlib.util
import os
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from stability_lib import batch, claims, runs, studies

PATHS = batch.notebooks()
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def tagged(cells, tag):
    return [cell for cell in cells if tag in cell.metadata.get("tags", [])]


@by_name
def test_a_notebook_opens_with_its_only_h1(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert sum(line.startswith("# ") for line in prose.splitlines()) == 1


@by_name
def test_a_notebook_is_committed_as_run_from_a_fresh_kernel(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


@by_name
def test_a_notebook_takes_the_common_parameters_with_the_committed_scale(path):
    (cell,) = tagged(code_cells(path), "parameters")
    assert cell.source.split() == 'scale = "cpu" device = "auto" recompute = "missing"'.split()


@by_name
def test_a_notebook_has_its_badges_and_the_cell_for_colab(path):
    tool = runs.project_root() / "tools" / "launch.py"
    spec = importlib.util.spec_from_file_location("launch", tool)
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    notebook = nbformat.read(path, as_version=4)
    if not launch.published():
        assert "colab.research" not in notebook.cells[0].source, "set project.urls.Repository in pyproject.toml"
        return
    assert launch.badges(path.name) in notebook.cells[0].source, "run `python tools/launch.py`"
    assert launch.launched(copy.deepcopy(notebook), path.name) == notebook, "run `python tools/launch.py`"


@by_name
def test_checked_cells_carry_outputs_to_compare_with(path):
    checked = tagged(code_cells(path), "nbval-check-output")
    assert checked
    assert all(cell.outputs for cell in checked)


@by_name
def test_a_chapters_studies_and_claims_are_known(path):
    assert path.stem in studies.modules()
    published = [row["claim"] for cell in code_cells(path) for output in cell.outputs
                 for row in output.get("data", {}).get(claims.MIME, []) if "scale" not in row]
    assert published == [claim.id for claim in claims.of_chapter(path.stem)]


@by_name
def test_no_machine_path_is_left_in_a_notebook(path):
    text = path.read_text()
    assert not [place for place in (str(runs.project_root()), "/tmp/", "/home/", "/root/", "/Users/") if place in text]


def test_the_readme_shows_the_figure_of_chapter_01():
    shown = (runs.project_root() / "docs" / "figure1.png").read_bytes()
    assert shown == batch.readme_figure(), "run `make notebooks` to renew docs/figure1.png"


@pytest.mark.slow
def test_a_flipped_verdict_fails_nbval(tmp_path):
    notebook = nbformat.read(batch.notebooks(["01"])[0], as_version=4)
    (cell,) = tagged(notebook.cells, "nbval-check-output")
    lines = cell.outputs[0].text.splitlines()
    name, was = lines[0].split(maxsplit=1)
    flipped = {"reproduced": "contradicted"}.get(was, "reproduced")
    cell.outputs[0].text = "\n".join([lines[0].removesuffix(was) + flipped, *lines[1:]]) + "\n"
    nbformat.write(notebook, tmp_path / "flipped.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                            env=os.environ | {runs.HEADLESS: "1"})
    assert result.returncode == 1, result.stdout
    assert "1 failed" in result.stdout
    assert name in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("place", ["notebooks", "elsewhere"])
def test_a_notebook_runs_from_any_working_directory(place, tmp_path, monkeypatch):
    monkeypatch.setenv(runs.HEADLESS, "1")
    path = batch.notebooks(["00"])[0]
    notebook = nbformat.read(path, as_version=4)
    folder = path.parent if place == "notebooks" else tmp_path
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
