"""The solutions of the exercises run as they stand, and every notebook with exercises has a page of them."""

import json
import re
import warnings

import matplotlib.pyplot as plt
import pytest
import torch

from stability_lib import batch, runs

FOLDER = runs.project_root() / "docs" / "solutions"
PAGES = sorted(FOLDER.glob("*.md"))


def exercises(path) -> list[str]:
    """The numbers of a notebook's exercises."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    _, heading, after = prose.rpartition("\n## Exercises")
    return re.findall(r"^(\d+)\. ", after, flags=re.M) if heading else []


def blocks(page) -> list[tuple[int, str]]:
    """The Python of a page, each block with its line."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1])
            for found in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)]


@pytest.mark.parametrize("path", batch.notebooks(), ids=lambda path: path.stem)
def test_every_exercise_has_a_solution(path):
    asked = exercises(path)
    page = FOLDER / f"{path.stem[:2]}.md"
    assert page.exists() == bool(asked), f"{path.stem} has {len(asked)} exercises: write {page}, or remove it"
    if asked:
        found = re.findall(r"^##+ (?:Exercise )?(\d+)\b", page.read_text(encoding="utf-8"), flags=re.M)
        assert found == asked, f"{page.name} needs a heading, such as `## 1. Its name`, for each exercise, in order"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_solutions_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.project_root())
    monkeypatch.setenv("STABILITY_LIB_RUNS", str(tmp_path))
    monkeypatch.setenv(runs.HEADLESS, "1")
    threads, names = torch.get_num_threads(), {"__name__": page.stem}
    assert blocks(page)
    try:
        with warnings.catch_warnings(), plt.rc_context(), torch.random.fork_rng():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
            plt.switch_backend("agg")
            for line, code in blocks(page):
                exec(compile("\n" * line + code, page, "exec"), names)
    finally:
        plt.close("all")
        torch.set_num_threads(threads)
