"""Runs per hour of 1 to 64 replicas trained together, against the same runs one at a time.

A run is 1000 steps, drawing its batches included, probes and validation aside. `times` is its rate over that of one
run at a time in the same shape and precision. The last column is what the FLOPs of `models.training_flops` come to,
in percent of the rate of a large matrix product in the same precision. `compiled`: with `torch.compile` around the
forward pass, which `ensure` does not use; compiling itself is not counted.

`python benchmarks/replicas.py [--device cuda] [--quick] [--seconds 200] [--out FILE]` writes benchmarks/replicas.md
and prints it. It takes about as long as `--seconds` says: what there is no time for is left out, and it says so.
`--quick` is for the CPU. Goals on an H100: 20 times at d <= 128, and 25 percent at d = 512 in bf16.
"""

import argparse
import itertools
import os
import platform
import time
from pathlib import Path

import torch

from stability_lib import data, models, studies, train
from stability_lib.config import RunConfig, replace
from stability_lib.replicas import Replicas

STEPS = 1000
SHAPES = {32: studies.size(32, 2), 64: studies.size(64, 3), 128: studies.size(128, 4, 32),
          256: studies.size(256, 6, 32), 512: studies.size(512, 8, 64)}


def cases(quick: bool) -> list[tuple[int, str, int, bool]]:
    """(d, precision, how many together or 0 for one at a time, compiled), what matters most first."""
    if quick:
        return [(d, "fp32", n, False) for d in (32, 64, 128) for n in (0, 1, 4, 16)] + [(32, "fp32", 4, True)]
    eager = [(d, precision, n, False) for precision in ("bf16", "fp32") for d in (128, 512, 32, 64, 256)
             for n in (0, 1, 4, 16, 64)]
    eager.sort(key=lambda case: case[0] * case[2] > 128 * 64)  # whose models alone take long to initialise
    return [*eager[:14], *((d, "bf16", 16, True) for d in (32, 512)), *eager[14:]]


def step_seconds(config: RunConfig, n: int, compiled: bool, device: str) -> float:
    """Of a training step of `n` replicas together, of a single run where `n` is 0: the fastest of three rounds, as
    others may use the machine."""
    vocab = data.vocab_size(config)
    learner = Replicas([replace(config, seed=i) for i in range(n)], vocab, device) if n else train.Single(
        config, vocab, device)
    if compiled:
        learner.losses = torch.compile(learner.losses, dynamic=False)
    step = itertools.count()

    def seconds(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            train.take_step(learner, next(step), learner.draw())
        if device != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - started) / steps

    seconds(2)
    steps = max(1, min(30, int(0.3 / seconds(1))))
    return min(seconds(steps) for _ in range(3))


def matrix_rate(precision: str, device: str) -> float:
    """FLOP/s of the product of two large square matrices."""
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    taken = []
    for _ in range(8):
        started = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / min(taken)


def table(device: str, quick: bool, limit: float) -> list[str]:
    rows, left_out, alone, rates = [], 0, {}, {}
    base = RunConfig(steps=STEPS, warmup_steps=50, probe_every=0, lr=1e-3, seq_len=64 if device == "cpu" else 256)
    started = time.perf_counter()
    for d, precision, n, compiled in cases(quick):
        if time.perf_counter() - started > limit:
            left_out += 1
            continue
        config = replace(base, precision=precision, **SHAPES[d])
        if precision not in rates:
            rates[precision] = matrix_rate(precision, device)
        name = f"| {d} | {precision} | {n or 'one at a time'} | {'compiled' if compiled else 'eager'} |"
        try:
            seconds = step_seconds(config, n, compiled, device) / max(1, n)
        except torch.OutOfMemoryError:
            rows.append(f"{name} out of memory | | |")
            continue
        except RuntimeError as error:
            if not compiled:
                raise
            rows.append(f"{name} does not compile: {type(error).__name__} | | |")
            continue
        if not n:
            alone[d, precision] = seconds
        flops = models.training_flops(config, data.vocab_size(config)) / STEPS / seconds
        times = alone[d, precision] / seconds if (d, precision) in alone else float("nan")
        rows.append(f"{name} {3600 / STEPS / seconds:.0f} | {times:.2f} | {100 * flops / rates[precision]:.1f} |")
        print(rows[-1], flush=True)
    measured = ", ".join(f"{precision} {rate / 1e12:.3g} TFLOP/s" for precision, rate in rates.items())
    short = f" Left out for want of time: {left_out} rows." if left_out else ""
    return [f"Batches of {base.batch_size} x {base.seq_len} tokens. Matrix products: {measured}.{short}", "",
            "| d | precision | together | how | runs per hour | times | % of the matrix rate |", "|" + "---|" * 7,
            *rows]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--device", default="auto", choices=train.DEVICES)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--seconds", type=float, default=200.0)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    given = options.parse_args()
    device = train.resolve_device(given.device)
    machine = (torch.cuda.get_device_name() if device == "cuda" else
               f"{device} ({platform.machine()}, {os.cpu_count()} cores, one thread). No GPU was measured: what this "
               "says holds for a CPU only")
    with train.alone(device, 1):
        lines = table(device, given.quick, given.seconds)
    text = "\n".join(["# Replicas", "", f"{machine}. torch {torch.__version__}. Written by `benchmarks/replicas.py`, "
                      "which says what is measured.", "", *lines, ""])
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
