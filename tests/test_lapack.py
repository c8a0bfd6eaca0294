"""The eigenvalue solver that lets others run, and tasks side by side that leave threads as they were."""

import sys
import threading
import time

import numpy as np
import pytest
import torch
from scipy import linalg
from threadpoolctl import ThreadpoolController

from stability_lib import lapack


def blas_threads() -> set[int]:
    return {library.num_threads for library in ThreadpoolController().lib_controllers if library.user_api == "blas"}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("m", [1, 2, 3, 40])
def test_eigenvectors_are_scipys_bit_for_bit(m):
    a = np.random.default_rng(m).normal(size=(m, m))
    kept, memory = a.copy(), int(linalg.lapack.dgeev_lwork(m)[0])
    for matrix in (a, a.T):
        for ours, theirs in zip(lapack.eig(matrix), linalg.lapack.dgeev(matrix, lwork=memory), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(a, kept)


def test_other_threads_run_while_eigenvectors_are_sought(monkeypatch):
    done, turns = threading.Event(), 0

    def others():
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0)  # hands the interpreter over, which nobody takes by force here

    a, before = np.random.default_rng(0).normal(size=(200, 200)), sys.getswitchinterval()
    lapack.eig(a)  # loads what it needs
    thread = threading.Thread(target=others)
    sys.setswitchinterval(60)
    try:
        thread.start()
        at_start = turns
        lapack.eig(a)
        assert turns > at_start + 1
    finally:
        done.set()
        sys.setswitchinterval(before)
        thread.join()


def test_tasks_have_one_thread_each_and_come_back_in_order(two_threads):
    both = threading.Barrier(2, timeout=60)  # so that they are side by side

    def task(name):
        both.wait()
        return name, torch.get_num_threads(), blas_threads()

    assert [*lapack.at_once([lambda: task("a"), lambda: task("b")])] == [("a", 1, {1}), ("b", 1, {1})]
    assert torch.get_num_threads() == 2 and blas_threads() == {2}
    assert [*lapack.at_once([lambda: (torch.get_num_threads(), blas_threads())])] == [(2, {2})]
    assert not [*lapack.at_once([])]


def test_an_error_is_the_first_tasks_and_leaves_threads_as_they_were(two_threads):
    ended = []

    def fails(number):
        with lapack.one_thread():
            ended.append(number)
            raise ValueError(number)

    results = lapack.at_once([lambda: ended.append(0), lambda: fails(1), lambda: fails(2)])
    assert next(results) is None
    with pytest.raises(ValueError, match="1"):
        next(results)
    assert sorted(ended) == [0, 1, 2]
    assert torch.get_num_threads() == 2 and blas_threads() == {2}


def test_the_limit_of_threads_lasts_until_the_last_has_left(two_threads):
    first, second = lapack.one_thread(), lapack.one_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas_threads() == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == {2}
