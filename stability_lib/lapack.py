"""LAPACK for profiles: an eigenvalue solver that lets other threads run, and layers analysed side by side.

LAPACK's solver for unsymmetric matrices keeps one core busy however many there are, so several layers at once, each on
one thread, are faster than one layer on all.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import linalg
from scipy.linalg import cython_lapack
from threadpoolctl import ThreadpoolController

_LOCK, _INSIDE = threading.Lock(), []


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """numpy's and scipy's BLAS on one thread from when the first enters until the last leaves: the limit is the
    process's, so threads that each set and restored it would leave it as another had set it."""
    with _LOCK:
        _INSIDE.append(_blas().limit(limits=1, user_api="blas") if not _INSIDE else _INSIDE[0])
    try:
        yield
    finally:
        with _LOCK:
            limit = _INSIDE.pop()
            if not _INSIDE:
                limit.restore_original_limits()


def at_once(tasks: Sequence[Callable]) -> Iterator:
    """What the tasks return, in their order; several run side by side, each on one thread of BLAS and of torch.

    When all have ended, and limits of threads are what they were, comes what the first returned, up to the first that
    raised something, which is raised.
    """
    if len(tasks) < 2:
        yield from (task() for task in tasks)
        return
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # new threads begin with it
        with one_thread(), ThreadPoolExecutor(len(tasks)) as pool:
            futures = [pool.submit(task) for task in tasks]
    finally:
        torch.set_num_threads(threads)
    yield from (future.result() for future in futures)


def eig(a_MxM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """`scipy.linalg.lapack.dgeev` in as much memory as LAPACK likes best, and without the interpreter's lock, which
    that one holds: eigenvalues' real and imaginary parts [M], left and right eigenvectors [M, M] as LAPACK packs them,
    and its `info`."""
    m = len(a_MxM)
    a_MxM = np.array(a_MxM, dtype=np.float64, order="F")  # overwritten
    work = np.empty(int(linalg.lapack.dgeev_lwork(m)[0]))  # least is 4 M, which takes a fifth longer at M = 768
    real, imaginary, left, right = np.empty(m), np.empty(m), np.empty((m, m), order="F"), np.empty((m, m), order="F")
    size, length, info = ctypes.c_int(m), ctypes.c_int(len(work)), ctypes.c_int()
    at = lambda array: array.ctypes.data  # noqa: E731
    _dgeev()(b"V", b"V", ctypes.byref(size), at(a_MxM), ctypes.byref(size), at(real), at(imaginary), at(left),
             ctypes.byref(size), at(right), ctypes.byref(size), at(work), ctypes.byref(length), ctypes.byref(info))
    return real, imaginary, left, right, info.value


@functools.cache
def _blas() -> ThreadpoolController:
    """Of the libraries loaded by now; made once, as finding them takes longer than an eigenvalue."""
    return ThreadpoolController()


@functools.cache
def _dgeev() -> Callable:
    """LAPACK's routine in scipy, where Cython finds it; ctypes lets go of the interpreter's lock during a call."""
    capsule, api = cython_lapack.__pyx_capi__["dgeev"], ctypes.pythonapi
    name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    letter, other = ctypes.c_char_p, ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, letter, letter, *12 * [other])(pointer(capsule, name(capsule)))
