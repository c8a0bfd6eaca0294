"""Chapter 04, what a spectral profile shows, and whether it ranks runs by divergence (paper K, Fig. 1, Tables 1, 2).

The first sweep has widths 32 and 64, where the near-unit mass of models without norms is 1.00: what M1 knows beyond the
norm's name, and within a norm, could not be told there. `wider_sweep` and `without_norms` came after it and were
designed from a pilot on seeds 100 and 101 (532 runs, two to four layers, widths 128 and 256): models without norms fail
from about 0.0085 (128 wide, two layers), 0.0055 (four), 0.0047 (256, two) and 0.0028 (four) on, models with norms
between 0.2 and 0.8, GPT-2's initialization a little earlier than the others at width 256.

Claims that gain these runs, under the criteria they had: KT2.beats-gradients, KT2.beats-norm-type, KT2.within-norms
(0.011 [0, 0.024], 0 [0, 0] and 0.37 [0.23, 0.54] on the first sweep). The others keep theirs. KT1.no-norm-diverges, the
share that diverges at rates up to 0.03, measured which rates one chooses (15 of 36); KT1.no-norm-paper-rates takes the
paper's (0.005 to 0.01, its table 3) and widths. New are KT2.m1-auroc-wider and the last three.

What the runs can decide, by a simulation from the pilot (95% intervals over settings): KT2.beats-norm-type -0.10
[-0.17, -0.02]; KT2.within-norms 0.18 [0.09, 0.35]; KT2.within-no-norm 0.13 [0.05, 0.27]; KT2.m1-auroc-wider 0.77
[0.67, 0.88]; KT1.no-norm-paper-rates 0.75 [0.67, 0.82]. KT2.within-shape: 36 settings, an interval of about +-0.14, so
that an AUROC of 0.65 shows as over 0.5; KT2.within-model: some 160 pairs that differ in the seed, +-0.11: where M1 says
nothing, nine in ten such samples end below 0.7.
"""

import numpy as np
import pandas as pd

from ..claims import Claim
from ..config import CHOICES, RunConfig, grid, replace
from ..runs import reading
from ..studies import RECALL, check_scale

_SWEEP = {
    "quick": ([(32, 2)], [1e-2, 3e-2, 8e-1], 60),
    "cpu": ([(32, 2), (64, 2), (32, 4), (64, 4)], [3e-3, 1e-2, 3e-2, 1e-1, 2e-1, 4e-1, 8e-1, 1.6], 200),
    "gpu": ([(128, 2), (288, 2)], [3e-3, 3e-2, 8e-1], 2000),
    "paper": ([(128, 4), (256, 8), (512, 12), (1024, 24)], [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], 10_000),
}
"""Widths and depths, learning rates and steps of chapter 04."""
LRS = {scale: lrs for scale, (_, lrs, _) in _SWEEP.items()}


def divergence_sweep(scale: str) -> list[RunConfig]:
    """Which norm placements, shapes and learning rates diverge on associative recall (paper K, Table 1)."""
    sizes, lrs, steps = _SWEEP[check_scale(scale)]
    longer = dict(seq_len=64) if scale == "paper" else {}
    setting = RunConfig(**RECALL | longer, steps=steps, warmup_steps=steps // 10)
    return grid(setting, norm=CHOICES["norm"], size=[dict(d_model=d, n_layers=n) for d, n in sizes], lr=lrs,
                seed=[42] if scale == "quick" else [42, 123, 456])


def unseen_architectures(scale: str) -> list[RunConfig]:
    """Architectures and a size that `divergence_sweep` lacks, at its learning rates, to hold forecasts of
    the largest stable one to."""
    d_model, n_layers = {"quick": (32, 2), "cpu": (48, 3), "gpu": (160, 3), "paper": (384, 6)}[check_scale(scale)]
    without = [dict(init="xavier"), dict(init="fan_in"), dict(residual="scaled"), dict(residual="rezero"),
               dict(qk_norm="head")]
    arms = [*(dict(norm="no_norm") | arm for arm in without), dict(norm="pre_ln", init="fan_in"),
            dict(norm="pre_ln", residual="scaled"), dict(norm="post_ln", init="xavier")]
    first = replace(divergence_sweep(scale)[0], d_model=d_model, n_layers=n_layers)
    return grid(first, arm=arms[1:3] if scale == "quick" else arms, lr=LRS[scale],
                seed=[42] if scale == "quick" else [42, 123, 456])


_WIDE = {
    "quick": ([(48, 2)], [1e-2, 3e-2], [(48, 2)], [3e-2, 8e-1], [42]),
    "cpu": ([(128, 2), (128, 4), (192, 2), (192, 4), (256, 2), (256, 3), (256, 4)], [3e-3, 5e-3, 7e-3, 1e-2],
            [(128, 2), (256, 2)], [3e-2, 4e-1, 8e-1], [42, 123, 456, 0, 1, 2]),
    "gpu": ([(1152, 2)], [3e-3, 1e-2], [(1152, 2)], [3e-2, 8e-1], [42, 123, 456]),
    "paper": ([(384, 6), (768, 12)], [1e-4, 3e-4, 1e-3, 3e-3], [(384, 6), (768, 12)], [3e-2, 1e-1], [42, 123, 456]),
}
"""Of `wider_sweep`: shapes and learning rates without norms and with, and seeds."""


def wider_sweep(scale: str) -> list[RunConfig]:
    """`divergence_sweep` at widths where the near-unit mass of models without norms leaves one: those at learning rates
    around where they fail, with twice the seeds, models with norms where they do."""
    bare, lower, normed, higher, seeds = _WIDE[check_scale(scale)]
    first = replace(divergence_sweep(scale)[0], **dict(steps=200, warmup_steps=20) if scale == "gpu" else {})
    shapes = lambda sizes: [dict(d_model=d, n_layers=n) for d, n in sizes]  # noqa: E731
    norms = ["post_ln"] if scale == "gpu" else [norm for norm in CHOICES["norm"] if norm != "no_norm"]
    return [*grid(first, norm=["no_norm"], size=shapes(bare), lr=lower, seed=seeds),
            *grid(first, norm=norms, size=shapes(normed), lr=higher, seed=seeds[:3])]


def without_norms(scale: str) -> list[RunConfig]:
    """Models without norms near where they fail, whose near-unit mass is anything from 0.1 to 1: by
    initialization, with residual branches scaled down, and with qk-norm."""
    near = {
        "quick": {(48, 2): [1e-2, 2e-2]},
        "cpu": {(128, 2): [7.5e-3, 9e-3, 1.1e-2], (128, 4): [4.5e-3, 5.5e-3, 7e-3], (256, 2): [4e-3, 4.8e-3, 5.8e-3]},
        "gpu": {(1152, 2): [1e-3]},
        "paper": {(768, 12): [1e-4, 3e-4, 1e-3]},
    }[check_scale(scale)]
    first, seeds = replace(wider_sweep(scale)[0], norm="no_norm"), [0, 1] if scale == "quick" else [0, 1, 2]
    changes = [{}, dict(residual="scaled"), dict(qk_norm="head")][:1 if scale in ("quick", "gpu") else 3]
    inits = CHOICES["init"][:3 if scale == "gpu" else 4]
    return [run for (d, n), lrs in near.items()
            for run in grid(replace(first, d_model=d, n_layers=n), init=inits, change=changes, lr=lrs, seed=seeds)]


def spectra_wider(scale: str) -> list[RunConfig]:
    """Profiles of the untrained models of `wider_sweep` and `without_norms`."""
    return list(dict.fromkeys(untrained(config) for config in wider_sweep(scale) + without_norms(scale)))


def untrained(config: RunConfig, **changes) -> RunConfig:
    """A run of one step that profiles 2048 token states of the model `config` starts from, before that step."""
    return replace(config, **dict(
        lr=1e-2, steps=1, warmup_steps=0, batch_size=2048 // config.seq_len, eval_sequences=32, diverge_loss=None,
        diverge_grad_norm=None, spectra_every=1) | changes)


def spectra_at_init(scale: str) -> list[RunConfig]:
    """Profiles of untrained models. By norm and, each alone, width, depth and initialization (paper K,
    Table 1), and with Kreiss constants of every model that the chapter trains."""
    setting = RunConfig(**RECALL | dict(seq_len=64, d_model=128, n_layers=4))
    inits = [dict(init="pytorch"), dict(init="xavier"), dict(init="fan_in")][:1 if scale == "gpu" else 3]
    shapes = [dict(d_model=64), dict(d_model=256), dict(n_layers=2), dict(n_layers=8)]
    changes = [{}, *(shapes if scale in ("cpu", "paper") else []), *inits]
    trained = [untrained(config, spectra_kreiss=True)
               for config in divergence_sweep(scale) + unseen_architectures(scale)]
    by_choice = grid(untrained(setting), norm=CHOICES["norm"], change=changes, seed=[42, 123, 456])
    return list(dict.fromkeys(by_choice + trained))


IDENTITY = ["norm", "init", "residual", "qk_norm", "d_model", "n_layers", "seq_len", "seed"]
"""What an untrained model is known by."""
METRICS = ["near_unit_mass", "expansive_mass", "spectral_radius", "eigenvector_condition", "nonlinearity",
           "reliable_share", "update_size"]


def of_models(spectra: pd.DataFrame) -> pd.DataFrame:
    """A row per profiled model: `IDENTITY`, the means of `METRICS` over its layers, rho of the first and last one, the
    mean of log10 of the scaled Kreiss constant (NaN where it was not searched), and the share of layers with rho over
    one."""
    rho, kreiss = ([np.array([curves.get(f"{name}/block{i}", [np.nan])[0] for i in range(n)], dtype=float)
                    for curves, n in zip(spectra["curves"], spectra["n_layers"], strict=True)]
                   for name in ("spectral_radius", "kreiss_scaled"))
    return spectra[IDENTITY].assign(
        **{name: reading(spectra, name) for name in METRICS}, rho_first=[each[0] for each in rho],
        rho_last=[each[-1] for each in rho], log_kreiss=[np.log10(each).mean() for each in kreiss],
        expanding_layers=[np.mean(each > 1) for each in rho])


def with_profiles(runs: pd.DataFrame, profiles: pd.DataFrame) -> pd.DataFrame:
    """Runs with the row of `of_models` of the model they started from, and `failed`, `no_norms` and, in words, their
    `setting`."""
    found = runs.merge(profiles, on=IDENTITY, validate="many_to_one")
    shape = found["d_model"].astype(str) + "x" + found["n_layers"].astype(str)
    return found.assign(failed=found["status"] == "diverged", no_norms=(found["norm"] == "no_norm").astype(float),
                        setting=found["norm"] + " " + shape, width_depth=shape)


STUDIES = (divergence_sweep, wider_sweep, without_norms, spectra_at_init, spectra_wider)

CLAIMS = (
    Claim("KT1.near-unit-mass", "K Table 1", "the norm placements differ in near-unit mass at initialization",
          "M1 0.16, 0.66, 0.16, 0.00, 0.13, 0.80",
          "mean distance of our M1 from Table 1's over its six norms (DeepNorm as `deepnorm_pre`), GPT-2's "
          "initialization", "<", 0.1),
    Claim("KT1.spectral-radius", "K Table 1", "and in spectral radius", "rho 2.29, 7.48, 2.28, 3.94, 2.23, 1.11",
          "mean |log10 (our rho / Table 1's)| over its six norms (DeepNorm as `deepnorm_pre`), GPT-2's "
          "initialization", "<", 0.1),
    Claim("KF1.radius-grows", "K Fig. 1", "early layers lie near the unit circle, late ones have a larger radius",
          "late layers larger", "rho of the last minus the first layer, Pre-LN at initialization", ">", 0.0),
    Claim("KT1.normed-stable", "K Table 1", "models with norms do not diverge",
          "0 of 130", "share of runs with norms that diverge at LR up to 3e-2", "<", 0.05),
    Claim("KT1.no-norm-paper-rates", "K Tables 1, 3", "models without norms diverge at the paper's rates and widths",
          "81 of 84; 16 of 24", "share of runs without norms, 128 wide or wider, that diverge at LR 5e-3 to 1e-2", ">",
          0.5),
    Claim("KT2.m1-auroc", "K Table 2", "near-unit mass at initialization separates runs that diverge",
          "AUROC 0.995", "AUROC of mean M1, LR up to 3e-2", ">", 0.9),
    Claim("KT2.m1-auroc-wider", "K Table 2", "the same with models 128 to 256 wide among them", "AUROC 0.995",
          "AUROC of mean M1, LR up to 3e-2, both sweeps", ">", 0.9),
    Claim("KT2.across-lrs", "ours", "the same over all learning rates of the grid",
          "AUROC 0.995 at its own", "AUROC of mean M1, all LRs", ">", 0.9),
    Claim("KT2.beats-gradients", "K Table 2", "it does so better than what gradients show early in training",
          "0.995 against 0.62 to 0.70",
          "AUROC of mean M1 minus that of the best gradient baseline, each in its better direction and on the runs "
          "that outlast its window, LR up to 3e-2", ">", 0.0),
    Claim("KT2.beats-norm-type", "K Table 2", "it knows more than which norm the model has",
          "0.995; the bare indicator, from Table 1's counts: 0.989",
          "AUROC of mean M1 minus that of 'has no norms', LR up to 3e-2", ">", 0.0),
    Claim("KT2.within-norms", "ours", "it ranks models of the same norm type",
          "not given", "AUROC of mean M1 among pairs of runs with equal norm and LR, all LRs", ">", 0.5),
    Claim("KT2.within-no-norm", "ours", "it ranks models without norms by their shapes", "not tested",
          "AUROC of mean M1 among pairs of runs without norms at equal LR, both sweeps", ">", 0.5),
    Claim("KT2.within-shape", "ours", "and, at one shape, by their initialization, branches and qk-norm", "not tested",
          "AUROC of mean M1 among pairs of runs without norms of equal shape and LR", ">", 0.5),
    Claim("KT2.within-model", "ours", "and, of one model, the seeds that diverge, as well as the paper's gradient "
          "baselines rank runs", "not tested; those have 0.62 to 0.70",
          "AUROC of mean M1 among pairs of runs without norms that differ in their seed alone", ">", 0.7),
)
