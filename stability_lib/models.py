"""The decoder language model of paper P: wiring, initialisation, parameter and FLOP counts.

Dimensions: B batch, T position, D model, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blocks import MLP, Attention, layer_norm
from .config import RunConfig

# The standard deviation of a unit normal cut at +-2: divided out, so that a truncated weight has the std asked for.
_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * math.erf(math.sqrt(2))))


class Block(nn.Module):
    """Pre-LN block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.attention_norm = layer_norm(config.d_model, config)
        self.attention = Attention(config)
        self.mlp_norm = layer_norm(config.d_model, config)
        self.mlp = MLP(config)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class Decoder(nn.Module):
    """Decoder-only language model without biases and with an untied head (paper P, Sec. 2.1)."""

    def __init__(self, config: RunConfig, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = layer_norm(config.d_model, config)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, tokens_BxT: Tensor) -> Tensor:
        """Logits [B, T, V] of the next token at each position."""
        x_BxTxD = self.embed(tokens_BxT)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return self.head(self.final_norm(x_BxTxD))

    def named_weights(self, read: Callable[[Tensor], Tensor] = lambda weight: weight) -> dict[str, Tensor]:
        """The weight matrices by layer name, query, key and value projections apart.

        `read` turns each parameter into what is wanted of it, for example its gradient.
        """
        found = {"embed": read(self.embed.weight)}
        for i, block in enumerate(self.blocks):
            found |= {f"block{i}.{part}": rows
                      for part, rows in zip("qkv", read(block.attention.qkv.weight).chunk(3), strict=True)}
            found[f"block{i}.out"] = read(block.attention.out.weight)
            found[f"block{i}.mlp_up"] = read(block.mlp.up.weight)
            found[f"block{i}.mlp_down"] = read(block.mlp.down.weight)
        return found | {"head": read(self.head.weight)}


def build(config: RunConfig, vocab_size: int) -> Decoder:
    """A freshly initialised model on the CPU, the same for the same config in any process.

    Embedding N(0, 1/D); every other weight truncated normal with std 1/sqrt(fan-in) (paper P, Sec. 2.1);
    under muParam the head's std is sqrt(base fan-in) / fan-in, and `mup_full` starts with zero queries.
    """
    with torch.random.fork_rng(devices=[]):
        model = Decoder(config, vocab_size)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        model.embed.weight.normal_(0, 1 / math.sqrt(config.d_model), generator=generator)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                _truncated_normal_(module.weight, 1 / math.sqrt(module.in_features), generator)
        if config.parametrization in ("mup_intermediate", "mup_full"):
            model.head.weight.mul_(math.sqrt(config.base_width / config.d_model))
        if config.parametrization == "mup_full":
            for block in model.blocks:
                block.attention.qkv.weight[: config.d_model].zero_()
    return model


def _truncated_normal_(weight: Tensor, std: float, generator: torch.Generator) -> None:
    std = std / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def n_params(config: RunConfig) -> int:
    """Paper P's N, all parameters but the embedding and the head, less the norm gains (under 3%): so a size has one
    N with and without qk-norm."""
    return config.n_layers * (4 + 2 * config.mlp_ratio) * config.d_model**2


def training_flops(config: RunConfig, vocab_size: int) -> float:
    """FLOPs of the run's training steps: 6 per weight and token for the matrix products of forward and
    backward, and 12 D T per block and token for attention scores and mixing."""
    matrices = n_params(config) + config.d_model * vocab_size
    per_token = 6 * matrices + 12 * config.n_layers * config.d_model * config.seq_len
    return per_token * config.batch_size * config.seq_len * config.steps
