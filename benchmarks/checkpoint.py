"""The profile of a checkpoint of LLaMA-2-7B's shape, a layer at a time: seconds, and the peak memory of the process.

Writes shards of random weights (13.2 GB for 32 layers), profiles them and deletes them.
`python benchmarks/checkpoint.py` appends a row to benchmarks/checkpoint.md and prints it; `--layers 2` is a try, which
only prints. `--rank` and `--snapshots` as of the profile; `--folder` for the shards, on a disk with room.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, LlamaConfig

from stability_lib import checkpoint, koopman

SHAPE = dict(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_attention_heads=32,
             num_key_value_heads=32, max_position_embeddings=4096)
HEADER = """# Profile of a checkpoint of LLaMA-2-7B's shape

Random weights in bf16 shards, D = 4096, one layer's weights in memory at a time, Kreiss constants apart. Peak memory is
the process's largest resident size, torch and pages of the shards included.

| machine | layers | N | rank | on disk, GB | seconds | of a layer | peak memory, GB |
|---|---|---|---|---|---|---|---|
"""


def write(folder: Path, layers: int) -> float:
    """A folder as save_pretrained writes it, a shard a layer, never more than a layer in memory; its size in GB."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    shards: dict[str, dict] = {}
    for name, weight in model.named_parameters():
        shards.setdefault(name.split(".")[1] if name.startswith("layers.") else "rest", {})[f"model.{name}"] = weight
    where, total = {}, 0
    for shard, weights in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {name: torch.ones(w.shape, dtype=torch.bfloat16) if w.ndim == 1 else
                   torch.randn(w.shape, dtype=torch.bfloat16).mul_(0.02) for name, w in weights.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += (folder / file).stat().st_size
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return total / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--snapshots", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="for the shards (default the system's for temporary files)")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens = torch.randint(SHAPE["vocab_size"], (-(-options.snapshots // 64), 64))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write(Path(folder), options.layers)
        start = time.perf_counter()
        found = koopman.profile_checkpoint(folder, tokens, snapshots=options.snapshots, rank=options.rank, kreiss=False,
                                           keep=Path(folder) / "kept", progress=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row = (f"| {platform.machine()}, {torch.get_num_threads()} threads | {len(found)} | {found.layers[0].snapshots} | "
           f"{options.rank or 'full'} | {size:.1f} | {seconds:.0f} | {seconds / len(found):.1f} | {peak:.1f} |\n")
    if options.layers == 32:
        path = Path(__file__).with_suffix(".md")
        path.write_text((path.read_text() if path.exists() else HEADER) + row)
    print(HEADER.splitlines()[-2], row, sep="\n")


if __name__ == "__main__":
    main()
