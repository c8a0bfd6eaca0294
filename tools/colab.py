"""Install what the notebooks need and this Python lacks, on Colab; torch and the kernel stay as they are.

    python tools/colab.py [pretrained] [lightning]
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("torch", "jupyterlab", "ipykernel", "ipython", "ipywidgets")
"""What runs already: torch was built for the card that Colab lends, and nobody changes a kernel under a notebook."""


def lacking(extras: list[str]) -> list[str]:
    """The requirements that are not installed, or too old."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [text for text in wanted if (found := Requirement(text)).name not in KEPT and not _installed(found)]


def _installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def main(extras: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.write(f"torch=={importlib.metadata.version('torch')}\n")
        kept.flush()
        if missing := lacking(extras):
            subprocess.run([*pip, "--constraint", kept.name, *missing], check=True)
    subprocess.run([*pip, "--no-deps", "--requirement", str(ROOT / "requirements-nodeps.txt")], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
