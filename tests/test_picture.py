"""Pictures as PNG files."""

import pytest
from etils import epath
from PIL import Image

from sret_jax.picture import picture


def test_a_picture_has_the_size_asked_for_and_is_whole_or_not_there(tmp_path):
    path = epath.Path(tmp_path) / "curves.png"
    with pytest.raises(ZeroDivisionError), picture(path, 2, 1, dpi=50) as figure:
        figure.subplots().plot([0, 1 / 0])
    assert not list(tmp_path.iterdir())
    with picture(path, 2, 1, dpi=50) as figure:
        figure.subplots().plot([0, 1])
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert Image.open(path).size == (100, 50)
