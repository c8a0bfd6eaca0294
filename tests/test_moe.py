"""The mixture of experts against transformers' Mixtral and against plain MLPs; its loss, its probes, its training."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import step_flops
from torch.utils.flop_counter import FlopCounterMode

from stability_lib import data, koopman, models, moe, probes, train
from stability_lib.blocks import MLP
from stability_lib.config import RunConfig, replace
from stability_lib.moe import MoE
from stability_lib.train import train_run

V = 20


@pytest.fixture
def mixed(tiny) -> RunConfig:
    return replace(tiny, mlp="moe", experts=4, top_k=2)


def made(config: RunConfig, dtype=torch.float32) -> MoE:
    torch.manual_seed(config.seed)
    return MoE(config).to(dtype)


def mlps(block: MoE, config: RunConfig) -> list[MLP]:
    """Our MLP with the weights of each expert."""
    found = [MLP(config).to(block.up.dtype) for _ in range(config.experts)]
    for i, mlp in enumerate(found):
        for name in ("up", "down"):
            linear, bias = getattr(mlp, name), getattr(block, f"{name}_bias")
            linear.weight.data = getattr(block, name).detach()[i].clone()
            if bias is not None:
                linear.bias.data = bias.detach().chunk(config.experts)[i].clone()
    return found


def steer(block: MoE, *experts: int, by: float = 50.0) -> None:
    """All tokens whose first feature is positive go to these experts, in this order."""
    with torch.no_grad():
        block.router.weight.zero_()
        for i, expert in enumerate(experts):
            block.router.weight[expert, 0] = by * (len(experts) - i)


def steered_input(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 0] = 1
    return x


# against transformers

def mixtral(block: MoE, config: RunConfig):
    """Mixtral's block with the weights of ours. Its experts are act(g x) * (u x): with a further feature that is always
    1, which u picks, they are ours."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    d, hidden = config.d_model, config.mlp_ratio * config.d_model
    theirs = MixtralSparseMoeBlock(MixtralConfig(
        hidden_size=d + 1, intermediate_size=hidden, num_local_experts=config.experts, hidden_act="gelu",
        num_experts_per_tok=config.top_k))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.zero_()
        theirs.gate.weight[:, :d] = block.router.weight
        theirs.experts.gate_up_proj[:, :hidden, :d] = block.up
        theirs.experts.gate_up_proj[:, hidden:, d] = 1
        theirs.experts.down_proj[:, :d] = block.down
    return theirs


@pytest.mark.parametrize("experts, top_k", [(8, 2), (8, 1), (5, 3), (3, 3)])
def test_outputs_and_gradients_are_those_of_mixtral(tiny, experts, top_k):
    config = replace(tiny, mlp="moe", experts=experts, top_k=top_k)
    block = made(config)
    theirs = mixtral(block, config)
    x, direction = torch.randn(3, 7, config.d_model, requires_grad=True), torch.randn(3, 7, config.d_model)
    x_too = x.detach().clone().requires_grad_()
    ours = block(x)
    reference = theirs(F.pad(x_too, (0, 1), value=1.0))
    torch.testing.assert_close(ours, reference[..., :-1], atol=1e-5, rtol=1e-5)
    assert reference[..., -1].abs().max() == 0
    (ours * direction).sum().backward()
    (reference[..., :-1] * direction).sum().backward()
    d, hidden = config.d_model, config.mlp_ratio * config.d_model
    for mine, expected in ((x.grad, x_too.grad), (block.router.weight.grad, theirs.gate.weight.grad[:, :d]),
                           (block.up.grad, theirs.experts.gate_up_proj.grad[:, :hidden, :d]),
                           (block.down.grad, theirs.experts.down_proj.grad[:, :d])):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_load_balance_loss_is_that_of_transformers_by_top_k(mixed, top_k):
    """There f sums to top_k."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    block, x = made(replace(mixed, top_k=top_k)), torch.randn(2, 9, mixed.d_model)
    with moe.watch_balance(block) as found:
        block(x)
    logits = F.linear(x.flatten(0, 1), block.router.weight)
    expected = load_balancing_loss_func((logits,), mixed.experts, top_k) / top_k
    torch.testing.assert_close(found[block.router], expected)
    (ours,) = torch.autograd.grad(found[block.router], block.router.weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, block.router.weight)[0])


# against plain MLPs

@pytest.mark.parametrize("biases", [False, True])
def test_all_experts_chosen_are_a_softmax_mixture_of_mlps(mixed, biases):
    config = replace(mixed, top_k=4, biases=biases, init="pytorch")
    block, x = made(config), torch.randn(2, 5, config.d_model)
    shares = F.linear(x, block.router.weight).softmax(-1)
    expected = sum(shares[..., i:i + 1] * mlp(x) for i, mlp in enumerate(mlps(block, config)))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("biases", [False, True])
def test_one_expert_is_the_plain_mlp(mixed, biases):
    config = replace(mixed, experts=1, top_k=1, biases=biases, init="pytorch")
    block, x = made(config), torch.randn(2, 5, config.d_model)
    torch.testing.assert_close(block(x), mlps(block, config)[0](x))


def test_a_token_goes_through_its_experts_alone(mixed):
    """Token by token: the chosen two, by their shares of the softmax over both."""
    block, x = made(mixed), torch.randn(1, 6, mixed.d_model)
    experts = mlps(block, mixed)
    for token, out in zip(x[0], block(x)[0], strict=True):
        logits, chosen = F.linear(token, block.router.weight).topk(2)
        expected = sum(share * experts[i](token) for share, i in zip(logits.softmax(0), chosen, strict=True))
        torch.testing.assert_close(out, expected)


# initialisation

@pytest.mark.parametrize("init", ["fan_in", "gpt2", "xavier", "pytorch"])
def test_experts_are_drawn_as_linear_layers_are_and_each_anew(tiny, init):
    config = replace(tiny, d_model=64, mlp="moe", experts=3, init=init, biases=True)
    block, plain = models.build(config, V).blocks[1].mlp, models.build(replace(config, mlp="gelu"), V).blocks[1].mlp
    for name in ("up", "down"):
        weight, bias, linear = getattr(block, name), getattr(block, f"{name}_bias"), getattr(plain, name)
        for expert in weight:
            assert expert.shape == linear.weight.shape
            assert float(expert.detach().std()) == pytest.approx(float(linear.weight.detach().std()), rel=0.05)
        assert not torch.equal(weight[0], weight[1])
        assert bool(bias.any()) == bool(linear.bias.any()) == (init == "pytorch")
    assert block.router.bias is None and float(block.router.weight.detach().std()) > 0.01


def test_the_same_config_gives_the_same_weights_whatever_the_global_random_numbers(mixed):
    first = models.build(mixed, V).state_dict()
    torch.rand(3)
    assert all(torch.equal(weight, first[name]) for name, weight in models.build(mixed, V).state_dict().items())


# few tokens, rounding, second derivatives, shapes alone

@pytest.mark.parametrize("biases", [False, True])
def test_experts_without_a_token_get_a_gradient_of_zero(mixed, biases):
    block = made(replace(mixed, biases=biases))
    steer(block, 2, 0)
    x = steered_input(2, 5, mixed.d_model).requires_grad_()
    out = block(x)
    out.square().sum().backward()
    torch.testing.assert_close(out.detach(), mlps(block, replace(mixed, biases=biases))[2](x).detach())
    for name, parameter in block.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name != "router.weight":
            moved = [bool(part.any()) for part in parameter.grad.chunk(mixed.experts)]
            assert moved[2] and not moved[1] and not moved[3], name
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (2, 3, 4)])
def test_one_token_none_and_more_dimensions(mixed, shape):
    block, x = made(mixed), torch.randn(*shape, mixed.d_model)
    assert block(x).shape == x.shape
    block(x).sum().backward()
    assert block.up.grad.isfinite().all()


def test_a_saturated_router_still_tells_its_second_choice(mixed):
    """Where all but one of its probabilities are zero in fp32."""
    block = made(mixed)
    steer(block, 2, 3, by=500.0)
    p, weights, chosen = block.router(steered_input(5, mixed.d_model))
    assert p.count_nonzero() == 5 and torch.equal(chosen, torch.tensor([[2, 3]] * 5))
    assert torch.equal(weights, torch.tensor([[1.0, 0.0]] * 5))


def test_under_autocast_the_router_stays_exact_and_the_experts_round(mixed):
    block, x = made(mixed), torch.randn(4, 16, mixed.d_model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, (p, _, chosen) = block(x), block.router(x.flatten(0, 1))
    exact = block(x)
    p_too, _, chosen_too = block.router(x.flatten(0, 1))
    assert torch.equal(p, p_too) and torch.equal(chosen, chosen_too)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.03)
    rounded.float().square().sum().backward()
    assert block.up.grad.dtype == torch.float32 and block.up.grad.isfinite().all()


def test_first_and_second_derivatives_are_those_of_finite_differences(tiny):
    config = replace(tiny, d_model=4, n_heads=1, mlp_ratio=1, mlp="moe", experts=3, top_k=2, biases=True)
    block = made(config, torch.float64)

    def out(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))
    names, weights = zip(*((name, p.detach().requires_grad_()) for name, p in block.named_parameters()), strict=True)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(out, (x, *weights))
    assert torch.autograd.gradgradcheck(out, (x, *weights))


def test_a_pass_on_meta_has_the_shapes_and_the_flops(mixed):
    with torch.device("meta"):
        block, x = MoE(mixed), torch.zeros(3, 5, mixed.d_model)
        with FlopCounterMode(display=False) as counted, moe.watch_balance(block) as found:
            assert block(x).shape == x.shape
    assert found[block.router].shape == ()
    d = mixed.d_model
    assert counted.get_total_flops() == 2 * 15 * (mixed.experts * d + mixed.top_k * 2 * mixed.mlp_ratio * d * d)


# the model

@pytest.mark.parametrize("biases", [False, True])
def test_weight_matrices_are_named_and_counted_and_biases_are_not(mixed, biases):
    config = replace(mixed, biases=biases)
    named, d = models.build(config, V).named_weights(), mixed.d_model
    assert [name for name in named if name.startswith("block0.mlp")] == [
        "block0.mlp_up", "block0.mlp_down", "block0.mlp_router"]
    assert named["block1.mlp_up"].shape == (4, 4 * d, d) and named["block1.mlp_down"].shape == (4, d, 4 * d)
    assert models.n_params(config) == sum(w.numel() for name, w in named.items() if name.startswith("block"))
    assert models.n_params(config) == 2 * (4 * d * d + 4 * 8 * d * d + 4 * d)


@pytest.mark.parametrize("changes", [{}, {"top_k": 4}, {"experts": 3, "top_k": 1}, {"sam_rho": 0.1}], ids=str)
def test_training_flops_are_those_of_the_matrix_products(mixed, changes):
    """As PyTorch counts them, but for the load-balance loss's E products."""
    config = replace(mixed, attention="squared_relu", load_balance=0.0, **changes)
    one_step = replace(config, steps=1, warmup_steps=0)
    assert step_flops(config) == models.training_flops(one_step, data.vocab_size(config))


@pytest.mark.parametrize("changes", [{}, {"top_k": 1}, {"experts": 16, "top_k": 4}], ids=str)
def test_the_memory_that_is_asked_for_is_no_more_than_what_a_step_keeps(mixed, changes):
    config = replace(mixed, batch_size=64, **changes)
    model = models.build(config, data.vocab_size(config))
    batch, saved = data.sample(config, torch.Generator().manual_seed(0)), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = train.losses(model, batch, config, 0.1, "cpu", False)[1]
    weights = sum(p.numel() for p in model.parameters())
    most = sum(saved.values()) + 4 * 3 * weights + 8 * (batch.numel() + data.validation(config).numel())
    assert loss.requires_grad and 0.2 * most < models.least_memory(config) <= most


# the loss

def even_router(block: MoE) -> None:
    """Expert e where feature e is 50, and the next one."""
    with torch.no_grad():
        block.router.weight.zero_()
        for expert in range(len(block.up)):
            block.router.weight[expert, expert] = 2.0
            block.router.weight[expert, expert - 1] = 1.0


def test_the_load_balance_loss_is_one_where_even_and_experts_by_top_k_at_collapse(mixed):
    block = made(mixed)
    with moe.watch_balance(block) as found:
        even_router(block)
        block(50 * torch.eye(4, mixed.d_model).repeat(3, 1).unsqueeze(0))
        assert float(found[block.router].detach()) == pytest.approx(1.0)
        steer(block, 2, 0, by=0.0)
        with torch.no_grad():
            block.router.weight[[0, 2], 0] = 50.0
        block(steered_input(2, 5, mixed.d_model))
    assert float(found[block.router].detach()) == pytest.approx(mixed.experts / mixed.top_k)


def test_the_objective_has_the_mean_over_layers_and_the_task_loss_nothing(mixed):
    config = replace(mixed, load_balance=0.3)
    model, batch = models.build(config, V), torch.randint(V, (4, 13))
    loss, objective, _ = train.losses(model, batch, config, 0.0, "cpu", False)
    with moe.watch_balance(model) as found:
        model(batch[:, :-1])
    assert len(found) == config.n_layers
    expected = loss + 0.3 * sum(found.values()) / config.n_layers
    torch.testing.assert_close(objective, expected)
    plain, same, _ = train.losses(model, batch, replace(config, load_balance=0.0), 0.0, "cpu", False)
    assert torch.equal(plain, loss) and torch.equal(same, loss)


def test_the_loss_leaves_no_hook_and_no_graph(mixed):
    model, batch = models.build(mixed, V), torch.randint(V, (4, 13))
    loss, objective, _ = train.losses(model, batch, mixed, 0.0, "cpu", True)
    kept = weakref.ref(objective)
    assert not any(module._forward_hooks for module in model.modules())
    del loss, objective
    gc.collect()
    assert kept() is None
    with pytest.raises(IndexError), moe.watch_balance(model):
        model(torch.full((1, 3), V))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("changes", [{"load_balance": 0.0}, {"load_balance": 1.0}], ids=str)
def test_the_weight_of_the_loss_changes_neither_the_first_reported_loss_nor_validation(mixed, changes):
    results = [train_run(config) for config in (mixed, replace(mixed, **changes))]
    assert results[0].loss_init == results[1].loss_init
    first, other = (result.curves["loss"] for result in results)
    assert first[0] == other[0] and first != other


def test_the_loss_spreads_tokens_that_all_go_to_the_same_experts(mixed):
    block, x = made(replace(mixed, experts=8)), steered_input(4, 16, mixed.d_model)
    steer(block, 2, 0, by=1.0)
    stepper, loads = torch.optim.Adam([block.router.weight], lr=0.03), []
    for _ in range(100):
        with moe.watch_balance(block) as found:
            block(x)
        loads.append(float(block.router.shares(block.router(x.flatten(0, 1))[2]).max()))
        stepper.zero_grad()
        found[block.router].backward()
        stepper.step()
    assert loads[0] == 0.5 and loads[-1] < 0.25 and float(found[block.router].detach()) < 1.1


def test_the_loss_is_not_rounded_under_autocast(mixed):
    block, x, found = made(mixed), torch.randn(4, 16, mixed.d_model), []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on), moe.watch_balance(block) as seen:
            block(x)
        found += seen.values()
    assert found[1].dtype == torch.float32 and torch.equal(*found)


# the probes

def test_readings_of_a_collapsed_and_of_an_even_router(mixed):
    model = models.build(replace(mixed, norm="no_norm"), V)
    with torch.no_grad():
        model.embed.weight[:, 0] = 1
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.mlp.down.zero_()
    steer(model.blocks[0].mlp, 2, 0)
    even_router(model.blocks[1].mlp)
    with torch.no_grad():
        model.embed.weight[:4, :4] = 50 * torch.eye(4)
        model.embed.weight[:4, 0] = torch.tensor([50.0, 1, 1, 1])
    with probes.watch(model) as readings:
        model(torch.arange(4).repeat(2, 3))
    found = probes.fetch(readings)
    assert found["expert_load_max/block0"] == 0.5 and found["experts_used/block0"] == 0.5
    assert found["router_entropy/block0"] < 1e-6
    assert found["expert_load_max/block1"] == 0.25 and found["experts_used/block1"] == 1.0
    model.blocks[0].mlp.router.weight.data.zero_()
    with probes.watch(model) as readings:
        model(torch.arange(4).repeat(2, 3))
    assert float(readings["router_entropy/block0"]) == pytest.approx(math.log(4))
    assert float(readings["expert_load_max/block0"]) == 0.5  # an undecided router that picks the same two everywhere


def test_a_model_without_experts_has_no_readings_of_a_router(tiny):
    model = models.build(tiny, V)
    with probes.watch(model) as readings:
        model(torch.randint(V, (1, 5)))
    assert readings and not [name for name in readings if "expert" in name or "router" in name]


# training

@pytest.mark.parametrize("changes", [
    {}, {"top_k": 1}, {"experts": 1, "top_k": 1}, {"precision": "bf16"}, {"sam_rho": 0.05},
    {"gradient_penalty": 0.01}, {"shaping": "kss", "shaping_every": 1}, {"shaping": "jacobian", "shaping_every": 2},
    {"spectra_every": 3}, {"norm": "deepnorm", "biases": True}, {"optimizer": "lamb"},
    {"data": "digits", "seq_len": 64}], ids=str)
def test_runs_train_and_repeat_bit_by_bit(mixed, changes):
    config = replace(mixed, probe_every=3, lr=3e-3, **changes)
    first, again = train_run(config), train_run(config)
    assert first.status == "ok" and first.curves == again.curves and first.loss_final == again.loss_final
    for name in ("router_entropy", "expert_load_max", "experts_used"):
        for i in range(config.n_layers):
            values = first.curves[f"{name}/block{i}"]
            assert len(values) == len(first.curves["probe_step"]) and all(map(math.isfinite, values))
            least = {"expert_load_max": 1 / config.experts, "experts_used": config.top_k / config.experts}.get(name, 0)
            most = {"expert_load_max": 1 / config.top_k, "router_entropy": math.log(config.experts)}.get(name, 1)
            assert all(least - 1e-6 <= value <= most + 1e-6 for value in values)
    assert len(first.curves["parameter_rms/block0.mlp_router"]) == len(first.curves["update_rms/block1.mlp_up"])
    if config.shaping == "kss":
        assert any(first.curves["penalty"]) and not first.curves["skipped_layers"][-1]


def test_looking_does_not_change_the_run(mixed):
    looked = train_run(replace(mixed, probe_every=1, spectra_every=2, attention_maps=2))
    assert looked.curves["loss"] == train_run(mixed).curves["loss"]


def test_a_run_that_blows_up_is_a_result(mixed):
    result = train_run(replace(mixed, lr=1e30, warmup_steps=0, clip_norm=None, norm="no_norm", probe_every=1))
    assert result.status == "diverged" and result.stop_step is not None


def test_sam_takes_the_load_balance_loss_at_its_second_point_too(mixed):
    config = replace(mixed, sam_rho=0.5, load_balance=1.0, z_loss=0.0)
    seen = []

    class Seen(train.Single):
        def _losses(self, batch, probe=False):
            loss, objective, readings = super()._losses(batch, probe)
            seen.append((float(loss.detach()), float(objective.detach())))
            return loss, objective, readings

    learner = Seen(config, data.vocab_size(config), "cpu")
    train.take_step(learner, 0, learner.draw())
    (first, objective), (second, objective_too) = seen
    assert second > first and 1 <= objective - first <= 2 and 1 <= objective_too - second <= 2


def test_the_profile_of_an_untrained_mixture_is_one_of_its_blocks(mixed):
    model = models.build(mixed, V)
    found = koopman.profile(model, torch.randint(V, (8, 12))).table()
    assert len(found) == mixed.n_layers and found["near_unit_mass"].between(0, 1).all()


# errors

@pytest.mark.parametrize("changes, message", [
    ({"top_k": 5}, "top_k 5 exceeds the 4 experts: choose at most 4"), ({"top_k": 0}, "top_k must be positive"),
    ({"experts": 0}, "experts must be positive"), ({"load_balance": -1.0}, "load_balance must be zero or more"),
    ({"norm": "subln"}, "norm 'subln' is not worked out for mlp 'moe'"),
    ({"reparametrization": "weight_norm"}, "reparametrization 'weight_norm' is not worked out for mlp 'moe'"),
    ({"parametrization": "mup_full"}, "parametrization 'mup_full' is not worked out for mlp 'moe'")], ids=str)
def test_what_cannot_be_run_is_refused(mixed, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(mixed, **changes)


@pytest.mark.parametrize("changes", [{"experts": 2**62}, {"experts": 10**9, "top_k": 10**9, "biases": True}], ids=str)
def test_a_run_of_too_many_experts_is_refused_before_they_are_made(mixed, changes):
    with pytest.raises(ValueError, match=f"needs at least .* GB .*: lower .*experts {changes['experts']}"):
        train_run(replace(mixed, **changes))
