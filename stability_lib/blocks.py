"""The parts of a Transformer block: rotary positions, attention with qk-norm, and the MLP.

Dimensions: B batch, T position, D model, H heads, E head size (D = H E).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RunConfig


def layer_norm(width: int, config: RunConfig) -> nn.LayerNorm:
    """LayerNorm with a gain and, unless the config asks for biases, nothing else (paper P, Sec. 2.1)."""
    return nn.LayerNorm(width, eps=config.layernorm_eps, bias=config.biases)


def stream_norm(config: RunConfig) -> nn.Module:
    """The norm that `config.norm` puts on the residual stream."""
    if config.norm == "no_norm":
        return nn.Identity()
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.layernorm_eps)
    return layer_norm(config.d_model, config)


def inner_norm(width: int, config: RunConfig) -> nn.Module:
    """SubLN's second LayerNorm, before a sublayer's output projection; nothing under any other norm."""
    return layer_norm(width, config) if config.norm == "subln" else nn.Identity()


def qk_norm(config: RunConfig) -> nn.Module:
    """What queries, or keys, pass through before their product."""
    if config.qk_norm == "head_fixed":
        return nn.LayerNorm(config.d_head, eps=config.layernorm_eps, elementwise_affine=False)
    width = {"none": None, "head": config.d_head, "model": config.d_model}[config.qk_norm]
    return layer_norm(width, config) if width else nn.Identity()


def rotary_table(length: int, head_size: int, base: float) -> Tensor:
    """Rotations of rotary positions (RoFormer), real view of complex numbers, [T, E/2, 2]."""
    frequency = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def rotate(x_BxTxHxE: Tensor, table_TxEx2: Tensor) -> Tensor:
    """Turn each neighbouring pair of head dimensions by its position's angle."""
    pairs = torch.view_as_complex(x_BxTxHxE.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(table_TxEx2[: pairs.shape[1]]).unsqueeze(1)
    return torch.view_as_real(turned).flatten(-2).to(x_BxTxHxE.dtype)


def transplant(z: Tensor, kappa: float) -> Tensor:
    """g(z) = sqrt(kappa) z / RMS(z) over the head size (paper P, Sec. 3.3): logits of size about `kappa`."""
    return math.sqrt(kappa) * z * z.square().mean(-1, keepdim=True).rsqrt()


class AttentionCore(nn.Module):
    """Attention of given queries and keys, causal but for images. It has no parameters and is a module so that a
    forward hook sees q and k exactly as they enter the logits, after norm and rotation."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.scale = config.scale
        self.pointwise, self.cap = config.attention == "squared_relu", config.attention_cap
        self.fused = not self.pointwise and self.cap is None
        self.causal = config.causal

    def logits(self, q_BxHxTxE: Tensor, k_BxHxTxE: Tensor) -> Tensor:
        """z_ij = scale <q_i, k_j>, [B, H, T, T], not masked (paper P, Sec. 3.1.1)."""
        return q_BxHxTxE @ k_BxHxTxE.mT * self.scale

    def weights(self, z_BxHxTxT: Tensor) -> Tensor:
        """Attention weights of logits: the softmax over visible keys, of capped logits where there is a cap, or
        relu(z)^2 / sqrt(T) (Fig. E.11)."""
        hidden = ~self.visible(z_BxHxTxT)
        if self.pointwise:
            return z_BxHxTxT.relu().square().masked_fill(hidden, 0.0) / math.sqrt(z_BxHxTxT.shape[-1])
        if self.cap is not None:
            z_BxHxTxT = self.cap * torch.tanh(z_BxHxTxT / self.cap)
        return z_BxHxTxT.masked_fill(hidden, -math.inf).softmax(-1)

    def visible(self, z_BxHxTxT: Tensor) -> Tensor:
        """Which key (column) each query (row) sees, bool [T, T]."""
        all_TxT = torch.ones(z_BxHxTxT.shape[-2:], dtype=torch.bool, device=z_BxHxTxT.device)
        return all_TxT.tril() if self.causal else all_TxT

    def forward(self, q_BxHxTxE: Tensor, k_BxHxTxE: Tensor, v_BxHxTxE: Tensor) -> Tensor:
        if not self.fused:
            return self.weights(self.logits(q_BxHxTxE, k_BxHxTxE)) @ v_BxHxTxE
        return F.scaled_dot_product_attention(q_BxHxTxE, k_BxHxTxE, v_BxHxTxE, is_causal=self.causal, scale=self.scale)


class Attention(nn.Module):
    """Multi-head self-attention, by default with rotary positions and qk-layernorm."""

    def __init__(self, config: RunConfig):
        super().__init__()
        d, self.head_size, self.qk_norm = config.d_model, config.d_head, config.qk_norm
        self.qkv = nn.Linear(d, 3 * d, bias=config.biases)
        self.gate = nn.Linear(d, d, bias=config.biases) if config.attention_gate else None
        self.inner_norm = inner_norm(d, config)
        self.out = nn.Linear(d, d, bias=config.biases)
        self.q_norm, self.k_norm = qk_norm(config), qk_norm(config)
        self.kappa = config.logit_transplant
        self.core = AttentionCore(config)
        rotary = config.positions == "rotary"
        table = rotary_table(config.length, config.d_head, config.rope_base) if rotary else None
        self.register_buffer("rotary", table, persistent=False)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BxTxD).chunk(3, dim=-1)
        if self.qk_norm == "model":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))
        if self.qk_norm in ("head", "head_fixed"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kappa is not None:
            q, k = transplant(q, self.kappa), transplant(k, self.kappa)
        if self.rotary is not None:
            q, k = rotate(q, self.rotary), rotate(k, self.rotary)
        mixed_BxHxTxE = self.core(q.transpose(1, 2), k.transpose(1, 2), v.to(q.dtype).transpose(1, 2))
        mixed_BxTxD = mixed_BxHxTxE.transpose(1, 2).flatten(-2)
        if self.gate is not None:
            mixed_BxTxD = mixed_BxTxD * self.gate(x_BxTxD).sigmoid()
        return self.out(self.inner_norm(mixed_BxTxD))


class MLP(nn.Module):
    """GELU MLP of hidden size mlp_ratio * D."""

    def __init__(self, config: RunConfig):
        super().__init__()
        hidden = config.mlp_ratio * config.d_model
        self.up = nn.Linear(config.d_model, hidden, bias=config.biases)
        self.inner_norm = inner_norm(hidden, config)
        self.down = nn.Linear(hidden, config.d_model, bias=config.biases)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        return self.down(self.inner_norm(F.gelu(self.up(x_BxTxD))))
