"""Attention logits and router loads of anybody's forward pass, read off the torch functions that it calls.

`Reader` sees every fused attention and, in eager attention, every softmax over keys, without a hook on the model.

Dimensions: B batch, T query, S key, H heads, E head size.
"""

import math
import sys
import types
from collections.abc import Callable, Mapping
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import probes

CHUNK = 2**24
"""Logits held at once, in fp32: a reading shall not need the memory that fused attention saves."""
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_TOPK, _ARGMAX = (torch.topk, Tensor.topk), (torch.argmax, Tensor.argmax)
# torch.nn's attention as it is written, which under a mode is otherwise one call and cannot be looked into
_MULTI_HEAD = types.FunctionType(
    F.multi_head_attention_forward.__code__, vars(F) | {"has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__)
_MULTI_HEAD.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


class Reader(TorchFunctionMode):
    """Within it, `found` fills with lists of readings, one a call, under names of the layers that called, and `failed`
    with what could not be read.

    `names` are those of the model's modules by id. A forward pass that Ctrl-C ended leaves the mode behind, so nothing
    is read but in calls from `frame`.
    """

    def __init__(self, names: Mapping[int, str], frame: FrameType):
        super().__init__()
        self.names, self.frame, self._heads = names, frame, None
        self.found: dict[str, list[Tensor]] = {}
        self.failed: list[str] = []

    def __torch_function__(self, func: Callable, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._heads = kwargs.get("num_heads", args[4] if len(args) > 4 else None)
            try:
                with self:
                    return _MULTI_HEAD(*args, **kwargs)
            finally:
                self._heads = None
        if func is F.scaled_dot_product_attention:
            self._read(_fused, *args, **kwargs)
        elif func in _SOFTMAX:
            self._read(self._softmax, *args, **kwargs)
        result = func(*args, **kwargs)
        if func in _TOPK:
            self._read(_routing, result[1], *args, **kwargs)
        elif func in _ARGMAX:
            self._read(self._best, result, *args, **kwargs)
        return result

    @torch.no_grad()
    def _read(self, read: Callable, *args, **kwargs) -> None:
        layer = self._layer()
        if layer is None:
            return
        try:
            tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            with probes.full_precision(tensor.device.type):
                readings = read(*args, **kwargs)
        except Exception as error:  # the model's own call may do what ours cannot, as with nested tensors
            self.failed.append(f"attention of {layer} could not be read: {type(error).__name__}: {error}")
            return
        for quantity, value in readings.items():
            key = f"{quantity}/{layer}"
            if key in self.found and self.found[key][0].shape != value.shape:  # attention with other numbers of heads
                key += f".{len(value)}_heads"
            # of several choices in a layer, among groups and then among experts, the last counts
            before = [] if quantity.startswith("router") else self.found.get(key, [])
            self.found[key] = [*before, value]

    def _softmax(self, input: Tensor, dim: int | None = None, *_, **__) -> probes.Readings:
        over_keys = dim in (-1, input.ndim - 1)
        if self._heads and input.ndim == 3:
            input = input.unflatten(0, (-1, self._heads))
        if input.ndim != 4 or not over_keys or input.shape[-2] < 2:
            return {}
        lowest = torch.finfo(input.dtype).min / 2
        return _summary([(input.detach().float(), input.detach() <= lowest)])

    def _best(self, chosen: Tensor, input: Tensor, dim: int | None = None, *_, **__) -> probes.Readings:
        name = (self._layer(3) or "").rpartition(".")[2]  # any layer may take an argmax
        return _routing(chosen, input, 1, dim) if "rout" in name or "gat" in name else {}

    def _layer(self, above: int = 2) -> str | None:
        frame, layer = sys._getframe(above), None
        while frame is not None and frame is not self.frame:
            if layer is None:
                layer = self.names.get(id(frame.f_locals.get("self")))
            frame = frame.f_back
        return None if frame is None else layer or "model"


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
           is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> probes.Readings:
    """Of the arguments of `F.scaled_dot_product_attention`."""
    q, k, mask = (x if x is None else _four_axes(x.detach(), query.ndim, x is attn_mask)
                  for x in (query, key, attn_mask))
    k_BxHxSxE = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rows = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    keys = torch.arange(k.shape[2], device=q.device)

    def parts():
        for start in range(0, q.shape[2], rows):
            z = q[:, :, start:start + rows].float() @ k_BxHxSxE.mT * scale
            hidden = torch.zeros(z.shape[-2:], dtype=torch.bool, device=z.device)
            if is_causal:
                hidden = keys > torch.arange(start, start + z.shape[2], device=q.device).unsqueeze(-1)
            if mask is not None:
                part = mask if mask.shape[-2] == 1 else mask[..., start:start + rows, :]
                if part.dtype == torch.bool:
                    hidden = hidden | ~part
                else:
                    z, hidden = z + part.float(), hidden | (part <= torch.finfo(part.dtype).min / 2)
            yield z, hidden

    return _summary(parts())


def _four_axes(x: Tensor, query_axes: int, mask: bool) -> Tensor:
    """[B, H, T, E] of a tensor that goes with a query of so many axes; a mask may have fewer."""
    if query_axes == 3 and x.ndim == 3:
        return x.unsqueeze(1)
    if x.ndim > 4:
        return x.flatten(0, -4)
    return x if mask or x.ndim == 4 else x[(None,) * (4 - x.ndim)]


def _summary(parts) -> probes.Readings:
    """Per head the largest logit, and the mean entropy over queries that see a key, of logits [B, H, T, S] in parts
    with what is hidden in them."""
    largest, entropies, queries = [], 0.0, 0
    for z, hidden in parts:
        largest.append(probes.largest_logits(z, hidden)[0].amax((0, 2)))
        seen = ~hidden.all(-1).expand(z.shape[:-1])
        weights = z.masked_fill(hidden, -math.inf).softmax(-1)
        entropies = entropies + torch.where(seen, probes.entropy(weights), 0.0).sum()
        queries = queries + seen.sum()
    return {"attention_logit_max": torch.stack(largest).amax(0), "attention_entropy": entropies / queries}


def _routing(chosen: Tensor, input: Tensor, k: int | None = None, dim: int | None = -1, *_, **__) -> probes.Readings:
    """Of the indices `chosen` from scores [..., experts]: the shares of tokens that the most and the least used expert
    get, times the number of experts."""
    experts = input.shape[-1]
    if not input.is_floating_point() or input.ndim > 3 or dim not in (-1, input.ndim - 1) or not 1 < experts <= 1024:
        return {}
    chosen = chosen.reshape(-1, 1)
    load = (chosen == torch.arange(experts, device=chosen.device)).float().mean(0) * experts
    return {"router_load_max": load.max(), "router_load_min": load.min()}


def module_names(model: nn.Module) -> dict[int, str]:
    """The names of a model's modules by their id, as if none were compiled."""
    return {id(module): name.replace("_orig_mod.", "") for name, module in model.named_modules() if name}
