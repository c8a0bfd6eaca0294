"""A training step of our mixture of experts and our Mamba against transformers' of the same shape, as ratios.

- moe: `RunConfig(mlp="moe")` against MixtralForCausalLM of the same width, layers, heads, experts, top-k, batch,
  vocabulary and load-balance weight, with its two ways to run experts: one grouped product, its default, and a loop.
  Its experts are gated and so have three matrices to our two: at two thirds of our hidden size both have the same
  number of weights, which the table gives. Both with RMSNorm, rotary positions and no qk-norm.
- mamba: `RunConfig(mixer="mamba")` against MambaForCausalLM of the same width, layers, state size, convolution and
  expansion, with RMSNorm, by the path that transformers takes without CUDA kernels: a loop over positions.

A step is the batch, forward, backward, clipping and fused AdamW. Rounds alternate between the sides so that a slow
moment of the machine hits both; a ratio is the median of their time over ours, with the lowest and highest. Needs an
idle machine. `python benchmarks/architectures.py [--quick] [--only moe|mamba] [--out FILE]` writes
benchmarks/architectures.md and prints it, in about five minutes, mostly the wide Mamba of transformers.
"""

import argparse
import os
import platform
import statistics
from pathlib import Path

import torch
import transformers
from torch import nn
from training import finish, ratios, seconds

from stability_lib import data, models, optim, studies
from stability_lib.config import RunConfig
from stability_lib.train import cpu_threads, losses

SHAPES = {64: studies.size(64, 3), 256: studies.size(256, 2, 32)}
PEERS = {"moe": ("grouped_mm", "eager"), "mamba": ("slow path",)}
HEADER = ("| model | d | layers | threads | our weights | theirs | their way | ours, ms | theirs / ours (median) | "
          "range | rounds | goal |")


def config_of(name: str, d: int) -> RunConfig:
    kind = dict(mlp="moe", mlp_ratio=3) if name == "moe" else dict(mixer="mamba")
    return RunConfig(**SHAPES[d], **kind, norm="rmsnorm", qk_norm="none")


def our_step(config: RunConfig) -> tuple[nn.Module, callable]:
    model = models.build(config, data.vocab_size(config))
    optimizer, order = optim.build(model, config), torch.Generator().manual_seed(0)

    def step():
        loss, objective, _ = losses(model, data.sample(config, order), config, config.z_loss, "cpu", probe=False)
        finish(model, optimizer, loss, objective)
    return model, step


def peer_step(config: RunConfig, way: str) -> tuple[nn.Module, callable]:
    common = dict(vocab_size=data.vocab_size(config), hidden_size=config.d_model, num_hidden_layers=config.n_layers,
                  use_cache=False, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    if config.mlp == "moe":
        shape = transformers.MixtralConfig(
            **common, intermediate_size=config.mlp_ratio * config.d_model * 2 // 3, num_local_experts=config.experts,
            num_experts_per_tok=config.top_k, num_attention_heads=config.n_heads, num_key_value_heads=config.n_heads,
            max_position_embeddings=config.seq_len, output_router_logits=True,
            router_aux_loss_coef=config.load_balance, experts_implementation=way)
        model = transformers.MixtralForCausalLM(shape)
    else:
        shape = transformers.MambaConfig(**common, state_size=config.state_size, conv_kernel=config.conv_width,
                                         expand=config.expansion, use_bias=config.biases)
        model = transformers.MambaForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    order = torch.Generator().manual_seed(0)

    def step():
        batch = data.sample(config, order)[:, :-1].contiguous()
        loss = model(input_ids=batch, labels=batch).loss
        finish(model, optimizer, loss, loss)
    return model.train(), step


def row(name: str, d: int, threads: int, way: str, rounds: int) -> str:
    config = config_of(name, d)
    with cpu_threads(threads):
        (our_model, ours), (peer_model, peer) = our_step(config), peer_step(config, way)
        seconds(ours, 3)
        times = max(1, min(6, round(2 / seconds(peer))))
        found = ratios(peer, ours, rounds, times)
        alone = min(seconds(ours) for _ in range(5))
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (our_model, peer_model)]
    return (f"| {name} | {d} | {config.n_layers} | {threads} | {sizes[0]} | {sizes[1]} | {way} | {1e3 * alone:.1f} | "
            f"{statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} | {rounds} | 1.3 or more |")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--quick", action="store_true", help="the narrow models on one thread, two rounds")
    options.add_argument("--only", choices=PEERS)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    given = options.parse_args()
    rows = []
    for name in [given.only] if given.only else PEERS:
        for d in list(SHAPES)[:1] if given.quick else SHAPES:
            for threads in [1] if given.quick else sorted({1, os.cpu_count()}):
                for way in PEERS[name]:
                    rows.append(row(name, d, threads, way, rounds=2 if given.quick else 6))
                    print(rows[-1], flush=True)
    base = RunConfig()
    machine = (f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers "
               f"{transformers.__version__}")
    text = "\n".join(["# Mixture of experts and Mamba against transformers", "",
                      f"{machine}. Batches of {base.batch_size} x {base.seq_len} tokens, fp32. Written by "
                      "`benchmarks/architectures.py`, which says what is measured.", "",
                      HEADER, "|" + "---|" * (HEADER.count("|") - 1), *rows, ""])
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
