"""The book of `make site` finds every page, none of its links is broken, and the tools beside it do what they say."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from stability_lib import batch, runs

ROOT = runs.project_root()


def module(path: str):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


CONF, LAUNCH, COLAB = (module(path) for path in ("docs/conf.py", "tools/launch.py", "tools/colab.py"))
PAGES = CONF.pages()


def prose(page: Path) -> str:
    """A page's Markdown, without code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]
                           if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "`code`", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link may name in a page, as GitHub and the book make it of headings."""
    text = (ROOT / page).read_text(encoding="utf-8") if page.suffix == ".md" else prose(page)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_book_has_every_notebook_and_every_page_of_docs():
    found = {str(page) for page in PAGES}
    assert {f"notebooks/{path.name}" for path in batch.notebooks()} <= found
    assert {str(path.relative_to(ROOT)) for folder in ("docs", "benchmarks") for path in (ROOT / folder).rglob("*.md")
            } <= found
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/api.rst", "docs/glossary.md"} <= found
    listed = re.findall(r"^(?:.* <)?([\w./-]+)>?$", re.sub(r"^```.*|^:.*", "", CONF.contents(), flags=re.M), flags=re.M)
    assert sorted(listed) == sorted(str(page.with_suffix("")) for page in PAGES if page.name != "README.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix != ".rst"], ids=str)
def test_no_link_of_a_page_is_broken(page):
    text = prose(page)
    for link in re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'<(?:img|a)[^>]+(?:src|href)="([^"]+)"', text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        to = Path(os.path.normpath(page.parent / path)) if path else page
        assert (ROOT / to).exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(to), f"{page} links to {link}: no such heading"


def test_links_beyond_the_book_lead_to_the_repository_once_it_has_an_address(monkeypatch):
    text = ("[a](stability_lib/config.py) [`b`](notebooks/) [c](docs/gpu.md#x) ![d](docs/figure1.png) "
            "[e](https://x.org) [f](#here) [g](nowhere.md) "
            '[0 [0, 1]](data/runs/ "h") [![i](docs/figure1.png)](tests/)')
    monkeypatch.setattr(CONF, "REPOSITORY", "https://github.com/you/it")
    monkeypatch.setattr(CONF, "PUBLISHED", True)
    to = "https://github.com/you/it/blob/main/stability_lib/config.py", "https://github.com/you/it/tree/main/notebooks"
    expected = text.replace("stability_lib/config.py", to[0]).replace("notebooks/", to[1])
    for folder in ("data/runs/", "tests/"):
        expected = expected.replace(folder, f"https://github.com/you/it/tree/main/{folder[:-1]}")
    assert CONF.linked(text, Path("README.md")) == expected
    monkeypatch.setattr(CONF, "PUBLISHED", False)
    without = text.replace("[a](stability_lib/config.py) [`b`](notebooks/)", "a `b`").replace(
        '[0 [0, 1]](data/runs/ "h") [![i](docs/figure1.png)](tests/)', "0 [0, 1] ![i](docs/figure1.png)")
    assert CONF.linked(text, Path("README.md")) == without


def test_a_docstring_s_list_stands_apart_from_the_sentences_about_it():
    lines = ["Known:", "- one, which", "  goes on", "- two", "Then more, a - b", "and the end."]
    CONF.docstring(None, "module", "m", None, None, lines)
    assert lines == ["Known:", "", "- one, which", "  goes on", "", "- two", "", "Then more, a - b", "and the end."]


def test_every_formula_becomes_mathml_whole():
    formulas = [found[1] or found[2] for page in PAGES if page.suffix != ".rst"
                for found in re.finditer(r"\$\$(.+?)\$\$|(?<![\w\\])\$([^$\n]+?)\$(?!\d)", prose(page), flags=re.S)]
    pytest.importorskip("latex2mathml")
    assert len(formulas) > 300
    assert not [tex for tex in formulas if "\\" in CONF.mathml(tex)]
    assert CONF.mathml(r"c \log Z").count("<mspace") == 2


def test_docstrings_become_restructured_text():
    lines = ["The |z| of `a|b`:", "- one", "- two **kw", "", "    code(x)", "", "Done."]
    CONF.docstring(None, "function", "f", None, None, lines)
    assert "\n".join(lines) == ("The \\|z\\| of `a|b`:\n\n- one\n\n- two \\*\\*kw\n\n::\n\n    code(x)\n\nDone.")
    lines = ["Bytes of a layer: two of them."]
    CONF.docstring(None, "data", "N", None, None, lines)
    assert lines == ["..", "", "Bytes of a layer: two of them."]


def test_the_book_shows_a_notebook_folded_and_without_badges():
    before = LAUNCH.launched(nbformat.read(batch.notebooks(["18"])[0], as_version=4), "18_profile_your_own_model.ipynb")
    assert before.cells[0].source.count("![Open in ") == 2
    page = CONF.shown(json.loads(nbformat.writes(before)), Path("notebooks/18_profile_your_own_model.ipynb"))
    assert "Open in" not in page["cells"][0]["source"]
    assert not [cell for cell in page["cells"] if "install" in cell["metadata"].get("tags", [])]
    hidden = [cell for cell in page["cells"] if cell["metadata"].get("jupyter", {}).get("source_hidden")]
    assert hidden and all("hide-input" in cell["metadata"]["tags"] for cell in hidden)
    kinds = {kind for cell in page["cells"] for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert kinds == {"text/plain", "text/html", "image/png"}


def test_launching_a_notebook_twice_changes_nothing_and_counts_cells_anew():
    name = "14_beyond_transformers.ipynb"
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    once = nbformat.writes(LAUNCH.launched(notebook, name))
    assert nbformat.writes(LAUNCH.launched(nbformat.reads(once, as_version=4), name)) == once
    code = [cell for cell in nbformat.reads(once, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "install" in code[0].metadata.tags and "parameters" in code[1].metadata.tags
    assert "colab.py pretrained lightning\n" in LAUNCH.install("import lightning.pytorch\nfrom transformers import X")
    assert "colab.py\n" in LAUNCH.install("from stability_lib import runs")


@pytest.mark.parametrize("given", ["https://github.com/you/it", "https://github.com/you/it/",
                                   "https://github.com/you/it.git"])
def test_a_repository_that_says_where_it_is_gets_badges_that_lead_there(tmp_path, monkeypatch, capsys, given):
    """As the workflow of the site does it, in a copy: once, and nothing is left to do."""
    (tmp_path / "notebooks").mkdir()
    names = [path.name for path in batch.notebooks(["00", "18"])]
    for name in ["pyproject.toml", *(f"notebooks/{name}" for name in names)]:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(LAUNCH, "ROOT", tmp_path)
    monkeypatch.setattr(LAUNCH, "PROJECT", tmp_path / "pyproject.toml")
    assert LAUNCH.main(["--check", "--repository", given]) == 1
    assert (tmp_path / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()
    assert LAUNCH.main(["--repository", given]) == 0
    assert capsys.readouterr().out.split() == 2 * ["pyproject.toml", *names]
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls == {"Repository": "https://github.com/you/it"}
    for name in names:
        title, *cells = nbformat.read(tmp_path / "notebooks" / name, as_version=4).cells
        assert f"(https://colab.research.google.com/github/you/it/blob/main/notebooks/{name})" in title.source
        assert f"(https://mybinder.org/v2/gh/you/it/HEAD?labpath=notebooks%2F{name})" in title.source
        (install,) = [cell.source for cell in cells if "install" in cell.metadata.get("tags", [])]
        assert "git clone -q --depth 1 https://github.com/you/it stability_lib\n" in install
    assert LAUNCH.main(["--check", "--repository", given]) == 0


def test_launching_takes_a_title_alone_and_a_notebook_without_code():
    title, code = nbformat.v4.new_markdown_cell("# T", id="t"), nbformat.v4.new_code_cell("1", id="c")
    for cells in ([title], [title, code]):
        notebook = nbformat.v4.new_notebook(cells=copy.deepcopy(cells))
        first = nbformat.writes(LAUNCH.launched(notebook, "x.ipynb", "https://github.com/you/it"))
        moved = LAUNCH.launched(nbformat.reads(first, as_version=4), "x.ipynb", "https://github.com/me/it")
        assert moved.cells[0].source.count("Open in Colab") == 1 and "github/me/it/" in moved.cells[0].source
        assert nbformat.writes(LAUNCH.launched(moved, "x.ipynb", "https://github.com/you/it")) == first
    with pytest.raises(ValueError, match="0 lines 'Repository"):
        LAUNCH.moved('repository = "https://github.com/OWNER/x"', "https://github.com/you/it")


@pytest.mark.parametrize("given", ["https://github.com/you", "https://example.org/you/it", "you/it",
                                   "https://github.com/you/it/tree/main", "https://github.com/you/it; rm -r x"])
def test_what_is_no_address_of_a_repository_is_refused(capsys, given):
    with pytest.raises(SystemExit, match="2"):
        LAUNCH.main(["--check", "--repository", given])
    assert "is not an address like https://github.com/you/name" in capsys.readouterr().err


def test_the_workflow_of_the_site_gives_the_repository_s_address():
    """Jobs and permissions as GitHub reads them; what the job runs is a command of this project."""
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "site.yml").read_text())["jobs"]
    commands = "\n".join(step.get("run", "") for step in jobs["badges"]["steps"])
    assert 'python tools/launch.py --repository "$GITHUB_SERVER_URL/$GITHUB_REPOSITORY"' in commands
    assert jobs["badges"]["permissions"] == {"contents": "write"} and jobs["publish"]["needs"] == "badges"
    assert [step["with"]["ref"] for step in jobs["publish"]["steps"] if "checkout" in step.get("uses", "")] == ["main"]


def test_on_colab_torch_and_the_kernel_stay_as_they_are(monkeypatch):
    installed = {"numpy": "2.0.2", "pandas": "2.2.2", "torch": "2.9.0", "ipykernel": "6.17", "ipython": "7.34"}

    def version(name):
        if name not in installed:
            raise COLAB.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(COLAB.importlib.metadata, "version", version)
    names = {re.split(r"[>=]", text)[0] for text in COLAB.lacking(["lightning"])}
    assert {"pandas", "scipy", "pytorch-optimizer", "lightning"} <= names
    assert not names & {"torch", "numpy", "ipykernel", "ipython", "ipywidgets", "jupyterlab", "transformers"}


def test_binder_installs_what_the_lock_pins():
    lock = (ROOT / "requirements.lock").read_text().split()
    asked = (ROOT / ".binder" / "requirements.txt").read_text().splitlines()
    assert "--constraint ../requirements.lock" in asked
    assert {line for line in asked if not line.startswith("--")} <= {*lock}


def test_the_glossary_is_in_order_and_says_where_each_term_is_shown():
    lines = [line for line in prose(Path("docs/glossary.md")).splitlines() if line.startswith("- ")]
    terms = [re.match(r"- \*\*(.+?)\*\*: ", line)[1] for line in lines]
    assert terms == sorted(terms, key=str.lower) and len({*terms}) == len(terms) > 90
    for line in lines:
        assert re.search(r"\[\d\d\]\(\.\./notebooks/\w+\.ipynb\)", line), line
        assert len(re.sub(r"\(\[.*", "", line).split()) <= 45, line
    needed = ("AUROC", "Brier score", "Platt scaling", "cosine", "e-fold", "near-unit mass (M1)", "rho", "kappa", "eta",
              "LR sensitivity", "qk-norm", "z-loss", "muParam (muP)", "KSS", "RKSP", "Pre-LN", "recall")
    assert {*needed} <= {*terms}


@pytest.mark.slow
def test_the_book_builds_without_a_warning(tmp_path):
    """It writes stubs of API pages to docs/api, which git ignores, and nothing else outside of its folder."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", ROOT / "docs", "-d", tmp_path / "read",
               ROOT, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    html = {path.relative_to(tmp_path / "site").with_suffix("") for path in (tmp_path / "site").rglob("*.html")}
    assert {page.with_suffix("") for page in PAGES} | {Path("index"), Path("search")} <= html
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|img)[^>]+src="https?:|<link[^>]+stylesheet[^>]+href="https?:', front)
    modules = {path.stem for path in (ROOT / "stability_lib").glob("[a-z]*.py")}
    assert {f"docs/api/stability_lib.{name}" for name in modules} <= {str(path) for path in html}
