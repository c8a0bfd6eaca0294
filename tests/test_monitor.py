"""The monitor against eager attention on many architectures, that it changes no bit, alarms, bad input, remedies."""

import copy
import math
import pickle
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from matplotlib import pyplot as plt
from torch import nn

from stability_lib import alarms, models, probes
from stability_lib.monitor import StabilityMonitor, lightning_callback, trainer_callback

V, T = 53, 12
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GROUPED = SIZES | dict(num_key_value_heads=2)
SMALL_GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=T, resid_pdrop=0.1)
ARCHITECTURES = {
    "GPT2LMHeadModel": ("GPT2Config", SMALL_GPT2),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED | dict(sliding_window=5)),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED | dict(head_dim=8)),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | dict(head_dim=8, sliding_window=5, attn_logit_softcapping=0.01)),
    "PhiForCausalLM": ("PhiConfig", SIZES),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES),
    "OPTForCausalLM": ("OPTConfig", dict(vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                         num_attention_heads=4, max_position_embeddings=T, word_embed_proj_dim=32)),
    "BertForMaskedLM": ("BertConfig", SIZES | dict(max_position_embeddings=T)),
    "T5ForConditionalGeneration": ("T5Config", dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                                                    num_heads=4, decoder_start_token_id=0)),
    "MixtralForCausalLM": ("MixtralConfig", GROUPED | dict(num_local_experts=4)),
    "ViTForImageClassification": ("ViTConfig", dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                                    num_attention_heads=4, image_size=16, patch_size=4)),
}


def build(name: str, implementation: str | None = None, **changes) -> nn.Module:
    """A model with weights ten times the usual, so that attention is not flat, and without dropout."""
    config, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings | changes)
    if implementation:
        made._attn_implementation = implementation
    model = getattr(transformers, name)(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 10
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.train()


def inputs(model: nn.Module) -> dict:
    torch.manual_seed(1)
    if isinstance(model, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 0])}
    tokens = torch.randint(3, V, (3, T))
    mask = torch.ones_like(tokens)
    mask[0, T - 4:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def eager_attention(model: nn.Module, batch: dict, monkeypatch) -> tuple[list, list]:
    """Per call of attention, from the softmax's own input and output: the largest logit of each head, and the mean
    entropy over queries that see a key."""
    largest, entropies, softmax = [], [], F.softmax

    def recording(z, *args, **kwargs):
        p = softmax(z, *args, **kwargs)
        if z.ndim == 4:
            z = z.detach()
            seen = z > -1e30
            largest.append(z.amax((0, 2, 3)).tolist())
            entropy = torch.where(p > 0, -p * p.log(), 0.0).detach().sum(-1)[seen.any(-1)]
            entropies.append(float(entropy.mean()))
        return p

    with monkeypatch.context() as patched:
        for owner in (F, torch):
            patched.setattr(owner, "softmax", recording)
        model(**batch)
    return largest, entropies


def quietly(*args, **settings) -> StabilityMonitor:
    """A monitor without alarms."""
    return StabilityMonitor(*args, alarms=(), **settings)


def one_step(model: nn.Module, batch: dict, **settings) -> dict[str, float]:
    with quietly(model, **settings) as monitor:
        model(**batch).loss.backward()
        return monitor.step()


# against eager attention

@pytest.mark.parametrize("name, implementation", [
    (name, implementation) for name in ARCHITECTURES for implementation in ("sdpa", "eager")
    if (name, implementation) != ("Gemma2ForCausalLM", "sdpa")])  # there is none of capped logits
def test_attention_is_that_of_eager_attention(name, implementation, monkeypatch):
    model, reference = build(name, implementation), build(name, "eager")
    largest, entropies = eager_attention(reference, inputs(reference), monkeypatch)
    row = one_step(model, inputs(model))
    layers = [key.partition("/")[2] for key in row if key.startswith("attention_entropy/")]
    assert len(layers) == len(largest) == (6 if name.startswith("T5") else 2)
    order = (lambda found: sorted(found)) if name.startswith("T5") else list
    heads = [[row[f"attention_logit_max/{layer}/head{i}"] for i in range(4)] for layer in layers]
    for ours, theirs in zip(order(heads), order(largest), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert [row[f"attention_logit_max/{layer}"] for layer in layers] == [max(of_layer) for of_layer in heads]
    assert order(row[f"attention_entropy/{layer}"] for layer in layers) == pytest.approx(order(entropies), rel=1e-4)
    assert math.isfinite(row["log_z"]) and any(key.startswith("output_kurtosis/") for key in row)


class Encoder(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, **settings)
        self.embed, self.encoder, self.head = nn.Embedding(V, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, V)

    def forward(self, tokens, **masks):
        return self.head(self.encoder(4 * self.embed(tokens), **masks))


@pytest.mark.parametrize("masks", [{}, {"is_causal": True, "mask": nn.Transformer.generate_square_subsequent_mask(T)},
                                   {"src_key_padding_mask": torch.arange(T).expand(3, T) > 8}])
@pytest.mark.parametrize("training", [True, False])
def test_the_encoder_of_torch(masks, training):
    model, tokens = Encoder().train(training), torch.randint(V, (3, T))
    seen, first = [], model.encoder.layers[0].self_attn
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with quietly(model) as monitor:
        model(tokens, **masks).sum().backward()
        row = monitor.step()
    q, k = (F.linear(seen[0], w, b).unflatten(-1, (4, 8)).transpose(1, 2) for w, b in zip(
        first.in_proj_weight.chunk(3)[:2], first.in_proj_bias.chunk(3)[:2], strict=True))
    z = q @ k.mT / math.sqrt(8)
    if "mask" in masks:
        z = z + masks["mask"]
    elif masks:
        z = z.masked_fill(masks["src_key_padding_mask"][:, None, None], -math.inf)
    name = "encoder.layers.0.self_attn"
    assert [row[f"attention_logit_max/{name}/head{i}"] for i in range(4)] == pytest.approx(
        z.amax((0, 2, 3)).tolist(), rel=1e-5)
    entropy = torch.special.entr(z.softmax(-1)).sum(-1).mean().detach()
    assert row[f"attention_entropy/{name}"] == pytest.approx(float(entropy), rel=1e-5)


def test_multi_head_attention_that_returns_its_weights():
    """torch computes these with bmm and a softmax over [B H, T, S]."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x, need_weights):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    model, x, rows = Model(), 3 * torch.randn(2, T, 32), []
    for need_weights in (True, False):
        with quietly(model) as monitor, warnings.catch_warnings(action="ignore"):
            model(x, need_weights).sum().backward()
            rows.append({key: value for key, value in monitor.step().items() if key.startswith("attention")})
    assert len(rows[0]) == 6 and rows[0] == pytest.approx(rows[1], rel=1e-5)


class NanoGPT(nn.Module):
    """The shape of nanoGPT: fused or written-out attention, logits and loss returned as a tuple."""

    class Block(nn.Module):
        def __init__(self, flash: bool):
            super().__init__()
            self.flash, self.ln_1, self.dropout = flash, nn.LayerNorm(32), nn.Dropout(0.1)
            self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1))
            if self.flash:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True)
            else:
                z = (q @ k.transpose(-2, -1)) / math.sqrt(8)
                z = z.masked_fill(torch.ones(z.shape[-2:]).tril() == 0, float("-inf"))
                y = F.softmax(z, dim=-1) @ v
            return x + self.dropout(self.c_proj(y.transpose(1, 2).flatten(-2)))

    def __init__(self, flash: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head = nn.Embedding(V, 32), nn.Linear(32, V, bias=False)
        self.h = nn.ModuleList(self.Block(flash) for _ in range(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens, targets):
        if self.training:
            self.calls += 1  # as the statistics of batch norm
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_nanogpt_fused_and_written_out(monkeypatch):
    tokens, rows = torch.randint(V, (3, T)), []
    for flash in (True, False):
        model = NanoGPT(flash)
        with quietly(model) as monitor:
            torch.manual_seed(0)
            model(tokens, tokens)[1].backward()
            rows.append(monitor.step())
    assert "attention_logit_max/h.1/head3" in rows[0] and rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_probes_of_our_own_models_say_the_same(tiny):
    model, tokens = models.build(tiny, V), torch.randint(V, (4, 12))
    with probes.watch(model) as watched, quietly(model) as monitor:
        logits = model(tokens)
        logits.sum().backward()
        row = monitor.step()
    watched = probes.fetch(watched)
    for i in range(2):
        for name in ("attention_logit_max", "attention_entropy"):
            assert row[f"{name}/blocks.{i}.attention.core"] == pytest.approx(watched[f"{name}/block{i}"], rel=1e-5)
        for name in ("output_rms", "output_kurtosis"):
            assert row[f"{name}/blocks.{i}"] == pytest.approx(watched[f"{name}/block{i}"], rel=1e-6)
    assert [row[name] for name in ("log_z", "logit_mean")] == pytest.approx(
        [watched["log_z"], watched["logit_mean"]], rel=1e-5)


def test_readings_in_parts_are_those_of_the_whole(monkeypatch):
    model, reference = build("LlamaForCausalLM"), build("LlamaForCausalLM")
    whole = one_step(reference, inputs(reference))
    for module in ("attention", "monitor"):
        monkeypatch.setattr(f"stability_lib.{module}.CHUNK", 3 * 4 * T * 5)
    assert one_step(model, inputs(model)) == pytest.approx(whole, rel=1e-5)


def test_router_load_is_the_share_of_the_tokens():
    model = build("MixtralForCausalLM")
    chosen = []
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: chosen.append(
        (args[0].detach().reshape(-1, 32) @ gate.weight.T).topk(2)[1]))
    row = one_step(model, inputs(model))
    share = torch.bincount(chosen[0].flatten(), minlength=4) / chosen[0].numel() * 4
    layer = next(key for key in row if key.startswith("router_load_max/") and "layers.1" in key).partition("/")[2]
    assert [row[f"router_load_{which}/{layer}"] for which in ("max", "min")] == pytest.approx(
        [float(share.max()), float(share.min())])


def test_router_load_of_a_router_that_takes_the_best_expert():
    torch.manual_seed(0)
    model = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=4, decoder_start_token_id=0,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_jitter_noise=0.0)).eval()
    chosen, router = [], model.encoder.block[1].layer[1].mlp.router
    router.classifier.register_forward_hook(lambda module, args, output: chosen.append(output.detach().argmax(-1)))
    row = one_step(model, inputs(model))
    share = torch.bincount(chosen[0].flatten(), minlength=4) / chosen[0].numel() * 4
    assert row["router_load_max/encoder.block.1.layer.1.mlp.router"] == pytest.approx(float(share.max()))


# the same trajectory

def run(model: nn.Module, call, steps: int = 5, watched: nn.Module | None = None, after=None, **settings) -> list:
    """Losses and weights of AdamW steps through `call`, with a monitor on `watched` where there is one."""
    torch.manual_seed(3)
    tokens = torch.randint(V, (steps, 2, 3, T))
    monitor = quietly(watched, every=2, **settings) if watched is not None else None
    call = after() if after else call
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for batch in tokens:
        optimizer.zero_grad()
        for micro_batch in batch:
            loss = call(micro_batch, micro_batch)[1]
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if monitor:
            monitor.step(loss)
        optimizer.step()
        with torch.no_grad():
            model(batch[0], batch[1])  # as an evaluation in between
    if monitor:
        monitor.close()
        assert sum("update_rms/wte" in names for _, names, _ in monitor._rows) == 3
        assert all("attention_logit_max/h.1/head3" in names for _, names, _ in monitor._rows[::2])
    return [*losses, *(value.detach().clone() for value in model.state_dict().values()), torch.get_rng_state()]


def same(one: list, other: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("flash", [True, False])
def test_a_monitor_changes_no_bit(flash):
    plain, watched = NanoGPT(flash), NanoGPT(flash)
    assert same(run(plain, plain), run(watched, watched, watched=watched))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_a_monitor_changes_no_bit_of_a_model_of_transformers_with_checkpointing(name):
    found = []
    for watched in (False, True):
        model = build(name)
        model.activation_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        monitor = quietly(model, every=2) if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs(model), use_cache=False).loss.backward()
            if monitor:
                monitor.step()
            optimizer.step()
        found.append([*model.parameters()])
    assert same(*found)


def test_a_monitor_changes_no_bit_under_autocast():
    found = []
    for watched in (False, True):
        model = NanoGPT()
        call = torch.autocast("cpu", torch.bfloat16)(lambda *args, model=model: model(*args))
        found.append(run(model, call, watched=model if watched else None))
    assert same(*found)


HOW = {"function": lambda model, **settings: torch.compile(model, backend="aot_eager", **settings),
       "method": lambda model, **settings: (model.compile(backend="aot_eager", **settings), model)[1],
       "blocks": lambda model, **settings: ([h.compile(backend="aot_eager", **settings) for h in model.h], model)[1]}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of the compiler itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_monitor_changes_no_bit_of_a_compiled_model(how, fullgraph):
    found, times = [], []
    for watched in (False, True):
        torch.compiler.reset()
        model = NanoGPT()
        made = HOW[how](model, fullgraph=fullgraph)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found.append(run(model, made, watched=made if watched else None))
        times.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert same(*found) and times[0] == times[1] > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", HOW)
def test_a_compiled_model_is_read_as_it_is(how):
    rows = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = NanoGPT()
        with quietly(HOW[how](model) if compiled else model) as monitor:
            made = monitor._model
            torch.manual_seed(0)  # of batch and dropout
            tokens = torch.randint(V, (3, T))
            made(tokens, tokens)[1].backward()
            rows.append(monitor.step())
    assert len(rows[0]) > 20 and rows[0] == pytest.approx(rows[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_monitor_changes_no_bit_of_a_model_compiled_by_inductor():
    found = []
    for watched in (False, True):
        torch.compiler.reset()
        model = NanoGPT()
        made = torch.compile(model)
        found.append(run(model, made, watched=made if watched else None))
    assert same(*found)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("how", ["function", "method"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_model_compiled_after_its_monitor_is_refused_with_the_remedy(how, fullgraph):
    torch.compiler.reset()
    model = NanoGPT()
    with pytest.raises(Exception, match="compiled after its monitor was made"):
        run(model, None, watched=model, after=lambda: HOW[how](model, fullgraph=fullgraph))


def test_a_closed_monitor_leaves_nothing_behind():
    model = NanoGPT()
    with quietly(model):
        model(*torch.randint(V, (2, 3, T)))
    assert not model._forward_hooks and not model._forward_pre_hooks and not model.h[0]._forward_hooks
    assert torch.overrides._get_current_function_mode() is None
    others = len(sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks)
    monitor = quietly(model)
    del monitor
    assert not model._forward_hooks
    assert len(sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks) == others


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_forward_pass_does_not_keep_reading(error):
    """No hook hears of Ctrl-C in a forward pass."""
    model, tokens = NanoGPT(), torch.randint(V, (3, T))

    def interrupt(*_):
        raise error

    with quietly(model) as monitor:
        handle = model.h[1].register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            model(tokens, tokens)
        handle.remove()
        q = 1e3 * torch.ones(1, 4, T, 8)
        F.scaled_dot_product_attention(q, q, q)
        model(tokens, tokens)[1].backward()
        assert monitor.step()["attention_logit_max/h.0"] < 1e3 and len(monitor.head_maxima) == 2
    assert torch.overrides._get_current_function_mode() is None


# what it reads of weights, and the loop

def test_weights_are_read_as_they_are():
    model = NanoGPT()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6, weight_decay=0.0)
    logged, tokens = [], torch.randint(V, (3, T))
    with quietly(model, log=lambda row, step: logged.append((step, row)), every=2) as monitor:
        for step in range(3):
            optimizer.zero_grad()
            loss = model(tokens, tokens)[1]
            loss.backward()
            monitor.step(loss)
            before = model.wte.weight.detach().clone()
            gradient = model.wte.weight.grad.square().mean().sqrt()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
            optimizer.step()
            if step == 2:
                expected = {"loss": loss.detach(), "gradient_norm": norm, "gradient_rms/wte": gradient,
                            "gradient_over_eps/wte": gradient * 1e6,
                            "parameter_rms/wte": before.square().mean().sqrt(),
                            "update_rms/wte": (model.wte.weight.detach() - before).square().mean().sqrt()}
    expected["update_over_parameter/wte"] = expected["update_rms/wte"] / expected["parameter_rms/wte"]
    assert [step for step, _ in logged] == [0, 2]  # as soon as the optimizer has stepped
    for name, value in expected.items():
        assert logged[1][1][name] == pytest.approx(float(value), rel=1e-5), name
    table = monitor.table()
    assert list(table[table["quantity"] == "loss"]["step"]) == [0, 1, 2]
    picked = table[(table["step"] == 2) & (table["quantity"] == "attention_logit_max") & (table["layer"] == "h.1")]
    assert list(picked["head"]) == [-1, 0, 1, 2, 3] and picked["value"].iloc[0] == picked["value"].iloc[1:].max()
    assert {ax.get_title() for ax in monitor.plot().axes} == set(table["quantity"])
    assert [ax.get_title() for ax in monitor.plot("loss", "log_z").axes] == ["loss", "log_z"]
    with pytest.raises(ValueError, match="unknown quantity 'los': did you mean 'loss'"):
        monitor.plot("los")
    assert not plt.get_fignums()  # what is returned is shown once


def test_two_optimizers_of_one_model_make_one_row():
    model, logged = NanoGPT(), []
    optimizers = [torch.optim.SGD([model.wte.weight], 0.1), torch.optim.AdamW([
        p for name, p in model.named_parameters() if name != "wte.weight"], 1e-2)]
    other = torch.nn.Linear(2, 2)
    other.weight.grad = torch.ones(2, 2)
    with quietly(model, log=lambda row, step: logged.append(row)) as monitor:
        model(*torch.randint(V, (2, 3, T)))[1].backward()
        monitor.step()
        torch.optim.SGD([other.weight], 0.1).step()
        optimizers[0].step()
        assert not logged
        optimizers[1].step()
    assert len(logged) == 1 and {"update_rms/wte", "update_rms/head", "gradient_over_eps/head"} <= set(logged[0])
    assert "gradient_over_eps/wte" not in logged[0]  # SGD has no eps


def test_micro_batches_count_together():
    model = build("LlamaForCausalLM")
    batches = [{key: value[i:i + 1] for key, value in inputs(model).items()} for i in range(3)]
    rows = [one_step(build("LlamaForCausalLM"), batch) for batch in batches]
    with quietly(model) as monitor:
        for batch in batches:
            model(**batch).loss.backward()
        row = monitor.step()
    name = "model.layers.1.self_attn"
    assert row[f"attention_logit_max/{name}/head2"] == max(r[f"attention_logit_max/{name}/head2"] for r in rows)
    for each in ("log_z", f"attention_entropy/{name}", "loss"):
        assert row[each] == pytest.approx(sum(r[each] for r in rows) / 3)


# alarms

def alarming(quantity="attention_logit_max", **settings) -> tuple[alarms.Alarm, ...]:
    return (alarms.Alarm(quantity, **{"above": 1e4, "remedy": "use qk-norm", "chapter": "01"} | settings),)


def grown(block: int = 1, scale: float = 300.0) -> NanoGPT:
    model = NanoGPT()
    with torch.no_grad():
        model.h[block].c_attn.weight *= scale
    return model


def steps_of(model, monitor, n: int = 1, poison: int | None = None, optimizer=None) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(V, (3, T))
    for step in range(n):
        model.zero_grad()
        loss = model(tokens, tokens)[1] * (math.nan if step == poison else 1)
        loss.backward()
        monitor.step(loss)
        if optimizer:
            optimizer.step()


def test_an_alarm_says_where_what_since_when_and_what_helps():
    model = grown()
    still = torch.optim.SGD(model.parameters(), 0.0)
    with StabilityMonitor(model, every=1, alarms=alarming()) as monitor:
        with pytest.warns(UserWarning, match=r"step 0: attention_logit_max/h.1, \S+, is above 10000, since step 0: use "
                                             r"qk-norm \(chapter 01; more in docs/which_remedy.md\)"):
            steps_of(model, monitor, optimizer=still)
        steps_of(model, monitor, 2, optimizer=still)  # once a stretch
        with torch.no_grad():
            model.h[1].c_attn.weight /= 300
        steps_of(model, monitor, optimizer=still)
        with torch.no_grad():
            model.h[1].c_attn.weight *= 300
        with pytest.warns(UserWarning, match="step 4: .* since step 4"):
            steps_of(model, monitor, optimizer=still)
    assert [(found.step, found.since) for found in monitor.raised] == [(0, 0), (4, 4)]


@pytest.mark.parametrize("poison", [0, 3])
def test_stop_comes_before_the_step(poison):
    """At a step that is read and at one that is not."""
    model, logged = NanoGPT(), []
    monitor = StabilityMonitor(model, every=5, alarms=alarms.acting("stop"), log=lambda row, step: logged.append(step))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with monitor, pytest.raises(alarms.StabilityStop, match=f"step {poison}: .* is not finite, since step {poison}:"):
        steps_of(model, monitor, 5, poison, optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters()) and logged == [0]
    assert monitor.raised[0].step == poison and monitor.table()["step"].max() == poison


def test_a_stop_holds_for_as_long_as_its_cause():
    model = grown()
    with StabilityMonitor(model, every=1, alarms=alarming(action="stop")) as monitor:
        for step in range(2):
            with pytest.raises(alarms.StabilityStop, match=f"step {step}: .* since step 0"):
                steps_of(model, monitor)


def test_an_alarm_can_save():
    model, saved = grown(), []
    with StabilityMonitor(model, alarms=alarming(action=saved.append)) as monitor:
        steps_of(model, monitor)
    assert [(found.reading, found.step) for found in saved] == [("attention_logit_max/h.1", 0)]


def test_of_several_alarms_and_layers_the_worst_is_told_once():
    model = grown(0, 300.0)
    with torch.no_grad():
        model.h[1].c_attn.weight *= 1000
    with StabilityMonitor(model) as monitor, pytest.warns(UserWarning) as told:
        steps_of(model, monitor)
    assert [str(warning.message).partition(",")[0] for warning in told] == [
        "step 0: attention_logit_max/h.1 and 1 more"]


def test_gradients_near_eps_are_told_once_the_optimizer_is_known():
    model = NanoGPT()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1.0)
    with StabilityMonitor(model) as monitor, pytest.warns(UserWarning, match="gradient_over_eps/.* is below 10, .*eps"):
        steps_of(model, monitor, optimizer=optimizer)


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match="unknown action 'halt': choose"):
        alarms.Alarm("loss", action="halt")


# bad input

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_a_model_without_attention_is_told_and_read():
    model = Plain()
    with quietly(model) as monitor:
        model(torch.randn(5, 4)).sum().backward()
        with pytest.warns(UserWarning) as told:
            row = monitor.step()
    texts = [str(warning.message) for warning in told]
    assert any("no attention was seen in Plain: if it has some" in text for text in texts) and len(texts) == 2
    assert {"log_z", "gradient_rms/up", "gradient_norm"} <= set(row)


def test_attention_that_cannot_be_read_is_told(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("nested tensors")

    monkeypatch.setattr("stability_lib.attention._summary", broken)
    model = NanoGPT()
    with quietly(model) as monitor, pytest.warns(UserWarning) as told:
        steps_of(model, monitor)
    texts = [str(warning.message) for warning in told]
    assert "attention of h.1 could not be read: RuntimeError: nested tensors" in texts


def test_attention_of_another_model_within_has_its_own_name():
    """A teacher, kept out of the modules, with another number of heads."""
    class Student(NanoGPT):
        def forward(self, tokens, targets):
            q = torch.randn(3, 2, T, 8)
            F.scaled_dot_product_attention(q, q, q)
            F.scaled_dot_product_attention(q.repeat(1, 4, 1, 1), q.repeat(1, 4, 1, 1), q.repeat(1, 4, 1, 1))
            return super().forward(tokens, targets)

    model = Student()
    with quietly(model) as monitor:
        steps_of(model, monitor)
        assert {name: len(value) for name, value in monitor.head_maxima.items()} == {
            "model": 2, "model.8_heads": 8, "h.0": 4, "h.1": 4}


def test_a_copy_of_a_watched_model_is_not_watched():
    model = NanoGPT()
    with quietly(model) as monitor:
        twin = copy.deepcopy(model)  # as for a running average
        twin(*torch.randint(V, (2, 3, T)))
        twin.h[0].c_attn.weight.data *= 100
        steps_of(model, monitor)
        assert float(monitor.head_maxima["h.0"].max()) < 10


def test_a_watched_model_can_be_saved_whole():
    model, tokens = NanoGPT().eval(), torch.randint(V, (2, 3, T))
    with quietly(model):
        saved = pickle.loads(pickle.dumps(model))
        assert torch.equal(saved(*tokens)[0], model(*tokens)[0])


def test_distributed_data_parallel_in_a_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = []
        for watched in (False, True):
            model = NanoGPT()
            parallel = nn.parallel.DistributedDataParallel(model)
            found.append(run(model, parallel, watched=parallel if watched else None))
        assert same(*found)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_is_not_the_one_that_is_called_is_told():
    outer = nn.ModuleDict({"inner": NanoGPT()})
    with quietly(outer) as monitor:
        outer["inner"](*torch.randint(V, (2, 3, T)))[1].backward()
        with pytest.warns(UserWarning, match="no forward pass of ModuleDict was seen"):
            monitor.step()


def test_data_parallel_is_refused(monkeypatch):
    parallel = nn.DataParallel(NanoGPT())
    quietly(parallel).close()  # on one device it only calls the model
    parallel.device_ids = [0, 1]
    with pytest.raises(ValueError, match="in the threads of DataParallel: train with DistributedDataParallel"):
        quietly(parallel)
    model = NanoGPT()
    with quietly(model):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(ValueError, match="threads of DataParallel"):
            replica(*torch.randint(V, (2, 3, T)))


def test_a_log_that_raises_does_not_stop_training():
    def fail(row, step):
        raise OSError("disk full")

    model = NanoGPT()
    optimizer = torch.optim.AdamW(model.parameters())
    with quietly(model, every=1, log=fail) as monitor, pytest.warns(UserWarning) as told:
        steps_of(model, monitor, 3, optimizer=optimizer)
    assert [str(warning.message).partition(".")[0] for warning in told] == ["log raised OSError: disk full"]
    assert list(monitor.table().query("quantity == 'update_rms' and layer == 'wte'")["step"]) == [0, 1, 2]


def test_a_step_without_gradients_or_optimizer_is_told():
    model = NanoGPT()
    with quietly(model, every=1) as monitor:
        with pytest.raises(RuntimeError, match="no weight has a gradient: call step"):
            monitor.step()
        steps_of(model, monitor)
        with pytest.warns(UserWarning, match="no step of a torch optimizer on wte followed"):
            steps_of(model, monitor)
    with pytest.raises(RuntimeError, match="the monitor is closed"):
        monitor.step()
    with pytest.raises(ValueError, match="every must be 1 or more"):
        StabilityMonitor(model, every=0)


def test_root_mean_squares_of_half_precision_do_not_overflow():
    found = probes.rms_of("g", {"x": torch.full((500, 500), 1e3, dtype=torch.float16)})
    assert float(found["g/x"]) == pytest.approx(1e3, rel=1e-3)


# other people's loops

def rows(n: int = 16) -> list[dict]:
    tokens = torch.randint(3, V, (n, T), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


def with_trainer(tmp_path, model, callback, steps: int = 4, **changes):
    arguments = transformers.TrainingArguments(str(tmp_path), **{
        "max_steps": steps, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | changes)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(),
                                   callbacks=[callback] if callback else [])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], [*trainer.model.parameters()]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_trainer_of_hugging_face(tmp_path, compiled):
    torch.compiler.reset()
    changes = dict(torch_compile=True, torch_compile_backend="aot_eager") if compiled else {}
    logged, callback = [], trainer_callback(every=2, alarms=(), log=lambda row, step: logged.append((step, row)))
    losses, weights = with_trainer(tmp_path, build("LlamaForCausalLM"), callback, **changes)
    plain = with_trainer(tmp_path, build("LlamaForCausalLM"), None, **changes)
    assert losses == plain[0] and same(weights, plain[1])
    assert [step for step, _ in logged] == [0, 2]
    assert {"attention_logit_max/model.layers.1.self_attn/head3", "update_rms/lm_head"} <= set(logged[0][1])
    table = callback.monitor.table()
    assert list(table[table["quantity"] == "loss"]["value"]) == pytest.approx(losses, rel=1e-3)  # it logs rounded ones


def test_stop_in_the_trainer_leaves_the_weights_of_the_step_before(tmp_path):
    model = build("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight *= 1e6
    before = [p.detach().clone() for p in model.parameters()]
    callback = trainer_callback(every=1, alarms=alarming(action="stop"))
    with pytest.warns(UserWarning, match="training stops before this step is made. step 0: attention_logit_max/"):
        losses, weights = with_trainer(tmp_path, model, callback)
    assert same(before, weights) and len(losses) <= 1


LATE = [alarms.Alarm("gradient_over_eps", below=math.inf, action="stop")]
"""Goes off in the first step, once that is made."""


def test_an_alarm_that_is_known_after_the_step_ends_training_in_the_trainer_without_an_exception(tmp_path):
    with pytest.warns(UserWarning, match="training stops after this step. step 0: gradient_over_eps/"):
        losses, _ = with_trainer(tmp_path, build("LlamaForCausalLM"), trainer_callback(every=1, alarms=LATE))
    assert len(losses) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance", "ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*litlogger")
def test_the_trainer_of_lightning(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", exc_type=ImportError)

    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = NanoGPT()

        def training_step(self, batch, _):
            return self.model(batch, batch)[1]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def train(*callbacks) -> list:
        torch.manual_seed(0)
        module = Lit()
        batches = torch.utils.data.DataLoader(torch.randint(V, (8, T)), batch_size=2)
        pl.Trainer(max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
                   enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
                   callbacks=[*callbacks]).fit(module, batches)
        return [*module.parameters()]

    logged, callback = [], lightning_callback(every=2, alarms=(), log=lambda row, step: logged.append((step, row)))
    assert same(train(callback), train())
    assert [step for step, _ in logged] == [0, 2] and {"loss", "update_rms/wte"} <= set(logged[0][1])
    with pytest.warns(UserWarning, match="training stops before this step"):
        stopped = train(lightning_callback(every=1, alarms=alarming(above=-1e9, action="stop")))
    torch.manual_seed(0)
    assert same(stopped, [*Lit().parameters()])
    late = lightning_callback(every=1, alarms=LATE)
    with pytest.warns(UserWarning, match="training stops after this step"):
        train(late)
    assert late.monitor.steps == 1
