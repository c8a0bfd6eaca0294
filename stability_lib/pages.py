"""Profiles as a self-contained HTML page and JSON, for one model or two side by side."""

import base64
import contextlib
import io
import platform
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from . import __version__
from .profiles import METRICS, STATES_PER_MODE, Profile, draw_eigenvalues, write_whole
from .stream import ProfileError

SHOWN = (*METRICS[:7], "kreiss_scaled", *METRICS[9:])
"""The metrics of a page: K(A) itself is infinite nearly everywhere."""
SHARES = (*METRICS[:4], "nonlinearity", "reliable_share")
"""Those that lie between 0 and 1."""


def report(names: list[str], output: Path, *, prompts: Path | None = None, revision: str | None = None,
           device: str = "cpu", progress: bool = True, **settings) -> tuple[dict[str, Profile], Path]:
    """Profile a model, or two, and write the page and a JSON file each into `output`; the profiles and the page.

    A name is what `checkpoint.locate` takes, or a JSON file that an earlier report wrote. Results of layers are kept in
    `output` until the page is there; what ends before there are any leaves no file and no folder. Raises
    `ProfileError`, before anything is profiled where it can.
    """
    from . import checkpoint  # needs the extra `pretrained`

    stems = [_file_name(Path(name).resolve().name if Path(name).exists() else name) for name in names]
    if len(set(stems)) < len(names):
        stems = [_file_name(name) for name in names]
    if len(set(stems)) < len(names):
        raise ProfileError(f"{' and '.join(names)} are one: compare two models")
    texts = None if prompts is None else _lines(prompts)
    old = {name: Profile.load(name) for name in names if name.endswith(".json")}
    places = {name: checkpoint.locate(name, revision) for name in names if name not in old}
    path = output / ("-against-".join(stems) + ".html")
    found, about, keep = {}, {}, output / "unfinished" / path.stem
    for name, stem in zip(names, stems, strict=True):
        told = {"model": name} | ({"revision": revision} if revision else {})
        if name in old:
            found[name] = old[name]
        else:
            found[name] = checkpoint.profile(places[name], texts, device=device, progress=progress, keep=keep,
                                             **settings)
            output.mkdir(parents=True, exist_ok=True)
            told |= {"prompts": str(prompts or "the 32 of stability_lib.prompts"), "weights": _weights(places[name]),
                     "settings": ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None)} | versions()
            found[name].save(output / f"{stem}.json", about=told)
        about[name] = told | {"layers": len(found[name]), "width": found[name].layers[0].width,
                              "token states": found[name].layers[0].snapshots,
                              "modes": found[name].layers[0].modes}
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(found, about))
    shutil.rmtree(keep, ignore_errors=True)
    with contextlib.suppress(OSError):  # another report is on its way
        keep.parent.rmdir()
    return found, path


def page(profiles: Mapping[str, Profile], about: Mapping[str, Mapping] | None = None) -> str:
    """The HTML of a page; `about` has facts for each name, as rows of its table."""
    tables = {name: shown(profile).rename(columns=_words).to_html(border=0, float_format="{:.3g}".format, na_rep="-")
              for name, profile in profiles.items()}
    means = pd.DataFrame({name: profile.summary()["mean"] for name, profile in profiles.items()}).loc[list(SHOWN)]
    means = means.rename(index=_words)
    return jinja2.Environment(autoescape=True).from_string(_PAGE).render(
        profiles=profiles, tables=tables, about=about or {}, versions=versions(), per_mode=STATES_PER_MODE,
        means=means.to_html(border=0, float_format="{:.3g}".format, na_rep="-"),
        planes={name: _png(_plane(profile)) for name, profile in profiles.items()}, depth=_png(_depth(profiles)))


def shown(profile: Profile) -> pd.DataFrame:
    """The table of a page: a row a layer."""
    return profile.table().set_index("layer")[["snapshots", "modes", *SHOWN]]


def versions() -> dict[str, str]:
    """Of what a profile depends on, and when it was made."""
    import transformers

    return {"stability_lib": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "platform": platform.platform(),
            "written": datetime.now(UTC).isoformat(timespec="seconds")}


def _plane(profile: Profile) -> Figure:
    """Eigenvalues of all layers; the view holds 99% of them."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    limits, ax = profile.thresholds, figure.subplots()
    draw_eigenvalues(ax, profile)
    sizes = np.abs(np.concatenate([layer.eigenvalues for layer in profile.layers]))
    reach = 1.05 * max(np.quantile(sizes, 0.99), limits.near_high)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    outside = int((sizes > reach).sum())
    ax.set_title(f"ring: {limits.near_low:g} to {limits.near_high:g}"
                 + (f"; {outside} of {len(sizes)} eigenvalues lie outside the view" if outside else ""), fontsize=10)
    return figure


def _depth(profiles: Mapping[str, Profile]) -> Figure:
    """Every metric against depth, a line a model; hollow where a layer is degenerate. Axes begin at 0, and those of
    shares end at 1, so that a small difference looks small."""
    from seaborn import color_palette

    from .plotting import MARKERS

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    for ax, metric in zip(figure.subplots(2, len(SHOWN) // 2).flat, SHOWN, strict=True):
        colours = color_palette("deep", len(profiles))
        for (name, profile), colour, marker in zip(profiles.items(), colours, cycle(MARKERS), strict=False):
            table = profile.table()
            values = table[metric].replace([np.inf, -np.inf], np.nan)
            ax.plot(table["layer"], values, marker + "-", markersize=4, color=colour, label=name)
            ax.plot(table["layer"][table["degenerate"]], values[table["degenerate"]], marker, mfc="white", color=colour)
            if metric not in SHARES and values.min() > 0 and values.max() > 20 * values.min():
                ax.set_yscale("log")
        if ax.get_yscale() == "linear":
            ax.set_ylim(*((-0.03, 1.03) if metric in SHARES else (0, None)))
        ax.set_title(_words(metric), fontsize=10)
        ax.set_xlabel("layer", fontsize=9)
    if len(profiles) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _lines(path: Path) -> list[str]:
    try:
        texts = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"prompts {path} cannot be read ({error}): pass a text file with a prompt a line") from error
    if not texts:
        raise ProfileError(f"prompts {path} has no text: write a prompt a line")
    return texts


def _weights(path: Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF, dequantised: not the weights that were trained where the type is one of less than 16 bits"
    return "safetensors, as float32"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".json").removesuffix(".gguf").strip("/.~")).strip("-")[-80:]


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Spectral profile: {{ profiles | join(" against ") }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
 table { border-collapse: collapse; margin: 1rem 0; font-size: 14px } img { max-width: 100% }
 th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd } .facts * { text-align: left }
 .warning { background: #fff3d6; padding: .5rem 1rem } thead th { vertical-align: bottom }
 pre { white-space: pre-wrap; font: inherit; border-left: 4px solid #888; padding-left: 1rem }
 .wide { overflow-x: auto } figure { margin: 1.5rem 0 } figcaption { font-weight: 600 }
</style>
<h1>Spectral profile: {{ profiles | join(" against ") }}</h1>
{% for name, profile in profiles.items() %}<h2>{{ name }}</h2>
{% set exact = profile.fitted_exactly %}{% set layer = exact or profile.layers[0] %}
{% if layer.snapshots < profile.states_wanted %}<p class="warning">{{ layer.snapshots }} token states for
{{ layer.modes }} modes{% if layer.modes < layer.width %} of {{ layer.width }}{% endif %}: {% if exact %}they are
fitted exactly whatever the layer does, so <b>eta and all residuals are 0 and kappa means little</b>.{% else %}eta and
the residuals look smaller than they are.{% endif %} Use {{ profile.states_wanted }} or more (more prompts, and
--snapshots), or fewer modes (--rank).</p>{% endif %}
<p>The decision flow of paper K's figure 7 says:</p><pre>{{ profile.verdict() }}</pre>
<figure><figcaption>Eigenvalues of every layer, the ring of M1 shaded</figcaption>
<img alt="eigenvalues" src="data:image/png;base64,{{ planes[name] }}"></figure>
<table class="facts">{% for fact, value in about.get(name, {}).items() %}<tr><th>{{ fact }}</th><td>{{ value }}</td>
</tr>{% endfor %}</table>{% endfor %}
<h2>Metrics against depth</h2>
<figure><img alt="metrics against depth" src="data:image/png;base64,{{ depth }}"></figure>
{% if profiles | length > 1 %}<h2>Means over layers</h2><div class="wide">{{ means | safe }}</div>{% endif %}
{% for name, table in tables.items() %}<h2>Every layer of {{ name }}</h2>
<div class="wide">{{ table | safe }}</div>{% endfor %}
<h2>What this means</h2><ul>
<li>Each layer maps the residual stream to the next. The profile fits that map by a matrix, over the token states of the
prompts, centred and whitened (Kim et al. 2026, arXiv 2602.22988, algorithm 1), and describes the matrix by its
eigenvalues.</li>
<li><b>near unit mass</b> (M1): the share of eigenvalues in the ring; <b>expansive</b>, <b>contractive</b>, <b>mid</b>:
the shares beyond it, below 0.80 and between. <b>spectral radius</b>: the largest modulus. <b>eigenvector condition</b>
(kappa): 1 for orthogonal eigenvectors; the larger, the less the eigenvalues say of what happens in a few layers.
<b>nonlinearity</b> (eta): the part of the layer's update that the fit misses. <b>reliable share</b>: of eigenvalues
with a residual up to 0.1. <b>update size</b>: how large the update is beside the stream.</li>
<li>eta and residuals are in-sample: with N token states for M modes eta is about sqrt(1 - M/N) of what other states
would show. {{ per_mode }} states a mode make that 0.87.</li></ul>
<h2>What this does not mean</h2><ul>
<li>The decision flow is meant for models before training. Of a trained model it says nothing that was tested.</li>
<li>A profile does not know the learning rate, on which divergence depends most. In chapter 04 of this project it told
models with norms from models without, and which runs of them diverge it did not tell; a minority of its warnings were
right, and models without norms whose weights start larger got a go and diverged at a learning rate of 0.03.</li>
<li>A high M1 is not a fault to repair: models near the identity at the start (ReZero, Fixup) and stable models under
weight norm have one. In chapters 05 and 10 shaping the spectrum at the paper's dose prevented nothing that could be
told, a stronger dose kept models from learning, and norms or weight norm did as well.</li>
<li>Other prompts, numbers of token states, a rank, or leaving out the first token change the numbers, kappa and eta
most: compare only profiles that were made alike.</li></ul>
<p>{% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</p>
</html>
"""
