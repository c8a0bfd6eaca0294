"""The HTML book of `make site`: README, chapters, docs and docstrings as pages.

Notebooks are shown as committed, never run. Which pages there are is read from the folders; nothing here lists them.
"""

import json
import os.path
import re
import tomllib
from pathlib import Path
from shutil import copyfile

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
PUBLISHED = "/OWNER/" not in REPOSITORY

PACKAGE = PROJECT["name"]

project, author, language = PACKAGE, "The stability_lib maintainers", "en"
project_copyright = f"{author}, licence {PROJECT['license']}"
root_doc = "README"
include_patterns = ["*.md", "notebooks/*.ipynb", "docs/*.md", "docs/*.rst", "docs/solutions/*.md", "docs/api/*.rst",
                    "benchmarks/*.md"]
exclude_patterns = [".*", "data", "reports", "tests", "stability_lib*"]  # not pages, and slow to walk

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon",
              "sphinx.ext.viewcode"]
templates_path = [str(ROOT / "docs" / "_templates")]  # autosummary looks from the root
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
autodoc_default_options = {"members": True}
default_role = "code"  # the docstrings' `name`
myst_enable_extensions = ["amsmath", "dollarmath", "html_image"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
suppress_warnings = ["myst.header"]  # notebooks may go from a title to a third level

html_theme = "sphinx_book_theme"
html_title = "Training stability"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_copy_source = html_domain_indices = False
html_theme_options = {
    "repository_url": REPOSITORY, "repository_branch": "main", "path_to_docs": "", "use_repository_button": PUBLISHED,
    "navbar_persistent": [], "use_download_button": False, "home_page_in_toc": True, "show_navbar_depth": 1,
    "show_toc_level": 2,
    "launch_buttons": {"colab_url": "https://colab.research.google.com", "binderhub_url": "https://mybinder.org",
                       "notebook_interface": "jupyterlab"} if PUBLISHED else {},
}


def pages() -> list[Path]:
    """Every committed page, relative to the root."""
    return sorted(path.relative_to(ROOT) for pattern in include_patterns if "/api/" not in pattern
                  for path in ROOT.glob(pattern))


def contents() -> str:
    """The table of contents, by folder."""
    chapters, rest = [], {}
    for page in pages():
        if page.suffix == ".ipynb":
            cells = json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]
            title = "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ")
            chapters.append(f"{page.stem[:2]} {title} <{page.with_suffix('')}>")
        elif page.stem != root_doc:
            rest.setdefault(page.parent, []).append(str(page.with_suffix("")))
    parts = {"Chapters": chapters, "Guides": [*rest.pop(Path("docs")), *rest.pop(Path("."), [])]}
    parts |= {folder.name.capitalize(): names for folder, names in rest.items()}
    return "".join(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
                   for caption, names in parts.items())


def linked(text: str, page: Path) -> str:
    """Markdown whose links to files and folders that are no pages lead to the repository, or are none while it has no
    address."""
    known = {*pages()}

    def link(match: re.Match) -> str:
        path = Path(os.path.normpath(page.parent / match[2].partition("#")[0]))
        if path in known or path.suffix in (".gif", ".png", ".svg") or not (ROOT / path).exists():
            return match[0]
        address = f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        return f"[{match[1]}]({address}{match[3] or ''})" if PUBLISHED else match[1]

    within = r"(?:!?\[[^\[\]]*\](?:\([^()]*\))?|[^\[\]])*"  # a link's words may hold brackets, or a picture
    return re.sub(rf'(?<!!)\[({within})\]\((?!https?:|#|mailto:)([^)\s]+)(\s+"[^"]*")?\)', link, text)


def shown(notebook: dict, page: Path) -> dict:
    """A notebook as a page: no launch badges (the theme has buttons), no install cell, folded cells folded."""
    cells = [cell for cell in notebook["cells"] if "install" not in cell["metadata"].get("tags", [])]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = linked(re.sub(r"^\[!\[.*\n*", "", source, count=1, flags=re.M), page)
        elif cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
        for output in cell.get("outputs", []):
            if "data" in output:  # widgets have a figure beside them; claims are data for the report
                output["data"] = {kind: data for kind, data in output["data"].items() if "application/" not in kind}
    return notebook | {"cells": cells}


def read(app, name: str, source: list[str]) -> None:
    """The event `source-read`: what Sphinx sees of a page."""
    page = Path(app.env.doc2path(name)).relative_to(ROOT)
    if page.suffix == ".ipynb":
        source[0] = json.dumps(shown(json.loads(source[0]), page))
    elif page.suffix == ".md":
        source[0] = linked(source[0], page) + (contents() if name == root_doc else "")


def skip(app, kind: str, name: str, member, skipped: bool, options) -> bool | None:
    """The event `autodoc-skip-member`: a library's function that a module imports is not ours to document."""
    home = getattr(member, "__module__", None) or PACKAGE
    return None if home.partition(".")[0] in (PACKAGE, "builtins") else True


def docstring(app, kind: str, name: str, of, options, lines: list[str]) -> None:
    """The event `autodoc-process-docstring`: our plain docstrings as reStructuredText."""
    text = re.sub(r"`[^`]*`|[|*]", lambda match: match[0] if match[0][0] == "`" else f"\\{match[0]}", "\n".join(lines))
    text = re.sub(r"(\S)\n(?=- )", r"\1\n\n", text)  # a list after its sentence
    text = re.sub(r"^(- .*(?:\n +\S.*)*)\n(?=[^\s-])", r"\1\n\n", text, flags=re.M)  # a sentence after its list
    text = re.sub(r"(?<!\n)\n\n(?= {4}\S)", "\n\n::\n\n", text)  # indented code
    if kind in ("attribute", "data", "property"):  # napoleon would take what stands before a colon for a type
        text = f"..\n\n{text}"
    lines[:] = text.split("\n")


def mathml(tex: str, display: str = "inline") -> str:
    """A formula as MathML, which browsers draw themselves: no script, nothing fetched.

    latex2mathml knows neither TeX's space about the names of functions nor bigger brackets.
    """
    from latex2mathml.converter import convert

    name = r"\\(?:cos|exp|ln|log|max|min|sup|tanh)(?![A-Za-z])"
    tex = re.sub(r"\\[bB]ig[lr]?(?![A-Za-z])", "", tex)
    tex = re.sub(rf"(?<=[\w}}])\s*(?={name})", r"\\,", tex)
    return convert(re.sub(rf"({name})\s*(?=[\\\w])(?!_)", r"\1\\,", tex), display=display)


def draw(translator, node) -> None:
    """What Sphinx calls for a formula."""
    import docutils.nodes

    block = isinstance(node, docutils.nodes.math_block)
    formula = mathml(node.astext(), "block" if block else "inline")
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise docutils.nodes.SkipNode


def finish(app, exception) -> None:
    """The event `build-finished`: the README is the front page too."""
    if exception is None and app.builder.name == "html":
        copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (draw, None), (draw, None))
    app.connect("source-read", read)
    app.connect("env-get-outdated", lambda *_: [root_doc])  # its contents change with the folders
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # napoleon is at 500
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
