"""Write each chapter's launch badges, and the folded cell that installs the project on Colab.

    python tools/launch.py             all notebooks, in place; what is right already stays as it is
    python tools/launch.py --check     only say which notebooks lack them

The repository's address is `project.urls.Repository` in pyproject.toml, and nowhere else. While it names no owner the
notebooks have no badges, as those would lead nowhere.
"""

import re
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
EXTRAS = {"pretrained": r"\b(transformers|checkpoint)\b", "lightning": r"\bimport lightning\b"}
"""Optional parts of the project, and what a notebook's code shows that it needs them."""
BADGE = re.compile(r"^\[!\[Open in Colab\].*\n\n", flags=re.M)


def published() -> bool:
    return "/OWNER/" not in REPOSITORY


def badges(name: str) -> str:
    """The line under a notebook's title."""
    slug = REPOSITORY.removeprefix("https://github.com/")
    links = {"Colab": f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}",
             "Binder": f"https://mybinder.org/v2/gh/{slug}/HEAD?labpath=notebooks%2F{name}"}
    return " ".join(f"[![Open in {where}](../docs/badges/{where.lower()}.svg)]({to})" for where, to in links.items())


def install(code: str) -> str:
    """The source of the cell that installs; `code` is that of the notebook."""
    extras = "".join(f" {extra}" for extra, sign in EXTRAS.items() if re.search(sign, code))
    return f"""# On Colab: fetch the project and what it lacks, and leave torch as it is. Elsewhere this does nothing.
import os

if "COLAB_RELEASE_TAG" in os.environ and not os.path.exists("stability_lib"):
    !git clone -q --depth 1 {REPOSITORY} stability_lib
    !python stability_lib/tools/colab.py{extras}
    %cd -q stability_lib"""


def launched(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook with both; a cell that is new counts as run first, as it does nothing but on Colab."""
    title = notebook.cells[0]
    heading, _, rest = BADGE.sub("", title.source, count=1).partition("\n")
    title.source = f"{heading}\n\n{badges(name)}\n\n{rest.lstrip()}".rstrip()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    known = [cell for cell in code if "install" in cell.metadata.get("tags", [])]
    source = install("\n".join(cell.source for cell in code if cell not in known))
    if known:
        known[0].source = source
        return notebook
    first = notebook.cells.index(code[0])
    for cell in code:
        for counted in [cell, *cell.outputs]:
            if counted.get("execution_count"):
                counted.execution_count += 1
    folded = {"tags": ["install"], "jupyter": {"source_hidden": True}}
    notebook.cells.insert(first, nbformat.v4.new_code_cell(source, id="install", metadata=folded, execution_count=1))
    return notebook


def main(arguments: list[str]) -> int:
    if not published():
        print(f"{REPOSITORY} is no address: set project.urls.Repository in pyproject.toml, then run this again")
        return 2
    lacking = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        after = nbformat.writes(launched(nbformat.reads(before, as_version=4), path.name)) + "\n"
        if after != before:
            lacking.append(path.name)
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    print("\n".join(lacking) or "all notebooks have their badges and install cells")
    return int("--check" in arguments and bool(lacking))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
