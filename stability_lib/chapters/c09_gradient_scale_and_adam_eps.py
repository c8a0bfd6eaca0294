"""Chapter 09, the scale of gradients and AdamW's eps (paper P, Figs 11 to 13, C.1, E.12, E.13, E.15)."""

from ..claims import Claim
from ..config import RunConfig, grid, replace
from ..studies import SIZES, short
from .c01_attention_logit_growth import attention_logit_growth


def adam_epsilon(scale: str) -> list[RunConfig]:
    """AdamW's eps from far below the gradients to above them (paper P, Figs 12, 13, E.15)."""
    setting = replace(short(scale), **SIZES[scale][1], probe_every=short(scale).steps // 10)
    if scale == "quick":
        return grid(setting, eps=[1e-8, 1e-3], lr=[1e-1], seed=[0, 1, 2])
    return grid(setting, eps=[1e-15, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2], lr=[1e-2, 1e-1, 3e-1], seed=[0, 1, 2])


STUDIES = (attention_logit_growth, adam_epsilon)

CLAIMS = (
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
          "hardly depends on N", "slope of log10 output RMS of block 0 per decade of N, mean over LRs", "within", 0.15),
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
)
