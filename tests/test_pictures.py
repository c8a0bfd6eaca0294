"""The pictures show what the library computes."""

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest

from stability_lib import batch, data, koopman, models, pictures


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_the_profile_shows_the_eigenvalues_of_the_block_between_the_states_it_shows():
    model = models.build(pictures.SETTING, data.vocab_size(pictures.SETTING))
    x, y = pictures.states_around(model, model.blocks[1], data.validation(pictures.SETTING)[:, :-1], 1024)
    *_, plane = pictures.profile_picture().axes
    drawn = np.concatenate([dots.get_offsets() for dots in plane.collections]) @ [1, 1j]
    expected = koopman.eigenvalues(x, y)
    assert len(drawn) == len(expected)
    assert np.allclose(np.sort_complex(drawn.round(8)), np.sort_complex(expected.round(8)), atol=1e-6)
    counted = [int(text.get_text().split(": ")[1]) for text in plane.get_legend().get_texts()]
    assert sum(counted) == len(expected)
    assert plane.get_title().split()[5] == f"{counted[0] / len(expected):.2f}"


@pytest.mark.slow
def test_pictures_are_written_where_they_are_committed(tmp_path):
    written = pictures.write(tmp_path)
    committed = batch.checkout() / pictures.FOLDER
    assert {path.name for path in written} <= {path.name for path in committed.iterdir()}
    for folder in (tmp_path, committed):
        with PIL.Image.open(folder / "learning_rates.gif") as moving:
            assert moving.n_frames == 7
