"""The picture of a batch, and the mistakes one can make asking for it."""

import numpy as np
import pytest
from PIL import Image

from configs import common
from tests.conftest import run_commands

RECIPE = [f"--config.augment.{name}={value}" for name, value in common.DEIT_AUGMENT.items()]
PICTURES = {
    "first": [*RECIPE, "--rows=2", "--columns=4"],
    "second": [*RECIPE, "--rows=2", "--columns=4", "--step=1"],
}
MISTAKES = {
    "--columns=3": "--columns=3 must be even",
    "--config.data.synthetic=True": "has no images to show",
    "--rows=100": "--rows=100 times --columns=8 is more than the batch of 64; show fewer",
    "--config.augment.policy=rnd": "unknown policy 'rnd'",
    "--config.augment.mixupp=1.0": "did you mean 'augment.mixup'?",
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory, digits_dir):
    """What each of the commands did, and the folder in which each has a workdir of its name."""
    folder = tmp_path_factory.mktemp("show_batch")
    named = {**PICTURES, **{flag: [flag] for flag in MISTAKES}}
    commands = [
        [
            "sret_jax.tools.show_batch",
            f"--workdir={folder / name}",
            f"--config.data.data_dir={digits_dir}",
            *flags,
        ]
        for name, flags in named.items()
    ]
    done = run_commands(commands, tmp_path_factory.mktemp("printed"))
    return dict(zip(named, done, strict=True)), folder


def test_a_grid_of_augmented_images_with_their_mixed_labels_is_drawn(shown):
    done, folder = shown
    pictures = []
    for name in PICTURES:
        assert done[name].returncode == 0, done[name].stderr
        path = folder / name / "batch.png"
        assert f"Written: {path}" in done[name].stdout
        pictures.append(np.asarray(Image.open(path).convert("RGB")).astype(int))
        assert pictures[-1].shape[1] > 1.8 * pictures[-1].shape[0]
        colours = np.unique(pictures[-1].reshape(-1, 3), axis=0)
        assert len(colours) > 100  # more than axes and text
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(flag, shown):
    done, _ = shown
    assert done[flag].returncode == 2
    (line,) = [line for line in done[flag].stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ") and MISTAKES[flag] in line
