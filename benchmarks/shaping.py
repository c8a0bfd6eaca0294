"""Measure what Koopman Spectral Shaping adds to a training step, as ratios from one run.

1. step: time of ten AdamW steps (forward, backward, clipping, update) with KSS over ten without, of our decoder with
   2 layers on 2048 tokens, at the paper's schedule (every 10 steps) and applied at every step; half the layers, rank 32
   and 2048 snapshots in both.
2. parts: milliseconds that one layer's penalty takes, for the directions, the eigenvalues and the gradient back to
   the layer's states.

The sides take turns step by step, each on a model of its own, so that a slow moment of the machine hits all; a ratio is
the median over rounds of ten steps with the lowest and highest. Needs an idle machine. `python benchmarks/shaping.py`
writes benchmarks/shaping.md and prints it; `--quick` only prints, at small widths.
"""

import itertools
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from stability_lib import models, optim
from stability_lib.config import RunConfig
from stability_lib.shaping import KSS, Settings, directions, eigenvalues, spectrum_penalty
from stability_lib.train import loss_terms

VOCABULARY, STEPS = 256, 10
SIDES = {"without": None, "schedule": Settings(), "every": Settings(every=1)}


def stepper(width: int, settings: Settings | None):
    """A function that takes one training step."""
    config = RunConfig(d_model=width, n_layers=2, n_heads=width // 32, seq_len=128, batch_size=16, norm="no_norm",
                       qk_norm="none", positions="learned", biases=True, init="gpt2", lr=1e-4)
    model = models.build(config, VOCABULARY)
    optimizer, kss = optim.build(model, config), KSS(model, settings) if settings else None

    def step():
        batch = torch.randint(VOCABULARY, (config.batch_size, config.seq_len + 1))
        loss, objective = loss_terms(model(batch[:, :-1]), batch[:, 1:], config.z_loss)
        if kss:
            objective = objective + kss.penalty()
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()
        if kss:
            kss.step()
    return step


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def overheads(width: int, rounds: int) -> str:
    """One row: milliseconds of a step without, then in percent what each schedule adds."""
    steps = {name: stepper(width, settings) for name, settings in SIDES.items()}
    for step in steps.values():  # warm up
        step()
    taken = {name: [0.0] * rounds for name in SIDES}
    for i in range(rounds * STEPS):
        for name in list(SIDES)[:: 1 if i % 2 else -1]:
            taken[name][i // STEPS] += seconds(steps[name])

    def added(name: str) -> str:
        found = [100 * (a / b - 1) for a, b in zip(taken[name], taken["without"], strict=True)]
        return f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"

    return (f"| {width} | {1000 * statistics.median(taken['without']) / STEPS:.0f} | {added('schedule')} | "
            f"{added('every')} | {rounds} |")


def parts(width: int, rounds: int) -> str:
    """One row: milliseconds of one layer's penalty by part."""
    x, y = (states.requires_grad_() for states in torch.randn(2, 2048, width).unbind())
    settings, generator, taken = Settings(), torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        marks = [time.perf_counter()]
        basis = directions(x, settings, generator)
        marks.append(time.perf_counter())
        penalty = spectrum_penalty(eigenvalues(x, y, basis), settings)
        marks.append(time.perf_counter())
        penalty.backward()
        marks.append(time.perf_counter())
        taken.append([1000 * (b - a) for a, b in itertools.pairwise(marks)])
    return f"| {width} | " + " | ".join(f"{statistics.median(part):.1f}" for part in zip(*taken, strict=True)) + " |"


def main() -> None:
    quick = "--quick" in sys.argv
    torch.manual_seed(0)
    widths = (64, 128) if quick else (128, 256, 512, 768)
    rounds = {width: 2 if quick else 6 if width < 512 else 3 for width in widths}
    text = "\n".join([
        "# What KSS adds to a training step", "",
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        "Written by `benchmarks/shaping.py`, which says what is measured. Additions are in percent of the step: "
        "median (lowest to highest) over rounds of ten steps. The goals are below 5 and 15; the paper reports 10.8 at "
        "its schedule.", "",
        "| D | step without, ms | added every 10 steps, % | added at every step, % | rounds |", "|" + "---|" * 5,
        *(overheads(width, n) for width, n in rounds.items()), "",
        "One layer's penalty, ms:", "",
        "| D | directions | eigenvalues | gradient |", "|" + "---|" * 4, *(parts(width, 15) for width in widths), ""])
    if not quick:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
