"""AdamW, Lion, LAMB and Muon with independent or PyTorch-style weight decay, per-layer learning rates, and the schedule
of paper P."""

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


def eps(config: RunConfig, step: int) -> float:
    """AdamW's eps at 0-based `step`."""
    return config.eps if config.eps_late is None or 2 * step < config.steps else config.eps_late


def lr_multipliers(model: nn.Module, config: RunConfig) -> dict[str, float]:
    """Per parameter name, the factor on the LR: base fan-in / fan-in for linear layers under muParam, else 1.

    Source: paper P, Sec. 3.2.4. Every fan-in is a multiple of d_model, so the ratio is base_width / d_model.
    """
    scaled = 1.0 if config.parametrization == "standard" else config.base_width / config.d_model
    linear = {f"{name}.{weight}" for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name != "embed"  # the fan-in of an image's patches does not grow
              for weight in ("weight", "parametrizations.weight.original", "parametrizations.weight.original1")}
    return {name: scaled if name in linear else 1.0 for name, _ in model.named_parameters()}


def build(model: nn.Module, config: RunConfig) -> "torch.optim.Optimizer | Apart":
    """The optimizer of `config` for `model`; `set_lr` moves it along the schedule.

    All optimizers shrink weights by lr_t * weight_decay with lr_t = s_t * peak. Independent decay wants
    s_t * lambda (paper P, Sec. 3.2.2), hence weight_decay = lambda / peak, exact for every LR and multiplier. Under
    `pytorch` a layer of muParam shrinks by s_t * lr * multiplier * lambda, under `scaled` by s_t * lr * lambda.
    """
    multipliers = lr_multipliers(model, config)
    if config.optimizer == "muon" or config.qk_lr != "own":
        return Apart(model, config, multipliers)
    groups: dict[float, list] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(multipliers[name], []).append(parameter)
    settings = [_group(parameters, multiplier, config) for multiplier, parameters in groups.items()]
    kind, options = _kind(config, next(model.parameters()).device.type)
    if config.sam_rho:
        import pytorch_optimizer

        return pytorch_optimizer.SAM(settings, kind, rho=config.sam_rho, **options)
    return kind(settings, **options)


def _group(parameters: list, multiplier: float, config: RunConfig) -> dict:
    peak = config.lr * multiplier
    return {"params": parameters, "lr": peak, "peak": peak, "weight_decay": _decay(config, multiplier)}


def _decay(config: RunConfig, multiplier: float, scale: float = 1.0) -> float:
    """What an optimizer is to decay by, whose LR is at its peak `config.lr` times `multiplier` times `scale`."""
    peak = config.lr * multiplier * scale
    return config.weight_decay / {"independent": peak, "pytorch": 1, "scaled": multiplier * scale}[config.decay]


def _kind(config: RunConfig, device: str) -> tuple[type, dict]:
    """The class of the optimizer, of `muon` for what it leaves, and its options."""
    betas = dict(betas=(config.beta1, config.beta2))
    if config.optimizer in ("adamw", "muon"):
        return torch.optim.AdamW, betas | dict(eps=config.eps, fused=device in ("cpu", "cuda", "mps"))
    import pytorch_optimizer  # takes seconds to import

    if config.optimizer == "lion":
        return pytorch_optimizer.Lion, betas
    # adam_debias: without it steps are divided by 1 - beta1^t after the trust ratio, the first one tenfold too long
    return pytorch_optimizer.Lamb, betas | dict(eps=config.eps, adam_debias=True)


class Apart:
    """Optimizers of a model for which the query, key and value projections, rows of one matrix, are three: Muon makes
    each orthogonal by itself, and `qk_lr` gives W_Q and W_K learning rates of their own. It has of a torch optimizer
    what training uses."""

    def __init__(self, model: nn.Module, config: RunConfig, multipliers: dict[str, float]):
        self._config, self._parameters, self._joint = config, [*model.parameters()], []
        groups: dict[tuple[bool, float], list] = {}
        own: list[tuple[bool, dict]] = []
        for name, parameter in model.named_parameters():
            hidden = name.startswith("blocks.") and parameter.ndim == 2 and min(parameter.shape) > 1
            muon, pieces = hidden and config.optimizer == "muon", [parameter]
            if hidden and ".qkv." in name:
                pieces = [nn.Parameter(rows) for rows in parameter.detach().chunk(3)]  # views of the same memory
                self._joint.append((parameter, pieces))
                if config.qk_lr == "other_norm":
                    *pair, value = pieces
                    own += [(muon, _group([piece], multipliers[name], config) | {
                        "multiplier": multipliers[name], "other": other, "start": other.norm()})
                        for piece, other in zip(pair, reversed(pair), strict=True)]
                    pieces = [value]
            groups.setdefault((muon, multipliers[name]), []).extend(pieces)
        settings = own + [(muon, _group(pieces, multiplier, config)) for (muon, multiplier), pieces in groups.items()]
        others = _kind(config, self._parameters[0].device.type)
        kinds = {True: (torch.optim.Muon, dict(adjust_lr_fn="match_rms_adamw")), False: others}
        self._optimizers = [kind([group for muon, group in settings if muon == which], **options)
                            for which, (kind, options) in kinds.items() if any(muon == which for muon, _ in settings)]
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for whole, pieces in self._joint:
            for piece, rows in zip(pieces, whole.grad.chunk(3), strict=True):
                piece.grad = rows
        scales = [(group, float(group["start"] / group["other"].norm())) for group in self.param_groups
                  if "other" in group]
        for group, scale in scales:
            group["lr"] *= scale
            group["weight_decay"] = _decay(self._config, group["multiplier"], scale)
        for optimizer in self._optimizers:
            optimizer.step()


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's LR to `factor` (s_t) times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
