"""The profile against Algorithm 1 written out, known spectra, the paper's theorems and peers' models."""

import contextlib
import dataclasses
import json
import math
import weakref

import accelerate
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydmd import DMD
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import (
    AlbertConfig,
    AlbertModel,
    BatchEncoding,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RwkvConfig,
    RwkvModel,
)

from stability_lib import data, koopman, models, profiles, runs
from stability_lib.config import CHOICES, RunConfig, replace
from stability_lib.kan import KANLayer
from stability_lib.koopman import ProfileError, layer_profile, profile


def states(a: np.ndarray, n: int = 400, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n random states and what the linear map `a` makes of them, rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(a))) @ rng.normal(size=a.shape) + 3.0
    return x, x @ a.T + noise * rng.normal(size=x.shape) - 1.0


def algorithm_1(x: np.ndarray, y: np.ndarray, eps: float = 1e-5) -> dict:
    """Paper K's Algorithm 1 and eqs. 5 and 10 as they are printed: columns are samples, everything is formed."""
    x, y = (s.T - s.T.mean(1, keepdims=True) for s in (x, y))
    values, vectors = np.linalg.eigh(x @ x.T / (x.shape[1] - 1) + eps * np.eye(len(x)))
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    x, y = whiten @ x, whiten @ y
    a = y @ np.linalg.pinv(x)
    eigenvalues, right = np.linalg.eig(a)
    left = np.linalg.inv(right)  # rows u_j^*
    residuals = [np.linalg.norm(u @ (y - value * x)) / np.linalg.norm(u @ x)
                 for u, value in zip(left, eigenvalues, strict=True)]
    return {"values": eigenvalues, "kappa": np.linalg.cond(right), "residuals": np.array(residuals),
            "eta": np.linalg.norm(y - a @ x) / np.linalg.norm(y - x)}


def by_size(values) -> np.ndarray:
    return np.array(sorted(values, key=lambda z: (round(-abs(z), 8), round(-z.imag, 8))))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_layers_profile_is_algorithm_1(noise):
    x, y = states(np.random.default_rng(1).normal(size=(12, 12)) / 3, noise=noise)
    ours, written_out = layer_profile(x, y), algorithm_1(x, y)
    np.testing.assert_allclose(by_size(ours.eigenvalues), by_size(written_out["values"]), atol=1e-9)
    assert ours.eigenvector_condition == pytest.approx(written_out["kappa"], rel=1e-6)
    assert ours.nonlinearity == pytest.approx(written_out["eta"], abs=1e-7)
    np.testing.assert_allclose(np.sort(ours.residuals), np.sort(written_out["residuals"]), atol=1e-7)
    size = np.abs(written_out["values"])
    assert ours.near_unit_mass == np.mean((size >= 0.9) & (size <= 1.05))
    assert ours.expansive_mass == np.mean(size > 1.05) and ours.contractive_mass == np.mean(size < 0.8)
    assert ours.reliable_share == np.mean(written_out["residuals"] <= 0.1)


def kan_layer(width: int, splines: float) -> KANLayer:
    layer = KANLayer(width, width, 8, 3).double()
    with torch.no_grad():
        layer.initialise_(lambda weight: weight.normal_(0, 1 / math.sqrt(width),
                                                        generator=torch.Generator().manual_seed(0)))
        layer.spline.mul_(splines)
    return layer


def test_the_more_nonlinear_a_layer_the_fewer_its_reliable_modes():
    """Residuals of eq. 10 and eta are Algorithm 1's for layers that no linear map describes, too."""
    x = torch.randn(1000, 8, dtype=torch.float64)
    matrix = torch.randn(8, 8, dtype=torch.float64) / 8
    branches = [lambda x: x @ matrix.T, *(kan_layer(8, splines) for splines in (3, 30))]
    found = []
    for branch in branches:
        y = x + 0.3 * branch(x).detach()
        found.append(layer_profile(x, y, kreiss=False))
        written_out = algorithm_1(x.numpy(), y.numpy())
        assert found[-1].nonlinearity == pytest.approx(written_out["eta"], abs=1e-7)
        np.testing.assert_allclose(np.sort(found[-1].residuals), np.sort(written_out["residuals"]), atol=1e-7)
        assert found[-1].reliable_share == np.mean(written_out["residuals"] <= 0.1)
    linear, bent, strongly = found
    assert linear.nonlinearity < 1e-6 < 0.3 < bent.nonlinearity < 0.7 < strongly.nonlinearity
    assert linear.reliable_share == 1.0 > bent.reliable_share > strongly.reliable_share == 0.0


def test_a_branch_that_adds_less_has_more_reliable_modes_at_the_same_nonlinearity():
    """Yt - Xt is the branch alone, so eta does not see its size; residuals relate it to the stream."""
    x, branch = torch.randn(1000, 8, dtype=torch.float64), kan_layer(8, 1.0)
    found = [layer_profile(x, x + size * branch(x).detach(), kreiss=False) for size in (0.1, 10.0)]
    assert found[0].nonlinearity == pytest.approx(found[1].nonlinearity, rel=1e-6) and found[0].nonlinearity > 0.3
    assert [layer.reliable_share for layer in found] == [1.0, 0.0]


def test_whitening_is_a_similarity_so_eigenvalues_are_those_of_plain_dmd():
    x, y = states(np.random.default_rng(2).normal(size=(16, 16)) / 4, noise=0.5)
    plain = np.linalg.eigvals(np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0].T)
    for ours in (koopman.eigenvalues(x, y), layer_profile(x, y).eigenvalues, layer_profile(x, y, eps=1.0).eigenvalues):
        np.testing.assert_allclose(by_size(ours), by_size(plain), atol=1e-10)


@pytest.mark.parametrize("width, n", [(8, 200), (64, 300), (96, 100)])
def test_eigenvalues_are_pydmds(width, n):
    x, y = states(np.eye(width) + np.random.default_rng(width).normal(size=(width, width)) / 9, n=n, noise=0.3)
    peer = DMD(svd_rank=-1).fit((x - x.mean(0)).T, (y - y.mean(0)).T).eigs
    for ours in (koopman.eigenvalues(x, y), layer_profile(x, y, kreiss=False).eigenvalues):
        nearest = np.abs(np.subtract.outer(ours, peer)).min(1)
        assert len(ours) == min(width, n - 1) and nearest.max() < 1e-10


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
def test_eigenvalues_are_pydmds_however_unequal_the_directions(condition):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(500, 64)) * np.geomspace(1, 1 / condition, 64) @ np.linalg.qr(rng.normal(size=(64, 64)))[0]
    x -= x.mean(0)
    y = x @ (np.eye(64) + rng.normal(size=(64, 64)) / 9) + 0.1 * rng.permutation(x)
    peer = DMD(svd_rank=-1).fit(x.T, (y - y.mean(0)).T).eigs
    assert np.abs(np.subtract.outer(koopman.eigenvalues(x, y), peer)).min(1).max() < 1e-10


TURN = np.array([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])


@pytest.mark.parametrize("a, near, rho", [(TURN, 1.0, 1.0), (0.5 * TURN, 0.0, 0.5), (1.5 * np.eye(3), 0.0, 1.5),
                                          (np.diag([0.95, 1.0, 0.2, 2.0]), 0.5, 2.0)])
def test_toy_systems_have_their_known_spectra(a, near, rho):
    found = layer_profile(*states(a))
    assert found.near_unit_mass == near
    assert found.spectral_radius == pytest.approx(rho, abs=1e-9)
    assert found.nonlinearity == pytest.approx(0, abs=1e-6) and found.reliable_share == 1.0
    assert math.isinf(found.kreiss) == (rho > 1)


def test_only_modes_that_the_data_determine_are_counted():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 20))
    found = layer_profile(x, 0.95 * x)
    assert (found.modes, found.width) == (5, 20)
    np.testing.assert_allclose(found.eigenvalues, 0.95, atol=1e-8)
    assert found.near_unit_mass == 1.0
    few = layer_profile(*states(np.eye(30) * 0.5, n=11))
    assert few.modes == 10 and few.contractive_mass == 1.0


def test_a_rank_r_profile_of_rank_r_data_is_the_exact_one():
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.normal(size=(40, 6)))[0]
    x = rng.normal(size=(300, 6)) @ basis.T
    y = x @ basis @ (rng.normal(size=(6, 6)) / 2) @ basis.T
    exact, low = layer_profile(x, y), layer_profile(x, y, rank=6)
    np.testing.assert_allclose(by_size(low.eigenvalues), by_size(exact.eigenvalues), atol=1e-8)
    assert low.eigenvector_condition == pytest.approx(exact.eigenvector_condition, rel=1e-4)


# theory

@given(st.integers(2, 8), st.integers(0, 10_000))
def test_masses_sum_to_one(width, seed):
    a = np.random.default_rng(seed).normal(size=(width, width)) / math.sqrt(width)
    found = layer_profile(*states(a, seed=seed))
    masses = (found.near_unit_mass, found.expansive_mass, found.contractive_mass, found.mid_mass)
    assert sum(masses) == pytest.approx(1) and min(masses) >= 0


def spherical(width: int, rng: np.random.Generator) -> np.ndarray:
    """Centred states with unit covariance, [200, width]: whitening leaves them, so A is the map itself."""
    return np.linalg.qr(np.hstack([np.ones((200, 1)), rng.normal(size=(200, width))]))[0][:, 1:] * math.sqrt(199)


def haar(width: int, rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(width, width)) + 1j * rng.normal(size=(width, width)))
    return q * (r.diagonal() / np.abs(r.diagonal()))


def random_normal(width: int, rng: np.random.Generator, largest: float = 1.05) -> tuple[np.ndarray, np.ndarray]:
    """A complex normal matrix and its eigenvalues."""
    values = rng.uniform(0, largest, size=width) * np.exp(2j * math.pi * rng.uniform(size=width))
    basis = haar(width, rng)
    return basis * values @ basis.conj().T, values


def energy(a: np.ndarray) -> float:
    """E ||A x||^2 for x uniform on the sphere, tr(A^* A) / d."""
    return np.linalg.norm(a) ** 2 / len(a)


def random_map(width: int, seed: int) -> tuple[np.ndarray, koopman.LayerProfile]:
    """A random, so not normal, matrix and the profile of the layer that it is."""
    rng = np.random.default_rng(seed)
    a, x = rng.normal(size=(width, width)) / math.sqrt(width), spherical(width, rng)
    return a, layer_profile(x, x @ a.T, eps=1e-12, kreiss=False)


@given(st.integers(2, 8), st.integers(0, 10_000))
def test_theorem_1_energy_of_a_normal_map_is_the_mean_squared_modulus(width, seed):
    a, values = random_normal(width, np.random.default_rng(seed))
    size = np.abs(values)
    near = np.mean((size >= 0.9) & (size <= 1.05))
    assert energy(a) == pytest.approx(np.mean(size**2))
    assert 0.9**2 * near - 1e-12 <= energy(a) <= 1.05**2 + 1e-12


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_theorem_1_holds_for_any_map_up_to_the_square_of_the_profiles_kappa(width, seed):
    a, found = random_map(width, seed)
    slack = found.eigenvector_condition**2 * (1 + 1e-6)
    mean_square = np.mean(np.abs(found.eigenvalues) ** 2)
    assert mean_square / slack <= energy(a) <= mean_square * slack
    assert 0.9**2 * found.near_unit_mass / slack <= energy(a) <= found.spectral_radius**2 * slack


@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_corollary_2_no_stack_of_normal_layers_exceeds_the_product_of_their_bounds(width, depth, seed):
    rng = np.random.default_rng(seed)
    maps, moduli = zip(*((a, np.abs(values)) for a, values in (random_normal(width, rng) for _ in range(depth))),
                       strict=True)
    stack = np.linalg.multi_dot([*maps, np.eye(width)])
    assert energy(stack) <= math.prod(size.max() ** 2 for size in moduli) * (1 + 1e-9)
    assert energy(stack) >= math.prod(size.min() ** 2 for size in moduli) * (1 - 1e-9)


def test_corollary_2_energies_multiply_over_layers_of_unrelated_eigenvectors():
    rng = np.random.default_rng(0)
    moduli = rng.uniform(0, 1.05, size=(4, 6))
    stacks = [np.linalg.multi_dot([basis * size @ basis.conj().T for size in moduli for basis in [haar(6, rng)]])
              for _ in range(1500)]
    assert np.mean([energy(stack) for stack in stacks]) == pytest.approx((moduli**2).mean(1).prod(), rel=0.03)


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_bauer_fike_with_the_profiles_kappa(width, seed):
    a, found = random_map(width, seed)
    assert found.eigenvector_condition == pytest.approx(np.linalg.cond(np.linalg.eig(a)[1]), rel=1e-5)
    change = np.random.default_rng(seed).normal(size=a.shape) * 1e-3
    bound = found.eigenvector_condition * np.linalg.norm(change, 2)
    moved = np.linalg.eigvals(a + change)
    assert np.abs(np.subtract.outer(moved, found.eigenvalues)).min(1).max() <= bound * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("width, n", [(40, 400), (40, 6400), (120, 1200), (120, 4800)])
def test_theorem_4_the_spectrum_blurs_by_the_root_of_width_over_snapshots(width, n):
    """Noise of std s on Y = X / 2 adds s / sqrt(N) times a Gaussian matrix to A = I / 2, whose eigenvalues fill the
    disc of radius sqrt(d) (circular law)."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, width))
    found = layer_profile(x, 0.5 * x + 0.4 * rng.normal(size=x.shape), kreiss=False).eigenvalues
    assert np.abs(found - 0.5).max() == pytest.approx(0.4 * math.sqrt(width / n), rel=0.15)


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_kreiss_bounds_of_theorem_5(width, seed):
    rng = np.random.default_rng(seed)
    a = np.triu(rng.normal(size=(width, width)), 1) * 2 + np.diag(rng.uniform(-0.9, 0.9, size=width))
    constant = koopman.kreiss_constant(a)
    powers = [np.linalg.norm(np.linalg.matrix_power(a, n), 2) for n in range(200)]
    assert constant <= max(powers) * (1 + 1e-6)
    assert max(powers) <= math.e * width * constant * (1 + 1e-6)


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_the_kreiss_constant_of_a_normal_matrix_is_one_or_infinite(width, seed):
    a, values = random_normal(width, np.random.default_rng(seed), largest=1.2)
    assert koopman.kreiss_constant(a) == (1.0 if np.abs(values).max() <= 1 else math.inf)
    assert koopman.kreiss_constant(a / max(1, np.abs(values).max())) == 1.0


def test_kreiss_constants_that_are_known():
    assert koopman.kreiss_constant(TURN) == pytest.approx(1, abs=1e-6)
    assert koopman.kreiss_constant(np.diag([0.3, -0.9])) == 1.0
    assert koopman.kreiss_constant(np.diag([0.3, 1.2])) == math.inf
    b = 8.0  # nilpotent: ||(zI - A)^-1|| is a function of |z| alone
    radius = 1 + np.geomspace(1e-3, 1e3, 20_001)
    resolvent = [np.linalg.norm([[1 / r, b / r**2], [0, 1 / r]], 2) for r in radius]
    brute = max((radius - 1) * resolvent)
    assert koopman.kreiss_constant(np.array([[0, b], [0, 0]])) == pytest.approx(brute, rel=1e-5)


# models

def token_ids(vocabulary: int, shape=(8, 12)) -> torch.Tensor:
    return torch.randint(vocabulary, shape)


@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_our_decoders_are_profiled_as_their_blocks_map_the_stream(tiny, norm):
    config = replace(tiny, norm=norm, positions="learned", init="gpt2", biases=True, batch_size=32)
    model, tokens = models.build(config, 40), token_ids(40, (32, config.seq_len))
    found = profile(model, tokens, snapshots=None)
    with torch.no_grad():
        x = model.embed(tokens) + model.positions.weight
        for block, layer in zip(model.blocks, found.layers, strict=True):
            y = block(x)
            expected = layer_profile(x.flatten(0, 1), y.flatten(0, 1))
            np.testing.assert_allclose(layer.eigenvalues, expected.eigenvalues, atol=1e-6)
            x = y
    assert list(found.table()["layer"]) == [0, 1]


@pytest.mark.parametrize("build", [
    lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2,
                                       bos_token_id=0, eos_token_id=0)),
    lambda: LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                         num_attention_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)),
    lambda: BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                 intermediate_size=32, max_position_embeddings=16)),
], ids=["gpt2", "llama", "bert"])
def test_hugging_face_models_are_profiled_along_their_hidden_states(build):
    model, tokens = build().eval(), token_ids(40)
    found = profile(model, {"input_ids": tokens}, snapshots=None)
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert len(found.layers) == 3
    for layer in found.layers[:-1]:  # the last of hidden_states may lie behind a final norm
        expected = layer_profile(*(h.flatten(0, 1) for h in hidden[layer.layer: layer.layer + 2]))
        np.testing.assert_allclose(layer.eigenvalues, expected.eigenvalues, atol=1e-6)


def assert_of_their_own(model: nn.Module, call: dict, layers: list[nn.Module], found) -> None:
    """Each layer's profile is that of what it was called with and what it returned."""
    seen = []

    def keep(layer, args, kwargs, output):
        x, y = args[0] if args else kwargs["hidden_states"], output if isinstance(output, torch.Tensor) else output[0]
        seen.append((x.detach().clone().flatten(0, -2), y.detach().clone().flatten(0, -2)))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in dict.fromkeys(layers)]
    with torch.no_grad():
        model.eval()(**call)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(found)
    for (x, y), layer in zip(seen, found.layers, strict=True):
        expected = layer_profile(x, y, kreiss=False)
        np.testing.assert_allclose(layer.eigenvalues, expected.eigenvalues, atol=1e-6)
        assert layer.update_size == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-5)
        assert layer.nonlinearity == pytest.approx(expected.nonlinearity, abs=1e-6)


def test_rescaling_between_layers_leaves_the_spectra_as_they_are():
    """RWKV halves the stream, and what later layers add to it, after every third layer: the same map of other units."""
    tokens, found = token_ids(40), {}
    for every in (0, 3):
        torch.manual_seed(0)
        model = RwkvModel(RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=6, rescale_every=every,
                                     context_length=16))
        found[every] = profile(model, {"input_ids": tokens}, snapshots=None, eps=1e-12, kreiss=False)
    for plain, rescaled in zip(found[0].layers, found[3].layers, strict=True):
        np.testing.assert_allclose(rescaled.eigenvalues, plain.eigenvalues, atol=1e-3)
        assert rescaled.update_size == pytest.approx(plain.update_size, rel=1e-3)


def test_what_lies_between_layers_is_not_taken_for_theirs():
    model = DebertaV2Model(DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        conv_kernel_size=3, conv_act="gelu", max_position_embeddings=32))
    call = {"input_ids": token_ids(40)}
    assert_of_their_own(model, call, list(model.encoder.layer), profile(model, call, kreiss=False))

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2))
    blocks = model.transformer.h
    for layers in ([block.mlp for block in blocks], [blocks[0], blocks[2]]):
        assert_of_their_own(model, call, layers, profile(model, call, layers=layers, kreiss=False))


def test_a_shared_layer_counts_each_time_it_runs():
    model = AlbertModel(AlbertConfig(vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=4,
                                     num_attention_heads=2, intermediate_size=32))
    call = {"input_ids": token_ids(40)}
    found = profile(model, call, kreiss=False)
    assert list(found.table()["layer"]) == [0, 1, 2, 3]
    assert_of_their_own(model, call, list(model.encoder.albert_layer_groups), found)


def never(graph, inputs):
    raise AssertionError("compiled")


class Residual(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(x).tanh()


def residual_stack(depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Residual() for _ in range(depth)))


def test_compiled_models_are_profiled_without_being_compiled():
    model, x = residual_stack(), torch.randn(100, 8)
    expected = profile(model, x, kreiss=False).table()
    inside = residual_stack()
    inside.compile(backend=never)
    by_layer = nn.Sequential(*(torch.compile(layer, backend=never) for layer in model))
    for compiled in (torch.compile(model, backend=never), inside, by_layer):
        assert profile(compiled, x, kreiss=False).table().equals(expected)


def test_torchs_encoder_is_profiled_on_padded_batches():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    x, hidden = torch.randn(8, 12, 16), torch.arange(12).expand(8, 12) > 8
    found = profile(model, {"src": x, "src_key_padding_mask": hidden}, kreiss=False)
    with torch.no_grad():
        for layer, measured in zip(model.layers, found.layers, strict=True):
            y = layer.train()(x, src_key_padding_mask=hidden)
            np.testing.assert_allclose(measured.eigenvalues, layer_profile(x[~hidden], y[~hidden]).eigenvalues,
                                       atol=1e-5)
            x = y
    assert torch.backends.mha.get_fastpath_enabled()


def test_offloaded_weights_and_buffers_are_loaded_as_they_are_needed():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.inner(self.norm(x))

    model, x = nn.Sequential(Normed(), Normed()), torch.randn(100, 8)
    here = profile(model, x).table()
    accelerate.cpu_offload(model, offload_buffers=True)
    assert profile(model, x).table().equals(here)


def test_batches_are_gathered_until_there_are_enough_token_states():
    model, x = residual_stack(), torch.randn(40, 5, 8)
    whole = profile(model, x, snapshots=None)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=7)
    for inputs in (list(x.split(7)), loader, [(part,) for part in x.split(7)], [{"input": part} for part in x.split(7)],
                   (part for part in x.split(7))):
        found = profile(model, inputs, snapshots=None)
        assert [layer.snapshots for layer in found.layers] == [200] * 3
        for layer, expected in zip(found.layers, whole.layers, strict=True):
            np.testing.assert_allclose(layer.eigenvalues, expected.eigenvalues, atol=1e-6)
    run = []
    model[0].register_forward_pre_hook(lambda *_: run.append(1))
    found = profile(model, loader, snapshots=60, positions=[0, 1, 2])
    assert found.layers[2].snapshots == 60 and len(run) == 3  # 21 states a batch


def test_the_device_of_the_factorizations_is_a_choice():
    x, y = states(np.eye(8) / 2, noise=0.1)
    assert layer_profile(x, y, device="cpu").spectral_radius == layer_profile(x, y).spectral_radius
    with pytest.raises(RuntimeError, match="meta"):  # it went there
        layer_profile(x, y, device="meta")


def test_a_bar_is_shown_when_asked_for_but_not_by_the_batch_runner(capfd, monkeypatch):
    model, x = residual_stack(), torch.randn(50, 8)
    profile(model, x)
    monkeypatch.setenv("STABILITY_LIB_HEADLESS", "1")
    profile(model, x, progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.delenv("STABILITY_LIB_HEADLESS")
    profile(model, x, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_profiling_leaves_the_model_and_the_random_numbers_as_they_were(tiny):
    layers = (nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout()) for _ in range(3))
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(*layers)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first = profile(model, torch.linspace(-1, 1, 800).reshape(100, 8).sin(), layers="1")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = profile(model, torch.linspace(-1, 1, 800).reshape(100, 8).sin(), layers="1")
    assert first.table().equals(again.table())


class Elsewhere(torch.Tensor):
    """A tensor with values that claims to be on another device."""

    @staticmethod
    def __new__(cls, held):
        found = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="meta")
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Accelerator().__torch_dispatch__(func, types, args, kwargs)


class Accelerator(TorchDispatchMode):
    """Stands in for a device: tensors move only when told to, and two devices never meet in one operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = {isinstance(leaf, Elsewhere) for leaf in leaves if leaf.ndim or isinstance(leaf, Elsewhere)}
        assert len(there) < 2, f"{func} mixes devices"
        target = kwargs.get("device")
        stays = True in there if target is None else torch.device(target).type == "meta"
        args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
        result = func(*args, **(kwargs | ({"device": "cpu"} if target is not None else {})))
        return tree_map_only(torch.Tensor, Elsewhere, result) if stays else result


@pytest.mark.parametrize("rank", [None, 3])
def test_a_model_on_an_accelerator_is_profiled_there(rank, monkeypatch):
    class Layer(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("weight", weight)

        def forward(self, x):
            return x + x @ self.weight

    weights, x = torch.randn(3, 6, 6) / 4, torch.randn(20, 5, 6)
    here = profile(nn.Sequential(*map(Layer, weights)), x, rank=rank, snapshots=50)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: contextlib.nullcontext())  # there is no torch.meta
    with Accelerator():
        there = profile(nn.Sequential(*(Layer(Elsewhere(weight)) for weight in weights)), Elsewhere(x), rank=rank,
                        snapshots=50)
    assert there.table().equals(here.table())


def test_layers_are_reduced_as_they_stream_by():
    alive, most = weakref.WeakSet(), []

    class Layer(nn.Module):
        def forward(self, x):
            y = x * 0.9
            alive.add(y)
            most.append(len(alive))
            return y

    profile(nn.Sequential(*(Layer() for _ in range(12))), torch.randn(64, 4))
    assert max(most) <= 3


def test_a_layer_that_changes_nothing_is_flagged_and_not_scored():
    class ReZero(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate, self.inner = gate, nn.Linear(8, 8)

        def forward(self, x):
            return x + self.gate * self.inner(x)

    found = profile(nn.Sequential(ReZero(0.0), ReZero(1.0)), torch.randn(200, 8))
    assert list(found.table()["degenerate"]) == [True, False]
    assert found.risk == found.layers[1].near_unit_mass
    untouched = profile(nn.Sequential(ReZero(0.0), ReZero(0.0)), torch.randn(200, 8))
    assert math.isnan(untouched.risk) and untouched.verdict().startswith("not scored")


@pytest.mark.parametrize("spectrum, word", [(0.5, "go"), (1.0, "high risk")])
def test_the_verdict_follows_the_papers_flow(spectrum, word):
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer in layers:
        nn.init.eye_(layer.weight).data.mul_(spectrum if spectrum < 1 else -1)
    assert profile(layers, torch.randn(100, 4)).verdict().startswith(word)


def test_the_verdict_says_what_it_depends_on():
    model, x = residual_stack(), torch.randn(100, 8)
    full = profile(model, x).verdict()
    assert "rank" not in full and "warning" not in full and "meant for models at initialization" in full
    assert "rank=3 keeps 3 of 8 modes" in profile(model, x, rank=3).verdict()
    few = profile(model, x, snapshots=8)
    assert (few.layers[0].modes, few.layers[0].nonlinearity) == (7, pytest.approx(0, abs=1e-9))
    assert "8 token states determine 7 of 8 modes" in few.verdict() and "rank" not in few.verdict()
    assert "warning: 8 token states are fitted exactly by 7 modes" in few.verdict()
    exact = profile(model, x, snapshots=9)
    assert exact.layers[0].modes == 8 and "warning: 9 token states are fitted exactly" in exact.verdict()
    assert few.states_wanted == 32 and "use 32 token states or more" in few.verdict()
    thin = profile(model, x, snapshots=10).verdict()
    assert "warning" not in thin and "10 token states are few for 8 modes" in thin and "better 32" in thin
    assert "are few" not in profile(model, x, snapshots=16).verdict()
    assert profile(model, x, rank=3).states_wanted == 12
    assert "warning: 4 token states" in profile(model, x, snapshots=4, rank=3).verdict()


def test_in_sample_eta_is_short_by_what_the_number_of_states_says():
    """For noise independent of X the fit of M modes to N states takes M / N of the noise's variance."""
    rng = np.random.default_rng(0)
    for n in (160, 320, 1280):
        x = rng.normal(size=(n, 80))
        found = layer_profile(x, x + 10 * rng.normal(size=x.shape), kreiss=False)
        assert found.nonlinearity == pytest.approx(math.sqrt(1 - 80 / n), abs=0.02)


def test_beside_the_flow_stands_how_many_runs_of_chapter_04_diverged():
    """Counted again from the committed runs; 15 of 72 is also what the chapter prints."""
    table = {study: runs.frame(list(runs.load(runs.locate(study, "cpu")).values()))
             for study in ("divergence_sweep", "unseen_architectures", "spectra_at_init")}
    model = ["norm", "init", "residual", "qk_norm", "d_model", "n_layers", "seq_len", "seed"]
    untrained = table["spectra_at_init"].query("spectra_kreiss")
    untrained = untrained[model].assign(m1=runs.reading(untrained, "near_unit_mass"),
                                        kappa=runs.reading(untrained, "eigenvector_condition")).dropna(subset="m1")
    counted = {word: [] for word in profiles.FLOW_RECORD}
    for study in ("divergence_sweep", "unseen_architectures"):
        trained = table[study].query("lr <= 0.03").merge(untrained, on=model, validate="many_to_one")
        words = [profiles.flow(run.m1, run.kappa) for run in trained.itertuples()]
        for word, row in trained["status"].eq("diverged").groupby(words).agg(["sum", "size"]).iterrows():
            counted[word].append(tuple(row))
    assert {word: tuple(found) for word, found in counted.items()} == profiles.FLOW_RECORD
    template = layer_profile(*states(np.eye(4) / 2))
    high, low = (koopman.Profile((dataclasses.replace(template, near_unit_mass=m1),), koopman.PAPER).verdict()
                 for m1 in (0.9, 0.1))
    assert "the paper advises KSS" in high and "norms or weight norm did as well" in high
    assert high.endswith("15 of 72 such runs diverged, outside its sweep 6 of 18")
    assert low.startswith("go") and low.endswith("0 of 144 such runs diverged, outside its sweep 6 of 36")


@pytest.mark.parametrize("m1, kappa, word", [
    (0.3, 100, "in between"), (0.29, 100, "go"), (0.29, 2e4, "in between"), (0.5, 100, "in between"),
    (0.51, 100, "high risk"), (0.1, 2e6, "high risk"), (0.1, math.inf, "high risk")])
def test_the_flow_decides_by_m1_and_kappa(m1, kappa, word):
    assert profiles.flow(m1, kappa) == word


def test_layers_that_are_kept_are_not_analysed_again(monkeypatch):
    model, x = residual_stack(), torch.randn(100, 8)
    whole, kept = profile(model, x), {}
    assert profile(model, x, kept=kept).table().equals(whole.table()) and [*kept] == [0, 1, 2]
    del kept[1]
    analysed, analyse = [], koopman.layer_profile
    monkeypatch.setattr(koopman, "layer_profile", lambda *args, layer, **kwargs: analysed.append(layer) or analyse(
        *args, layer=layer, **kwargs))
    assert profile(model, x, kept=kept).table().equals(whole.table()) and analysed == [1]


def test_a_profile_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found, path = profile(residual_stack(), torch.randn(50, 8)), tmp_path / "profile.json"
    found.save(path, about={"model": "three layers"})
    assert json.loads(path.read_text())["about"] == {"model": "three layers"}
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(profiles.os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            found.save(path)
    assert path.read_text() == before and [*tmp_path.iterdir()] == [path]
    assert koopman.Profile.load(path).table().equals(found.table())


def test_a_profile_is_written_and_read_without_loss(tmp_path):
    rotation = nn.Linear(2, 2, bias=False)
    rotation.weight.data = torch.tensor(1.01 * TURN).float()
    found = profile(nn.Sequential(rotation, nn.Identity()), torch.randn(50, 2), rank=2, layers=[rotation])
    degenerate = profile(nn.Sequential(nn.Identity(), nn.Identity()), torch.randn(50, 2))
    assert math.isinf(found.layers[0].kreiss) and math.isnan(degenerate.layers[0].nonlinearity)
    for written in (found, degenerate):
        written.save(tmp_path / "profile.json")
        json.loads((tmp_path / "profile.json").read_text(), parse_constant=pytest.fail)  # no Infinity, no NaN
        read = koopman.Profile.load(tmp_path / "profile.json")
        assert read.table().equals(written.table()) and read.table().dtypes.equals(written.table().dtypes)
        assert read.verdict() == written.verdict() and read.rank == written.rank
        for before, after in zip(written.layers, read.layers, strict=True):
            np.testing.assert_array_equal(after.eigenvalues, before.eigenvalues, strict=True)
            np.testing.assert_array_equal(after.residuals, before.residuals, strict=True)
    for text in ("{", '{"layers": 3}', '{"layers": [{}], "thresholds": {}, "rank": null}', "[]"):
        (tmp_path / "profile.json").write_text(text)
        with pytest.raises(ProfileError, match=r"profile\.json holds no profile"):
            koopman.Profile.load(tmp_path / "profile.json")


def test_a_profile_has_a_length_a_short_name_and_a_figure():
    found = profile(residual_stack(), torch.randn(50, 8))
    assert len(found) == 3 and repr(found) == f"Profile(3 layers, mean M1 {found.risk:.2f})"
    assert "eigenvalues" not in repr(found.layers[0])
    figure = found.plot()
    assert len(figure.axes) == 3 and len(figure.axes[0].collections) == 3 and not plt.get_fignums()


def test_token_positions_and_masks_choose_the_states(tiny):
    model, tokens = models.build(tiny, 40), token_ids(40, (32, tiny.seq_len))
    assert profile(model, tokens, positions="last").layers[0].snapshots == 32
    assert profile(model, tokens, positions=[0, -1]).layers[0].snapshots == 64
    assert profile(model, tokens, positions=lambda t: t < 9).layers[0].snapshots == int((tokens < 9).sum())
    assert profile(model, tokens, snapshots=50).layers[0].snapshots == 50


@pytest.mark.parametrize("call, message", [
    (lambda: profile(nn.Linear(3, 3), torch.randn(5, 3)), "has no residual stream"),
    (lambda: profile(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(1, 3)), "too few"),
    (lambda: profile(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.ones(9, 3)), "does not vary"),
    (lambda: profile(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.full((9, 3), math.nan)), "not finite"),
    (lambda: profile(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(9, 3), layers="2"), "unknown module"),
    (lambda: layer_profile(np.eye(4), np.eye(5)), "keep the stream's width"),
    (lambda: layer_profile(np.eye(4), np.eye(4), eps=0.0), "eps must be positive"),
    (lambda: layer_profile(np.eye(4), np.eye(4), eps=math.nan), "eps must be positive"),
    (lambda: layer_profile(np.eye(4), np.eye(4), cutoff=math.nan), "cutoff must be"),
    (lambda: layer_profile(np.eye(4), np.eye(4), rank=2.5), "rank must be a whole number of at least 1, got 2.5"),
    (lambda: layer_profile(np.eye(4), np.eye(4), rank=True), "rank must be a whole number"),
    (lambda: layer_profile(np.eye(4), 1j * np.eye(4)), "complex states"),
    (lambda: layer_profile(torch.ones(4, 4, device="meta"), torch.ones(4, 4)), "the input of layer 0 is on the meta"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), snapshots=-3), "snapshots must be a whole number of at lea"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), snapshots=0), "snapshots must be"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), snapshots=1.5), "snapshots must be"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), seed=0.5), "seed must be"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), positions=[0.5]), r"positions .* whole numbers"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), positions=[True, False]), r"positions .* whole numbers"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), positions=[9]), "choose from -9 to 8"),
    (lambda: profile(residual_stack(), torch.randn(9, 8), positions=3), "positions 3 "),
    (lambda: profile(residual_stack().to("meta"), torch.randn(9, 8)), "weights on the meta device"),
    (lambda: profile(residual_stack(), ["one text", "another"]), "argument 0 of the model is of type str"),
    (lambda: profile(residual_stack(), "one text"), "inputs are of type str: pass a tensor"),
    (lambda: profile(residual_stack(), np.eye(8)), "inputs are of type ndarray: pass a tensor"),
    (lambda: profile(residual_stack(), []), "no batch"),
    (lambda: profile(residual_stack(), BatchEncoding({"input": [[1, 2]]})), "'input' of the model is of type list"),
    (lambda: koopman.Thresholds(near_low=math.nan), "holds a NaN"),
    (lambda: koopman.Thresholds(contractive=0.95), "counted twice"),
])
def test_what_cannot_be_profiled_is_named(call, message):
    with pytest.raises(ProfileError, match=message):
        call()


def test_complex_layers_are_refused_as_such():
    class Turn(nn.Module):
        def forward(self, z):
            return 1j * z

    with pytest.raises(ProfileError, match="complex states"):
        profile(nn.Sequential(Turn(), Turn()), torch.randn(50, 4, dtype=torch.complex64))
    x = torch.randn(50, 4, dtype=torch.complex128)
    parts = [torch.view_as_real(z).flatten(1) for z in (x, 1j * x)]  # the remedy
    np.testing.assert_allclose(np.sort(layer_profile(*parts).eigenvalues.imag), [-1] * 4 + [1] * 4, atol=1e-9)


def test_gpt2_initialisation_gives_the_spectra_that_the_norms_differ_by():
    """Near-unit mass of paper K's table 1: about 0.16 for Pre-LN and RMSNorm, most of the modes without norms."""
    found = {}
    for norm in ("pre_ln", "rmsnorm", "no_norm"):
        config = RunConfig(data="recall", d_model=64, n_layers=4, norm=norm, positions="learned", biases=True,
                           init="gpt2", qk_norm="none", eval_sequences=32)
        found[norm] = profile(models.build(config, 256), data.validation(config)[:, :-1], kreiss=False).risk
    assert found["pre_ln"] < 0.4 and found["rmsnorm"] < 0.4 < 0.9 < found["no_norm"]


def test_figures_draw_every_layer(tiny):
    found = profile(models.build(tiny, 40), token_ids(40, (32, tiny.seq_len)))
    _, (left, right) = plt.subplots(1, 2)
    assert koopman.draw_eigenvalues(left, found) is left and koopman.draw_depth(right, found) is right
    assert len(left.collections) == len(found.layers) and len(right.lines) == 3
    figure, ax = plt.subplots()
    koopman.draw_eigenvalues(ax, found, bar=False)
    assert figure.axes == [ax]
    plt.close("all")


def test_a_rank_above_the_modes_of_the_states_adds_no_random_directions():
    """X spans 6 of 20 directions, Y all of them: the profile is that of the 6, in whatever order the states come."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 20))
    y = x @ rng.normal(size=(20, 20)) / 4 + rng.normal(size=(200, 20))
    found = [layer_profile(x[rows], y[rows], rank=rank) for rows, rank in (
        (slice(None), 6), (slice(None), 12), (rng.permutation(200), 12))]
    assert [layer.modes for layer in found] == [6, 6, 6]
    for layer in found[1:]:
        assert layer.nonlinearity == pytest.approx(found[0].nonlinearity, rel=1e-6)
        assert layer.spectral_radius == pytest.approx(found[0].spectral_radius, rel=1e-6)


@pytest.mark.parametrize("n, spanned", [(30, 8), (30, 29), (50, 20), (20, 50)])
def test_fewer_states_than_dimensions_are_whitened_beyond_their_span(n, spanned):
    """Algorithm 1 with a pseudo-inverse that knows how many directions X has; Y leaves them."""
    rng = np.random.default_rng(n)
    x, step = rng.normal(size=(n, spanned)) @ rng.normal(size=(spanned, 50)), rng.normal(size=(n, 50))
    found = layer_profile(x, x + step, kreiss=False)
    xc, yc = (s.T - s.T.mean(1, keepdims=True) for s in (x, x + step))
    variances, axes = np.linalg.eigh(xc @ xc.T / (n - 1) + 1e-5 * np.eye(50))
    xt, yt = (axes * variances**-0.5) @ axes.T @ xc, (axes * variances**-0.5) @ axes.T @ yc
    a = yt @ np.linalg.pinv(xt, rtol=1e-8)
    assert found.modes == min(n - 1, spanned)
    assert found.nonlinearity == pytest.approx(np.linalg.norm(yt - a @ xt) / np.linalg.norm(yt - xt), abs=1e-7)
    values = sorted(np.linalg.eigvals(a), key=abs)[-found.modes:]
    np.testing.assert_allclose(np.sort(abs(found.eigenvalues)), np.sort(np.abs(values)), rtol=1e-6)


def test_layers_side_by_side_have_the_numbers_of_one_at_a_time(monkeypatch):
    threads, order = torch.get_num_threads(), []

    class Kept(dict):
        def __setitem__(self, number, layer):
            order.append(number)
            super().__setitem__(number, layer)

    model, x = nn.Sequential(*(nn.Linear(40, 40) for _ in range(5))), torch.randn(300, 40)
    batches = [x[:100], x[100:]]
    alone = [profile(model, inputs, kreiss=False) for inputs in (x, batches)]
    try:
        torch.set_num_threads(2)
        assert koopman._at_once(x.numel(), "cpu") == 2
        together = [profile(model, inputs, kreiss=False, kept=Kept()) for inputs in (x, batches)]
        assert order == [*range(5)] * 2 and torch.get_num_threads() == 2
        bad = nn.Sequential(*model[:3], nn.Linear(40, 40, bias=False), nn.Linear(40, 40))
        bad[3].weight.data.fill_(math.nan)
        with pytest.raises(ProfileError, match="output of layer 3 is not finite"):
            profile(bad, x, kept=(kept := Kept()))
        assert [*kept] == [0, 1, 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(alone, together, strict=True):
        for before, after in zip(one.layers, other.layers, strict=True):
            np.testing.assert_allclose(after.eigenvalues, before.eigenvalues, rtol=1e-8, atol=1e-10)
            for metric in ("eigenvector_condition", "nonlinearity", "spectral_radius", "update_size"):
                assert getattr(after, metric) == pytest.approx(getattr(before, metric), rel=1e-8)


def test_as_many_layers_at_once_as_threads_and_memory_allow(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for n, width, most in ((100, 8, 4), (2048, 768, 4), (2048, 2048, 3), (2048, 4096, 1), (16384, 4096, 1)):
        assert koopman._at_once(n * width, torch.device("cpu"), "cpu") == most
        assert most == 1 or most * 16 * 8 * n * width <= koopman.AT_ONCE
    assert koopman._at_once(2048 * 768, "cpu", "cuda") == koopman._at_once(2048 * 768, torch.device("mps"), "cpu") == 1
