"""The pictures of README, site and chapters that no notebook's cell draws: `python -m stability_lib figures`.

They go to docs/figures. Each is drawn from a real model or from committed runs; nothing is trained.
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Wedge
from torch import nn

from . import batch, data, evaluate, koopman, models, plotting, studies
from .config import RunConfig

FOLDER = Path("docs/figures")
SETTING = RunConfig(**studies.RECALL)
"""Whose untrained model the picture of the profile shows: a Pre-LN model of chapter 04, without training."""
INSIDE, BEYOND, WITHIN = "#0b7a75", "#b8560b", "#5b6b8c"
"""Colours of eigenvalues in the ring, beyond it, and nearer to zero."""


def profile_picture(setting: RunConfig = SETTING, layer: int = 1, states: int = 1024) -> Figure:
    """From a block of a model to its eigenvalues: the block, the token states before and after it, the matrix fitted
    to them, and its spectrum with the ring of M1 shaded (paper K, Alg. 1, Fig. 1)."""
    model = models.build(setting, data.vocab_size(setting))
    tokens = data.validation(setting)[:, :-1]
    x, y = states_around(model, model.blocks[layer], tokens, states)
    profile = koopman.layer_profile(x, y, layer=layer)
    fitted = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0].T
    figure, axes = plt.subplots(1, 7, figsize=(16, 4.3), width_ratios=[1.2, 0.55, 0.55, 0.3, 1.2, 0.3, 1.7])
    block, before, after, fit, matrix, spectrum, plane = axes
    _block(block, layer)
    reach = float(np.quantile(np.abs(x), 0.99))
    for ax, states_NxD, name in ((before, x, "X, before"), (after, y, "Y, after")):
        ax.imshow(states_NxD[:64], cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
        ax.set(title=name, xlabel=f"width {x.shape[1]}")
    before.set_ylabel(f"64 of {len(x)} token states")
    matrix.imshow(fitted, cmap="RdBu_r", vmin=-1, vmax=1)
    matrix.set(title="A, the best linear fit: Y ≈ A X", xlabel=f"{len(fitted)} by {len(fitted)}, on centred states")
    for ax in (before, after, matrix):
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    for ax, word in ((fit, "least\nsquares"), (spectrum, "eigen-\nvalues")):
        ax.axis("off")
        ax.annotate("", (1, 0.5), (0, 0.5), "axes fraction", arrowprops=dict(arrowstyle="-|>", color="0.3", lw=2))
        ax.text(0.5, 0.53, word, ha="center", va="bottom", fontsize="small", transform=ax.transAxes)
    _plane(plane, profile)
    return figure


def states_around(model: nn.Module, block: nn.Module, tokens: torch.Tensor, states: int) -> tuple[np.ndarray, ...]:
    """The token states that enter and leave a block, `states` of them drawn at random from those of `tokens`."""
    seen = []
    hook = block.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    x, y = (found.flatten(0, -2).double().numpy() for found in seen)
    chosen = np.random.default_rng(0).permutation(len(x))[:states]
    return x[chosen], y[chosen]


def _block(ax: Axes, layer: int) -> None:
    """The residual block: a stream that goes up, to which attention and MLP add."""
    ax.set(xlim=(0, 10), ylim=(0, 10), title=f"Block {layer} of a Transformer")
    ax.axis("off")
    arrow = dict(arrowstyle="-|>", color="0.3", lw=1.5, shrinkA=0, shrinkB=0)
    ax.annotate("", (2.5, 9.6), (2.5, 0.4), arrowprops=arrow | {"lw": 2.5})
    for y, name, colour in ((2.7, "LayerNorm\nattention", "#dbe7f3"), (6.4, "LayerNorm\nMLP", "#f3e6d4")):
        ax.add_patch(FancyBboxPatch((4.7, y - 0.9), 4.8, 1.8, boxstyle="round,pad=0.1", fc=colour, ec="0.4"))
        ax.text(7.1, y, name, ha="center", va="center", fontsize="small")
        ax.annotate("", (4.6, y - 0.6), (2.5, y - 0.6), arrowprops=arrow)
        ax.annotate("", (2.9, y + 0.6), (4.6, y + 0.6), arrowprops=arrow)
        ax.text(2.5, y + 0.6, "+", ha="center", va="center", fontsize=13,
                bbox=dict(boxstyle="circle,pad=0.12", fc="white", ec="0.3"))
    for y, text in ((0.8, "X"), (9.2, "Y")):
        ax.text(1.2, y, text, fontsize=15, weight="bold", ha="center", va="center")
    ax.text(0.9, 5, "residual stream", rotation=90, ha="center", va="center", fontsize="small", color="0.35")


def _plane(ax: Axes, profile: koopman.LayerProfile) -> None:
    """A layer's eigenvalues in the complex plane, the ring shaded."""
    low, high = koopman.PAPER.near_low, koopman.PAPER.near_high
    values, size = profile.eigenvalues, np.abs(profile.eigenvalues)
    ax.add_patch(Wedge((0, 0), high, 0, 360, width=high - low, color="#cfe3e1", zorder=0))
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 361))
    ax.plot(circle.real, circle.imag, color="0.4", lw=1)
    counts = {"in the ring": (size >= low) & (size <= high), "beyond it": size > high, "nearer to 0": size < low}
    for (name, which), colour, marker in zip(counts.items(), (INSIDE, BEYOND, WITHIN), "o^s", strict=True):
        ax.scatter(values[which].real, values[which].imag, s=26, marker=marker, color=colour, zorder=3,
                   label=f"{name}: {which.sum()}")
    reach = 1.1 * max(size.max(), high)
    ax.set(xlim=(-1.15, reach), aspect="equal", xlabel="real part", ylabel="imaginary part",
           title=f"Eigenvalues of A: M1 = {profile.near_unit_mass:.2f} in the ring")
    ax.legend(frameon=False, fontsize="small", loc="center", bbox_to_anchor=(-0.4, 0), bbox_transform=ax.transData,
              handletextpad=0.1)


def learning_rates() -> list[PIL.Image.Image]:
    """A frame a learning rate: the largest model of chapter 01 on its curve of loss, and its attention logits."""
    found = batch.Session().stored("attention_logit_growth", "cpu")
    found = found.assign(loss=evaluate.capped_loss(found))
    largest, frames = found[found["d_model"] == found["d_model"].max()], []
    for lr in sorted(largest["lr"].unique()):
        figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8))
        plotting.at_lr(axes, largest, lr)
        frames.append(PIL.Image.open(io.BytesIO(plotting.picture(figure))))
    return frames


def write(folder: Path | None = None) -> list[Path]:
    """Draw all pictures into `folder` (default docs/figures); their paths."""
    folder = batch.checkout() / FOLDER if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    plotting.use_style()
    profile, moving = folder / "profile.png", folder / "learning_rates.gif"
    profile.write_bytes(plotting.picture(profile_picture()))
    first, *rest = learning_rates()
    first.save(moving, save_all=True, append_images=rest, duration=1500, loop=0)
    return [profile, moving]
