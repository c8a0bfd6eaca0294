"""Kolmogorov-Arnold layers: a B-spline and a base function on every edge in place of a weight (Liu et al., "KAN:
Kolmogorov-Arnold Networks", 2024, eqs. 2.10 to 2.12; paper K, Tables 11 and 18).

Dimensions: I inputs of a layer, O outputs, S = grid + order splines an edge.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RunConfig

NOISE = 0.1
"""Standard deviation of the first coefficients, times sqrt(I): the KAN paper's 0.1 (Sec. 2.2) over pykan's sqrt(I). So
splines start small beside the base function at any width."""


class _Cardinal(torch.autograd.Function):
    """B-splines on whole-number knots, by Cox-de Boor. Keeps `u` alone for the backward pass, three times as fast as
    autograd through the recursion: the derivative is the difference of two neighbours of one order less."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, knots: int, order: int) -> Tensor:
        to_knot = u.unsqueeze(-2) - torch.arange(knots, dtype=u.dtype, device=u.device)[:, None]
        b = (to_knot[..., :-1, :] >= 0).logical_and_(to_knot[..., 1:, :] < 0).to(u.dtype)
        for k in range(1, order + 1):
            b = torch.addcmul(to_knot[..., : -k - 1, :] * b[..., :-1, :], to_knot[..., k + 1:, :], b[..., 1:, :],
                              value=-1)
        return b.div_(math.factorial(order))

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, ctx.knots, ctx.order = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, = ctx.saved_tensors
        if not ctx.order:
            return torch.zeros_like(u), None, None
        lower = _Cardinal.apply(u, ctx.knots, ctx.order - 1)
        return (grad * (lower[..., :-1, :] - lower[..., 1:, :])).sum(-2), None, None


def splines(x: Tensor, grid: int, order: int) -> Tensor:
    """The S = grid + order B-splines [..., S, I] of that order at x [..., I].

    Knots are even: `grid` intervals of width h on [-1, 1] and `order` more on each side. So the splines sum to 1 on
    [-1, 1], fall off beyond and are 0 from 1 + order h on. In fp32 at least, whatever the dtype of x.
    """
    knots = grid + 2 * order + 1
    u = (x.to(torch.promote_types(x.dtype, torch.float32)) + 1) * (grid / 2) + order
    return _Cardinal.apply(u.clamp(-1, knots), knots, order)


class KANLayer(nn.Module):
    """y_o = sum_i base[o, i] silu(x_i) + sum_is spline[o, s I + i] B_s(x_i), from [..., I] to [..., O].

    The coefficient of B_s on the edge from i to o is `spline[o, s I + i]`: one matrix [O, S I]. Beyond the reach of
    `splines` an edge is its base function alone. The grid stays where it is and edges have no scales of their own: the
    KAN paper's w_s is in the coefficients.
    """

    def __init__(self, inputs: int, outputs: int, grid: int, order: int):
        super().__init__()
        self.grid, self.order = grid, order
        self.base = nn.Parameter(torch.empty(outputs, inputs))
        self.spline = nn.Parameter(torch.empty(outputs, (grid + order) * inputs))

    def initialise_(self, draw: Callable[[Tensor], object]) -> None:
        """Base weights as `draw` fills a linear map; coefficients too, but at a standard deviation of NOISE/sqrt(I)."""
        draw(self.base)
        draw(self.spline)
        self.spline.mul_(NOISE / math.sqrt(self.base.shape[1]) / self.spline.std())

    def forward(self, x: Tensor) -> Tensor:
        values = splines(x, self.grid, self.order).flatten(-2)
        return F.linear(F.silu(x), self.base) + F.linear(values, self.spline)


class KAN(nn.Module):
    """Two Kolmogorov-Arnold layers, D -> mlp_ratio * D -> D, in place of an MLP; without biases, which splines make up
    for. Paper K does not give its hidden width. An edge has grid_size + spline_order + 1 weights: at the default
    mlp_ratio 4 that is 8 times the GELU MLP's weights (KAN-GPT has this width), at mlp_ratio 1 twice as many.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        hidden = config.mlp_ratio * config.d_model
        self.up = KANLayer(config.d_model, hidden, config.grid_size, config.spline_order)
        self.down = KANLayer(hidden, config.d_model, config.grid_size, config.spline_order)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        return self.down(self.up(x_BxTxD))
