"""Chapters find their module by the notebook's name, and grids keep the runs that the store holds."""

import hashlib
import inspect

import pytest

from stability_lib import batch, studies
from stability_lib.config import RunConfig, run_key

GOLDEN = {
    "first_look": ("2554cea6", "4bd9659a", "4ca4f47b", "12c6fcf9"),
    "attention_logit_growth": ("5e96c1f0", "bda4b8ce", "726d441e", "ceddf09d"),
    "attention_patterns": ("3ad3f9e8", "d4949ad0", "fa04bc7c", "037316a5"),
    "output_logit_floor": ("a49cf61d", "786af0e1", "28544012", "c6b9d133"),
    "output_logit_harm": ("4eb93c53", "ac90c4c1", "625db3e6", "fcd32fc5"),
    "mu_parametrization": ("a0bf9d84", "86403daa", "80ac5fc1", "f53a9894"),
    "divergence_sweep": ("27321b1f", "2ee10e3e", "7f451b75", "27a07177"),
    "unseen_architectures": ("d6d14d62", "2910d2f1", "dc6e784b", "4767ca9c"),
    "spectra_at_init": ("b54dfee1", "8d28834a", "bd424aa1", "ee992d65"),
    "kss_divergence": ("5deded01", "f6cc54a4", "05a1c08c", "70b99fc9"),
    "kss_dose": ("b002c90a", "c104433e", "c7e1791f", "00dcc1b6"),
    "kss_readings": ("fbcd31a8", "d43200c4", "acd90282", "4b6e77e7"),
    "kss_ablations": ("910f9844", "37232e21", "8341a4cd", "2bc26a1d"),
    "kss_learning": ("1bf15f0b", "942fd47d", "0fe60db5", "510de25f"),
    "warm_up": ("a2c184b8", "438102f6", "6565ab59", "56e4d0f6"),
    "weight_decay": ("1b8bac46", "320d3205", "f22c4266", "df22640c"),
    "steps_and_batch": ("74e6847a", "a9dcdf36", "5c5bbf8c", "408359e4"),
    "other_optimizers": ("a51d710d", "00d70c7b", "e5596783", "28d3551e"),
    "digits": ("007a9e37", "f3d28258", "aced07d3", "aced07d3"),
    "width_and_depth": ("8c048e7d", "99a8533f", "57e16dc6", "2a2b48ab"),
    "logit_growth_by_size": ("bddfcb1a", "f219f233", "6d226eea", "477edb82"),
    "logit_growth_near_failure": ("ced30ef2", "f47f916b", "d7b541d2", "88801799"),
    "logit_transplant": ("d9f2a52e", "391ab8d2", "d30f555d", "2e63cc37"),
    "adam_epsilon": ("1670a61c", "8b9dd974", "2c0964c2", "a10d9e3e"),
    "kss_baselines": ("776cdd93", "e9362512", "1d76e9f0", "c53cd774"),
    "kss_largest_stable_lr": ("30103e28", "5b78cfdf", "26446db2", "212288ad"),
    "language_text": ("769d203e", "537253f1", "4a8aacc6", "e9a21b37"),
    "language_synthetic": ("6c98ecca", "20774df8", "2296506d", "dd599d5b"),
    "vision": ("c2f42c12", "6cce8070", "2a910689", "865d8672"),
    "profiles": ("0bde522b", "926827c0", "926827c0", "926827c0"),
    "architectures": ("efa947d0", "70fa3d1f", "62ef7a11", "36acdf72"),
    "router_collapse": ("ed2b84c7", "6b546c39", "1c9e1eae", "6ba9d486"),
}
"""Of every grid, a digest of its run keys in order: a change of one retires committed runs."""


def digest(keys: list[str]) -> str:
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:8]


@pytest.mark.parametrize("study", GOLDEN)
def test_the_runs_of_a_grid_are_all_different_and_keep_their_keys(study):
    keys = [[run_key(config) for config in studies.configs(study, scale)] for scale in studies.SCALES]
    assert all(len(set(of_scale)) == len(of_scale) for of_scale in keys)
    assert tuple(map(digest, keys)) == GOLDEN[study]


def test_every_study_is_pinned():
    assert set(studies.names()) == set(GOLDEN)


def test_every_notebook_has_a_module_and_every_module_a_notebook():
    assert [path.stem for path in batch.notebooks()] == list(studies.modules())


def test_a_chapters_module_holds_grids_and_claims_and_the_grids_names_are_unique():
    grids = {}
    for module in studies.modules().values():
        assert inspect.getdoc(module)
        for study in module.STUDIES:
            assert grids.setdefault(study.__name__, study) is study
    assert list(grids) == studies.names()


def test_an_unknown_chapter_study_or_scale_is_named():
    assert studies.of_chapter("12_nowhere") == ()
    with pytest.raises(ValueError, match="unknown chapter '02_zlos': did you mean '02_zloss'"):
        studies.chapter("02_zlos")
    with pytest.raises(ValueError, match="unknown study 'warmup': did you mean 'warm_up'"):
        studies.configs("warmup", "cpu")
    with pytest.raises(ValueError, match="unknown scale 'fast': choose quick, cpu, gpu or paper"):
        studies.configs("warm_up", "fast")


def test_a_new_chapter_is_found_without_touching_anything_else(tmp_path, monkeypatch):
    (tmp_path / "c77_mine.py").write_text("def my_study(scale):\n    return []\n\n\nSTUDIES = (my_study,)\n")
    monkeypatch.setattr(studies.chapters, "__path__", [str(tmp_path)])
    studies.modules.cache_clear()
    try:
        assert studies.of_chapter("77_mine") == ("my_study",)
        assert studies.configs("my_study", "cpu") == []
    finally:
        studies.modules.cache_clear()


def test_a_scale_is_longer_than_the_one_before():
    lengths = [studies.base(scale).steps for scale in studies.SCALES]
    assert lengths == sorted(lengths)
    assert isinstance(studies.short("cpu"), RunConfig)
