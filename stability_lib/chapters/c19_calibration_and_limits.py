"""Chapter 19, what else one might want of a profile: a probability, and the largest stable learning rate (paper K,
Fig. 5), forecast from chapter 04's sweep and held to architectures outside of it."""

from ..claims import Claim
from .c04_rksp_auroc import divergence_sweep, spectra_at_init, unseen_architectures

STUDIES = (divergence_sweep, unseen_architectures, spectra_at_init)

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
