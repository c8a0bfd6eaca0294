"""Sweeps on a Dask cluster: what dies loses no finished run, and what cannot serve says so before any training."""

import ast
import contextlib
import importlib
import os
import re
import signal
import sys
import threading
import weakref

import psutil
import pytest
from sweeps import SWEEP, THREE, TINY, Serial, Untouched, alive, has_runs, keys, keys_in, wait_until

from stability_lib import __main__, __version__, batch, cluster, runs
from stability_lib.cluster import ClusterError
from stability_lib.config import replace
from stability_lib.runs import Store

pytestmark = [pytest.mark.usefixtures("no_progress_bar"), pytest.mark.filterwarnings("ignore")]
NOWHERE = "tcp://127.0.0.1:9"


# names

@pytest.mark.parametrize("name, processes", [("local:4", 4), ("local:12", 12), ("tcp://host:8786", 0),
                                             ("tls://[::1]:8786", 0)])
def test_a_cluster_is_a_number_of_processes_here_or_a_schedulers_address(name, processes):
    assert cluster.check_name(name) == processes


@pytest.mark.parametrize("name", ["local", "local:0", "local:-1", "local:two", "host:8786", "tcp://host", "tcp://:x",
                                  " local:2", "local:2\n"])
def test_another_name_is_refused_with_the_two_that_there_are(store, name):
    for refused in (lambda: runs.ensure(THREE, store, cluster=name), lambda: batch.Session(cluster=name)):
        with pytest.raises(ValueError, match=r"write tcp://HOST:8786, or local:4 for four"):
            refused()
    assert not store.local.exists()


def test_a_cluster_brings_its_own_workers(store):
    for more in (dict(workers=2), dict(executor=Untouched())):
        with pytest.raises(ValueError, match="leave out executor and workers"):
            runs.ensure(THREE, store, cluster="local:2", **more)
    with pytest.raises(TypeError, match=r"cluster must be a string, got Untouched .*client\.scheduler\.address"):
        runs.ensure(THREE, store, cluster=Untouched())


def test_without_dask_the_error_says_what_to_install(store, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "distributed" else find(name))
    with pytest.raises(ClusterError, match=r"`python -m pip install 'stability_lib\[cluster\]'`"):
        runs.ensure(THREE, store, cluster="local:2")
    assert __main__.main(["reproduce", "00", "--scale", "quick", "--cluster", NOWHERE]) == 2
    assert "pip install 'stability_lib[cluster]'" in capsys.readouterr().err


def test_a_session_takes_the_cluster_of_the_environment_and_its_devices_are_the_workers(monkeypatch):
    assert batch.Session().cluster == ""
    monkeypatch.setenv(cluster.CLUSTER, NOWHERE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert batch.Session(device="cuda") == batch.Session(device="cuda", cluster=NOWHERE)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        batch.Session(device="gpu")


def test_an_address_where_nothing_answers_is_an_error_within_seconds(store, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cluster, "TIMEOUT", 0.5)
    for name in (NOWHERE, "tcp://no.such.host.invalid:8786", "nope://127.0.0.1:9"):
        with pytest.raises(ClusterError, match=rf"no scheduler answers as cluster '{name}' .*mend the address"):
            runs.ensure(THREE, store, cluster=name)
    output = tmp_path / "reports"
    assert __main__.main(["reproduce", "00", "--cluster", NOWHERE, "--output", str(output)]) == 2
    assert f"no scheduler answers as cluster '{NOWHERE}'" in capsys.readouterr().err
    assert not [*output.glob("*")]


def test_where_all_is_cached_nobody_asks_the_cluster(store):
    runs.ensure(THREE, store, executor=Serial())
    assert len(runs.ensure(THREE, store, cluster=NOWHERE)) == 3


# workers

@pytest.fixture(scope="module")
def client():
    """Of a Dask cluster with two worker processes."""
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as two:
        with Client(two, set_as_default=False) as client:
            yield client


def address(client) -> str:
    return client.scheduler.address


@contextlib.contextmanager
def changed(client, worker: str, name: str, value):
    """Set what `name` ("module:attribute") stands for on one worker for a while."""
    def swap(name, value):
        owner, attribute = name.split(":")
        owner = importlib.import_module(owner)
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        return before

    before = client.run(swap, name, value, workers=[worker])[worker]
    try:
        yield
    finally:
        client.run(swap, name, before, workers=[worker])


def refused(client, store, message: str, **options):
    with pytest.raises(ClusterError, match=message):
        runs.ensure(THREE, store, cluster=address(client), **options)
    assert not store.local.exists()


@pytest.mark.slow
def test_a_worker_of_another_version_is_named_before_any_training(client, store):
    for worker in client.nthreads():
        with changed(client, worker, "stability_lib:__version__", "0.0.9"):
            refused(client, store, rf"the worker {worker} runs stability_lib 0\.0\.9 and this process "
                                   rf"{__version__}: install {__version__} there")


@pytest.mark.slow
def test_a_worker_without_the_library_is_named_before_any_training(client, store):
    worker = list(client.nthreads())[1]

    def hide():
        sys.modules["kept"], sys.modules["stability_lib"] = importlib.import_module("stability_lib"), None

    client.run(hide, workers=[worker])
    refused(client, store, rf"the worker {worker} cannot import stability_lib .*: install version {__version__}")
    client.run(lambda: sys.modules.update(stability_lib=sys.modules.pop("kept")), workers=[worker])


@pytest.mark.slow
def test_a_worker_without_the_corpus_is_named_before_any_training(client, store, tmp_path):
    worker = list(client.nthreads())[1]
    own = tmp_path / "own.txt"
    own.write_text("a text that one worker cannot find " * 50)
    with changed(client, worker, "os.path:expanduser", "/elsewhere/{}".format):
        with pytest.raises(ClusterError, match=rf"the worker {worker} cannot train these runs \(DataError\): the text "
                                               r"\S+ is gone: put it back"):
            runs.ensure([replace(TINY, data=str(own))], store, cluster=address(client))
    assert not store.local.exists()


@pytest.mark.slow
def test_a_worker_without_the_device_is_named_and_auto_is_what_all_have(client, store):
    first, second = client.nthreads()
    refused(client, store, rf"worker {first} cannot train .*device 'cuda' is not available here: choose auto or cpu",
            device="cuda")
    with changed(client, first, "torch.cuda:is_available", lambda: True):
        with pytest.raises(ClusterError, match=rf"the worker {second} cannot .* 'cuda' is not available"):
            cluster.check_workers(client, (), "cuda")
        with pytest.raises(ClusterError, match=rf"cuda on {first}, cpu on {second}: choose device cuda or cpu"):
            cluster.check_workers(client, (), "auto")
    assert cluster.check_workers(client, (), "auto") == "cpu"


@pytest.mark.slow
def test_a_cluster_gives_the_bits_of_this_process(client, store, tmp_path, capsys):
    here = runs.ensure(THREE, Store(tmp_path / "here.jsonl"), executor=Serial())
    there = runs.ensure(THREE, store, cluster=address(client), device="auto")
    assert f"training 3 on cpu, 2 workers of {address(client)}" in capsys.readouterr().out
    assert there["curves"].to_list() == here["curves"].to_list()
    assert there["device"].to_list() == ["cpu"] * 3


# what dies

def test_a_stored_run_is_not_held_any_longer_as_dask_trains_again_what_a_dead_worker_held(store, monkeypatch):
    held, alive = [], []

    class Watched(Serial):
        def submit(self, work, config, *more):
            future = super().submit(work, config, *more)
            held.append(weakref.ref(future))
            return future

    monkeypatch.setattr("stability_lib.store.os.fsync",
                        lambda file: alive.append(sum(future() is not None for future in held)))
    runs.ensure(THREE, store, executor=Watched())
    assert alive == [3, 2, 1]


@pytest.mark.slow
def test_a_worker_killed_in_mid_sweep_loses_nothing_and_is_replaced(client, store):
    before, killed = dict(client.nthreads()), []

    def kill_one():
        wait_until(lambda: has_runs(store), 120, "no run finished")
        killed.extend(client.run(os.getpid).items())
        os.kill(killed[0][1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    table = runs.ensure(SWEEP, store, cluster=address(client))
    killer.join()
    assert table["key"].to_list() == keys(SWEEP)
    assert sorted(keys_in(store.local)) == sorted(keys(SWEEP))
    wait_until(lambda: len(client.nthreads()) == 2, 60, "the worker was not replaced")
    assert killed[0][0] in before and set(client.run(os.getpid).values()) != {pid for _, pid in killed}


@pytest.mark.slow
def test_two_sweeps_at_once_on_one_cluster_both_get_all_their_rows(client, store, tmp_path, another_process):
    """Also of runs that both want: Dask must not answer the one with what it is about to cancel for the other."""
    other = Store(tmp_path / "other.jsonl")
    rival = another_process(f"""
        table = runs.ensure(SWEEP, Store({other.local!r}), cluster={address(client)!r})
        print("rows", table["key"].to_list() == keys(SWEEP))
    """)
    wait_until(lambda: has_runs(other), 120, rival.output)
    table = runs.ensure(SWEEP[3:] + THREE, store, cluster=address(client))
    assert table["key"].to_list() == keys(SWEEP[3:] + THREE)
    assert rival.wait(120) == 0 and "rows True" in rival.output()
    assert sorted(keys_in(other.local)) == sorted(keys(SWEEP))


@pytest.mark.slow
def test_the_schedulers_death_is_named_and_finished_runs_are_kept(store, monkeypatch, another_process):
    monkeypatch.setattr(cluster, "TIMEOUT", 2.0)
    scheduler = another_process("""
        from distributed import LocalCluster
        there = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
        print("at", there.scheduler_address, flush=True)
        sys.stdin.read()
    """)
    wait_until(lambda: "at tcp://" in scheduler.output(), 120, scheduler.output)
    name = re.search(r"at (\S+)", scheduler.output())[1]

    def kill():
        wait_until(lambda: has_runs(store), 120, "no run finished")
        scheduler.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    many = SWEEP + [replace(SWEEP[0], seed=seed) for seed in range(6, 40)]
    with pytest.raises(ClusterError, match=rf"the scheduler of cluster '{name}' is gone .*; finished runs are kept: .*"
                                           "call again"):
        runs.ensure(many, store, cluster=name)
    killer.join()
    finished = keys_in(store.local)
    assert 0 < len(finished) < len(many) and set(finished) <= set(keys(many))


@pytest.mark.slow
def test_a_cluster_serves_also_after_an_interrupt_and_remembers_no_run(client, store):
    def interrupt():
        wait_until(lambda: has_runs(store), 120, "no run finished")
        signal.raise_signal(signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    many = SWEEP + [replace(SWEEP[0], seed=seed) for seed in range(6, 40)]
    with pytest.raises(KeyboardInterrupt):
        runs.ensure(many, store, cluster=address(client))
    interrupter.join()
    assert 0 < len(keys_in(store.local)) < len(many)
    table = runs.ensure(SWEEP, store, cluster=address(client))
    assert table["key"].to_list() == keys(SWEEP)
    stored = len(keys_in(store.local))
    again = runs.ensure(SWEEP[:1], store, cluster=address(client), recompute=True)
    assert again["loss_final"].item() == table["loss_final"].iloc[0]
    assert len(keys_in(store.local)) == stored + 1


@pytest.mark.slow
def test_a_run_that_fails_on_a_worker_is_named_and_the_cluster_goes_on(client, store):
    first, second = client.nthreads()
    with changed(client, first, "stability_lib.train:train_runs", "no function"):
        with changed(client, second, "stability_lib.train:train_runs", "no function"):
            with pytest.raises(RuntimeError, match=r"the run \{.*\} failed with TypeError: 'str'") as caught:
                runs.ensure(THREE, store, cluster=address(client))
    assert not isinstance(caught.value, ClusterError)
    assert len(runs.ensure(THREE, store, cluster=address(client))) == 3


# processes here, and notebooks

def spawned(parent: int) -> set[psutil.Process]:
    """The worker processes that a process started."""
    found = set()
    for process in alive(psutil.Process(parent).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # also of a zombie
            if "spawn_main" in " ".join(process.cmdline()):
                found.add(process)
    return found


@pytest.mark.slow
def test_processes_here_serve_a_sweep_and_end_with_it(store):
    before = spawned(os.getpid())
    assert runs.ensure(THREE, store, cluster="local:2")["key"].to_list() == keys(THREE)
    wait_until(lambda: spawned(os.getpid()) <= before, 30, "workers are left")


@pytest.mark.slow
def test_ctrl_c_ends_processes_here_quietly_while_the_session_goes_on(store, another_process):
    process = another_process(f"""
        try:
            more = [replace(SWEEP[0], seed=seed) for seed in range(6, 60)]
            runs.ensure(SWEEP + more, Store({store.local!r}), cluster="local:2")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        sys.stdin.read()
    """)
    wait_until(lambda: has_runs(store), 120, process.output)
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: "interrupted" in process.output(), 30, process.output)
    wait_until(lambda: not spawned(process.pid), 30, process.output)
    assert 0 < len(keys_in(store.local)) < 60 and process.poll() is None
    assert "Traceback" not in process.output()


@pytest.mark.slow
def test_a_batch_starts_its_processes_once_and_its_notebooks_find_them(tmp_path, monkeypatch):
    import nbformat

    write = nbformat.v4
    source = ("from stability_lib.batch import Session; from stability_lib import runs; from sweeps import THREE\n"
              "session = Session(scale, device, recompute); print('at', session.cluster)\n"
              f"runs.ensure(THREE, runs.Store({str(tmp_path)!r} + '/' + scale + '.jsonl'), cluster=session.cluster)")
    for name in ("00_one", "01_two"):
        notebook = write.new_notebook(cells=[
            write.new_code_cell('scale = "quick"; device = "auto"; recompute = "missing"',
                                metadata={"tags": ["parameters"]}),
            write.new_code_cell(source)], metadata={"kernelspec": {
                "name": "python3", "display_name": "Python 3", "language": "python"}})
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
    paths = [tmp_path / "00_one.ipynb", tmp_path / "01_two.ipynb"]
    summary = batch.reproduce(paths, tmp_path / "out", {"device": "cpu"}, cluster="local:2")
    assert summary["error"].to_list() == ["", ""]
    outputs = [nbformat.read(tmp_path / "out" / path.name, as_version=4).cells[-1].outputs for path in paths]
    assert not [output for cell in outputs for output in cell if output.get("name") == "stderr"]
    printed = ["".join(output.get("text", "") for output in cell) for cell in outputs]
    found = {re.search(r"at (tcp://\S+)", text)[1] for text in printed}
    assert len(found) == 1 and "training 3 on cpu, 2 workers" in printed[0] and "all 3 runs are cached" in printed[1]
    assert cluster.CLUSTER not in os.environ


@pytest.mark.slow
def test_the_slurm_example_asks_for_one_worker_of_one_thread_and_one_gpu_a_job():
    from dask_jobqueue import SLURMCluster

    block = re.search(r"```python\n(.*?)```", (runs.project_root() / "docs" / "cluster.md").read_text(), re.S)[1]
    (call,) = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)
               and ast.unparse(node.func) == "SLURMCluster"]
    options = {option.arg: ast.literal_eval(option.value) for option in call.keywords}
    assert options.pop("scheduler_options") == {"port": 8786}
    with SLURMCluster(**options, scheduler_options={"port": 0, "dashboard_address": None}) as slurm:
        script = slurm.job_script()
    for line in ("#SBATCH -p gpu", "#SBATCH --gres=gpu:1", "#SBATCH --cpus-per-task=4", "#SBATCH -t 04:00:00"):
        assert line in script.splitlines()
    assert script.count("cpus-per-task") == 1 and f"{sys.executable} -m distributed.cli.dask_worker" in script
    assert "--nthreads 1" in script and "--nworkers" not in script
