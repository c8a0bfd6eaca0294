"""Measure the training step, a sweep and the probes on this machine, as ratios from one run.

1. step: tokens per second of our training step over those of transformers' GPT-2 of the same shape, vocabulary and
   batch (scaled_dot_product_attention, no dropout, untied head, fused AdamW, clipping in both). GPT-2 has neither
   rotary positions nor qk-norm; both of ours are listed.
2. sweep: 14 runs through `ensure` (one-thread processes, their start included) over the same runs one after the
   other with all threads.
3. probes: time of a run with the default probe schedule over the same run without probes.

Rounds alternate between the two sides so that a slow moment of the machine hits both; a ratio is the median over
rounds with the lowest and highest. `python benchmarks/training.py` writes benchmarks/training.md and prints it.
"""

import functools
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import loky
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from stability_lib import data, models, optim, runs, studies
from stability_lib.config import RunConfig, grid, replace
from stability_lib.train import cpu_threads, loss_terms, train_run

SHAPES = [studies.size(32, 2), studies.size(64, 3), studies.size(96, 5), studies.size(128, 4)]


def our_step(config: RunConfig):
    model = models.build(config, data.vocab_size(config))
    optimizer, order = optim.build(model, config), torch.Generator().manual_seed(0)

    def step():
        batch = data.sample(config, order)
        loss, objective = loss_terms(model(batch[:, :-1]), batch[:, 1:], config.z_loss)
        finish(model, optimizer, loss, objective)
    return step


def gpt2_step(config: RunConfig):
    shape = GPT2Config(vocab_size=data.vocab_size(config), n_positions=config.seq_len, n_embd=config.d_model,
                       n_layer=config.n_layers, n_head=config.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                       attn_implementation="sdpa", use_cache=False, tie_word_embeddings=False, bos_token_id=0,
                       eos_token_id=0)
    model = GPT2LMHeadModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    order = torch.Generator().manual_seed(0)

    def step():
        batch = data.sample(config, order)[:, :-1].contiguous()
        loss = model(input_ids=batch, labels=batch).loss
        finish(model, optimizer, loss, loss)
    return step


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, objective: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    objective.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.stack([loss.detach(), norm]).tolist()
    optimizer.step()


def seconds(function, times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    return time.perf_counter() - start


def ratios(slow, fast, rounds: int, times: int = 1) -> list[float]:
    """time(slow) / time(fast), round by round, the order turned each round."""
    found = []
    for i in range(rounds):
        taken = {side: seconds(side, times) for side in ((slow, fast) if i % 2 else (fast, slow))}
        found.append(taken[slow] / taken[fast])
    return found


def row(name: str, goal: str, found: list[float]) -> str:
    return f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} | {len(found)} | {goal} |"


def measure_steps() -> list[str]:
    rows = []
    for threads in sorted({1, os.cpu_count()}):
        for shape in SHAPES:
            for qk_norm in ("none", "head"):
                config = RunConfig(**shape, qk_norm=qk_norm)
                with cpu_threads(threads):
                    ours, peer = our_step(config), gpt2_step(config)
                    seconds(ours, 3), seconds(peer, 3)
                    found = ratios(peer, ours, rounds=8, times=6)
                name = f"step, d={shape['d_model']} L={shape['n_layers']}, qk-norm {qk_norm}, {threads} thread(s)"
                rows.append(row(name, "1.3 or more", found))
    return rows


def measure_sweep() -> list[str]:
    base = replace(studies.base("quick"), **studies.size(64, 3))
    configs = grid(base, qk_norm=["none", "head"], lr=studies.PAPER_LRS)

    def plain_loop():
        for config in configs:
            train_run(config, threads=None)

    def through_ensure():
        with tempfile.TemporaryDirectory() as folder:
            runs.ensure(configs, runs.Store(Path(folder, "sweep.jsonl")))
        loky.get_reusable_executor().shutdown()

    found = ratios(plain_loop, through_ensure, rounds=2)
    return [row(f"sweep of {len(configs)} runs, d=64 L=3", "1.3 or more", found)]


def measure_probes() -> list[str]:
    rows = []
    for shape in SHAPES[:3]:
        probed = RunConfig(**shape, steps=100, warmup_steps=5)
        with_probes, without = (functools.partial(train_run, c) for c in (probed, replace(probed, probe_every=0)))
        found = ratios(with_probes, without, rounds=4)
        name = f"probes every {probed.probe_every} steps, d={shape['d_model']} L={shape['n_layers']}"
        rows.append(row(name, "below 1.05", found))
    return rows


def main() -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    lines = ["# Training benchmark", "",
             f"{machine}. Written by `benchmarks/training.py`, which says what each ratio is.", "",
             "| what | ratio (median) | range | rounds | goal |", "|---|---|---|---|---|"]
    for measure in (measure_steps, measure_sweep, measure_probes):
        lines += measure()
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
