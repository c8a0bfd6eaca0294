"""The decoder of papers P and K and a Vision Transformer of the same blocks: residual wiring of all norms,
initialisation, parameter and FLOP counts.

Dimensions: B batch, T position, D model, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import MLP, Attention, stream_norm
from .config import IMAGES, RunConfig
from .kan import KAN
from .mamba import Mamba
from .moe import MoE

# The standard deviation of a unit normal cut at +-2: divided out, so that a truncated weight has the std asked for.
_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * math.erf(math.sqrt(2))))


SUBLAYERS = {"attention": Attention, "mamba": Mamba, "gelu": MLP, "moe": MoE, "kan": KAN}
"""By the values of `config.mixer` and `config.mlp`. One whose weights are not all in linear layers has
`initialise_(draw)`: draw(weight [out, in]) fills a matrix as `config.init` says."""


class Block(nn.Module):
    """Attention, then MLP, or a state space alone, each added to the residual stream the way `config.norm` says.

    The one place that knows the wiring: the stream, times a gain, plus a sublayer of the normalised or plain stream,
    normalised afterwards or not.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        kinds = {"attention": config.mixer, "mlp": config.mlp} if config.mixer == "attention" else {"mamba": "mamba"}
        for name, kind in kinds.items():
            self.add_module(f"{name}_norm", stream_norm(config))
            self.add_module(name, SUBLAYERS[kind](config))
        self.sublayers = tuple(kinds)
        self.gain = config.residual_gain
        self.norm_after = normalises_after(config)
        self.gates = [1 / math.sqrt(2 * config.n_layers) if config.residual == "scaled" else 1.0] * 2
        if config.residual == "rezero":
            self.gates = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        for name, gate in zip(self.sublayers, self.gates, strict=False):
            x_BxTxD = self._add(x_BxTxD, getattr(self, f"{name}_norm"), getattr(self, name), gate)
        return x_BxTxD

    def _add(self, x_BxTxD: Tensor, norm: nn.Module, sublayer: nn.Module, gate: float | Tensor) -> Tensor:
        kept = x_BxTxD if self.gain == 1 else self.gain * x_BxTxD
        added = sublayer(x_BxTxD if self.norm_after else norm(x_BxTxD))
        total = kept + (added if isinstance(gate, float) and gate == 1 else gate * added)
        return norm(total) if self.norm_after else total


def normalises_after(config: RunConfig) -> bool:
    """Whether the stream itself is normalised after each addition, and so needs no final norm."""
    return config.norm in ("post_ln", "deepnorm")


class Decoder(nn.Module):
    """Decoder-only language model with an untied head without bias (paper P, Sec. 2.1)."""

    def __init__(self, config: RunConfig, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, config.d_model)
        self.positions = nn.Embedding(config.length, config.d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.Identity() if normalises_after(config) else stream_norm(config)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, tokens_BxT: Tensor) -> Tensor:
        """Logits [B, T, V] of the next token at each position."""
        return self.head(self.stream(self.embed(tokens_BxT)))

    def stream(self, x_BxTxD: Tensor) -> Tensor:
        """The normalised residual stream after all blocks, of embeddings without positions."""
        if self.positions is not None:
            x_BxTxD = x_BxTxD + self.positions.weight[: x_BxTxD.shape[1]]
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return self.final_norm(x_BxTxD)

    def named_weights(self, read: Callable[[Tensor], Tensor] = lambda weight: weight) -> dict[str, Tensor]:
        """The weight matrices by layer name, query, key and value projections apart.

        `read` turns each parameter into what is wanted of it, for example its gradient. Of a reparametrized layer it is
        the trained matrix: under weight norm the one that gives the directions.
        """
        def matrix(linear: nn.Linear) -> Tensor:
            wrapped = getattr(linear, "parametrizations", None)
            return read(linear.weight if wrapped is None else max(wrapped.weight.parameters(), key=Tensor.numel))

        found = {"embed": read(self.embed.weight)}
        for name in ("class_token", "positions"):
            if getattr(self, name, None) is not None:
                found[name] = read(getattr(self, name).weight)
        for i, block in enumerate(self.blocks):
            for name in block.sublayers:
                sublayer = getattr(block, name)
                if isinstance(sublayer, Attention):
                    found |= {f"block{i}.{part}": rows
                              for part, rows in zip("qkv", matrix(sublayer.qkv).chunk(3), strict=True)}
                    found |= {f"block{i}.{part}": matrix(getattr(sublayer, part)) for part in ("gate", "out")
                              if getattr(sublayer, part) is not None}
                elif isinstance(sublayer, MLP):
                    found[f"block{i}.mlp_up"] = matrix(sublayer.up)
                    found[f"block{i}.mlp_down"] = matrix(sublayer.down)
                else:
                    found |= {f"block{i}.{name}_{part.removesuffix('.weight')}": read(weight)
                              for part, weight in sublayer.named_parameters() if weight.ndim > 1}
        return found | {"head": read(self.head.weight)}


class VisionTransformer(Decoder):
    """ViT on square images: patches, linearly embedded, through the same blocks without a causal mask, then averaged,
    or with a trained token in front that ends as the whole image (Dosovitskiy et al. 2021)."""

    def __init__(self, config: RunConfig, classes: int):
        super().__init__(config, classes)
        self.images, self.patch, self.side = IMAGES[config.data], config.patch_size, math.isqrt(config.seq_len)
        self.embed = nn.Linear(self.images.channels * self.patch**2, config.d_model, bias=False)
        self.class_token = nn.Embedding(1, config.d_model) if config.pooling == "class_token" else None
        for name in ("centre", "spread"):
            self.register_buffer(name, torch.tensor(getattr(self.images, name)).view(-1, 1, 1), persistent=False)

    def forward(self, pixels_BxT: Tensor) -> Tensor:
        """Logits [B, 1, V] of the class, from the integers of `data`: channel after channel in raster order."""
        patches_BxTxD = self.embed(self.patches(pixels_BxT))
        if self.class_token is None:
            return self.head(self.stream(patches_BxTxD).mean(1, keepdim=True))
        token_Bx1xD = self.class_token.weight.expand(len(patches_BxTxD), 1, -1)
        return self.head(self.stream(torch.cat([token_Bx1xD, patches_BxTxD], 1))[:, :1])

    def patches(self, pixels_BxT: Tensor) -> Tensor:
        """The scaled values of each patch, channel after channel, of images resized to `seq_len` pixels."""
        native, rows = self.images.side, self.side // self.patch
        image = pixels_BxT.to(self.embed.weight.dtype).view(-1, self.images.channels, native, native)
        image = (image - self.centre) / self.spread
        if self.side != native:
            image = F.interpolate(image, size=(self.side, self.side), mode="bilinear", antialias=True)
        image = image.view(-1, self.images.channels, rows, self.patch, rows, self.patch)
        return image.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def build(config: RunConfig, vocab_size: int) -> Decoder:
    """A freshly initialised model on the CPU, the same for the same config in any process.

    By default embeddings are N(0, 1/D) and every other weight truncated normal with std 1/sqrt(fan-in) (paper P,
    Sec. 2.1); `config.init` names the alternatives. Under muParam the head's std is sqrt(base fan-in) / fan-in, and
    `mup_full` starts with zero queries.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed seeds every GPU too
        model = (Decoder if config.causal else VisionTransformer)(config, vocab_size)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for module in model.modules():
            if config.init != "pytorch" and isinstance(module, (nn.Linear, nn.Embedding)):
                _initialise_(module, config, generator)
            elif hasattr(module, "initialise_"):
                module.initialise_(lambda weight: _draw_(weight, config, generator))
        if config.parametrization in ("mup_intermediate", "mup_full"):
            model.head.weight.mul_(math.sqrt(config.base_width / config.d_model))
        if config.parametrization == "mup_full":
            for block in model.blocks:
                block.attention.qkv.weight[: config.d_model].zero_()
    if config.reparametrization != "none":
        wrap = _sigma_reparam if config.reparametrization == "sigma_reparam" else getattr(
            nn.utils.parametrizations, config.reparametrization)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # torch.manual_seed seeds every GPU too
            for module in [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]:
                wrap(module)
    return model


class _Gain(nn.Module):
    """A trained number times a weight."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gamma * weight


def _sigma_reparam(linear: nn.Linear) -> None:
    """gamma W / sigma(W), with the largest singular value by a step of power iteration a pass (Zhai et al. 2023)."""
    nn.utils.parametrizations.spectral_norm(linear)
    nn.utils.parametrize.register_parametrization(linear, "weight", _Gain())


def _initialise_(module: nn.Linear | nn.Embedding, config: RunConfig, generator: torch.Generator) -> None:
    if isinstance(module, nn.Linear):
        _draw_(module.weight, config, generator)
    else:
        std = 0.02 if config.init in ("gpt2", "xavier") else 1 / math.sqrt(config.d_model)
        module.weight.normal_(0, std, generator=generator)
    if getattr(module, "bias", None) is not None:
        module.bias.zero_()


def _draw_(weight: Tensor, config: RunConfig, generator: torch.Generator) -> None:
    """Fill a linear map [out, in]; under `pytorch` as `nn.Linear` does."""
    if config.init == "gpt2":
        weight.normal_(0, 0.02, generator=generator)
    elif config.init == "xavier":
        nn.init.xavier_uniform_(weight, generator=generator)
    elif config.init == "pytorch":
        nn.init.kaiming_uniform_(weight, math.sqrt(5), generator=generator)
    else:
        _truncated_normal_(weight, 1 / math.sqrt(weight.shape[1]), generator)


def _truncated_normal_(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """What torch 2.13's `trunc_normal_` draws; those of other versions draw other weights from the same seed."""
    std = std / _TRUNCATED_STD
    bound = weight.new_tensor(2 * std).item()
    weight.normal_(0.0, std, generator=generator)
    while (beyond := weight.abs() > bound).any():
        again = torch.empty_like(weight).normal_(0.0, std, generator=generator)
        weight.copy_(torch.where(beyond, again, weight))


def n_params(config: RunConfig) -> int:
    """Paper P's N, all parameters but the embedding and the head, less all vectors (norm gains, biases; under 3%),
    learned positions and a class token: so a size has one N with and without qk-norm. Of `moe` all experts count."""
    if config.mixer == "mamba":
        with torch.device("meta"):
            return config.n_layers * sum(p.numel() for p in Block(config).parameters() if p.ndim > 1)
    edge = config.grid_size + config.spline_order + 1 if config.mlp == "kan" else 1
    d, mlp = config.d_model, 2 * config.mlp_ratio * edge * config.d_model**2
    mlp = config.experts * (mlp + d) if config.mlp == "moe" else mlp
    return config.n_layers * ((4 + config.attention_gate) * d**2 + mlp)


def least_memory(config: RunConfig) -> int:
    """Bytes that a run cannot do without: weights, their gradients and one moment or two, what the widest layers keep
    of a batch for the backward pass, batches and validation sequences."""
    vocab, number = config.vocab_size or 1, 2 if config.precision == "bf16" else 4
    weights = n_params(config) + 2 * config.d_model * (vocab if config.causal else 1)
    hidden = config.mlp_ratio * (config.top_k if config.mlp == "moe" else 1)
    widths = 4 + hidden if config.mixer == "attention" else 8 * config.expansion
    kept = config.n_layers * widths * config.d_model + config.scored_positions * vocab // config.seq_len
    if config.attention == "squared_relu":
        kept += config.n_layers * config.n_heads * config.length
    if config.attention_cap is not None:
        kept += 2 * config.n_layers * config.n_heads * config.length
    if config.mlp == "kan":
        kept += config.n_layers * (1 + config.mlp_ratio) * config.d_model * (config.grid_size + config.spline_order)
    sequences = (config.batch_size + config.eval_sequences) * config.row
    moments = 1 if config.optimizer == "lion" else 2
    return (4 * (2 + moments) * weights + number * config.batch_size * config.length * kept + 8 * sequences
            + 8 * config.attention_maps * config.length**2)


def training_flops(config: RunConfig, vocab_size: int) -> float:
    """FLOPs of the run's training steps: 6 per weight and token, of `moe` those of `top_k` experts, for the matrix
    products of forward and backward, and 12 D T per block and token for attention scores and mixing, or 27 for each
    number of a state space's state (9 forward, as its authors count); all that twice under SAM, and three times where
    the gradient's norm is differentiated. Probes, profiles and penalties on layers are not counted."""
    matrices = n_params(config) + config.d_model * vocab_size
    if config.mlp == "moe":
        matrices -= config.n_layers * (config.experts - config.top_k) * 2 * config.mlp_ratio * config.d_model**2
    mixing = 12 * config.length * config.d_model
    if config.mixer == "mamba":  # 6 of the 27 are in `matrices`, as A is one
        mixing = (27 - 6) * config.state_size * config.expansion * config.d_model
    per_token = 6 * matrices + config.n_layers * mixing
    passes = (2 if config.sam_rho else 1) * (3 if config.gradient_penalty else 1)
    return passes * per_token * config.batch_size * config.length * config.steps
