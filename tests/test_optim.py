import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from stability_lib import models, optim
from stability_lib.config import CHOICES, RunConfig, replace

V = 40
shapes = st.tuples(st.integers(1, 300), st.integers(0, 300)).filter(lambda pair: pair[1] <= pair[0])


@given(shapes, st.floats(1e-4, 10), st.floats(0, 1))
def test_the_schedule_lies_above_zero_and_peaks_at_one(shape, lr, lr_final):
    config = RunConfig(steps=shape[0], warmup_steps=shape[1], lr=lr, lr_final=lr_final)
    factors = [optim.schedule(config, step) for step in range(config.steps)]
    assert all(0 < s <= 1 for s in factors) and max(factors) == 1


@given(shapes, st.floats(1e-4, 10))
def test_warm_up_is_linear_and_ends_at_one(shape, lr):
    config = RunConfig(steps=shape[0], warmup_steps=shape[1], lr=lr)
    rise = [optim.schedule(config, step) for step in range(config.warmup_steps)]
    assert rise == pytest.approx([(step + 1) / config.warmup_steps for step in range(config.warmup_steps)])


@given(shapes, st.floats(1e-4, 10), st.floats(0, 1))
def test_after_warm_up_the_lr_falls_as_a_half_cosine_to_lr_final(shape, lr, lr_final):
    steps, warmup = shape
    assume(steps > warmup and lr_final <= lr)
    config = RunConfig(steps=steps, warmup_steps=warmup, lr=lr, lr_final=lr_final)
    lrs = [lr * optim.schedule(config, step) for step in range(warmup, steps + 1)]
    assert lrs[0] == pytest.approx(lr) and lrs[-1] == pytest.approx(lr_final, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(lrs))
    middle = [(a + b) / 2 for a, b in zip(lrs, reversed(lrs), strict=True)]
    assert middle == pytest.approx([(lr + lr_final) / 2] * len(lrs))
    third = (steps - warmup) // 3
    if (steps - warmup) % 3 == 0:
        assert lrs[third] == pytest.approx(lr_final + (lr - lr_final) * 3 / 4)


def test_a_final_lr_above_the_peak_does_not_raise_the_lr():
    config = RunConfig(lr=1e-6, lr_final=1e-5)
    assert {optim.schedule(config, step) for step in range(config.warmup_steps, config.steps)} == {1.0}


def test_set_lr_moves_every_group_from_its_own_peak(tiny):
    config = replace(tiny, parametrization="mup_simple", base_width=64, lr=0.1)
    optimizer = optim.build(models.build(config, V), config)
    for factor in (0.5, 0.25, 1.0):
        optim.set_lr(optimizer, factor)
        assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.1 * factor, 0.4 * factor])


@pytest.mark.parametrize("parametrization", CHOICES["parametrization"])
def test_muparam_multiplies_the_lr_of_linear_weights_by_base_over_fan_in(tiny, parametrization):
    config = replace(tiny, parametrization=parametrization, base_width=48)
    model = models.build(config, V)
    found = optim.lr_multipliers(model, config)
    assert found.keys() == dict(model.named_parameters()).keys()
    linear = {"qkv", "out", "up", "down", "head"}
    for name, multiplier in found.items():
        scaled = parametrization != "standard" and name.split(".")[-2] in linear
        assert multiplier == (48 / 16 if scaled else 1), name
    by_weight = {id(p): group["peak"] for group in optim.build(model, config).param_groups for p in group["params"]}
    assert {name: by_weight[id(p)] / config.lr for name, p in model.named_parameters()} == pytest.approx(found)


@pytest.mark.parametrize("reparametrization", ["spectral_norm", "weight_norm"])
def test_muparam_multiplies_the_lr_of_the_matrices_of_reparametrized_layers_alike(tiny, reparametrization):
    config = replace(tiny, parametrization="mup_simple", base_width=48)
    plain = optim.lr_multipliers(models.build(config, V), config)
    config = replace(config, reparametrization=reparametrization)
    model = models.build(config, V)
    found, sizes = optim.lr_multipliers(model, config), dict(model.named_parameters())
    for name, multiplier in plain.items():
        path = name.rpartition(".")[0]
        originals = {other: m for other, m in found.items() if other.startswith(f"{path}.parametrizations.")}
        if not originals:
            assert found[name] == multiplier
        for other, m in originals.items():
            assert m == (multiplier if sizes[other].shape[1] > 1 else 1)


def test_muparam_has_the_standard_lr_at_base_width(tiny):
    for parametrization in ("mup_simple", "mup_intermediate", "mup_full"):
        same = replace(tiny, parametrization=parametrization, base_width=tiny.d_model)
        model = models.build(same, V)
        assert optim.lr_multipliers(model, same) == optim.lr_multipliers(model, tiny)
        assert len(optim.build(model, same).param_groups) == len(optim.build(model, tiny).param_groups) == 1


def run(config: RunConfig, gradient_scale: float) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters before and after all steps of the schedule under random gradients of the given size."""
    model, start = models.build(config, V), models.build(config, V)
    optimizer = optim.build(model, config)
    for step, gradients in enumerate(random_gradients(model, config.steps, gradient_scale)):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optim.set_lr(optimizer, optim.schedule(config, step))
        optimizer.step()
    return list(start.parameters()), list(model.parameters())


def random_gradients(model: nn.Module, steps: int, scale: float) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[scale * torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(steps)]


@pytest.mark.parametrize("changes", [
    {}, {"parametrization": "mup_simple"}, {"eps": 1e-3}, {"beta1": 0.0, "beta2": 0.99}, {"lr": 0.3}])
def test_updates_are_those_of_torch_adamw_at_zero_decay(tiny, changes):
    config = replace(tiny, weight_decay=0.0, **changes)
    _, ours = run(config, gradient_scale=1e-3)
    model = models.build(config, V)
    multipliers = optim.lr_multipliers(model, config)
    groups = [{"params": [p], "lr": config.lr * multipliers[name]} for name, p in model.named_parameters()]
    peer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0,
                             foreach=False, fused=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(peer, lambda step: optim.schedule(config, step))
    for gradients in random_gradients(model, config.steps, 1e-3):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        peer.step()
        schedule.step()
    for (name, expected), got in zip(model.named_parameters(), ours, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lr", [1e-3, 0.3])
@pytest.mark.parametrize("parametrization", ["standard", "mup_simple"])
@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
def test_independent_decay_shrinks_weights_by_the_schedule_alone_whatever_the_lr(tiny, lr, parametrization, optimizer):
    """Sec. 3.2.2: theta <- (1 - s_t lambda) theta where the gradient is zero."""
    config = replace(tiny, lr=lr, parametrization=parametrization, optimizer=optimizer, weight_decay=0.05, lr_final=0.0)
    shrunk = math.prod(1 - optim.schedule(config, step) * 0.05 for step in range(config.steps))
    for before, after in zip(*run(config, gradient_scale=0.0), strict=True):
        torch.testing.assert_close(after, before * shrunk, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", [name for name in CHOICES["optimizer"] if name != "muon"])
def test_sam_steps_by_the_gradient_at_rho_along_the_normalised_gradient(tiny, optimizer):
    """Foret et al., eq. 2 and 3: w <- w - lr step(grad L(w + rho g / |g|)), over all weights at once."""
    config = replace(tiny, optimizer=optimizer, parametrization="mup_simple", base_width=32, weight_decay=0.01)
    rho, targets = 0.3, random_gradients(models.build(config, V), config.steps, 1.0)
    loss = lambda weights, step: sum((w - t).pow(4).sum() for w, t in zip(weights, targets[step], strict=True))  # noqa: E731
    model, peer = models.build(config, V), models.build(config, V)
    ours, plain = optim.build(model, replace(config, sam_rho=rho)), optim.build(peer, config)
    for step in range(config.steps):
        for optimizer in (ours, plain):
            optim.set_lr(optimizer, optim.schedule(config, step))
            optimizer.zero_grad()
        loss(model.parameters(), step).backward()
        ours.step(lambda step=step: loss(model.parameters(), step).backward())
        weights = list(peer.parameters())
        gradients = torch.autograd.grad(loss(weights, step), weights)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        moved = [(w + rho * g / norm).detach().requires_grad_() for w, g in zip(weights, gradients, strict=True)]
        for weight, gradient in zip(weights, torch.autograd.grad(loss(moved, step), moved), strict=True):
            weight.grad = gradient
        plain.step()
        for got, expected in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_sam_moves_along_the_schedule_and_keeps_each_peak(tiny):
    config = replace(tiny, sam_rho=0.1, parametrization="mup_simple", base_width=64, lr=0.1)
    optimizer = optim.build(models.build(config, V), config)
    for factor in (0.5, 1.0):
        optim.set_lr(optimizer, factor)
        lrs = sorted(group["lr"] for group in optimizer.base_optimizer.param_groups)
        assert lrs == pytest.approx([0.1 * factor, 0.4 * factor])


def lion(theta: torch.Tensor, gradients: list[torch.Tensor], lrs: list[float], decay: float,
         config: RunConfig) -> torch.Tensor:
    """Chen et al. 2023, Algorithm 2: the sign of a mean of momentum and gradient."""
    m = torch.zeros_like(theta)
    for g, lr in zip(gradients, lrs, strict=True):
        direction = (config.beta1 * m + (1 - config.beta1) * g).sign()
        theta = theta - lr * (direction + decay * theta)
        m = config.beta2 * m + (1 - config.beta2) * g
    return theta


def lamb(theta: torch.Tensor, gradients: list[torch.Tensor], lrs: list[float], decay: float,
         config: RunConfig) -> torch.Tensor:
    """You et al. 2020, Algorithm 2, without bias correction and with the norm of the weights capped at 10; the decay
    stands outside the trust ratio."""
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for g, lr in zip(gradients, lrs, strict=True):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        theta = theta - lr * decay * theta
        direction = m / (v.sqrt() + config.eps)
        theta = theta - lr * min(float(theta.norm()), 10.0) / float(direction.norm()) * direction
    return theta


@pytest.mark.parametrize("written_out", [lion, lamb])
@pytest.mark.parametrize("decay", CHOICES["decay"])
@pytest.mark.parametrize("parametrization", ["standard", "mup_simple"])
def test_lion_and_lamb_are_their_papers_with_decay_beside_the_step(tiny, written_out, decay, parametrization):
    config = replace(tiny, optimizer=written_out.__name__, lr=0.05, weight_decay=0.02, decay=decay, base_width=64,
                     parametrization=parametrization)
    model = models.build(config, V)
    multipliers, gradients = optim.lr_multipliers(model, config), random_gradients(model, config.steps, 1e-3)
    for i, (name, before, after) in enumerate(zip(multipliers, *run(config, gradient_scale=1e-3), strict=True)):
        peak = config.lr * multipliers[name]
        lrs = [peak * optim.schedule(config, step) for step in range(config.steps)]
        coefficient = config.weight_decay / {"independent": peak, "pytorch": 1, "scaled": multipliers[name]}[decay]
        expected = written_out(before.detach(), [step[i] for step in gradients], lrs, coefficient, config)
        torch.testing.assert_close(after.detach(), expected, rtol=1e-4, atol=1e-6)


def test_muparam_leaves_the_lr_of_an_images_patches_alone(tiny):
    """Their fan-in, the pixels of a patch, does not grow with the width."""
    config = replace(tiny, data="digits", seq_len=64, positions="learned", parametrization="mup_simple", base_width=64)
    found = optim.lr_multipliers(models.build(config, 10), config)
    assert found["embed.weight"] == found["positions.weight"] == 1 and found["head.weight"] == 64 / 16


def test_independent_decay_adds_to_the_adam_step(tiny):
    """One step from rest at full LR: theta - lr sign(g) - lambda theta, for gradients far above eps."""
    config = replace(tiny, lr=0.3, weight_decay=0.05, steps=1, warmup_steps=0)
    gradients = random_gradients(models.build(config, V), 1, 1.0)[0]
    for before, after, gradient in zip(*run(config, gradient_scale=1.0), gradients, strict=True):
        torch.testing.assert_close(after, before - 0.3 * gradient.sign() - 0.05 * before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lr", [1e-3, 0.3])
@pytest.mark.parametrize("parametrization", ["standard", "mup_simple"])
@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
@pytest.mark.parametrize("decay", ["pytorch", "scaled"])
def test_coupled_decay_shrinks_weights_by_the_layers_lr_and_scaled_decay_by_the_models(tiny, lr, parametrization,
                                                                                       optimizer, decay):
    config = replace(tiny, lr=lr, parametrization=parametrization, optimizer=optimizer, weight_decay=0.1,
                     decay=decay, base_width=64)
    model = models.build(config, V)
    multipliers = optim.lr_multipliers(model, config)
    for name, before, after in zip(multipliers, *run(config, gradient_scale=0.0), strict=True):
        rate = lr * (multipliers[name] if decay == "pytorch" else 1) * 0.1
        shrunk = math.prod(1 - optim.schedule(config, step) * rate for step in range(config.steps))
        torch.testing.assert_close(after, before * shrunk, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("qk_lr", CHOICES["qk_lr"])
@pytest.mark.parametrize("parametrization", ["standard", "mup_simple"])
def test_muon_is_torchs_on_each_hidden_matrix_with_queries_keys_and_values_apart(tiny, parametrization, qk_lr):
    """The others, and what is not a matrix of a block, move as under AdamW; norms do not, at first, change an LR."""
    config = replace(tiny, optimizer="muon", parametrization=parametrization, base_width=64, weight_decay=0.02, lr=0.01,
                     qk_lr=qk_lr, steps=1, warmup_steps=0)
    model, (before, after) = models.build(config, V), run(config, gradient_scale=1e-3)
    multipliers, gradients = optim.lr_multipliers(model, config), random_gradients(model, 1, 1e-3)[0]
    _, adamw = run(replace(config, optimizer="adamw", qk_lr="own"), gradient_scale=1e-3)
    assert sum(name.startswith("blocks.") for name in multipliers) > 8
    for (name, multiplier), start, got, gradient, other in zip(multipliers.items(), before, after, gradients, adamw,
                                                               strict=True):
        if not name.startswith("blocks.") or got.ndim < 2:
            torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-7)
            continue
        parts = (tensor.detach().chunk(3 if ".qkv." in name else 1) for tensor in (start, got, gradient))
        for rows, moved, slope in zip(*parts, strict=True):
            alone = nn.Parameter(rows.clone())
            alone.grad = slope
            peak = 0.01 * multiplier
            torch.optim.Muon([alone], peak, 0.02 / peak, adjust_lr_fn="match_rms_adamw").step()
            torch.testing.assert_close(moved, alone.detach(), rtol=1e-5, atol=1e-6)
            step = (moved - rows * (1 - 0.02)) / peak
            assert 0.12 < float(step.square().mean().sqrt()) < 0.28  # AdamW's is about 0.2 (Moonlight, Sec. 2.2)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("decay", CHOICES["decay"])
def test_the_learning_rates_of_queries_and_keys_fall_as_the_other_ones_norm_grows(tiny, optimizer, decay):
    """W_K three times as large makes W_Q's step a third; independent and scaled decay do not change."""
    config = replace(tiny, qk_lr="other_norm", optimizer=optimizer, decay=decay, weight_decay=0.02, warmup_steps=0)
    d, moved = config.d_model, {}
    for qk_lr, factor in (("own", 3.0), ("other_norm", 3.0), ("other_norm", 1.0)):
        model = models.build(config, V)
        optimizer = optim.build(model, replace(config, qk_lr=qk_lr))
        gradients = random_gradients(model, 1, 1e-3)[0]
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        weight = model.blocks[1].attention.qkv.weight
        with torch.no_grad():
            weight[d:2 * d] *= factor
        before = weight.detach().clone()
        optimizer.step()
        kept = 1 - {"independent": 0.02, "pytorch": 0, "scaled": 0.02 * config.lr}[decay]
        moved[qk_lr, factor] = [(after - kept * start).detach() for start, after in zip(
            before.chunk(3), weight.chunk(3), strict=True)]
    for part, scale in enumerate((3, 1, 1)):  # the norms of W_Q and W_V have not changed
        plain, scaled = moved["own", 3.0][part], moved["other_norm", 3.0][part]
        torch.testing.assert_close(scaled, plain / scale, rtol=1e-3, atol=1e-6)
    if optimizer != "muon":
        torch.testing.assert_close(moved["own", 3.0][0], moved["other_norm", 1.0][0], rtol=1e-3, atol=1e-6)


def test_what_trains_apart_is_moved_along_the_schedule_and_forgets_its_gradients(tiny):
    config = replace(tiny, optimizer="muon", qk_lr="other_norm", lr=0.1)
    model = models.build(config, V)
    optimizer = optim.build(model, config)
    optim.set_lr(optimizer, 0.5)
    assert len(optimizer.param_groups) == 2 * tiny.n_layers + 2
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.zero_grad()
    assert {parameter.grad for parameter in model.parameters()} == {None}
