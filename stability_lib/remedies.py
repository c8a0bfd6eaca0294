"""Remedies for a model and loop of one's own: z-loss, qk-norm, QK-clip, and the learning rates it can stand.

Dimensions: B batch, T position, V vocabulary.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from . import evaluate, optim, projections
from .config import RunConfig
from .monitor import StabilityMonitor
from .stream import unwrapped
from .studies import PAPER_LRS


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
    for name, layer in projections.of(model).items():
        projections.require_no_norm(name, unwrapped(model).get_submodule(name))
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


def qk_clip(model: nn.Module, threshold: float, monitor: StabilityMonitor) -> dict[str, list[int]]:
    """Shrink query and key weights of heads whose largest logit passed `threshold` in the step that `monitor` just
    read, so that the same inputs would now give `threshold`, see `projections.clip`; call it after `optimizer.step()`.

    Kimi K2 runs it at every step (`every=1`). Nothing happens at a step that was not read. Returns the heads that were
    clipped by layer. Raises `ValueError` where qk-norm or a soft cap stands between the weights and the logits, and for
    layers that `add_qk_norm` does not know.
    """
    maxima, monitor.head_maxima = monitor.head_maxima, {}
    return projections.clip(model, maxima, threshold)


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
