"""A Dask cluster whose workers train the runs that `runs.ensure` lacks: found, held against what the runs need, lent.

Dask is the extra `cluster`, imported only where a cluster is named.
"""

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterable, Iterator

from . import __version__
from .config import RunConfig
from .store import StoreError
from .train import prepare, resolve_device

CLUSTER = "STABILITY_LIB_CLUSTER"
"""The environment variable with the cluster of every notebook (`--cluster` of the batch runner sets it)."""
TIMEOUT = 10.0
"""Seconds in which a scheduler must answer."""


class ClusterError(RuntimeError):
    """A cluster cannot be reached or cannot serve; the message names scheduler or worker and the remedy."""


def check_name(cluster: str) -> int:
    """Of `local:4` the number of worker processes to start here, of a scheduler's address such as `tcp://host:8786` 0.

    Raises `TypeError` or `ValueError` where it is neither, `ClusterError` where Dask is not installed.
    """
    if not isinstance(cluster, str):
        raise TypeError(f"cluster must be a string, got {type(cluster).__name__} {cluster!r:.80}: give the scheduler's "
                        "address, as client.scheduler.address holds it")
    local = re.fullmatch(r"local:([1-9]\d{0,3})", cluster)
    if not local and not re.fullmatch(r"\w+://\S+:\d+", cluster):
        raise ValueError(f"cluster {cluster!r} is none: write tcp://HOST:8786, or local:4 for four processes here")
    if importlib.util.find_spec("distributed") is None:
        raise ClusterError(f"cluster {cluster!r} needs Dask: run `python -m pip install 'stability_lib[cluster]'`")
    return int(local[1]) if local else 0


@contextlib.contextmanager
def lend(cluster: str, configs: Iterable[RunConfig], device: str) -> Iterator[
        tuple[concurrent.futures.Executor, str, int]]:
    """An executor on a cluster (see `check_name`) that can train all `configs`, the device, and the number of workers.

    Raises `ClusterError` where the cluster does not answer, a worker cannot serve (see `check_workers`) or, while it
    is lent, the scheduler is lost.
    """
    with _connect(cluster) as client:
        device = check_workers(client, configs, device)
        try:
            yield client.get_executor(), device, len(client.nthreads())
        except StoreError:
            raise
        except Exception as error:
            if client.status == "running" and not isinstance(error.__cause__, concurrent.futures.CancelledError):
                raise
            raise ClusterError(f"the scheduler of cluster {cluster!r} is gone or was started again; finished runs are "
                               "kept: see that it runs and call again") from error


@contextlib.contextmanager
def share(cluster: str, device: str) -> Iterator[str]:
    """The address under which other processes find this cluster, its workers checked; of no cluster ("") none.

    Processes of `local:4` run until this is closed.
    """
    if not cluster:
        yield ""
        return
    with _connect(cluster) as client:
        check_workers(client, (), device)
        yield client.scheduler.address


@contextlib.contextmanager
def _connect(cluster: str):
    processes = check_name(cluster)
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        there = cluster if not processes else stack.enter_context(LocalCluster(
            n_workers=processes, threads_per_worker=1, processes=True, dashboard_address=None,
            preload="import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"))  # Ctrl-C is for this process alone
        try:
            client = stack.enter_context(Client(there, timeout=TIMEOUT, set_as_default=False))
        except (OSError, ValueError) as error:  # ValueError: no such protocol
            raise ClusterError(f"no scheduler answers as cluster {cluster!r} ({error}): start one with `dask "
                               "scheduler`, or mend the address") from error
        yield client


def check_workers(client, configs: Iterable[RunConfig], device: str) -> str:
    """Ask every worker of a Dask client for its version, device and data; returns the device (of `auto`, theirs).

    Raises `ClusterError` that names the first worker which cannot train all `configs`, and says why.
    """
    for worker, version in _ask(client, pkgutil.resolve_name, f"{__package__}:__version__").items():
        check_version(f"the worker {worker}", version)
    devices = _ask(client, _serve, list(configs), device)
    for worker, answer in devices.items():
        if isinstance(answer, Exception):
            raise ClusterError(f"the worker {worker} cannot train these runs ({type(answer).__name__}): "
                               f"{answer}") from answer
    found = {name: worker for worker, name in devices.items()}
    if len(found) > 1:
        raise ClusterError("the workers' devices differ: " + ", ".join(f"{name} on {worker}" for name, worker in
                           found.items()) + f": choose device {' or '.join(found)} instead of {device}")
    return next(iter(found))


def _ask(client, function, *arguments) -> dict[str, object]:
    """By worker the answer, or the exception raised there; without those that left meanwhile."""
    answers = client.run(function, *arguments, on_error="return")
    there = client.nthreads()
    answers = {worker: answer for worker, answer in answers.items() if worker in there}
    if not answers:
        address = client.scheduler.address
        raise ClusterError(f"the cluster {address} has no workers: start some with `dask worker --nthreads 1 "
                           f"{address}`, or wait until their jobs run")
    return answers


async def _serve(configs: list[RunConfig], device: str) -> str:
    """Runs on a worker: the device it would train on. In a thread, as loading a text would keep the worker from
    answering its scheduler."""
    def serve() -> str:
        found = resolve_device(device)
        for config in configs:
            prepare(config, found)
        return found
    return await asyncio.to_thread(serve)


def check_version(who: str, version: object) -> None:
    """Raise `ClusterError` unless `version`, what `who` calls its stability_lib or the error that came instead, is
    this one."""
    if isinstance(version, Exception):
        raise ClusterError(f"{who} cannot import stability_lib ({version}): install version {__version__} there")
    if version != __version__:
        raise ClusterError(f"{who} runs stability_lib {version} and this process {__version__}: install {__version__} "
                           "there")
