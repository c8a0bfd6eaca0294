"""The residual wirings, initialisations and positions of paper K's models, against torch, transformers and formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from stability_lib import data, models
from stability_lib.config import CHOICES, RunConfig, replace
from stability_lib.train import train_run

V = 40


@pytest.fixture
def gpt2_like(tiny) -> RunConfig:
    return replace(tiny, positions="learned", biases=True, qk_norm="none", layernorm_eps=1e-5)


def randomised(model: nn.Module) -> nn.Module:
    """Weights at which no part, bias or gain is invisible."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def copy(pairs) -> None:
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)


@pytest.mark.parametrize("norm", ["pre_ln", "post_ln"])
def test_a_block_computes_what_torchs_encoder_layer_computes(gpt2_like, norm):
    config = replace(gpt2_like, norm=norm)
    block = randomised(models.build(config, V)).blocks[0]
    peer = nn.TransformerEncoderLayer(config.d_model, config.n_heads, 4 * config.d_model, dropout=0.0, batch_first=True,
                                      activation="gelu", layer_norm_eps=1e-5, norm_first=norm == "pre_ln")
    for name in ("weight", "bias"):
        copy([(getattr(peer.self_attn, f"in_proj_{name}"), getattr(block.attention.qkv, name)),
              *((getattr(theirs, name), getattr(ours, name)) for theirs, ours in (
                  (peer.self_attn.out_proj, block.attention.out), (peer.linear1, block.mlp.up),
                  (peer.linear2, block.mlp.down), (peer.norm1, block.attention_norm), (peer.norm2, block.mlp_norm)))])
    x = torch.randn(2, config.seq_len, config.d_model)
    mask = nn.Transformer.generate_square_subsequent_mask(config.seq_len)
    torch.testing.assert_close(block(x), peer(x, src_mask=mask, is_causal=True), atol=1e-4, rtol=1e-4)


def test_the_whole_model_computes_what_gpt2_computes(gpt2_like):
    ours = randomised(models.build(gpt2_like, V))
    peer = GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=gpt2_like.seq_len, n_embd=gpt2_like.d_model, n_layer=gpt2_like.n_layers,
        n_head=gpt2_like.n_heads, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)).eval()
    stack = peer.transformer
    copy([(stack.wte.weight, ours.embed.weight), (stack.wpe.weight, ours.positions.weight),
          (peer.lm_head.weight, ours.head.weight), (stack.ln_f.weight, ours.final_norm.weight),
          (stack.ln_f.bias, ours.final_norm.bias)])
    for theirs, block in zip(stack.h, ours.blocks, strict=True):
        for conv, linear in ((theirs.attn.c_attn, block.attention.qkv), (theirs.attn.c_proj, block.attention.out),
                             (theirs.mlp.c_fc, block.mlp.up), (theirs.mlp.c_proj, block.mlp.down)):
            copy([(conv.weight, linear.weight.T), (conv.bias, linear.bias)])
        for theirs_norm, norm in ((theirs.ln_1, block.attention_norm), (theirs.ln_2, block.mlp_norm)):
            copy([(theirs_norm.weight, norm.weight), (theirs_norm.bias, norm.bias)])
    tokens = torch.randint(V, (2, gpt2_like.seq_len))
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("residual", CHOICES["residual"])
@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_each_wiring_is_its_formula(gpt2_like, norm, residual):
    config = replace(gpt2_like, norm=norm, residual=residual)
    block = randomised(models.build(config, V)).blocks[0]
    x = torch.randn(2, config.seq_len, config.d_model)
    a = (2 * config.n_layers) ** 0.25
    ln = lambda z, n: F.layer_norm(z, z.shape[-1:], n.weight, n.bias, 1e-5)  # noqa: E731
    rms = lambda z, n: z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * n.weight  # noqa: E731
    formula = {
        "pre_ln": lambda x, n, f: x + f(ln(x, n)), "subln": lambda x, n, f: x + f(ln(x, n)),
        "rmsnorm": lambda x, n, f: x + f(rms(x, n)), "no_norm": lambda x, n, f: x + f(x),
        "post_ln": lambda x, n, f: ln(x + f(x), n), "deepnorm": lambda x, n, f: ln(a * x + f(x), n),
        "deepnorm_pre": lambda x, n, f: a * x + f(ln(x, n))}[norm]
    gates = {"plain": (1.0, 1.0), "scaled": ((2 * config.n_layers) ** -0.5,) * 2, "rezero": block.gates}[residual]
    attention, mlp = (lambda z, gate=gate, f=f: gate * f(z)
                      for gate, f in zip(gates, (block.attention, block.mlp), strict=True))
    expected = formula(formula(x, block.attention_norm, attention), block.mlp_norm, mlp)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["pre_ln", "rmsnorm", "subln", "no_norm"])
def test_a_rezero_model_starts_as_the_identity_and_its_gates_have_gradients(gpt2_like, norm):
    model = models.build(replace(gpt2_like, norm=norm, residual="rezero"), V)
    stream = torch.randn(4, gpt2_like.seq_len, gpt2_like.d_model)
    for block in model.blocks:
        assert torch.equal(block(stream), stream)
    model(torch.randint(V, (2, gpt2_like.seq_len))).square().mean().backward()
    assert all(gate.grad != 0 for block in model.blocks for gate in block.gates)
    plain = models.build(replace(gpt2_like, norm=norm), V)
    weights = {name: value for name, value in model.state_dict().items() if "gates" not in name}
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())


def test_subln_normalises_what_enters_the_output_projections_and_nothing_else_does(gpt2_like):
    for norm in CHOICES["norm"]:
        block = models.build(replace(gpt2_like, norm=norm), V).blocks[0]
        seen = []
        for projection in (block.attention.out, block.mlp.down):
            projection.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        block(torch.randn(4, gpt2_like.seq_len, gpt2_like.d_model))
        normed = [bool((z.mean(-1).abs() < 1e-5).all() and (z.var(-1, correction=0) - 1).abs().max() < 0.1)
                  for z in seen]
        assert normed == [norm == "subln"] * 2


@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_the_stream_meets_exactly_one_norm_before_the_head_unless_there_are_none(gpt2_like, norm):
    model = models.build(replace(gpt2_like, norm=norm), V)
    stream = torch.randn(4, 3, gpt2_like.d_model) * 7
    out = model.final_norm(stream)
    if norm in ("post_ln", "deepnorm", "no_norm"):
        assert torch.equal(out, stream)
    else:
        torch.testing.assert_close(out.square().mean(-1), torch.ones(4, 3), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_every_wiring_runs_on_another_device(gpt2_like, norm):
    config = replace(gpt2_like, norm=norm, data="recall")
    model = models.build(config, 256).to("meta")
    logits = model(data.validation(config)[:, :-1].to("meta"))
    logits.sum().backward()
    assert {parameter.grad.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("init", CHOICES["init"])
def test_each_initialisation_has_its_standard_deviation_and_zero_biases(init):
    config = RunConfig(d_model=96, n_layers=1, n_heads=4, biases=True, positions="learned", init=init, qk_norm="none")
    model = models.build(config, 500)
    stds = {"fan_in": lambda w: 1 / math.sqrt(w.shape[1]), "gpt2": lambda w: 0.02,
            "pytorch": lambda w: 1 / math.sqrt(3 * w.shape[1]), "xavier": lambda w: math.sqrt(2 / sum(w.shape))}[init]
    embedding = {"fan_in": 1 / math.sqrt(96), "gpt2": 0.02, "pytorch": 1.0, "xavier": 0.02}[init]
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = embedding if isinstance(module, nn.Embedding) else stds(module.weight)
            assert module.weight.std().item() == pytest.approx(std, rel=0.04)
        if isinstance(module, nn.Linear) and module.bias is not None and init != "pytorch":
            assert (module.bias == 0).all()


@pytest.mark.parametrize("init", CHOICES["init"])
def test_a_seed_fixes_every_initialisation(gpt2_like, init):
    config = replace(gpt2_like, init=init)
    first = models.build(config, V).state_dict()
    torch.manual_seed(999)
    again, other = models.build(config, V).state_dict(), models.build(replace(config, seed=1), V).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


# associative recall

@pytest.fixture
def recall(tiny) -> RunConfig:
    return replace(tiny, data="recall", positions="learned", qk_norm="none")


def test_a_recall_sequence_asks_for_one_of_its_keys_and_its_value_comes_next(recall):
    config = replace(recall, seq_len=20, batch_size=64)
    batch = data.sample(config, torch.Generator().manual_seed(0))
    assert batch.shape == (64, 21)
    for sequence in batch.tolist():
        keys, values, padding = sequence[0:8:2], sequence[1:8:2], sequence[8:-2]
        assert len(set(keys)) == 4 and all(1 <= key < 128 for key in keys)
        assert all(128 <= value < 256 for value in values)
        assert padding == [0] * 11
        assert sequence[-1] == dict(zip(keys, values, strict=True))[sequence[-2]]


def test_every_pair_is_asked_for(recall):
    batch = data.sample(replace(recall, batch_size=200), torch.Generator().manual_seed(0))
    asked = (batch[:, 0:8:2] == batch[:, -2:-1]).sum(0)
    assert (asked > 25).all()


def test_recall_is_scored_at_its_last_position_only(recall):
    initial = train_run(replace(recall, steps=1, warmup_steps=0)).loss_init
    sequences = data.validation(recall)
    logits = models.build(recall, 256)(sequences[:, :-1])
    assert initial == pytest.approx(F.cross_entropy(logits[:, -1], sequences[:, -1]).item(), rel=1e-5)


def test_recall_is_learned_where_one_pair_makes_it_a_copy(recall):
    easy = replace(recall, recall_pairs=1, vocab_size=8, seq_len=4, batch_size=64, steps=200, warmup_steps=20,
                   d_model=32, eval_sequences=64)
    result = train_run(easy)
    assert result.loss_final < 0.1 < result.loss_init


def test_recall_pairs_that_do_not_fit_are_refused(recall):
    for changes in ({"recall_pairs": 6}, {"recall_pairs": 4, "vocab_size": 8}):
        with pytest.raises(data.DataError, match=r"recall_pairs . do not fit .* choose at most"):
            data.validation(replace(recall, **changes))
