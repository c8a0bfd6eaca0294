import dataclasses
import hashlib
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stability_lib.config import (
    CHOICES,
    RunConfig,
    _listed,
    from_dict,
    grid,
    non_default,
    replace,
    run_key,
    unknown,
)

DEFAULTS = {
    "seed": 0, "data": "shakespeare", "vocab_size": None, "seq_len": 64, "batch_size": 32, "eval_sequences": 256,
    "d_model": 64, "n_layers": 3, "n_heads": 4, "mlp_ratio": 4, "qk_norm": "head", "attention": "softmax",
    "attention_scale": "parametrization", "logit_transplant": None, "rope_base": 10_000.0, "layernorm_eps": 1e-6,
    "parametrization": "standard", "base_width": 256, "lr": 1e-2, "steps": 400, "warmup_steps": 20, "lr_final": 1e-5,
    "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1e-4, "decay": "independent", "clip_norm": 1.0,
    "z_loss": 1e-4, "precision": "fp32", "diverge_loss": None, "diverge_grad_norm": None, "probe_every": 20,
    "attention_maps": 0, "norm": "pre_ln", "positions": "rotary", "biases": False, "init": "fan_in", "recall_pairs": 4,
    "tokenizer": "bytes", "patch_size": 2, "optimizer": "adamw", "residual": "plain", "reparametrization": "none",
    "gradient_penalty": 0.0, "sam_rho": 0.0, "shaping": "none", "shaping_alpha": 0.15, "shaping_every": 10,
    "shaping_beta": 1.0, "shaping_dmd": "pod", "shaping_gradient": "both", "shaping_reduction": "sum",
    "spectra_every": 0, "spectra_kreiss": False, "data_digest": None, "mixer": "attention", "state_size": 16,
    "conv_width": 4, "expansion": 2, "mlp": "gelu", "experts": 8, "top_k": 2, "load_balance": 0.01, "grid_size": 4,
    "spline_order": 3, "pooling": "mean", "attention_cap": None, "attention_gate": False, "qk_lr": "own",
    "qk_clip": None, "signals_every": 0, "sharpness_every": 0, "alarm": "none", "alarm_above": 0.0,
    "on_alarm": "halve_lr", "roll_back_by": 20, "eps_late": None,
}
"""Stored keys leave defaults out, so a changed default would give old results to another computation."""

OTHER = {
    "seed": 1, "data": "c4", "vocab_size": 200, "seq_len": 32, "batch_size": 16, "eval_sequences": 64, "d_model": 128,
    "n_layers": 2, "n_heads": 2, "mlp_ratio": 2, "qk_norm": "none", "attention": "squared_relu",
    "attention_scale": "1/d_h", "logit_transplant": 100.0, "rope_base": 5e5, "layernorm_eps": 1e-5,
    "parametrization": "mup_simple", "base_width": 64, "lr": 0.3, "steps": 500, "warmup_steps": 0, "lr_final": 0.0,
    "beta1": 0.0, "beta2": 0.99, "eps": 1e-15, "weight_decay": 0.1, "decay": "pytorch", "clip_norm": None,
    "z_loss": 0.0, "precision": "bf16", "diverge_loss": 20.0, "diverge_grad_norm": 1e3, "probe_every": 1,
    "attention_maps": 8, "norm": "no_norm", "positions": "learned", "biases": True, "init": "gpt2", "recall_pairs": 2,
    "tokenizer": "bpe", "patch_size": 4, "optimizer": "lion", "residual": "rezero",
    "reparametrization": "weight_norm", "gradient_penalty": 0.1, "sam_rho": 0.05, "shaping": "kss",
    "shaping_alpha": 5.0, "shaping_every": 1, "shaping_beta": 10.0, "shaping_dmd": "random",
    "shaping_gradient": "input", "shaping_reduction": "mean", "spectra_every": 5,
    "spectra_kreiss": True, "mixer": "mamba", "state_size": 8, "conv_width": 2, "expansion": 1, "mlp": "moe",
    "experts": 4, "top_k": 1, "load_balance": 0.0, "grid_size": 8, "spline_order": 2, "pooling": "class_token",
    "attention_cap": 50.0, "attention_gate": True, "qk_lr": "other_norm", "qk_clip": 100.0,
    "signals_every": 2, "sharpness_every": 5, "alarm": "step", "alarm_above": 3.0, "on_alarm": "roll_back",
    "roll_back_by": 5, "eps_late": 1e-3,
}


def test_the_defaults_are_those_the_stored_keys_stand_on():
    assert dataclasses.asdict(RunConfig()) == DEFAULTS


@pytest.mark.parametrize("changes, canonical, key", [
    ({}, '{"config":{},"schema":1}', "7b7871e0e799e48f"),
    ({"qk_norm": "none", "lr": 0.1, "seed": 2},
     '{"config":{"lr":0.1,"qk_norm":"none","seed":2},"schema":1}', "a3eeb400833ee37b"),
    ({"d_model": 128, "lr": 3e-4, "parametrization": "mup_full", "z_loss": 0, "clip_norm": None},
     '{"config":{"clip_norm":null,"d_model":128,"lr":0.0003,"parametrization":"mup_full","z_loss":0.0},"schema":1}',
     "158bd1f0bf5b6f6f"),
    ({"precision": "bf16", "logit_transplant": 1e3, "vocab_size": 200, "attention_maps": 8, "diverge_loss": 20},
     '{"config":{"attention_maps":8,"diverge_loss":20.0,"logit_transplant":1000.0,"precision":"bf16",'
     '"vocab_size":200},"schema":1}', "f8131c6765ba0f32"),
])
def test_golden_keys(changes, canonical, key):
    assert hashlib.sha256(canonical.encode()).hexdigest()[:16] == key
    assert run_key(RunConfig(**changes)) == key


def test_every_field_enters_the_key():
    assert OTHER.keys() == DEFAULTS.keys() - {"data_digest"}  # of a text of one's own alone, see the next test
    needs = {"qk_clip": {"qk_norm": "none"}}
    keys = {run_key(RunConfig(**needs.get(name, {}) | {name: value})) for name, value in OTHER.items()}
    assert len(keys | {run_key(RunConfig())}) == len(OTHER) + 1


def test_the_key_of_a_text_of_ones_own_is_that_of_its_content_wherever_it_lies():
    one, moved, edited = (RunConfig(data=path, data_digest=digest) for path, digest in (
        ("/a/x.txt", "0" * 64), ("/b/y", "0" * 64), ("/a/x.txt", "1" * 64)))
    assert run_key(one) == run_key(moved) != run_key(edited)
    assert len({run_key(one), run_key(edited), run_key(RunConfig())}) == 3
    canonical = '{"config":{"data_digest":"' + "0" * 64 + '"},"schema":1}'
    assert hashlib.sha256(canonical.encode()).hexdigest()[:16] == run_key(one)


def test_a_text_of_ones_own_has_no_key_before_it_was_read():
    with pytest.raises(ValueError, match=r"'my.txt' is none of .* and has no data_digest: call data.pin\(config\)"):
        run_key(RunConfig(data="my.txt"))


def test_a_digest_of_a_known_source_is_refused():
    with pytest.raises(ValueError, match="data_digest belongs to a text of one's own, and 'shakespeare' is none"):
        RunConfig(data_digest="0" * 64)


def test_a_field_added_later_with_a_default_keeps_old_keys():
    added = [("dropout", float, 0.0)]
    later = dataclasses.make_dataclass("Later", added, bases=(RunConfig,), frozen=True, kw_only=True)
    assert run_key(later(lr=0.1)) == run_key(RunConfig(lr=0.1))
    assert run_key(later(lr=0.1, dropout=0.5)) != run_key(RunConfig(lr=0.1))


def test_the_key_does_not_depend_on_the_order_of_fields():
    excluding = ("mixer", "mlp", "attention_cap", "qk_lr", "qk_clip", "sharpness_every", "alarm",
                 "eps_late")
    names = [name for name in OTHER if name not in excluding]
    keys = set()
    for seed in range(5):
        random.Random(seed).shuffle(names)
        keys.add(run_key(RunConfig(**{name: OTHER[name] for name in names})))
        keys.add(run_key(from_dict({name: OTHER[name] for name in names})))
    assert len(keys) == 1


@pytest.mark.parametrize("plain, same", [
    ({"lr": 1.0}, {"lr": 1}),
    ({"lr": 1.0}, {"lr": np.int64(1)}),
    ({"lr": 0.1}, {"lr": np.float64(0.1)}),
    ({"lr": 0.5}, {"lr": np.float32(0.5)}),
    ({"diverge_loss": 20.0}, {"diverge_loss": 20}),
    ({"seed": 3}, {"seed": np.int64(3)}),
    ({"seed": 3}, {"seed": np.uint8(3)}),
    ({"vocab_size": 200}, {"vocab_size": np.int32(200)}),
    ({"qk_norm": "none"}, {"qk_norm": np.str_("none")}),
    ({"weight_decay": 0.0}, {"weight_decay": -0.0}),
    ({}, {"lr": 1e-2, "steps": 400, "clip_norm": 1}),
])
def test_equal_values_of_other_types_have_the_same_key(plain, same):
    assert RunConfig(**plain) == RunConfig(**same)
    assert run_key(RunConfig(**plain)) == run_key(RunConfig(**same))
    plain_types = (str, bool, int, float, type(None))
    assert all(type(value) in plain_types for value in dataclasses.asdict(RunConfig(**same)).values())


@given(st.fixed_dictionaries({}, optional={
    "seed": st.integers(0, 2**31), "lr": st.floats(1e-8, 1e3), "weight_decay": st.floats(0, 1),
    "clip_norm": st.none() | st.floats(1e-3, 1e3), "z_loss": st.floats(0, 1),
    **{name: st.sampled_from(values) for name, values in CHOICES.items()
       if name not in ("mixer", "mlp", "qk_lr", "alarm")}}))
def test_the_fields_that_differ_from_the_default_give_the_config_back(changes):
    assume((changes.get("reparametrization"), changes.get("parametrization")) != ("weight_norm", "mup_full"))
    config = RunConfig(**changes)
    assert from_dict(non_default(config)) == config
    assert non_default(config) == {name: value for name, value in sorted(changes.items()) if value != DEFAULTS[name]}


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().lr = 0.1


def test_replace_changes_what_is_named_and_nothing_else():
    changed = replace(RunConfig(seed=3), lr=0.1, qk_norm="none")
    assert dataclasses.asdict(changed) == DEFAULTS | {"seed": 3, "lr": 0.1, "qk_norm": "none"}


def test_grid_is_the_product_of_its_axes_with_the_last_varying_fastest():
    lrs, seeds, norms = [0.3, 0.1], [0, 1, 2], ["head", "none"]
    found = grid(RunConfig(n_layers=1), qk_norm=norms, lr=lrs, seed=seeds)
    assert [(c.qk_norm, c.lr, c.seed) for c in found] == list(itertools.product(norms, lrs, seeds))
    assert all(c.n_layers == 1 for c in found)
    assert len({run_key(c) for c in found}) == len(found)


def test_a_joint_axis_changes_its_fields_together():
    found = grid(RunConfig(), size=[{"d_model": 32, "n_layers": 2}, {"d_model": 96, "n_layers": 5}], lr=[0.01, 0.1])
    assert [(c.d_model, c.n_layers, c.lr) for c in found] == [(32, 2, 0.01), (32, 2, 0.1), (96, 5, 0.01), (96, 5, 0.1)]


def test_grid_without_axes_is_the_base_and_with_an_empty_axis_is_empty():
    assert grid(RunConfig(lr=0.1)) == [RunConfig(lr=0.1)]
    assert grid(RunConfig(), lr=[]) == []


@pytest.mark.parametrize("make", [
    lambda: from_dict({"learning_rat": 0.1, "warmup_step": 3}),
    lambda: replace(RunConfig(), warmup_step=3),
    lambda: grid(RunConfig(), warmup_step=[3]),
    lambda: grid(RunConfig(), size=[{"warmup_step": 3}]),
])
def test_an_unknown_field_is_named_with_the_known_ones(make):
    with pytest.raises(ValueError, match="unknown field") as caught:
        make()
    assert "warmup_steps" in str(caught.value) and "d_model" in str(caught.value)


def test_an_unknown_field_brings_up_the_nearest_known_one():
    with pytest.raises(ValueError, match="unknown field 'warmup_step': did you mean 'warmup_steps'"):
        replace(RunConfig(), warmup_step=3)


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_named_with_the_known_ones(name):
    with pytest.raises(ValueError) as caught:
        RunConfig(**{name: "nonsense"})
    assert all(word in str(caught.value) for word in (name, "'nonsense'", "choose", *CHOICES[name]))


@pytest.mark.parametrize("changes, remedy", [
    ({"steps": "400"}, "steps must be int, got str '400'"),
    ({"lr": "0.1"}, "lr must be float, got str '0.1'"),
    ({"lr": "true"}, "lr must be float, got str 'true'"),
    ({"lr": b"0.1"}, "lr must be float, got bytes"),
    ({"lr": True}, "lr must be float, got bool True"),
    ({"lr": np.True_}, "lr must be float, got bool"),
    ({"lr": None}, "lr must be float, got NoneType None"),
    ({"lr": [0.1]}, r"lr must be float, got list \[0.1\]"),
    ({"steps": True}, "steps must be int, got bool True"),
    ({"steps": 400.0}, "steps must be int, got float 400.0"),
    ({"steps": np.float64(400)}, "steps must be int, got float64"),
    ({"vocab_size": False}, "vocab_size must be int, got bool False"),
    ({"clip_norm": "none"}, "clip_norm must be float, got str 'none'"),
    ({"qk_norm": None}, "qk_norm must be str, got NoneType None"),
    ({"qk_norm": False}, "qk_norm must be str, got bool False"),
    ({"data": 103}, "data must be str, got int 103"),
])
def test_a_value_of_the_wrong_type_is_named_with_the_right_type(changes, remedy):
    with pytest.raises(TypeError, match=remedy):
        RunConfig(**changes)


@pytest.mark.parametrize("changes, remedy", [
    ({"lr": -0.1}, "lr must be positive, got -0.1"),
    ({"lr": 0}, "lr must be positive, got 0.0"),
    ({"lr": math.nan}, "lr must be finite, got nan"),
    ({"lr": math.inf}, "lr must be finite, got inf"),
    ({"weight_decay": -1e-4}, "weight_decay must be zero or more, got -0.0001"),
    ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
    ({"clip_norm": math.inf}, "clip_norm must be finite, got inf"),
    ({"seed": -1}, "seed must be zero or more, got -1"),
    ({"steps": 0}, "steps must be positive, got 0"),
    ({"batch_size": 0}, "batch_size must be positive"),
    ({"vocab_size": 0}, "vocab_size must be positive"),
    ({"eps": 0.0}, "eps must be positive"),
    ({"beta2": 1.0}, "beta1 and beta2 must be below 1"),
    ({"d_model": 64, "n_heads": 5}, "n_heads 5 does not divide d_model 64: choose one of 1, 2, 4, 8, 16 or 32$"),
    ({"d_model": 64, "n_heads": 128}, "n_heads 128 does not divide d_model 64: choose one of"),
    ({"d_model": 24, "n_heads": 8}, "n_heads 8 makes the head size .* = 3 odd: .* choose one of 1, 2, 3, 4, 6 or 12$"),
    ({"d_model": 2, "n_heads": 2}, "n_heads 2 makes the head size .* = 1 odd: .* choose one of 1$"),
    ({"d_model": 33, "n_heads": 3}, "d_model 33 is odd: .* choose an even one"),
    ({"warmup_steps": 401}, "warmup_steps 401 exceeds steps 400: shorten the warm-up"),
    ({"steps": 10}, "warmup_steps 20 exceeds steps 10: shorten the warm-up"),
    ({"n_layers": 0, "attention_maps": 2}, r"attention_maps 2 needs a block .* choose at most 0"),
    ({"n_layers": 0, "shaping": "kss"}, "shaping 'kss' needs blocks: choose 'none', or n_layers 1 or more"),
    ({"n_layers": 0, "reparametrization": "weight_norm"}, "reparametrization 'weight_norm' needs blocks"),
    ({"n_layers": 0, "spectra_every": 5}, "spectra_every 5 needs blocks: choose 0, or n_layers 1 or more"),
    ({"qk_clip": 0.0}, "qk_clip must be positive"), ({"attention_cap": 0.0}, "attention_cap must be positive"),
    ({"qk_clip": 100.0}, "qk_clip 100.0 is not worked out for qk_norm 'head': choose qk_norm 'none', or leave"),
    ({"qk_clip": 9.0, "qk_norm": "none", "attention": "squared_relu"}, "qk_clip 9.0 .* choose attention 'softmax'"),
    ({"qk_clip": 9.0, "qk_norm": "none", "attention_cap": 50.0}, "qk_clip 9.0 .* choose attention_cap None"),
    ({"qk_clip": 9.0, "qk_norm": "none", "reparametrization": "sigma_reparam"}, "choose reparametrization 'none'"),
    ({"qk_clip": 9.0, "qk_norm": "none", "logit_transplant": 3.0}, "choose logit_transplant None"),
    ({"qk_clip": 9.0, "qk_norm": "none", "sam_rho": 0.1}, "choose sam_rho 0.0"),
    ({"qk_clip": 9.0, "qk_norm": "none", "mixer": "mamba"}, "choose mixer 'attention'"),
    ({"attention_cap": 50.0, "attention": "squared_relu"}, "attention_cap 50.0 .* choose attention 'softmax'"),
    ({"attention_gate": True, "mixer": "mamba"}, "attention_gate True .* choose mixer 'attention'"),
    ({"optimizer": "muon", "mlp": "moe"}, "optimizer 'muon' is not worked out for mlp 'moe'"),
    ({"optimizer": "muon", "sam_rho": 0.1}, "optimizer 'muon' is not worked out for sam_rho 0.1: choose sam_rho 0.0"),
    ({"qk_lr": "other_norm", "mixer": "mamba"}, "qk_lr 'other_norm' .* choose mixer 'attention'"),
    ({"qk_lr": "other_norm", "parametrization": "mup_full"}, "norm of W_Q, which is zero at first under mup_full"),
    ({"data": "digits", "vocab_size": 10}, "vocab_size 10 is for text and made-up .* 10 classes: choose None"),
    ({"d_model": 10**9, "n_heads": 3}, "d_model must be at most 1048576, got 1000000000"),
    ({"steps": 10**10}, "steps must be at most 100000000, got 10000000000"),
    ({"n_layers": 10**9}, "n_layers must be at most 10000, got 1000000000"),
    ({"eps": 1e-50}, "eps must be at least 1.2e-38, as it is zero in fp32, got 1e-50"),
    ({"lr": 5e-324}, "lr must be at least 1.2e-38"), ({"lr": 1e300}, r"lr must be at most 1e\+30, got 1e\+300"),
    ({"weight_decay": 1e30}, "weight_decay must be at most 100.0"),
    ({"z_loss": 1e39}, r"z_loss must be at most 3.4e\+38, got 1e\+39"),
])
def test_a_value_that_cannot_be_run_is_named_with_its_remedy(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        RunConfig(**changes)


@pytest.mark.parametrize("name", [name for name, value in DEFAULTS.items() if isinstance(value, (int, float))
                                  and not isinstance(value, bool)])
def test_no_field_takes_a_number_beyond_what_torch_or_fp32_holds(name):
    with pytest.raises(ValueError, match=f"{name} must be (at most|finite)"):
        RunConfig(**{name: 10**400})
    with pytest.raises(ValueError, match=f"{name} must be (zero or more|positive|finite)"):
        RunConfig(**{name: -10**400})


def test_an_unknown_name_where_there_is_none_to_choose_from_says_so():
    assert unknown("notebook", "01", []) == "unknown notebook '01': there is none to choose from"
    assert _listed([]) == "" and _listed(["a"]) == "a" and _listed("abc") == "a, b or c"


@pytest.mark.parametrize("d_model", [2, 6, 24, 36, 64])
def test_every_head_count_that_the_error_offers_can_be_run(d_model):
    with pytest.raises(ValueError, match="n_heads") as caught:
        RunConfig(d_model=d_model, n_heads=d_model + 1)
    offered = [int(word) for word in str(caught.value).split("choose one of ")[1].replace("or", ",").split(",")]
    assert [RunConfig(d_model=d_model, n_heads=n).d_head % 2 for n in offered] == [0] * len(offered)


def test_a_config_with_a_bad_value_cannot_come_from_replace_grid_or_storage():
    for make in (lambda: replace(RunConfig(), lr=-1.0), lambda: grid(RunConfig(), lr=[0.1, -1.0]),
                 lambda: from_dict({"lr": -1.0})):
        with pytest.raises(ValueError, match="lr must be positive"):
            make()


@pytest.mark.parametrize("changes, scale", [
    ({}, 1 / 4), ({"parametrization": "mup_simple"}, 1 / 4), ({"parametrization": "mup_intermediate"}, 1 / 4),
    ({"parametrization": "mup_full"}, 1 / 16), ({"attention_scale": "1/d_h"}, 1 / 16),
    ({"parametrization": "mup_full", "attention_scale": "1/sqrt(d_h)"}, 1 / 4),
])
def test_the_attention_scale_is_that_of_the_parametrization_unless_it_is_chosen(changes, scale):
    assert RunConfig(d_model=64, n_heads=4, **changes).scale == scale
