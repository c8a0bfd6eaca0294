"""KSS in a training loop of one's own: when it acts, on which layers and tokens, and what it leaves behind."""

import copy
import gc
import io
import math
import weakref

import numpy as np
import pytest
import torch
from test_koopman import Accelerator, Elsewhere
from test_shaping import PENALTIES, Fill, Linear, equation_14, measured
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stability_lib import koopman, models, shaping
from stability_lib.config import CHOICES, RunConfig, replace
from stability_lib.shaping import KSS, Settings
from stability_lib.stream import ProfileError


@pytest.fixture
def decoder(tiny) -> tuple[nn.Module, torch.Tensor]:
    config = replace(tiny, n_layers=4, batch_size=8, norm="no_norm")
    return models.build(config, 40), torch.randint(40, (8, config.seq_len))


def layer_values(model: nn.Module, tokens: torch.Tensor) -> list[float]:
    """L_KSS of each block, by the eigenvalues of the spectral profile."""
    profiled = koopman.profile(model, tokens, kreiss=False, snapshots=None)
    return [sum(equation_14(layer.eigenvalues, Settings())) for layer in profiled.layers]


def test_the_penalty_is_alpha_times_the_mean_over_the_drawn_layers(decoder):
    model, tokens = decoder
    each = layer_values(*decoder)
    with KSS(model, Settings(alpha=2.5, every=1, layer_share=1.0)) as kss:
        model(tokens)
        assert float(kss.penalty().detach()) == pytest.approx(2.5 * sum(each) / 4, rel=1e-4)
        assert (kss.applied, kss.skipped) == (4, 0)
    pairs = {(each[i] + each[j]) / 2 for i in range(4) for j in range(i)}
    with KSS(model, Settings(alpha=2.5, every=1)) as kss:
        model(tokens)
        penalty = float(kss.penalty().detach()) / 2.5
    assert kss.applied == 2 and min(abs(penalty - pair) / pair for pair in pairs) < 1e-4


def drawn(share: float, n: int = 4, steps: int = 200, seed: int = 0) -> list[set[int]]:
    """Which of n layers were drawn at each step, told by the size of their states."""
    layers = nn.Sequential(*(Fill(2.0**i) for i in range(n)))
    found = []
    with KSS(layers, Settings(penalty="residual_norm", alpha=1.0, every=1, layer_share=share, seed=seed)) as kss:
        for step in range(steps):
            layers(torch.ones(2, 3))
            total = round(float(kss.penalty().detach()) * (kss.applied // (step + 1)))
            found.append({i for i in range(n) if total >> (2 * i) & 1})
            kss.step()
    return found


@pytest.mark.parametrize("share, n, size", [(0.5, 4, 2), (1.0, 4, 4), (0.5, 6, 3), (0.1, 4, 1), (0.7, 4, 3)])
def test_a_share_of_the_layers_is_drawn_anew_each_time_all_alike(share, n, size):
    found = drawn(share, n)
    assert {len(layers) for layers in found} == {size}
    for i in range(n):
        spread = math.sqrt(size / n * (1 - size / n) * len(found))
        assert sum(i in layers for layers in found) == pytest.approx(size / n * len(found), abs=4 * spread)


def test_the_draws_are_fixed_by_the_seed():
    assert drawn(0.5) == drawn(0.5) != drawn(0.5, seed=1)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_all_random_numbers_are_its_own(decoder, penalty):
    model, tokens = decoder

    def penalties(seed: int) -> list[float]:
        with KSS(model, Settings(penalty=penalty, every=1, rank=4, snapshots=50, dmd="random", seed=seed)) as kss:
            return [float(kss.penalty().detach()) for _ in range(3) if model(tokens) is not None]

    before = torch.get_rng_state()
    first = penalties(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert penalties(0) == first != penalties(1)


def test_only_so_many_snapshots_count():
    x, y = torch.randn(2, 10, 30, 4)
    all_rows = measured(x, y, snapshots=None)[0]
    assert measured(x, y, snapshots=300)[0] == all_rows != measured(x, y, snapshots=299)[0]
    few = measured(x, y, penalty="residual_norm", snapshots=7)
    assert int((few[2].flatten(0, 1) != 0).any(1).sum()) == 7


def test_it_is_applied_every_so_many_steps_however_many_passes_a_step_takes(decoder):
    model, tokens = decoder
    with KSS(model, Settings(every=3)) as kss:
        for step in range(7):
            for _ in range(2):  # micro-batches
                model(tokens)
                penalty = kss.penalty()
                assert kss.due == bool(penalty) == (step % 3 == 0)
                assert penalty.requires_grad == kss.due
            kss.step()
        assert kss.steps == 7 and kss.applied == 3 * 2 * 2


def test_where_it_is_not_due_nothing_is_kept_or_drawn_on(decoder):
    model, tokens = decoder
    with KSS(model, Settings(every=2)) as kss:
        model(tokens)
        assert kss._states
        kss.step()
        assert not kss._states
        model(tokens)
        assert not kss._states and torch.equal(kss.penalty(), torch.zeros(()))


def test_states_are_let_go_with_the_penalty(decoder):
    model, tokens = decoder
    with KSS(model, Settings(every=1)) as kss:
        model(tokens)
        kss.penalty()
        assert not kss._states
        model(tokens)
    assert not kss._states


def test_without_weight_there_is_no_penalty(decoder):
    model, tokens = decoder
    with KSS(model, Settings(alpha=0.0, every=1)) as kss:
        model(tokens)
        assert torch.equal(kss.penalty(), torch.zeros(())) and kss.applied == 0


def test_passes_in_eval_mode_or_without_gradients_do_not_count(decoder):
    model, tokens = decoder
    others = torch.randint(40, tokens.shape)
    settings = Settings(every=1, layer_share=1.0)
    with KSS(model, settings) as kss:
        model(tokens)
        expected = kss.penalty()
        model(tokens)
        with torch.no_grad():
            model(others)
        model.eval()(others)
        model.train()
        assert torch.equal(kss.penalty(), expected)


def test_a_penalty_that_is_due_without_a_pass_names_the_remedy(decoder):
    model, tokens = decoder
    with KSS(model, Settings(every=2)) as kss:
        model.eval()(tokens)
        with pytest.raises(RuntimeError, match=r"no states were seen .* after a forward pass in training mode"):
            kss.penalty()
        kss.step()
        kss.penalty()


def test_it_leaves_nothing_behind(decoder):
    model, tokens = decoder
    logits, state = model(tokens), copy.deepcopy(model.state_dict())
    try:
        with KSS(model, Settings(every=1)) as kss:
            torch.testing.assert_close(model(tokens), logits, rtol=0, atol=0)
            kss.penalty()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    kss.detach()  # once more does no harm


def test_accumulated_micro_batches_add_up_to_the_mean_of_their_penalties(decoder):
    model, tokens = decoder
    settings = Settings(penalty="residual_norm", alpha=0.3, every=1, layer_share=1.0)
    gradients = []
    for parts in (1, 2):
        model.zero_grad()
        with KSS(model, settings) as kss:
            for chunk in tokens.chunk(parts):
                loss = model(chunk).square().mean()
                ((loss + kss.penalty()) / parts).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_under_autocast_it_is_near_full_precision(decoder):
    model, tokens = decoder
    found = []
    for half in (False, True):
        with KSS(model, Settings(every=1, layer_share=1.0)) as kss, torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(tokens)
            penalty = kss.penalty()
        model.zero_grad()
        penalty.backward()
        found.append((float(penalty.detach()), torch.cat([p.grad.flatten() for p in model.blocks.parameters()])))
        assert penalty.dtype == torch.float32 and found[-1][1].isfinite().all()
    assert found[1][0] == pytest.approx(found[0][0], rel=0.1)
    assert float(torch.cosine_similarity(found[0][1], found[1][1], dim=0)) > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_models_of_another_precision_are_shaped(decoder, penalty, dtype):
    layers, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype), torch.randn(60, 8, dtype=dtype)
    with KSS(layers, Settings(penalty=penalty, every=1)) as kss:
        layers(x)
        kss.penalty().backward()
    assert kss.applied == 1 and any(p.grad is not None and p.grad.isfinite().all() for p in layers.parameters())


@pytest.mark.parametrize("dmd", CHOICES["shaping_dmd"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_model_on_an_accelerator_is_shaped_there(penalty, dmd):
    weights, x = torch.randn(4, 40, 40) / 8 + torch.eye(40), torch.randn(20, 5, 40)

    def run(to) -> list[torch.Tensor]:
        layers = nn.Sequential(*(Linear(to(weight)) for weight in weights))
        with KSS(layers, Settings(penalty=penalty, every=1, rank=12, snapshots=80, dmd=dmd)) as kss:
            layers(to(x))
            found = kss.penalty()
        found.backward()
        return [found, *(layer.a.grad for layer in layers if layer.a.grad is not None)]

    here = run(lambda tensor: tensor)
    with Accelerator():
        there = run(Elsewhere)
        assert all(isinstance(tensor, Elsewhere) for tensor in there)
    assert len(here) == len(there) >= 2
    assert all(torch.equal(ours, theirs.held) for ours, theirs in zip(here, there, strict=True))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=4, n_head=2, bos_token_id=0,
                                      eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                                        num_attention_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)).train()


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_hugging_face_models_are_shaped_along_their_hidden_states(build):
    model, tokens = build(), torch.randint(40, (8, 12))
    with KSS(model, Settings(alpha=1.0, every=1, layer_share=1.0)) as kss:
        model(input_ids=tokens)
        penalty = kss.penalty()
    assert float(penalty.detach()) == pytest.approx(np.mean(layer_values(model, tokens)), rel=1e-4)
    penalty.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_layers_can_be_named_or_listed(decoder):
    model, tokens = decoder
    each = layer_values(*decoder)
    for layers, expected in (("blocks", each), (model.blocks, each), ([model.blocks[2]], each[2:3]),
                             ([model.blocks[0]] * 2, each[:1])):
        with KSS(model, Settings(alpha=1.0, every=1, layer_share=1.0), layers=layers) as kss:
            model(tokens)
            assert float(kss.penalty().detach()) == pytest.approx(np.mean(expected), rel=1e-4)
            assert kss.applied == len(expected)


def test_layers_that_do_not_keep_the_states_shape_are_refused(decoder):
    model, tokens = decoder
    with (KSS(model, Settings(every=1), layers=[model.head]),
          pytest.raises(ValueError, match=r"Linear does not map states .* name layers that do with layers=")):
        model(tokens)


def test_of_a_layer_that_runs_several_times_the_last_pass_counts():
    layer, x = Linear(torch.eye(4)), torch.ones(10, 4)
    with KSS(layer, Settings(penalty="residual_norm", alpha=1.0, every=1), layers=[layer]) as kss:
        layer(x)
        layer(3 * x)
        assert float(kss.penalty().detach()) == 9


def test_a_config_says_how_its_run_is_shaped(tiny):
    model = models.build(tiny, 40)
    assert shaping.attach(model, tiny) is None
    config = replace(tiny, shaping="near_unit", shaping_alpha=5.0, shaping_every=3, shaping_beta=2.0,
                     shaping_dmd="random", shaping_gradient="input", shaping_reduction="mean")
    kss = shaping.attach(model, config)
    assert kss.settings == Settings(penalty="near_unit", alpha=5.0, every=3, beta=2.0, dmd="random", gradient="input",
                                    reduction="mean", seed=kss.settings.seed)
    assert shaping.attach(model, replace(config, seed=1)).settings.seed != kss.settings.seed
    defaults = {name: RunConfig.__dataclass_fields__[f"shaping_{name}"].default
                for name in ("alpha", "every", "beta", "dmd", "gradient", "reduction")}
    assert all(getattr(Settings(), name) == value for name, value in defaults.items())


# masks and caches

def tiny_bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                                num_attention_heads=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0)).train()


def padded(tokens: torch.Tensor, n: int) -> dict[str, torch.Tensor]:
    """The same sequences, longer by n hidden tokens."""
    return {"input_ids": nn.functional.pad(tokens, (0, n), value=7),
            "attention_mask": nn.functional.pad(torch.ones_like(tokens), (0, n))}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_hidden_tokens_play_no_part_in_any_penalty(build, penalty):
    model, tokens = build(), torch.randint(40, (4, 20))
    for snapshots in (None, 50):
        settings, found = Settings(penalty=penalty, alpha=1.0, every=1, rank=8, snapshots=snapshots), []
        for n in (0, 10, 60):
            with KSS(model, settings) as kss:
                model(**padded(tokens, n))
                found.append(float(kss.penalty().detach()))
            assert (kss.applied, kss.skipped) == (2, 0)
        with KSS(model, settings) as kss:
            model(tokens)
            found.append(float(kss.penalty().detach()))
        assert found == pytest.approx([found[0]] * 4, rel=1e-5)


class Whole(nn.Module):
    """Takes a batch as one mapping, as modules of Lightning do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, batch):
        return self.inner(**batch)


def test_the_masks_of_a_batch_given_as_a_whole_count_as_well():
    model, tokens = Whole(tiny_llama()), torch.randint(40, (4, 20))
    found = []
    for n in (0, 30):
        with KSS(model, Settings(penalty="activation_variance", alpha=1.0, every=1)) as kss:
            model(padded(tokens, n))
            found.append(float(kss.penalty().detach()))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


class Masked(nn.Module):
    """Says by an argument of no convention which tokens are there, and can run its layers in chunks of 8 positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, tokens, attention_mask=None, there=None, chunked=False):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x.unflatten(1, (-1, 8)) if chunked else x).view_as(x)
        return x


def test_a_mask_that_cannot_be_matched_is_refused_and_positions_take_its_place():
    model, tokens = Masked(), torch.randint(40, (4, 16))
    there = torch.rand(4, 16) > 0.5
    settings = Settings(penalty="residual_norm", alpha=1.0, every=1, layer_share=1.0)

    def penalty(positions=None, **call) -> float:
        with KSS(model, settings, positions=positions) as kss:
            model(tokens, **call)
            return float(kss.penalty().detach())

    right = penalty(attention_mask=there.long())
    assert right != pytest.approx(penalty(), rel=1e-3)
    assert right == pytest.approx(penalty(lambda tokens, there: there, there=there))
    with pytest.raises(ProfileError, match=r"attention_mask \(4, 16\) cannot .* of Linear: pass positions=, a func"):
        penalty(attention_mask=there.long(), chunked=True)
    chunks = lambda tokens, attention_mask, chunked: attention_mask.bool().unflatten(1, (2, 8))  # noqa: E731
    assert right == pytest.approx(penalty(chunks, attention_mask=there.long(), chunked=True))
    for bad in (torch.ones(4, 16), torch.ones(4, 2, dtype=torch.bool), None):
        with pytest.raises(ProfileError, match=r"positions=.* must return a bool mask \(4, 16\)"):
            penalty(lambda tokens, bad=bad: bad)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_batch_with_no_token_left_is_skipped(penalty):
    model = Masked()
    for n in (0, 1):
        mask = torch.zeros(4, 16).long()
        mask[:, :n] = torch.eye(4, 1).long()
        with KSS(model, Settings(penalty=penalty, every=1)) as kss:
            model(torch.randint(40, (4, 16)), attention_mask=mask)
            assert math.isfinite(kss.penalty().detach())
        assert kss.applied + kss.skipped == 1 and (kss.skipped or n)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_the_jacobian_penalty_is_the_same_with_a_cache_of_keys_and_values(build):
    """Which grows with each pass of a layer."""
    model, tokens = build(), torch.randint(40, (8, 12))
    found = []
    for use_cache in (False, True):
        with KSS(model, Settings(penalty="jacobian", alpha=1.0, every=1, layer_share=1.0)) as kss:
            output = model(input_ids=tokens, use_cache=use_cache)
            found.append(kss.penalty())
    assert output.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(found[1], found[0])


def test_the_jacobian_penalty_sees_the_arguments_as_they_were():
    class Counting(nn.Linear):
        def forward(self, x, memory):
            memory["calls"].append(1)
            return super().forward(x) * len(memory["calls"])

    layer, memory, x = Counting(8, 8), {"calls": []}, torch.randn(50, 8)
    with KSS(layer, Settings(penalty="jacobian", alpha=1.0, every=1), layers=[layer]) as kss:
        layer(x, memory)
        penalty = kss.penalty()
    assert len(memory["calls"]) == 1
    noise = torch.randn(50, 8, generator=kss_generator(Settings(), 1))
    torch.testing.assert_close(penalty, (noise @ layer.weight.T).square().mean(), rtol=1e-3, atol=0)


def kss_generator(settings: Settings, layers: int) -> torch.Generator:
    """Where its generator stands when the first penalty is computed."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(2):
        torch.randperm(layers, generator=generator)
    return generator


# what it leaves behind, and going on

def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("penalty", ["kss", "jacobian"])
def test_an_abandoned_one_dies_with_its_last_reference(decoder, penalty):
    model, tokens = decoder
    gc.collect()
    gc.disable()
    try:
        found = []
        for _ in range(2):  # a cell that runs twice
            kss = KSS(model, Settings(penalty=penalty, every=1))
            model(tokens)
            found.append((weakref.ref(kss), hooks_on(model)))
        assert found[0][0]() is None and found[1][0]() is kss
        assert found[0][1] == found[1][1] > 0
        kept = weakref.ref(next(iter(kss._states.values()))[1])
        del kss
        assert found[1][0]() is None and kept() is None and hooks_on(model) == 0
    finally:
        gc.enable()


def test_a_model_can_be_copied_and_its_copy_is_not_shaped(decoder):
    model, tokens = decoder
    with KSS(model, Settings(every=1, layer_share=1.0)) as kss:
        model(tokens)
        twin = copy.deepcopy(model)
        twin(torch.randint(40, tokens.shape))
        found = kss.penalty()
        model(tokens)
        assert torch.equal(found, kss.penalty())


def shaped(model: nn.Module, tokens: torch.Tensor, kss: KSS, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        model(tokens)
        found.append(float(kss.penalty().detach()))
        kss.step()
    return found


@pytest.mark.parametrize("penalty", ["kss", "random_l2"])
def test_a_loop_that_is_resumed_goes_on_as_one_that_was_not_interrupted(decoder, penalty):
    settings = Settings(penalty=penalty, every=3, snapshots=30, rank=4)
    with KSS(decoder[0], settings) as kss:
        unbroken = shaped(*decoder, kss, 12)
    assert [step for step, value in enumerate(unbroken) if value] == [0, 3, 6, 9]
    with KSS(decoder[0], settings) as kss:
        first, file = shaped(*decoder, kss, 5), io.BytesIO()
        torch.save(kss.state_dict(), file)
    file.seek(0)
    with KSS(decoder[0], settings) as resumed:
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert first + shaped(*decoder, resumed, 7) == unbroken
        assert (resumed.steps, resumed.applied) == (12, 8)


def test_the_state_of_another_model_is_refused(decoder):
    with KSS(decoder[0]) as kss, KSS(decoder[0], layers=decoder[0].blocks[:2]) as other:
        with pytest.raises(ValueError, match=r"of 4 layers, and here are 2: pass the same layers="):
            other.load_state_dict(kss.state_dict())
        with pytest.raises(ValueError, match="lacks applied, drawn, generator, layers, skipped: pass what state_dict"):
            kss.load_state_dict({"steps": 3})


# nothing without a word

def test_a_penalty_without_a_gradient_is_said_once(decoder):
    model, tokens = decoder
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    with KSS(model, Settings(every=1)) as kss:
        model(tokens)
        with pytest.warns(UserWarning, match="the penalty of KSS has no gradient: the layers .* are frozen"):
            assert not kss.penalty().requires_grad
        model(tokens)
        kss.penalty()
    model.embed.requires_grad_(True)
    with KSS(model, Settings(every=1)) as kss:
        model(tokens)
        assert kss.penalty().requires_grad


def test_layers_that_are_always_skipped_are_said_once():
    layers = nn.Sequential(*(Fill(1.0) for _ in range(2)))
    with KSS(layers, Settings(every=1)) as kss:
        for i in range(8):
            layers(torch.ones(5, 4))
            if i == 4:
                with pytest.warns(UserWarning, match="KSS has skipped every layer so far, 5 of 5: .* smaller rank"):
                    kss.penalty()
            else:
                kss.penalty()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler itself
def test_a_compiled_model_is_shaped_from_its_first_pass_on_or_says_what_to_do(decoder):
    model, tokens = decoder
    torch.compiler.reset()
    with KSS(model, Settings(every=1)) as kss:
        plain = shaped(model, tokens, kss, 3)
    try:
        compiled = torch.compile(model, backend="eager")
        with KSS(compiled, Settings(every=1)) as kss:
            assert shaped(compiled, tokens, kss, 3) == pytest.approx(plain, rel=1e-4)
        torch.compiler.reset()
        compiled(tokens)
        with KSS(model, Settings(every=1)) as kss:
            compiled(tokens)
            with pytest.raises(RuntimeError, match=r"had been compiled and run before, call torch.compiler.reset\(\)"):
                kss.penalty()
        with KSS(model, Settings(every=1)) as kss:
            torch.compiler.reset()
            assert shaped(compiled, tokens, kss, 3) == pytest.approx(plain, rel=1e-4)
    finally:
        torch.compiler.reset()
