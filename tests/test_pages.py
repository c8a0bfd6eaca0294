"""The page of a profile: self-contained, whole or not there, and with its warnings; and the command that writes it."""

import re
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from stability_lib import checkpoint, koopman, pages
from stability_lib.__main__ import main
from stability_lib.koopman import Profile


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small LLaMAs with a tokenizer of bytes."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bytes_ = Tokenizer(BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    bytes_.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made = []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        made.append(tmp_path_factory.mktemp("models") / name)
        LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                                     num_attention_heads=2, bos_token_id=0, eos_token_id=0,
                                     pad_token_id=0)).save_pretrained(made[-1])
        PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(made[-1])
    return made


def small(snapshots: int, **settings) -> Profile:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    return koopman.profile(layers, torch.randn(snapshots, 8), **settings)


def test_a_page_needs_nothing_but_itself_and_holds_every_layer():
    text = pages.page({"a <model>": small(100)}, {"a <model>": {"revision": "main"}})
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text) and "<script" not in text
    assert text.count("data:image/png;base64,") == 2 and "a &lt;model&gt;" in text and "<model>" not in text
    assert all(f"<th>{number}</th>" in text for number in range(3)) and "revision" in text
    assert "15 of 72" in text or "0 of 144" in text or "0 of 36" in text  # beside the flow, how often it was right
    assert "What this does not mean" in text and torch.__version__ in text


@pytest.mark.parametrize("snapshots, rank, warning", [
    (6, None, "<b>eta and all residuals are 0"), (20, None, "look smaller than they are"), (100, None, None),
    (20, 4, None)])
def test_a_page_warns_of_too_few_token_states(snapshots, rank, warning):
    found = small(snapshots, rank=rank)
    text = pages.page({"model": found})
    assert ('class="warning"' in text) == (warning is not None)
    assert warning is None or (warning in text and "Use 32 or more" in text)
    assert found.states_wanted == (16 if rank else 32)


def test_the_command_writes_page_and_json_and_prints_the_table(folders, tmp_path, capsys):
    assert main(["profile", str(folders[0]), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"first.html", "first.json"}
    read = Profile.load(tmp_path / "first.json")
    assert len(read) == 3 and read.layers[0].snapshots == 2048
    assert read.verdict() in printed and "near_unit_mass" in printed and str(tmp_path / "first.html") in printed

    (tmp_path / "prompts.txt").write_text("One prompt a line.\n\nAnd another one, a little longer.\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--rank", "4", "--layers", "layers", "--output",
                 str(tmp_path)]
    assert main(["profile", "--compare", *map(str, folders), *arguments]) == 0
    few = Profile.load(tmp_path / "second.json")
    assert (few.rank, few.layers[0].snapshots) == (4, len("One prompt a line.And another one, a little longer."))
    text = (tmp_path / "first-against-second.html").read_text()
    assert "Means over layers" in text and text.count("data:image/png;base64,") == 3
    assert main(["profile", "--compare", str(tmp_path / "second.json"), str(folders[0]), *arguments]) == 0
    assert (tmp_path / "second-against-first.html").exists()


def test_a_failure_leaves_the_old_page_and_the_finished_layers(folders, tmp_path, monkeypatch):
    (tmp_path / "first.html").write_text("the old page")
    monkeypatch.setattr(pages, "_png", lambda figure: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pages.report([str(folders[0])], tmp_path, progress=False)
    assert (tmp_path / "first.html").read_text() == "the old page"
    assert {path.name for path in tmp_path.iterdir()} == {"first.html", "first.json", "unfinished"}
    monkeypatch.undo()
    monkeypatch.setattr(koopman, "layer_profile", pytest.fail)  # none is analysed again
    pages.report([str(folders[0])], tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"first.html", "first.json"}


@pytest.mark.parametrize("arguments, message", [
    (["profile"], "takes one model, or two after --compare"),
    (["profile", "a/b", "--compare", "c/d", "e/f"], "takes one model"),
    (["profile", "./nowhere"], "there is no nowhere"),
    (["profile", "--compare", "FIRST", "FIRST"], "are one: compare two models"),
    (["profile", "FIRST", "--prompts", "nowhere.txt"], "prompts nowhere.txt cannot be read"),
    (["profile", "FIRST", "--prompts", "EMPTY"], "has no text"),
    (["profile", "FIRST", "--prompts", "SHORT"], r"1 token states are too few for 16 modes.*pass 17 more, better 63"),
    (["profile", "FIRST", "--prompts", "LINE"], r"14 token .* pass 4 more, better 50, or rank=3 \(--rank 3\)"),
    (["profile", "FIRST", "--prompts", "LINE", "--rank", "13"], r"14 token states are too few for 13 modes"),
    (["profile", "--compare", "SECOND", "FIRST", "--prompts", "LINE"], r"14 token states are too few for 16 modes"),
    (["profile", "FIRST", "--layers", "nosuch"], "unknown module 'nosuch'"),
    (["profile", "FIRST", "--rank", "0"], "rank must be a whole number of at least 1"),
    (["profile", "FIRST", "--snapshots", "1"], "snapshots must be"),
    (["profile", "EMPTY"], r"is no folder"),
    (["profile", "EMPTY.json"], "No such file"),
])
def test_bad_arguments_are_named_and_leave_no_page(arguments, message, folders, tmp_path, capsys):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "short").write_text("a\n")
    (tmp_path / "line").write_text("fourteen bytes")
    names = {"FIRST": folders[0], "SECOND": folders[1], "EMPTY": tmp_path / "empty", "SHORT": tmp_path / "short",
             "LINE": tmp_path / "line"}
    output = tmp_path / "out"
    assert main([*(str(names.get(word, word)) for word in arguments), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert not output.exists()


def test_the_librarys_prompts_on_a_model_that_is_too_wide_for_them_give_a_page_that_warns(folders, tmp_path,
                                                                                          monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PROMPTS", ["fourteen bytes"])
    assert main(["profile", str(folders[0]), "--output", str(tmp_path)]) == 0
    assert "warning: 14 token states are fitted exactly by 13 modes" in capsys.readouterr().out
    text = (tmp_path / "first.html").read_text()
    assert "<b>eta and all residuals are 0 and kappa means little</b>" in text and "Use 64 or more" in text


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "stability_lib.checkpoint")
    with pytest.raises(ImportError, match=r"accelerate: pip install -e '\.\[pretrained\]'"):
        koopman.profile_checkpoint("anything")


def test_axes_against_depth_do_not_blow_small_differences_up():
    torch.manual_seed(0)
    steady = koopman.profile(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(100, 8))
    for ax, metric in zip(pages._depth({"model": steady}).axes, pages.SHOWN, strict=True):
        low, high = ax.get_ylim()
        assert low <= 0 or ax.get_yscale() == "log"
        assert metric not in pages.SHARES or (high > 1 and high < 1.1)
