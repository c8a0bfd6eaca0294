"""Which layers of strangers' models write the stream, and which of their token states a call's masks leave in."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    JambaConfig,
    JambaForCausalLM,
    LongformerConfig,
    LongformerModel,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
    ZambaConfig,
    ZambaForCausalLM,
)

from stability_lib import koopman, shaping
from stability_lib.koopman import ProfileError, profile
from stability_lib.stream import features_last, residual_layers, token_mask

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
HYBRID = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Res(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(x).tanh()


class Other(Res):
    pass


class Dense(nn.Module):
    """A mixture in which every expert gets every token."""

    def __init__(self, width: int = 8, hidden: int = 8):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, hidden) for _ in range(4))
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(sum(expert(x) for expert in self.experts))


class Model(nn.Module):
    def __init__(self, blocks, head=None, **others):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head or nn.Identity()
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def ids(batch: int = 8, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length))


def right_padded(batch: int = 8, length: int = 12, real: int = 9) -> torch.Tensor:
    return (torch.arange(length) < real).long().expand(batch, length)


def jamba():
    return JambaForCausalLM(JambaConfig(
        **HYBRID, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=2, mamba_d_state=4))


def zamba():
    return ZambaForCausalLM(ZambaConfig(**HYBRID, num_hidden_layers=5, attn_layer_period=2, attn_layer_offset=0,
                                        mamba_d_state=4))


def olmo_hybrid():
    return OlmoHybridForCausalLM(OlmoHybridConfig(
        **HYBRID, num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                                               decoder_start_token_id=0))


# which layers

@pytest.mark.parametrize("build", [jamba, zamba, olmo_hybrid])
def test_a_decoder_of_mixed_classes_is_a_stack(build):
    model = build()
    assert residual_layers(model) == list(model.model.layers)
    found = profile(model, {"input_ids": ids()}, kreiss=False)
    assert len(found) == len(model.model.layers)
    model.vision = nn.ModuleList(Res(64) for _ in range(2))
    with pytest.raises(ProfileError, match=r"several stacks, .*model\.layers"):
        residual_layers(model)


def test_blocks_of_alternating_classes_and_those_that_hold_experts_are_the_stack():
    head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    few, many = Model([Res(), Other(), Res(), Other()], head), Model([kind() for kind in (Res, Other) * 20], head)
    assert residual_layers(many) == list(many.blocks)
    with pytest.raises(ProfileError, match="several stacks, blocks, head"):
        residual_layers(few)
    for blocks in ([Res(), Res(), Dense(), Res()], [Res(), Dense()], [Res(), nn.Identity(), Dense(hidden=64)]):
        model = Model(blocks)
        assert residual_layers(model) == blocks
        assert len(profile(model, torch.randn(50, 8))) == len(blocks)
    chained = nn.Sequential(Res(), Dense(), Res())
    assert residual_layers(chained) == list(chained)
    whole = nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.ReLU()), nn.ModuleList([Res(), Other()]), nn.Linear(8, 1))
    assert residual_layers(whole) == list(whole[1])


def test_experts_beside_each_other_are_no_stream():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Res() for _ in range(3))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    model, x = Experts(), torch.randn(50, 8)
    with pytest.raises(ProfileError, match="get the same input, side by side"):
        profile(model, x)
    assert len(profile(model, x, layers="experts")) == 3  # the user's own choice


# which dimension

class Conv(nn.Module):
    def __init__(self, kind, channels: int = 4):
        super().__init__()
        self.conv = kind(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()


@pytest.mark.parametrize("kind, shape", [(nn.Conv2d, (6, 4, 5, 8)), (nn.Conv1d, (40, 4, 7))])
def test_the_features_of_a_convnet_are_its_channels_or_asked_for(kind, shape):
    model, x = nn.Sequential(*(Conv(kind) for _ in range(2))), torch.randn(shape)
    with pytest.raises(ProfileError, match="channel_dim="):
        profile(model, x)
    found = profile(model, x, channel_dim=1).layers[0]
    assert (found.width, found.snapshots) == (4, x.numel() // 4)
    with pytest.raises(ProfileError, match="channel_dim 7 is none"):
        profile(model, x, channel_dim=7)
    assert features_last(torch.randn(2, 4, 6), Res(6)).shape == (2, 4, 6)


# which tokens

def kept(model, layer, leading=(8, 12), args=(), **call) -> int | None:
    mask = token_mask(model, args, call, leading, layer=layer)
    return None if mask is None else int(mask.sum())


def test_each_side_of_a_model_with_two_has_its_own_mask():
    model, tokens, mask = t5(), ids(), right_padded()
    call = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens}
    cut = right_padded(real=5)
    both = call | {"decoder_attention_mask": cut}
    for inputs, layers, snapshots in ((call, "decoder.block", 96), (call, "encoder.block", 72),
                                      (both, "decoder.block", 40), (both, "encoder.block", 72)):
        assert profile(model, inputs, layers=layers, kreiss=False).layers[0].snapshots == snapshots
    short = call | {"decoder_input_ids": tokens[:, :7]}
    assert profile(model, short, layers="decoder.block", kreiss=False).layers[0].snapshots == 56


def test_a_decoder_that_makes_its_own_input_is_not_hidden_by_the_encoders_mask():
    model = BartModel(BartConfig(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32,
                                 encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=32))
    call = {"input_ids": ids(), "attention_mask": right_padded()}
    assert kept(model, model.decoder.layers[0], **call) is None
    assert kept(model, model.encoder.layers[1], **call) == 72


def test_a_texts_mask_hides_no_patches():
    small = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"num_hidden_layers": 2}
    model = CLIPModel(CLIPConfig(text_config=small | {"vocab_size": 40, "eos_token_id": 2},
                                 vision_config=small | {"image_size": 8, "patch_size": 4}, projection_dim=8))
    call = {"input_ids": ids(8, 5), "attention_mask": right_padded(8, 5, 3)}  # 4 patches and a class token
    assert kept(model, model.vision_model.encoder.layers[0], (8, 5), **call) is None
    assert kept(model, model.text_model.encoder.layers[0], (8, 5), **call) == 24


def test_masks_given_by_position_count():
    model, mask = GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)), right_padded()
    assert kept(model, model.h[0], args=(ids(), None, mask)) == 72
    assert profile(model, (ids(), None, mask), kreiss=False).layers[0].snapshots == 72


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_padding_masks_mark_what_is_hidden(batch_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    pad = right_padded(12) == 0
    leading = (12, 12)
    expected = ~pad if batch_first else ~pad.T
    added = torch.zeros(12, 12).masked_fill(pad, -math.inf)
    x = torch.randn(*leading, 16)
    for args, kwargs in (((x, torch.ones(12, 12), pad), {}), ((x,), {"src_key_padding_mask": added})):
        assert torch.equal(token_mask(model, args, kwargs, leading, layer=model.layers[0]), expected)
    assert token_mask(model, (x, torch.ones(12, 12)), {}, leading, layer=model.layers[0]) is None


def test_states_that_lie_time_first_have_the_mask_turned():
    model = XLNetModel(XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32))
    for batch in (8, 12):
        mask = right_padded(batch)
        found = token_mask(model, (), {"attention_mask": mask}, (12, batch), layer=model.layer[0])
        assert torch.equal(found, mask.T.bool())
    call = {"input_ids": ids(), "attention_mask": right_padded()}
    assert profile(model, call, kreiss=False).layers[0].snapshots == 72


def test_a_mask_that_cannot_be_matched_is_refused_and_positions_are_the_remedy():
    model = LongformerModel(LongformerConfig(**SMALL, num_hidden_layers=2, attention_window=8,
                                             max_position_embeddings=64))
    call = {"input_ids": ids(), "attention_mask": right_padded()}
    with pytest.raises(ProfileError, match=r"attention_mask \(8, 12\) cannot be matched .*\(8, 16\).*positions="):
        profile(model, call)
    found = profile(model, call, kreiss=False,
                    positions=lambda c: nn.functional.pad(c["attention_mask"], (0, 4)).bool())
    assert found.layers[0].snapshots == 72

    gpt2 = GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    four = {"input_ids": ids(), "attention_mask": torch.ones(8, 1, 12, 12, dtype=torch.bool).tril()}
    with pytest.raises(ProfileError, match="cannot be matched"):
        profile(gpt2, four)
    assert profile(gpt2, four, positions=[-1], kreiss=False).layers[0].snapshots == 8


class Masked(Model):
    def forward(self, x, mask=None):
        return super().forward(x)


def test_a_mask_of_unknown_meaning_is_refused_but_for_one_of_who_sees_whom():
    model = Masked([Res(), Res()])
    with pytest.raises(ProfileError, match=r"mask .* cannot be matched"):
        profile(model, (torch.randn(6, 4, 8), torch.ones(6, 4)))
    assert len(profile(model, (torch.randn(6, 4, 8), torch.ones(4, 4).tril()))) == 2


class Hides(nn.Module):
    """Takes a mask, or lengths, under a name of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, tokens, valid=None, lengths=None):
        if lengths is not None:
            valid = torch.arange(tokens.shape[1]) < lengths[:, None]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if valid is None else ~valid)
        return x


@pytest.mark.parametrize("hidden", [dict(valid=torch.arange(6).expand(4, 6) < 5), dict(lengths=torch.full((4,), 5))])
def test_a_mask_of_the_models_own_naming_is_refused_rather_than_ignored(hidden):
    model, tokens = Hides(), torch.randint(9, (4, 6))
    remedy = "cannot be matched to the token states.*positions="
    with pytest.raises(ProfileError, match=remedy):
        koopman.profile(model, {"tokens": tokens, **hidden})
    settings = shaping.Settings(penalty="residual_norm")
    with shaping.KSS(model, settings) as kss, pytest.raises(ProfileError, match=remedy):
        model(tokens, **hidden)
        kss.penalty()
    assert len(koopman.profile(model, {"tokens": tokens, **hidden}, positions=lambda inputs: torch.ones(
        4, 6, dtype=torch.bool))) == 2


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 8, 3), (2, 8, 10), (8, 10, 10)])
def test_states_of_convolutions_alone_need_their_channel_dimension_named(shape):
    convolution = nn.Conv1d(8, 8, 3, padding=1) if shape[0] == 2 else nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(convolution, convolution)
    with pytest.raises(ProfileError, match="name theirs with channel_dim="):
        koopman.profile(model, torch.randn(shape))
    assert koopman.profile(model, torch.randn(shape), channel_dim=-len(shape) + (shape[0] == 2)).layers[0].width == 8


def test_complex_states_are_refused_by_shaping_as_by_the_profile():
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.complex64) for _ in range(2)))
    states = torch.randn(8, 4, dtype=torch.complex64)
    with pytest.raises(ProfileError, match="has complex states"):
        koopman.profile(model, states)
    with shaping.KSS(model) as kss, pytest.raises(ProfileError, match="has complex states"):
        model(states)
        kss.penalty()


@pytest.mark.parametrize("options, message", [
    (dict(channel_dim=1.5), "channel_dim 1.5 is none of"), (dict(thresholds=None), "thresholds must be Thresholds")])
def test_options_of_a_profile_are_checked(options, message):
    with pytest.raises(ProfileError, match=message):
        koopman.profile(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4), **options)


def test_numbers_that_are_no_tensors_are_refused():
    with pytest.raises(ProfileError, match=r"of type int: pass tensors, as torch\.as_tensor"):
        koopman.profile(Hides(), [[1, 2], [3, 4]])
