"""The residual stream of anybody's model: which layers write it, which states they pass on, which tokens are real.

Dimensions: B batch, T position, D model.
"""

import contextlib
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .config import unknown

TOKEN_MASKS = {"attention_mask": ("encoder", True), "decoder_attention_mask": ("decoder", True),
               "key_padding_mask": ("encoder", False), "src_key_padding_mask": ("encoder", False),
               "tgt_key_padding_mask": ("decoder", False)}
"""Arguments that hide tokens by the conventions of transformers and torch: of which side of a model with an encoder
and a decoder, and whether True marks the real ones."""
UNSURE = ("mask", "input_mask", "padding_mask", "pad_mask", "pixel_mask", "token_mask", "src_mask", "tgt_mask")
"""Arguments that may hide tokens, by no convention; so may any bool [B, T]."""
LENGTHS = ("lengths", "length", "seq_lengths", "seq_lens", "input_lengths", "attention_lengths")


class ProfileError(ValueError):
    """A model, its layers or its states cannot be profiled; the message names what and the remedy."""


def residual_layers(model: nn.Module, layers: str | Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """The stack of layers that writes to the residual stream of `model`.

    `layers` is that stack or its name. None: the outermost `ModuleList`, or `Sequential` of two or more, whose members
    are of one class (our decoder's `blocks`, Hugging Face's `h`, `layers`, `layer`) or layers of several classes, as in
    decoders that mix attention and Mamba. Raises `ProfileError` where there is none, or another with a tenth of its
    parameters.
    """
    model = unwrapped(model)
    if isinstance(layers, str):
        known = dict(model.named_modules())
        if layers not in known:
            lists = [n for n, module in known.items() if n and isinstance(module, (nn.ModuleList, nn.Sequential))]
            raise ProfileError(unknown("module", layers, lists or [name for name in known if name]))
        layers = known[layers]
    if layers is not None:
        stack = list(layers) if isinstance(layers, (Sequence, nn.ModuleList, nn.Sequential)) else []
        if not stack or not all(isinstance(layer, nn.Module) for layer in stack):
            raise ProfileError(f"layers must be modules in a list, got {layers!r:.60}: pass the model's list of blocks")
        return stack
    sizes = {name: sum(weight.numel() for weight in stack.parameters()) for name, stack in stacks(model).items()}
    ranked = sorted(sizes, key=sizes.get, reverse=True)
    if not ranked:
        raise ProfileError(f"{type(model).__name__} has no residual stream to be seen (no list of layers): pass "
                           "layers=, the modules whose inputs and outputs are the stream")
    if len(ranked) > 1 and sizes[ranked[1]] >= sizes[ranked[0]] / 10:
        raise ProfileError(f"{type(model).__name__} has several stacks, {', '.join(ranked)}: name one with layers=")
    return list(model.get_submodule(ranked[0]))


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost stacks of layers of a model, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _is_stack(module) and not any(not outer or name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _is_stack(module: nn.Module) -> bool:
    """Of layers of one class; or of several, if none is an elementary part (`Linear`, `ReLU`) and, in a `Sequential`,
    which may also be a whole model (embedding, encoder, head), a class repeats."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 1 + isinstance(module, nn.Sequential):
        return False
    kinds = {type(layer) for layer in module}
    elementary = any(type(layer).__module__.startswith("torch.nn.") and not isinstance(layer, nn.Identity)
                     and not any(True for _ in layer.children()) for layer in module)
    repeats = isinstance(module, nn.ModuleList) or len(kinds) < len(module)
    return len(kinds) == 1 or (repeats and not elementary)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within what `torch.compile` or data parallelism made of it."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while inner := getattr(model, "_orig_mod", model.module if isinstance(model, parallel) else None):
        model = inner
    return model


def stream_states(output) -> Tensor | None:
    """The stream's states [..., D] in a layer's output, a tensor or several: the first that fits; None: none does."""
    values = output.values() if isinstance(output, Mapping) else output
    values = values if isinstance(values, (Sequence, type({}.values()))) else [values]
    return next((v for v in values if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())
                 and v.ndim >= 2), None)


def input_states(args: tuple, kwargs: Mapping) -> Tensor | None:
    """The stream's states among a layer's arguments, as `stream_states`."""
    return stream_states((*args, kwargs.get("hidden_states"), *kwargs.values()))


def features_last(states: Tensor, layer: nn.Module, channel_dim: int | None = None,
                  remedy: str = "name theirs with channel_dim= (1 for [B, C, H, W])") -> Tensor:
    """The states that `layer` passes on as [..., D], D from `channel_dim`.

    Raises `ProfileError` where it is None and D is not, or may not be, the last: images [B, C, H, W], of which no shape
    tells, [B, C, L] where parameters of the layer have the size C and none has L, and what a layer of convolutions
    alone passes on. Complex states are refused too.
    """
    if states.is_complex():
        raise ProfileError(f"{type(layer).__name__} has complex states: pass real ones, as real and imaginary parts "
                           "side by side")
    if states.is_nested:
        raise ProfileError(f"{type(layer).__name__} passes nested tensors on: pad them (torch.nested.to_padded_tensor)")
    if channel_dim is not None:
        if not isinstance(channel_dim, int) or not -states.ndim <= channel_dim < states.ndim:
            raise ProfileError(f"channel_dim {channel_dim} is none of the {states.ndim} dimensions of the states of "
                               f"{type(layer).__name__}, {tuple(states.shape)}")
        return states.movedim(channel_dim, -1)
    sizes = {size for weight in layer.parameters() for size in weight.shape}
    alone = convolves(layer) and not any(isinstance(part, (nn.Linear, nn.LayerNorm, nn.RMSNorm))
                                         for part in layer.modules())
    if states.ndim > 3 or alone or (states.ndim == 3 and states.shape[1] in sizes and states.shape[2] not in sizes):
        raise ProfileError(f"{type(layer).__name__} passes states {tuple(states.shape)} on, whose last dimension "
                           f"may not be the features: {remedy}")
    return states


def convolves(layer: nn.Module) -> bool:
    """Whether a part of the layer is a convolution."""
    return any(isinstance(part, _ConvNd) for part in layer.modules())


def token_mask(model: nn.Module, args: tuple, kwargs: Mapping, leading: Sequence[int], *, layer: nn.Module,
               remedy: str = "pass positions=, a function that marks the token states to use") -> Tensor | None:
    """The token states [*leading] that the masks in a model's call leave in, True where real; None: no mask was given.

    Args:
        args, kwargs: what `model` is called with.
        leading: the shape [B, T], or [T, B], of the stream's states without D.
        layer: one of the stream's layers: its place tells a decoder's stream, which the encoder's mask does not hide.
        remedy: what the error tells the user to do.

    Raises `ProfileError` where a mask was given that cannot be matched to the states.
    """
    signature = inspect.signature(unwrapped(model).forward)
    given, leading, path = _named(signature, args, kwargs), torch.Size(leading), _path(model, layer)
    names = set(signature.parameters)
    two = {"src", "tgt"} <= names or any(name.startswith("decoder_") for name in names)
    side = next((side for part in path for side in ("encoder", "decoder") if side in part), "neither") if two else None
    textual = given.get("input_ids") is not None or given.get("inputs_embeds") is not None
    elsewhere = textual and any(sense in part for part in path for sense in ("vision", "visual", "image", "audio"))
    found, unmatched = [], []
    for name, (of, marks_real) in TOKEN_MASKS.items():
        mask = given.get(name)
        if mask is None or elsewhere or side not in (None, of, "neither"):
            continue
        oriented = _oriented(mask, leading, model, layer) if side != "neither" else None
        if oriented is None:
            unmatched.append(name)
        else:
            found.append(_real(oriented, marks_real))
    if not found and not unmatched:
        unmatched = [name for name, value in given.items() if name not in TOKEN_MASKS and (
            _may_hide(name, value, leading, model) or (name in LENGTHS and value is not None))]
    if unmatched:
        shapes = ", ".join(f"{n} {tuple(getattr(given[n], 'shape', ())) or type(given[n]).__name__}" for n in unmatched)
        raise ProfileError(f"{shapes} cannot be matched to the token states {tuple(leading)} of "
                           f"{type(layer).__name__}: {remedy}")
    return torch.stack(found).all(0) if found else None


def _named(signature: inspect.Signature, args: tuple, kwargs: Mapping) -> dict:
    """A call's arguments by the names that the model's forward gives them."""
    try:
        named = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def _path(model: nn.Module, layer: nn.Module) -> list[str]:
    return next((name.split(".") for name, module in model.named_modules() if module is layer), [])


def _oriented(mask, leading: torch.Size, model: nn.Module, layer: nn.Module) -> Tensor | None:
    """The mask [B, T] as the states lie, [B, T] or [T, B]; None where its shape is another."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or leading not in (mask.shape, mask.shape[::-1]):
        return None
    if mask.shape != leading:
        return mask.mT
    # as many sequences as positions: no shape tells, so the few that lay time first do
    time_first = getattr(getattr(unwrapped(model), "config", None), "model_type", None) == "xlnet" or any(
        isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in layer.modules())
    return mask.mT if time_first and leading[0] == leading[1] else mask


def _real(mask: Tensor, marks_real: bool) -> Tensor:
    if mask.is_floating_point() and (not marks_real or bool((mask < 0).any())):
        return mask > -1e3  # added to attention scores: 0 or, for a hidden token, -1e4 to -inf
    return mask.bool() == marks_real


def _may_hide(name: str, mask, leading: torch.Size, model: nn.Module) -> bool:
    """Whether an argument of no convention may be a token mask; not one that says who sees whom, as a causal [T, T]
    does, which hides no token altogether."""
    if not isinstance(mask, Tensor):
        return False
    if name not in UNSURE:
        return mask.dtype == torch.bool and leading in (mask.shape, mask.shape[::-1])
    torch_own = isinstance(unwrapped(model), (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder))
    return mask.ndim > 1 and not (mask.shape[-1] == mask.shape[-2] and (torch_own or mask.shape != leading))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eager, in eval mode, without gradients; afterwards training flags, buffers and random states are what they were.

    torch's fused path for padded batches is off, as it hands nested tensors from layer to layer.
    """
    training = {module: module.training for module in model.modules()}
    buffers = [(module, name, buffer, buffer.clone()) for module in model.modules()
               for name, buffer in module._buffers.items() if buffer is not None]
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers())} - {torch.device("cpu")}
    devices = {device for device in devices if device.type != "meta"}  # offloaded
    kind = next((device.type for device in devices), "cuda")
    fused = torch.backends.mha.get_fastpath_enabled()
    # whoever has compiled a model has imported it, which takes a second
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices), device_type=kind), eager:
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield model.eval()
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, flag in training.items():
                module.training = flag
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if buffer.device.type != "meta" and not torch.equal(buffer, before):
                    buffer.copy_(before)
