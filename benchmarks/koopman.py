"""Measure the spectral profile against PyDMD on the same data, as ratios from one run.

1. eigenvalues: PyDMD's `DMD(svd_rank=-1).fit(X, Y).eigs` over our `eigenvalues`, and over a layer's whole profile with
   kappa (Kreiss constants apart). PyDMD's fit also makes modes and amplitudes, so the ratio to its operator step alone
   (SVD, A and its eigenvectors) is listed beside it.
2. Kreiss: seconds of the search on one layer.
3. model: seconds and peak memory of the profile of a GPT-2 with 12 layers, D=768, N=2048, from random weights, and
   the seconds of one layer at a time.

Rounds alternate between the sides so that a slow moment of the machine hits all; a ratio is the median over rounds
with the lowest and highest. Needs `pip install pydmd` and an idle machine. `python benchmarks/koopman.py` writes
benchmarks/koopman.md and prints it; `--quick` only prints, at D=64 and 128 and for a small model.
"""

import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pydmd import DMD
from transformers import GPT2Config, GPT2LMHeadModel

from stability_lib import koopman


def states(width: int, n: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Centred states X and Y = X + X B + noise [N, D], as of a residual layer."""
    rng = np.random.default_rng(width)
    x = rng.normal(size=(n, width))
    y = x + x @ rng.normal(size=(width, width)) / np.sqrt(width) + 0.3 * rng.normal(size=x.shape)
    return x - x.mean(0), y - y.mean(0)


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(width: int, rounds: int) -> str:
    """One row: seconds of each side, then PyDMD's over ours."""
    x, y = states(width)
    sides = {"fit": lambda: DMD(svd_rank=-1).fit(x.T, y.T).eigs,
             "operator": lambda: DMD(svd_rank=-1).operator.compute_operator(x.T, y.T),
             "ours": lambda: koopman.eigenvalues(x, y),
             "layer": lambda: koopman.layer_profile(x, y, kreiss=False)}
    gap = np.abs(np.sort_complex(sides["fit"]()) - np.sort_complex(sides["ours"]())).max()
    taken = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            taken[name].append(seconds(sides[name]))

    def ratio(slow: str, fast: str) -> str:
        found = [a / b for a, b in zip(taken[slow], taken[fast], strict=True)]
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    medians = " | ".join(f"{statistics.median(taken[name]):.2f}" for name in sides)
    return (f"| {width} | {medians} | {ratio('fit', 'ours')} | {ratio('operator', 'ours')} | {ratio('fit', 'layer')} | "
            f"{ratio('operator', 'layer')} | {gap:.0e} |")


def kreiss_seconds(width: int) -> float:
    """Seconds of the search on A / rho of one random layer."""
    a = np.random.default_rng(0).normal(size=(width, width))
    a /= np.abs(np.linalg.eigvals(a)).max()
    return seconds(lambda: koopman.kreiss_constant(a))


def whole_model(width: int, layers: int, rounds: int) -> tuple[str, int]:
    """Seconds to profile a GPT-2 with layers side by side and one at a time, in words, and by how many MB the process's
    peak memory rose."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, bos_token_id=0,
                                       eos_token_id=0))
    tokens = torch.randint(model.config.vocab_size, (32, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = {koopman.AT_ONCE: [], 0: []}  # bytes that layers side by side may take
    for i in range(rounds):
        for koopman.AT_ONCE in list(taken)[:: -1 if i % 2 else 1]:
            taken[koopman.AT_ONCE].append(seconds(lambda: koopman.profile(model, {"input_ids": tokens}, kreiss=False)))
    koopman.AT_ONCE, _ = taken
    together, alone = taken.values()
    gain = [b / a for a, b in zip(together, alone, strict=True)]
    return (f"{statistics.median(together):.1f} s, one layer at a time {statistics.median(alone):.1f} s (ratio "
            f"{statistics.median(gain):.2f}, {min(gain):.2f} to {max(gain):.2f})",
            (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def main() -> None:
    quick = "--quick" in sys.argv
    model = (128, 3, 3) if quick else (768, 12, 3)
    taken, rise = whole_model(*model)  # first: peak memory only grows
    rows = [compare(width, rounds) for width, rounds in ([(64, 3), (128, 3)] if quick else
                                                         [(256, 25), (768, 7), (1024, 7)])]
    kreiss = {width: kreiss_seconds(width) for width in ((64, 128) if quick else (128, 256, 768))}
    text = "\n".join([
        "# Spectral profile against PyDMD", "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, N = 2048, float64. "
        "Seconds are medians; ratios are PyDMD's time over ours, median (lowest to highest) over rounds.", "",
        "| D | PyDMD fit, s | its operator, s | eigenvalues, s | layer with kappa, s | fit / eigenvalues | "
        "operator / eigenvalues | fit / layer | operator / layer | largest difference |", "|" + "---|" * 10, *rows, "",
        f"A GPT-2 with {model[1]} layers of D = {model[0]}, 2048 token states, Kreiss constants apart: {taken}, "
        f"peak memory {rise} MB above the model.", "",
        "Kreiss search on one layer: " + ", ".join(f"D = {d} {s:.1f} s" for d, s in kreiss.items()) + ".", ""])
    if not quick:
        Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
