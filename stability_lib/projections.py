"""Where attention layers make their queries and keys, in our own models and in Hugging Face's, and QK-clip on those
weights.

Dimensions: H heads, G heads of keys, E head size.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import blocks
from .stream import unwrapped

_OWN_NORMS = ("q_norm", "k_norm", "q_layernorm", "query_layernorm", "qk_norm")


@dataclasses.dataclass(frozen=True)
class Projections:
    """Where a layer makes queries and keys: linear maps, of one output for both where `axis` is an axis of `shape`."""

    query: nn.Module
    key: nn.Module
    head_size: int
    shape: tuple[int, ...] = ()
    axis: int = 0

    def heads(self, part: str) -> Tensor:
        """The indices of output features of the queries or keys, [H or G, E]."""
        linear = getattr(self, part)
        features = torch.arange(linear.bias.numel() if linear.bias is not None else linear.weight.shape[0])
        if not self.shape:
            return features.view(-1, self.head_size)
        return features.view(self.shape).unbind(self.axis)[0 if part == "query" else 1]


def of(model: nn.Module) -> dict[str, Projections]:
    """The attention layers of a model by name; raises `ValueError` where there are none that are known."""
    found = {name: layer for name, module in unwrapped(model).named_modules() if (layer := _projections(module))}
    if not found:
        kinds = {type(part).__name__ for part in model.modules() if type(part).__name__.endswith("Attention")}
        whole = type(unwrapped(model)).__name__
        raise ValueError(f"no known queries and keys in {whole} ({', '.join(sorted(kinds))}): known are those of "
                         "q_proj and k_proj (LLaMA, Mistral, Qwen2, Phi, OPT, ViT, ...), of BERT, GPT-2 and GPT-NeoX")
    return found


def _projections(module: nn.Module) -> Projections | None:
    kind, size = type(module).__name__, getattr(module, "head_dim", None)
    if isinstance(module, blocks.Attention):
        return Projections(module.qkv, module.qkv, module.head_size, (3, -1, module.head_size), 0)
    if kind == "GPT2Attention" and not module.is_cross_attention:
        return Projections(module.c_attn, module.c_attn, size, (3, -1, size), 0)
    if kind == "GPTNeoXAttention":
        joint, size = module.query_key_value, module.head_size
        return Projections(joint, joint, size, (-1, 3, size), 1)
    if kind == "BertSelfAttention":
        return Projections(module.query, module.key, module.attention_head_size)
    pair = [getattr(module, name, None) for name in ("q_proj", "k_proj")]
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if size and all(isinstance(linear, nn.Linear) for linear in pair) and pair[0].out_features % size == 0 and (
            heads is None or pair[0].out_features == heads * size):
        return Projections(*pair, size)
    return None


@torch.no_grad()
def clip(model: nn.Module, maxima: Mapping[str, Tensor], threshold: float) -> dict[str, list[int]]:
    """QK-clip: shrink query and key weights of heads whose largest logit passed `threshold`, so that the same inputs
    would now give `threshold` (Kimi K2, arXiv 2507.20534, Sec. 2.1).

    `maxima` are the largest logits [H] by the name of an attention layer, or of its core. Both projections shrink by
    sqrt(threshold / largest); where heads share keys (grouped queries) the queries alone, by the whole factor, as other
    heads need the keys. Returns the heads that were clipped by layer. Raises `ValueError` where something stands
    between the weights and the logits, and for layers that `of` does not know.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}")
    clipped, known = {}, of(model) if maxima else {}
    for name, largest_H in maxima.items():
        layer_name = name.removesuffix(".core")
        if layer_name not in known:
            raise ValueError(f"QK-clip does not know the weights of {name}: it knows those of {', '.join(known)}")
        layer = known[layer_name]
        _require_plain(layer_name, unwrapped(model).get_submodule(layer_name), layer)
        factor_H = torch.where(largest_H > threshold, threshold / largest_H, 1.0)
        if not bool((factor_H < 1).any()):
            continue
        own_keys = len(layer.heads("key")) == len(layer.heads("query"))
        for part in ("query", "key") if own_keys else ("query",):
            _scale(getattr(layer, part), layer.heads(part), factor_H.sqrt() if own_keys else factor_H)
        clipped[name] = (factor_H < 1).nonzero().flatten().tolist()
    return clipped


def _require_plain(name: str, module: nn.Module, layer: Projections) -> None:
    """Raises `ValueError` where scaling a weight does not scale the logits."""
    require_no_norm(name, module)
    core = getattr(module, "core", None)
    if isinstance(core, blocks.AttentionCore) and (core.cap is not None or module.kappa is not None):
        raise ValueError(f"the logits of {name} are soft-capped or transplanted, so that scaling weights does not "
                         "scale them: leave QK-clip out")
    if getattr(getattr(module, "config", None), "attn_logit_softcapping", None):
        raise ValueError(f"the logits of {name} are soft-capped, so that scaling weights does not scale them: set "
                         "attn_logit_softcapping=None or leave QK-clip out")
    if any(hasattr(linear, "parametrizations") for linear in (layer.query, layer.key)):
        raise ValueError(f"the weights of {name} are reparametrized, so that scaling them in place is undone: leave "
                         "QK-clip out")


def require_no_norm(name: str, module: nn.Module) -> None:
    parts = [child for child, part in module.named_modules() if not isinstance(part, nn.Identity)
             and (child in _OWN_NORMS or child.endswith((".query_norm", ".key_norm")))]
    if parts:
        raise ValueError(f"{name} has qk-norm already ({parts[0]}), as Qwen3, Gemma3 and OLMo2 do: there is nothing to "
                         "add or clip")


def _scale(linear: nn.Module, features_HxE: Tensor, factor_H: Tensor) -> None:
    weight, bias = linear.weight, linear.bias
    outputs = 1 if type(linear).__name__ == "Conv1D" else 0  # GPT-2 keeps [in, out]
    factor = torch.ones(weight.shape[outputs], device=weight.device)
    factor[features_HxE.to(weight.device)] = factor_H.to(weight.device, torch.float32).unsqueeze(-1)
    weight.mul_((factor.unsqueeze(0) if outputs else factor.unsqueeze(-1)).to(weight.dtype))
    if bias is not None:
        bias.mul_(factor.to(bias.dtype))
