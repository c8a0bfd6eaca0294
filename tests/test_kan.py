"""Kolmogorov-Arnold layers against scipy's B-splines and pykan's layers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import digest, step_flops
from scipy.interpolate import BSpline

from stability_lib import data, models
from stability_lib.config import RunConfig, replace
from stability_lib.kan import KAN, NOISE, KANLayer, splines
from stability_lib.train import SPECTRA, autocast, train_run

GRIDS = [(grid, order) for grid in (1, 4, 5, 8) for order in (1, 2, 3, 4, 5)]


@pytest.fixture
def kan(tiny) -> RunConfig:
    return replace(tiny, mlp="kan", mlp_ratio=2)


def knots(grid: int, order: int) -> np.ndarray:
    return -1 + 2 / grid * np.arange(-order, grid + order + 1)


def layer(inputs: int, outputs: int, grid: int = 4, order: int = 3) -> KANLayer:
    made = KANLayer(inputs, outputs, grid, order).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_()
    return made


# splines

@pytest.mark.parametrize("grid, order", GRIDS)
def test_splines_are_scipys(grid, order):
    """Wherever they do not vanish and beyond, at the knots too, each spline on its own knots, 0 elsewhere."""
    t = knots(grid, order)
    x = np.concatenate([np.random.default_rng(0).uniform(t[0] - 0.5, t[-1] + 0.5, 400), [-1, 0, 1]])
    expected = [np.nan_to_num(BSpline.basis_element(t[i: i + order + 2], extrapolate=False)(x))
                for i in range(grid + order)]
    found = splines(torch.tensor(x)[:, None], grid, order)
    assert found.shape == (len(x), grid + order, 1) and found.dtype == torch.float64
    np.testing.assert_allclose(found[..., 0].T, expected, atol=1e-12, rtol=0)
    within = x[(x >= -1) & (x < 1)]
    np.testing.assert_allclose(splines(torch.tensor(within)[:, None], grid, order)[..., 0],
                               BSpline.design_matrix(within, t, order).toarray(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("grid, order", GRIDS)
def test_splines_sum_to_one_on_the_grid_and_are_zero_beyond_their_reach(grid, order):
    at = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    torch.testing.assert_close(splines(at, grid, order).sum(-2), torch.ones_like(at), atol=1e-12, rtol=0)
    reach = knots(grid, order)[-1]
    beyond = torch.tensor([[reach + 1e-9], [-reach - 1e-9], [50.0], [-1e30], [math.inf], [-math.inf]])
    beyond = beyond.double().requires_grad_()
    values = splines(beyond, grid, order)
    gradient, = torch.autograd.grad(values.sum(), beyond)
    assert not values.any() and not gradient.any()
    assert splines(torch.tensor([[math.nan]]), grid, order).isnan().any()


def test_splines_in_fp32_and_of_bf16_numbers_are_as_exact_as_fp32():
    x = torch.randn(500, 3)
    exact = splines(x.double(), 8, 3)
    torch.testing.assert_close(splines(x, 8, 3).double(), exact, atol=2e-6, rtol=0)
    half = x.bfloat16()
    assert splines(half, 8, 3).dtype == torch.float32
    torch.testing.assert_close(splines(half, 8, 3), splines(half.float(), 8, 3), atol=0, rtol=0)


# a layer

def test_a_layer_is_a_sum_of_scipys_splines_and_the_base_function_over_edges():
    made, x = layer(3, 2, 5, 3), torch.randn(50, 3, dtype=torch.float64)
    expected = np.zeros((50, 2))
    for o in range(2):
        for i in range(3):
            coefficients = made.spline[o, i::3].detach().numpy()
            inside = x[:, i].clamp(-1 - 3 * 0.4, 1 + 3 * 0.4).numpy()
            # three more knots and zero coefficients a side: scipy's is a full basis between the inner ones alone
            full = BSpline(knots(5, 6)[0] + 0.4 * np.arange(18), np.pad(coefficients, 3), 3)
            expected[:, o] += full(inside) + made.base[o, i].item() * F.silu(x[:, i]).numpy()
    np.testing.assert_allclose(made(x).detach(), expected, atol=1e-12)


def test_beyond_the_grid_a_layer_is_its_base_function():
    made, x = layer(3, 2), 2.5 + torch.rand(10, 3, dtype=torch.float64)
    torch.testing.assert_close(made(x), F.linear(F.silu(x), made.base), atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grid, order", [(4, 3), (8, 3), (5, 2)])
def test_a_layer_is_pykans(grid, order):
    """The KAN paper's own package; its scales of splines go into the coefficients."""
    pykan = pytest.importorskip("kan.KANLayer", reason="pip install --no-deps pykan")
    theirs = pykan.KANLayer(in_dim=6, out_dim=4, num=grid, k=order, noise_scale=2.0).double()
    ours = KANLayer(6, 4, grid, order).double()
    with torch.no_grad():
        ours.base.copy_(theirs.scale_base.T)
        theirs.grid.copy_(torch.tensor(knots(grid, order)))  # it was rounded to fp32
        scaled_IxOxS = theirs.coef * theirs.scale_sp[..., None]
        ours.spline.copy_(scaled_IxOxS.permute(1, 2, 0).flatten(1))
    x = 1.5 * torch.randn(200, 6, dtype=torch.float64)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(mine), theirs(yours)[0], atol=1e-12, rtol=1e-12)
    ours(mine).square().sum().backward()
    theirs(yours)[0].square().sum().backward()
    torch.testing.assert_close(mine.grad, yours.grad, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(ours.base.grad, theirs.scale_base.grad.T, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_gradients_and_their_gradients_are_those_of_finite_differences(order):
    made = layer(3, 2, 4, order)
    x = (torch.rand(4, 3, dtype=torch.float64) * 5 - 2.5).requires_grad_()
    weights = [*made.parameters()]

    def call(x, base, spline):
        return torch.func.functional_call(made, {"base": base, "spline": spline}, (x,))
    assert torch.autograd.gradcheck(call, (x, *weights))
    assert torch.autograd.gradgradcheck(call, (x, *weights))


def test_third_derivatives_are_scipys():
    """Under a penalty on a gradient's gradient autograd differentiates the derivative's formula again."""
    t, x = knots(4, 4), torch.linspace(-1.9, 1.9, 40, dtype=torch.float64, requires_grad=True)
    derivative = splines(x[:, None], 4, 4)[:, 3].sum()
    for _ in range(3):
        derivative, = torch.autograd.grad(derivative.sum(), x, create_graph=True)
    expected = BSpline.basis_element(t[3:9], extrapolate=False).derivative(3)(x.detach().numpy())
    np.testing.assert_allclose(derivative.detach(), np.nan_to_num(expected), atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradients_at_knots_are_finite(order):
    x = torch.tensor(knots(4, order))[:, None].requires_grad_()
    loss = splines(x, 4, order).square().sum()
    first, = torch.autograd.grad(loss, x, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all() and second.isfinite().all()


def test_a_layer_runs_under_vmap_and_forward_over_reverse_transforms():
    made, x = layer(3, 2), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x))
    jacobian = torch.func.vmap(torch.func.jacrev(made))(x)
    torch.testing.assert_close(jacobian[:, 1], torch.autograd.functional.jacobian(lambda x: made(x)[:, 1].sum(), x))


# in a model

@pytest.mark.parametrize("changes", [{}, {"mlp_ratio": 1}, {"grid_size": 8, "spline_order": 2}, {"biases": True}])
def test_sizes_are_counted(kan, changes):
    config = replace(kan, **changes)
    model = models.build(config, 40)
    named = model.named_weights()
    assert [name for name in named if name.startswith("block1.mlp")] == [
        f"block1.mlp_{part}.{kind}" for part in ("up", "down") for kind in ("base", "spline")]
    outside = named["embed"].numel() + named["head"].numel()
    assert sum(w.numel() for w in named.values()) == outside + models.n_params(config)
    assert models.n_params(config) == sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)


@pytest.mark.parametrize("changes", [{"grid_size": 10**12}, {"grid_size": 2**62}, {"mlp_ratio": 2**62}], ids=str)
def test_a_kan_beyond_the_memory_is_refused_with_what_to_lower(kan, changes):
    (name, value), = changes.items()
    with pytest.raises(ValueError, match=f"needs at least .* GB and cpu has .*: lower .*{name} {value}"):
        train_run(replace(kan, **changes))
    with pytest.raises(ValueError, match="spline_order must be at most 20"):
        replace(kan, spline_order=21)


def test_the_splines_of_the_highest_order_are_finite_in_fp32():
    at = torch.linspace(-1, 1, 50)[:, None]
    torch.testing.assert_close(splines(at, 4, 20).sum(-2), torch.ones_like(at), atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", ["gpt2", "fan_in", "pytorch", "xavier"])
def test_a_kan_starts_with_base_weights_as_the_config_says_and_small_splines(init):
    config = RunConfig(mlp="kan", init=init, n_layers=1)
    mlp = models.build(config, 40).blocks[0].mlp
    gelu = models.build(replace(config, mlp="gelu"), 40).blocks[0].mlp
    for part, width in (("up", 64), ("down", 256)):
        base, spline, weight = (w.detach() for w in (*getattr(mlp, part).parameters(), getattr(gelu, part).weight))
        assert float(base.std()) == pytest.approx(float(weight.std()), rel=0.03)
        assert float(spline.std()) == pytest.approx(NOISE / math.sqrt(width), rel=1e-5)
        assert abs(float(spline.mean())) < 0.02 * float(spline.std())
    assert digest(*models.build(config, 40).parameters()) == digest(*models.build(config, 40).parameters())
    assert digest(*models.build(replace(config, seed=1), 40).blocks[0].mlp.parameters()) != digest(*mlp.parameters())


def test_on_the_meta_device_and_in_bf16(kan):
    with torch.device("meta"):
        assert KAN(kan)(torch.empty(2, 3, kan.d_model)).shape == (2, 3, kan.d_model)
    model = models.build(replace(kan, precision="bf16"), 40)
    x = torch.randint(40, (4, kan.seq_len))
    exact = model(x)
    with autocast(replace(kan, precision="bf16"), "cpu"):
        rounded = model(x)
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.05)
    rounded.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("changes", [
    {}, {"shaping": "kss", "shaping_every": 2, "probe_every": 2, "spectra_every": 3}, {"precision": "bf16"},
    {"gradient_penalty": 0.1, "sam_rho": 0.05}, {"data": "recall", "vocab_size": 32, "norm": "no_norm"},
    {"data": "digits", "seq_len": 64}], ids=str)
def test_runs_are_the_same_again(kan, changes):
    config = replace(kan, **changes)
    first, again = train_run(config), train_run(config)
    assert first.curves == again.curves and first.loss_final == again.loss_final
    assert first.status == "ok" and math.isfinite(first.loss_final)
    assert first.curves["loss"] != train_run(replace(config, mlp="gelu")).curves["loss"]
    if config.spectra_every:
        assert all(math.isfinite(value) for name in SPECTRA if name != "kreiss_scaled"
                   for value in first.curves[name])
        assert {"parameter_rms/block1.mlp_up.base", "gradient_rms/block0.mlp_down.spline"} <= {*first.curves}


def test_training_flops_are_those_of_the_matrix_products(kan):
    config = replace(kan, attention="squared_relu")
    one_step = replace(config, steps=1, warmup_steps=0)
    assert step_flops(config) == models.training_flops(one_step, data.vocab_size(config))
