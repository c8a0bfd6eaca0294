"""Chapters find their module by the notebook's name, and grids keep the runs that the store holds."""

import hashlib
import inspect

import pytest

from stability_lib import batch, models, replicas, runs, studies
from stability_lib.chapters import c04_rksp_auroc
from stability_lib.config import RunConfig, run_key

GOLDEN = {
    "first_look": ("2554cea6", "4bd9659a", "3ab43710", "12c6fcf9"),
    "attention_logit_growth": ("5e96c1f0", "bda4b8ce", "16b04d94", "ceddf09d"),
    "attention_patterns": ("3ad3f9e8", "d4949ad0", "10c3c07f", "037316a5"),
    "output_logit_floor": ("a49cf61d", "786af0e1", "ad518a84", "c6b9d133"),
    "output_logit_harm": ("4eb93c53", "ac90c4c1", "9d08d04c", "fcd32fc5"),
    "output_logit_held": ("b9eca0d6", "ec22cf9e", "c0d460cf", "444533b1"),
    "output_logit_drift": ("6a26a577", "2de6a1a0", "a72325e1", "eb9eeee4"),
    "output_logit_seeds": ("ccaa61e5", "eba324b5", "3b44b52d", "f56199e7"),
    "output_logit_floor_long": ("e3b0c442", "2d3d521a", "e07d17f1", "04576a19"),
    "mu_parametrization": ("a0bf9d84", "86403daa", "b1962fc5", "f53a9894"),
    "mu_parametrization_seeds": ("b57d3deb", "2d0a12bd", "54c1b431", "6cd8ea70"),
    "muparam_weight_decay": ("e9a8a0ed", "49f935ab", "40eb46f4", "a207e274"),
    "muparam_more_seeds": ("f04b262e", "7de50814", "e18e4e28", "407a047d"),
    "divergence_sweep": ("27321b1f", "2ee10e3e", "7139d7a2", "27a07177"),
    "wider_sweep": ("f0a5f938", "be54b1b4", "c38d0e6f", "0d26b986"),
    "without_norms": ("aa2caf94", "d3816f14", "4439c25d", "b67f9533"),
    "spectra_at_init": ("b54dfee1", "8d28834a", "1197443b", "ee992d65"),
    "spectra_wider": ("5ea2edf6", "a2e4009f", "8bd689c8", "0f40ba7a"),
    "kss_divergence": ("5deded01", "f6cc54a4", "a0a7787b", "70b99fc9"),
    "kss_more_seeds": ("0ddcf798", "ea7c202e", "bcb63134", "6d74defe"),
    "kss_dose": ("b002c90a", "c104433e", "ef2b81d1", "00dcc1b6"),
    "kss_readings": ("fbcd31a8", "d43200c4", "ef2b81d1", "4b6e77e7"),
    "kss_ablations": ("910f9844", "37232e21", "17ce6f0a", "2bc26a1d"),
    "kss_learning": ("1bf15f0b", "942fd47d", "7fbade69", "510de25f"),
    "kss_fair": ("d3f455cb", "98fc530d", "aeace8bd", "50f152e7"),
    "kss_fair_seeds": ("d3f455cb", "cf545796", "deeb435f", "62003a4b"),
    "kss_window": ("70838fe6", "b5661998", "aeace8bd", "3aa279e1"),
    "kss_matched": ("17d5a485", "fac7fdfb", "b7250dab", "e63ac1b9"),
    "kss_warm_up": ("9311a576", "498a9ab3", "da8dd72d", "f474fda5"),
    "kss_wider": ("0e608e43", "4d75bb6a", "e89b919c", "249a19cc"),
    "kss_longer": ("fd484451", "9bc8ae5e", "9c017dd4", "8a4362b6"),
    "kss_open_seeds": ("af709dcc", "bbe3ce99", "07de7ed3", "cc79ecea"),
    "kss_parts_seeds": ("17d5a485", "95351a22", "b7250dab", "d9d98ffe"),
    "warm_up": ("a2c184b8", "438102f6", "1b36ba46", "56e4d0f6"),
    "weight_decay": ("1b8bac46", "320d3205", "b58b334d", "df22640c"),
    "steps_and_batch": ("74e6847a", "a9dcdf36", "4e78a75a", "408359e4"),
    "warm_up_long": ("1cf6f0da", "909a4464", "18e6afc2", "c501c2d7"),
    "weight_decay_long": ("c57ac6ff", "8c3910a5", "ff31cf95", "91e956cb"),
    "best_lr_by_decay": ("21eb1601", "7b4a8dc5", "5b625544", "ef33c146"),
    "longer_runs": ("9ab8189e", "0d2ce3b5", "a393a38f", "51abba21"),
    "width_and_depth": ("8c048e7d", "99a8533f", "2ffc9253", "2a2b48ab"),
    "width_and_depth_wider": ("8c048e7d", "8a715557", "71b136e9", "2a2b48ab"),
    "logit_growth_by_size": ("bddfcb1a", "f219f233", "62c0cf1b", "477edb82"),
    "logit_growth_near_failure": ("ced30ef2", "f47f916b", "7d853a58", "88801799"),
    "logit_growth_new_rates": ("ced30ef2", "c7eb934a", "140e8e84", "c4108569"),
    "logit_transplant": ("d9f2a52e", "391ab8d2", "cb6115a8", "2e63cc37"),
    "logit_transplant_heads": ("956077ea", "6faca0db", "b51399db", "df315bca"),
    "adam_epsilon": ("1670a61c", "8b9dd974", "c9021196", "a10d9e3e"),
    "adam_epsilon_seeds": ("95c9e91f", "bc106797", "e8115663", "0725dd76"),
    "decay_by_size": ("3336e8a0", "628a621d", "66f62258", "7e8af932"),
    "adam_epsilon_switch": ("1216b811", "603487c8", "23a59eb0", "1c86c994"),
    "kss_baselines": ("776cdd93", "e9362512", "66601f9d", "c53cd774"),
    "kss_largest_stable_lr": ("30103e28", "5b78cfdf", "65c2b1e8", "212288ad"),
    "kss_normed": ("6068d45d", "a7240abd", "438c6b8a", "a846e59d"),
    "kss_normed_finer": ("762f5353", "e4c2e09b", "de6ceecf", "393480dc"),
    "kss_rmsnorm_seeds": ("762f5353", "eb048023", "de6ceecf", "7a52cdca"),
    "kss_beyond": ("4fc33690", "9272a46e", "61296871", "0e472ed2"),
    "language_text": ("769d203e", "537253f1", "765076b7", "e9a21b37"),
    "language_synthetic": ("6c98ecca", "20774df8", "cfe433f4", "dd599d5b"),
    "language_synthetic_sizes": ("e3b0c442", "3072cf5b", "bac2f734", "64bf00d3"),
    "language_seeds": ("21f541a7", "37383ea6", "b1157e70", "49292842"),
    "vision": ("c2f42c12", "01d109b3", "2a910689", "865d8672"),
    "vision_seeds": ("bef7caea", "5f894260", "2a910689", "865d8672"),
    "vision_pre_ln": ("c2f42c12", "9d1cc45a", "2a910689", "865d8672"),
    "vision_longer": ("c2f42c12", "b5d13a2f", "033901f7", "865d8672"),
    "profiles": ("0bde522b", "926827c0", "838fd24e", "787bbef3"),
    "profiles_seeds": ("0bde522b", "c185ebf3", "838fd24e", "787bbef3"),
    "architectures": ("efa947d0", "70fa3d1f", "f279cff5", "36acdf72"),
    "router_collapse": ("ed2b84c7", "4b173471", "eb3f9c09", "7ea6cf89"),
    "remedies_of_both": ("fc3da914", "e4d63a33", "242c120d", "4607ce3a"),
    "remedies_seeds": ("fc3da914", "17e99d15", "242c120d", "4607ce3a"),
    "norm_placements": ("68868249", "8a52d55a", "988c7340", "64f6b548"),
    "profiles_at_start": ("7e51a082", "4dd3fdbf", "698306a1", "ca1632dd"),
    "near_failing": ("13afa5e0", "7e1e5c8b", "351b793e", "1994c51a"),
    "acted_on": ("018b4140", "1ff51529", "7e7e08ad", "de756283"),
    "later_remedies": ("6bde7626", "9f2c0110", "2bb35e6e", "31a0cbc8"),
    "remedy_cost": ("08e443fe", "5cf4715a", "b06eaddf", "1217145c"),
    "later_remedies_smaller": ("e3b0c442", "14448eda", "50f75397", "431215ea"),
    "later_remedies_larger": ("e3b0c442", "cb0b41c0", "80ae2529", "9b142e44"),
    "later_remedies_lower": ("e3b0c442", "265206ba", "c3d39aee", "0971972b"),
    "unseen_architectures": ("d6d14d62", "2910d2f1", "ae2b051b", "4767ca9c"),
    "drawn_architectures": ("2d1ed4d1", "661b8f61", "e83c3a23", "c6a53ad5"),
    "spectra_of_drawn": ("2dc53451", "c8ac391d", "7e2896cc", "b2a71848"),
    "other_optimizers": ("a51d710d", "00d70c7b", "983c199c", "28d3551e"),
    "fixed_gains": ("39147008", "20b0b538", "72cd472c", "095ff70a"),
    "digits": ("007a9e37", "f3d28258", "c0c5e9d1", "aced07d3"),
    "digits_seeds": ("0e377cae", "bc91f10e", "c3a73f79", "3f561244"),
    "digits_many_seeds": ("e3b0c442", "2c65c46a", "cbef33a4", "c2237514"),
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


NOT_LONGER_RUNS = ("kss_divergence", "kss_dose", "kss_readings", "kss_ablations", "kss_learning", "kss_baselines",
                   "kss_largest_stable_lr", "kss_more_seeds", "kss_fair", "kss_window", "kss_matched",
                   "kss_warm_up", "kss_wider", "kss_longer", "kss_normed", "kss_normed_finer", "kss_beyond",
                   "spectra_at_init", "language_text",
                   "language_synthetic", "language_synthetic_sizes", "language_seeds", "vision", "vision_seeds",
                   "vision_pre_ln", "vision_longer", "profiles", "profiles_seeds", "architectures",
                   "warm_up_long", "weight_decay_long", "longer_runs",
                   "router_collapse", "remedies_of_both", "remedies_seeds", "norm_placements", "profiles_at_start",
                   "near_failing", "acted_on", "later_remedies", "remedy_cost", "later_remedies_smaller",
                   "later_remedies_larger", "later_remedies_lower", "muparam_more_seeds",
                   "width_and_depth_wider", "output_logit_floor_long", "wider_sweep", "without_norms", "spectra_wider",
                   "spectra_of_drawn", "kss_fair_seeds", "kss_open_seeds", "kss_parts_seeds",
                   "kss_rmsnorm_seeds", "logit_growth_new_rates",
                   "logit_transplant_heads")
"""Most of these train one run at a time: see docs/gpu.md."""


@pytest.mark.parametrize("name", [name for name in studies.modules() if studies.of_chapter(name)])
def test_a_chapter_at_scale_gpu_fits_a_coffee_break_on_the_assumed_card(name):
    """What it shares with an earlier chapter counts there; seeds that decide a claim come on top, see docs/gpu.md."""
    earlier = {study for other in studies.modules() if other < name for study in studies.of_chapter(other)}
    new = {c: study for study in studies.of_chapter(name) if study not in earlier
           if study != "kss_fair_seeds"
           for c in studies.configs(study, "gpu")}  # a run of two studies trains once
    assert replicas.reckoned_seconds([*new]) <= 600


@pytest.mark.parametrize("study", studies.names())
def test_scale_gpu_has_ten_times_the_size_and_length_of_cpu(study):
    here, there = ([c for c in studies.configs(study, scale) if study != "spectra_at_init" or c.spectra_kreiss]
                   for scale in ("gpu", "cpu"))
    largest = [max(models.n_params(c) for c in configs) for configs in (here, there)]
    assert largest[0] >= 10 * largest[1]
    for name, pick in (("steps", min), ("steps", max)):
        least = 1 if study in NOT_LONGER_RUNS else 10
        assert pick(getattr(c, name) for c in here) >= least * pick(getattr(c, name) for c in there)
    assert max(c.seq_len for c in here) >= max(c.seq_len for c in there)
    assert {c.seed for c in here} >= {c.seed for c in there} or len({c.seed for c in here}) >= 3


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


def test_runs_are_joined_to_the_profile_of_the_model_they_started_from():
    """Rows of chapter 04's sweep, by hand: the mean over layers, the first and the last of them."""
    stored = {study: runs.frame(list(runs.load(runs.locate(study, "cpu")).values()))
              for study in ("divergence_sweep", "spectra_at_init")}
    spectra = stored["spectra_at_init"].query("spectra_kreiss")
    profiles = c04_rksp_auroc.of_models(spectra)
    joined = c04_rksp_auroc.with_profiles(stored["divergence_sweep"], profiles)
    assert joined["key"].tolist() == stored["divergence_sweep"]["key"].tolist()
    run = joined.query("norm == 'post_ln' and d_model == 64 and n_layers == 4 and seed == 123").iloc[0]
    curves = spectra.query("norm == 'post_ln' and d_model == 64 and n_layers == 4 and seed == 123").iloc[0]["curves"]
    layers = [curves[f"spectral_radius/block{i}"][0] for i in range(4)]
    assert run["spectral_radius"] == pytest.approx(sum(layers) / 4, rel=1e-4)
    assert (run["rho_first"], run["rho_last"]) == (layers[0], layers[3])
    assert (run["setting"], run["no_norms"]) == ("post_ln 64x4", 0.0)
    without = spectra.assign(curves=[{name: values for name, values in each.items() if not name.startswith("kreiss")}
                                     for each in spectra["curves"]])
    assert c04_rksp_auroc.of_models(without)["log_kreiss"].isna().all()
