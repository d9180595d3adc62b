"""A study of small models on a folder of generated JPEGs, whose runs take a few steps."""

import pathlib

import numpy as np
from PIL import Image

CONFIG = """
from sret_jax.configs import common
from sret_jax.study.design import Arm, Claim

RUNS, CLASSES = "runs/tiny", 2
ONCE = dict(loops=1)
ARMS = {
    "once": Arm(ONCE),
    "taught": Arm(ONCE, {"teacher": f"{RUNS}/teacher/0"}, teacher="teacher"),
    "stored": Arm(
        ONCE,
        {"data.soft_labels": f"{RUNS}/labels", "data.crops_per_image": 2},
        teacher="teacher",
        stored_crops=2,
    ),
    "twice": Arm(dict(loops=2)),
    "thrice": Arm(dict(loops=3)),
    "teacher": Arm(ONCE, most_seeds=1),
}
CLAIMS = {
    "loops": Claim("Recursion helps", "about 2%", (("once", "twice", "thrice"),)),
    "labels": Claim("Soft labels help", "76.0 to 77.6%", (("once", "taught", "stored"),)),
}


def get_config(arg):
    arm = ARMS[arg.partition(",")[0]]
    config = common.get_config("none")
    config.epochs, config.batch_size = 2.0, 8
    config.model.update(
        name="sret_t", image_size=16, blocks=(1,), groups=((1,),), heads=(4,), dim=8,
        dtype="float32", nll_ratio=0.0, residual="plain", **arm.model,
    )
    config.optim.update(warmup_epochs=0.0)
    config.data.update(name="cifar10", train_split="train", eval_split="test", workers=0)
    config.log_every_steps = 1
    config.update_from_flattened_dict(arm.others)
    return config
"""


def write_study(folder: pathlib.Path) -> pathlib.Path:
    """Writes tiny.py, the config of the study; returns its path."""
    path = folder / "tiny.py"
    path.write_text(CONFIG)
    return path


def write_images(folder: pathlib.Path, per_class: int = 8) -> pathlib.Path:
    """Writes images of two classes, train and test; returns their folder."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for shade, name in ((60, "dark"), (180, "light")):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for number in range(per_class):
                pixels = random.integers(shade - 40, shade + 40, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.jpg")
    return folder / "images"
