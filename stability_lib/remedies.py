"""Remedies for a model and loop of one's own: z-loss, qk-norm, QK-clip, and the learning rates it can stand.

Dimensions: B batch, T position, V vocabulary, H heads, G heads of keys, E head size.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from . import blocks, evaluate, optim
from .config import RunConfig
from .monitor import StabilityMonitor
from .stream import unwrapped
from .studies import PAPER_LRS

_OWN_NORMS = ("q_norm", "k_norm", "q_layernorm", "query_layernorm", "qk_norm")


def z_loss(logits_BxTxV: Tensor, mask_BxT: Tensor | None = None, coefficient: float = 1e-4) -> Tensor:
    """coefficient * mean(log^2 Z), to add to the loss; log Z = logsumexp(logits) in fp32 (paper P, Sec. 3.1.2).

    `mask` is true, or 1, at the tokens that count, aligned with the logits: padding would pull the mean to its own.
    """
    if mask_BxT is None:
        return coefficient * logits_BxTxV.float().logsumexp(-1).square().mean()
    if mask_BxT.shape != logits_BxTxV.shape[:-1]:
        raise ValueError(f"a mask {tuple(mask_BxT.shape)} does not go with logits {tuple(logits_BxTxV.shape)}: it has "
                         "one value a token, cut and shifted as the logits are")
    counts = mask_BxT.bool()
    # before the sum over V: of padding that is not finite even the gradient times zero would be NaN
    squares = logits_BxTxV.float().masked_fill(~counts.unsqueeze(-1), 0.0).logsumexp(-1).square()
    return coefficient * squares.masked_fill(~counts, 0.0).sum() / counts.sum().clamp_min(1)


@dataclasses.dataclass(frozen=True)
class _Projections:
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


def layer_norm(head_size: int) -> nn.Module:
    """Paper P's qk-norm: a gain and no bias, shared by all heads."""
    return nn.LayerNorm(head_size, bias=False)


def add_qk_norm(model: nn.Module, norm: Callable[[int], nn.Module] = layer_norm) -> nn.Module:
    """Normalise queries and keys over the head size, before rotary positions, in every attention layer of a Hugging
    Face model (paper P, Sec. 3.1.1); returned is the same model.

    For LLaMA, Mistral, Mixtral, Qwen2, Gemma, Gemma2, Phi, OPT, GPT-2, GPT-NeoX, BERT, ViT and others built of `q_proj`
    and `k_proj`. Before training from scratch, before the optimizer is made, and before weights saved with it are
    loaded: it changes what a pretrained model computes, and adds weights. `norm` makes one from the head size
    (`nn.RMSNorm` gives Qwen3's). Raises `ValueError` for a model that has qk-norm already and for other families.
    """
    for name, layer in _attention(model).items():
        _without_norm(name, unwrapped(model).get_submodule(name))
        made = {"query": norm(layer.head_size), "key": norm(layer.head_size)}
        for part, module in made.items():
            linear = getattr(layer, part)
            linear.add_module(f"{part}_norm", module.to(linear.weight.device, linear.weight.dtype))
        if layer.shape:
            layer.query.register_forward_hook(partial(_norm_both, shape=layer.shape, axis=layer.axis))
        else:
            layer.query.register_forward_hook(partial(_norm_one, part="query", size=layer.head_size))
            layer.key.register_forward_hook(partial(_norm_one, part="key", size=layer.head_size))
    return model


def _norm_one(linear: nn.Module, inputs: tuple, output: Tensor, part: str, size: int) -> Tensor:
    return linear.get_submodule(f"{part}_norm")(output.unflatten(-1, (-1, size))).flatten(-2)


def _norm_both(linear: nn.Module, inputs: tuple, output: Tensor, shape: tuple, axis: int) -> Tensor:
    query, key, value = output.unflatten(-1, shape).unbind(axis - 3)
    return torch.stack([linear.query_norm(query), linear.key_norm(key), value], axis - 3).flatten(-3)


@torch.no_grad()
def qk_clip(model: nn.Module, threshold: float, monitor: StabilityMonitor) -> dict[str, list[int]]:
    """Shrink query and key weights of heads whose largest logit passed `threshold` in the step that `monitor` just
    read, so that the same inputs would now give `threshold`; call it after `optimizer.step()`.

    Both shrink by sqrt(threshold / largest); where heads share keys (grouped queries) the queries alone, by the whole
    factor, as other heads need the keys (Kimi K2, arXiv 2507.20534, Sec. 2.1, where it runs at every step: `every=1`).
    Nothing happens at a step that was not read. Returns the heads that were clipped by layer. Raises `ValueError` where
    qk-norm or a soft cap stands between the weights and the logits, and for layers that `add_qk_norm` does not know.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}")
    clipped, maxima, monitor.head_maxima = {}, monitor.head_maxima, {}
    known = _attention(model) if maxima else {}
    for name, largest_H in maxima.items():
        layer_name = name.removesuffix(".core")
        if layer_name not in known:
            raise ValueError(f"QK-clip does not know the weights of {name}: it knows those of {', '.join(known)}")
        layer, module = known[layer_name], unwrapped(model).get_submodule(layer_name)
        _without_norm(layer_name, module)
        if getattr(getattr(module, "config", None), "attn_logit_softcapping", None):
            raise ValueError(f"the logits of {name} are soft-capped, so that scaling weights does not scale them: set "
                             "attn_logit_softcapping=None or leave QK-clip out")
        factor_H = torch.where(largest_H > threshold, threshold / largest_H, 1.0)
        if not bool((factor_H < 1).any()):
            continue
        own_keys = len(layer.heads("key")) == len(layer.heads("query"))
        for part in ("query", "key") if own_keys else ("query",):
            _scale(getattr(layer, part), layer.heads(part), factor_H.sqrt() if own_keys else factor_H)
        clipped[name] = (factor_H < 1).nonzero().flatten().tolist()
    return clipped


def _scale(linear: nn.Module, features_HxE: Tensor, factor_H: Tensor) -> None:
    weight, bias = linear.weight, linear.bias
    outputs = 1 if type(linear).__name__ == "Conv1D" else 0  # GPT-2 keeps [in, out]
    factor = torch.ones(weight.shape[outputs], device=weight.device)
    factor[features_HxE.to(weight.device)] = factor_H.to(weight.device, torch.float32).unsqueeze(-1)
    weight.mul_((factor.unsqueeze(0) if outputs else factor.unsqueeze(-1)).to(weight.dtype))
    if bias is not None:
        bias.mul_(factor.to(bias.dtype))


def _attention(model: nn.Module) -> dict[str, _Projections]:
    """The attention layers of a model by name; raises `ValueError` where there are none that are known."""
    found = {name: layer for name, module in unwrapped(model).named_modules() if (layer := _projections(module))}
    if not found:
        kinds = {type(part).__name__ for part in model.modules() if type(part).__name__.endswith("Attention")}
        whole = type(unwrapped(model)).__name__
        raise ValueError(f"no known queries and keys in {whole} ({', '.join(sorted(kinds))}): known are those of "
                         "q_proj and k_proj (LLaMA, Mistral, Qwen2, Phi, OPT, ViT, ...), of BERT, GPT-2 and GPT-NeoX")
    return found


def _projections(module: nn.Module) -> _Projections | None:
    kind, size = type(module).__name__, getattr(module, "head_dim", None)
    if isinstance(module, blocks.Attention):
        return _Projections(module.qkv, module.qkv, module.head_size, (3, -1, module.head_size), 0)
    if kind == "GPT2Attention" and not module.is_cross_attention:
        return _Projections(module.c_attn, module.c_attn, size, (3, -1, size), 0)
    if kind == "GPTNeoXAttention":
        joint, size = module.query_key_value, module.head_size
        return _Projections(joint, joint, size, (-1, 3, size), 1)
    if kind == "BertSelfAttention":
        return _Projections(module.query, module.key, module.attention_head_size)
    pair = [getattr(module, name, None) for name in ("q_proj", "k_proj")]
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if size and all(isinstance(linear, nn.Linear) for linear in pair) and pair[0].out_features % size == 0 and (
            heads is None or pair[0].out_features == heads * size):
        return _Projections(*pair, size)
    return None


def _without_norm(name: str, module: nn.Module) -> None:
    parts = [child for child, part in module.named_modules() if not isinstance(part, nn.Identity)
             and (child in _OWN_NORMS or child.endswith((".query_norm", ".key_norm")))]
    if parts:
        raise ValueError(f"{name} has qk-norm already ({parts[0]}), as Qwen3, Gemma3 and OLMo2 do: there is nothing to "
                         "add or clip")


def lr_range(make_model: Callable[[int], nn.Module], loss: Callable[[nn.Module, object], Tensor], batches: Sequence,
             held_out: Sequence, *, lrs: Iterable[float] = PAPER_LRS, steps: int = 500,
             seeds: Iterable[int] = (0, 1, 2), seconds: float = math.inf) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Paper P's experiment on a model of one's own: short runs over learning rates, and LR sensitivity (Sec. 2.2).

    Args:
        make_model: gives a fresh model for a seed.
        loss: the scalar loss of a model on a batch.
        batches: to train on, in this order, again from the first where they are too few.
        held_out: batches whose mean loss is that of a run, before and after.
        lrs, steps, seeds: one run for each learning rate and seed, with the recipe of `RunConfig`: AdamW, a warm-up
            over 5% of the steps, a cosine, independent weight decay, gradients clipped at norm 1.
        seconds: a budget. A seed is begun only if its runs should fit, going by those before.

    Returns one row a run (`lr`, `seed`, `loss_init`, `loss_final`, `status`, `stop_step`), and one a seed with
    `lr_sensitivity`, `best_lr` and `best_loss` by `evaluate.lr_sensitivity`. Raises `ValueError` where not even the
    first seed fits the budget.
    """
    lrs, seeds, rows, started = sorted(lrs), [*seeds], [], time.perf_counter()
    if not (lrs and seeds and len(batches) and len(held_out)):
        raise ValueError("lr_range needs a learning rate, a seed, batches to train on and held-out ones")
    for n, seed in enumerate(seeds):
        spent = time.perf_counter() - started
        if n and spent * (n + 1) / n > seconds:
            warnings.warn(f"{n} of {len(seeds)} seeds fit in {seconds:g} s", stacklevel=2)
            break
        for done, lr in enumerate(lrs):
            spent = time.perf_counter() - started
            if not n and done and spent / done * len(lrs) > seconds:
                raise ValueError(f"a run takes {spent / done:.3g} s, so {len(lrs)} do not fit in {seconds:g} s: take "
                                 "fewer steps or learning rates, or more seconds")
            rows.append({"lr": lr, "seed": seed} | _run(make_model, loss, batches, held_out, lr, steps, seed))
    table = pd.DataFrame(rows)
    sensitivity = evaluate.lr_sensitivity(table.assign(model="yours"), ["model"]).drop(columns="model")
    return table, sensitivity


def _run(make_model, loss, batches, held_out, lr: float, steps: int, seed: int) -> dict:
    config = RunConfig(lr=lr, steps=steps, warmup_steps=max(1, steps // 20))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_model(seed)
        optimizer, before, stopped = optim.build(model, config), _mean_loss(model, loss, held_out), None
        if not math.isfinite(before):
            raise ValueError(f"the held-out loss of a fresh model is {before} at seed {seed}: see make_model and loss")
        for step in range(steps):
            optim.set_lr(optimizer, optim.schedule(config, step))
            optimizer.zero_grad()
            value = loss(model, batches[step % len(batches)])
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if not bool(torch.isfinite(value.detach() + norm)):
                stopped = step
                break
            optimizer.step()
        after = math.nan if stopped is not None else _mean_loss(model, loss, held_out)
    status = "ok" if math.isfinite(after) else "diverged"
    return {"loss_init": before, "loss_final": after, "status": status,
            "stop_step": stopped if stopped is not None or status == "ok" else steps}


@torch.no_grad()
def _mean_loss(model: nn.Module, loss, batches: Sequence) -> float:
    training = model.training
    model.eval()
    found = torch.stack([loss(model, batch).float() for batch in batches]).mean()
    model.train(training)
    return float(found)
