"""The picture of a batch, and the mistakes one can make asking for it."""

import numpy as np
import pytest
from PIL import Image

from configs import common
from tests.conftest import run_python


def show(tmp_path, digits_dir, *flags):
    return run_python(
        "-m",
        "sret_jax.tools.show_batch",
        f"--workdir={tmp_path}",
        f"--config.data.data_dir={digits_dir}",
        *flags,
    )


def test_a_grid_of_augmented_images_with_their_mixed_labels_is_drawn(tmp_path, digits_dir):
    recipe = (f"--config.augment.{name}={value}" for name, value in common.DEIT_AUGMENT.items())
    done = show(tmp_path, digits_dir, *recipe, "--rows=2", "--columns=4")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "batch.png"
    assert f"Written: {path}" in done.stdout
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[1] > 1.8 * picture.shape[0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # more than axes and text

    show(tmp_path, digits_dir, *recipe, "--rows=2", "--columns=4", "--step=1")
    other = np.asarray(Image.open(path).convert("RGB"))
    assert not np.array_equal(picture, other)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--columns=3", "--columns=3 must be even"),
        ("--config.data.synthetic=True", "has no images to show"),
        ("--rows=100", "--rows=100 times --columns=8 is more than the batch of 64; show fewer"),
        ("--config.augment.policy=rnd", "unknown policy 'rnd'"),
        ("--config.augment.mixupp=1.0", "did you mean 'augment.mixup'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(flag, sentence, tmp_path, digits_dir):
    done = show(tmp_path, digits_dir, flag)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ") and sentence in line
