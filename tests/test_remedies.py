"""z-loss, qk-norm and QK-clip on models of Hugging Face and our own, and the range of learning rates."""

import copy
import math

import pytest
import torch
from test_monitor import T, V, build, inputs, quietly
from torch import nn

from stability_lib import models, projections, remedies
from stability_lib.config import replace
from stability_lib.train import loss_terms

SEPARATE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM",
            "PhiForCausalLM", "OPTForCausalLM", "BertForMaskedLM", "ViTForImageClassification")
FAMILIES = (*SEPARATE, "GPT2LMHeadModel", "GPTNeoXForCausalLM")


def test_z_loss_is_that_of_our_own_training():
    logits, targets = 5 * torch.randn(2, T, V), torch.randint(V, (2, T))
    plain, penalised = loss_terms(logits, targets, 1e-2)
    assert float(remedies.z_loss(logits, coefficient=1e-2)) == pytest.approx(float(penalised - plain), rel=1e-4)


def test_padding_does_not_count_in_z_loss():
    logits, mask = torch.randn(2, T, V), torch.ones(2, T)
    mask[0, 5:] = 0
    expected = torch.cat([logits[0, :5], logits[1]]).logsumexp(-1).square().mean()
    logits[0, 5:] = math.inf  # whatever padding holds
    logits.requires_grad_()
    found = remedies.z_loss(logits, mask, 1.0)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected)) and not bool(logits.grad[0, 5:].any())
    assert bool(logits.grad.isfinite().all())
    assert float(remedies.z_loss(logits.detach(), torch.zeros(2, T))) == 0
    with pytest.raises(ValueError, match="it has one value a token"):
        remedies.z_loss(logits, mask[:, 1:])


def test_log_z_is_taken_in_fp32():
    logits = torch.full((1, 1, V), 300.0, dtype=torch.bfloat16)
    assert float(remedies.z_loss(logits, coefficient=1.0)) == pytest.approx((300 + math.log(V)) ** 2, rel=1e-6)


def maxima(model: nn.Module, batch: dict | None = None) -> dict[str, list[float]]:
    batch = batch or inputs(model)
    with quietly(model) as monitor:
        model(**batch).loss.backward()
        monitor.step()
        return {name: value.tolist() for name, value in monitor.head_maxima.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_qk_norm_takes_the_scale_of_queries_and_keys_out(name):
    found = []
    for scale in (1, 100):
        model = remedies.add_qk_norm(build(name, **{"attn_logit_softcapping": None} if "Gemma2" in name else {}))
        with torch.no_grad():
            for layer in projections.of(model).values():
                for part in ("query", "key"):
                    projections._scale(getattr(layer, part), layer.heads(part), torch.full((1,), float(scale)))
        found.append(maxima(model))
    assert len(found[0]) == 2 and found[0].keys() == found[1].keys()
    for layer in found[0]:
        assert found[0][layer] == pytest.approx(found[1][layer], rel=1e-2)


def test_qk_norm_makes_qwen3_of_qwen2():
    """Qwen3 is Qwen2 with RMSNorm on queries and keys, and no biases."""
    theirs = build("Qwen3ForCausalLM")
    ours = remedies.add_qk_norm(build("Qwen2ForCausalLM"), lambda size: nn.RMSNorm(size, eps=1e-6))
    state = {name.replace("self_attn.q_norm", "self_attn.q_proj.query_norm").replace(
        "self_attn.k_norm", "self_attn.k_proj.key_norm"): value for name, value in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("_proj.bias") for name in missing)
    with torch.no_grad():
        for name in missing:
            ours.get_parameter(name).zero_()
        for copied in (ours, copy.deepcopy(ours)):
            assert torch.allclose(copied(**inputs(ours)).logits, theirs(**inputs(theirs)).logits, atol=1e-4)


def test_qk_norm_is_refused_where_it_is_or_cannot_be():
    for model in (build("Qwen3ForCausalLM"), remedies.add_qk_norm(build("GPT2LMHeadModel")),
                  remedies.add_qk_norm(build("LlamaForCausalLM")), build("PhiForCausalLM", qk_layernorm=True)):
        with pytest.raises(ValueError, match=r"has qk-norm already .*, as Qwen3, Gemma3 and OLMo2 do"):
            remedies.add_qk_norm(model)
    for model in (build("T5ForConditionalGeneration"), nn.TransformerEncoderLayer(8, 2), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"no known queries and keys in .*: known are"):
            remedies.add_qk_norm(model)


def clip(model: nn.Module, batch: dict, threshold: float) -> dict:
    with quietly(model, every=2) as monitor:
        model(**batch).loss.backward()
        monitor.step()
        torch.optim.SGD(model.parameters(), 0.0).step()
        clipped = remedies.qk_clip(model, threshold, monitor)
        assert remedies.qk_clip(model, threshold, monitor) == {}  # once a reading
        model(**batch).loss.backward()
        monitor.step()
        assert remedies.qk_clip(model, threshold, monitor) == {}  # of a step that was not read
    return clipped


@pytest.mark.parametrize("name", [name for name in FAMILIES if "Gemma2" not in name])
def test_qk_clip_brings_the_heads_that_passed_down_to_the_threshold_and_no_other(name):
    """The first layer gets the same inputs after the clip."""
    model = build(name)
    batch = inputs(model)
    before = maxima(model, batch)
    first = min(before)
    threshold = sorted(before[first])[1] * 1.001  # two of four heads pass it
    clipped = clip(model, batch, threshold)
    passed = [i for i, value in enumerate(before[first]) if value > threshold]
    assert clipped[first] == passed and len(passed) == 2
    after = maxima(model, batch)[first]
    assert after == pytest.approx([min(value, threshold) for value in before[first]], rel=1e-4)


def test_qk_clip_of_grouped_queries_leaves_the_shared_keys():
    model = build("LlamaForCausalLM")
    before = copy.deepcopy(model.state_dict())
    clip(model, inputs(model), 1e-3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj"}


def test_qk_clip_of_our_own_models(tiny):
    model = models.build(tiny.__class__(**{**tiny.__dict__, "qk_norm": "none"}), V)
    tokens = torch.randint(V, (4, 12))
    found = []
    for _ in range(2):
        with quietly(model) as monitor:
            model(tokens).sum().backward()
            monitor.step()
            found.append(monitor.head_maxima["blocks.0.attention.core"].tolist())
            threshold = min(found[0]) / 2
            remedies.qk_clip(model, threshold, monitor)
    assert found[1] == pytest.approx([threshold] * 2, rel=1e-4)


@pytest.mark.parametrize("name, message", [("Qwen3ForCausalLM", "has qk-norm already"),
                                           ("Gemma2ForCausalLM", "are soft-capped"),
                                           ("T5ForConditionalGeneration", "no known queries and keys")])
def test_qk_clip_is_refused_where_weights_do_not_scale_logits(name, message):
    model = build(name)
    with pytest.raises(ValueError, match=message):
        clip(model, inputs(model), 1e-6)


def test_qk_clip_is_refused_where_weights_are_made_anew_at_each_pass(tiny):
    model = models.build(replace(tiny, qk_norm="none", reparametrization="spectral_norm"), V)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention are reparametrized"):
        projections.clip(model, {"blocks.0.attention": torch.full((2,), 9.0)}, 1.0)


# learning rates

def tiny_language(seed: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))


def cross_entropy(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


BATCHES = torch.randint(V, (6, 2, T), generator=torch.Generator().manual_seed(0)).unbind()


def test_the_range_of_learning_rates_is_scored_as_our_own_runs():
    state = torch.get_rng_state()
    table, sensitivity = remedies.lr_range(tiny_language, cross_entropy, BATCHES[:4], BATCHES[4:],
                                           lrs=[1e-1, 1e-3, 1e4], steps=12, seeds=(0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert len(table) == 6 and list(table["lr"][:3]) == [1e-3, 1e-1, 1e4] and len(sensitivity) == 2
    assert table.groupby("seed")["loss_init"].nunique().eq(1).all() and table["loss_init"].nunique() == 2
    one = table[table["seed"] == 1]
    capped = one[["loss_final", "loss_init"]].min(axis=1)
    assert sensitivity["lr_sensitivity"].iloc[1] == pytest.approx((capped - capped.min()).mean())


def test_a_run_that_is_not_finite_counts_as_its_loss_at_init():
    def cut(model, tokens):
        loss = cross_entropy(model, tokens)
        return loss * (math.nan if torch.is_grad_enabled() and float(loss.detach()) < 3.9 else 1)

    table, sensitivity = remedies.lr_range(tiny_language, cut, BATCHES[:1], BATCHES[4:], lrs=[1e-5, 1e-1], steps=30,
                                           seeds=[0])
    assert list(table["status"]) == ["ok", "diverged"] and 0 < table["stop_step"].iloc[1] < 30
    assert sensitivity["best_lr"].iloc[0] == 1e-5
    with pytest.raises(ValueError, match="the held-out loss of a fresh model is nan at seed 0"):
        remedies.lr_range(tiny_language, lambda *_: torch.tensor(math.nan), BATCHES, BATCHES, lrs=[1e-2], steps=2)


def test_the_range_of_learning_rates_keeps_to_its_budget(monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(remedies.time, "perf_counter", lambda: next(clock))
    with pytest.warns(UserWarning, match="2 of 5 seeds fit in 100 s"):
        table, _ = remedies.lr_range(tiny_language, cross_entropy, BATCHES, BATCHES, lrs=[1e-2, 1e-1], steps=2,
                                     seeds=range(5), seconds=100)
    assert set(table["seed"]) == {0, 1}
    with pytest.raises(ValueError, match="so 2 do not fit in 5 s: take fewer steps or learning rates"):
        remedies.lr_range(tiny_language, cross_entropy, BATCHES, BATCHES, lrs=[1e-2, 1e-1], steps=2, seconds=5)
    with pytest.raises(ValueError, match="needs a learning rate, a seed, batches"):
        remedies.lr_range(tiny_language, cross_entropy, BATCHES, [], lrs=[1e-2], steps=2)
