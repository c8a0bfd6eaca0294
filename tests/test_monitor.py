"""The monitor against eager attention on many architectures, that it changes no bit, alarms, bad input, remedies."""

import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from stability_lib import alarms, models, probes
from stability_lib.config import RunConfig
from stability_lib.monitor import StabilityMonitor

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

@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_is_that_of_eager_attention(name, implementation, monkeypatch):
    if name == "Gemma2ForCausalLM" and implementation == "sdpa":
        pytest.skip("it has no fused attention with capped logits")
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
    p = z.softmax(-1)
    assert row[f"attention_entropy/{name}"] == pytest.approx(float(torch.special.entr(p).sum(-1).mean().detach()), rel=1e-5)


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
        assert row[f"output_rms/blocks.{i}"] == pytest.approx(watched[f"output_rms/block{i}"], rel=1e-6)
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
    monitor = quietly(model)
    del monitor
    assert not model._forward_hooks and not sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks


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
