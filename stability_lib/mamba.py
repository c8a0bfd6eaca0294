"""Mamba: a selective state space in place of attention and MLP (Gu and Dao 2023; paper K, Tables 11 and 17).

Dimensions: B batch, T position, D model, E channels (`expansion` times D), N state size (`state_size`), R rank of the
step size (D/16, rounded up), K chunks of c positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RunConfig
from .probes import full_precision

STEPS_MIN, STEPS_MAX = 1e-3, 0.1
"""Between them the step sizes start, log-uniform, one for each channel."""
_CHUNK = 16
_CPU_BLOCK = 2**20
"""So many numbers of state are computed at once on a CPU, as they stay in its caches."""


class Mamba(nn.Module):
    """The mixer of Gu and Dao (2023, Alg. 2 and Fig. 3): gated, with a causal convolution before the state space.

    Linear layers start as `models.build` says. The state space and the convolution start as in the authors' code, by
    the seed of the run: A = -(1..N) for each channel, D = 1, step sizes log-uniform. Unlike theirs, our optimizers
    decay A_log and D too, as they decay all. Names and shapes of weights are those of transformers' MambaMixer, but
    for `dt_bias`, its dt_proj.bias.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        channels, states, rank = config.expansion * config.d_model, config.state_size, math.ceil(config.d_model / 16)
        self.sizes = rank, states, states
        self.in_proj = nn.Linear(config.d_model, 2 * channels, bias=config.biases)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_width, groups=channels)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, channels, bias=False)
        steps_E = torch.exp(torch.empty(channels).uniform_(math.log(STEPS_MIN), math.log(STEPS_MAX)))
        self.dt_bias = nn.Parameter(steps_E + torch.log(-torch.expm1(-steps_E)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, config.d_model, bias=config.biases)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        x_BxTxE, gate_BxTxE = self.in_proj(x_BxTxD).chunk(2, dim=-1)
        x_BxTxE = F.silu(causal_convolution(x_BxTxE, self.conv1d))
        dt_BxTxR, B_BxTxN, C_BxTxN = self.x_proj(x_BxTxE).split(self.sizes, dim=-1)
        dt_BxTxE = F.softplus(self.dt_proj(dt_BxTxR) + self.dt_bias)
        y_BxTxE = selective_scan(x_BxTxE, dt_BxTxE, -self.A_log.exp(), B_BxTxN, C_BxTxN)
        return self.out_proj((y_BxTxE + self.D * x_BxTxE) * F.silu(gate_BxTxE))


def causal_convolution(x_BxTxE: Tensor, kernel: nn.Conv1d) -> Tensor:
    """Each channel's own convolution over this position and those before, [B, T, E]: a sum of shifted products, as
    torch's convolution takes several times as long on a CPU."""
    length = x_BxTxE.shape[1]
    weights_ExW = kernel.weight[:, 0, -length:]  # the others would see nothing but what is before the first position
    width = weights_ExW.shape[1]
    padded, total = F.pad(x_BxTxE, (0, 0, width - 1, 0)), kernel.bias
    for shift in range(width):
        total = torch.addcmul(total, padded[:, shift:shift + length], weights_ExW[:, shift])
    return total


def selective_scan(x_BxTxE: Tensor, dt_BxTxE: Tensor, A_ExN: Tensor, B_BxTxN: Tensor, C_BxTxN: Tensor) -> Tensor:
    """y_t = <C_t, h_t> with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t for each channel, h_0 = 0: [B, T, E], in fp32 or
    wider (Gu and Dao 2023, eq. 2a and Alg. 2).

    For A of zero or less and steps of zero or more. The backward pass computes the states anew, so none are kept;
    differentiable any number of times, by a slower way from the second on.
    """
    wide = torch.promote_types(x_BxTxE.dtype, torch.float32)
    x, dt, B, C = (part.to(wide) for part in (x_BxTxE, dt_BxTxE, B_BxTxN, C_BxTxN))
    length = x.shape[1]
    chunks = max(1, length // _CHUNK)
    missing = -length % chunks  # steps of size zero behind the last leave its state as it is
    if missing:
        x, dt, B, C = (F.pad(part, (0, 0, 0, missing)) for part in (x, dt, B, C))
    return _Scan.apply(x, dt, A_ExN.to(wide).mT.contiguous(), B, C, chunks)[:, :length]


class _Scan(torch.autograd.Function):
    """`selective_scan` of A [N, E], a block of sequences at a time."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, chunks):
        ctx.save_for_backward(x, dt, A, B, C)
        ctx.chunks, y = chunks, torch.empty_like(x)
        with full_precision(x.device.type):
            for s in _blocks(x, A):
                _, h, _ = _states(x[s], dt[s], A, B[s], chunks)
                y[s] = (C[s].unsqueeze(2) @ h.flatten(1, 2)).squeeze(2)
        return y

    @staticmethod
    def backward(ctx, dy):
        given, chunks = ctx.saved_tensors, ctx.chunks
        with full_precision(dy.device.type):
            if torch.is_grad_enabled():  # the gradient will be differentiated itself
                return *torch.autograd.grad(_differentiable_scan(*given), given, dy, create_graph=True), None
            x, dt, A, B, C = given
            dx, ddt, dA, dB, dC = (torch.zeros_like(part, memory_format=torch.contiguous_format) for part in given)
            for s in _blocks(x, A):
                found = _block_gradients(x[s], dt[s], A, B[s], C[s], dy[s], chunks)
                dx[s], ddt[s], dB[s], dC[s] = found[:4]
                dA += found[4]
        return dx, ddt, dA, dB, dC, None


def _block_gradients(x, dt, A, B, C, dy, chunks: int) -> tuple[Tensor, ...]:
    """Gradients for x, dt, B, C and A. With g_t that of h_t: dt_t B_t x_t gets g_t, and dt_t A gets
    g_t exp(dt_t A) h_{t-1}."""
    a, h, over_chunk = _states(x, dt, A, B, chunks)
    g = (dy.unsqueeze(2) * C.unsqueeze(-1)).view_as(a)
    _scan_back_(a, g, over_chunk)
    a, h, g = (part.flatten(1, 2) for part in (a, h, g))
    dC = (h @ dy.unsqueeze(-1)).squeeze(-1)
    dB = (g @ (dt * x).unsqueeze(-1)).squeeze(-1)
    du = (B.unsqueeze(2) @ g).squeeze(2)
    exponent = g.mul_(a)
    exponent[:, 1:].mul_(h[:, :-1])
    exponent[:, 0] = 0
    ddt = torch.mul(exponent, A, out=a).sum(2).addcmul_(du, x)
    return du * dt, ddt, dB, dC, exponent.mul_(dt.unsqueeze(2)).sum((0, 1))


def _blocks(x_BxTxE: Tensor, A_NxE: Tensor) -> list[slice]:
    size = len(x_BxTxE)
    if x_BxTxE.device.type == "cpu":
        size = max(1, _CPU_BLOCK // (x_BxTxE.shape[1] * A_NxE.numel()))
    return [slice(start, start + size) for start in range(0, len(x_BxTxE), max(1, size))]


def _states(x, dt, A, B, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decays a_t = exp(dt_t A) and states h_t, both [B, K, c, N, E], and the decay over each chunk [B, K, N, E]."""
    shape = len(x), chunks, x.shape[1] // chunks, *A.shape
    a = dt.unsqueeze(2).mul(A).exp_().view(shape)
    h = (B.unsqueeze(-1) * (dt * x).unsqueeze(2)).view(shape)
    over_chunk = dt.unflatten(1, shape[1:3]).sum(2).unsqueeze(2).mul(A).exp_()
    _scan_(a, h, over_chunk)
    return a, h, over_chunk


def _scan_(a, h, over_chunk) -> None:
    """h_t += a_t h_{t-1} in place: first the states at the ends of all chunks at once as if each began at zero, then
    what each hands on to the next, then all chunks at once from the right start."""
    chunks, length = a.shape[1:3]
    if chunks > 1:
        ends = h[:, :-1, 0].clone()
        for j in range(1, length):
            torch.addcmul(h[:, :-1, j], a[:, :-1, j], ends, out=ends)
        for k in range(1, chunks - 1):
            ends[:, k].addcmul_(over_chunk[:, k], ends[:, k - 1])
        h[:, 1:, 0].addcmul_(a[:, 1:, 0], ends)
    for j in range(1, length):
        h[:, :, j].addcmul_(a[:, :, j], h[:, :, j - 1])


def _scan_back_(a, g, over_chunk) -> None:
    """g_t += a_{t+1} g_{t+1} in place, the same way from the end."""
    chunks, length = a.shape[1:3]
    if chunks > 1:
        starts = g[:, 1:, -1].clone()
        for j in range(length - 2, -1, -1):
            torch.addcmul(g[:, 1:, j], a[:, 1:, j + 1], starts, out=starts)
        starts.mul_(a[:, 1:, 0])  # what the chunk before gets
        for k in range(chunks - 3, -1, -1):
            starts[:, k].addcmul_(over_chunk[:, k + 1], starts[:, k + 1])
        g[:, :-1, -1].add_(starts)
    for j in range(length - 2, -1, -1):
        g[:, :, j].addcmul_(a[:, :, j + 1], g[:, :, j + 1])


def _differentiable_scan(x, dt, A, B, C) -> Tensor:
    """The same by log2(T) doublings of the span over which states are summed, each on all positions at once."""
    a, h = (dt.unsqueeze(2) * A).exp(), B.unsqueeze(-1) * (dt * x).unsqueeze(2)
    span = 1
    while span < x.shape[1]:
        h = torch.cat([h[:, :span], h[:, span:] + a[:, span:] * h[:, :-span]], 1)
        a = torch.cat([a[:, :span], a[:, span:] * a[:, :-span]], 1)
        span *= 2
    return (C.unsqueeze(2) @ h).squeeze(2)
