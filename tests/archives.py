"""Tiny ILSVRC-shaped archives of real photographs."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SYNSETS = ("n01440764", "n01443537", "n01484850")
PER_CLASS, VALIDATION = 6, 10


def photographs(count: int, seed: int) -> list[Image.Image]:
    """Crops of different shapes from the two photographs of scikit-learn."""
    rng = np.random.default_rng(seed)
    pictures = load_sample_images().images
    crops = []
    for i in range(count):
        height, width = rng.integers(230, 400, 2)
        top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
        crops.append(Image.fromarray(pictures[i % 2][top : top + height, left : left + width]))
    return crops


def encode(image: Image.Image, form: str = "JPEG", mode: str = "RGB") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form)
    return buffer.getvalue()


def write_tar(path: pathlib.Path, members: dict[str, bytes]) -> bytes:
    """Writes a flat tar and returns its bytes."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def write_imagenet(folder: pathlib.Path, **validation_changes: bytes) -> pathlib.Path:
    """Writes both archives; one training image is greyscale, one CMYK and one a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    odd = {0: ("JPEG", "L"), 1: ("JPEG", "CMYK"), 2: ("PNG", "RGB")}
    classes = {}
    for c, synset in enumerate(SYNSETS):
        members = {
            f"{synset}_{i}.JPEG": encode(photo, *odd.get(c * PER_CLASS + i, ()))
            for i, photo in enumerate(photographs(PER_CLASS, seed=c))
        }
        classes[f"{synset}.tar"] = write_tar(folder / "class.tar", members)
    (folder / "class.tar").unlink()
    write_tar(folder / "ILSVRC2012_img_train.tar", classes)
    validation = {
        f"ILSVRC2012_val_{i:08d}.JPEG": encode(photo)
        for i, photo in enumerate(photographs(VALIDATION, seed=9), start=1)
    }
    write_tar(folder / "ILSVRC2012_img_val.tar", {**validation, **validation_changes})
    return folder
