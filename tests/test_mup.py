"""Our muParam against Microsoft's package `mup` on the same decoder.

How the variants of paper P (Sec. 3.2.4, Fig. E.5) map onto mup's rules for Adam, with m = d_model / base_width:

- weights between two widths (all but embedding and head): mup divides their LR by m and leaves their initial std
  1/sqrt(fan-in) alone; so do all three variants;
- the head: mup leaves its LR alone, multiplies its initial weights by sqrt(m) and divides its input by m. The weight
  that acts, W / m, therefore starts with std sqrt(base fan-in) / fan-in and moves by LR / m: `mup_intermediate`. In
  `mup_simple` it starts sqrt(m) times larger;
- embedding and gains: LR and initial values are not touched, by mup or here. (mup asks its users for an embedding whose
  std does not depend on the width; the paper keeps 1/sqrt(d_model).)
- attention scale and zero queries of `mup_full` are a user's business in mup, not part of the package.
"""

import math

import mup
import pytest
import torch

from stability_lib import data, models, optim, train
from stability_lib.config import CHOICES, RunConfig, replace

V = 40
SHAPES = [dict(d_model=64, n_heads=2), dict(d_model=64, n_heads=8), dict(d_model=8, n_heads=2)]
"""Against a base of width 16 with 2 heads: larger heads, more heads, and narrower than the base."""
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "d{d_model}-h{n_heads}".format(**shape))


def with_mup(config: RunConfig, vocab: int = V) -> models.Decoder:
    """The standard decoder of `config`, handed to mup with the decoder of base width as the base."""
    standard = replace(config, parametrization="standard")
    model = models.build(standard, vocab)
    readout = mup.MuReadout(config.d_model, vocab, bias=False)
    readout.weight.data.copy_(model.head.weight.data)
    model.head = readout
    return mup.set_base_shapes(model, models.build(replace(standard, d_model=16, n_heads=2), vocab))


@pytest.fixture
def wide(tiny, shape) -> RunConfig:
    return replace(tiny, base_width=16, parametrization="mup_intermediate", **shape)


@by_shape
@pytest.mark.parametrize("parametrization", [name for name in CHOICES["parametrization"] if name != "standard"])
def test_learning_rates_are_those_of_muadam(wide, parametrization):
    ours = optim.lr_multipliers(models.build(wide, V), replace(wide, parametrization=parametrization))
    peer = with_mup(wide)
    rates = {id(p): group["lr"] for group in mup.MuAdam(peer.parameters(), lr=1.0).param_groups
             for p in group["params"]}
    theirs = {name: rates[id(parameter)] for name, parameter in peer.named_parameters()}
    theirs["head.weight"] /= peer.head.width_mult()  # the readout divides its input instead
    assert ours == pytest.approx(theirs)
    assert peer.head.width_mult() == wide.d_model / 16


@by_shape
def test_initial_weights_and_logits_of_intermediate_are_mups(wide):
    ours, peer = models.build(wide, V), with_mup(wide)
    for (name, expected), got in zip(peer.named_parameters(), ours.parameters(), strict=True):
        acting = expected / peer.head.width_mult() if name == "head.weight" else expected
        torch.testing.assert_close(got, acting, msg=lambda text, name=name: f"{name}: {text}")
    tokens = torch.randint(V, (4, wide.seq_len))
    torch.testing.assert_close(ours(tokens), peer(tokens))


@by_shape
def test_simple_differs_from_mup_in_the_heads_initial_std_alone(wide):
    simple, peer = models.build(replace(wide, parametrization="mup_simple"), V), with_mup(wide)
    factor = math.sqrt(peer.head.width_mult())
    tokens = torch.randint(V, (4, wide.seq_len))
    torch.testing.assert_close(simple(tokens), factor * peer(tokens))
    torch.testing.assert_close(simple.head.weight, peer.head.weight / factor)


@by_shape
def test_intermediate_trains_as_mup_does(wide):
    """The same losses and logits step by step; Adam's eps is small because mup's head sees a gradient m times
    smaller."""
    config = replace(wide, weight_decay=0.0, eps=1e-20, steps=8, lr=0.01)
    vocab = data.vocab_size(config)
    ours, peer = models.build(config, vocab), with_mup(config, vocab)
    optimizer = optim.build(ours, config)
    theirs = mup.MuAdam(peer.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: optim.schedule(config, step))
    losses = []
    for step in range(config.steps):
        batch = data.sample(config, torch.Generator().manual_seed(step))
        optim.set_lr(optimizer, optim.schedule(config, step))
        for model, steps in ((ours, optimizer), (peer, theirs)):
            loss, objective = train.loss_terms(model(batch[:, :-1]), batch[:, 1:], config.z_loss)
            steps.zero_grad()
            objective.backward()
            steps.step()
            losses.append(loss.item())
        schedule.step()
    assert losses[0::2] == pytest.approx(losses[1::2], rel=1e-4)
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(ours.head.weight, peer.head.weight / peer.head.width_mult(), rtol=1e-3, atol=1e-4)


def test_at_base_width_simple_and_intermediate_are_the_standard_model(tiny):
    tokens = torch.randint(V, (4, tiny.seq_len))
    standard = models.build(tiny, V)
    for parametrization in ("mup_simple", "mup_intermediate"):
        config = replace(tiny, parametrization=parametrization, base_width=tiny.d_model)
        torch.testing.assert_close(models.build(config, V)(tokens), standard(tokens))
