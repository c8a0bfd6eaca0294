"""Chapter 17, what came since: later remedies in paper P's own experiment (no paper of the two; sources by claim).

Chapter 01's runs at its middle size, its upper learning rates and its seeds, with each remedy in place of qk-norm. At
scale `cpu` its own runs are those of the first two arms, under the keys they have there; so in the studies of its
largest size and of its lower learning rates.

What the runs can decide: of chapter 01's two arms at this size, the difference of LR sensitivities, paired by seed, has
a 95% interval of +-0.035 nats, that of the losses at the best learning rates of +-0.005. Effects of twice these show;
margins of sameness are 0.1 (0.05 where both arms have qk-norm) and 0.05 nats. At the largest size these intervals are
+-0.034 and +-0.018. One seed's order of the ten arms by LR sensitivity correlates by 0.95 or more with the others' at
this size, and by 0.89 or more with it at the smaller. LR sensitivity goes by LRS at both sizes of which claims speak,
the loss at the best learning rate by all rates that an arm has there.

Pilots before the claims: one seed that no study uses, at the smaller size and learning rates of 0.003, 0.03 and 0.3.
There Muon and gated attention reached lower losses than no remedy at 0.03, sigma-reparametrization a higher one; at 0.3
QK-clip ended at 2.41, the soft cap at 2.54 (logits 1e4 before the cap), scaled learning rates at 2.71, where chapter 01
has 2.8 to 3.1 without and 2.2 to 2.3 with qk-norm.

Two criteria, `clip-free` and `muonclip-free`, were restated while the sweep ran, before any of its runs was read: at
scale `quick` QK-clip has nothing to do at the best learning rate, so that the difference there is exactly zero, which
the rule cannot judge. They now go by the next learning rate of the grid, where it has.

The claims `large-...` and `lower-rates` came later, before any of their runs but with all of the middle size's known,
and chapter 01's two arms at the largest. Where a claim has the words of one of the middle size, so has its criterion,
but for two that said less than they seemed to there: `large-qklr-as-norm` goes by LR sensitivity, `large-sigma-costs`
by the loss.
"""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from .. import studies
from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import SIZES, base, check_scale

CLIP, CAP = 100.0, 50.0
"""Kimi K2's threshold of QK-clip and Gemma 2's cap. The first is right for this size, too: at the best learning rate no
head of chapter 01 passes 51 here, at the next, where the loss starts to rise, all pass 330."""
NONE = "no remedy"
ARMS = {
    NONE: {},
    "qk-norm": dict(qk_norm="head"),
    "QK-clip": dict(qk_clip=CLIP),
    "Muon": dict(optimizer="muon"),
    "Muon, QK-clip": dict(optimizer="muon", qk_clip=CLIP),
    "soft cap": dict(attention_cap=CAP),
    "soft cap, qk-norm": dict(attention_cap=CAP, qk_norm="head"),
    "gated attention": dict(attention_gate=True),
    "sigma-reparam": dict(reparametrization="sigma_reparam"),
    "scaled LR of Q and K": dict(qk_lr="other_norm"),
}
"""What each arm sets; all else is the recipe of chapter 01, without qk-norm where it is not named."""
_FIELDS = ("qk_norm", "qk_clip", "optimizer", "attention_cap", "attention_gate", "reparametrization", "qk_lr")


def arm(run: Mapping) -> str:
    """The arm that a run belongs to, by its fields, as a row of `ensure`'s table has them."""
    def fields(settings: Mapping) -> tuple:
        values = [settings.get(name, getattr(RunConfig(), name)) for name in _FIELDS]
        return tuple(None if pd.isna(value) else value for value in values)
    return {fields(dict(qk_norm="none") | changes): name for name, changes in ARMS.items()}[fields(run)]


LRS = (1e-2, 3e-2, 1e-1, 3e-1)
"""The upper learning rates of chapter 01, from where its two arms are best at these sizes: below, remedies have nothing
to do. `later_remedies` has one below them for the arms whose best learning rates are compared."""
_TOGETHER = (NONE, "qk-norm", "soft cap", "soft cap, qk-norm", "gated attention")
"""Arms whose runs train together on a GPU."""
_LENGTH = {"quick": dict(steps=60, warmup_steps=3), "gpu": dict(steps=600, warmup_steps=30, probe_every=20)}


def _arms(scale: str, size: dict, lrs: Sequence[float], arms: Iterable[str] = ARMS) -> list[RunConfig]:
    setting = replace(base(scale), qk_norm="none", **_LENGTH.get(scale, {}))
    return grid(setting, size=[size], arm=[ARMS[name] for name in arms], lr=lrs,
                seed=[0, 1] if scale == "quick" else [0, 1, 2])


def later_remedies(scale: str) -> list[RunConfig]:
    """Every arm by learning rate, at one size of chapter 01; of three arms also below the others' lowest."""
    size = {"quick": SIZES["quick"][0], "gpu": studies.size(192, 4, 32)}.get(check_scale(scale), SIZES[scale][1])
    if scale == "quick":
        return _arms(scale, size, (LRS[0], *LRS[2:]))
    return _arms(scale, size, LRS) + _arms(scale, size, (3e-3,), (NONE, "qk-norm", "Muon"))


def later_remedies_smaller(scale: str) -> list[RunConfig]:
    """The same in the next smaller size at high learning rates, on which no claim rests; nothing at `quick`."""
    if check_scale(scale) == "quick":
        return []
    return _arms(scale, studies.size(96, 3, 32) if scale == "gpu" else SIZES[scale][0], LRS[1:])


def later_remedies_larger(scale: str) -> list[RunConfig]:
    """The same in the largest size of chapter 01; of the arms whose best learning rate may lie below the others' lowest
    also there. Nothing at `quick`; at `gpu` less, for a few minutes in all."""
    if check_scale(scale) == "quick":
        return []
    size, low = SIZES[scale][2], (NONE, "qk-norm", "gated attention", "scaled LR of Q and K")
    if scale == "gpu":
        return [replace(c, steps=300, warmup_steps=15) for c in _arms(scale, size, (LRS[0], *LRS[2:]), _TOGETHER)]
    return _arms(scale, size, LRS) + _arms(scale, size, (3e-3,), low)


def later_remedies_lower(scale: str) -> list[RunConfig]:
    """Every arm in the size of `later_remedies` below its lowest learning rate; nothing at `quick`, less at `gpu`."""
    if check_scale(scale) == "quick":
        return []
    if scale == "gpu":
        return _arms(scale, studies.size(192, 4, 32), (3e-3,), (NONE, "qk-norm", "gated attention"))
    return _arms(scale, SIZES[scale][1], (1e-3, 3e-3))


def remedy_cost(scale: str) -> list[RunConfig]:
    """Short runs of every arm without probes, in turn, for the ratios of their seconds."""
    steps = {"quick": 10, "cpu": 40}.get(scale, 300)
    plain = [config for config in later_remedies(scale) if config.lr == LRS[0] and config.seed == 0]
    return [replace(config, seed=seed, steps=steps, warmup_steps=2, probe_every=0)
            for seed in range(2 if scale == "quick" else 4) for config in plain]


STUDIES = (later_remedies, remedy_cost, later_remedies_smaller, later_remedies_larger, later_remedies_lower)

_BETTER = "loss at the best LR of each (nats)"
_ABOVE = "loss (nats) at the LR of the grid next above the best"
_SENSITIVITY = "LR sensitivity (nats)"
_LARGE = "largest size"
CLAIMS = (
    Claim("L17.clip-helps", "Kimi K2, Sec. 2.1", "QK-clip makes training stable",
          "logits stay at 100, no loss spike", f"{_SENSITIVITY} with QK-clip minus without a remedy", "<", 0.0),
    Claim("L17.clip-free", "Kimi K2, Sec. 2.1", "QK-clip does not cost loss", "no harm to the loss",
          f"{_ABOVE} of no remedy, QK-clip minus no remedy", "<", 0.05),
    Claim("L17.clip-as-norm", "ours", "QK-clip does what qk-norm does", "",
          f"{_SENSITIVITY} with QK-clip minus with qk-norm", "within", 0.1),
    Claim("L17.muon-lr", "Moonlight, Sec. 2.2", "with its step matched, Muon takes AdamW's learning rate",
          "reuses AdamW's LR", "log10 best LR, Muon minus AdamW, no other remedy", "within", 0.5),
    Claim("L17.muon-better", "Moonlight, Fig. 1", "Muon reaches a lower loss than AdamW in as many steps",
          "half of the compute for the same loss", f"{_BETTER}, Muon minus no remedy", "<", 0.0),
    Claim("L17.muon-logits", "Kimi K2, Sec. 2.1", "attention logits grow more under Muon than under AdamW",
          "explode more often", "log10 ratio of the peak logits, Muon over AdamW, mean over LRs from 0.01", ">", 0.0),
    Claim("L17.muonclip-helps", "Kimi K2, Sec. 2.1", "QK-clip makes Muon stable", "logits stay at 100, no loss spike",
          f"{_SENSITIVITY} of Muon with QK-clip minus without", "<", 0.0),
    Claim("L17.muonclip-free", "Kimi K2, Sec. 2.1", "QK-clip does not cost Muon loss", "no harm to the loss",
          f"{_ABOVE} of Muon, Muon with QK-clip minus without", "<", 0.05),
    Claim("L17.cap-helps", "Gemma 2", "a soft cap of 50 makes training stable", "used for that",
          f"{_SENSITIVITY} with the cap minus without a remedy", "<", 0.0),
    Claim("L17.cap-grows", "Kimi K2, Sec. 2.1", "under a soft cap queries and keys go on growing",
          "products of queries and keys still grow", "log10 ratio of the peak logit before the cap to the peak with "
          "qk-norm, at the highest LR", ">", 1.0),
    Claim("L17.cap-redundant", "ours, against Rybakov et al. 2024", "on top of qk-norm a soft cap changes nothing",
          "LR 1.5 times higher with both", f"{_SENSITIVITY} of qk-norm with the cap minus without", "within", 0.05),
    Claim("L17.cap-free", "ours", "on top of qk-norm a soft cap costs nothing", "",
          f"{_BETTER}, qk-norm with the cap minus without", "within", 0.05),
    Claim("L17.norm-beyond-cap", "ours", "on top of a soft cap qk-norm still helps", "",
          f"{_SENSITIVITY} of the cap with qk-norm minus without", "<", 0.0),
    Claim("L17.gate-better", "Qiu et al. 2025", "gated attention reaches a lower loss", "better at 1.7B and 15B",
          f"{_BETTER}, gated minus no remedy", "<", 0.0),
    Claim("L17.gate-helps", "Qiu et al. 2025", "gated attention stands higher learning rates",
          "tolerates larger LRs", f"{_SENSITIVITY} gated minus without a remedy", "<", 0.0),
    Claim("L17.sigma-helps", "Zhai et al. 2023", "sigma-reparametrization makes training robust",
          "robust to hyperparameters", f"{_SENSITIVITY} with sigma-reparam minus without a remedy", "<", 0.0),
    Claim("L17.sigma-entropy", "Zhai et al. 2023", "sigma-reparametrization prevents entropy collapse",
          "no collapse", "least attention entropy of any block at the highest LR, sigma-reparam minus no remedy (nats)",
          ">", 0.0),
    Claim("L17.qklr-helps", "Anson and Aitchison 2025", "scaled learning rates of W_Q and W_K allow higher ones",
          "a higher base LR", f"{_SENSITIVITY} with scaled LRs minus without a remedy", "<", 0.0),
    Claim("L17.qklr-as-norm", "Anson and Aitchison 2025", "they do as well as qk-norm", "competitive with qk-norm",
          f"{_BETTER}, scaled LRs minus qk-norm", "within", 0.05),
    Claim("L17.large-clip-helps", "Kimi K2, Sec. 2.1", "QK-clip makes the largest size stable, too",
          "logits stay at 100, no loss spike", f"{_SENSITIVITY} with QK-clip minus without a remedy, {_LARGE}", "<",
          0.0),
    Claim("L17.large-clip-as-norm", "ours", "QK-clip does what qk-norm does at the largest size", "",
          f"{_SENSITIVITY} with QK-clip minus with qk-norm, {_LARGE}", "within", 0.1),
    Claim("L17.large-muon-better", "Moonlight, Fig. 1", "Muon reaches a lower loss than AdamW at the largest size, too",
          "half of the compute for the same loss", f"{_BETTER}, Muon minus no remedy, {_LARGE}", "<", 0.0),
    Claim("L17.large-muon-logits", "Kimi K2, Sec. 2.1",
          "attention logits grow more under Muon than under AdamW at the largest size", "explode more often",
          f"log10 ratio of the peak logits, Muon over AdamW, mean over LRs from 0.01, {_LARGE}", ">", 0.0),
    Claim("L17.large-muonclip-helps", "Kimi K2, Sec. 2.1", "QK-clip makes Muon stable at the largest size, too",
          "logits stay at 100, no loss spike", f"{_SENSITIVITY} of Muon with QK-clip minus without, {_LARGE}", "<",
          0.0),
    Claim("L17.large-cap-helps", "Gemma 2", "a soft cap of 50 makes the largest size stable, too", "used for that",
          f"{_SENSITIVITY} with the cap minus without a remedy, {_LARGE}", "<", 0.0),
    Claim("L17.large-cap-redundant", "ours, against Rybakov et al. 2024",
          "on top of qk-norm a soft cap changes nothing at the largest size, either", "LR 1.5 times higher with both",
          f"{_SENSITIVITY} of qk-norm with the cap minus without, {_LARGE}", "within", 0.05),
    Claim("L17.large-norm-beyond-cap", "ours", "on top of a soft cap qk-norm still helps at the largest size", "",
          f"{_SENSITIVITY} of the cap with qk-norm minus without, {_LARGE}", "<", 0.0),
    Claim("L17.large-gate-better", "Qiu et al. 2025", "gated attention reaches a lower loss at the largest size, too",
          "better at 1.7B and 15B", f"{_BETTER}, gated minus no remedy, {_LARGE}", "<", 0.0),
    Claim("L17.large-gate-helps", "Qiu et al. 2025", "gated attention stands higher learning rates at the largest size",
          "tolerates larger LRs", f"{_SENSITIVITY} gated minus without a remedy, {_LARGE}", "<", 0.0),
    Claim("L17.large-sigma-costs", "ours, against Zhai et al. 2023",
          "sigma-reparametrization costs loss at the largest size", "as good as without",
          f"{_BETTER}, sigma-reparam minus no remedy, {_LARGE}", ">", 0.0),
    Claim("L17.large-qklr-helps", "Anson and Aitchison 2025",
          "scaled learning rates of W_Q and W_K allow higher ones at the largest size, too", "a higher base LR",
          f"{_SENSITIVITY} with scaled LRs minus without a remedy, {_LARGE}", "<", 0.0),
    Claim("L17.large-qklr-as-norm", "Anson and Aitchison 2025", "they do as well as qk-norm at high rates, there",
          "competitive with qk-norm", f"{_SENSITIVITY} with scaled LRs minus with qk-norm, {_LARGE}", "within", 0.1),
    Claim("L17.large-order", "ours", "the arms stand in the same order at the largest size", "",
          "rank correlation over the arms of the LR sensitivity of a seed at the largest size with the mean at the "
          "middle one", ">", 0.7),
    Claim("L17.lower-rates", "ours", "below 0.01 no arm is better at the middle size", "",
          "least of any arm, by seed: loss at an LR of 0.003 minus at 0.01 (nats)", ">", 0.0),
)
