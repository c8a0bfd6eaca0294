"""Chapter 14, mixtures of experts, state spaces and Kolmogorov-Arnold networks. (Paper K, Tables 11, 16 to 18, Fig. 6.)

`profiles_seeds` came after all other runs: of the ten claims on untrained models three seeds of `profiles` had left
two open (KT16.mass at 0.0195 [-0.0395, 0.0785], KT16.radius at -0.241 [-0.517, 0.0354]) and three as leads. Twenty new
seeds alone judge all ten now, criteria unchanged, as fixed before they were made. By the scatter over those three they
give KT16.mass to +-0.011 and KT16.radius to +-0.05.
"""

from collections.abc import Mapping

from ..claims import Claim
from ..config import RunConfig, grid
from ..studies import RECALL, check_scale
from .c04_rksp_auroc import untrained

ARCHITECTURES = {
    "Pre-LN": {},
    "No-Norm": dict(norm="no_norm"),
    "MoE": dict(mlp="moe"),
    "Mamba": dict(mixer="mamba"),
    "KAN": dict(mlp="kan", mlp_ratio=1),
}
"""Paper K's Table 11; all but No-Norm with Pre-LN. KAN with as many hidden units as inputs, for its time: an edge has
as many weights as its grid has splines."""
EXPERTS = {f"{experts} experts k={k}": dict(mlp="moe", experts=experts, top_k=k)
           for experts, k in ((8, 1), (8, 2), (8, 4), (16, 2))}
"""Table 16."""
GRIDS = {f"KAN B={b}": dict(mlp="kan", mlp_ratio=1, grid_size=b) for b in (4, 8)}
"""Table 18."""

TRAINED = {
    "quick": dict(d_model=32, n_layers=2, vocab_size=16, seq_len=8, recall_pairs=3, batch_size=16, steps=60,
                  warmup_steps=6, eval_sequences=64),
    "cpu": dict(d_model=64, n_layers=2, vocab_size=16, seq_len=8, recall_pairs=3, steps=500, warmup_steps=50),
    "gpu": dict(d_model=192, n_layers=4, vocab_size=64, seq_len=32, steps=500, warmup_steps=50),
    "paper": dict(d_model=256, n_layers=6, seq_len=64, steps=10_000, warmup_steps=1000),
}
"""Associative recall, with three pairs of 16 symbols at `cpu`, so short that it can be learned in these steps (fan-in
initialization, as in chapter 05's `kss_learning`)."""
LRS = (1e-3, 2e-3, 4e-3, 8e-3, 3e-2, 3e-1, 6e-1, 1.2)
"""24 runs an arm with three seeds: from where recall is learned to where most diverge."""
GENTLE = 0.008
"""alpha of KSS at every step whose first gradient was a tenth of the task's on pilots of four pairs of 32 symbols; on
the task above it is 0.07 of it (Pre-LN, mean of six pilot seeds)."""


def name(run: Mapping) -> str:
    """An architecture and its control in words: `8 experts k=2 + KSS`, of a run's fields."""
    fields = {**{field: getattr(RunConfig(), field) for field in ("norm", "mixer", "mlp", "shaping")}, **run}
    kind = {"moe": f"{fields['experts']:g} experts k={fields['top_k']:g}", "kan": f"KAN B={fields['grid_size']:g}",
            "gelu": "No-Norm" if fields["norm"] == "no_norm" else "Pre-LN"}[fields["mlp"]]
    kind = f"Mamba {fields['d_model']:g}" if fields["mixer"] == "mamba" else kind
    dose = "" if fields["shaping"] == "none" else " + KSS" if fields["shaping_every"] > 1 else " + gentle KSS"
    return kind + dose


def profiles(scale: str) -> list[RunConfig]:
    """Profiles of untrained models by architecture, at three initializations, and of ones that start near the identity
    (Tables 11, 16 to 18, Fig. 6, App. J)."""
    setting = RECALL | dict(seq_len=64, d_model=128, n_layers=4)
    if check_scale(scale) != "cpu":
        setting |= dict(seq_len=32, d_model=64, n_layers=2) if scale == "quick" else dict(d_model=416)
    kinds = [*ARCHITECTURES.values(), *EXPERTS.values(), *GRIDS.values(), dict(residual="rezero")]
    inits = ["gpt2", "fan_in"] + (["pytorch"] if scale != "gpu" else [])
    found = grid(untrained(RunConfig(**setting)), kind=kinds, init=inits, seed=[42, 123, 456])
    return list(dict.fromkeys(found))


def profiles_seeds(scale: str) -> list[RunConfig]:
    """Those that the claims on untrained models are about, from GPT-2's initialization, on twenty new seeds. At all
    scales but cpu the first grid."""
    if check_scale(scale) != "cpu":
        return profiles(scale)
    kinds = [{}, ARCHITECTURES["Mamba"], *EXPERTS.values(), *GRIDS.values()]
    return grid(profiles(scale)[0], kind=[kind for kind in kinds if kind.get("experts") != 16], seed=range(301, 321))


def architectures(scale: str) -> list[RunConfig]:
    """Divergence and accuracy on recall by architecture, without and with KSS (Tables 16 to 18)."""
    setting = RECALL | dict(init="fan_in", diverge_grad_norm=None) | TRAINED[check_scale(scale)]
    base, paper = RunConfig(**setting), dict(shaping="kss")
    gentle = dict(shaping="kss", shaping_every=1, shaping_alpha=GENTLE)
    wide = dict(mixer="mamba", d_model=setting["d_model"] * 3 // 2)
    plain = [*list(ARCHITECTURES.values())[:2], ARCHITECTURES["Mamba"], wide, *EXPERTS.values(), *GRIDS.values()]
    shaped = [kind | dose for kind in ({}, EXPERTS["8 experts k=2"]) for dose in (paper, gentle)]
    arms, lrs, seeds = [*plain, *shaped, GRIDS["KAN B=4"] | paper], LRS, [42, 123, 456]
    if scale == "quick":
        arms, lrs, seeds = [*plain[:3], *plain[5:6], *plain[8:9], shaped[2]], [4e-3, 1.2], [42]
    elif scale == "gpu":
        lrs = LRS[1:6:3]
    return grid(base, arm=arms, lr=lrs, seed=seeds)


def router_collapse(scale: str) -> list[RunConfig]:
    """Mixtures with and without the loss that balances them, with router and profile read along the way."""
    setting = RECALL | dict(init="fan_in", diverge_grad_norm=None) | TRAINED[check_scale(scale)]
    every = setting["steps"] // 20
    base = RunConfig(**setting | EXPERTS["8 experts k=1"] | dict(probe_every=every, spectra_every=every))
    if scale in ("quick", "gpu"):
        return grid(base, load_balance=[0.0, 0.01], lr=[3e-3], seed=[42, 123, 456][: 2 if scale == "quick" else 3])
    return grid(base, load_balance=[0.0, 0.01], lr=[1e-3, 1e-2], seed=[42, 123, 456, 1, 2, 3])


STUDIES = (profiles, profiles_seeds, architectures, router_collapse)

CLAIMS = (
    Claim("KT11.moe", "K Table 11", "a mixture of experts has more near-unit mass than Pre-LN at initialization",
          "0.58 against 0.16", "M1 at GPT-2's initialization, MoE minus Pre-LN", ">", 0.0),
    Claim("KT11.mamba", "K Table 11", "Mamba's spectral radius is below one", "0.95",
          "rho at GPT-2's initialization, Mamba", "<", 1.0),
    Claim("KT11.mamba-mass", "K Table 11", "and it has less near-unit mass than Pre-LN", "0.12 against 0.16",
          "M1 at GPT-2's initialization, Mamba minus Pre-LN", "<", 0.0),
    Claim("KT11.kan", "K Table 11", "KAN has more near-unit mass than Pre-LN", "0.52 against 0.16",
          "M1 at GPT-2's initialization, KAN minus Pre-LN", ">", 0.0),
    Claim("KT11.kan-nonlinear", "K Table 11", "and is less linear", "eta 0.78 against 0.52",
          "eta at GPT-2's initialization, KAN minus Pre-LN", ">", 0.0),
    Claim("KT16.mass", "K Table 16", "near-unit mass falls with the experts a token is sent to",
          "0.72, 0.58, 0.45 at k = 1, 2, 4", "M1 at GPT-2's initialization, k = 4 minus k = 1", "<", 0.0),
    Claim("KT16.radius", "K Table 16", "so does the spectral radius", "2.85, 2.12, 1.78 at k = 1, 2, 4",
          "rho at GPT-2's initialization, k = 4 minus k = 1", "<", 0.0),
    Claim("KT16.divergence", "K Table 16", "so does divergence", "6, 2, 1 of 24 at k = 1, 2, 4",
          "diverged share, k = 4 minus k = 1", "<", 0.0),
    Claim("KT16.kss", "K Table 16", "KSS raises the accuracy of a mixture", "44.5% against 41.7%",
          "accuracy at each arm's best LR, k = 2, KSS at the paper's dose minus no control", ">", 0.0),
    Claim("KT17.contractive", "K Table 17", "Mamba has more contractive mass than Pre-LN", "0.85 against 0.38",
          "M<1 at GPT-2's initialization, Mamba minus Pre-LN", ">", 0.0),
    Claim("KT17.divergence", "K Table 17", "Mamba diverges less than Pre-LN", "0 against 1 of 24",
          "diverged share, Mamba minus Pre-LN", "<", 0.0),
    Claim("KT17.accuracy", "K Table 17", "Mamba recalls better than Pre-LN", "48.2% against 45.8%",
          "accuracy at each arm's best LR, Mamba minus Pre-LN of the same width", ">", 0.0),
    Claim("KT18.grid", "K Table 18", "a finer grid has a larger eta", "0.82 against 0.78",
          "eta at GPT-2's initialization, B = 8 minus B = 4", ">", 0.0),
    Claim("KT18.reliable", "K Table 18", "and fewer reliable modes", "52% against 68%",
          "reliable share at GPT-2's initialization, B = 8 minus B = 4", "<", 0.0),
    Claim("KT18.kss", "K Table 18", "KSS prevents divergence of KAN", "1 of 24 against 3 of 24",
          "diverged share, B = 4, KSS at the paper's dose minus no control", "<", 0.0),
    Claim("KJ.identity", "K App. J", "a model that starts at the identity has its mass near one though it is stable",
          "M1 near 1", "M1 of ReZero at initialization", ">", 0.95),
    Claim("K14.gentle", "ours", "at a gentle dose KSS raises accuracy", "not tested",
          "accuracy at each arm's best LR, gentle KSS minus no control, mean over Pre-LN and MoE", ">", 0.0),
    Claim("K14.risk", "ours", "near-unit mass at initialization ranks architectures by how much they diverge",
          "Tables 16, 17: M1 and divergence fall together; 18: not",
          "rank correlation over architectures of M1 at initialization (fan-in) with the diverged share", ">", 0.0),
    Claim("K14.router", "ours", "near-unit mass tells a collapsed router from an even one", "not tested",
          "AUROC of M1 at a reading for the largest load being over half of all tokens", ">", 0.75),
)
