import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stability_lib import models, optim, probes
from stability_lib.config import CHOICES, RunConfig, replace
from stability_lib.train import autocast, loss_terms, scored, train_run

V = 40
VARIANTS = [
    {"qk_norm": "head"}, {"qk_norm": "none"}, {"qk_norm": "model"}, {"qk_norm": "none", "logit_transplant": 10.0},
    {"qk_norm": "head", "attention": "squared_relu"}, {"qk_norm": "none", "attention_scale": "1/d_h"},
    {"qk_norm": "none", "attention_cap": 0.5},
]


def uneven_model(config: RunConfig, vocab_size: int = V) -> nn.Module:
    """A model with large, uneven weights, so that its attention is far from uniform."""
    model = models.build(config, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 1)
    return model


def tokens(config: RunConfig, batch: int = 2) -> Tensor:
    return torch.randint(V, (batch, config.seq_len))


def block_values(model: nn.Module, x_BxT: Tensor) -> list[Tensor]:
    """The embedding and each block's output."""
    values = [model.embed(x_BxT)]
    for block in model.blocks:
        values.append(block(values[-1]))
    return values


def normed(x: np.ndarray, gain: Tensor, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + eps) * gain.detach().double().numpy()


def queries_and_keys(block: nn.Module, x_BxTxD: Tensor, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """q and k [B, T, H, E] in float64, from the block's input and its weights."""
    x = normed(x_BxTxD.detach().double().numpy(), block.attention_norm.weight, config.layernorm_eps)
    attention, d = block.attention, config.d_model
    found = []
    for rows, norm in ((slice(0, d), attention.q_norm), (slice(d, 2 * d), attention.k_norm)):
        y = x @ attention.qkv.weight[rows].detach().double().numpy().T
        if config.qk_norm == "model":
            y = normed(y, norm.weight, config.layernorm_eps)
        y = y.reshape(*y.shape[:2], config.n_heads, config.d_head)
        if config.qk_norm == "head":
            y = normed(y, norm.weight, config.layernorm_eps)
        if config.logit_transplant is not None:
            y = y * np.sqrt(config.logit_transplant / (y**2).mean(-1, keepdims=True))
        frequency = config.rope_base ** (-np.arange(0, config.d_head, 2) / config.d_head)
        turn = np.exp(1j * np.arange(config.seq_len)[:, None] * frequency)[:, None]
        pairs = (y[..., 0::2] + 1j * y[..., 1::2]) * turn
        found.append(np.stack([pairs.real, pairs.imag], -1).reshape(y.shape))
    return found[0], found[1]


def brute_force(q: np.ndarray, k: np.ndarray, config: RunConfig) -> dict[str, float]:
    logits, cosines, entropies = [], [], []
    for b, h, i in itertools.product(range(q.shape[0]), range(config.n_heads), range(config.seq_len)):
        row = []
        for j in range(i + 1):
            product = float(q[b, i, h] @ k[b, j, h])
            row.append(product / (config.d_head if config.attention_scale == "1/d_h" else math.sqrt(config.d_head)))
            cosines.append(product / np.linalg.norm(q[b, i, h]) / np.linalg.norm(k[b, j, h]))
        logits += row
        row = [config.attention_cap * math.tanh(z / config.attention_cap) for z in row] if config.attention_cap else row
        total = sum(math.exp(z - max(row)) for z in row)
        p = [math.exp(z - max(row)) / total for z in row]
        entropies.append(-sum(x * math.log(x) for x in p if x > 0))
    largest = max(range(len(logits)), key=logits.__getitem__)
    found = {"attention_logit_max": logits[largest], "qk_cosine_at_max": cosines[largest],
             "qk_cosine": sum(cosines) / len(cosines), "q_rms": math.sqrt((q**2).mean()),
             "k_rms": math.sqrt((k**2).mean())}
    return found | ({"attention_entropy": sum(entropies) / len(entropies)} if config.attention == "softmax" else {})


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_readings_of_a_forward_pass_are_those_of_brute_force(tiny, changes):
    config = replace(tiny, **changes)
    model, x = uneven_model(config), tokens(config)
    with probes.watch(model) as readings:
        logits = model(x)
    values = block_values(model, x)
    expected = {"logit_mean": float(logits.detach().double().mean()),
                "log_z": float(logits.detach().double().exp().sum(-1).log().mean())}
    for i, block in enumerate(model.blocks):
        found = brute_force(*queries_and_keys(block, values[i], config), config)
        output = values[i + 1].detach().double()
        found["output_rms"] = math.sqrt(float(output.square().mean()))
        found["output_kurtosis"] = scipy.stats.kurtosis(output.flatten().numpy(), fisher=False)
        expected |= {f"{name}/block{i}": value for name, value in found.items()}
    assert probes.fetch(readings) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_largest_logit_is_sought_among_causal_pairs_only(tiny):
    core = models.build(tiny, V).blocks[0].attention.core
    readings = {}
    q, k = torch.zeros(2, 1, 1, 4, 8)
    q[0, 0, :, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0])
    k[0, 0, :, 0] = torch.tensor([-3.0, 5.0, -2.0, 100.0])
    k[0, 0, 1, 1] = 12.0
    q[0, 0, 3] = 0
    probes._read_attention(readings, "x")(core, (q, k, None), None)
    assert float(readings["attention_logit_max/x"]) == pytest.approx(5 / math.sqrt(8))
    assert float(readings["qk_cosine_at_max/x"]) == pytest.approx(5 / 13)


def test_identical_tokens_give_uniform_attention_with_the_entropy_of_its_causal_rows(tiny):
    model = models.build(replace(tiny, parametrization="mup_full"), V)
    with probes.watch(model) as readings:
        model(tokens(tiny))
    for i in range(tiny.n_layers):
        assert float(readings[f"attention_entropy/block{i}"]) == pytest.approx(
            sum(math.log(t) for t in range(1, tiny.seq_len + 1)) / tiny.seq_len, rel=1e-5)


def test_queries_of_zero_read_as_zero(tiny):
    model = models.build(replace(tiny, parametrization="mup_full", qk_norm="none"), V)
    with probes.watch(model) as readings:
        model(tokens(tiny))
    read = probes.fetch(readings)
    for name in ("attention_logit_max", "q_rms", "qk_cosine", "qk_cosine_at_max"):
        assert read[f"{name}/block0"] == 0, name


def test_a_model_of_nans_is_read_without_an_exception(tiny):
    model = models.build(tiny, V)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight.fill_(math.nan)
    with probes.watch(model) as readings, probes.updates(model) as moved:
        logits = model(tokens(tiny))
    logits.sum().backward()
    read = probes.fetch(readings | moved | probes.gradients(model) | probes.parameters(model))
    assert math.isnan(read["attention_logit_max/block0"]) and math.isnan(read["log_z"])


def test_a_later_pass_overwrites_an_earlier_one(tiny):
    model, first, second = uneven_model(tiny), tokens(tiny), tokens(tiny)
    with probes.watch(model) as readings:
        model(first)
        model(second)
    with probes.watch(model) as alone:
        model(second)
    assert probes.fetch(readings) == probes.fetch(alone)


def test_weight_readings_are_root_mean_squares_with_query_key_value_apart(tiny):
    model = uneven_model(tiny)
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = optim.build(model, replace(tiny, weight_decay=0.1))
    loss_terms(model(tokens(tiny)), tokens(tiny), 1e-4)[1].backward()
    with probes.updates(model) as moved:
        optimizer.step()
    quantities = {"gradient_rms": {name: p.grad for name, p in parameters.items()},
                  "parameter_rms": parameters, "update_rms": {n: p - before[n] for n, p in parameters.items()}}
    expected, d = {}, tiny.d_model
    for quantity, found in quantities.items():
        parts = {"embed": found["embed.weight"], "head": found["head.weight"]}
        for i in range(tiny.n_layers):
            rows = found[f"blocks.{i}.attention.qkv.weight"]
            parts |= {f"block{i}.q": rows[:d], f"block{i}.k": rows[d: 2 * d], f"block{i}.v": rows[2 * d:],
                      f"block{i}.out": found[f"blocks.{i}.attention.out.weight"],
                      f"block{i}.mlp_up": found[f"blocks.{i}.mlp.up.weight"],
                      f"block{i}.mlp_down": found[f"blocks.{i}.mlp.down.weight"]}
        expected |= {f"{quantity}/{name}": math.sqrt(sum(x * x for x in part.flatten().tolist()) / part.numel())
                     for name, part in parts.items()}
    read = probes.fetch(probes.gradients(model) | probes.parameters(model) | moved)
    assert read == pytest.approx(expected, rel=1e-5)


def test_updates_are_readings_of_what_happened_inside_the_with(tiny):
    model = models.build(tiny, V)
    with probes.updates(model) as moved:
        assert not moved
        with torch.no_grad():
            model.head.weight.add_(0.25)
    read = probes.fetch(moved)
    assert read.pop("update_rms/head") == pytest.approx(0.25, rel=1e-5) and set(read.values()) == {0.0}


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_pattern_is_the_causal_attention_of_the_block_and_head_asked_for(tiny, changes):
    config = replace(tiny, **changes)
    model, x = uneven_model(config), tokens(config)
    with probes.watch_pattern(model, block=1, head=1) as patterns:
        model(x)
    pattern = patterns[0].double().numpy()
    q, k = (y[0, :, 1] for y in queries_and_keys(model.blocks[1], block_values(model, x)[1], config))
    for i, j in itertools.product(range(config.seq_len), repeat=2):
        z = [float(q[i] @ k[m]) * config.scale for m in range(i + 1)]
        if config.attention_cap:
            z = [config.attention_cap * math.tanh(logit / config.attention_cap) for logit in z]
        if config.attention == "squared_relu":
            expected = max(z[j], 0) ** 2 / math.sqrt(config.seq_len) if j <= i else 0
        else:
            expected = math.exp(z[j]) / sum(map(math.exp, z)) if j <= i else 0
        assert pattern[i, j] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert (pattern[np.triu_indices(config.seq_len, 1)] == 0).all()
    if config.attention == "softmax":
        assert pattern.sum(1) == pytest.approx(np.ones(config.seq_len), rel=1e-5)


def test_one_pattern_is_collected_for_each_forward_pass(tiny):
    model = models.build(tiny, V)
    with probes.watch_pattern(model) as patterns:
        for _ in range(3):
            model(tokens(tiny))
    model(tokens(tiny))
    assert [p.shape for p in patterns] == [(tiny.seq_len, tiny.seq_len)] * 3


def hooks_on(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("watcher", [probes.watch, probes.watch_pattern, probes.updates])
def test_probes_leave_nothing_behind_even_after_an_exception(tiny, watcher):
    model = models.build(tiny, V)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with watcher(model):
        model(tokens(tiny))
        assert hooks_on(model) > 0 or watcher is probes.updates
    assert hooks_on(model) == 0
    with pytest.raises(KeyError), watcher(model):
        raise KeyError
    assert hooks_on(model) == 0
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_readings_hold_no_part_of_the_graph(tiny):
    model = models.build(tiny, V)
    with probes.watch(model) as readings, probes.updates(model) as moved, probes.watch_pattern(model) as patterns:
        model(tokens(tiny)).sum().backward()
    read = [*(readings | moved | probes.gradients(model) | probes.parameters(model)).values(), *patterns]
    assert not any(tensor.requires_grad for tensor in read)


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": "none", "lr": 0.3}, {"precision": "bf16"},
    {"attention": "squared_relu", "parametrization": "mup_full"}])
def test_probing_changes_no_bit_of_the_trajectory(tiny, changes):
    bare = train_run(replace(tiny, **changes))
    for probing in ({"probe_every": 3}, {"probe_every": 1, "attention_maps": 3}):
        probed = train_run(replace(tiny, **changes, **probing))
        for name in ("step", "loss", "gradient_norm"):
            assert probed.curves[name] == bare.curves[name]
        assert (probed.loss_init, probed.loss_final) == (bare.loss_init, bare.loss_final)
        assert len(probed.curves) > len(bare.curves)


@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_readings_of_a_bf16_run_are_made_in_fp32(tiny, attention):
    """Autocast rounds products to bf16 also inside a hook; a logit of 1e4 would then be read in steps of 64."""
    config = replace(tiny, precision="bf16", qk_norm="none", attention=attention)
    model, seen = uneven_model(config), []
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight.mul_(30)
    core = model.blocks[0].attention.core
    core.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    with probes.watch(model) as readings, probes.watch_pattern(model) as patterns, autocast(config, "cpu"):
        model(tokens(config))
    q, k, _ = (x.detach().float() for x in seen[0])
    z_BxHxTxT = core.logits(q, k)
    largest = z_BxHxTxT.masked_fill(torch.ones_like(z_BxHxTxT).triu(1).bool(), -math.inf).max()
    assert {value.dtype for value in readings.values()} == {torch.float32}
    assert float(readings["attention_logit_max/block0"]) == float(largest) != float(largest.bfloat16())
    torch.testing.assert_close(patterns[0], core.weights(z_BxHxTxT)[0, 0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("steps, every, probed", [(10, 4, [0, 4, 8, 9]), (9, 4, [0, 4, 8]), (3, 20, [0, 2]),
                                                  (3, 1, [0, 1, 2]), (3, 0, None)])
def test_the_first_the_last_and_every_nth_step_are_probed(tiny, steps, every, probed):
    assert train_run(replace(tiny, steps=steps, probe_every=every)).curves.get("probe_step") == probed


class Strays(TorchDispatchMode):
    """Notes every operation that leaves a tensor elsewhere than on the meta device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found += [str(function) for leaf in tree_leaves(result)
                       if isinstance(leaf, Tensor) and leaf.device.type != "meta"]
        return result


@pytest.mark.parametrize("attention", CHOICES["attention"])
@pytest.mark.parametrize("qk_norm", CHOICES["qk_norm"])
@pytest.mark.parametrize("kappa", [None, 10.0])
def test_a_training_step_with_probes_stays_on_its_device(tiny, attention, qk_norm, kappa):
    """The meta device stands in for an accelerator: a tensor made on the CPU anywhere on the way is found."""
    config = replace(tiny, attention=attention, qk_norm=qk_norm, logit_transplant=kappa)
    model = models.build(config, V).to("meta")
    batch = torch.zeros(config.batch_size, config.seq_len + 1, dtype=torch.long, device="meta")
    optimizer = optim.build(model, config)
    optim.set_lr(optimizer, optim.schedule(config, 0))
    with Strays() as strays:
        with probes.watch(model) as readings, probes.watch_pattern(model) as patterns:
            loss, objective = loss_terms(model(batch[:, :-1]), batch[:, 1:], config.z_loss)
        objective.backward()
        readings |= probes.parameters(model) | probes.gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with probes.updates(model) as moved:
        optimizer.step()
    assert not strays.found
    state = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    gradients = [parameter.grad for parameter in model.parameters()]
    tensors = [loss, norm, *readings.values(), *patterns, *moved.values(), *gradients, *state]
    assert len(state) == 2 * len(gradients)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_readings_of_images_are_over_all_pairs_of_patches(tiny, attention):
    config = replace(tiny, data="digits", seq_len=64, positions="learned", attention=attention)
    model, seen = uneven_model(config, 10), []
    model.blocks[0].attention.core.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    with probes.watch(model) as readings, probes.watch_pattern(model) as patterns:
        model(torch.randint(17, (2, 64)))
    q, k = (x.detach().double() for x in seen[0][:2])
    products, lengths = q @ k.mT, q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    assert products.shape[-2:] == patterns[0].shape == (16, 16)
    logits, cosines = products / math.sqrt(config.d_head), products / lengths
    expected = {"attention_logit_max": logits.max(), "qk_cosine": cosines.mean(),
                "qk_cosine_at_max": cosines.flatten()[logits.argmax()]}
    weights = logits.softmax(-1) if attention == "softmax" else logits.relu() ** 2 / 4
    torch.testing.assert_close(patterns[0].double(), weights[0, 0], rtol=1e-4, atol=1e-6)
    if attention == "softmax":
        expected["attention_entropy"] = -(weights * weights.log()).sum(-1).mean()
    for name, value in expected.items():
        assert float(readings[f"{name}/block0"]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("optimizer, moments", [("adamw", 2), ("lion", 1), ("lamb", 2)])
def test_a_training_step_on_images_stays_on_its_device(tiny, optimizer, moments):
    config = replace(tiny, data="digits", seq_len=64, positions="learned", optimizer=optimizer)
    model = models.build(config, 10).to("meta")
    batch = torch.zeros(config.batch_size, 65, dtype=torch.long, device="meta")
    stepper = optim.build(model, config)
    with Strays() as strays:
        with probes.watch(model) as readings:
            loss, objective = loss_terms(*scored(config, model(batch[:, :-1]), batch), config.z_loss)
        objective.backward()
        readings |= probes.parameters(model) | probes.gradients(model)
    with probes.updates(model) as moved:
        stepper.step()
    assert not strays.found
    state = [value for state in stepper.state.values() for name, value in state.items() if name.startswith("exp_avg")]
    assert len(state) == moments * len(list(model.parameters()))
    assert {tensor.device.type for tensor in [loss, *readings.values(), *moved.values(), *state]} == {"meta"}


def test_every_reading_of_a_run_is_a_number_at_every_probed_step(tiny):
    config = replace(tiny, probe_every=2)
    curves = train_run(config).curves
    assert curves["probe_step"] == [0, 2, 4, 5]
    read = {name: values for name, values in curves.items() if name not in ("step", "loss", "gradient_norm")}
    per_block = {"attention_logit_max", "attention_entropy", "q_rms", "k_rms", "qk_cosine", "qk_cosine_at_max",
                 "output_rms", "output_kurtosis"}
    weights = models.build(config, V).named_weights()
    assert read.keys() == {"probe_step", "logit_mean", "log_z",
                           *(f"{name}/block{i}" for name in per_block for i in range(config.n_layers)),
                           *(f"{kind}_rms/{name}" for kind in ("parameter", "gradient", "update") for name in weights)}
    assert all(len(values) == len(curves["probe_step"]) and all(map(math.isfinite, values)) for values in read.values())


def test_readings_of_the_first_step_are_those_of_the_initial_weights(tiny):
    config = replace(tiny, probe_every=1)
    curves = train_run(config).curves
    start = probes.fetch(probes.parameters(models.build(config, 84)))
    assert {name: curves[name][0] for name in start} == start


@pytest.mark.parametrize("frozen, names", [
    ("blocks.0", [f"block0.{part}" for part in ("q", "k", "v", "out", "mlp_up", "mlp_down")]), ("embed", ["embed"]),
    ("blocks.1.attention.qkv", ["block1.q", "block1.k", "block1.v"])])
def test_frozen_weights_have_no_gradient_to_read_and_all_others_do(tiny, frozen, names):
    model = uneven_model(tiny)
    model(tokens(tiny)).sum().backward()
    everything = probes.fetch(probes.gradients(model))
    model.zero_grad()
    model.get_submodule(frozen).requires_grad_(False)
    model(tokens(tiny)).sum().backward()
    read = probes.fetch(probes.gradients(model))
    assert everything.keys() - read.keys() == {f"gradient_rms/{name}" for name in names}
    assert read and read.keys() <= everything.keys()


def test_a_model_without_any_gradient_is_said_to_have_none(tiny):
    with pytest.raises(RuntimeError, match=r"no weight matrix has a gradient: read them after backward\(\)"):
        probes.gradients(models.build(tiny, V))


def test_nothing_read_is_nothing_fetched():
    assert probes.fetch({}) == {}


@pytest.mark.parametrize("how", ["function", "method"])
def test_a_compiled_model_is_read_as_it_was_written(tiny, how):
    model, x = uneven_model(tiny), tokens(tiny)
    with probes.watch(model) as plain, probes.watch_pattern(model) as pattern:
        model(x)
    compiled = torch.compile(model, backend="eager") if how == "function" else model
    if how == "method":
        model.compile(backend="eager")
    try:
        expected = compiled(x)
        with probes.watch(compiled) as readings, probes.watch_pattern(compiled) as patterns:
            compiled(x)
        assert probes.fetch(readings) == probes.fetch(plain) and torch.equal(patterns[0], pattern[0])
        torch.testing.assert_close(compiled(x), expected)
        assert hooks_on(model) == 0
        if how == "function":
            for watcher in (probes.watch, probes.watch_pattern):
                with pytest.raises(RuntimeError, match=r"no forward pass was seen: .* what torch.compile returned"):
                    with watcher(model):
                        compiled(x)
    finally:
        torch.compiler.reset()
