"""Chapter 18, a model of one's own from load to decision (paper K, Fig. 7), and the monitor in one's own loop."""

from ..claims import Claim
from .c04_rksp_auroc import divergence_sweep, spectra_at_init, unseen_architectures

STUDIES = (divergence_sweep, unseen_architectures, spectra_at_init)

# The outcomes of the first two were known, from chapter 04, when they were written down; those of the others were not.
CLAIMS = (
    Claim("KF7.warnings-right", "K Fig. 7", "models that the decision flow calls high risk diverge",
          "81 of 153, from Table 1's counts", "share of 'high risk' runs of the sweep that diverge, LR up to 3e-2",
          ">", 0.5),
    Claim("KF7.go-safe", "K Fig. 7", "models that it calls go do not", "0 of 61, from Table 1's counts",
          "share of 'go' runs of the sweep that diverge, LR up to 3e-2", "<", 0.05),
    Claim("KF7.warnings-elsewhere", "ours", "its warnings hold for architectures outside of the sweep", "not tested",
          "share of 'high risk' runs outside of the sweep that diverge, LR up to 3e-2", ">", 0.5),
    Claim("KF7.go-elsewhere", "ours", "and so does its go", "not tested",
          "share of 'go' runs outside of the sweep that diverge, LR up to 3e-2", "<", 0.05),
)
