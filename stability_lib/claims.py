"""The papers' claims as data, and the one rule that turns an estimate into a verdict.

A claim says what is measured and which side of a threshold supports it. The verdict is mechanical: `reproduced` where
the whole 95% interval lies on the claimed side, `partly` where only the value does, `not reproduced` where it does
not, `out of reach here` where nothing could be measured. An interval of zero width over seeds means a measurement too
coarse to vary, not certainty: it gives `partly` at most.
"""

import dataclasses
import json
import math

import pandas as pd
from IPython.display import display

from .config import unknown
from .evaluate import Estimate
from .runs import project_root

MIME = "application/vnd.stability-lib.claims+json"
"""Under this type a notebook publishes its verdicts for the report."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's `statement` with its `source` and value, and our criterion: `quantity` `side` `threshold`."""

    id: str
    source: str
    statement: str
    paper_value: str
    quantity: str
    side: str
    threshold: float

    @property
    def criterion(self) -> str:
        return f"{self.quantity} {self.side} {self.threshold:g}"


CLAIMS = {
    "01_attention_logit_growth": (
        Claim("P1.instability", "P Fig. 1", "without qk-norm, training fails at a high learning rate",
              "the loss at high LR explodes",
              "final loss without minus with qk-norm at the highest LR (nats)", ">", 0.3),
        Claim("P1.lr-falls", "P Fig. 1", "the failing learning rate falls as the model grows",
              "at a lower LR the larger the model",
              "slope of log10 failing LR per decade of N, without qk-norm", "<", 0.0),
        Claim("P1.qk-norm-trains", "P Fig. 1", "with qk-norm, models train across the whole range of learning rates",
              "three orders of magnitude of LR", "share of runs with qk-norm that do not fail", ">", 0.8),
        Claim("P1.sensitivity-falls", "P Fig. 1", "qk-norm lowers LR sensitivity",
              "falls with qk-norm", "LR sensitivity with minus without qk-norm (nats)", "<", 0.0),
        Claim("P1.sensitivity-grows", "P Fig. 1", "without qk-norm, LR sensitivity grows with size",
              "grows with N", "slope of LR sensitivity per decade of N, without qk-norm (nats)", ">", 0.0),
        Claim("P1.sensitivity-grows-qk", "P Fig. 1", "with qk-norm, LR sensitivity still grows with size",
              "still grows with N", "slope of LR sensitivity per decade of N, with qk-norm (nats)", ">", 0.0),
        Claim("P2.logits-blow-up", "P Fig. 2", "the largest attention logit of block 0 blows up where the loss does",
              "the logit blows up where the loss does",
              "log10 ratio of the peak logit at the highest LR to that at LR 1e-2, without qk-norm", ">", 1.0),
        Claim("P9.failing-above-1e4", "P Figs 2, 9", "failing runs have attention logits above about 1e4",
              "above 1e4", "log10 of the peak attention logit, mean over failing runs without qk-norm", ">", 4.0),
        Claim("P9.above-1e4-fails", "P Fig. 9", "every run with an attention logit above 1e4 fails",
              "all points above 1e4 diverged", "share of runs above 1e4 that fail", ">", 0.75),
        Claim("PE1.norms", "P Fig. E.1", "it is the norms of q and k that make logits large, not their alignment",
              "norms grow, cosine similarity does not",
              "share of the largest logit's log growth due to |q||k|, failing runs without qk-norm", ">", 0.5),
    ),
    "02_zloss": (
        Claim("P4.drift", "P Fig. 4", "without z-loss and weight decay, output logits drift very negative",
              "very negative late in training", "mean output logit at the end, LR 0.1, neither cure", "<", -5.0),
        Claim("P4.floor", "ours", "a symbol that never occurs sinks until its gradient is of the size of AdamW's eps",
              "not tested", "distance from 1 of the slope of its final log p on ln eps, eps 1e-8 to 1e-6", "<", 0.1),
        Claim("P4.vocabulary", "ours", "that floor does not depend on how many such symbols there are", "not tested",
              "absolute slope of its final log p on ln V, eps 1e-6", "<", 0.5),
        Claim("P4.speed", "ours", "above the floor, the speed of sinking is set by AdamW's beta2", "not tested",
              "final log p at beta2 0.99 minus at 0.9, eps 1e-10 (nats)", ">", 2.0),
        Claim("P4.z-loss", "P Fig. 4", "z-loss brings log Z closer to 0", "near 0",
              "log10 of mean |log Z| over the second half of the run, with z-loss minus with neither, LR 1 and above, "
              "bf16", "<", 0.0),
        Claim("P4.near-zero", "P Fig. 4", "z-loss keeps log Z near 0", "near 0",
              "|log Z| at the end with z-loss, LR 0.1", "<", 1.0),
        Claim("P3.harm", "P Fig. 3", "without weight decay, output-logit divergence hurts at high learning rates and "
              "z-loss mends it", "loss rises at high LR whatever the size; z-loss mends it",
              "final loss with neither minus with z-loss, LR 1 and above, bf16 (nats)", ">", 0.05),
        Claim("P3.decay", "P Fig. 3", "weight decay mends it too", "for the larger models",
              "final loss with neither minus with weight decay, LR 1 and above, bf16 (nats)", ">", 0.05),
        Claim("P3.no-cosine", "ours", "without z-loss, a high learning rate that is not annealed costs more",
              "not tested", "final loss with neither minus with z-loss, LR 1 held to the end, bf16 (nats)", ">", 0.05),
    ),
    "03_muparam_lr_sensitivity": (
        Claim("P8.standard-drifts", "P Fig. 8", "in standard parametrization the best learning rate falls as "
              "width grows", "the best LR moves",
              "slope of log10 best LR per decade of width, standard, with qk-norm", "<", 0.0),
        Claim("P8.mup-steady", "P Fig. 8", "muParam (simple) holds the best learning rate steady as width grows",
              "stabilises the best LR",
              "absolute slope of log10 best LR per decade of width, muParam (simple), with qk-norm", "<", 0.33),
        Claim("P8.mup-steadier", "P Fig. 8", "muParam (simple) keeps the best learning rate from falling with width",
              "stabilises the best LR",
              "slope of log10 best LR per decade of width, muParam (simple) minus standard, with qk-norm", ">", 0.0),
        Claim("P8.loss", "P Fig. 8", "muParam (simple) does not lower the best loss",
              "no improvement in loss",
              "best loss at the largest width, muParam (simple) minus standard (nats)", ">", -0.02),
        Claim("P8.sensitivity", "P Fig. 8", "muParam (simple) does not lower LR sensitivity",
              "no reduction of LR sensitivity",
              "LR sensitivity at the largest width, muParam (simple) minus standard (nats)", ">", -0.02),
        Claim("PE4.steadier", "P Fig. E.4", "without qk-norm too, muParam (simple) keeps the best learning rate from "
              "falling with width", "stabilises the best LR",
              "slope of log10 best LR per decade of width, muParam (simple) minus standard, without qk-norm", ">", 0.0),
        Claim("PE4.mup-fails", "P Fig. E.4", "muParam (simple) does not replace qk-norm at high learning rates",
              "does not alleviate the need for qk-norm",
              "final loss without minus with qk-norm at the highest LR and largest width, muParam (simple) (nats)",
              ">", 0.3),
        Claim("PE5.intermediate", "P Fig. E.5", "muParam (intermediate) is no better than (simple)",
              "no measurable improvement at the largest scale",
              "best loss at the largest width, muParam (intermediate) minus (simple) (nats)", ">", -0.02),
        Claim("PE5.full", "P Fig. E.5", "muParam (full) is no better than (simple)",
              "no measurable improvement at the largest scale",
              "best loss at the largest width, muParam (full) minus (simple) (nats)", ">", -0.02),
        Claim("PE6.smallest", "P Fig. E.6", "attention scaled by 1/d_h lowers the loss of the smallest model slightly",
              "slightly lower loss at the smallest scale",
              "best loss at the smallest width, 1/d_h minus 1/sqrt(d_h) (nats)", "<", 0.0),
        Claim("PE6.largest", "P Fig. E.6", "attention scaled by 1/d_h raises the loss of the largest model",
              "the reverse at the largest scale",
              "best loss at the largest width, 1/d_h minus 1/sqrt(d_h) (nats)", ">", 0.0),
    ),
    "04_rksp_auroc": (
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
    ),
    "05_kss_divergence": (
        Claim("KT3.uncontrolled", "K Table 3",
              "without norms and without control, training diverges at LR 0.005 to 0.01", "66.7%",
              "share of runs without control that diverge", ">", 0.5),
        Claim("KT3.clipping", "K Table 3", "clipping helps little", "58.3% with clipping at 1.0, 50.0% at 0.5",
              "share of runs with clipping, at 0.5 and 1.0, that diverge", ">", 0.33),
        Claim("KT3.kss-at-paper", "K Table 3", "KSS with alpha 0.15 at every tenth step prevents divergence",
              "12.5% against 66.7%", "diverged share, KSS at the paper's alpha 0.15 minus no control", "<", 0.0),
        Claim("KT3.kss-every-step", "ours", "KSS with alpha 5 at every step prevents divergence", "not tested",
              "diverged share, KSS at alpha 5 and every step minus no control", "<", 0.0),
        Claim("KF2.dose", "K Fig. 2", "within the paper's range, more KSS prevents more divergence",
              "25.0%, 12.5%, 8.3% at alpha 0.10, 0.15, 0.20", "diverged share, alpha 0.20 minus 0.10, every tenth step",
              "<", 0.0),
        Claim("KT3.near-unit-mass", "K Table 3", "KSS lowers near-unit mass", "0.58 against 0.85",
              "M1 at the last reading, KSS at alpha 5 and every step minus no control", "<", 0.0),
        Claim("KT3.accuracy", "K Table 3", "KSS raises accuracy", "48.2% against 28.5%",
              "final accuracy, KSS at alpha 5 and every step minus no control", ">", 0.0),
        Claim("KT3.learning", "ours", "where recall is learned, preventing divergence costs no accuracy", "not tested",
              "final accuracy at each arm's best LR, KSS at alpha 5 and every step minus no control", ">", -0.05),
        Claim("KT6.unstable-term", "K Table 6", "full KSS prevents more than its unstable term alone",
              "12.5% against 33.3%", "diverged share, full KSS minus its unstable term, alpha 5, every step", "<", 0.0),
        Claim("KT6.near-unit-term", "K Table 6", "full KSS prevents more than its near-unit term alone",
              "12.5% against 41.7%",
              "diverged share, full KSS minus its near-unit term at the better of two doses", "<", 0.0),
        Claim("KT6.random-l2", "K Table 6", "KSS prevents more than a random l2 penalty on residuals",
              "12.5% against 54.2%", "diverged share, KSS minus random l2 at the better of two doses", "<", 0.0),
        Claim("KT6.jacobian", "K Table 6", "KSS prevents more than a penalty on the layers' Jacobians",
              "12.5% against 45.8%", "diverged share, KSS minus Jacobian penalty at the better of two doses", "<", 0.0),
        Claim("KT6.activation-variance", "K Table 6", "KSS prevents more than a penalty on the activations' variance",
              "12.5% against 50.0%", "diverged share, KSS minus variance penalty at the better of two doses", "<", 0.0),
        Claim("KT6.residual-norm", "ours", "KSS prevents more than a plain penalty on the residual stream's norm",
              "not tested", "diverged share, KSS minus norm penalty at the better of two doses", "<", 0.0),
        Claim("KT6.correlation", "K Table 6", "what lowers M1 prevents divergence", "r = -0.87",
              "correlation over arms of the change in M1 with the fall in divergence", "<", -0.5),
    ),
    "06_warmup_and_weight_decay": (
        Claim("P5.sensitivity", "P Fig. 5", "a longer warm-up lowers LR sensitivity", "lowers LR sensitivity",
              "LR sensitivity with the longest minus with the shortest warm-up (nats)", "<", 0.0),
        Claim("P5.loss", "P Fig. 5", "a longer warm-up lowers the loss", "lowers loss",
              "best loss over the LRs with the longest minus with the shortest warm-up (nats)", "<", 0.0),
        Claim("P5.larger", "P Fig. 5", "it helps the larger model more", "most for the larger models",
              "change of LR sensitivity from the shortest to the longest warm-up, largest minus smallest size (nats)",
              "<", 0.0),
        Claim("P6.sensitivity", "P Fig. 6", "independent weight decay lowers LR sensitivity",
              "lower than with PyTorch-style decay",
              "LR sensitivity with independent minus with PyTorch-style decay, the latter over the better of the "
              "paper's two LR ranges (nats)", "<", 0.0),
        Claim("PE10.best-lr", "P Fig. E.10", "more weight decay moves the best learning rate slightly up",
              "slightly right", "slope of log10 best LR per decade of lambda, independent decay", ">", 0.0),
        Claim("PE7.steps", "P Figs E.7, E.9", "LR sensitivity hardly depends on the number of steps",
              "hardly changes",
              "LR sensitivity with double against half the steps, absolute change over that with the usual number",
              "<", 0.25),
        Claim("PE9.batch", "P Figs E.7, E.9", "nor on the batch size", "hardly changes",
              "LR sensitivity with double against half the batch, absolute change over that with the usual size",
              "<", 0.25),
        Claim("Q1.lion-logits", "ours", "without qk-norm, attention logits blow up under Lion too", "not tested",
              "log10 of the peak attention logit, mean over failing runs without qk-norm, Lion", ">", 4.0),
        Claim("Q1.lion-cure", "ours", "and qk-norm prevents the failure", "not tested",
              "final loss without minus with qk-norm at the lowest LR that fails without it, Lion (nats)", ">", 0.3),
        Claim("Q1.lamb-logits", "ours", "without qk-norm, attention logits blow up under LAMB too", "not tested",
              "log10 of the peak attention logit, mean over failing runs without qk-norm, LAMB", ">", 4.0),
        Claim("Q1.lamb-cure", "ours", "and qk-norm prevents the failure", "not tested",
              "final loss without minus with qk-norm at the lowest LR that fails without it, LAMB (nats)", ">", 0.3),
        Claim("Q2.vit-logits", "ours", "without qk-norm, attention logits blow up in a Vision Transformer too",
              "not tested",
              "log10 of the peak attention logit, mean over failing runs without qk-norm, digits", ">", 4.0),
        Claim("Q2.vit-cure", "ours", "and qk-norm prevents the failure", "not tested",
              "final loss without minus with qk-norm at the lowest LR that fails without it, digits (nats)", ">", 0.3),
    ),
    "07_width_vs_depth": (
        Claim("P7.depth-raises", "P Fig. 7", "LR sensitivity grows with depth",
              "depth raises LR sensitivity",
              "slope of LR sensitivity per decade of N, depth grown, with qk-norm (nats)", ">", 0.0),
        Claim("P7.depth-faster", "P Fig. 7", "depth raises LR sensitivity faster than width",
              "depth faster than width",
              "slope of LR sensitivity per decade of N, depth minus width, with qk-norm (nats)", ">", 0.0),
        Claim("P7.depth-faster-above", "ours", "the same where only learning rates from the best one up count",
              "not tested",
              "slope of LR sensitivity above the best LR per decade of N, depth minus width, with qk-norm (nats)",
              ">", 0.0),
        Claim("PE2.depth-faster", "P Fig. E.2", "without qk-norm too, depth raises LR sensitivity faster than width",
              "the same without qk-norm",
              "slope of LR sensitivity per decade of N, depth minus width, without qk-norm (nats)", ">", 0.0),
        Claim("PE3.lowest-loss", "P Fig. E.3", "growing width and depth together gives the lowest loss at the largest "
              "size", "joint scaling lowest at the largest scale",
              "best loss at the largest size, both grown minus the lower of width and depth, with qk-norm (nats)",
              "<", 0.0),
        Claim("PE3.extrapolates", "P Fig. E.3", "and its loss can be extrapolated best from smaller sizes",
              "joint scaling extrapolates best",
              "error of a power law's forecast of the best loss at the largest size, both grown minus the smaller "
              "error of width and depth, with qk-norm (nats)", "<", 0.0),
    ),
    "08_predicting_logit_growth": (
        Claim("P9.forecast", "P Fig. 9", "a quadratic in log N, fitted per learning rate to smaller models, foretells "
              "the early attention logit of the largest", "the fit foretells the 4.8B model's failure",
              "error of the forecast logit of the largest size, mean over LRs (decades)", "<", 0.3),
        Claim("P9.better-than-last", "ours", "the fit foretells logits of larger models better than the largest fitted "
              "model's own logit", "not tested",
              "error of the quadratic minus that of the largest fitted size's logit, all held-out settings (decades)",
              "<", 0.0),
        Claim("P9.early-above-1e4", "P Fig. 9", "every run whose early attention logit is above 1e4 fails",
              "all points above 1e4 diverged", "share of runs with an early logit above 1e4 that fail", ">", 0.75),
        Claim("P9.auroc", "P Fig. 9", "the forecast logit foretells which larger models fail at which learning rate",
              "foretells that 4.8B diverges at LR 1e-2",
              "AUROC of the forecast logit over runs at held-out settings", ">", 0.8),
        Claim("P9.auroc-same", "ours", "it does so better than 'the same as the largest fitted size'", "not tested",
              "AUROC of the forecast logit minus that of the share of failures at the largest fitted size and same LR",
              ">", 0.0),
        Claim("P9.auroc-lr", "ours", "it does so better than the learning rate alone", "not tested",
              "AUROC of the forecast logit minus that of the LR", ">", 0.0),
        Claim("P9.brier", "ours", "read as probabilities, its forecasts are closer to what happens than those from the "
              "learning rate alone", "not tested",
              "Brier score of logistic regression on the logit minus that on log LR, both fitted on the smaller sizes",
              "<", 0.0),
        Claim("P10.worsens", "P Fig. 10", "attention logits forced to about 1e3 raise the loss",
              "loss worsens at kappa about 1e3",
              "final loss at kappa 1e3 minus that at the best smaller kappa (nats)", ">", 0.1),
        Claim("P10.bigram", "P Fig. 10", "forced to 1e4, the model is worse than one without layers",
              "worse than a zero-layer bigram model by 1e4",
              "final loss at kappa 1e4 minus that of the model without layers (nats)", ">", 0.0),
    ),
    "09_gradient_scale_and_adam_eps": (
        Claim("P11.falls-with-n", "P Fig. 11", "the gradient RMS of the first MLP layer falls as the model grows",
              "falls with N", "slope of log10 gradient RMS of block 0's first MLP layer per decade of N, mean over LRs",
              "<", 0.0),
        Claim("P11.falls-with-lr", "P Fig. 11", "and falls as the learning rate grows", "falls with LR",
              "slope of log10 gradient RMS of block 0's first MLP layer per decade of LR, mean over sizes", "<", 0.0),
        Claim("PE12.falls-with-n", "P Fig. E.12", "so does that of the key projection, with size", "as Fig. 11",
              "slope of log10 gradient RMS of block 0's key projection per decade of N, mean over LRs", "<", 0.0),
        Claim("PE12.falls-with-lr", "P Fig. E.12", "and with the learning rate", "as Fig. 11",
              "slope of log10 gradient RMS of block 0's key projection per decade of LR, mean over sizes", "<", 0.0),
        Claim("PC1.flat-in-n", "P Fig. C.1", "the output RMS of a block hardly depends on the size of the model",
              "hardly depends on N", "slope of log10 output RMS of block 0 per decade of N, mean over LRs", "<", 0.15),
        Claim("PC1.grows-with-lr", "P Fig. C.1", "it grows with the learning rate", "grows with LR",
              "slope of log10 output RMS of block 0 per decade of LR, mean over sizes", ">", 0.0),
        Claim("PC1.grows-with-depth", "P Fig. C.1", "it grows with depth", "grows with depth",
              "log10 ratio of the last block's output RMS to block 0's, largest model, mean over LRs", ">", 0.0),
        Claim("PC.final-norm", "P App. C", "where the output RMS is larger, gradients are smaller",
              "the final LayerNorm divides gradients by it",
              "slope of log10 gradient RMS of block 0's first MLP layer per decade of the last block's output RMS",
              "<", 0.0),
        Claim("P13.update-shrinks", "P Fig. 13", "where the gradient RMS falls under eps, the update RMS shrinks",
              "the update RMS shrinks",
              "log10 ratio of update RMS (block 0's first MLP layer) to that under the smallest eps, runs with "
              "gradient RMS under eps", "<", -0.3),
        Claim("P12.smaller-eps", "P Fig. 12", "at the highest learning rate, an eps well under the gradients gives a "
              "lower loss than one above them", "eps 1e-15 in place of 1e-8 improves the loss at LR 0.3",
              "final loss at eps 1e-8 minus that at the smallest eps above the gradient RMS, highest LR (nats)",
              "<", 0.0),
        Claim("P12.at-1e-2", "ours", "the same at a learning rate that suits the model", "not tested",
              "final loss at eps 1e-8 minus that at the smallest eps above the gradient RMS, LR 1e-2 (nats)", "<", 0.0),
        Claim("P13.collapse", "P Fig. 13", "under an eps above the gradients, the gradient RMS collapses",
              "a smaller eps stops a collapse of the gradient RMS",
              "log10 ratio of gradient RMS (block 0's first MLP layer) at the smallest eps above it to that at eps "
              "1e-8, highest LR", "<", -0.3),
        Claim("PE15.diverges", "P Fig. E.15", "with eps two decades above the gradients, training fails",
              "1e-6 diverges",
              "final loss at the eps nearest 100 times the gradient RMS minus that at 1e-8, highest LR (nats)",
              ">", 0.4),
    ),
    "10_kss_baselines": (
        Claim("KT4.kss-beats-baselines", "K Table 4", "KSS prevents more divergence than each baseline",
              "12.5% against 33.3% to 54.2%",
              "diverged share at LR 0.005 to 0.01, KSS (alpha 5, every step) minus the best of spectral norm, "
              "weight norm, gradient penalty, SAM and Lion", "<", 0.0),
        Claim("KT4.baselines-help", "K Table 4", "each baseline prevents some divergence", "33.3% to 54.2%, from 66.7%",
              "diverged share at LR 0.005 to 0.01, the worst of those minus no control", "<", 0.0),
        Claim("KT4.kss-sam", "K Table 4", "KSS on top of SAM prevents more than SAM", "8.3% against 33.3%",
              "diverged share at LR 0.005 to 0.01, SAM 0.1 with minus without KSS (alpha 5, every step)", "<", 0.0),
        Claim("KT5.no-norm", "K Table 5", "KSS raises the largest stable learning rate without norms", "0.002 to 0.005",
              "log10 of its ratio, with over without KSS (alpha 5, every step)", ">", 0.0),
        Claim("KT5.pre-ln", "K Table 5", "and with Pre-LN", "0.005 to 0.008",
              "log10 of its ratio, with over without KSS (alpha 5, every step), Pre-LN", ">", 0.0),
        Claim("KT5.rmsnorm", "K Table 5", "and with RMSNorm", "0.003 to 0.005",
              "log10 of its ratio, with over without KSS (alpha 5, every step), RMSNorm", ">", 0.0),
        Claim("KT13.mup", "K Table 13", "muParam prevents some divergence", "41.7% against 66.7%",
              "diverged share at LR 0.005 to 0.01, muParam minus standard", "<", 0.0),
        Claim("KT13.mup-kss", "K Table 13", "KSS on top of muParam prevents more than muParam", "8.3% against 41.7%",
              "diverged share at LR 0.005 to 0.01, muParam with minus without KSS (alpha 5, every step)", "<", 0.0),
        Claim("KT14.lamb", "K Table 14", "LAMB prevents some divergence", "45.8% against 66.7%",
              "diverged share at LR 0.005 to 0.01, LAMB minus AdamW", "<", 0.0),
        Claim("KT14.lamb-kss", "K Table 14", "KSS on top of LAMB prevents more than LAMB", "8.3% against 45.8%",
              "diverged share at LR 0.005 to 0.01, LAMB with minus without KSS (alpha 5, every step)", "<", 0.0),
        Claim("KT14.tuned", "ours", "at each one's best learning rate, KSS lowers the loss", "not tested",
              "final loss at the best LR, AdamW with minus without KSS (alpha 5, every step) (nats)", "<", 0.0),
        Claim("KT14.remedies", "ours", "KSS prevents more divergence than plain remedies", "not tested",
              "diverged share at LR 0.005 to 0.01, KSS (alpha 5, every step) minus the best of a longer warm-up, "
              "qk-norm, residual scaling, ReZero and Pre-LN", "<", 0.0),
    ),
}

PAPER_K_TABLES = {
    "table 1": pd.DataFrame(
        [("pre_ln", 25, 0.0, 0.16, 0.54, 2.29, 7.5), ("post_ln", 69, 0.0, 0.66, 0.31, 7.48, 1.4),
         ("rmsnorm", 12, 0.0, 0.16, 0.54, 2.28, 13.1), ("deepnorm", 12, 0.0, 0.00, 1.00, 3.94, 20.0),
         ("subln", 12, 0.0, 0.13, 0.54, 2.23, 9.0), ("no_norm", 84, 96.4, 0.80, 0.19, 1.11, 54.2)],
        columns=["norm", "runs", "diverged_percent", "near_unit_mass", "expansive_mass", "spectral_radius",
                 "accuracy_percent"]).set_index("norm"),
    "table 2": pd.Series({"M1": 0.995, "M1 x log10 kappa": 0.873, "rho": 0.845, "kappa": 0.687,
                          "gradient norm, step 1": 0.621, "gradient norm, step 100": 0.685,
                          "gradient variance, steps 1-100": 0.702, "loss spikes, steps 1-500": 0.758}, name="AUROC"),
    "table 3": pd.DataFrame(
        [("no control", 66.7, 28.5, 0.85, None), ("clip 0.5", 50.0, 32.1, 0.82, None),
         ("clip 1.0", 58.3, 30.8, 0.83, None), ("KSS 0.10", 25.0, 42.3, 0.68, 9.5),
         ("KSS 0.15", 12.5, 48.2, 0.58, 10.8), ("KSS 0.20", 8.3, 46.5, 0.52, 11.2)],
        columns=["arm", "diverged_percent", "accuracy_percent", "near_unit_mass", "overhead_percent"]).set_index("arm"),
    "table 4": pd.DataFrame(
        [("spectral norm", 41.7, 35.2, 5.2), ("weight norm", 54.2, 32.8, 3.8), ("gradient penalty", 45.8, 33.1, 6.4),
         ("SAM 0.05", 37.5, 38.6, 100.0), ("SAM 0.1", 33.3, 40.2, 100.0), ("Lion", 45.8, 36.5, 15.0),
         ("SAM 0.1 + KSS", 8.3, 45.8, 112.0)],
        columns=["arm", "diverged_percent", "accuracy_percent", "overhead_percent"]).set_index("arm"),
    "table 5": pd.DataFrame([("pre_ln", 0.005, 0.008), ("rmsnorm", 0.003, 0.005), ("no_norm", 0.002, 0.005)],
                            columns=["norm", "without_kss", "with_kss"]).set_index("norm"),
    "table 6": pd.DataFrame(
        [("random_l2", 54.2, 31.2, 0.81), ("jacobian", 45.8, 33.8, 0.78), ("activation_variance", 50.0, 32.5, 0.80),
         ("unstable", 33.3, 38.5, 0.68), ("near_unit", 41.7, 36.2, 0.72), ("kss", 12.5, 48.2, 0.58)],
        columns=["penalty", "diverged_percent", "accuracy_percent", "near_unit_mass"]).set_index("penalty"),
    "table 13": pd.DataFrame(
        [("no control", 66.7, 28.5, 0.85), ("muP", 41.7, 35.8, 0.72), ("muP, higher LR", 50.0, 38.2, 0.78),
         ("KSS", 12.5, 48.2, 0.58), ("muP + KSS", 8.3, 51.5, 0.52)],
        columns=["arm", "diverged_percent", "accuracy_percent", "near_unit_mass"]).set_index("arm"),
    "table 14": pd.DataFrame(
        [("AdamW", 66.7, 28.5, 0.85, 0.003), ("clip", 58.3, 30.8, 0.83, 0.005), ("LAMB", 45.8, 36.2, 0.75, 0.01),
         ("LAMB + warm-up", 37.5, 40.8, 0.68, 0.02), ("Lion", 45.8, 36.5, 0.78, 0.001),
         ("LAMB + KSS", 8.3, 52.8, 0.52, 0.015)],
        columns=["arm", "diverged_percent", "accuracy_percent", "near_unit_mass", "best_lr"]).set_index("arm"),
}
"""Paper K's tables of chapters 04, 05 and 10, percentages as printed. Its divergence rates in tables 3 to 6, 13 and 14
are shares of 24 runs."""


def verdict(claim: Claim, estimate: Estimate | None) -> str:
    """The verdict on `claim`; None stands for something that could not be measured at this scale."""
    if estimate is None:
        return "out of reach here"
    holds = (lambda x: x > claim.threshold) if claim.side == ">" else (lambda x: x < claim.threshold)
    if not holds(estimate.value):
        return "not reproduced"
    coarse = math.isclose(estimate.low, estimate.high)
    return "reproduced" if holds(estimate.low) and holds(estimate.high) and not coarse else "partly"


def scoreboard(chapter: str, estimates: dict[str, Estimate | None]) -> pd.DataFrame:
    """One row per claim of the chapter. Raises `ValueError` where an estimate is missing or belongs to no claim."""
    if chapter not in CLAIMS:
        raise ValueError(unknown("chapter", chapter, CLAIMS))
    known = [claim.id for claim in CLAIMS[chapter]]
    for name in estimates:
        if name not in known:
            raise ValueError(unknown("claim", name, known))
    absent = set(known) - set(estimates)
    if absent:
        raise ValueError(f"no estimate for {', '.join(sorted(absent))}: give one, or None where it is out of reach")
    rows = []
    for claim in CLAIMS[chapter]:
        estimate = estimates[claim.id]
        rows.append({"claim": claim.id, "source": claim.source, "statement": claim.statement,
                     "paper": claim.paper_value, "criterion": claim.criterion,
                     "ours": str(estimate) if estimate else "", "n": estimate.n if estimate else 0,
                     "verdict": verdict(claim, estimate)})
    return pd.DataFrame(rows)


def publish(board: pd.DataFrame) -> None:
    """Show the scoreboard as a table and leave it in the notebook as data for the report."""
    with pd.option_context("display.max_colwidth", None):
        table = board.to_html(index=False, escape=True)
        display({"text/html": table, "text/plain": board.to_string(index=False),
                 MIME: board.to_dict("records")}, raw=True)


def check(board: pd.DataFrame, scale: str) -> None:
    """Print claim and verdict in fixed width, then hold them against the verdicts recorded for `scale`.

    `data/verdicts.json` lists the accepted verdicts per scale and claim; a claim or scale without an entry (another
    machine's GPU run, say) is printed and not judged. Raises `AssertionError` that names each deviation.
    """
    width = board["claim"].str.len().max()
    for row in board.itertuples():
        print(f"{row.claim:<{width}}  {row.verdict}")
    expected = json.loads((project_root() / "data" / "verdicts.json").read_text()).get(scale, {})
    off = [f"{row.claim} is {row.verdict!r}, recorded for scale {scale!r}: {' or '.join(expected[row.claim])}"
           for row in board.itertuples() if row.claim in expected and row.verdict not in expected[row.claim]]
    assert not off, "; ".join(off)
