"""The picture of a batch, and mistakes in asking for it."""

import numpy as np
import pytest
from PIL import Image

from configs import common
from sret_jax.tools import show_batch
from tests.conftest import run_commands

RECIPE = [f"--config.augment.{name}={value}" for name, value in common.DEIT_AUGMENT.items()]
PICTURES = {
    "first": [*RECIPE, "--rows=2", "--columns=4"],
    "second": [*RECIPE, "--rows=2", "--columns=4", "--step=1"],
}
MISTAKES = {
    "--columns=3": "--columns=3 must be even",
    "--config.data.synthetic=True": "has no images to show",
    "--rows=100": "--rows=100 times --columns=4 is more than the batch of 64; show fewer",
    "--foo": "'foo' (python -m sret_jax.tools.show_batch --help lists the flags)",
    "--config.augment.policy=rnd": "unknown policy 'rnd'",
    "--config.augment.mixupp=1.0": "did you mean 'augment.mixup'?",
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory, digits_dir):
    """The result of each command, and the folder that contains their workdirs."""
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
        assert pictures[-1].shape[1] > 1.6 * pictures[-1].shape[0]
        colours = np.unique(pictures[-1].reshape(-1, 3), axis=0)
        assert len(colours) > 100  # more than axes and text
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("target", "label"),
    [
        (
            [0.02, 0.65, 0.33],
            "65% class 7\n33% soft-coated wheaten\nterrier of which there are\nfew",
        ),
        ([0.01, 0.98, 0.01], "98% class 7"),
    ],
)
def test_a_label_has_a_line_for_each_class_and_long_names_are_wrapped(target, label):
    names = ["a", "7", "soft-coated wheaten terrier of which there are few"]
    assert show_batch._label(np.array(target), names) == label


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(flag, shown):
    done, _ = shown
    assert done[flag].returncode == 2
    (line,) = [line for line in done[flag].stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ") and MISTAKES[flag] in line
