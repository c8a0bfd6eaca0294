"""Chapter 04, what a spectral profile shows, and whether it ranks runs by divergence (paper K, Fig. 1, Tables 1, 2)."""

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
    return grid(first, arm=arms[1:3] if scale == "quick" else arms, lr=_SWEEP[scale][1],
                seed=[42] if scale == "quick" else [42, 123, 456])


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


STUDIES = (divergence_sweep, spectra_at_init)

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
    Claim("KT1.no-norm-diverges", "K Table 1", "models without norms diverge",
          "81 of 84", "share of runs without norms that diverge at LR up to 3e-2", ">", 0.5),
    Claim("KT2.m1-auroc", "K Table 2", "near-unit mass at initialization separates runs that diverge",
          "AUROC 0.995", "AUROC of mean M1, LR up to 3e-2", ">", 0.9),
    Claim("KT2.across-lrs", "K Table 2", "the same over all learning rates of the grid",
          "AUROC 0.995", "AUROC of mean M1, all LRs", ">", 0.9),
    Claim("KT2.beats-gradients", "K Table 2", "it does so better than what gradients show early in training",
          "0.995 against 0.62 to 0.76",
          "AUROC of mean M1 minus that of the best gradient baseline, each in its better direction and on the runs "
          "that outlast its window, LR up to 3e-2", ">", 0.0),
    Claim("KT2.beats-norm-type", "K Table 2", "it knows more than which norm the model has",
          "0.995; the bare indicator, from Table 1's counts: 0.989",
          "AUROC of mean M1 minus that of 'has no norms', LR up to 3e-2", ">", 0.0),
    Claim("KT2.within-norms", "K Table 2", "it ranks models of the same norm type",
          "not given", "AUROC of mean M1 among pairs of runs with equal norm and LR, all LRs", ">", 0.5),
)
