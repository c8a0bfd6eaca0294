import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from sweeps import THREE, Dying, Serial, Untouched, keys, keys_in
from torch.utils._python_dispatch import TorchDispatchMode

from stability_lib import data, models, replicas, runs, train
from stability_lib.config import CHOICES, RunConfig, grid, replace, run_key
from stability_lib.replicas import batches, train_replicas
from stability_lib.train import train_run


@pytest.fixture
def double(monkeypatch):
    """Runs in float64, where rounding is far below 1e-8."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda config, vocab: build(config, vocab).double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def assert_same(found: train.RunResult, single: train.RunResult, rel: float = 1e-8) -> None:
    """Training enlarges rounding, on one CPU to 1.2e-9 in 43 steps of the model that is nearest to failing."""
    for name in ("config", "status", "stop_step", "reason"):
        assert getattr(found, name) == getattr(single, name)
    assert [*found.curves] == [*single.curves] and len(found.patterns) == len(single.patterns)
    near = dict(rel=rel, abs=rel, nan_ok=True)
    for name, values in single.curves.items():
        assert found.curves[name] == pytest.approx(values, **near), name
    for name in ("loss_init", "loss_final", "accuracy_final"):
        assert getattr(found, name) == pytest.approx(getattr(single, name), **near), name
    for here, there in zip(found.patterns, single.patterns, strict=True):
        torch.testing.assert_close(torch.tensor(here), torch.tensor(there), rtol=1e-6, atol=1e-6)


# the trajectory of a replica is that of its single run

@pytest.mark.parametrize("changes", [
    {"attention_maps": 3}, {"norm": "rmsnorm", "qk_norm": "none", "decay": "pytorch", "weight_decay": 0.1},
    {"norm": "post_ln", "qk_norm": "model", "residual": "scaled"}, {"norm": "deepnorm", "positions": "learned"},
    {"norm": "deepnorm_pre", "init": "xavier", "biases": True, "n_layers": 1}, {"norm": "subln", "init": "gpt2"},
    {"qk_norm": "head_fixed"},
    {"norm": "no_norm", "residual": "rezero", "init": "pytorch", "biases": True},
    {"attention": "squared_relu", "parametrization": "mup_simple", "base_width": 8, "attention_maps": 2},
    {"attention_cap": 2.0, "qk_norm": "none", "attention_maps": 2}, {"attention_gate": True, "attention_cap": 50.0},
    {"parametrization": "mup_intermediate", "base_width": 8, "z_loss": 0.0, "clip_norm": None},
    {"parametrization": "mup_full", "base_width": 8, "decay": "pytorch", "weight_decay": 0.1},
    {"data": "recall", "logit_transplant": 1.0}, {"data": "synthetic_lm", "vocab_size": 64},
    {"data": "mnist", "seq_len": 144, "patch_size": 4, "pooling": "class_token", "steps": 10},
    {"data": "digits", "seq_len": 64, "attention_maps": 2},
    {"tokenizer": "bpe", "vocab_size": 300, "data": "a text"}, {"n_layers": 0, "attention_scale": "1/d_h"}], ids=str)
def test_a_replica_follows_its_single_run(tiny, double, tmp_path, changes):
    if changes.get("data") == "a text":
        changes = changes | {"data": str(tmp_path / "text.txt")}
        (tmp_path / "text.txt").write_bytes(b"to be, or not to be: that is the question\n" * 99)
    base = data.pin(replace(tiny, **dict(steps=50, probe_every=7) | changes))
    configs = [replace(base, seed=seed, lr=lr) for seed, lr in ((0, 0.01), (1, 0.003), (1, 0.001))]
    for found, config in zip(train_replicas(configs), configs, strict=True):
        assert_same(found, train_run(config))
        assert found.replicas == 3


def test_replicas_differ_in_every_number_of_the_training_step(tiny, double):
    """eps near the gradients makes Adam see their scale, so that clipping shows."""
    base = replace(tiny, steps=50, probe_every=10, eps=0.01)
    configs = [base, *(replace(base, **{name: value}) for name, value in {
        "seed": 5, "lr": 0.1, "lr_final": 5e-3, "warmup_steps": 10, "beta1": 0.5, "beta2": 0.0, "eps": 1e-3,
        "eps_late": 1e-4, "weight_decay": 0.1, "clip_norm": 0.1, "z_loss": 0.1, "diverge_loss": 4.0,
        "diverge_grad_norm": 0.5}.items())]
    assert {f.name for f in dataclasses.fields(base) if len({getattr(c, f.name) for c in configs}) > 1} == {
        *replicas.NUMBERS, "z_loss"}
    singles = [train_run(config) for config in configs]
    assert len({str((single.curves, single.reason)) for single in singles}) == len(configs)
    for found, single in zip(train_replicas(configs), singles, strict=True):
        assert_same(found, single)


@pytest.mark.parametrize("precision, near", [("fp32", 2e-4), ("bf16", 0.03)])
def test_replicas_train_in_the_precision_of_the_run(tiny, precision, near):
    configs = [replace(tiny, seed=seed, precision=precision, probe_every=2) for seed in range(2)]
    for found, config in zip(train_replicas(configs), configs, strict=True):
        single = train_run(config)
        assert found.curves["loss"] == pytest.approx(single.curves["loss"], rel=near)
        assert found.curves["attention_logit_max/block1"] == pytest.approx(
            single.curves["attention_logit_max/block1"], rel=10 * near)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_attention_is_one_fused_call_for_all_replicas(tiny, monkeypatch, precision, dtype):
    seen, fused = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        mixed = fused(q, k, v, **options)
        seen.append((q.shape, mixed.dtype, mixed.requires_grad))
        return mixed
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    train_replicas([replace(tiny, seed=seed, precision=precision, steps=2) for seed in range(3)])
    folded = (3 * tiny.batch_size, tiny.n_heads, tiny.seq_len, tiny.d_head)
    trained = [call for call in seen if call[2]]
    assert trained == [(folded, dtype, True)] * 2 * tiny.n_layers
    assert {shape for shape, *_ in seen} == {folded}


def test_a_step_waits_for_the_device_once(tiny, monkeypatch):
    configs = [replace(tiny, seed=seed) for seed in range(3)]
    learner = replicas.Replicas(configs, data.vocab_size(tiny), "cpu")
    batch = learner.draw()
    waits = []
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        def noted(tensor, name=name, real=getattr(torch.Tensor, name)):  # noqa: B008
            waits.append(name)
            return real(tensor)
        monkeypatch.setattr(torch.Tensor, name, noted)
    train.take_step(learner, 3, batch)
    assert waits == ["tolist"]


def test_replicas_do_not_depend_on_what_the_caller_has_set_and_leave_it(tiny):
    configs = [replace(tiny, seed=seed, init="pytorch", biases=True) for seed in range(2)]
    expected = [result.curves for result in train_replicas(configs)]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert [result.curves for result in train_replicas(configs)] == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(random, torch.get_rng_state()) and threads == torch.get_num_threads()


# a replica that blows up ends and reaches no other

def test_a_replica_that_blows_up_ends_with_its_step_and_reason_and_reaches_no_other(tiny, double):
    base = replace(tiny, steps=12, probe_every=1, attention_maps=12)
    wild = dict(lr=1e30, warmup_steps=0, clip_norm=None)
    configs = [base, replace(base, **wild), replace(base, diverge_loss=1.0), replace(base, seed=3, lr=0.03),
               replace(base, seed=1, diverge_grad_norm=1.5), replace(base, seed=2, **wild)]
    singles = [train_run(config) for config in configs]
    assert len({(single.stop_step, single.reason) for single in singles}) >= 4
    for found, single in zip(train_replicas(configs), singles, strict=True):
        assert_same(found, single)


def test_replicas_that_all_blow_up_end_at_once(tiny):
    configs = [replace(tiny, seed=seed, steps=10**8, diverge_loss=1.0) for seed in range(2)]
    for result in train_replicas(configs):
        assert (result.status, result.stop_step, result.reason) == ("diverged", 0, "loss over 1")
        assert len(result.curves["loss"]) == 1 and result.loss_final == result.loss_init


def test_a_replica_whose_last_update_ruined_it_has_diverged(tiny):
    good, bad = train_replicas([replace(tiny, steps=1, warmup_steps=0, lr=lr) for lr in (0.01, 1e30)])
    assert (bad.status, bad.stop_step, bad.reason) == ("diverged", 1, "final validation loss is not finite")
    assert math.isnan(bad.loss_final) and good.status == "ok" and math.isfinite(good.loss_final)


# batches

def test_batches_hold_what_differs_in_numbers_only_in_the_order_of_the_configs(tiny):
    configs = grid(tiny, seed=range(2), qk_norm=["none", "head"], lr=[0.1, 0.01])
    found = batches(configs)
    assert found == [[c for c in configs if c.qk_norm == qk_norm] for qk_norm in ("none", "head")]
    assert batches([]) == []


def test_what_shapes_the_computation_is_never_batched(tiny):
    other = {name: choices[-1] for name, choices in CHOICES.items()}
    other |= {"data": "recall", "data_digest": "a", "vocab_size": 300, "n_layers": 1, "d_model": 32, "n_heads": 1,
              "seq_len": 16, "logit_transplant": 1.0, "patch_size": 1, "base_width": 8, "attention_maps": 1,
              "spectra_every": 2, "spectra_kreiss": True, "biases": True, "probe_every": 3, "z_loss": 0.0, "steps": 7,
              "recall_pairs": 2, "eval_sequences": 9, "batch_size": 5, "mlp_ratio": 2, "rope_base": 10.0,
              "layernorm_eps": 1e-5, "gradient_penalty": 0.1, "sam_rho": 0.1, "shaping_alpha": 2.0,
              "shaping_every": 3, "shaping_beta": 2.0, "state_size": 8, "conv_width": 2, "expansion": 1, "experts": 4,
              "top_k": 1, "load_balance": 0.0, "grid_size": 8, "spline_order": 2, "attention_cap": 50.0,
              "attention_gate": True, "qk_clip": 100.0, "signals_every": 2, "sharpness_every": 3, "alarm_above": 2.0,
              "roll_back_by": 5}
    fields = {f.name for f in dataclasses.fields(RunConfig)} - {*replicas.NUMBERS}
    assert fields == {*other}
    base = {"data_digest": dict(data="text.txt"), "tokenizer": dict(vocab_size=300), "qk_clip": dict(qk_norm="none"),
            "alarm": dict(signals_every=1)}
    for name, value in other.items():
        config = replace(tiny, **base.get(name, {}))
        changed = replace(config, **{name: value})
        assert changed != config and len(batches([config, changed])) == 2, name


@pytest.mark.parametrize("changes", [
    {"optimizer": "lion"}, {"optimizer": "lamb"}, {"sam_rho": 0.1}, {"gradient_penalty": 0.1}, {"shaping": "kss"},
    {"spectra_every": 2}, {"reparametrization": "spectral_norm"}, {"reparametrization": "weight_norm"},
    {"reparametrization": "sigma_reparam"}, {"optimizer": "muon"}, {"qk_lr": "other_norm"},
    {"qk_clip": 2.0, "qk_norm": "none"}], ids=str)
def test_what_cannot_be_a_replica_trains_alone_as_ever(tiny, changes):
    configs = [replace(tiny, seed=seed, **changes) for seed in range(2)]
    assert batches(configs) == [[config] for config in configs]
    (found,), single = train_replicas(configs[:1]), train_run(configs[0])
    assert found.curves == single.curves and found.replicas == 1
    with pytest.raises(ValueError, match=r"cannot train together .*'seed': 1.*group them by replicas\.batches"):
        train_replicas(configs)


def test_one_run_and_none_are_batches_too(tiny):
    (found,) = train_replicas([tiny])
    assert found.curves == train_run(tiny).curves and train_replicas([]) == []


def test_what_cannot_be_run_is_refused_as_by_a_single_run(tiny):
    with pytest.raises(ValueError, match="vocab_size 3 is below"):
        train_replicas([replace(tiny, seed=seed, vocab_size=3) for seed in range(2)])


@pytest.mark.parametrize("step, size", [((0.0, 0.09), 3), ((0.2, 0.049), 6), ((10.0, 1.0), 12), ((0.0, 1e-9), 15),
                                        ((0.0, 9.0), 2)])
def test_a_batch_is_bounded_in_time_and_memory(tiny, monkeypatch, step, size):
    """By 300 ms a step, or twice a run's time where that is more, and memory for 15 runs."""
    monkeypatch.setattr(replicas, "LIMIT", 0.3 * tiny.steps)
    monkeypatch.setattr(replicas, "step_seconds", lambda config, device: step)
    monkeypatch.setattr(train, "memory", lambda device: 15.5 * models.least_memory(tiny))
    assert replicas.most(tiny, "cpu") == size


def test_a_batch_fits_the_largest_grid_of_a_cuda_kernel(tiny, monkeypatch):
    monkeypatch.setattr(replicas, "step_seconds", lambda config, device: (0.0, 1e-9))
    monkeypatch.setattr(train, "memory", lambda device: math.inf)
    assert replicas.most(replace(tiny, batch_size=32), "cpu") == 2047


@pytest.mark.parametrize("most, sizes", [(1, [1] * 7), (2, [1, 2, 2, 2]), (4, [3, 4]), (7, [7]), (99, [7])])
def test_batches_on_a_device_are_alike_in_size_and_no_larger_than_most(tiny, monkeypatch, most, sizes):
    monkeypatch.setattr(replicas, "most", lambda config, device: most)
    configs = grid(tiny, seed=range(7))
    found = batches(configs, "cpu")
    assert [config for batch in found for config in batch] == configs and [len(batch) for batch in found] == sizes


@pytest.mark.parametrize("workers, sizes", [(1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (9, [1] * 7)])
def test_batches_leave_something_for_every_worker(tiny, monkeypatch, workers, sizes):
    monkeypatch.setattr(replicas, "most", lambda config, device: 99)
    assert [len(batch) for batch in batches(grid(tiny, seed=range(7)), "cpu", workers)] == sizes


def test_the_time_of_a_step_is_measured_for_any_shape(tiny):
    overhead, each = replicas.step_seconds(replicas.shape(replace(tiny, data="recall", attention_maps=3)), "cpu")
    assert overhead >= 0 and each > 0


def test_eight_replicas_that_hardly_take_longer_than_two_say_nothing_of_the_rate(tiny, monkeypatch):
    """As on a GPU that waits for its launches: 1 s, or 50 ms a replica where that is more."""
    tried = []
    monkeypatch.setattr(replicas, "_fastest_step", lambda config, n, device: (tried.append(n), max(1.0, 0.05 * n))[1])
    replicas.step_seconds.cache_clear()
    each = replicas.step_seconds(replicas.shape(tiny), "cpu")[1]
    replicas.step_seconds.cache_clear()
    assert tried == [2, 8, 32] and each == pytest.approx(0.02)


@pytest.mark.parametrize("changes, alone", [
    ({}, False), ({"precision": "bf16", "n_layers": 3}, False), ({"optimizer": "lion"}, True),
    ({"shaping": "kss", "shaping_every": 1}, True), ({"gradient_penalty": 0.1}, True), ({"sam_rho": 0.1}, True),
    ({"reparametrization": "spectral_norm"}, True), ({"reparametrization": "sigma_reparam"}, True),
    ({"optimizer": "muon"}, True), ({"qk_lr": "other_norm"}, True), ({"qk_clip": 100.0, "qk_norm": "none"}, True),
    ({"optimizer": "muon", "qk_clip": 1.0, "qk_norm": "none"}, True)])
def test_the_operations_of_a_step_are_about_as_many_as_are_dispatched(tiny, changes, alone):
    class Counted(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += 1
            return function(*args, **(kwargs or {}))

    config, vocab = replace(tiny, **changes), data.vocab_size(tiny)
    assert replicas.trains_with_others(config) != alone
    learner = train.Single(config, vocab, "cpu") if alone else replicas.Replicas(
        grid(config, seed=range(2)), vocab, "cpu")
    with train.alone("cpu", 1):
        train.take_step(learner, 1, learner.draw())
        with Counted() as counted:
            train.take_step(learner, 2, learner.draw())
    assert 0.6 < replicas.operations(config) / counted.n < 1.5


def test_the_reckoned_time_is_that_of_batches_of_what_trains_together_and_of_the_rest_one_by_one():
    speed = replicas.Speed(launch=1e-5, flops_at_64=1e12, flops_at_512=8e12, flops_fp32=1e12, memory=1e12)
    base = RunConfig(d_model=256, n_layers=2, steps=1000, precision="bf16")
    flops = models.training_flops(base, data.vocab_size(base))
    made = 1e-7 * models.n_params(base)
    together = 1000 * 1e-5 * (2 * 224 + 150)
    assert replicas.reckoned_seconds(grid(base, seed=range(2), lr=[0.01, 0.1]), speed) == pytest.approx(
        together + 4 * (flops / 4e12 + 1000 * 5e-5 + made))
    assert replicas.reckoned_seconds(grid(base, seed=range(2), optimizer=["lion"], precision=["fp32"]), speed) == (
        pytest.approx(2 * (1000 * 1e-5 * (2 * 144 + 90) + flops / 1e12 + 1000 * 5e-5 + made)))
    many = replicas.reckoned_seconds(grid(base, seed=range(200)), speed)
    assert many >= 2 * together + 200 * flops / 4e12  # no batch takes longer than LIMIT


# memory

def short_of_memory(monkeypatch, most: int) -> list[int]:
    """Replicas that run out of memory at the first step where there are more than `most`; the sizes tried."""
    tried, losses = [], replicas.Replicas.losses

    def scarce(learner, step, batch, probe):
        if step == 0:
            tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses(learner, step, batch, probe)
    monkeypatch.setattr(replicas.Replicas, "losses", scarce)
    return tried


def test_where_memory_runs_out_a_batch_is_halved_and_tried_again(tiny, double, monkeypatch):
    configs = grid(tiny, seed=range(7))
    singles = [train_run(config) for config in configs]
    tried = short_of_memory(monkeypatch, 2)
    found = train_replicas(configs)
    assert tried == [7, 3, 2, 4, 2, 2]
    assert [result.replicas for result in found] == [1, 2, 2, 2, 2, 2, 2]
    for result, single in zip(found, singles, strict=True):
        assert_same(result, single)


def test_the_time_of_a_step_can_be_told_where_eight_replicas_find_no_memory(tiny, monkeypatch):
    tried = short_of_memory(monkeypatch, 4)
    overhead, each = replicas.step_seconds(replicas.shape(replace(tiny, seq_len=9)), "cpu")
    assert tried == [2, 8] and overhead == 0 and each > 0


@pytest.mark.parametrize("words", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                                   "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory"])
def test_libraries_say_in_their_own_words_that_memory_ran_out(tiny, monkeypatch, words):
    together = replicas._train

    def scarce(configs, device):
        if len(configs) > 2:
            raise RuntimeError(words)
        return together(configs, device)
    monkeypatch.setattr(replicas, "_train", scarce)
    assert [result.replicas for result in train_replicas(grid(tiny, seed=range(4)))] == [2] * 4


def test_other_errors_are_not_taken_for_a_want_of_memory(tiny, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image is available")
    monkeypatch.setattr(replicas.Replicas, "losses", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        train_replicas(grid(tiny, seed=range(2)))


# ensure

@pytest.fixture
def accelerator(monkeypatch, no_progress_bar):
    """`ensure` takes this CPU for a cuda device that trains up to 4 replicas together."""
    monkeypatch.setattr(runs, "resolve_device", lambda device: device)
    monkeypatch.setattr(runs, "prepare", lambda config, device: None)
    monkeypatch.setattr(runs, "estimate_seconds", lambda configs, device: 1.0)
    monkeypatch.setattr(train, "resolve_device", lambda device: "cpu")
    monkeypatch.setattr(replicas, "most", lambda config, device: 4)


SIX = [*THREE, *(replace(config, seed=1) for config in THREE)]


def test_ensure_trains_replicas_on_an_accelerator_and_says_how_many(store, accelerator):
    alone = replace(THREE[0], shaping="kss")
    table = runs.ensure([*SIX, alone], store, device="cuda", executor=Serial())
    assert [made["replicas"] for made in table["provenance"]] == [3] * 6 + [1]
    assert keys([*SIX, alone]) == table["key"].tolist() == sorted(keys_in(store.local), key=table["key"].tolist().index)
    for config, row in zip(SIX, table.itertuples(), strict=False):
        assert row.curves["loss"] == pytest.approx(train_run(config).curves["loss"], rel=1e-3)
    runs.ensure(SIX, store, device="cuda", executor=Untouched())


def test_how_many_fit_is_measured_where_runs_are_trained(store, accelerator, monkeypatch):
    """A head node has no accelerator to measure on."""
    executor, there = Serial(), []
    submit, batches = executor.submit, replicas.batches

    def submitted(work, *given):
        there.append(True)
        try:
            return submit(work, *given)
        finally:
            there.pop()
    executor.submit = submitted
    monkeypatch.setattr(replicas, "batches", lambda *given: batches(*given) if there or len(given) < 2 else 1 / 0)
    table = runs.ensure(SIX, store, device="cuda", executor=executor)
    assert [made["replicas"] for made in table["provenance"]] == [3] * 6


def test_on_the_cpu_each_run_trains_by_itself(store, no_progress_bar):
    executor = Serial()
    table = runs.ensure(THREE, store, executor=executor)
    assert len(executor.trained) == 3 and [made["replicas"] for made in table["provenance"]] == [1] * 3


def test_the_progress_bar_counts_runs(store, accelerator, monkeypatch):
    counted, bar = [], runs.tqdm

    class Noted(bar):
        def update(self, n=1):
            counted.append(n)
            return super().update(n)
    monkeypatch.setattr(runs, "tqdm", Noted)
    runs.ensure(SIX, store, device="cuda", executor=Serial())
    assert counted == [3, 3]


def test_a_batch_that_fails_names_its_runs_and_other_batches_are_kept(store, accelerator, monkeypatch):
    losses = replicas.Replicas.losses

    def broken(learner, *given):
        if learner.config.n_heads == 2:
            raise MemoryError("no room for 3 GB")
        return losses(learner, *given)
    monkeypatch.setattr(replicas.Replicas, "losses", broken)
    failing = [replace(config, n_heads=2) for config in THREE]
    with pytest.raises(RuntimeError, match=r"the runs .*'lr': 0.1.*; .*'lr': 0.03.* failed with MemoryError: no room"):
        runs.ensure([*failing, *THREE], store, device="cuda", executor=Serial())
    assert sorted(keys_in(store.local)) == sorted(keys(THREE))


class DyingBatches(Dying):
    """Trains the first `n` batches."""

    def submit(self, work, given, *more):
        future = super().submit(work, given, *more)
        self.n -= isinstance(given, list)
        return future


def test_a_worker_that_dies_loses_its_batch_and_nothing_else(store, accelerator, monkeypatch):
    pools = [DyingBatches(1), DyingBatches(9)]
    monkeypatch.setattr(runs.loky, "get_reusable_executor", lambda **options: pools.pop(0))
    table = runs.ensure(SIX, store, device="cuda")
    assert not pools and len(keys_in(store.local)) == 6
    assert [json.loads(line)["provenance"]["replicas"] for line in store.local.read_bytes().splitlines()] == [3] * 6
    assert table["key"].tolist() == keys(SIX)


def test_a_row_of_another_run_is_never_written_and_the_rest_of_its_batch_is(store, accelerator):
    class Wrong(Serial):
        def submit(self, work, given, *more):
            future = super().submit(work, given, *more)
            if work is runs._work:
                future.result()[1]["key"] = "0" * 16
            return future
    with pytest.raises(runs.StoreError, match=r"key 0{16}"):
        runs.ensure(THREE, store, device="cuda", executor=Wrong())
    assert len(keys_in(store.local)) == 2 and run_key(THREE[0]) in keys_in(store.local)


def test_too_few_rows_of_a_batch_are_an_error_that_names_its_runs(store, accelerator):
    class Short(Serial):
        def submit(self, work, given, *more):
            future = super().submit(work, given, *more)
            if work is runs._work:
                future.result().pop()
            return future
    with pytest.raises(RuntimeError, match=r"the runs .*'lr': 0\.1"):
        runs.ensure(THREE, store, device="cuda", executor=Short())
    assert len(keys_in(store.local)) == 2
