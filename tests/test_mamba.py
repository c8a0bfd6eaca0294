"""The Mamba block against transformers', its scan against the recurrence it stands for, and training with it."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from stability_lib import koopman, models, probes
from stability_lib.config import RunConfig, replace
from stability_lib.mamba import Mamba, causal_convolution, selective_scan
from stability_lib.train import train_run

CONFIG = RunConfig(mixer="mamba", d_model=16, n_layers=2, n_heads=2, seq_len=12, batch_size=4, steps=4, warmup_steps=1,
                   probe_every=2, eval_sequences=8, data="recall", recall_pairs=2, vocab_size=32)
NAMES = "x", "dt", "A", "B", "C"


def recurrence(x, dt, A, B, C):
    """The definition, one position after the other (Gu and Dao 2023, eq. 2a)."""
    h, y = torch.zeros(len(x), *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(y, 1)


def inputs(length, *, batch=2, channels=3, states=4, dtype=torch.double, step=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    given = (normal(batch, length, channels), step * F.softplus(normal(batch, length, channels)),
             -normal(channels, states).exp(), normal(batch, length, states), normal(batch, length, states))
    return [part.to(dtype).requires_grad_() for part in given]


def with_gradients(function, given):
    y = function(*given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), given)]


def close(found, expected, tolerance):
    for name, one, other in zip(("y", *NAMES), found, expected, strict=True):
        assert torch.isfinite(one).all(), name
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item()), name


@pytest.mark.parametrize("length", [1, 2, 15, 16, 31, 32, 33, 47, 64, 100])
def test_the_scan_is_the_recurrence_at_any_length(length):
    given = inputs(length)
    close(with_gradients(selective_scan, given), with_gradients(recurrence, given), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-10), (torch.float, 1e-5)])
@pytest.mark.parametrize("step", [0.01, 1.0])
def test_the_scan_of_a_long_sequence(dtype, tolerance, step):
    given = inputs(1024, step=step)
    found = with_gradients(selective_scan, [part.detach().to(dtype).requires_grad_() for part in given])
    close([part.double() for part in found], with_gradients(recurrence, given), tolerance)


@pytest.mark.parametrize("step", [50.0, 1e6])
def test_steps_that_forget_all_give_no_nan(step):
    given = inputs(64, step=step, dtype=torch.float)
    close(with_gradients(selective_scan, given), with_gradients(recurrence, given), 1e-5)


def test_states_that_are_kept_for_ever_are_sums():
    x, dt, _, B, C = inputs(50)
    A = torch.zeros(3, 4, dtype=torch.double)
    sums = torch.einsum("bte,btn->bten", dt * x, B).cumsum(1)
    torch.testing.assert_close(selective_scan(x, dt, A, B, C), torch.einsum("bten,btn->bte", sums, C))


def test_a_constant_system_is_a_geometric_sum():
    length, step, rate = 40, 0.3, -0.7
    one = torch.ones(1, length, 1, dtype=torch.double)
    found = selective_scan(one, step * one, torch.full((1, 1), rate, dtype=torch.double), one, 2 * one).flatten()
    decay = math.exp(step * rate)
    expected = [2 * step * (1 - decay ** (t + 1)) / (1 - decay) for t in range(length)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("length", [5, 35])
def test_gradients_of_the_scan_by_finite_differences(length):
    given = inputs(length, batch=1, channels=2, states=2)
    assert gradcheck(selective_scan, given)
    assert gradgradcheck(selective_scan, given, fast_mode=length > 10)


def test_gradients_to_be_differentiated_are_the_same():
    given = inputs(35)
    plain, differentiable = (torch.autograd.grad(selective_scan(*given).square().sum(), given, create_graph=again)
                             for again in (False, True))
    for one, other in zip(plain, differentiable, strict=True):
        assert other.requires_grad and (one - other).abs().max() < 1e-11 * one.abs().max()


def test_blocks_of_sequences_change_nothing(monkeypatch):
    given = inputs(20, batch=5)
    whole = with_gradients(selective_scan, given)
    monkeypatch.setattr("stability_lib.mamba._CPU_BLOCK", 2 * 20 * 12)
    close(with_gradients(selective_scan, given), whole, 1e-14)


def test_the_scan_computes_in_fp32_under_autocast():
    given = inputs(40, dtype=torch.float)
    plain = with_gradients(selective_scan, given)
    with torch.autocast("cpu", torch.bfloat16):
        within = with_gradients(selective_scan, given)
    close(within, plain, 0.0)


def test_narrow_inputs_are_widened():
    given = [part.detach().bfloat16() for part in inputs(20)]
    assert torch.equal(selective_scan(*given), selective_scan(*(part.float() for part in given)))


def test_the_convolution_is_torchs():
    kernel = torch.nn.Conv1d(6, 6, 4, groups=6, dtype=torch.double)
    for length in (1, 3, 9):
        x = torch.randn(2, length, 6, dtype=torch.double)
        expected = F.conv1d(F.pad(x.mT, (3, 0)), kernel.weight, kernel.bias, groups=6).mT
        torch.testing.assert_close(causal_convolution(x, kernel), expected)


def peer_config(config: RunConfig, vocab: int = 2):
    from transformers import MambaConfig

    return MambaConfig(vocab_size=vocab, hidden_size=config.d_model, state_size=config.state_size,
                       num_hidden_layers=config.n_layers, conv_kernel=config.conv_width, expand=config.expansion,
                       use_bias=config.biases, use_conv_bias=True, tie_word_embeddings=False, use_cache=False,
                       layer_norm_epsilon=config.layernorm_eps, residual_in_fp32=False)


def renamed(mixer: Mamba) -> dict:
    return {name.replace("dt_bias", "dt_proj.bias"): weight for name, weight in mixer.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, dict(biases=True), dict(state_size=3, conv_width=2, expansion=3, d_model=24)])
def test_the_mixer_is_that_of_transformers(changes):
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = replace(CONFIG, **changes)
    ours = models.build(config, 32).blocks[0].mamba
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MambaMixer(peer_config(config), layer_idx=0)
    theirs.load_state_dict(renamed(ours))
    x = torch.randn(3, 40, config.d_model, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    outputs = []
    for mixer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = mixer(leaf)
        (y * pull).sum().backward()
        outputs.append((y, leaf.grad, {name: weight.grad for name, weight in mixer.named_parameters()}))
    (y, dx, grads), (their_y, their_dx, their_grads) = outputs
    torch.testing.assert_close(y, their_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx, their_dx, rtol=1e-4, atol=1e-4)
    assert len(grads) == len(their_grads) == (11 if config.biases else 9)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, their_grads[name.replace("dt_bias", "dt_proj.bias")], rtol=1e-4,
                                   atol=1e-4 * gradient.abs().max().item())


def test_the_model_is_that_of_transformers():
    from transformers import MambaForCausalLM

    config = replace(CONFIG, norm="rmsnorm")
    ours = models.build(config, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MambaForCausalLM(peer_config(config, 32))
    weights = {"backbone.embeddings.weight": ours.embed.weight, "backbone.norm_f.weight": ours.final_norm.weight,
               "lm_head.weight": ours.head.weight}
    for i, block in enumerate(ours.blocks):
        weights[f"backbone.layers.{i}.norm.weight"] = block.mamba_norm.weight
        weights |= {f"backbone.layers.{i}.mixer.{name}": weight for name, weight in renamed(block.mamba).items()}
    theirs.load_state_dict(weights)
    tokens = torch.randint(32, (3, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_no_position_sees_a_later_one():
    mixer = models.build(CONFIG, 32).blocks[0].mamba
    x = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(0))
    influence = torch.autograd.functional.jacobian(lambda x: mixer(x).sum((0, 2)), x).abs().sum((1, 3))  # [t, s]
    assert not influence.triu(1).any()
    assert (influence.diagonal() > 0).all() and influence[-1, 0] > 0


def test_how_the_state_space_starts():
    config = replace(CONFIG, init="gpt2", biases=True, d_model=64)
    mixer, again = (models.build(config, 32).blocks[1].mamba for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(mixer.parameters(), again.parameters(), strict=True))
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 17).repeat(128, 1))
    assert (mixer.D == 1).all() and not mixer.in_proj.bias.any()
    steps = F.softplus(mixer.dt_bias).log()
    low, high = math.log(1e-3), math.log(0.1)
    assert low - 1e-4 <= steps.min() < low + 0.4 and high - 0.4 < steps.max() <= high + 1e-4
    assert abs(steps.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 128)
    assert abs(mixer.x_proj.weight.std() - 0.02) < 0.002
    other = models.build(replace(config, seed=1), 32).blocks[1].mamba
    assert not torch.equal(other.dt_bias, mixer.dt_bias) and not torch.equal(other.conv1d.weight, mixer.conv1d.weight)


@pytest.mark.parametrize("init", ["fan_in", "pytorch", "xavier"])
def test_every_init_leaves_the_state_space_alone(init):
    mixer, reference = (models.build(replace(CONFIG, init=name), 32).blocks[0].mamba for name in (init, "gpt2"))
    for name in ("A_log", "D", "dt_bias", "conv1d.weight"):
        assert torch.equal(mixer.get_parameter(name), reference.get_parameter(name)), name


def test_counts():
    d, e, n, w, r, layers = 256, 512, 16, 4, 16, 6
    config = replace(CONFIG, d_model=d, n_layers=layers, n_heads=4, seq_len=64)
    assert models.n_params(config) == layers * (2 * d * e + w * e + (r + 2 * n) * e + r * e + n * e + d * e)
    with torch.device("meta"):
        model = models.Decoder(config, 32)
        assert model(torch.empty(2, 64, dtype=torch.long)).shape == (2, 64, 32)


def test_flops_count_the_scan_and_no_attention():
    config = replace(CONFIG, d_model=64, n_layers=3, seq_len=64, batch_size=2, steps=1)
    tokens, channels = 128, 128
    matrices = models.n_params(config) + 32 * 64
    scan = 3 * (27 - 6) * channels * config.state_size  # A_log is among the matrices, at 6 a number
    assert models.training_flops(config, 32) == tokens * (6 * matrices + scan)


def test_a_run_needs_at_least_the_memory_stated():
    from torch.autograd.graph import saved_tensors_hooks

    config, kept = replace(CONFIG, d_model=64, n_layers=3, seq_len=64, batch_size=32), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = models.build(config, 32)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.zeros(32, 64, dtype=torch.long))
    assert logits.shape == (32, 64, 32)
    taken = sum(kept.values())
    stated = models.least_memory(replace(config, eval_sequences=1)) - 16 * models.n_params(config)
    assert taken / 4 < stated < taken


@pytest.mark.parametrize("changes", [{}, dict(norm="no_norm"), dict(norm="deepnorm"), dict(residual="rezero"),
                                     dict(residual="scaled"), dict(shaping="kss", shaping_every=2),
                                     dict(shaping="jacobian", shaping_every=2), dict(gradient_penalty=0.1),
                                     dict(sam_rho=0.05), dict(optimizer="lamb"), dict(precision="bf16"),
                                     dict(positions="learned")])
def test_training_is_deterministic_and_probed(changes):
    config = replace(CONFIG, spectra_every=2, **changes)
    first, second = train_run(config), train_run(config)
    np.testing.assert_equal(first.curves, second.curves)  # NaN equals NaN
    assert first.loss_final == second.loss_final and first.status == "ok"
    assert np.isfinite(first.curves["loss"]).all() and first.loss_final != first.loss_init
    assert {"parameter_rms/block0.mamba_A_log", "gradient_rms/block1.mamba_conv1d", "update_rms/block1.mamba_dt_proj",
            "output_rms/block1"} <= set(first.curves)
    assert not any("attention" in name for name in first.curves)
    spectra = first.curves["near_unit_mass"]
    assert np.isfinite(spectra[config.residual == "rezero":]).all()  # at first rezero adds nothing to profile


def test_a_profile_of_a_state_space():
    model = models.build(replace(CONFIG, seq_len=64), 32)
    tokens = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    found = koopman.profile(model, tokens)
    assert np.isfinite(found.summary()["mean"]["near_unit_mass"]) and len(found.table()) == 2


def test_the_gradient_of_the_gradients_norm():
    model = models.build(CONFIG, 32).double()
    tokens = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(0))
    weights = [*model.blocks.parameters()]

    def penalty():
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        return sum(g.square().sum() for g in torch.autograd.grad(loss, weights, create_graph=True))

    A_log = model.blocks[0].mamba.A_log
    slope, = torch.autograd.grad(penalty(), A_log)
    ahead, direction = 1e-5, torch.randn_like(A_log)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            A_log.add_(sign * ahead * direction)
        values.append(penalty().item())
        with torch.no_grad():
            A_log.sub_(sign * ahead * direction)
    assert (values[0] - values[1]) / (2 * ahead) == pytest.approx((slope * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(state_size=0), "state_size must be positive"),
    (dict(conv_width=0), "conv_width must be positive"),
    (dict(expansion=0), "expansion must be positive"),
    (dict(state_size=2**40), "state_size must be at most 65536"),
    (dict(expansion=2**60), "expansion must be at most 65536"),
    (dict(mlp="moe"), "neither MLP nor attention"),
    (dict(attention_maps=1), "neither MLP nor attention"),
    (dict(data="digits", vocab_size=None, seq_len=64), "no images"),
    (dict(norm="subln"), "norm 'subln' is not worked out for mixer 'mamba'"),
    (dict(parametrization="mup_full"), "not worked out for mixer 'mamba'"),
])
def test_what_cannot_be_run_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("changes", [dict(expansion=2**16, d_model=2048), dict(state_size=2**16, d_model=2**16)])
def test_a_state_space_beyond_the_memory_is_named_before_training(changes):
    with pytest.raises(ValueError, match="the run needs at least"):
        train_run(replace(CONFIG, **changes))


def test_the_probes_watch_a_state_space():
    model = models.build(CONFIG, 32)
    with probes.watch(model) as readings:
        model(torch.zeros(1, 12, dtype=torch.long))
    by_block = {f"output_{what}/block{i}" for what in ("rms", "kurtosis") for i in range(2)}
    assert set(readings) == by_block | {"logit_mean", "log_z"}
