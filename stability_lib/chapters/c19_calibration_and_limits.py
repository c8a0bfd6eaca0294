"""Chapter 19, what else one might want of a profile: a probability, and the largest stable learning rate (paper K,
Fig. 5).

The forecasts are made from chapter 04's sweep and judged on architectures outside of it: eight that were chosen, and
forty drawn at random from all that norm, initialization, residual branches and qk-norm can make. The three claims about
random kicks and spectra were written for the eight and first read on them; what was known when the forty were added is
that there kicks are off by 0.35 decades [0.13, 0.58], and more than the norm's median by 0.29 [0.03, 0.56], spectra by
0.58 [0.01, 1.15]. Their criteria stand. `KT2.held-out-architectures` is new, and is judged on the forty alone.

What these runs can decide: the kicks' errors on the eight have a standard deviation of 0.27 decades over architectures,
so that 48 give their mean to +-0.08: 0.2 shows as less than 0.3, 0.25 may not. Differences of two errors on the eight
had one of 0.32 (kicks) and 0.61 (spectra): 48 give them to +-0.09, and the 33 that have a profile to +-0.22. The
difference of AUROCs is -0.13 on the eight; the 26 of the forty that have a profile (ReZero has none) give it to +-0.06.
As it turned out 33 of the forty and 40 of the 48 have one: ReZero does where a norm stands on the stream.

`KT2.held-out-norms` and `KT2.largest-stable-lr` are about norms, of which there are seven, whatever is trained. At the
scatter there is, about 60 norm types would decide the first, and ten the second.
"""

import itertools
import random

from ..claims import Claim
from ..config import CHOICES, RunConfig, grid, replace
from .c04_rksp_auroc import LRS, divergence_sweep, spectra_at_init, unseen_architectures, untrained

_PARTS = ("norm", "init", "residual", "qk_norm")


def drawn_architectures(scale: str) -> list[RunConfig]:
    """Architectures drawn at random from all combinations of norm, initialization, residual branches and qk-norm that
    neither `divergence_sweep` nor `unseen_architectures` has, at the latter's size and learning rates."""
    chosen = unseen_architectures(scale)
    first = replace(chosen[0], norm="pre_ln", init="gpt2", residual="plain", qk_norm="none")
    every = itertools.product(CHOICES["norm"], CHOICES["init"], CHOICES["residual"], ("none", "head"))
    known = {tuple(getattr(config, part) for part in _PARTS)
             for config in divergence_sweep("cpu") + unseen_architectures("cpu")}
    others = [dict(zip(_PARTS, parts, strict=True)) for parts in every if parts not in known]
    count = dict(quick=3, gpu=8).get(scale, 40)
    return grid(first, arm=random.Random(19).sample(others, 40)[:count], lr=LRS[scale],
                seed=[42] if scale == "quick" else [42, 123, 456])


def spectra_of_drawn(scale: str) -> list[RunConfig]:
    """Profiles of the untrained models of `drawn_architectures`, with Kreiss constants."""
    return list(dict.fromkeys(untrained(config, spectra_kreiss=True) for config in drawn_architectures(scale)))


STUDIES = (divergence_sweep, unseen_architectures, spectra_at_init, drawn_architectures, spectra_of_drawn)

CLAIMS = (
    Claim("KF5.ece", "K Fig. 5", "read as a probability, the risk score is poorly calibrated",
          "ECE 0.283", "expected calibration error of mean M1, LR up to 3e-2", ">", 0.1),
    Claim("KT2.held-out-norms", "ours", "spectra help to predict divergence under norms not seen before",
          "not tested",
          "AUROC on held-out norms of a logistic model of LR, shape and spectra minus that of one of LR and shape, "
          "all LRs", ">", 0.0),
    Claim("KT2.largest-stable-lr", "ours", "and help to predict the largest stable learning rate",
          "not tested",
          "error (decades of LR) on held-out norms of a model of shape and spectra minus that of the median of the "
          "other norms", "<", 0.0),
    Claim("KT2.held-out-architectures", "ours", "spectra tell more about architectures not seen before than whether "
          "they have norms", "not tested",
          "AUROC on the drawn architectures of a logistic model of LR, shape and spectra minus that of one of LR, "
          "shape and 'has no norms', both fitted to the sweep, all LRs, architectures that have a profile", ">", 0.0),
    Claim("KO.kicks-close", "ours", "random kicks to the weights of an untrained model foretell the largest stable "
          "learning rate of architectures not seen before", "not tested",
          "error (decades of LR) of the kicks on architectures outside of the sweep", "<", 0.3),
    Claim("KO.kicks-beat-norm", "ours", "they do so better than what models of the same norm bore", "not tested",
          "error (decades of LR) of the kicks minus that of the sweep's median limit of the same norm, "
          "architectures outside of the sweep", "<", 0.0),
    Claim("KO.spectra-beat-norm", "ours", "spectra and Kreiss constants do so too", "not tested",
          "error (decades of LR) of a model of shape, spectra and Kreiss constants minus that of the sweep's "
          "median limit of the same norm, architectures outside of the sweep that have a profile", "<", 0.0),
)
