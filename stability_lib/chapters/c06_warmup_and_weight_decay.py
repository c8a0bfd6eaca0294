"""Chapter 06, warm-up, weight decay, other optimizers and images (paper P, Figs 5, 6, E.7, E.9, E.10)."""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import PAPER_LRS, SIZES, short, size


def warm_up(scale: str) -> list[RunConfig]:
    """LR against loss by length of the warm-up, 1%, 5% and 25% of the run (paper P, Fig. 5)."""
    setting = short(scale)
    lengths = [max(1, setting.steps // 100), setting.warmup_steps, setting.steps // 4]
    return grid(setting, warmup_steps=lengths, size=_two_sizes(scale), lr=_lrs(scale), seed=[0, 1, 2])


def weight_decay(scale: str) -> list[RunConfig]:
    """PyTorch-style decay over the paper's two LR ranges, and how much independent decay (paper P, Figs 6,
    E.10). Independent decay of 1e-4, to compare both with, is `warm_up`'s arm of 5%. As that hardly shrinks anything in
    a short run, there is a stronger pair too: the largest independent decay, and PyTorch's with the same effect at LR
    1e-2."""
    setting, lrs = short(scale), _lrs(scale) if scale == "quick" else (1e-4, *_lrs(scale))
    pytorch = grid(setting, size=_two_sizes(scale), decay=["pytorch"], weight_decay=[0.1], lr=lrs, seed=[0, 1, 2])
    if scale == "quick":
        return pytorch
    small, decays = replace(setting, **_two_sizes(scale)[0]), [1e-3, 1e-2] if scale == "cpu" else [1e-5, 1e-3]
    stronger = [*grid(small, weight_decay=[0.0, *decays], lr=_lrs(scale), seed=[0, 1, 2]),
                *grid(small, decay=["pytorch"], weight_decay=[100 * decays[-1]], lr=lrs, seed=[0, 1, 2])]
    return list(dict.fromkeys(pytorch + stronger))


def steps_and_batch(scale: str) -> list[RunConfig]:
    """Half and double the steps, half and double the batch (paper P, Figs E.7, E.9), to compare with
    `warm_up`'s arm of 5%."""
    setting = short(scale)
    changes = [*(dict(steps=int(setting.steps * x), warmup_steps=int(setting.warmup_steps * x)) for x in (0.5, 2)),
               *(dict(batch_size=int(setting.batch_size * x)) for x in (0.5, 2))]
    return grid(setting, change=changes[:1] if scale == "quick" else changes, size=_two_sizes(scale)[:1],
                lr=_lrs(scale), seed=[0, 1, 2])


def other_optimizers(scale: str) -> list[RunConfig]:
    """Attention logits and qk-norm under AdamW, Lion and LAMB."""
    setting = replace(short(scale), probe_every=short(scale).steps // 10)
    lrs = _high_lrs(scale)[1::2] if scale == "gpu" else _high_lrs(scale)  # Lion and LAMB train one run at a time
    return grid(setting, size=_two_sizes(scale)[:1], optimizer=["adamw", "lion", "lamb"],
                qk_norm=["none", "head"], lr=lrs, seed=[0, 1, 2])


def digits(scale: str) -> list[RunConfig]:
    """Attention logits and qk-norm in a small Vision Transformer on scikit-learn's digits."""
    steps = short(scale).steps if scale in ("quick", "cpu") else 2000
    setting = RunConfig(data="digits", seq_len=64, positions="learned", steps=steps, warmup_steps=steps // 20,
                        probe_every=steps // 10)
    sizes = [size(96, 3, 32) if scale == "gpu" else size(32, 2)]
    return grid(setting, size=sizes, qk_norm=["none", "head"], lr=_high_lrs(scale), seed=[0, 1, 2])


def _two_sizes(scale: str) -> list[dict]:
    return {"quick": [size(32, 2)], "cpu": [size(32, 2), size(64, 3)], "gpu": SIZES["gpu"][:2]}.get(
        scale, SIZES[scale][:3])


def _lrs(scale: str) -> tuple[float, ...]:
    return PAPER_LRS[2::2] if scale == "quick" else PAPER_LRS


def _high_lrs(scale: str) -> tuple[float, ...]:
    return (1e-2, 3e-1) if scale == "quick" else PAPER_LRS[1:]


STUDIES = (warm_up, weight_decay, steps_and_batch, other_optimizers, digits)

CLAIMS = (
    Claim("P5.sensitivity", "P Fig. 5", "a longer warm-up lowers LR sensitivity", "lowers LR sensitivity",
          "LR sensitivity with the longest minus with the shortest warm-up (nats)", "<", 0.0),
    Claim("P5.loss", "P Fig. 5", "a longer warm-up lowers the loss", "lowers loss",
          "best loss over the LRs with the longest minus with the shortest warm-up (nats)", "<", 0.0),
    Claim("P5.larger", "P Fig. 5", "it helps the larger model more", "most for the larger models",
          "change of LR sensitivity from the shortest to the longest warm-up, largest minus smallest size (nats)",
          "<", 0.0),
    Claim("P6.sensitivity", "P Fig. 6", "independent weight decay lowers LR sensitivity",
          "lower than with PyTorch-style decay",
          "LR sensitivity with independent minus with PyTorch-style decay, the latter over the better of the "
          "paper's two LR ranges (nats)", "<", 0.0),
    Claim("PE10.best-lr", "P Fig. E.10", "more weight decay moves the best learning rate slightly up",
          "slightly right", "slope of log10 best LR per decade of lambda, independent decay", ">", 0.0),
    Claim("PE7.steps", "P Figs E.7, E.9", "LR sensitivity hardly depends on the number of steps",
          "hardly changes",
          "LR sensitivity with double minus half the steps, over that with the usual number", "within", 0.25),
    Claim("PE9.batch", "P Figs E.7, E.9", "nor on the batch size", "hardly changes",
          "LR sensitivity with double minus half the batch, over that with the usual size", "within", 0.25),
    Claim("Q1.lion-logits", "ours", "without qk-norm, attention logits blow up under Lion too", "not tested",
          "log10 of the peak attention logit, mean over failing runs without qk-norm, Lion", ">", 4.0),
    Claim("Q1.lion-cure", "ours", "and qk-norm prevents the failure", "not tested",
          "final loss without minus with qk-norm at the lowest LR that fails without it, Lion (nats)", ">", 0.3),
    Claim("Q1.lamb-logits", "ours", "without qk-norm, attention logits blow up under LAMB too", "not tested",
          "log10 of the peak attention logit, mean over failing runs without qk-norm, LAMB", ">", 4.0),
    Claim("Q1.lamb-cure", "ours", "and qk-norm prevents the failure", "not tested",
          "final loss without minus with qk-norm at the lowest LR that fails without it, LAMB (nats)", ">", 0.3),
    Claim("Q2.vit-logits", "ours", "without qk-norm, attention logits blow up in a Vision Transformer too",
          "not tested",
          "log10 of the peak attention logit, mean over failing runs without qk-norm, digits", ">", 4.0),
    Claim("Q2.vit-cure", "ours", "and qk-norm prevents the failure", "not tested",
          "final loss without minus with qk-norm at the lowest LR that fails without it, digits (nats)", ">", 0.3),
)
