"""What an accelerator must do as the CPU does. `pytest -m gpu` runs it on a CUDA device.

Every test also runs with the CPU in the device's place, where what it is held against is computed another way (in
float64, in another order), so that tolerances are met by more than two calls of the same code.
"""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stability_lib import blocks, data, koopman, models, replicas, runs, shaping, train
from stability_lib.config import RunConfig, grid, replace
from stability_lib.replicas import train_replicas
from stability_lib.train import RunResult, train_run

# of operations that vmap cannot batch and takes one by one: on a GPU all that replicas gain would be lost
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request) -> str:
    return request.param


SMALL = RunConfig(d_model=32, n_layers=2, n_heads=2, seq_len=32, batch_size=8, eval_sequences=16, steps=20,
                  warmup_steps=5, probe_every=19)
SHAPES = {"plain": {}, "bare": {"qk_norm": "none", "z_loss": 0.0, "clip_norm": None},
          "squared ReLU": {"attention": "squared_relu", "attention_maps": 2},
          "cap, gate": {"attention_cap": 5.0, "attention_gate": True, "attention_maps": 1},
          "rmsnorm, biases": {"norm": "rmsnorm", "biases": True},
          "post-LN, learned": {"norm": "post_ln", "positions": "learned", "residual": "scaled"},
          "muParam": {"parametrization": "mup_full", "base_width": 16, "n_heads": 4},
          "recall": {"data": "recall"}, "digits": {"data": "digits", "seq_len": 64, "attention_maps": 1}}
ALONE = {"gradient penalty": {"gradient_penalty": 0.01},
         "squared ReLU, gradient penalty": {"attention": "squared_relu", "gradient_penalty": 0.01},
         "KSS": {"shaping": "kss", "shaping_every": 2, "shaping_alpha": 0.5},
         "Jacobian": {"shaping": "jacobian", "shaping_every": 5},
         "Lion": {"optimizer": "lion", "lr": 1e-3}, "LAMB, SAM": {"optimizer": "lamb", "sam_rho": 0.05},
         "spectral norm": {"reparametrization": "spectral_norm"},
         "sigma reparam": {"reparametrization": "sigma_reparam"},  # not Muon, which rounds to bf16 on the way
         "QK-clip": {"qk_clip": 3.0, "qk_norm": "none"}, "norms of each other": {"qk_lr": "other_norm"},
         "weight norm": {"reparametrization": "weight_norm", "init": "pytorch"},
         "experts": {"mlp": "moe"}, "KAN": {"mlp": "kan"}, "Mamba": {"mixer": "mamba", "qk_norm": "none"},
         "sharpness": {"sharpness_every": 8, "signals_every": 1},
         "roll back": {"alarm": "step", "alarm_above": 12.0, "on_alarm": "roll_back", "roll_back_by": 4},
         "halve": {"alarm": "step", "alarm_above": 12.0, "on_alarm": "halve_lr"}}


def in_double(patch: pytest.MonkeyPatch) -> None:
    """Runs in float64 from here on."""
    build = models.build
    patch.setattr(models, "build", lambda config, vocab: build(config, vocab).double())
    patch.setattr(Tensor, "float", Tensor.double)


@pytest.fixture
def expected(device):
    """`expected(config)` trains on the CPU, in fp32 as the device does; on behalf of the CPU itself in float64."""
    def run(config: RunConfig) -> RunResult:
        with pytest.MonkeyPatch.context() as patch:
            if device == "cpu":
                in_double(patch)
            return train_run(config)
    return run


def built(config: RunConfig, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A run's model and its first batch."""
    model = models.build(config, data.vocab_size(config)).to(device, dtype)
    return model, data.sample(config, torch.Generator().manual_seed(0)).to(device)


def assert_near(found: list[Tensor], wanted: list[Tensor], rel: float) -> None:
    """Each tensor within `rel` of the size of the one it should be."""
    for here, there in zip(found, wanted, strict=True):
        assert float((here.cpu().double() - there.cpu().double()).norm()) <= rel * float(there.double().norm())


# runs

@pytest.mark.parametrize("name", [*SHAPES, *ALONE])
def test_twenty_steps_are_those_of_the_cpu(name, device, expected):
    config = replace(SMALL, **(SHAPES | ALONE)[name])
    found, wanted = train_run(config, device), expected(config)
    assert (found.status, found.config) == ("ok", wanted.config)
    assert found.curves["loss"] == pytest.approx(wanted.curves["loss"], abs=1e-4)
    assert (found.loss_init, found.loss_final) == pytest.approx((wanted.loss_init, wanted.loss_final), abs=1e-4)
    assert found.accuracy_final == pytest.approx(wanted.accuracy_final, abs=0.01)
    torch.testing.assert_close(torch.tensor(found.patterns), torch.tensor(wanted.patterns), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_readings_are_those_of_the_cpu(name, device, expected):
    """Of the first step, and without the updates, where Adam makes a full step of a gradient of rounding size."""
    once = dict(steps=1, warmup_steps=0, probe_every=1, attention_maps=1)
    config = replace(SMALL, **SHAPES[name] | once)
    found, wanted = train_run(config, device).curves, expected(config).curves
    assert found.keys() == wanted.keys() and len(found) > 20
    for quantity in found.keys() - {name for name in found if name.startswith("update_rms")}:
        assert found[quantity] == pytest.approx(wanted[quantity], rel=1e-4, abs=1e-6), quantity
    assert all(0 < found[name][0] < 1 for name in found if name.startswith("update_rms"))


@pytest.mark.parametrize("attention", ["softmax", "squared_relu"])
@pytest.mark.parametrize("together", [1, 3])
def test_bf16_trains_as_fp32_does(device, attention, together):
    config = replace(SMALL, steps=60, attention=attention, spectra_every=0 if together > 1 else 30)
    found, full = (train_replicas(grid(replace(config, precision=precision), seed=range(together)), device)
                   for precision in ("bf16", "fp32"))
    for rounded, exact in zip(found, full, strict=True):
        assert rounded.status == "ok" and all(math.isfinite(x) for values in rounded.curves.values() for x in values)
        assert rounded.loss_final < rounded.loss_init - 0.5
        assert rounded.loss_final == pytest.approx(exact.loss_final, abs=0.05)
        assert rounded.curves["loss"] != exact.curves["loss"]


def test_a_run_leaves_the_random_numbers_of_the_device_as_they_are(device, monkeypatch):
    """`torch.manual_seed` would set those of all devices, and `fork_rng` restores only what it is told to."""
    config = replace(SMALL, steps=2, warmup_steps=0, init="pytorch", reparametrization="spectral_norm")
    if device == "cpu":
        before = torch.get_rng_state()
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded every CUDA device"))
        train_run(config)
        assert torch.equal(before, torch.get_rng_state())
    else:
        before = torch.cuda.get_rng_state()
        train_run(config, device)
        assert torch.equal(before, torch.cuda.get_rng_state())


# attention

@pytest.mark.parametrize("attention", ["softmax", "squared_relu"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype, rel", [(torch.float32, 5e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(3, 2, 64, 16), (2, 4, 33, 8)], ids=str)
@pytest.mark.parametrize("together", [False, True])
def test_attention_and_its_gradient_are_those_of_the_formula(device, attention, causal, dtype, rel, sizes, together):
    config = replace(SMALL, attention=attention, **({} if causal else {"data": "digits", "seq_len": 64}))
    core = (replicas._Core if together else blocks.AttentionCore)(config)
    given = [torch.randn(2, *sizes).to(device, dtype).requires_grad_() for _ in range(3)]
    mixed = torch.vmap(core)(*given) if together else core(*(x.flatten(0, 1) for x in given)).unflatten(0, (2, -1))
    q, k, v = exact = [x.detach().cpu().double().requires_grad_() for x in given]
    z = q @ k.mT * config.scale
    hidden = torch.ones(sizes[2], sizes[2]).triu(1).bool() if causal else torch.zeros(()).bool()
    weights = z.masked_fill(hidden, -math.inf).softmax(-1) if attention == "softmax" else (
        z.relu().square().masked_fill(hidden, 0) / math.sqrt(sizes[2]))
    wanted, slope = weights @ v, torch.randn(2, *sizes)
    mixed.backward(slope.to(device, dtype))
    wanted.backward(slope.double())
    assert mixed.dtype == dtype and mixed.device.type == device
    assert_near([mixed.detach(), *(x.grad for x in given)], [wanted.detach(), *(x.grad for x in exact)], rel)


@pytest.mark.parametrize("attention", ["softmax", "squared_relu"])
def test_the_gradient_of_a_gradient_penalty_is_that_of_the_cpu(device, attention):
    config, gradients = replace(SMALL, attention=attention, gradient_penalty=1.0), []
    for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        with train.alone(where, 1), pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                in_double(patch)
            learner = train.Single(config, data.vocab_size(config), where)
            batch = data.sample(config, torch.Generator().manual_seed(0)).to(where)
            learner.backward(learner.losses(0, batch.unsqueeze(0), False)[1])
        gradients.append([weight.grad for weight in learner.model.parameters()])
    assert_near(*gradients, 1e-4)


# spectra

def states_of(config: RunConfig, device: str) -> list[tuple[Tensor, Tensor]]:
    model, batch = built(config, device, torch.float64)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append((given[0].flatten(0, -2), out.flatten(0, -2))))
    with torch.no_grad():
        model(batch[:, :-1])
    return seen


def farthest(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest distance of two that belong together: rounding may swap those of nearly the same modulus."""
    distance = abs(found[:, None] - wanted)
    return distance[linear_sum_assignment(distance)].max()


@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("width, seq_len", [(32, 32), (48, 5)], ids=["full rank", "fewer states than directions"])
def test_eigenvalues_of_a_profile_are_those_of_the_cpu(device, rank, width, seq_len):
    """Of the same states in another order, which changes nothing but rounding."""
    config = replace(SMALL, d_model=width, seq_len=seq_len)
    for x, y in states_of(config, device):
        order = torch.randperm(len(x))
        found = koopman.layer_profile(x, y, rank=rank, kreiss=False)
        wanted = koopman.layer_profile(x.cpu()[order], y.cpu()[order], rank=rank, kreiss=False)
        assert found.modes == wanted.modes and farthest(found.eigenvalues, wanted.eigenvalues) < 1e-8
        assert (found.eigenvector_condition, found.spectral_radius) == pytest.approx(
            (wanted.eigenvector_condition, wanted.spectral_radius), rel=1e-5)
        # residuals and eta of states that are fitted exactly are rounding
        assert np.sort(found.residuals) == pytest.approx(np.sort(wanted.residuals), abs=1e-6)
        assert found.nonlinearity == pytest.approx(wanted.nonlinearity, abs=1e-6)
        assert farthest(koopman.eigenvalues(x, y), koopman.eigenvalues(x.cpu()[order], y.cpu()[order])) < 1e-8


@pytest.mark.parametrize("snapshots", [None, 100])
def test_a_model_is_profiled_where_it_lies(device, snapshots):
    """And its batch is brought there, whole or as several."""
    model, batch = built(SMALL, device)
    tokens, options = batch[:, :-1].cpu(), dict(snapshots=snapshots, positions=range(1, 32), kreiss=False)
    with train.alone(device, 1):
        found = koopman.profile(model, tokens, **options)
        parts = koopman.profile(model, [*tokens.split(4)], **options)
        wanted = koopman.profile(model.cpu().double(), tokens, **options)
    assert found.table()["snapshots"].tolist() == [snapshots or 8 * 31] * 2
    for metric in ("spectral_radius", "update_size", "nonlinearity"):
        assert found.table()[metric].to_numpy() == pytest.approx(wanted.table()[metric].to_numpy(), rel=1e-3)
    if snapshots is None:
        assert parts.table()["spectral_radius"].tolist() == pytest.approx(
            found.table()["spectral_radius"].tolist(), rel=1e-3)


@pytest.mark.parametrize("settings", [
    {}, {"dmd": "random", "rank": 8}, {"dmd": "whitened"}, {"gradient": "input", "snapshots": 100},
    {"penalty": "random_l2"}, {"penalty": "activation_variance"}, {"penalty": "residual_norm"},
    {"penalty": "jacobian"}], ids=str)
def test_the_gradient_of_shaping_is_that_of_the_cpu(device, settings):
    defaults = {"alpha": 5, "every": 1, "layer_share": 1, "rank": 16, "tau_u": 0.8, "tau_l": 0.7}
    settings = shaping.Settings(**defaults | settings)
    found = []
    for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        model, batch = built(SMALL, where, dtype)
        with train.alone(where, 1), shaping.KSS(model, settings) as kss:
            model(batch[:, :-1])
            penalty = kss.penalty()
            assert (penalty.device.type, kss.applied, kss.skipped) == (where, 2, 0)
            penalty.backward()
        found.append([penalty.detach(), *(p.grad for p in model.blocks.parameters() if p.grad is not None)])
    assert_near(*found, 2e-3)


@pytest.fixture
def elsewhere(device):
    """A caller's default device that is not the model's: for the CPU one that holds no values."""
    with torch.device("meta" if device == "cpu" else "cuda"):
        yield


@pytest.mark.parametrize("where", ["model", "cpu"])
def test_a_callers_default_device_does_not_matter_to_a_profile(device, where, elsewhere):
    with torch.device("cpu"):
        model, batch = built(SMALL, device if where == "model" else "cpu")
        wanted = koopman.profile(model, batch[:, :-1], rank=8, snapshots=100, kreiss=False)
    found = koopman.profile(model, batch[:, :-1], rank=8, snapshots=100, kreiss=False)
    assert found.table()["spectral_radius"].tolist() == pytest.approx(wanted.table()["spectral_radius"].tolist())


@pytest.mark.parametrize("settings", [{"dmd": "random", "rank": 8, "snapshots": 100}, {"penalty": "random_l2"},
                                      {"penalty": "jacobian"}], ids=str)
def test_a_callers_default_device_does_not_matter_to_shaping(device, settings, elsewhere):
    with torch.device("cpu"):
        model, batch = built(SMALL, device)
    with shaping.KSS(model, shaping.Settings(every=2, **settings)) as kss:
        model(batch[:, :-1])
        penalty = kss.penalty()
        kss.step()
        assert (penalty.device.type, kss.applied, kss.skipped) == (device, 1, 0)
        assert kss.penalty().device.type == "cpu"  # of a step without


def test_the_jacobian_penalty_seeds_no_other_device_than_the_models(device, monkeypatch):
    with torch.device("cpu"):
        model, batch = built(SMALL, device)
    random = torch.cuda if device == "cuda" else torch
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeded every device"))
    before = random.get_rng_state()
    with shaping.KSS(model, shaping.Settings(penalty="jacobian", every=1)) as kss:
        model(batch[:, :-1])
        kss.penalty()
    assert kss.applied == 1 and torch.equal(before, random.get_rng_state())


# replicas

@pytest.mark.parametrize("name", SHAPES)
def test_replicas_on_the_device_are_its_single_runs(name, device, monkeypatch):
    """In float64, where rounding is far below the tolerance; one of them ends early."""
    in_double(monkeypatch)
    base = replace(SMALL, probe_every=5, **SHAPES[name])
    configs = [base, replace(base, seed=1, lr=3e-3), replace(base, seed=2, diverge_loss=0.1)]
    for found, config in zip(train_replicas(configs, device), configs, strict=True):
        single = train_run(config, device)
        assert (found.status, found.stop_step, found.replicas) == (single.status, single.stop_step, 3)
        assert found.curves.keys() == single.curves.keys()
        for quantity, values in single.curves.items():
            assert found.curves[quantity] == pytest.approx(values, rel=1e-8, abs=1e-8), quantity
        assert found.loss_final == pytest.approx(single.loss_final, rel=1e-8)


@pytest.mark.parametrize("name", SHAPES)
def test_replicas_in_fp32_are_runs_of_the_cpu(name, device, expected):
    configs = grid(replace(SMALL, **SHAPES[name]), seed=range(2), lr=[1e-3, 1e-2])
    for found, config in zip(train_replicas(configs, device), configs, strict=True):
        assert found.curves["loss"] == pytest.approx(expected(config).curves["loss"], abs=1e-4)


def test_a_batch_that_is_too_large_for_the_memory_is_halved(device, monkeypatch):
    """On CUDA memory does run out, as the process is allowed 1 GB, and a replica takes about a quarter of that."""
    config = replace(SMALL, steps=3, warmup_steps=0)
    if device == "cuda":
        config = replace(config, attention="squared_relu", n_heads=4, seq_len=128, batch_size=64, eval_sequences=64)
    tried, together = [], replicas._train

    def noted(configs, device):
        tried.append(len(configs))
        if device == "cpu" and len(configs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return together(configs, device)
    monkeypatch.setattr(replicas, "_train", noted)
    configs = grid(config, seed=range(16))
    with at_most(2**30) if device == "cuda" else contextlib.nullcontext():
        found = train_replicas(configs, device)
    assert tried[:2] == [16, 8]
    assert [result.config for result in found] == configs
    assert all(result.status == "ok" and 1 <= result.replicas < 16 for result in found)
    single = train_run(configs[-1], device)
    assert found[-1].curves["loss"] == pytest.approx(single.curves["loss"], abs=1e-4)


@contextlib.contextmanager
def at_most(room: int):
    """All the CUDA memory that this process may take beyond what it has."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + room) / torch.cuda.get_device_properties("cuda").total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_run_beyond_the_memory_of_the_device_is_refused_before_it_starts(device):
    for train_it in (lambda config: train_run(config, device), lambda config: train_replicas(
            grid(config, seed=range(2)), device)):
        with pytest.raises(ValueError, match=f"needs at least .* GB and {device} has .*: lower .*d_model 1048576"):
            train_it(replace(SMALL, d_model=2**20))


# waiting

@contextlib.contextmanager
def waits_for(device: str):
    """Collects whatever makes the host wait until the device has done all it was given."""
    found = []
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found += [str(each.message) for each in caught if "synchronizing" in str(each.message)]
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "nonzero"):
            def noted(tensor, *given, name=name, real=getattr(Tensor, name)):  # noqa: B008
                found.append(name)
                return real(tensor, *given)
            patch.setattr(Tensor, name, noted)
        yield found


@pytest.mark.parametrize("together, most", [(1, 1), (3, 4)])
def test_a_step_waits_for_the_device_once(device, together, most):
    """A batch of replicas also sends its numbers there, three times at most, which on CUDA waits too."""
    configs = grid(SMALL, seed=range(together))
    learner = (replicas.Replicas(configs, data.vocab_size(SMALL), device) if together > 1 else
               train.Single(SMALL, data.vocab_size(SMALL), device))
    with train.alone(device, 1):
        for step in (2, 3):  # the first pays for what is made once
            batch = learner.draw()
            with waits_for(device) as waits:
                train.take_step(learner, step, batch)
    assert 1 <= len(waits) <= (most if device == "cuda" else 1), waits


class Mixed(TorchDispatchMode):
    """The meta device stands in for an accelerator. Notes operations on tensors from both sides, which a GPU refuses,
    and, in `sent`, what goes there."""

    def __init__(self):
        super().__init__()
        self.found, self.sent = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        sides = Counter((leaf.device.type, leaf.ndim > 0) for leaf in tree_leaves((args, kwargs))
                        if isinstance(leaf, Tensor))
        on_device = sides[("meta", True)] + sides[("meta", False)]
        result = function(*args, **(kwargs or {}))
        if on_device and sides[("cpu", True)]:
            self.found.append(str(function))
        made = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        self.sent += not on_device and "meta" in made and any(side == "cpu" for side, _ in sides)
        return result


@pytest.mark.parametrize("name, together", [*itertools.product(SHAPES, (1, 3)), *((name, 1) for name in (
    "gradient penalty", "Lion", "weight norm"))])
def test_nothing_of_a_step_is_left_on_the_cpu(name, together, monkeypatch):
    monkeypatch.setattr(train, "autocast", lambda config, device: contextlib.nullcontext())
    config = replace(SMALL, **(SHAPES | ALONE)[name])
    configs, vocab = grid(config, seed=range(together)), data.vocab_size(config)
    with Mixed() as mixed:
        learner = replicas.Replicas(configs, vocab, "meta") if together > 1 else train.Single(config, vocab, "meta")
        batch, before = learner.draw(), mixed.sent
        loss, objective, readings = learner.losses(1, batch, True)
        learner.backward(objective)
        readings |= learner.read_weights()
        norm = learner.clip()
        learner.patterns(batch[0, :1, :-1])
        moved = learner.update(1, batch, True)
    assert mixed.found == [] and mixed.sent - before <= 3 * (together > 1)
    assert {x.device.type for x in (batch, loss, norm, *readings.values(), *moved.values())} == {"meta"}
    assert {len(x) for x in (batch, loss, norm, *readings.values(), *moved.values())} == {together}


# chapters

@pytest.mark.slow
def test_chapters_run_at_scale_quick(device, tmp_path):
    """By papermill, from the command line, with replicas on an accelerator."""
    chapters = ["00", "01"] if device == "cuda" else ["00"]
    command = [sys.executable, "-m", "stability_lib", "reproduce", *chapters, "--scale", "quick", "--device", device,
               "--recompute", "all", "--output", str(tmp_path / "report")]
    done = subprocess.run(command, cwd=runs.project_root(), capture_output=True, text=True, timeout=600,
                          env=os.environ | {"STABILITY_LIB_RUNS": str(tmp_path / "runs"), runs.HEADLESS: "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    made = [json.loads(line)["provenance"] for path in (tmp_path / "runs").rglob("*.jsonl")
            for line in path.read_text().splitlines()]
    assert made and {row["device"] for row in made} == {device}
    assert any(row["replicas"] > 1 for row in made) == (device != "cpu")
    assert (tmp_path / "report" / "report.html").exists()
