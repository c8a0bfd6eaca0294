"""The penalty against eq. 14 and formulas, its gradient against finite differences, and its settings."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from test_koopman import by_size
from torch import nn

from stability_lib import koopman
from stability_lib.config import CHOICES
from stability_lib.shaping import KSS, Settings, directions, eigenvalues, spectrum_penalty

PENALTIES = [name for name in CHOICES["shaping"] if name != "none"]
SPECTRAL = ("kss", "unstable", "near_unit")


class Given(nn.Module):
    """A layer whose output states are what they are, whatever comes in."""

    def __init__(self, y: torch.Tensor):
        super().__init__()
        self.y = nn.Parameter(y.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.y


class Linear(nn.Module):
    """x -> x A^T."""

    def __init__(self, a: torch.Tensor):
        super().__init__()
        self.a = nn.Parameter(a.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.T


class Fill(nn.Module):
    """Every output state is the same number."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, self.value).requires_grad_()


def measured(x, y, **settings) -> tuple[float, torch.Tensor | None, torch.Tensor | None, KSS]:
    """The penalty on a layer from states X to Y, its gradients, and what computed it."""
    layer, x = Given(y), x.clone().requires_grad_()
    with KSS(layer, Settings(**{"alpha": 1.0, "every": 1} | settings), layers=[layer]) as kss:
        layer(x)
        penalty = kss.penalty()
    if penalty.requires_grad:
        penalty.backward()
    return float(penalty.detach()), x.grad, layer.y.grad, kss


def states(a: np.ndarray, n: int = 200, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n random states, not centred, and what the linear map `a` makes of them, float64 rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(a))) @ (np.eye(len(a)) + rng.normal(size=a.shape) / len(a)) + 2.0
    return torch.tensor(x), torch.tensor(x @ a.T + noise * rng.normal(size=x.shape) - 1.0)


def with_moduli(*moduli: float) -> torch.Tensor:
    return torch.tensor(moduli, dtype=torch.complex128)


# eq. 14

def equation_14(values: np.ndarray, s: Settings) -> tuple[float, float]:
    """Its two terms as they are printed."""
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    unstable = [sigmoid(s.temperature * (abs(z) - s.tau_u)) * math.log(1 + math.exp(abs(z) - s.tau_u)) ** 2
                for z in values]
    near = [sigmoid(s.temperature * (abs(z) - s.tau_l)) * sigmoid(s.temperature * (s.tau_u - abs(z))) for z in values]
    return sum(unstable), s.beta * (sum(near) / len(values) - s.gamma) ** 2


@pytest.mark.parametrize("changes", [{}, {"beta": 3.0, "gamma": 0.3}, {"temperature": 5.0, "tau_u": 1.2, "tau_l": 0.7}])
def test_the_penalty_is_equation_14_and_the_sum_of_its_terms(changes):
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 2, 32) * np.exp(2j * math.pi * rng.uniform(size=32))
    settings = Settings(**changes)
    found = {name: float(spectrum_penalty(torch.tensor(values), Settings(penalty=name, **changes)))
             for name in SPECTRAL}
    unstable, near_unit = equation_14(values, settings)
    assert found == pytest.approx({"kss": unstable + near_unit, "unstable": unstable, "near_unit": near_unit})


def test_the_mean_over_modes_is_the_sum_over_their_number():
    values = with_moduli(1.5, 1.2, 0.3, 0.0, 2.0)
    total, mean = (float(spectrum_penalty(values, Settings(penalty="unstable", reduction=r))) for r in ("sum", "mean"))
    assert total == pytest.approx(5 * mean)
    both = [float(spectrum_penalty(values, Settings(penalty="near_unit", reduction=r))) for r in ("sum", "mean")]
    assert both[0] == both[1]


def test_penalties_that_are_known():
    settings = Settings()
    assert float(spectrum_penalty(with_moduli(0.0), settings)) == pytest.approx(settings.gamma**2, abs=1e-6)
    at_edge = float(spectrum_penalty(with_moduli(settings.tau_u), Settings(penalty="unstable")))
    assert at_edge == pytest.approx(0.5 * math.log(2) ** 2)
    sharp = Settings(temperature=1e4)  # the soft mass is the mass
    inside = with_moduli(0.95, 1.0, 1.04)
    assert float(spectrum_penalty(inside, sharp)) == pytest.approx((1 - 0.4) ** 2)
    assert float(spectrum_penalty(torch.cat([inside, with_moduli(0.5, 0.1)]), sharp)) == pytest.approx((0.6 - 0.4) ** 2)
    assert float(spectrum_penalty(with_moduli(2.05), Settings(temperature=1e4, beta=0.0))) == pytest.approx(
        math.log(1 + math.e) ** 2)


# eigenvalues

@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_eigenvalues_over_all_directions_are_those_of_the_least_squares_operator(noise):
    x, y = states(np.random.default_rng(1).normal(size=(12, 12)) / 3, noise=noise)
    plain = np.linalg.eigvals(np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0])
    for dmd in CHOICES["shaping_dmd"]:
        found = eigenvalues(x, y, directions(x, Settings(dmd=dmd), torch.Generator().manual_seed(0))).numpy()
        np.testing.assert_allclose(by_size(found), by_size(plain), atol=1e-8)
        np.testing.assert_allclose(by_size(found), by_size(koopman.eigenvalues(x, y)), atol=1e-8)


def test_a_pod_of_states_that_lie_in_its_directions_is_exact():
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(40, 8)))[0]
    small_x, small_y = states(rng.normal(size=(8, 8)) / 2, noise=0.2)
    x, y = (s @ torch.tensor(basis).T for s in (small_x, small_y))
    plain = koopman.eigenvalues(small_x, small_y)
    for rank in (8, 16, 64):  # beyond 8 there are directions that X does not have
        found = eigenvalues(x, y, directions(x, Settings(rank=rank), torch.Generator()))
        np.testing.assert_allclose(by_size(found.numpy()), by_size(plain), atol=1e-8)


@pytest.mark.parametrize("width", [16, 64])
def test_a_stream_that_a_layer_norm_left_without_a_direction_is_not_skipped(width):
    x = nn.functional.layer_norm(torch.randn(400, width), (width,))
    y = nn.functional.layer_norm(x + 0.5 * torch.randn(400, width), (width,))
    basis = directions(x, Settings(), torch.Generator().manual_seed(0))
    assert len(eigenvalues(x, y, basis)) == min(width - 1, 32)


def test_a_random_basis_gives_the_operator_of_the_projected_states():
    x, y = states(np.random.default_rng(3).normal(size=(30, 30)) / 5, noise=0.3)
    q = directions(x, Settings(dmd="random", rank=6), torch.Generator().manual_seed(0))
    a = np.linalg.lstsq((x - x.mean(0)) @ q, (y - y.mean(0)) @ q, rcond=None)[0]
    np.testing.assert_allclose(by_size(eigenvalues(x, y, q).numpy()), by_size(np.linalg.eigvals(a)), atol=1e-8)


def test_a_whitened_basis_gives_the_whitened_operator_within_random_directions():
    x, y = states(np.random.default_rng(4).normal(size=(30, 30)) / 5, noise=0.3)
    basis = directions(x, Settings(dmd="whitened", rank=6, eps=0.0), torch.Generator().manual_seed(0))
    x_NxD, y_NxD = ((s - s.mean(0)).numpy() for s in (x, y))
    values, axes = np.linalg.eigh(np.cov(x_NxD.T))
    root, inverse = (axes * values**power @ axes.T for power in (0.5, -0.5))
    q = root @ basis.numpy()
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-8)
    a = np.linalg.lstsq(x_NxD @ inverse, y_NxD @ inverse, rcond=None)[0]
    found = eigenvalues(x, y, basis).numpy()
    np.testing.assert_allclose(by_size(found), by_size(np.linalg.eigvals(q.T @ a @ q)), atol=1e-8)


def test_eigenvalues_do_not_depend_on_the_scale_of_the_states():
    x, y = states(np.random.default_rng(5).normal(size=(20, 20)) / 4, noise=0.2)
    plain = koopman.eigenvalues(x, y)
    for scale in (1e-12, 1e12):
        basis = directions(x * scale, Settings(), torch.Generator())
        np.testing.assert_allclose(by_size(eigenvalues(x * scale, y * scale, basis).numpy()), by_size(plain), atol=1e-8)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_states_that_do_not_vary_have_no_eigenvalues(constant):
    x = torch.full((50, 40), constant)
    assert eigenvalues(x, torch.randn(50, 40), directions(x, Settings(), torch.Generator())) is None


@pytest.mark.parametrize("dmd", ["pod", "random"])
def test_the_columns_of_a_basis_are_orthonormal(dmd):
    q = directions(torch.randn(100, 50), Settings(dmd=dmd, rank=7), torch.Generator())
    torch.testing.assert_close(q.T @ q, torch.eye(7), atol=1e-5, rtol=0)


def test_pod_directions_are_the_leading_eigenvectors_of_the_covariance():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(300, 60)) * 0.8 ** np.arange(60) @ np.linalg.qr(rng.normal(size=(60, 60)))[0] + 5.0
    leading = np.linalg.eigh(np.cov(x.T))[1][:, -8:]
    found = directions(torch.tensor(x), Settings(rank=8), torch.Generator().manual_seed(0))
    assert subspace_angles(found.numpy(), leading).max() < 1e-3


def test_directions_come_from_the_generator_alone():
    x = torch.randn(100, 50)
    for dmd in CHOICES["shaping_dmd"]:
        before = torch.get_rng_state()
        draw = lambda seed, dmd=dmd: directions(x, Settings(dmd=dmd, rank=6), torch.Generator().manual_seed(seed))  # noqa: E731
        assert torch.equal(draw(1), draw(1))
        assert torch.equal(draw(1), draw(2)) == (dmd == "pod_moving")  # which draws nothing
        assert torch.equal(torch.get_rng_state(), before)


# gradients

REAL = np.diag([1.5, 1.1, 0.9, 0.4, -1.3])
TURNS = np.kron(np.diag([1.3, 0.95]), np.array([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]]))
SPECTRA = {"real": REAL, "complex pairs": TURNS, "general": np.random.default_rng(7).normal(size=(5, 5)) / 2,
           "non-normal": np.diag([1.2, 1.0, 0.8]) + np.diag([4.0, 4.0], 1)}
REPEATED = {"identity": np.eye(5), "scaled identity": 1.2 * np.eye(5), "two of each": np.diag([1.3, 1.3, 0.9, 0.9]),
            "repeated pairs": np.kron(np.eye(2), TURNS[:2, :2])}


def penalty_of(x, y, basis, **settings):
    values = eigenvalues(x, y, basis)
    assert values is not None
    return spectrum_penalty(values, Settings(**settings))


def checked(x, y, basis, **settings) -> bool:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    return torch.autograd.gradcheck(lambda x, y: penalty_of(x, y, basis, **settings), (x, y), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("penalty", SPECTRAL)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_gradient_is_that_of_finite_differences(spectrum, penalty):
    x, y = states(SPECTRA[spectrum], n=12, noise=0.01)
    assert checked(x, y, torch.eye(len(SPECTRA[spectrum]), dtype=torch.float64), penalty=penalty)


@pytest.mark.parametrize("noise", [0.0, 1e-9])
@pytest.mark.parametrize("spectrum", REPEATED)
def test_the_penalty_has_a_gradient_where_eigenvalues_are_repeated_or_nearly_so(spectrum, noise):
    x, y = states(REPEATED[spectrum], n=12, noise=noise)
    assert checked(x, y, torch.eye(len(REPEATED[spectrum]), dtype=torch.float64))


@pytest.mark.parametrize("dmd", CHOICES["shaping_dmd"])
def test_the_gradient_holds_within_each_kind_of_basis_held_fixed(dmd):
    x, y = states(np.random.default_rng(8).normal(size=(8, 8)) / 2, n=16, noise=0.3)
    assert checked(x, y, directions(x, Settings(dmd=dmd, rank=4), torch.Generator().manual_seed(0)), reduction="mean")


@pytest.mark.parametrize("rank", [3, 8])
def test_the_gradient_goes_through_directions_that_move_with_the_states(rank):
    """Directions found anew at each of the finite differences; those of `pod`, held fixed, miss a part."""
    x, y = states(np.random.default_rng(8).normal(size=(8, 8)) / 2, n=16, noise=0.3)
    found = Settings(dmd="pod_moving", rank=rank)
    of = lambda x, y: penalty_of(x, y, directions(x, found, None), reduction="mean")  # noqa: E731
    assert torch.autograd.gradcheck(of, (x.clone().requires_grad_(), y), atol=1e-6, rtol=1e-4)
    gradients = {dmd: measured(x, y, dmd=dmd, rank=rank) for dmd in ("pod", "pod_moving")}
    assert gradients["pod"][0] == pytest.approx(gradients["pod_moving"][0], rel=1e-3)
    gap = (gradients["pod"][1] - gradients["pod_moving"][1]).norm() / gradients["pod"][1].norm()
    assert float(gap) > 0.05 if rank < 8 else float(gap) < 1e-6


def test_eigenvalues_themselves_have_the_gradient_of_finite_differences():
    x, y = states(SPECTRA["general"], n=12)
    x, y, basis = x.requires_grad_(), y.requires_grad_(), torch.eye(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: eigenvalues(x, y, basis), (x, y), atol=1e-6, rtol=1e-4)


def test_the_gradient_at_repeated_eigenvalues_is_the_limit_of_those_nearby():
    x, y = states(1.3 * np.eye(6))
    near = states(1.3 * np.eye(6) + 1e-6 * np.random.default_rng(0).normal(size=(6, 6)))[1]
    for gradient in ("input", "output"):
        exact, nearby = (measured(x, z, gradient=gradient)[1 if gradient == "input" else 2] for z in (y, near))
        torch.testing.assert_close(exact, nearby, atol=1e-4 * float(exact.abs().max()), rtol=0)


def test_a_jordan_block_has_no_gradient_and_is_skipped():
    block = 1.2 * np.eye(3) + np.diag([1.0, 1.0], 1)
    x, y = states(block)
    assert eigenvalues(x, y, torch.eye(3, dtype=torch.float64)) is None
    penalty, dx, dy, kss = measured(x, y)
    assert (penalty, dx, dy, kss.applied, kss.skipped) == (0.0, None, None, 0, 1)
    assert measured(x, y, condition_max=1e30)[0] == pytest.approx(sum(equation_14([1.2] * 3, Settings())), rel=1e-3)


@given(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), st.integers(2, 40), st.integers(2, 60),
       st.sampled_from(SPECTRAL), st.sampled_from(CHOICES["shaping_dmd"]),
       st.sampled_from(["random", "copies", "low rank", "same", "nilpotent"]), st.integers(0, 10_000))
def test_whatever_the_states_gradients_are_finite_or_the_layer_is_skipped(scales, width, n, penalty, dmd, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, width, generator=generator)
    if kind == "copies":
        x, y = x[:, :1].expand(n, width), y[:, :1].expand(n, width)
    elif kind == "low rank":
        x = x[:, :2] @ torch.randn(2, width, generator=generator)
    elif kind == "same":
        y = x
    elif kind == "nilpotent":
        y = x.roll(1, 1) * (torch.arange(width) > 0)
    value, dx, dy, kss = measured(x * 10 ** scales[0], y * 10 ** scales[1], penalty=penalty, dmd=dmd)
    assert kss.applied + kss.skipped == 1 and math.isfinite(value)
    for gradient in (dx, dy):
        assert gradient is None if kss.skipped else bool(gradient.isfinite().all())


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e18, 1e30])
def test_states_that_are_not_finite_or_whose_squares_are_not_are_skipped_and_counted(penalty, bad):
    layers = nn.ModuleList([Linear(1.2 * torch.eye(8)) for _ in range(3)])
    with KSS(layers, Settings(penalty=penalty, alpha=3.0, every=1, layer_share=1.0), layers=layers) as kss:
        x = torch.randn(50, 8)
        layers[0](x), layers[1](x), layers[2](x * bad)
        penalty = kss.penalty()
    assert (kss.applied, kss.skipped) == (2, 1)
    penalty.backward()
    assert all(layer.a.grad is None or layer.a.grad.isfinite().all() for layer in layers)
    assert 0 < float(penalty.detach()) < math.inf


def test_where_every_layer_is_skipped_there_is_nothing_to_add():
    layer = Linear(torch.eye(8))
    with KSS(layer, Settings(every=1), layers=[layer]) as kss:
        layer(torch.full((5, 8), math.nan))
        assert torch.equal(kss.penalty(), torch.zeros(()))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("gradient", CHOICES["shaping_gradient"])
def test_the_gradient_reaches_the_side_it_is_meant_to(gradient, penalty):
    x, y = states(SPECTRA["general"], noise=0.1)
    nothing = gradient == "input" and penalty in ("residual_norm", "activation_variance")  # of the output alone
    with pytest.warns(UserWarning, match="no gradient") if nothing else contextlib.nullcontext():
        value, dx, dy, _ = measured(x, y, gradient=gradient, penalty=penalty)
    assert value == measured(x, y, penalty=penalty)[0]
    if penalty == "jacobian":  # of a constant layer: zero
        return
    reaches_x = gradient != "output" and penalty not in ("residual_norm", "activation_variance")
    assert (dx is not None and bool(dx.any())) == reaches_x
    assert (dy is not None and bool(dy.any())) == (gradient != "input")


def test_following_the_gradient_takes_the_expansive_modes_out_of_a_stack():
    """Three maps of spectral radius 1.5, by the penalty alone."""
    layers = nn.Sequential(*(Linear(1.5 * torch.linalg.qr(torch.randn(16, 16))[0]) for _ in range(3)))
    optimizer, x = torch.optim.Adam(layers.parameters(), lr=0.02), torch.randn(200, 16)
    before = koopman.profile(layers, x, kreiss=False).table()
    assert (before["expansive_mass"] == 1).all()
    with KSS(layers, Settings(alpha=1.0, every=1)) as kss:
        for _ in range(100):
            layers(x)
            optimizer.zero_grad()
            kss.penalty().backward()
            optimizer.step()
            kss.step()
    after = koopman.profile(layers, x, kreiss=False).table()
    assert (after["expansive_mass"] < 0.2).all() and (after["spectral_radius"] < 1.2).all()
    assert kss.skipped == 0


# the penalties of Table 6

def test_residual_norm_and_activation_variance_are_their_formulas():
    x, y = torch.randn(2, 4, 30, 8)
    assert measured(x, y, penalty="residual_norm")[0] == pytest.approx(float(y.square().mean()))
    rows = y.flatten(0, 1)
    expected = (rows - rows.mean(0)).square().sum(0) / (len(rows) - 1)
    assert measured(x, y, penalty="activation_variance")[0] == pytest.approx(float(expected.mean()))
    assert measured(x, y + 7, penalty="activation_variance")[0] == pytest.approx(float(expected.mean()), rel=1e-4)


def test_random_l2_is_the_mean_square_of_random_projections_of_the_update():
    """E (delta . r)^2 = |delta|^2 for a standard normal r."""
    x, y = torch.randn(2, 30, 8)
    found = measured(x, y, penalty="random_l2", rank=20_000)[0]
    assert found == pytest.approx(float((y - x).square().sum(1).mean()), rel=0.05)
    assert measured(x, x, penalty="random_l2")[0] == 0
    assert measured(x, x + 3 * (y - x), penalty="random_l2")[0] == pytest.approx(
        9 * measured(x, y, penalty="random_l2")[0], rel=1e-5)


def jacobian_penalty(layer: nn.Module, x: torch.Tensor, **settings) -> torch.Tensor:
    with KSS(layer, Settings(penalty="jacobian", alpha=1.0, every=1, **settings), layers=[layer]) as kss:
        layer(x)
        return kss.penalty()


def test_the_jacobian_penalty_of_a_linear_layer_is_the_mean_square_of_the_map_times_a_random_vector():
    """For J = c I it is c^2 times that of J = I exactly, which is the mean of squared normal numbers; else it has the
    mean |J|_F^2 / D."""
    x, eye = torch.randn(2, 200, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    unit = float(jacobian_penalty(Linear(eye), x).detach())
    assert unit == pytest.approx(1, abs=5 * math.sqrt(2 / x.numel()))
    assert float(jacobian_penalty(Linear(-1.7 * eye), x).detach()) == pytest.approx(1.7**2 * unit)
    j = eye + torch.randn(8, 8, dtype=torch.float64) / 3
    x, layer = torch.randn(40_000, 8, dtype=torch.float64), Linear(j)
    penalty = jacobian_penalty(layer, x)
    assert float(penalty.detach()) == pytest.approx(float(j.square().sum() / 8), rel=0.03)
    penalty.backward()
    torch.testing.assert_close(layer.a.grad, 2 * j / 8, atol=0.02, rtol=0)


def test_the_jacobian_penalty_is_as_good_under_autocast():
    """Half precision leaves no difference between neighbouring states."""
    layer, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh()), torch.randn(100, 16)
    exact = jacobian_penalty(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        half = jacobian_penalty(layer, x)
    assert float(half.detach()) == pytest.approx(float(exact.detach()), rel=1e-3)


def test_the_jacobian_penalty_is_of_the_layer_as_it_was_called():
    """Its other arguments are kept, whatever it returns, and dropout drops the same in both passes."""
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, scale, hidden_states=None):
            return {"hidden_states": self.dropout(scale * self.linear(hidden_states))}

    layer, x = Layer(), torch.randn(4000, 8)
    with KSS(layer, Settings(penalty="jacobian", alpha=1.0, every=1), layers=[layer]) as kss:
        layer(3.0, hidden_states=x)
        random_state = torch.get_rng_state()
        penalty = float(kss.penalty().detach())
        assert torch.equal(torch.get_rng_state(), random_state)
    # a mask of zeros and twos has the mean square 2
    assert penalty == pytest.approx(2 * 9 * float(layer.linear.weight.detach().square().sum() / 8), rel=0.1)


# settings

@pytest.mark.parametrize("changes, message", [
    ({"penalty": "none"}, "unknown penalty 'none'"), ({"dmd": "exact"}, "unknown dmd 'exact'"),
    ({"gradient": "X"}, "unknown gradient 'X'"), ({"reduction": "max"}, "unknown reduction 'max'"),
    ({"every": 0}, "every must be at least 1"), ({"rank": 0}, "rank must be at least 1"),
    ({"snapshots": 1}, "snapshots must be at least 2"), ({"alpha": -1.0}, "alpha must be at least 0"),
    ({"alpha": math.nan}, "alpha must be at least 0"), ({"layer_share": 0.0}, "layer_share must be above 0"),
    ({"layer_share": 1.5}, "layer_share must be above 0")])
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Settings) if f.type == "float" or f.type is float])
def test_no_number_of_the_settings_is_negative_or_not_finite(name, bad):
    with pytest.raises(ValueError, match=rf"^{name} must be at least .* got {bad}"):
        Settings(**{name: bad})


@pytest.mark.parametrize("changes", [
    {"every": 2.5}, {"every": True}, {"alpha": None}, {"alpha": "5"}, {"rank": 8.0}, {"snapshots": "all"},
    {"seed": None}, {"gamma": None}, {"penalty": None}, {"dmd": 3}], ids=str)
def test_settings_of_another_type_are_refused(changes):
    (name, bad), = changes.items()
    with pytest.raises(TypeError, match=rf"^{name} must be \w+, got {type(bad).__name__}"):
        Settings(**changes)


def test_numbers_of_numpy_are_settings_and_a_temperature_of_zero_or_a_seed_beyond_torch_is_not():
    assert Settings(every=np.int64(3), alpha=np.float32(0.5), rank=np.int32(4)) == Settings(every=3, alpha=0.5, rank=4)
    assert type(Settings(alpha=5).alpha) is float
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Settings(temperature=0)
    with pytest.raises(ValueError, match=r"below 2\*\*63"):
        Settings(seed=2**63)


def test_the_settings_are_the_papers():
    """Sec. 3.3."""
    s = Settings()
    assert (s.rank, s.snapshots, s.every, s.layer_share) == (32, 2048, 10, 0.5)
    assert (s.temperature, s.tau_u, s.tau_l) == (20, 1.05, 0.9)
    assert 0.3 <= s.gamma <= 0.5 and s.alpha in (0.01, 0.05, 0.1, 0.15, 0.2)
