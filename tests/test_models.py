import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import digest, step_flops
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from stability_lib import blocks, data, models, probes
from stability_lib.config import CHOICES, IMAGES, RunConfig, replace
from stability_lib.train import autocast

V = 40
TRUNCATED_STD = 0.8796256610342398
"""Standard deviation of a unit normal cut at +-2 (scipy.stats.truncnorm)."""


def tokens(config: RunConfig, batch: int = 2) -> torch.Tensor:
    return torch.randint(V, (batch, config.seq_len))


def test_truncated_weights_do_not_change_with_torchs_version(monkeypatch):
    """Its `trunc_normal_` drew other weights from the same seed before 2.13."""
    monkeypatch.delattr(nn.init, "trunc_normal_")
    drawn = models.build(RunConfig(d_model=32, n_layers=1, n_heads=2), V).blocks[0].attention.qkv.weight
    assert drawn.flatten()[:3].tolist() == pytest.approx([-0.069517948, 0.12464027, 0.13911957], rel=1e-6)
    assert drawn.abs().max() <= 2 / TRUNCATED_STD / math.sqrt(32)


def with_random_gains(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
    return model


# causality

@pytest.mark.parametrize("attention, qk_norm, kappa", [
    *itertools.product(CHOICES["attention"], CHOICES["qk_norm"], [None]), ("softmax", "none", 10.0)])
def test_logits_have_no_gradient_from_later_tokens(tiny, attention, qk_norm, kappa):
    config = replace(tiny, seq_len=8, attention=attention, qk_norm=qk_norm, logit_transplant=kappa)
    model = models.build(config, V)
    embedded = []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits = model(tokens(config))
    for t in range(config.seq_len):
        scalar = (logits[:, t] * torch.randn(V)).sum()
        gradient_T = torch.autograd.grad(scalar, embedded[0], retain_graph=True)[0].abs().sum((0, 2))
        assert (gradient_T[t + 1:] == 0).all() and (gradient_T[: t + 1] > 0).all()


def test_a_shorter_sequence_has_the_same_logits(tiny):
    model, x = models.build(tiny, V), tokens(tiny)
    torch.testing.assert_close(model(x[:, :5]), model(x)[:, :5], atol=1e-5, rtol=1e-5)


# sizes

@pytest.mark.parametrize("changes", [
    {}, {"n_layers": 5}, {"d_model": 32, "n_heads": 4}, {"mlp_ratio": 2}, {"qk_norm": "none"}, {"qk_norm": "model"},
    {"n_layers": 0}, {"attention": "squared_relu", "parametrization": "mup_full"}])
def test_n_params_counts_the_weights_between_embedding_and_head(tiny, changes):
    config = replace(tiny, **changes)
    model = models.build(config, V)
    gains = sum(p.numel() for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    outside = model.embed.weight.numel() + model.head.weight.numel()
    assert models.n_params(config) + gains + outside == sum(p.numel() for p in model.parameters())
    assert model.embed.weight.shape == model.head.weight.shape == (V, config.d_model)


@pytest.mark.parametrize("width, layers", [(32, 2), (64, 3), (128, 2)])
def test_n_params_is_12_layers_times_width_squared_at_the_papers_mlp(width, layers):
    config = RunConfig(d_model=width, n_layers=layers)
    assert models.n_params(config) == 12 * layers * width**2
    in_blocks = sum(p.numel() for p in models.build(config, V).blocks.parameters())
    assert 1 <= in_blocks / models.n_params(config) < 1.03


def test_no_layer_has_a_bias_and_the_head_is_not_the_embedding(tiny):
    for qk_norm in CHOICES["qk_norm"]:
        model = models.build(replace(tiny, qk_norm=qk_norm), V)
        assert not [name for name, _ in model.named_parameters() if "bias" in name]
        assert model.head.weight is not model.embed.weight


def test_named_weights_are_all_matrices_once_with_query_key_value_apart(tiny):
    model = models.build(tiny, V)
    named = model.named_weights()
    assert list(named) == ["embed", *(f"block{i}.{part}" for i in range(2) for part in
                                      ("q", "k", "v", "out", "mlp_up", "mlp_down")), "head"]
    assert sum(w.numel() for w in named.values()) == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    x = torch.randn(1, 3, tiny.d_model)
    qkv = model.blocks[1].attention.qkv(x).chunk(3, -1)
    for part, expected in zip("qkv", qkv, strict=True):
        torch.testing.assert_close(x @ named[f"block1.{part}"].T, expected)


@pytest.mark.parametrize("changes", [{}, {"sam_rho": 0.1}, {"gradient_penalty": 0.1}, {"attention_gate": True},
                                     {"attention": "softmax", "attention_cap": 50.0}], ids=str)
def test_training_flops_are_those_of_the_matrix_products(tiny, changes):
    config = replace(tiny, **{"attention": "squared_relu"} | changes)  # its products are not hidden in a fused kernel
    one_step = replace(config, steps=1, warmup_steps=0)
    assert step_flops(config) == models.training_flops(one_step, data.vocab_size(config))


# attention

@pytest.mark.parametrize("factor", [1.0, 1e3])
@pytest.mark.parametrize("qk_norm", ["head", "head_fixed", "model"])
def test_qk_norm_bounds_the_logits_however_large_the_weights(tiny, qk_norm, factor):
    """|q|^2 <= d_h after a LayerNorm per head and sum_h |q_h|^2 <= d over the width, and rotations keep norms."""
    config = replace(tiny, qk_norm=qk_norm)
    model = models.build(config, V)
    with torch.no_grad():
        for name, weight in model.named_weights().items():
            if name.endswith((".q", ".k")):
                weight.mul_(factor)
                weight[:, 0] += factor
    with probes.watch(model) as readings:
        model(tokens(config))
    bound = {"model": config.d_model}.get(qk_norm, config.d_head) / math.sqrt(config.d_head)
    for i in range(config.n_layers):
        assert readings[f"attention_logit_max/block{i}"] <= bound * (1 + 1e-5)
    if factor > 1:
        with probes.watch(without_norm(model, config)) as unbounded:
            model(tokens(config))
        assert unbounded["attention_logit_max/block0"] > 100 * bound


def without_norm(model: nn.Module, config: RunConfig) -> nn.Module:
    for block in model.blocks:
        block.attention.q_norm = block.attention.k_norm = nn.Identity()
    return model


def test_heads_share_the_gain_of_their_norm(tiny):
    model = models.build(tiny, V)
    assert model.blocks[0].attention.q_norm.weight.shape == (tiny.d_head,)
    wide = models.build(replace(tiny, qk_norm="model"), V)
    assert wide.blocks[0].attention.k_norm.weight.shape == (tiny.d_model,)
    for without in ("none", "head_fixed"):
        bare = models.build(replace(tiny, qk_norm=without), V)
        assert not list(bare.blocks[0].attention.q_norm.parameters())


def test_fixed_gains_are_those_that_training_starts_from(tiny):
    trained, fixed = (models.build(replace(tiny, qk_norm=qk_norm), V) for qk_norm in ("head", "head_fixed"))
    batch = tokens(tiny)
    torch.testing.assert_close(trained(batch), fixed(batch))


def test_rotary_logits_depend_on_the_distance_only():
    length, size = 16, 8
    table = blocks.rotary_table(length, size, 10_000.0)
    q, k = torch.randn(2, 1, 1, 3, size).expand(2, 1, length, 3, size)
    turned_q, turned_k = blocks.rotate(q, table), blocks.rotate(k, table)
    z_HxTxT = torch.einsum("bihe,bjhe->bhij", turned_q, turned_k)[0]
    for offset in range(-length + 1, length):
        diagonal = z_HxTxT.diagonal(offset, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z_HxTxT[:, 0, 0], (q[0, 0] * k[0, 0]).sum(-1))
    assert (z_HxTxT[:, 0, 0] - z_HxTxT[:, 5, 0]).abs().min() > 1e-3


def test_rotation_turns_neighbouring_pairs_by_position_over_base_powers():
    length, size, base = 7, 6, 500.0
    x = torch.randn(1, length, 1, size, dtype=torch.float64)
    turned = blocks.rotate(x, blocks.rotary_table(length, size, base))
    for t, pair in itertools.product(range(length), range(size // 2)):
        angle = t * base ** (-2 * pair / size)
        a, b = x[0, t, 0, 2 * pair: 2 * pair + 2].tolist()
        expected = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        torch.testing.assert_close(turned[0, t, 0, 2 * pair: 2 * pair + 2].tolist(), expected, atol=1e-6, rtol=1e-6)


def test_squared_relu_attention_is_the_sum_over_earlier_positions(tiny):
    config = replace(tiny, attention="squared_relu")
    core = blocks.AttentionCore(config)
    q, k, v = torch.randn(3, 2, config.n_heads, config.seq_len, config.d_head)
    mixed = core(q, k, v)
    for b, h, i in itertools.product(range(2), range(config.n_heads), range(config.seq_len)):
        expected = torch.zeros(config.d_head)
        for j in range(i + 1):
            z = float(q[b, h, i] @ k[b, h, j]) / math.sqrt(config.d_head)
            expected += max(z, 0.0) ** 2 / math.sqrt(config.seq_len) * v[b, h, j]
        torch.testing.assert_close(mixed[b, h, i], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", CHOICES["attention"])
@pytest.mark.parametrize("scale", ["1/sqrt(d_h)", "1/d_h"])
def test_the_weights_that_are_shown_are_those_that_mix_the_values(tiny, attention, scale):
    config = replace(tiny, attention=attention, attention_scale=scale)
    core = blocks.AttentionCore(config)
    q, k, v = 2 * torch.randn(3, 2, config.n_heads, config.seq_len, config.d_head)
    z = core.logits(q, k)
    torch.testing.assert_close(z, q @ k.mT * {"1/sqrt(d_h)": config.d_head**-0.5, "1/d_h": 1 / config.d_head}[scale])
    torch.testing.assert_close(core.weights(z) @ v, core(q, k, v), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e5])
def test_a_transplanted_logit_is_at_most_kappa_times_root_head_size(tiny, kappa):
    """Fig. 10: RMS(q) = RMS(k) = sqrt(kappa), so <q, k> / sqrt(d_h) reaches kappa sqrt(d_h) where q and k agree."""
    config = replace(tiny, logit_transplant=kappa, qk_norm="none")
    model = models.build(config, V)
    with probes.watch(model) as readings:
        model(tokens(config))
    for i in range(config.n_layers):
        assert float(readings[f"q_rms/block{i}"]) == pytest.approx(math.sqrt(kappa), rel=1e-5)
        assert float(readings[f"k_rms/block{i}"]) == pytest.approx(math.sqrt(kappa), rel=1e-5)
        assert readings[f"attention_logit_max/block{i}"] <= kappa * math.sqrt(config.d_head) * (1 + 1e-5)
    z = torch.randn(3, config.d_head)
    core = blocks.AttentionCore(config)
    largest = core.logits(blocks.transplant(z, kappa), blocks.transplant(7 * z, kappa)).diagonal()
    torch.testing.assert_close(largest, torch.full((3,), kappa * math.sqrt(config.d_head)))


# peers: transformers' models with copied weights

def halves(rows: torch.Tensor, config: RunConfig) -> torch.Tensor:
    """Rows of q or k for a rotation that pairs i with i + E/2 where ours pairs 2i with 2i + 1."""
    by_head = rows.unflatten(0, (-1, config.d_head // 2, 2))
    return by_head.transpose(1, 2).flatten(0, 2)


def peer_settings(config: RunConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": config.rope_base, "partial_rotary_factor": 1.0}
    return dict(vocab_size=V, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads, intermediate_size=config.mlp_ratio * config.d_model,
                hidden_act="gelu", layer_norm_eps=config.layernorm_eps, max_position_embeddings=config.seq_len,
                rope_parameters=rope, attn_implementation="eager")


@pytest.mark.parametrize("rope_base", [10_000.0, 100.0])
def test_the_whole_model_computes_what_gpt_neox_computes(tiny, rope_base):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    config = replace(tiny, qk_norm="none", d_model=32, n_heads=4, rope_base=rope_base)
    ours = with_random_gains(models.build(config, V))
    peer = GPTNeoXForCausalLM(GPTNeoXConfig(use_parallel_residual=False, **peer_settings(config))).eval()
    weights = ours.named_weights(torch.Tensor.detach)
    copied = {"embed_in.weight": weights["embed"], "final_layer_norm.weight": ours.final_norm.weight}
    for i, block in enumerate(ours.blocks):
        q, k, v = (weights[f"block{i}.{part}"] for part in "qkv")
        by_head = [part.unflatten(0, (config.n_heads, -1)) for part in (halves(q, config), halves(k, config), v)]
        layer = f"layers.{i}"
        copied |= {f"{layer}.attention.query_key_value.weight": torch.stack(by_head, 1).flatten(0, 2),
                   f"{layer}.attention.dense.weight": weights[f"block{i}.out"],
                   f"{layer}.mlp.dense_h_to_4h.weight": weights[f"block{i}.mlp_up"],
                   f"{layer}.mlp.dense_4h_to_h.weight": weights[f"block{i}.mlp_down"],
                   f"{layer}.input_layernorm.weight": block.attention_norm.weight,
                   f"{layer}.post_attention_layernorm.weight": block.mlp_norm.weight}
    biases = {name: torch.zeros_like(w) for name, w in peer.gpt_neox.state_dict().items() if name.endswith("bias")}
    peer.gpt_neox.load_state_dict(biases | copied)
    peer.get_output_embeddings().load_state_dict({"weight": weights["head"]})
    x = tokens(config)
    torch.testing.assert_close(ours(x), peer(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("peer_name, qk_norm", [("Llama", "none"), ("Phi", "head")])
def test_attention_computes_what_the_peer_computes(tiny, peer_name, qk_norm):
    from transformers.models.llama import modeling_llama
    from transformers.models.phi import modeling_phi
    config = replace(tiny, qk_norm=qk_norm, d_model=32, n_heads=4)
    ours = with_random_gains(models.build(config, V)).blocks[1].attention
    module = {"Llama": modeling_llama, "Phi": modeling_phi}[peer_name]
    settings = getattr(module, f"{peer_name}Config")(qk_layernorm=qk_norm == "head", **peer_settings(config))
    peer = getattr(module, f"{peer_name}Attention")(settings, layer_idx=0).eval()
    q, k, v = ours.qkv.weight.chunk(3)
    copied = {"q_proj": halves(q, config), "k_proj": halves(k, config), "v_proj": v,
              ("o_proj" if peer_name == "Llama" else "dense"): ours.out.weight}
    if qk_norm == "head":
        copied |= {f"{part}_layernorm": halves(norm.weight, config) for part, norm in
                   (("q", ours.q_norm), ("k", ours.k_norm))}
    biases = {name: torch.zeros_like(w) for name, w in peer.state_dict().items() if name.endswith("bias")}
    peer.load_state_dict(biases | {f"{name}.weight": weight for name, weight in copied.items()})
    x = torch.randn(2, config.seq_len, config.d_model)
    rotary = getattr(module, f"{peer_name}RotaryEmbedding")(settings)(x, torch.arange(config.seq_len).unsqueeze(0))
    mask = torch.full((config.seq_len, config.seq_len), -math.inf).triu(1)
    expected = peer(x, position_embeddings=rotary, attention_mask=mask)[0]
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_qk_norm_over_the_width_is_a_layer_norm_before_the_split_into_heads(tiny):
    config = replace(tiny, qk_norm="model")
    attention = with_random_gains(models.build(config, V)).blocks[0].attention
    x = torch.randn(2, config.seq_len, config.d_model)
    q, k, v = attention.qkv(x).split(config.d_model, -1)
    q = F.layer_norm(q, (config.d_model,), eps=1e-6) * attention.q_norm.weight
    k = F.layer_norm(k, (config.d_model,), eps=1e-6) * attention.k_norm.weight
    heads = []
    for h in range(config.n_heads):
        part = slice(h * config.d_head, (h + 1) * config.d_head)
        turned = [blocks.rotate(y[..., part].unsqueeze(2), attention.rotary).squeeze(2) for y in (q, k)]
        z = turned[0] @ turned[1].mT / math.sqrt(config.d_head)
        future = torch.ones(config.seq_len, config.seq_len).triu(1).bool()
        heads.append(z.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
    torch.testing.assert_close(attention(x), torch.cat(heads, -1) @ attention.out.weight.T, atol=1e-5, rtol=1e-5)


# initialisation

@pytest.mark.parametrize("parametrization", CHOICES["parametrization"])
def test_every_weight_starts_with_the_papers_standard_deviation(parametrization):
    config = RunConfig(d_model=256, n_layers=1, base_width=1024, parametrization=parametrization)
    model = models.build(config, 1000)
    wide_head = parametrization in ("mup_intermediate", "mup_full")
    for name, weight in model.named_weights(torch.Tensor.detach).items():
        fan_in = config.d_model if name == "embed" else weight.shape[1]
        std = 1 / math.sqrt(fan_in)
        if name == "head" and wide_head:
            std = math.sqrt(config.base_width) / fan_in
        if name.endswith(".q") and parametrization == "mup_full":
            assert (weight == 0).all()
            continue
        spread = std / math.sqrt(2 * weight.numel())
        assert float(weight.square().mean().sqrt()) == pytest.approx(std, abs=4 * spread), name
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
        largest, cut = float(weight.abs().max()), 2 * std / TRUNCATED_STD
        assert largest > 1.1 * cut if name == "embed" else 0.97 * cut < largest <= 1.0001 * cut, name
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and module.eps == 1e-6


def test_building_leaves_the_global_random_numbers_alone_and_does_not_depend_on_them(tiny):
    before = torch.get_rng_state()
    first = models.build(tiny, V)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    again = models.build(tiny, V)
    assert digest(*first.parameters()) == digest(*again.parameters())


@pytest.mark.slow
def test_a_model_is_the_same_in_a_fresh_process(tiny, fresh_process):
    model = models.build(tiny, data.vocab_size(tiny))
    assert digest(*model.parameters()) == fresh_process(tiny)["weights"]


def test_another_seed_gives_other_weights_and_another_recipe_the_same(tiny):
    weights = digest(*models.build(tiny, V).parameters())
    assert digest(*models.build(replace(tiny, seed=1), V).parameters()) != weights
    assert digest(*models.build(replace(tiny, lr=0.3, steps=50, attention="squared_relu"), V).parameters()) == weights


@pytest.mark.parametrize("parametrization", ["mup_simple", "mup_intermediate"])
def test_muparam_starts_as_the_standard_parametrization_at_base_width(tiny, parametrization):
    same = replace(tiny, parametrization=parametrization, base_width=tiny.d_model)
    assert digest(*models.build(same, V).parameters()) == digest(*models.build(tiny, V).parameters())
    assert same.scale == tiny.scale


def test_muparam_full_differs_from_intermediate_by_zero_queries_and_the_scale_by_head_size(tiny):
    full = replace(tiny, parametrization="mup_full", qk_norm="none")
    model, other = models.build(full, V), models.build(replace(full, parametrization="mup_intermediate"), V)
    for (name, weight), expected in zip(model.named_weights().items(), other.named_weights().values(), strict=True):
        assert torch.equal(weight, torch.zeros_like(weight) if name.endswith(".q") else expected)
    core = model.blocks[0].attention.core
    q, k = torch.randn(2, 1, full.n_heads, full.seq_len, full.d_head)
    torch.testing.assert_close(core.logits(q, k), q @ k.mT / full.d_head)


@pytest.mark.parametrize("cap", [1.0, 50.0])
def test_capped_attention_is_that_of_gemma2(tiny, cap):
    config = replace(tiny, qk_norm="none", attention_cap=cap)
    core, (q, k, v) = blocks.AttentionCore(config), 9 * torch.randn(3, 2, config.n_heads, config.seq_len, config.d_head)
    mask = torch.full((config.seq_len, config.seq_len), -math.inf).triu(1)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 1
    expected, _ = eager_attention_forward(layer, q, k, v, mask, scaling=config.scale, softcap=cap)
    torch.testing.assert_close(core(q, k, v), expected.transpose(1, 2))


def test_a_cap_far_above_the_logits_changes_nothing_and_a_low_one_bounds_their_spread(tiny):
    x = tokens(tiny)
    plain, capped = (models.build(replace(tiny, attention_cap=cap), V) for cap in (None, 1e4))
    torch.testing.assert_close(capped(x), plain(x), rtol=1e-4, atol=1e-4)
    core = blocks.AttentionCore(replace(tiny, attention_cap=0.1))
    weights = core.weights(1e6 * torch.randn(1, 1, 5, 5))
    assert float((weights[0, 0, 4].max() / weights[0, 0, 4].min()).log()) <= 0.2 + 1e-5


def test_a_gate_multiplies_what_each_head_gives_by_a_sigmoid_of_the_layers_input(tiny):
    gated = models.build(replace(tiny, attention_gate=True, qk_norm="none"), V).blocks[0].attention
    x, seen = torch.randn(2, tiny.seq_len, tiny.d_model), []
    gated.core.register_forward_hook(lambda core, inputs, mixed: seen.append(mixed))
    found = gated(x)
    mixed = torch.cat([seen[0][:, head] for head in range(tiny.n_heads)], dim=-1)
    gate = 1 / (1 + torch.exp(-x @ gated.gate.weight.T))
    torch.testing.assert_close(found, (mixed * gate) @ gated.out.weight.T)


def test_a_gate_is_a_weight_matrix_that_counts(tiny):
    config = replace(tiny, attention_gate=True)
    model = models.build(config, V)
    assert models.n_params(config) - models.n_params(tiny) == tiny.n_layers * tiny.d_model**2
    assert models.n_params(config) == sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert {"block0.gate", "block1.gate"} == model.named_weights().keys() - models.build(tiny, V).named_weights().keys()


# reparametrizations

REPARAMETRIZED = [choice for choice in CHOICES["reparametrization"] if choice != "none"]


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("parametrization", CHOICES["parametrization"])
def test_spectral_norm_divides_the_blocks_weights_by_their_largest_singular_value(tiny, parametrization):
    config = replace(tiny, reparametrization="spectral_norm", parametrization=parametrization, d_model=32)
    model, plain = models.build(config, V), models.build(replace(config, reparametrization="none"), V)
    for _ in range(30):  # each training step is one of its power iteration
        model(tokens(config))
    model.eval()
    for linear, before in zip(linears(model.blocks), linears(plain.blocks), strict=True):
        largest = torch.linalg.matrix_norm(before.weight, 2)
        torch.testing.assert_close(linear.weight, before.weight / largest, rtol=5e-3, atol=1e-5)
    assert torch.equal(model.head.weight, plain.head.weight) and torch.equal(model.embed.weight, plain.embed.weight)


@pytest.mark.parametrize("changes", [{}, {"init": "gpt2", "biases": True}, {"parametrization": "mup_intermediate"}])
def test_weight_norm_starts_as_the_same_function(tiny, changes):
    config = replace(tiny, **changes)
    x = tokens(config)
    model = models.build(replace(config, reparametrization="weight_norm"), V)
    torch.testing.assert_close(model(x), models.build(config, V)(x), rtol=1e-4, atol=1e-5)
    for linear in linears(model.blocks):
        size, direction = linear.parametrizations.weight.original0, linear.parametrizations.weight.original1
        torch.testing.assert_close(linear.weight, size * direction / direction.norm(dim=1, keepdim=True))


def test_weight_norm_refuses_weights_without_a_direction(tiny):
    with pytest.raises(ValueError, match=r"the zero queries of mup_full have none: choose param"):
        models.build(replace(tiny, reparametrization="weight_norm", parametrization="mup_full"), V)


def test_sigma_reparam_makes_the_largest_singular_value_a_trained_number_that_starts_at_one(tiny):
    """Zhai et al. 2023: gamma W / sigma(W), of every linear layer of the blocks."""
    model = models.build(replace(tiny, reparametrization="sigma_reparam", d_model=32), V)
    gains = [linear.parametrizations.weight[1].gamma for linear in linears(model.blocks)]
    assert {gamma.item() for gamma in gains} == {1.0}
    assert {id(gamma) for gamma in gains} <= {id(p) for p in model.parameters()}
    with torch.no_grad():
        for i, gamma in enumerate(gains):
            gamma.fill_(0.5 + i)
    for _ in range(50):
        model(tokens(tiny))
    largest = [torch.linalg.matrix_norm(linear.eval().weight, 2).item() for linear in linears(model.blocks)]
    assert largest == pytest.approx([gamma.item() for gamma in gains], rel=5e-3)


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_a_reparametrized_model_is_the_same_for_the_same_seed(tiny, kind):
    config, before = replace(tiny, reparametrization=kind), torch.get_rng_state()
    first = models.build(config, V).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    again, other = models.build(config, V).state_dict(), models.build(replace(config, seed=1), V).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "weight.original" in name)


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_the_weights_of_a_reparametrized_model_are_named_as_they_are_trained(tiny, kind):
    model = models.build(replace(tiny, reparametrization=kind), V)
    named, plain = model.named_weights(), models.build(tiny, V).named_weights(torch.Tensor.detach)
    assert {name: weight.shape for name, weight in named.items()} == {name: w.shape for name, w in plain.items()}
    model(tokens(tiny)).square().mean().backward()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    readings = probes.parameters(model) | probes.gradients(model)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())  # looking moves nothing
    trained = {id(p) for p in model.parameters()}
    for linear in linears(model.blocks):
        assert {id(weight) for weight in linear.parametrizations.weight.parameters()} <= trained
    for name, weight in plain.items():
        expected = float(weight.square().mean().sqrt())
        assert float(readings[f"parameter_rms/{name}"]) == pytest.approx(expected, rel=1e-5)
    with probes.updates(model) as moved, torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert all(float(value) == pytest.approx(0.5, rel=1e-4) for value in moved.values())


# precision

@pytest.mark.parametrize("attention", CHOICES["attention"])
@pytest.mark.parametrize("qk_norm", CHOICES["qk_norm"])
def test_a_bf16_forward_pass_is_near_fp32_and_leaves_the_weights_in_fp32(tiny, attention, qk_norm):
    config = replace(tiny, precision="bf16", attention=attention, qk_norm=qk_norm, d_model=32)
    model, x = models.build(config, V), tokens(config)
    with autocast(config, "cpu"):
        half = model(x)
    exact = model(x)
    assert half.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    error = (half.float() - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.02


# images

@pytest.fixture
def image_config(tiny) -> RunConfig:
    return replace(tiny, data="digits", seq_len=64, positions="learned", d_model=32, n_heads=2)


def images(n: int = 3) -> torch.Tensor:
    return torch.randint(17, (n, 64))


def embedded_patches(model: nn.Module, pixels_BxT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and leaves the linear embedding of patches."""
    seen = []
    with model.embed.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output))):
        model(pixels_BxT)
    return seen[0]


@pytest.mark.parametrize("side", [1, 2, 4])
def test_patches_are_squares_of_pixels_in_raster_order(image_config, side):
    config = replace(image_config, patch_size=side)
    pixels = images()
    found, _ = embedded_patches(models.build(config, 10), pixels)
    starts = range(0, 8, side)
    expected = [pixels.view(-1, 8, 8)[:, i: i + side, j: j + side].flatten(1) / 16 for i in starts for j in starts]
    assert torch.equal(found, torch.stack(expected, 1))
    assert found.shape == (3, config.length, side**2)


def test_a_vision_transformer_gives_one_row_of_logits_per_image(image_config):
    model = models.build(image_config, 10)
    assert isinstance(model, models.VisionTransformer)
    assert model(images(5)).shape == (5, 1, 10)
    assert model.positions.weight.shape == (16, image_config.d_model)


def test_every_patch_sees_every_patch(image_config):
    model = models.build(image_config, 10)
    x = torch.randn(1, image_config.length, image_config.d_model, requires_grad=True)
    stream = model.stream(x)
    for t in range(image_config.length):
        scalar = (stream[0, t] * torch.randn(image_config.d_model)).sum()
        gradient_T = torch.autograd.grad(scalar, x, retain_graph=True)[0].abs().sum((0, 2))
        assert (gradient_T > 0).all()


@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_without_positions_the_order_of_patches_does_not_matter(image_config, attention):
    model = models.build(replace(image_config, attention=attention), 10)
    swapped = images().view(-1, 2, 4, 8)
    pixels, swapped = swapped.flatten(1), swapped.flip(1).flatten(1)  # the upper half of the image below the lower
    assert (model(pixels) - model(swapped)).abs().max() > 1e-3
    with torch.no_grad():
        model.positions.weight.zero_()
    torch.testing.assert_close(model(pixels), model(swapped), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_the_weights_that_are_shown_mix_the_values_of_all_patches(image_config, attention):
    core = blocks.AttentionCore(replace(image_config, attention=attention))
    q, k, v = torch.randn(3, 2, image_config.n_heads, image_config.length, image_config.d_head)
    weights = core.weights(core.logits(q, k))
    torch.testing.assert_close(weights @ v, core(q, k, v), atol=1e-5, rtol=1e-4)
    assert core.visible(weights).all()
    if attention == "softmax":
        assert (weights > 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_the_embedding_of_patches_starts_with_the_std_of_its_fan_in(image_config):
    weight = models.build(replace(image_config, d_model=1024, patch_size=4), 10).embed.weight.detach()
    assert float(weight.std()) == pytest.approx(1 / 4, rel=0.03)
    assert float(weight.abs().max()) <= 1.0001 * 2 / 4 / TRUNCATED_STD


def test_a_vision_transformer_is_the_same_for_the_same_seed_and_counts_its_weights(image_config):
    model = models.build(image_config, 10)
    assert digest(*models.build(image_config, 10).parameters()) == digest(*model.parameters())
    assert digest(*models.build(replace(image_config, seed=1), 10).parameters()) != digest(*model.parameters())
    named = model.named_weights()
    assert sum(w.numel() for w in named.values()) == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    outside = sum(named[name].numel() for name in ("embed", "positions", "head"))
    assert sum(w.numel() for w in named.values()) - outside == models.n_params(image_config)


def test_a_class_token_stands_before_the_patches_is_trained_and_its_final_state_is_classified(image_config):
    config = replace(image_config, pooling="class_token")
    model, pixels = models.build(config, 10), images()
    assert config.length == 17 and model.positions.weight.shape == (17, config.d_model)
    seen = []
    with model.final_norm.register_forward_hook(lambda module, inputs, output: seen.append(output)), \
            model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        logits = model(pixels)
    first, last = seen
    token, positions = model.class_token.weight, model.positions.weight
    torch.testing.assert_close(first[:, 0], (token + positions[:1]).expand(3, -1))
    torch.testing.assert_close(first[:, 1:], model.embed(model.patches(pixels)) + positions[1:])
    torch.testing.assert_close(logits, model.head(last[:, :1]))
    logits.square().sum().backward()
    assert all((weight.grad != 0).any() for weight in model.parameters())
    assert models.n_params(config) == models.n_params(image_config)
    assert set(model.named_weights()) - set(models.build(image_config, 10).named_weights()) == {"class_token"}
    assert models.training_flops(config, 10) > models.training_flops(image_config, 10)


@pytest.mark.parametrize("pooling", CHOICES["pooling"])
@pytest.mark.parametrize("positions", CHOICES["positions"])
def test_a_token_of_class_leaves_the_other_weights_and_works_with_all_positions(image_config, pooling, positions):
    config = replace(image_config, pooling=pooling, positions=positions, precision="bf16")
    model = models.build(config, 10)
    assert torch.equal(model.embed.weight, models.build(image_config, 10).embed.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images()).isfinite().all()


def test_text_pays_no_attention_to_pooling(tiny):
    assert replace(tiny, pooling="class_token").length == tiny.seq_len


@pytest.mark.parametrize("side, patch", [(32, 4), (32, 32), (64, 16)])
def test_patches_of_cifar_hold_channel_after_channel_scaled_to_mean_zero_and_standard_deviation_one(
        image_config, side, patch):
    config = replace(image_config, data="cifar10", seq_len=side**2, patch_size=patch)
    pixels = torch.randint(256, (3, 3 * 32**2))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))
    image = (pixels.view(3, 3, 32, 32) - mean) / std
    if side != 32:
        image = torch.nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True)
    found, _ = embedded_patches(models.build(config, 10), pixels)
    starts = range(0, side, patch)
    expected = [image[:, :, i: i + patch, j: j + patch].flatten(1) for i in starts for j in starts]
    torch.testing.assert_close(found, torch.stack(expected, 1))
    assert found.shape == (3, config.length, 3 * patch**2)


@pytest.mark.parametrize("name, side", [("digits", 4), ("mnist", 7), ("mnist", 56), ("cifar10", 224)])
def test_an_image_of_one_value_stays_one_when_it_is_resized_and_a_mean_stays_a_mean(image_config, name, side):
    settings = IMAGES[name]
    model = models.build(replace(image_config, data=name, seq_len=side**2, patch_size=1 if side % 2 else 2), 10)
    flat = model.patches(torch.full((1, settings.channels * settings.side**2), 7))
    scaled = (7 - torch.tensor(settings.centre)) / torch.tensor(settings.spread)
    torch.testing.assert_close(flat.mean((0, 1)), scaled.repeat_interleave(flat.shape[-1] // settings.channels))
    assert flat.std(1).max() < 1e-5
    random = torch.randint(16, (5, settings.channels * settings.side**2))
    native = models.build(replace(image_config, data=name, seq_len=settings.side**2, patch_size=1), 10)
    assert float((model.patches(random).mean() - native.patches(random).mean()).abs()) < 0.02


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10"])
def test_the_least_memory_of_images_counts_their_own_values(image_config, data):
    config = replace(image_config, data=data)
    more = models.least_memory(replace(config, eval_sequences=config.eval_sequences + 1)) - models.least_memory(config)
    assert more == 8 * {"digits": 65, "mnist": 785, "cifar10": 3073}[data]


@pytest.mark.parametrize("changes", [{"patch_size": 3}, {"patch_size": 16}, {"seq_len": 60},
                                     {"data": "mnist", "seq_len": 784, "patch_size": 5},
                                     {"data": "cifar10", "seq_len": 1000}])
def test_pixels_that_are_no_square_of_patches_are_refused(image_config, changes):
    with pytest.raises(ValueError, match=r"are no square image in patches .*: choose a seq_len that is the square of"):
        models.build(replace(image_config, **changes), 10)
