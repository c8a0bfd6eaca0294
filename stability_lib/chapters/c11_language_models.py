"""Chapter 11, does shaping spectra help language models? (Paper K, Tables 7, 8.)

`language_seeds` came after all other runs. Three seeds had left perplexity on text open, at 0.481 nats [-0.206, 1.17]
under KSS at the paper's dose (KT8.perplexity) and 0.137 [-0.0627, 0.336] at the gentle one (K11.gentle), and on the
synthetic language as a lead, 0.292 [0.144, 0.439] (KT7.perplexity); of their best rates on text 6 of 21 lay at the
ladder's end. Ten new seeds alone judge these three claims now, criteria unchanged, as fixed before they were trained,
on a ladder that begins and ends half a decade lower. By the scatter over the three seeds they give the differences to
+-0.20, +-0.057 and +-0.043 nats.
"""

from collections.abc import Container

from ..claims import Claim
from ..config import RunConfig, grid
from ..studies import RECALL, check_scale, size

LANGUAGE = {
    "quick": dict(seq_len=32, batch_size=8, steps=60, warmup_steps=6, eval_sequences=32),
    "cpu": dict(seq_len=48, batch_size=16, steps=200, warmup_steps=20, eval_sequences=128),
    "gpu": dict(seq_len=256, batch_size=32, steps=500, warmup_steps=50, eval_sequences=256, precision="bf16"),
    "paper": dict(seq_len=256, batch_size=32, steps=20_000, warmup_steps=1000, eval_sequences=1024, precision="bf16"),
}
EDGE_SEEDS = (42, 123, 456, 1, 2, 3)
"""The paper's, and three more."""
SOURCES = {
    "text": dict(data="shakespeare", tokenizer="bpe", vocab_size=512),
    "synthetic": dict(data="synthetic_lm", vocab_size=512),
}
"""Shakespeare in 512 byte pairs for WikiText-103, and App. D.2's language with 512 symbols for 10 000, for the time the
output head takes; at scale `paper` its own."""

SIZES = {
    "quick": {"M": size(32, 2, 8)},
    "cpu": {"S": size(32, 2, 8), "M": size(64, 3), "L": size(96, 3, 24)},
    "gpu": {"S": size(256, 6, 32), "M": size(512, 8, 64)},
    "paper": {"S": size(512, 8, 64), "M": size(768, 12, 64), "L": size(1024, 24, 64)},
}
LADDER = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Learning rates among which an arm finds its best."""
LOWER = (3e-4, *LADDER[:-1])
"""The ladder of `language_seeds`."""
EDGE = {"S": (0.6, 0.75, 0.85, 0.95), "M": (0.4, 0.5, 0.58, 0.65), "L": (0.3, 0.4, 0.48, 0.55)}
"""Learning rates up to one at which both pilot seeds, 100 and 101, diverged without control."""
MATCHED = {"text": dict(S=0.0103, M=0.016, L=0.020), "synthetic": dict(S=0.0074, M=0.012, L=0.0123)}
"""alpha at which the first gradient of KSS at every step is as large as the task's (`cpu`, six pilot seeds)."""


def at_paper() -> dict:
    """KSS at paper K's dose, alpha 0.15 at every tenth step."""
    return dict(shaping="kss")


def matched(source: str, name: str, share: float) -> dict:
    """KSS at every step, its first gradient `share` times the task's."""
    return dict(shaping="kss", shaping_every=1, shaping_alpha=share * MATCHED[source][name])


def _runs(source: str, scale: str, sizes: Container[str]) -> list[RunConfig]:
    """All arms at size M, three arms at the others, of those in `sizes`. The gradient's norm has no limit, as that of
    the penalty would end runs whose loss is fine; what passes 500 is counted from the curves."""
    setting = RECALL | LANGUAGE[check_scale(scale)] | SOURCES[source] | dict(diverge_grad_norm=None)
    if scale == "paper":
        setting |= dict(data="wikitext103", vocab_size=10_000) if source == "text" else dict(vocab_size=10_000)
    found = []
    for name, shape in SIZES[scale].items():
        if name not in sizes:
            continue
        tenth, equal = (matched(source, name, share) for share in (0.1, 1.0))
        arms = [{}, at_paper(), tenth]
        if name == "M":
            arms += [equal, dict(clip_norm=1.0), dict(reparametrization="weight_norm"), dict(qk_norm="head")]
        base = RunConfig(**setting | shape)
        if scale == "quick":
            found += grid(base, arm=arms[:2], lr=[LADDER[1], EDGE[name][-1]], seed=[42, 123])
        elif scale == "gpu":
            found += grid(base, arm=arms[:2], lr=[3e-4, 1e-3, 3e-3, 1e-2], seed=[42, 123, 456])
        else:
            found += grid(base, arm=arms, lr=LADDER if scale == "cpu" else [1e-4, 2e-4, 4e-4, 8e-4],
                          seed=[42, 123, 456])
            found += grid(base, arm=arms, lr=EDGE[name] if scale == "cpu" else [1.6e-3, 3.2e-3], seed=EDGE_SEEDS)
    return found


def language_text(scale: str) -> list[RunConfig]:
    """Pre-LN language models on text without control, with KSS and with plainer remedies (paper K, Table 8)."""
    return _runs("text", scale, "SML")


def language_synthetic(scale: str) -> list[RunConfig]:
    """The same on the synthetic language at the one size of the paper's Table 7."""
    return _runs("synthetic", scale, "M")


def language_synthetic_sizes(scale: str) -> list[RunConfig]:
    """And at the other sizes, beside `language_synthetic`. Trained after its runs were seen: no claim rests on it."""
    return _runs("synthetic", scale, "SL")


def language_seeds(scale: str) -> list[RunConfig]:
    """Without control, with KSS at the paper's dose and, at size M, at the gentle one, on both sources, on ten new
    seeds. At all scales but cpu the first grids."""
    if check_scale(scale) != "cpu":
        return language_text(scale) + language_synthetic(scale)
    found = []
    for source, name in (("text", "S"), ("text", "M"), ("text", "L"), ("synthetic", "M")):
        arms = [{}, at_paper()] + ([matched(source, name, 0.1)] if name == "M" else [])
        found += grid(_runs(source, scale, name)[0], arm=arms, lr=LOWER, seed=range(401, 411))
    return found


STUDIES = (language_text, language_synthetic, language_synthetic_sizes, language_seeds)

CLAIMS = (
    Claim("KT7.divergence", "K Table 7", "on the synthetic language KSS prevents divergence", "3 of 24 against 6 of 24",
          "diverged share at the edge, KSS at the paper's dose minus no control, size M, synthetic", "<", 0.0),
    Claim("KT7.perplexity", "K Table 7", "on the synthetic language KSS lowers perplexity", "46.8 against 52.1",
          "loss at each arm's best LR, KSS at the paper's dose minus no control, size M, synthetic (nats)", "<", 0.0),
    Claim("KT8.divergence", "K Table 8", "on text KSS prevents divergence at every size", "3 of 72 against 11 of 72",
          "diverged share at the edge, KSS at the paper's dose minus no control, three sizes, text", "<", 0.0),
    Claim("KT8.perplexity", "K Table 8", "on text KSS lowers perplexity", "52.1, 38.5, 43.2 against 58.4, 42.3, 48.7",
          "loss at each arm's best LR, KSS at the paper's dose minus no control, mean over three sizes, text (nats)",
          "<", 0.0),
    Claim("KT8.max-lr", "K Table 8", "KSS raises the largest stable learning rate", "1.7 to 2 times",
          "log10 of its ratio, KSS at the paper's dose over no control, mean over three sizes, text", ">", 0.0),
    Claim("KT8.max-lr-falls", "K Table 8", "the largest stable learning rate falls with size",
          "3e-4, 2e-4, 1.5e-4 at 25M, 85M, 125M", "slope of its log10 per decade of N without control, text", "<", 0.0),
    Claim("K11.gentle", "ours", "at a gentle dose KSS lowers perplexity", "not tested",
          "loss at each arm's best LR, KSS with a first gradient a tenth of the task's minus no control, size M, "
          "mean of both sources (nats)", "<", 0.0),
    Claim("K11.gentle-divergence", "ours", "at a gentle dose KSS prevents divergence", "not tested",
          "diverged share at the edge, KSS with a first gradient a tenth of the task's minus no control, both "
          "sources, all sizes", "<", 0.0),
    Claim("K11.past-best", "ours", "KSS helps where the learning rate is past the best of no control", "not tested",
          "loss, at most that at the start, KSS at the paper's dose minus no control, mean over LRs above the best of "
          "no control, size M, both sources (nats)", "<", 0.0),
    Claim("K11.clipping", "ours", "KSS prevents more divergence than clipping at 1", "not tested",
          "diverged share at the edge, the best of three doses of KSS minus clipping at 1, size M, both sources",
          "<", 0.0),
    Claim("K11.remedies", "ours", "KSS lowers perplexity more than plainer remedies", "not tested",
          "loss at each arm's best LR, the best of three doses of KSS minus the best of clipping, weight norm and "
          "qk-norm, size M, mean of both sources (nats)", "<", 0.0),
)
