"""Files of runs: what is finished is never lost, and what is damaged is named."""

import ast
import contextlib
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from sweeps import THREE, TINY, Serial, Untouched, edited, keys, keys_in, wait_until

import stability_lib.store as files
from stability_lib import config, runs, studies
from stability_lib.config import run_key
from stability_lib.runs import MissingRuns, Store, StoreError

pytestmark = pytest.mark.usefixtures("no_progress_bar")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A project root without any runs."""
    monkeypatch.delenv("STABILITY_LIB_RUNS", raising=False)
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    (tmp_path / "data" / "runs").mkdir(parents=True)
    return tmp_path


# damaged files

@pytest.mark.parametrize("bad", [
    b"{", b"word", b"5", b"[]", b"null", b"\0\0\0\0", b"\xff\xfe", b"{}", b'{"schema":1,"key":"k"}',
    b'{"schema":"one","key":"k","config":{}}', b'{"schema":1,"key":"k","config":{}}'])
def test_a_corrupt_line_is_named_before_any_training_and_nothing_is_changed(store, stored, bad):
    content = stored[0] + bad + b"\n" + stored[1]
    store.local.write_bytes(content)
    for recompute in (False, True):
        with pytest.raises(StoreError, match=r"study\.jsonl line 2 is corrupt .*: delete that line"):
            runs.ensure(THREE, store, executor=Untouched(), recompute=recompute)
    assert store.local.read_bytes() == content


@pytest.mark.parametrize("values", [None, [], ["lr"], {"lr": "high"}, {"lr": -1.0}, {"learning_rate": 0.1}])
def test_a_config_that_cannot_be_read_is_named_with_file_and_line(store, stored, values):
    store.local.write_bytes(stored[0] + edited(stored[1], config=values))
    with pytest.raises(StoreError, match=r"study\.jsonl line 2"):
        runs.ensure(THREE, store, executor=Untouched())


def test_a_field_that_this_version_does_not_know_asks_for_an_upgrade(store, stored):
    store.local.write_bytes(edited(stored[0], config={"lr_decay": 0.1}))
    with pytest.raises(StoreError, match=r"line 1: unknown field 'lr_decay'.*upgrade stability_lib"):
        runs.ensure(THREE, store, executor=Untouched())


def test_a_line_whose_config_was_edited_no_longer_fits_its_key(store, stored):
    fields = json.loads(stored[1])["config"] | {"lr": 0.02}
    store.local.write_bytes(stored[0] + edited(stored[1], config=fields))
    with pytest.raises(StoreError, match=r"study\.jsonl line 2: the config does not belong to the key"):
        runs.ensure(THREE, store, executor=Untouched())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_store_of_a_newer_version_asks_for_an_upgrade(store, stored, recompute):
    newer = json.dumps({"schema": config.SCHEMA + 1, "key": "0", "config": {"new": 1}, "results": 1}).encode() + b"\n"
    store.local.write_bytes(stored[0] + newer)
    with pytest.raises(StoreError, match=r"line 2 was written by a newer version .*: upgrade stability_lib"):
        runs.ensure(THREE, store, executor=Untouched(), recompute=recompute)


def test_lines_of_an_older_version_are_passed_over(store, stored):
    store.local.write_bytes(edited(stored[0], schema=config.SCHEMA - 1) + stored[1])
    assert list(runs.read(store.local)) == keys(THREE[1:2])


def test_a_damaged_reference_is_named_too(tmp_path, stored):
    store = Store(tmp_path / "local.jsonl", tmp_path / "reference.jsonl")
    store.reference.write_bytes(stored[0] + b"{\n")
    with pytest.raises(StoreError, match=r"reference\.jsonl line 2"):
        runs.ensure(THREE, store, executor=Untouched())


@pytest.mark.filterwarnings("ignore:.*torn:UserWarning")
@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize("torn", [b'{"schema":1,"ke', b"\0" * 5000, b"x" * 200_000])
def test_a_torn_last_line_is_skipped_with_a_warning_and_gone_after_the_next_run(store, stored, whole, torn):
    store.local.write_bytes(b"".join(stored[:whole]) + torn)
    with pytest.warns(UserWarning, match=r"study\.jsonl: the last line is torn"):
        assert list(runs.read(store.local)) == keys(THREE[:whole])
    executor = Serial()
    runs.ensure(THREE, store, executor=executor)
    assert len(executor.trained) == 3 - whole
    assert store.local.read_bytes().startswith(b"".join(stored[:whole]))
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))


@pytest.mark.parametrize("changes", [
    {"provenance": None}, {"provenance": {"device": "cpu", "date": "2026-01-01", "stability_lib": "0.1.0"}},
    {"provenance": {"seconds": "1", "device": "cpu", "date": "2026-01-01", "stability_lib": "0.1.0"}},
    {"curves": None}, {"curves": [1.0]}, {"curves": {"step": [0], "loss": "low"}},
    {"curves": {"step": [0], "loss": ["low"]}}, {"curves": {"step": [0], "loss": [1.0, 2.0]}},
    {"curves": {"step": [0.5], "loss": [1.0]}}, {"curves": {"step": [0], "log_z": [1.0]}},
    {"loss_final": "low"}, {"loss_init": [5.0]}, {"loss_init": True},
    {"accuracy_final": "high"}, {"schema": None}, {"schema": 1.0}, {"schema": True},
    {"status": None}, {"status": "fine"}, {"stop_step": "3"}, {"reason": 5}, {"key": 5}, {"key": None},
    {"patterns": None}, {"patterns": [1]}, {"patterns": [[["x"]]]}, {"extremes": None}, {"extremes": {"loss": 5.0}},
    {"extremes": {"loss": [1.0]}}, {"extremes": {"loss": [None, 1.0]}}])
def test_a_wrongly_typed_field_is_named_with_file_and_line(store, stored, changes):
    store.local.write_bytes(stored[0] + edited(stored[1], **changes) + stored[2])
    with pytest.raises(StoreError, match=rf"study\.jsonl line 2 is corrupt .*{next(iter(changes))}"):
        runs.ensure(THREE, store, executor=Untouched())


@pytest.mark.parametrize("bad", [b'{"schema":Infinity}', b'{"schema":1,"loss_init":NaN}', b'{"schema":1e999}',
                                 b"[" * 100_000, b'{"schema":' + b"1" * 5000 + b"}"])
def test_what_json_reads_as_no_number_of_ours_is_named_too(store, stored, bad):
    store.local.write_bytes(stored[0] + bad + b"\n")
    with pytest.raises(StoreError, match=r"study\.jsonl line 2 is corrupt"):
        runs.read(store.local)


def test_a_config_with_a_number_beyond_all_floats_is_named_with_file_and_line(store, stored):
    store.local.write_bytes(stored[0] + edited(stored[1], config={"lr": 10**400}))
    with pytest.raises(StoreError, match=r"study\.jsonl line 2"):
        runs.read(store.local)


@pytest.mark.slow
def test_every_row_of_the_committed_references_can_be_read():
    folder = runs.project_root() / "data" / "runs"
    paths = [*folder.glob("*.jsonl"), *folder.glob("gpu/*.jsonl")]
    assert paths and all(runs.read(path) for path in paths)


@pytest.mark.parametrize("whole", [1, 2])
def test_a_whole_last_row_that_lacks_its_line_end_is_kept_also_by_the_next_run(store, stored, whole):
    content = b"".join(stored[:whole]).removesuffix(b"\n")
    store.local.write_bytes(content)
    assert list(runs.read(store.local)) == keys(THREE[:whole])
    executor = Serial()
    runs.ensure(THREE, store, executor=executor)
    assert len(executor.trained) == 3 - whole
    assert store.local.read_bytes().startswith(content + b"\n")
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))


@pytest.mark.parametrize("end", [b"\r", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_other_line_ends_lose_nothing(store, stored, end, last):
    content = b"".join(stored[:2]).replace(b"\n", end)
    store.local.write_bytes(content if last else content.removesuffix(end))
    assert list(runs.read(store.local)) == keys(THREE[:2])
    executor = Serial()
    runs.ensure(THREE, store, executor=executor)
    assert executor.trained == THREE[2:]
    assert list(runs.read(store.local)) == keys(THREE)


# one writer

def test_a_file_under_two_names_has_one_lock_and_stays_linked(tmp_path, stored, capsys):
    (tmp_path / "real").mkdir(), (tmp_path / "other").mkdir()
    real, link = tmp_path / "real" / "study.jsonl", tmp_path / "other" / "linked.jsonl"
    link.symlink_to(real)
    printed = []

    def said():
        printed.append(capsys.readouterr().out)
        return "waiting for another process" in "".join(printed)

    with files.writer(real) as file:
        rival = threading.Thread(target=runs.ensure, args=(THREE[:1], Store(link)), kwargs={"executor": Untouched()})
        rival.start()
        wait_until(said, 30, "two writers at once")
        file.write({key: json.loads(line) for key, line in zip(keys(THREE[:1]), stored[:1], strict=True)})
    rival.join(30)
    assert link.is_symlink() and list(link.parent.iterdir()) == [link]
    assert keys_in(real) == keys(THREE[:1])


def replace_by_an_empty_file(path: Path):
    path.with_suffix(".new").write_bytes(b"")
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 9),
                                    replace_by_an_empty_file, lambda path: shutil.rmtree(path.parent)],
                         ids=["deleted", "emptied", "cut short", "replaced", "deleted with its folder"])
@pytest.mark.filterwarnings("ignore:.*torn:UserWarning")
def test_what_is_deleted_while_runs_are_trained_is_written_again(tmp_path, stored, damage):
    store = Store(tmp_path / "folder" / "study.jsonl")
    store.local.parent.mkdir()
    store.local.write_bytes(stored[0])
    with pytest.warns(UserWarning, match=r"study\.jsonl was deleted or changed .*: 1 runs .*written to it again"):
        table = runs.ensure(THREE, store, executor=Serial(lambda config: damage(store.local) if config == THREE[2]
                                                          else None))
    assert table["key"].to_list() == keys(THREE)
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))
    runs.ensure(THREE, store, executor=Untouched())


def test_a_file_deleted_after_the_last_run_is_written_again_too(store, stored):
    rows = {key: json.loads(line) for key, line in zip(keys(THREE), stored, strict=True)}
    with pytest.warns(UserWarning, match="3 runs that it had held are written to it again"), \
            files.writer(store.local) as file:
        file.write(rows)
        store.local.unlink()
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))


# folders and disks

def make_read_only(folder: Path):
    """A context in which nothing can be made under `folder`, even for root; skips the test where that cannot be had."""
    @contextlib.contextmanager
    def context():
        folder.chmod(0o555)
        chattr = shutil.which("chattr") if os.geteuid() == 0 else None
        immutable = chattr and subprocess.run([chattr, "+i", str(folder)], capture_output=True).returncode == 0
        try:
            if os.access(folder, os.W_OK) and not immutable:
                pytest.skip("this user can write anywhere")
            yield
        finally:
            if immutable:
                subprocess.run([chattr, "-i", str(folder)], check=True)
            folder.chmod(0o755)
    return context()


def test_a_read_only_folder_under_the_store_is_an_error_before_any_training_but_not_for_cached_runs(store, stored):
    store.local.parent.joinpath("elsewhere.jsonl").write_bytes(stored[0])
    with make_read_only(store.local.parent):
        with pytest.raises(StoreError, match=r"cannot write .*study\.jsonl .*STABILITY_LIB_RUNS"):
            runs.ensure(THREE, store, executor=Untouched())
        runs.ensure(THREE[:1], Store(store.local, store.local.with_name("elsewhere.jsonl")), executor=Untouched())


@pytest.mark.parametrize("depth", ["study.jsonl", "deeper/study.jsonl"])
def test_a_file_where_the_folder_should_be_is_an_error_before_any_training(tmp_path, depth):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot write .*study\.jsonl"):
        runs.ensure(THREE, Store(tmp_path / "runs" / depth), executor=Untouched())


def test_a_folder_where_the_file_should_be_is_an_error_before_any_training(store):
    store.local.mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*study\.jsonl"):
        runs.ensure(THREE, store, executor=Untouched())


def test_too_little_free_space_is_an_error_before_any_training(store, monkeypatch):
    monkeypatch.setattr(files, "MIN_FREE_BYTES", 10**18)
    with pytest.raises(StoreError, match=r"MB are free under .*: free some space"):
        runs.ensure(THREE, store, executor=Untouched())


@pytest.mark.slow
def test_a_full_disk_keeps_earlier_runs_and_holds_the_finished_ones_until_there_is_room(store, another_process):
    process = another_process(f"""
        import resource
        from stability_lib.runs import StoreError
        store = Store({store.local!r})
        runs.ensure(THREE[:1], store, executor=Serial())
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.local.stat().st_size + 1000, unlimited[1]))
        for attempt in range(2):
            try:
                runs.ensure(THREE, store, executor=Serial() if attempt == 0 else Untouched())
            except StoreError as error:
                assert "free some space and call again in this session" in str(error), error
            else:
                raise AssertionError("the disk was not full")
            assert keys_in(store.local) == keys(THREE[:1])
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert len(runs.ensure(THREE, store, executor=Untouched())) == 3
    """)
    assert process.wait(120) == 0, process.output()
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))


# places

def test_the_environment_names_another_folder_for_local_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("STABILITY_LIB_RUNS", str(tmp_path / "mine"))
    runs.ensure([TINY], "a_study_of_its_own", executor=Serial())
    assert keys_in(tmp_path / "mine" / "a_study_of_its_own.jsonl") == [run_key(TINY)]
    assert runs.locate("x").reference == runs.project_root() / "data" / "runs" / "x.jsonl"


def test_a_tilde_in_the_environment_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STABILITY_LIB_RUNS", "~/mine")
    assert runs.locate("study").local == tmp_path / "mine" / "study.jsonl"


@pytest.mark.parametrize("study, error", [
    (None, TypeError), (5, TypeError), (Path("study"), TypeError), ("", ValueError), ("../study", ValueError),
    ("a/b", ValueError), ("a\0", ValueError), (".", ValueError)])
def test_what_is_no_name_of_a_study_is_refused(study, error):
    for ask in (runs.ensure, runs.plan):
        with pytest.raises(error, match="study"):
            ask(THREE, study)


def test_a_store_takes_paths_as_text_and_nothing_else(tmp_path):
    assert Store(f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl") == Store(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for wrong in ((None,), (5,), (tmp_path, 5)):
        with pytest.raises(TypeError, match="must be the path of a file"):
            Store(*wrong)


def test_another_project_in_the_working_directory_is_not_taken_for_this_ones_checkout(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(files, "project_root", lambda: tmp_path)
    assert runs.commit() is None


@pytest.mark.parametrize("folder", [None, "my_runs"])
def test_where_runs_lie_does_not_depend_on_the_working_directory(tmp_path, monkeypatch, folder):
    if folder:
        monkeypatch.setenv("STABILITY_LIB_RUNS", folder)
    else:
        monkeypatch.delenv("STABILITY_LIB_RUNS", raising=False)
    here = runs.locate("study")
    monkeypatch.chdir(tmp_path)
    assert runs.locate("study") == here
    assert here.local.is_absolute() and here.reference.is_absolute()


def test_results_do_not_depend_on_the_working_directory(tmp_path, monkeypatch, stored):
    monkeypatch.chdir(tmp_path)
    table = runs.ensure([THREE[0]], Store(tmp_path / "study.jsonl"), executor=Serial())
    assert table["loss_final"].item() == json.loads(stored[0])["loss_final"]


# promotion

def test_promoting_writes_the_grid_in_its_order_and_nothing_else(checkout, stored):
    source = checkout / "source.jsonl"
    source.write_bytes(stored[2] + edited(stored[0], loss_final=9.0) + stored[1] + stored[0])
    assert runs.promote("study", [THREE[0], THREE[2], THREE[0]], runs.read(source)) == 2
    reference = checkout / "data" / "runs" / "study.jsonl"
    assert reference.read_bytes() == stored[0] + stored[2]
    assert list(reference.parent.iterdir()) == [reference]
    runs.ensure([THREE[2], THREE[0]], "study", executor=Untouched())


def test_promoting_another_grid_keeps_what_the_reference_held(checkout, stored, capsys):
    reference = checkout / "data" / "runs" / "study.jsonl"
    reference.write_bytes(stored[0] + edited(stored[1], loss_final=9.0))
    rows = {key: json.loads(line) for key, line in zip(keys(THREE), stored, strict=True)}
    assert runs.promote("study", THREE[1:], rows) == 2
    assert reference.read_bytes() == stored[1] + stored[2] + stored[0]
    assert "study: 1 runs of the reference that are not in this grid stay in it" in capsys.readouterr().out


@pytest.mark.parametrize("scale", ["gpu", "paper"])
def test_another_scale_is_promoted_apart_from_the_cpu_reference_and_read_apart(checkout, stored, scale):
    reference, apart = (checkout / "data" / "runs" / part / "study.jsonl" for part in (".", scale))
    reference.write_bytes(stored[0])
    rows = {key: json.loads(line) for key, line in zip(keys(THREE), stored, strict=True)}
    assert runs.promote("study", THREE[1:], rows, scale) == 2
    assert reference.read_bytes() == stored[0] and apart.read_bytes() == stored[1] + stored[2]
    assert runs.promote("study", THREE[:1], rows) == 1
    assert apart.read_bytes() == stored[1] + stored[2]
    assert [*runs.load(runs.locate("study"))] == keys(THREE[:1])
    assert [*runs.load(runs.locate("study", scale))] == keys(THREE[1:])
    runs.ensure(THREE[1:], runs.locate("study", scale), executor=Untouched())


def test_the_quick_scale_has_no_reference_and_every_scale_has_its_place(checkout, stored):
    (checkout / "data" / "runs" / "study.jsonl").write_bytes(stored[0])
    assert runs.load(runs.locate("study", "quick")) == {}
    with pytest.raises(ValueError, match="scale 'quick' has no reference: choose cpu, gpu or paper"):
        runs.promote("study", THREE[:1], runs.load(runs.locate("study")), "quick")
    with pytest.raises(ValueError, match="unknown scale 'fast': choose quick, cpu, gpu or paper"):
        runs.locate("study", "fast")
    assert (*files.REFERENCES,) == studies.SCALES


def test_a_linked_reference_is_promoted_where_it_lies(checkout, stored):
    reference, real = checkout / "data" / "runs" / "study.jsonl", checkout / "elsewhere.jsonl"
    reference.symlink_to(real)
    rows = {key: json.loads(line) for key, line in zip(keys(THREE), stored, strict=True)}
    runs.promote("study", THREE, rows)
    assert reference.is_symlink() and real.read_bytes() == b"".join(stored)


def test_an_incomplete_grid_is_not_promoted_and_the_reference_stays(checkout, stored):
    source, reference = checkout / "source.jsonl", checkout / "data" / "runs" / "study.jsonl"
    source.write_bytes(stored[0])
    reference.write_bytes(stored[1])
    with pytest.raises(MissingRuns, match=r"2 of the 3 runs of 'study' are missing"):
        runs.promote("study", THREE, runs.read(source))
    assert reference.read_bytes() == stored[1]


def test_a_promotion_that_cannot_be_written_leaves_the_reference_as_it_was(checkout, stored, monkeypatch):
    source, reference = checkout / "source.jsonl", checkout / "data" / "runs" / "study.jsonl"
    source.write_bytes(b"".join(stored))
    reference.write_bytes(stored[1])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left .*the reference is as it was"):
        runs.promote("study", THREE, runs.read(source))
    assert reference.read_bytes() == stored[1]
    assert list(reference.parent.iterdir()) == [reference]


# safety

UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", sorted(Path(runs.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_nothing_in_the_package_unpickles_or_evaluates_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found = {name.split(".")[0] for name in names} & UNPICKLERS
            assert not found, f"{path.name} line {node.lineno}: import {found}"
        if isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert name not in ("eval", "exec", "pd.read_pickle"), f"{path.name} line {node.lineno}: {name}"
            assert name != "torch.load" or options.get("weights_only") == "True", f"{path.name} line {node.lineno}"
            assert options.get("allow_pickle") != "True", f"{path.name} line {node.lineno}: {name}"


@pytest.mark.parametrize("changes", [dict(status="diverged"), dict(stop_step=3), dict(reason="loss is not finite"),
                                     dict(status="diverged", stop_step=3)])
def test_a_diverged_run_has_a_step_and_a_reason_and_another_neither(changes):
    row = runs.to_row(runs.train_run(TINY), "cpu") | changes
    with pytest.raises(ValueError, match="a diverged run has both, another neither"):
        files.check_row(row)


def test_a_blank_line_in_a_store_is_no_run(tmp_path):
    path = tmp_path / "x.jsonl"
    runs.ensure([TINY], Store(path), executor=Serial())
    path.write_bytes(path.read_bytes() + b"\n")
    assert list(files.read(path)) == [run_key(TINY)]
