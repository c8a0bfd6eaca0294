import concurrent.futures
import contextlib
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fingerprint
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stability_lib import data, koopman, models, optim, runs, shaping, train
from stability_lib.config import CHOICES, RunConfig, grid, replace
from stability_lib.train import loss_terms, resolve_device, train_run


def outcome(result: train.RunResult) -> tuple:
    return result.status, result.stop_step, result.loss_init, result.loss_final, result.curves, result.patterns


@pytest.fixture
def batches(monkeypatch) -> list[torch.Tensor]:
    """The training batches that runs inside the test draw."""
    drawn, sample = [], data.sample

    def note(config, generator):
        drawn.append(sample(config, generator))
        return drawn[-1]
    monkeypatch.setattr(data, "sample", note)
    return drawn


# the same config gives the same bits

@pytest.mark.parametrize("changes", [
    {"probe_every": 2, "attention_maps": 2}, {"precision": "bf16"}, {"qk_norm": "none", "lr": 1.0},
    {"attention": "squared_relu", "parametrization": "mup_full"},
    {"optimizer": "muon", "qk_clip": 1.0, "qk_norm": "none", "probe_every": 2}, {"qk_lr": "other_norm"},
    {"reparametrization": "sigma_reparam", "attention_cap": 50.0, "attention_gate": True},
    {"residual": "rezero", "spectra_every": 2}, {"reparametrization": "spectral_norm"},
    {"reparametrization": "weight_norm", "residual": "scaled"}, {"gradient_penalty": 0.1}, {"sam_rho": 0.1},
    *({"shaping": kind, "shaping_every": 2, "shaping_dmd": "random"} for kind in CHOICES["shaping"][1:]),
    {"shaping": "kss", "shaping_every": 1, "sam_rho": 0.1, "optimizer": "lion"},
    {"shaping": "kss", "shaping_every": 1, "gradient_penalty": 0.1, "precision": "bf16"}], ids=str)
def test_the_same_config_gives_the_same_bits(tiny, changes):
    config = replace(tiny, **changes)
    first = train_run(config)
    torch.manual_seed(99)
    assert str(outcome(first)) == str(outcome(train_run(config)))  # as text NaN equals itself


@pytest.mark.slow
def test_a_run_gives_the_same_bits_in_a_fresh_process(tiny, fresh_process):
    assert fresh_process(tiny) == fingerprint(tiny)


def test_a_run_leaves_random_states_threads_and_config_as_they_were(tiny):
    config, threads = replace(tiny, steps=2), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        for n in (1, None):
            result = train_run(config, threads=n)
            assert torch.get_num_threads() == 2
        with pytest.raises(ValueError):
            train_run(replace(tiny, vocab_size=3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert result.config is config == replace(tiny, steps=2)


def test_a_run_trains_with_the_threads_it_is_given(tiny, batches, monkeypatch):
    seen = []
    monkeypatch.setattr(optim, "set_lr", lambda *arguments: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    train_run(replace(tiny, steps=2), threads=1)
    train_run(replace(tiny, steps=2), threads=2)
    train_run(replace(tiny, steps=2), threads=None)
    assert seen == [1, 1, 2, 2, before, before]


def test_the_batches_of_a_run_depend_on_its_seed_alone(tiny, batches):
    for changes in ({}, {"lr": 0.3, "qk_norm": "none", "d_model": 32}, {"seed": 1}):
        train_run(replace(tiny, **changes))
    base, other_recipe, other_seed = batches[:6], batches[6:12], batches[12:]
    assert all(map(torch.equal, base, other_recipe))
    assert not any(map(torch.equal, base, other_seed))


# runs that share a process

DRAWS = [
    {"init": "pytorch", "biases": True}, {"init": "gpt2", "positions": "learned"}, {"init": "xavier"},
    {"reparametrization": "spectral_norm"}, {"reparametrization": "weight_norm", "init": "pytorch"},
    {"sam_rho": 0.1, "optimizer": "lamb"}, {"optimizer": "lion"}, {"gradient_penalty": 0.1},
    {"gradient_penalty": 0.1, "precision": "bf16", "sam_rho": 0.1}, {"spectra_every": 1, "attention_maps": 2},
    {"spectra_every": 3, "spectra_kreiss": True, "probe_every": 1}, {"data": "recall", "seq_len": 12},
    {"data": "digits", "seq_len": 64, "init": "pytorch"}, {"tokenizer": "bpe", "vocab_size": 300, "data": "a text"},
    {"precision": "bf16", "shaping": "kss"}, {"residual": "rezero", "norm": "subln"},
    *({"shaping": kind, "shaping_every": 1, "shaping_dmd": dmd} for kind in CHOICES["shaping"][1:]
      for dmd in ("random", "whitened"))]


def test_runs_in_threads_of_one_process_give_the_bits_of_serial_ones(tiny, tmp_path):
    """torch's global random numbers and its choice of attention kernel belong to the process, not to a thread."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"to be, or not to be: that is the question\n" * 99)
    configs = [replace(tiny, steps=3, seed=seed, **changes) for seed, changes in enumerate(DRAWS)]
    configs = [replace(config, data=str(text)) if config.data == "a text" else config for config in configs]
    serial = [str(outcome(train_run(config))) for config in configs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        shared = [str(outcome(result)) for result in pool.map(train_run, configs)]
    assert [changes for changes, a, b in zip(DRAWS, serial, shared, strict=True) if a != b] == []


@pytest.mark.parametrize("changes", [{}, {"reparametrization": "spectral_norm"}])
def test_a_sweep_on_a_thread_executor_gives_the_rows_of_a_serial_one(tmp_path, tiny, changes):
    configs = grid(replace(tiny, d_model=128, n_layers=6, steps=1, warmup_steps=1, init="pytorch", **changes),
                   seed=range(6))
    serial = [train_run(config) for config in configs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = runs.ensure(configs, runs.Store(tmp_path / "x.jsonl"), executor=pool)
    assert rows["loss_final"].tolist() == [result.loss_final for result in serial]


def test_a_run_that_fails_or_runs_within_another_does_not_keep_the_next_one_waiting(tiny, monkeypatch):
    expected = outcome(train_run(tiny))
    with pytest.raises(ValueError):
        train_run(replace(tiny, vocab_size=3))
    inner, sample = [], data.sample

    def nested(config, generator):
        if not inner:
            inner.append(None)
            inner.append(train_run(tiny))
        return sample(config, generator)
    monkeypatch.setattr(data, "sample", nested)
    assert outcome(train_run(tiny)) == outcome(inner[1]) == expected


# what a caller has set does not change a run

@contextlib.contextmanager
def setting(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def called(set_it, value, before):
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


OUTSIDE = {
    "default dtype float64": lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: called(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: called(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
    "matmul precision": lambda: called(torch.set_float32_matmul_precision, "medium", "highest"),
    "mkldnn precision": lambda: setting(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "mkldnn": lambda: setting(torch.backends.mkldnn, "enabled", False),
    "attention kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "deterministic": lambda: called(torch.use_deterministic_algorithms, True, False),
    "flush denormal": lambda: called(torch.set_flush_denormal, True, False),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}


STATE = [torch.get_default_dtype, torch.get_default_device, torch.is_grad_enabled, torch.is_inference_mode_enabled,
         lambda: torch.is_autocast_enabled("cpu"), lambda: torch.get_autocast_dtype("cpu"),
         lambda: torch.backends.mkldnn.enabled, lambda: torch.backends.mkldnn.matmul.fp32_precision,
         torch.are_deterministic_algorithms_enabled, torch.is_anomaly_enabled,
         lambda: torch.backends.cuda.flash_sdp_enabled(),
         lambda: torch.tensor(1e-40, dtype=torch.float32, device="cpu").mul(1).item()]


@pytest.fixture(scope="module")
def undisturbed():
    """Configs that see what a caller may set, and what each gives where nothing is set."""
    base = RunConfig(d_model=64, n_layers=2, n_heads=2, seq_len=32, batch_size=16, eval_sequences=16, steps=3,
                     warmup_steps=1, probe_every=2)
    configs = [replace(base, **changes) for changes in (
        {"spectra_every": 2, "init": "pytorch"}, {"precision": "bf16", "attention_maps": 1}, {"data": "recall"},
        {"shaping": "kss", "shaping_every": 1, "gradient_penalty": 0.1}, {"clip_norm": 1e-19, "eps": 1e-24},
        {"data": "digits", "seq_len": 64, "reparametrization": "spectral_norm", "sam_rho": 0.1},
        {"lr": 1e30, "warmup_steps": 0, "clip_norm": None})]
    return {config: str(outcome(train_run(config))) for config in configs}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_run_is_a_function_of_its_config_whatever_the_caller_has_set(undisturbed, outside):
    data._images.cache_clear()  # what is read inside must not carry the setting along
    with OUTSIDE[outside]():
        before = [str(read()) for read in STATE]
        found = {config: str(outcome(train_run(config))) for config in undisturbed}
        assert before == [str(read()) for read in STATE]
    assert [config for config in undisturbed if found[config] != undisturbed[config]] == []
    assert str(outcome(train_run(next(iter(undisturbed))))) == next(iter(undisturbed.values()))



# what a run computes

def plain_loop(config: RunConfig, batches: list[torch.Tensor]) -> tuple[list[float], list[float], float]:
    """Losses, gradient norms and the final validation loss of the same training in plain PyTorch, step by step."""
    model = models.build(config, data.vocab_size(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
                                  weight_decay=config.weight_decay / config.lr, foreach=False)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss + config.z_loss * torch.logsumexp(logits, -1).pow(2).mean()).backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
        for p in model.parameters():
            p.grad *= min(1.0, config.clip_norm / norms[-1])
        optimizer.param_groups[0]["lr"] = config.lr * optim.schedule(config, step)
        if config.eps_late is not None and step >= config.steps / 2:
            optimizer.param_groups[0]["eps"] = config.eps_late
        optimizer.step()
        losses.append(loss.item())
    windows = data.validation(config)
    with torch.no_grad():
        final = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    return losses, norms, float(final)


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": "none", "clip_norm": 0.1, "eps": 0.01}, {"z_loss": 0.1, "weight_decay": 0.05},
    {"eps_late": 0.01, "steps": 7}, {"attention": "squared_relu", "eval_sequences": 7, "batch_size": 3}])
def test_a_run_is_what_a_plain_pytorch_loop_computes(tiny, batches, changes):
    """eps near the gradients makes Adam see their scale, so that clipping shows."""
    config = replace(tiny, **changes)
    result = train_run(config)
    losses, norms, final = plain_loop(config, batches)
    assert result.curves["loss"] == pytest.approx(losses, rel=1e-4)
    assert result.curves["gradient_norm"] == pytest.approx(norms, rel=1e-3)
    assert result.loss_final == pytest.approx(final, rel=1e-4)


@pytest.mark.parametrize("parametrization", ["mup_simple", "mup_intermediate"])
def test_muparam_trains_as_the_standard_parametrization_at_base_width(tiny, parametrization):
    same = replace(tiny, parametrization=parametrization, base_width=tiny.d_model)
    assert outcome(train_run(same)) == outcome(train_run(tiny))


def test_mup_full_keeps_its_attention_scale_and_zero_queries_at_base_width(tiny):
    same = replace(tiny, parametrization="mup_full", base_width=tiny.d_model)
    assert same.scale == 1 / tiny.d_head != tiny.scale
    rows = [models.build(config, 84).blocks[0].attention.qkv.weight[: tiny.d_model] for config in (same, tiny)]
    assert not rows[0].any() and rows[1].all()
    assert train_run(same).curves["loss"] != train_run(tiny).curves["loss"]


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "none", "seed": 1}, {"vocab_size": 250}])
def test_the_loss_at_initialisation_is_near_log_vocabulary_plus_a_half(tiny, changes):
    """The final norm and the head's std make logits unit normal, so that log Z is about ln V + 1/2."""
    config = replace(tiny, d_model=64, steps=1, warmup_steps=0, eval_sequences=64, **changes)
    assert train_run(config).loss_init == pytest.approx(math.log(data.vocab_size(config)) + 0.5, abs=0.15)


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": "none"}, {"qk_norm": "model"}, {"attention": "squared_relu"}, {"precision": "bf16"},
    {"parametrization": "mup_full"}, {"decay": "pytorch", "weight_decay": 0.1}, {"n_layers": 0},
    {"logit_transplant": 1.0}, {"residual": "scaled"}, {"residual": "rezero"}, {"reparametrization": "spectral_norm"},
    {"reparametrization": "weight_norm"}, {"gradient_penalty": 1e-3}, {"sam_rho": 0.01},
    {"reparametrization": "sigma_reparam"}, {"attention_cap": 50.0}, {"attention_gate": True}, {"optimizer": "muon"},
    {"qk_lr": "other_norm"}, {"qk_norm": "none", "qk_clip": 3.0, "optimizer": "muon"},
    {"sam_rho": 0.01, "optimizer": "lion", "lr": 3e-3}, {"shaping": "kss"}], ids=str)
def test_the_loss_falls_within_thirty_steps(tiny, changes):
    result = train_run(replace(tiny, **{"steps": 30, "lr": 0.03} | changes))
    assert result.status == "ok" and result.stop_step is None and result.reason is None
    assert result.loss_final < result.loss_init - 0.8
    assert np.mean(result.curves["loss"][-5:]) < np.mean(result.curves["loss"][:5])


def test_the_gradient_norm_is_recorded_before_clipping(tiny):
    free = train_run(replace(tiny, clip_norm=None)).curves["gradient_norm"]
    clipped = train_run(replace(tiny, clip_norm=1e-3, probe_every=1)).curves
    assert clipped["gradient_norm"][0] == free[0] > 1e-3
    sizes = {name: w.numel() for name, w in models.build(tiny, 84).named_weights().items()}
    from_probes = math.sqrt(sum(n * clipped[f"gradient_rms/{name}"][0] ** 2 for name, n in sizes.items()))
    assert 0.9 * free[0] < from_probes <= free[0] * (1 + 1e-5)  # the probes leave out the norms' gains


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_qk_clip_acts_after_every_step_on_the_heads_of_its_batch_that_passed(tiny, monkeypatch, precision):
    """With a step of nothing, the batch gives the threshold where it gave more, in the first layer, whose inputs stay,
    and what it gave elsewhere."""
    config = replace(tiny, qk_norm="none", weight_decay=0.0, lr=1e-30, precision=precision, probe_every=2)
    seen, read = [], lambda learner: [*learner.head_maxima["blocks.0.attention"].tolist()]
    before = train.Single(replace(config, qk_clip=1e9), 84, "cpu")
    batch = before.draw()
    before.losses(0, batch, False)
    largest = read(before)
    threshold = sum(largest) / 2
    learner = train.Single(replace(config, qk_clip=threshold), 84, "cpu")
    for _ in range(2):
        learner.backward(learner.losses(0, batch, False)[1])
        moved = learner.update(0, batch, True)
        seen.append(float(moved["clipped_heads"]))
    expected = [min(value, threshold) for value in largest]
    assert read(learner) == pytest.approx(expected, rel=1e-2 if precision == "bf16" else 1e-4)
    assert seen[0] >= 1
    calls, clip = [], train.projections.clip
    monkeypatch.setattr(train.projections, "clip", lambda *given: calls.append(given[2]) or clip(*given))
    result = train_run(replace(config, qk_clip=threshold))
    assert calls == [threshold] * config.steps
    assert len(result.curves["clipped_heads"]) == len(result.curves["probe_step"])


def test_a_threshold_that_no_logit_passes_changes_no_bit(tiny):
    plain = replace(tiny, qk_norm="none", probe_every=2)
    found, expected = (train_run(config) for config in (replace(plain, qk_clip=1e9), plain))
    assert {**found.curves, "clipped_heads": 0} == {**expected.curves, "clipped_heads": 0}
    assert found.curves["clipped_heads"] == [0.0] * 4 and found.loss_final == expected.loss_final


def test_clipping_limits_what_reaches_the_optimizer(tiny):
    """Adam forgets the gradient's scale except against eps: clipped far below eps, weights hardly move."""
    config = replace(tiny, steps=1, warmup_steps=0, probe_every=1, weight_decay=0.0)
    moved = {clip: train_run(replace(config, clip_norm=clip)).curves["update_rms/head"][0] for clip in (None, 1e-12)}
    assert moved[None] == pytest.approx(config.lr, rel=0.05) and moved[1e-12] < 0.01 * config.lr


@pytest.mark.parametrize("changes", [{}, {"probe_every": 4}, {"probe_every": 1, "attention_maps": 4}])
def test_curves_are_equally_long(tiny, changes):
    config = replace(tiny, steps=9, **changes)
    curves = train_run(config).curves
    every = {"step", "loss", "gradient_norm"}
    assert curves["step"] == list(range(9))
    assert {len(curves[name]) for name in every} == {9}
    n_probed = {0: 0, 4: 3, 1: 9}[config.probe_every]
    assert {len(values) for name, values in curves.items() if name not in every | {"pattern_step"}} <= {n_probed}


@pytest.mark.parametrize("n, steps", [(0, []), (1, [0]), (2, [0, 8]), (5, [0, 2, 4, 6, 8]), (9, list(range(9)))])
def test_as_many_attention_maps_are_kept_as_asked_for_spread_over_the_run(tiny, n, steps):
    result = train_run(replace(tiny, steps=9, attention_maps=n))
    assert result.curves.get("pattern_step", []) == steps and len(result.patterns) == n
    for pattern in map(np.array, result.patterns):
        assert pattern.shape == (tiny.seq_len, tiny.seq_len)
        assert pattern.sum(1) == pytest.approx(np.ones(tiny.seq_len), rel=1e-5) and (np.triu(pattern, 1) == 0).all()


# penalties, SAM and spectra

def terms(model: nn.Module, batch: torch.Tensor, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return loss_terms(model(batch[:, :-1]), batch[:, 1:], config.z_loss)


def test_the_gradient_penalty_adds_its_gradient(tiny, batches):
    """grad c |g|^2 = 2 c H g, and H g is the derivative of the gradient along g."""
    config = replace(tiny, gradient_penalty=0.05, steps=1, warmup_steps=0, probe_every=1, clip_norm=None)
    result = train_run(config)
    model = models.build(config, data.vocab_size(config)).double()
    weights = list(model.parameters())

    def gradient() -> list[torch.Tensor]:
        return torch.autograd.grad(terms(model, batches[0], config)[1], weights)

    def shift(along: list[torch.Tensor], size: float) -> list[torch.Tensor]:
        with torch.no_grad():
            for weight, direction in zip(weights, along, strict=True):
                weight.add_(direction, alpha=size)
        return gradient()

    g, step = gradient(), 1e-4
    ahead, behind = shift(g, step), shift(g, -2 * step)
    for weight, here, up, down in zip(weights, g, ahead, behind, strict=True):
        weight.grad = here + 2 * config.gradient_penalty * (up - down) / (2 * step)
    norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights))
    assert result.curves["gradient_norm"] == pytest.approx([norm], rel=1e-4)
    plain = math.sqrt(sum(float(here.square().sum()) for here in g))
    assert norm > 1.05 * plain
    for name, expected in model.named_weights(lambda weight: weight.grad).items():
        found = result.curves[f"gradient_rms/{name}"][0]
        assert found == pytest.approx(float(expected.square().mean().sqrt()), rel=1e-3), name
    assert result.curves["loss"][0] == pytest.approx(train_run(tiny).curves["loss"][0])  # the task's alone


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_run_with_sam_is_what_the_steps_by_hand_give(tiny, batches, clip_norm):
    """eps near the gradients makes AdamW see their scale, so that clipping at the second point shows."""
    config = replace(tiny, sam_rho=0.2, eps=0.01, clip_norm=clip_norm)
    result = train_run(config)
    model = models.build(config, data.vocab_size(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps,
                                  weight_decay=config.weight_decay / config.lr)
    losses, norms, weights = [], [], list(model.parameters())
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = config.lr * optim.schedule(config, step)
        loss, objective = terms(model, batch, config)
        g = torch.autograd.grad(objective, weights)
        losses.append(loss.item())
        norms.append(float(torch.cat([x.flatten() for x in g]).norm()))
        here = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, x in zip(weights, g, strict=True):
                weight += config.sam_rho * x / norms[-1]
        there = torch.autograd.grad(terms(model, batch, config)[1], weights)
        size = float(torch.cat([x.flatten() for x in there]).norm())
        with torch.no_grad():
            for weight, back, x in zip(weights, here, there, strict=True):
                weight.copy_(back)
                weight.grad = x * min(1.0, (clip_norm or math.inf) / size)
        optimizer.step()
    assert result.curves["loss"] == pytest.approx(losses, rel=1e-4)
    assert result.curves["gradient_norm"] == pytest.approx(norms, rel=1e-3)
    assert train_run(replace(config, sam_rho=0.0)).curves["loss"] != pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("kind", CHOICES["shaping"][1:])
def test_a_shaped_run_is_a_plain_loop_with_the_penalty_in_its_loss(tiny, batches, kind):
    config = replace(tiny, shaping=kind, shaping_alpha=0.5, shaping_every=2)
    result = train_run(config)
    model = models.build(config, data.vocab_size(config))
    optimizer, losses, penalties = optim.build(model, config), [], []
    with shaping.attach(model, config) as kss:
        for step, batch in enumerate(batches):
            optim.set_lr(optimizer, optim.schedule(config, step))
            loss, objective = terms(model, batch, config)
            penalty = kss.penalty()
            optimizer.zero_grad()
            (objective + penalty).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            kss.step()
            losses.append(loss.item())
            penalties.append(float(penalty.detach()))
    assert result.curves["loss"] == losses and result.curves["penalty"] == penalties
    assert [value > 0 for value in penalties] == [True, False] * 3
    assert losses[:1] == train_run(tiny).curves["loss"][:1] and losses[2:] != train_run(tiny).curves["loss"][2:]


def test_a_penalty_without_weight_changes_nothing(tiny):
    off, plain = train_run(replace(tiny, shaping="kss", shaping_alpha=0.0)), train_run(tiny)
    assert off.curves == plain.curves | {"penalty": [0.0] * 6, "skipped_layers": [0] * 6}
    assert off.loss_final == plain.loss_final


@pytest.mark.parametrize("changes, n", [
    ({}, 6), ({"lr": 1e30, "warmup_steps": 0, "clip_norm": None, "norm": "no_norm"}, 2), ({"diverge_loss": 1.0}, 1)])
@pytest.mark.parametrize("kind", CHOICES["shaping"][1:])
def test_a_shaped_run_records_its_penalty_and_skipped_layers_at_every_step(tiny, kind, changes, n):
    result = train_run(replace(tiny, shaping=kind, shaping_every=1, **changes))
    assert (result.status == "diverged") == bool(changes)
    assert [len(result.curves[name]) for name in ("step", "penalty", "skipped_layers")] == [n] * 3
    assert all(map(math.isfinite, result.curves["penalty"]))
    assert result.curves["skipped_layers"] == ([0, 1] if "lr" in changes else [0] * n)


@pytest.mark.parametrize("changes", [
    {"probe_every": 1}, {"attention_maps": 3}, {"spectra_every": 1},
    {"probe_every": 1, "attention_maps": 2, "spectra_every": 2}], ids=str)
@pytest.mark.parametrize("kind", [
    {}, {"reparametrization": "spectral_norm"}, {"shaping": "kss", "shaping_every": 1}, {"sam_rho": 0.1},
    {"shaping": "jacobian", "shaping_every": 1}, {"residual": "rezero", "gradient_penalty": 0.01}], ids=str)
def test_looking_changes_nothing(tiny, kind, changes):
    seen, unseen = (train_run(replace(tiny, **kind, **more)) for more in (changes, {}))
    assert [seen.curves[name] for name in unseen.curves] == list(unseen.curves.values())
    assert seen.loss_final == unseen.loss_final


def test_probes_read_the_pass_of_the_task_and_no_other(tiny):
    config = replace(tiny, probe_every=1, steps=1, warmup_steps=0)
    plain = train_run(config).curves
    for changes in ({"shaping": "jacobian", "shaping_every": 1, "shaping_alpha": 9.0}, {"sam_rho": 3.0}):
        found = train_run(replace(config, **changes)).curves
        for name, values in plain.items():
            if name.startswith(("attention", "qk", "q_", "k_", "output", "logit", "log_z", "parameter")):
                assert found[name] == values, name


@pytest.mark.parametrize("kreiss", [False, True])
def test_spectra_are_the_profiles_means_and_layers_at_their_steps(tiny, batches, kreiss):
    config = replace(tiny, spectra_every=4, batch_size=32, steps=8, spectra_kreiss=kreiss)
    curves = train_run(config).curves
    assert curves["spectra_step"] == [0, 4, 7]
    model = models.build(config, data.vocab_size(config))
    table = koopman.profile(model, batches[0][:, :-1], kreiss=kreiss).table()
    assert ("kreiss_scaled" in curves) is kreiss and "kreiss" not in curves
    for name in [name for name in train.SPECTRA if kreiss or name != "kreiss_scaled"]:
        assert curves[name][0] == pytest.approx(table[name].mean())
        assert [curves[f"{name}/block{i}"][0] for i in range(2)] == pytest.approx(table[name].to_list())
        assert len(curves[name]) == len(curves[f"{name}/block1"]) == 3


@pytest.mark.parametrize("changes, known", [
    ({"lr": 1e30, "warmup_steps": 0, "clip_norm": None, "norm": "no_norm"}, [True, False]),
    ({"residual": "rezero", "steps": 2, "norm": "no_norm"}, [False, True])])
def test_spectra_that_cannot_be_had_are_missing(tiny, changes, known):
    """Of states that are not finite, and of layers that leave all states as they are."""
    curves = train_run(replace(tiny, spectra_every=1, **changes)).curves
    assert curves["spectra_step"] == [0, 1]
    assert [math.isfinite(value) for value in curves["near_unit_mass"]] == known
    assert {len(curves[f"near_unit_mass/block{i}"]) for i in range(tiny.n_layers)} == {2}


def test_the_curves_of_shaped_runs_are_read_back_at_their_steps(tiny):
    config = replace(tiny, shaping="kss", shaping_every=2, spectra_every=3, steps=120, warmup_steps=5, lr=1e-3,
                     n_layers=1)
    result = train_run(config)
    table = runs.frame([runs.to_row(result, "cpu")])
    penalty, mass = (runs.curve(table, name) for name in ("penalty", "near_unit_mass/block0"))
    assert list(mass["step"]) == result.curves["spectra_step"]
    assert list(mass["value"]) == pytest.approx(result.curves["near_unit_mass"], rel=1e-4)
    assert list(penalty["step"]) == list(runs.curve(table, "loss")["step"]) and len(penalty) < 120
    assert list(penalty["value"]) == pytest.approx([result.curves["penalty"][i] for i in penalty["step"]], rel=1e-4)
    assert list(runs.curve(table, "skipped_layers")["value"]) == [0] * len(penalty)


# losses

def test_loss_terms_are_cross_entropy_and_the_z_loss_of_the_paper():
    """Sec. 3.1.2: z-loss is the mean of log^2 Z with Z the sum of exponentials of one token's logits."""
    logits, targets = 3 * torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    loss, objective = loss_terms(logits, targets, 0.3)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    squares = [math.log(sum(map(math.exp, row))) ** 2 for row in logits.flatten(0, 1).tolist()]
    assert float(objective - loss) == pytest.approx(0.3 * sum(squares) / len(squares), rel=1e-4)
    assert torch.equal(*loss_terms(logits, targets, 0.0))


def test_losses_of_bf16_logits_are_computed_in_fp32():
    logits, targets = torch.randn(2, 5, 11).bfloat16(), torch.randint(11, (2, 5))
    loss, objective = loss_terms(logits, targets, 0.1)
    assert loss.dtype == objective.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))


def test_losses_stay_finite_where_exponentials_overflow():
    logits, targets = torch.tensor([[[1e4, 0.0, -1e4]]]), torch.tensor([[1]])
    loss, objective = loss_terms(logits, targets, 1.0)
    assert float(loss) == 1e4 and float(objective) == 1e4 + 1e8


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_validation_loss_is_the_mean_over_tokens_whatever_the_batch(tiny, batch_size):
    model = models.build(tiny, 84)
    windows = data.validation(tiny)
    with torch.no_grad():
        expected = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    found, _ = train.evaluate(model, windows, replace(tiny, batch_size=batch_size), "cpu")
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("changes", [
    {}, {"data": "recall"}, {"data": "digits", "seq_len": 64, "positions": "learned"}], ids=str)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_accuracy_is_the_share_of_scored_tokens_with_the_largest_logit(tiny, changes, batch_size):
    config = replace(tiny, **changes)
    model = models.build(config, data.vocab_size(config))
    windows, scored = data.validation(config).clone(), config.scored_positions
    with torch.no_grad():
        best = model(windows[:, :-1])[:, -scored:].argmax(-1)
    right = torch.rand(best.shape) < 0.4
    windows[:, -1] = torch.where(right, best, (best + 1) % data.vocab_size(config))[:, -1]
    expected = (windows[:, -scored:] == best).float().mean()
    _, found = train.evaluate(model, windows, replace(config, batch_size=batch_size), "cpu")
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_a_vision_transformer_learns_digits(tiny):
    config = replace(tiny, data="digits", seq_len=64, positions="learned", batch_size=32, eval_sequences=100, steps=80,
                     lr=0.01)
    result = train_run(config)
    assert result.loss_final < result.loss_init - 1
    assert result.accuracy_final > 0.6


# a run that blows up is a result

@pytest.mark.parametrize("changes, stop_step, reason", [
    ({"lr": 1e30, "warmup_steps": 0, "clip_norm": None}, 1, "loss is not finite"),
    ({"lr": 1e30, "warmup_steps": 0, "qk_norm": "none", "precision": "bf16"}, 1, "loss is not finite"),
    ({"z_loss": 1e38}, 0, "gradient norm is not finite"),
    ({"lr": 1e30, "warmup_steps": 0, "steps": 1}, 1, "final validation loss is not finite"),
    ({"diverge_loss": 1.0}, 0, "loss over 1"),
    ({"diverge_grad_norm": 1e-3}, 0, "gradient norm over 0.001"),
    ({"diverge_loss": 100.0, "lr": 1e4, "clip_norm": None, "probe_every": 1}, 1, "loss over 100"),
])
def test_a_run_that_blows_up_ends_with_its_step_and_reason(tiny, changes, stop_step, reason):
    result = train_run(replace(tiny, **changes))
    assert (result.status, result.stop_step, result.reason) == ("diverged", stop_step, reason)
    assert math.isfinite(result.loss_init)
    n_steps = min(stop_step + 1, result.config.steps)
    assert [len(result.curves[name]) for name in ("step", "loss", "gradient_norm")] == [n_steps] * 3
    assert len({len(values) for name, values in result.curves.items() if "/" in name or name == "probe_step"}) <= 1


def test_the_step_that_blew_up_is_in_the_curves_and_not_in_the_weights(tiny):
    config = replace(tiny, lr=1e4, clip_norm=None, diverge_loss=100.0, warmup_steps=0)
    result = train_run(config)
    assert result.stop_step == 1 and result.curves["loss"][0] < 100 < result.curves["loss"][1]
    assert train_run(replace(tiny, diverge_loss=1.0)).loss_final == train_run(tiny).loss_init


def test_a_loss_that_is_not_finite_at_the_end_is_recorded_as_nan(tiny):
    result = train_run(replace(tiny, lr=1e30, warmup_steps=0))
    assert math.isnan(result.loss_final) and not math.isfinite(result.curves["loss"][-1])


def test_a_bad_but_finite_run_is_no_divergence_unless_a_threshold_says_so(tiny):
    config = replace(tiny, lr=30, warmup_steps=0, clip_norm=None)
    result = train_run(config)
    assert result.status == "ok" and result.loss_final > 100
    assert train_run(replace(config, diverge_loss=100.0)).status == "diverged"


def test_thresholds_that_are_not_passed_change_nothing(tiny):
    watched = replace(tiny, diverge_loss=1e3, diverge_grad_norm=1e3)
    assert outcome(train_run(watched)) == outcome(train_run(tiny))


# what cannot be run is refused before training

@pytest.mark.parametrize("changes", [
    {"vocab_size": 10**12}, {"data": "recall", "vocab_size": 10**12}, {"data": "recall", "seq_len": 10**12},
    {"batch_size": 10**12}, {"data": "recall", "eval_sequences": 10**13}, {"mlp_ratio": 10**12},
    {"tokenizer": "bpe", "vocab_size": 10**12}, {"d_model": 2**20}], ids=str)
def test_a_run_beyond_the_memory_of_the_device_is_refused_with_what_to_lower(tiny, changes):
    name = [*changes][-1]
    with pytest.raises(ValueError, match=f"needs at least .* GB and cpu has .*: lower .*{name} {changes[name]}"):
        train_run(replace(tiny, **changes))


@pytest.mark.parametrize("changes", [
    {}, {"optimizer": "lion", "n_layers": 1}, {"n_layers": 0, "vocab_size": 90},
    {"biases": True, "mlp_ratio": 7, "vocab_size": 200},
    {"data": "digits", "seq_len": 64, "patch_size": 4}, {"data": "recall", "vocab_size": 64},
    {"mlp": "kan"}, {"mlp": "kan", "mlp_ratio": 1, "grid_size": 20}], ids=str)
def test_the_memory_that_is_asked_for_is_no_more_than_weights_gradients_moments_and_activations(tiny, changes):
    """Counted here: what autograd saves for the backward pass of the loss, and all parameters."""
    config = replace(tiny, **changes)
    model = models.build(config, data.vocab_size(config))
    batch, saved = data.sample(config, torch.Generator().manual_seed(0)), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_terms(*train.scored(config, model(batch[:, :-1]), batch), 0.1)[1]
        weights = sum(p.numel() for p in model.parameters())
        moments = 1 if config.optimizer == "lion" else 2
        most = sum(saved.values()) + 4 * (1 + moments) * weights + 8 * (batch.numel() + data.validation(config).numel())
    assert loss.requires_grad and 0.3 * most < models.least_memory(config) <= most


def test_runs_of_many_steps_start_at_once(tiny, monkeypatch):
    class Started(Exception):
        pass

    def start(*_):
        raise Started
    monkeypatch.setattr(data, "sample", start)
    with pytest.raises(Started):
        train_run(replace(tiny, steps=10**8, probe_every=1, spectra_every=1))


# devices

@pytest.fixture
def only_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_an_unknown_device_is_named_with_the_known_ones(tiny):
    with pytest.raises(ValueError, match=r"unknown device 'gpu': .*choose auto, cpu, cuda or mps"):
        train_run(tiny, device="gpu")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_absent_device_is_named_with_those_present(tiny, only_cpu, device):
    with pytest.raises(ValueError, match=f"device '{device}' is not available here: choose auto or cpu"):
        train_run(tiny, device=device)


def test_auto_is_cuda_where_there_is_one_and_never_mps(monkeypatch, only_cpu):
    assert resolve_device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == "cpu" and resolve_device("mps") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda" and resolve_device("cpu") == "cpu"


def test_auto_trains_as_the_device_it_stands_for(tiny, only_cpu):
    assert outcome(train_run(tiny, device="auto")) == outcome(train_run(tiny, device="cpu"))
