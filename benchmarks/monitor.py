"""Measure what the monitor adds to training, as ratios from one run.

A step is forward, backward, clipping, AdamW and fetching the loss, of our decoder and of transformers' LLaMA with
grouped queries, both with 4 layers on 2048 tokens. Three sides: without a monitor, at its default schedule (every 50
steps), and read at every step.

The sides take turns step by step, each on a model of its own, so that a slow moment of the machine hits all. What is
reported: milliseconds of a step without; in percent of it, what a step adds that is not read (loss and gradient norm,
as every step has), what one adds that is read, and from these two the default schedule, all as medians over steps; and
the default schedule as measured, the sum over all steps against that without. Needs an idle machine.
`python benchmarks/monitor.py` writes benchmarks/monitor.md and prints it; `--quick` only prints, at small widths.
"""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from stability_lib import models
from stability_lib.config import RunConfig
from stability_lib.monitor import StabilityMonitor

VOCABULARY, BATCH, LENGTH, LAYERS = 256, 16, 128, 4
SIDES = {"without": None, "default": {}, "every": {"every": 1}}


def ours(width: int) -> nn.Module:
    return models.build(RunConfig(d_model=width, n_layers=LAYERS, n_heads=width // 32, seq_len=LENGTH), VOCABULARY)


def llama(width: int) -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, use_cache=False))
    return model.train()


def stepper(build, width: int, settings: dict | None):
    """A function that takes one training step."""
    torch.manual_seed(0)
    model = build(width)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    monitor = None if settings is None else StabilityMonitor(model, alarms=(), log=lambda row, step: None, **settings)

    def step():
        batch = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
        logits = model(batch[:, :-1])
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if monitor:
            monitor.step(loss)
        optimizer.step()
        loss.item()
    return step


def row(build, width: int, steps: int) -> str:
    sides = {name: stepper(build, width, settings) for name, settings in SIDES.items()}
    taken = {name: [] for name in SIDES}
    for i in range(steps + 1):  # the first, which is read, warms up
        for name in list(SIDES)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            taken[name].append(time.perf_counter() - start)
    taken = {name: seconds[1:] for name, seconds in taken.items()}
    read = [50 * n - 1 for n in range(1, steps // 50 + 1)]  # their places, with the first step gone

    def added(side: str, places) -> float:
        return 100 * statistics.median(taken[side][i] / taken["without"][i] - 1 for i in places)

    plain, full = added("default", [i for i in range(steps) if i not in read]), added("every", range(steps))
    whole = 100 * (sum(taken["default"]) / sum(taken["without"]) - 1)
    alone = 1000 * statistics.median(taken["without"])
    return (f"| {build.__name__} | {width} | {alone:.0f} | {plain:.1f} | {full:.0f} | "
            f"{plain + (full - plain) / 50:.1f} | {whole:.1f} | {steps} |")


def main() -> None:
    quick = "--quick" in sys.argv
    widths, steps = ((64,), 50) if quick else ((64, 128, 256), 100)
    text = "\n".join([
        "# What the monitor adds to training", "",
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        "Written by `benchmarks/monitor.py`, which says what is measured. Additions are in percent of the step. The "
        "goal is below 5 at the default schedule.", "",
        "| model | D | step without, ms | not read, % | read, % | default schedule, % | default measured, % | steps |",
        "|" + "---|" * 8,
        *(row(build, width, steps) for build in (ours, llama) for width in widths), ""])
    if not quick:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
