"""The Kreiss constant of a matrix: how far its powers can grow before they decay."""

import math

import numpy as np
from scipy import linalg, ndimage, optimize
from scipy.sparse.linalg import LinearOperator, eigsh

RHO_TOLERANCE = 1e-8
"""For the Kreiss constant a spectral radius above 1 by no more than this is 1: a rotation fitted to data has one."""


def kreiss_constant(a_MxM: np.ndarray) -> float:
    """K(A) = sup over |z| > 1 of (|z| - 1) ||(zI - A)^-1|| (eq. 29), with 1 <= K(A) <= sup_n ||A^n|| <= e M K(A).

    Infinite where the spectral radius is above 1; A / rho has a finite one there. 1 where ||A|| <= 1. Else a grid, even
    in angle and in log(|z| - 1) plus the angles of the 32 largest eigenvalues, is ranked on the Schur form and its five
    highest peaks are climbed, each to 1e-6 relative: a lower bound where the grid misses a higher one. |z| - 1 goes
    from 1e-6, where a defective eigenvalue on the circle gives 1e5 or more for infinity, to 1000 ||A||; from there
    on the function is below 1.001.
    """
    a_MxM = np.asarray(a_MxM)
    schur = linalg.rsf2csf(*linalg.schur(a_MxM))[0]
    values, norm, m = schur.diagonal().copy(), np.linalg.norm(a_MxM, 2), len(schur)
    if np.abs(values).max() > 1 + RHO_TOLERANCE:
        return math.inf
    if norm <= 1 + 1e-12:
        return 1.0
    shifted = np.asfortranarray(-schur)  # zI - T, its diagonal set for each z
    start = np.random.default_rng(0).normal(size=(m, 2)) @ [1, 1j]

    def shift(angle: float, distance: float) -> complex:
        turn = complex(math.cos(angle), math.sin(angle))
        np.fill_diagonal(shifted, (1 + distance) * turn - values)
        return turn

    def solve(v: np.ndarray, adjoint: bool = False) -> np.ndarray:
        return linalg.lapack.ztrtrs(shifted, v, trans=2 * adjoint)[0]

    def rank(angle: float, log: float) -> float:
        """A lower bound of log (|z| - 1) ||(zI - T)^-1||, by three power steps."""
        shift(angle, math.exp(log))
        v = start
        for _ in range(3):
            v = solve(solve(v / np.linalg.norm(v)), adjoint=True)
        return log + math.log(np.linalg.norm(v)) / 2

    def height(point: np.ndarray) -> tuple[float, np.ndarray]:
        """-log (|z| - 1) ||(zI - T)^-1|| and its gradient, from the largest singular pair of the resolvent."""
        distance = math.exp(point[1])
        turn = shift(point[0], distance)
        if m <= 32:
            v = np.linalg.svd(shifted)[0][:, -1]
        else:
            gram = LinearOperator((m, m), lambda v: solve(solve(v), adjoint=True), dtype=complex)
            v = eigsh(gram, k=1, v0=start, tol=1e-10)[1][:, 0]
        u = solve(v)
        slope = np.vdot(v, u) * turn
        return (-math.log(distance * np.linalg.norm(u)),
                np.array([-((1 + distance) * slope).imag, distance * slope.real - 1]))

    angles, logs = _angles(values, np.isrealobj(a_MxM)), np.linspace(math.log(1e-6), math.log(1e3 * norm), 16)
    grid = np.array([[rank(angle, log) for log in logs] for angle in angles])
    peaks = np.argwhere(grid == ndimage.maximum_filter(grid, 3, mode="nearest"))
    best = 1.0
    for i, j in sorted(peaks, key=lambda peak: -grid[tuple(peak)])[:5]:
        # a step off the real axis, where the slope across it is zero by symmetry also at a saddle
        top = optimize.minimize(height, (angles[i] + min(math.exp(logs[j]), 0.2) / 10, logs[j]), jac=True,
                                method="L-BFGS-B", bounds=((None, None), (logs[0], logs[-1])),
                                options={"ftol": 1e-13, "gtol": 1e-8})
        best = max(best, math.exp(-top.fun))
    return best


def _angles(values: np.ndarray, even: bool) -> np.ndarray:
    """Of the grid of `kreiss_constant`; half of them where the resolvent norm is even, as that of a real matrix is."""
    half = 1 if even else 2
    largest = np.angle(values[np.argsort(-np.abs(values))[: 32 * half]])
    return np.unique([*np.linspace(0, half * math.pi, 24 * half + 1), *(abs(largest) if even else largest)])
