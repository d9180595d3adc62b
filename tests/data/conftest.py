"""A small folder of images for the tests of data."""

import pytest

from tests.archives import encode, photographs


@pytest.fixture
def folder(tmp_path):
    for split, per_class in (("train", 4), ("val", 2)):
        for name in ("cat", "ape", "ünder"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, photo in enumerate(photographs(per_class, seed=len(name))):
                suffix, form = (".png", "PNG") if i == 1 else (".JPG", "JPEG")
                (tmp_path / split / name / f"{i}{suffix}").write_bytes(encode(photo, form))
    return tmp_path
