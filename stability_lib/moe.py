"""A mixture of experts in place of a block's MLP (paper K, Tables 11 and 16), routed as in Mixtral, and the
load-balance loss of the Switch Transformer.

Dimensions: N tokens, D model, E experts, K experts of a token (`top_k`).
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RunConfig
from .probes import full_precision


class Router(nn.Linear):
    """Which experts a token goes to, in fp32 also under autocast, as rounded logits would tie (Switch, Sec. 2.4).

    It is a module so that a forward hook sees what was chosen.
    """

    def __init__(self, config: RunConfig):
        super().__init__(config.d_model, config.experts, bias=False)
        self.top_k = config.top_k

    def forward(self, x_NxD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The softmax over all experts [N, E], and of the chosen ones [N, K] the softmax over them and the indices."""
        with full_precision(x_NxD.device.type):
            z_NxE = super().forward(x_NxD.to(self.weight.dtype))
        z_NxK, chosen_NxK = z_NxE.topk(self.top_k, -1)  # of logits, as where a softmax saturates its zeros tie
        return z_NxE.softmax(-1), z_NxK.softmax(-1), chosen_NxK

    def shares(self, chosen_NxK: Tensor) -> Tensor:
        """Of all choices, the share of each expert [E], in fp32."""
        return F.one_hot(chosen_NxK, self.out_features).float().mean((0, 1))


class MoE(nn.Module):
    """E of our GELU MLPs, of which a token goes through K; no token is dropped. With K = 1 the weight of the one is 1
    whatever the router says: only the load-balance loss trains that."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.router = Router(config)
        d, hidden = config.d_model, config.mlp_ratio * config.d_model
        for name, outs, ins in (("up", hidden, d), ("down", d, hidden)):
            bound, bias = 1 / math.sqrt(ins), None  # as nn.Linear's own
            self.register_parameter(name, nn.Parameter(torch.empty(config.experts, outs, ins).uniform_(-bound, bound)))
            if config.biases:  # end to end, as what has two dimensions counts as a weight matrix
                bound = bound if config.init == "pytorch" else 0.0
                bias = nn.Parameter(torch.empty(config.experts * outs).uniform_(-bound, bound))
            self.register_parameter(f"{name}_bias", bias)

    def initialise_(self, draw: Callable[[Tensor], None]) -> None:
        """Fill the weights by `draw`, expert by expert."""
        for up, down in zip(self.up, self.down, strict=True):
            draw(up)
            draw(down)

    def forward(self, x_BxTxD: Tensor) -> Tensor:
        x_NxD, experts = x_BxTxD.flatten(0, -2), len(self.up)
        _, weights_NxK, chosen_NxK = self.router(x_NxD)
        order = chosen_NxK.flatten().argsort(stable=True)  # choices, expert by expert
        sizes = ([len(order)] + [0] * (experts - 1) if order.is_meta  # a shape needs no counts
                 else chosen_NxK.flatten().bincount(minlength=experts).tolist())
        token = order // self.router.top_k
        # unbind and index_select: an index's gradient would be E tensors of that size, and depend on threads
        up, down = (zip(weight.unbind(), [None] * experts if bias is None else bias.chunk(experts), strict=True)
                    for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)))
        outputs = torch.cat([F.linear(F.gelu(F.linear(rows, *first)), *second) for rows, first, second in
                             zip(x_NxD.index_select(0, token).split(sizes), up, down, strict=True)])
        outputs = outputs * weights_NxK.flatten().index_select(0, order).unsqueeze(1)
        return torch.zeros_like(x_NxD, dtype=outputs.dtype).index_add(0, token, outputs).view(x_BxTxD.shape)


@contextlib.contextmanager
def watch_balance(model: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Fill the yielded dict with each router's load-balance loss in the forward passes inside the `with`, the last
    one's. The model keeps nothing, so that no other pass disturbs it and no graph outlives the dict.

    It is E sum_e f_e P_e, with f_e the share of all choices that fell on expert e and P_e the mean of the router's
    softmax (Switch, eqs. 4 to 6): 1 where even, E / K where all tokens choose alike and the softmax is nil elsewhere.
    """
    found: dict[nn.Module, Tensor] = {}

    def hook(router, inputs, output):
        p_NxE, _, chosen_NxK = output
        found[router] = router.out_features * (router.shares(chosen_NxK) * p_NxE.mean(0)).sum()

    hooks = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, Router)]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()
