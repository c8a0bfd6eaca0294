"""AdamW, Lion and LAMB with independent or PyTorch-style weight decay, per-layer learning rates, and the schedule of
paper P."""

import math

import torch
from torch import nn

from .config import RunConfig


def schedule(config: RunConfig, step: int) -> float:
    """s_t in [0, 1], the factor on the peak LR at 0-based `step`: linear warm-up, then a cosine to `lr_final`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = min(1.0, config.lr_final / config.lr)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def lr_multipliers(model: nn.Module, config: RunConfig) -> dict[str, float]:
    """Per parameter name, the factor on the LR: base fan-in / fan-in for linear layers under muParam, else 1.

    Source: paper P, Sec. 3.2.4. Every fan-in is a multiple of d_model, so the ratio is base_width / d_model.
    """
    scaled = 1.0 if config.parametrization == "standard" else config.base_width / config.d_model
    linear = {f"{name}.{weight}" for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name != "embed"  # the fan-in of an image's patches does not grow
              for weight in ("weight", "parametrizations.weight.original", "parametrizations.weight.original1")}
    return {name: scaled if name in linear else 1.0 for name, _ in model.named_parameters()}


def build(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` for `model`; `set_lr` moves it along the schedule.

    All three optimizers shrink weights by lr_t * weight_decay with lr_t = s_t * peak. Independent decay wants
    s_t * lambda (paper P, Sec. 3.2.2), hence weight_decay = lambda / peak, exact for every LR and multiplier. Under
    `pytorch` a layer of muParam shrinks by s_t * lr * multiplier * lambda.
    """
    groups: dict[float, list] = {}
    multipliers = lr_multipliers(model, config)
    for name, parameter in model.named_parameters():
        groups.setdefault(multipliers[name], []).append(parameter)
    settings = []
    for multiplier, parameters in groups.items():
        peak = config.lr * multiplier
        decay = config.weight_decay / (peak if config.decay == "independent" else 1)
        settings.append({"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay})
    betas = dict(betas=(config.beta1, config.beta2))
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    kind, options = torch.optim.AdamW, betas | dict(eps=config.eps, fused=fused)
    if config.optimizer != "adamw" or config.sam_rho:
        import pytorch_optimizer  # takes seconds to import

        if config.optimizer == "lion":
            kind, options = pytorch_optimizer.Lion, betas
        elif config.optimizer == "lamb":
            # adam_debias: without it steps are divided by 1 - beta1^t after the trust ratio, the first one tenfold too
            # long
            kind, options = pytorch_optimizer.Lamb, betas | dict(eps=config.eps, adam_debias=True)
        if config.sam_rho:
            return pytorch_optimizer.SAM(settings, kind, rho=config.sam_rho, **options)
    return kind(settings, **options)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's LR to `factor` (s_t) times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
