"""Write each chapter's launch badges, and the folded cell that installs the project on Colab.

    python tools/launch.py                                              all notebooks; what is right stays as it is
    python tools/launch.py --check                                      only say which notebooks lack them
    python tools/launch.py --repository https://github.com/you/name     the project has moved there: say so first

The repository's address is `project.urls.Repository` in pyproject.toml, and nowhere else. While it names no owner the
notebooks have no badges, as those would lead nowhere. The workflow that publishes the site gives the address of the
repository that it runs in, and commits what follows.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "pyproject.toml"
REPOSITORY = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
EXTRAS = {"pretrained": r"\b(transformers|checkpoint)\b", "lightning": r"\bimport lightning\b"}
"""Optional parts of the project, and what a notebook's code shows that it needs them."""
BADGE = re.compile(r"^\[!\[Open in Colab\].*\n*", flags=re.M)


def published(repository: str = REPOSITORY) -> bool:
    return "/OWNER/" not in repository


def address(text: str) -> str:
    """A repository's address without what GitHub itself may add to it; ArgumentTypeError where it is none."""
    found = re.fullmatch(r"(https://github\.com/[\w.-]+/[\w.-]+?)(?:\.git)?/?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address like https://github.com/you/name")
    return found[1]


def moved(project: str, repository: str) -> str:
    """The text of pyproject.toml with the address `repository`; ValueError where it has no one line for it."""
    text, found = re.subn(r'(?m)^Repository = ".*"$', f'Repository = "{repository}"', project)
    if found != 1:
        raise ValueError(f"pyproject.toml has {found} lines 'Repository = \"...\"': it needs one, in [project.urls]")
    return text


def badges(name: str, repository: str = REPOSITORY) -> str:
    """The line under a notebook's title."""
    slug = repository.removeprefix("https://github.com/")
    links = {"Colab": f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}",
             "Binder": f"https://mybinder.org/v2/gh/{slug}/HEAD?labpath=notebooks%2F{name}"}
    return " ".join(f"[![Open in {where}](../docs/badges/{where.lower()}.svg)]({to})" for where, to in links.items())


def install(code: str, repository: str = REPOSITORY) -> str:
    """The source of the cell that installs; `code` is that of the notebook."""
    extras = "".join(f" {extra}" for extra, sign in EXTRAS.items() if re.search(sign, code))
    return f"""# On Colab: fetch the project and what it lacks, and leave torch as it is. Elsewhere this does nothing.
import os

if "COLAB_RELEASE_TAG" in os.environ and not os.path.exists("stability_lib"):
    !git clone -q --depth 1 {repository} stability_lib
    !python stability_lib/tools/colab.py{extras}
    %cd -q stability_lib"""


def launched(notebook: nbformat.NotebookNode, name: str, repository: str = REPOSITORY) -> nbformat.NotebookNode:
    """The notebook with both, without code with badges alone; a cell that is new counts as run first, as it does
    nothing but on Colab."""
    title = notebook.cells[0]
    heading, _, rest = BADGE.sub("", title.source, count=1).partition("\n")
    title.source = f"{heading}\n\n{badges(name, repository)}\n\n{rest.lstrip()}".rstrip()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not code:
        return notebook
    known = [cell for cell in code if "install" in cell.metadata.get("tags", [])]
    source = install("\n".join(cell.source for cell in code if cell not in known), repository)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which notebooks lack them")
    parser.add_argument("--repository", type=address, default=REPOSITORY, metavar="URL", help="where the project is")
    asked = parser.parse_args(arguments)
    if not published(asked.repository):
        print(f"{asked.repository} is no address: say --repository https://github.com/you/name")
        return 2
    texts = {PROJECT: moved(PROJECT.read_text(encoding="utf-8"), asked.repository)}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        texts[path] = nbformat.writes(launched(notebook, path.name, asked.repository)) + "\n"
    changed = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    if not asked.check:
        for path in changed:
            path.write_text(texts[path], encoding="utf-8")
    print("\n".join(path.name for path in changed) or "all notebooks have their badges and install cells")
    return int(asked.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
