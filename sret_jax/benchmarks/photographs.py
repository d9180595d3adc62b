"""The photographs for benchmarks: the user's, or crops of those that scikit-learn ships."""

import io
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sret_jax.data.sources.source import Record
from sret_jax.data.views import jpeg
from sret_jax.data.views.images import BadImage, decode
from sret_jax.errors import UserError

COUNT, QUALITY = 1000, 95
JPEG_SUFFIXES = (".jpg", ".jpeg")


class Photographs:
    """JPEG files in memory, as a `Source`; image i has class i mod `classes`."""

    def __init__(self, images: list[bytes], classes: int = 1):
        self.class_names = self.classes_here = [f"photograph {label}" for label in range(classes)]
        self.remarks: list[str] = []
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return {"image": self._images[index], "label": index % len(self.class_names)}

    def record_name(self, index: int) -> str:
        """See `Source`."""
        return f"photograph {index}"

    def file_name(self, index: int) -> str:
        """See `Source`."""
        return ""

    def identities(self) -> Iterator[str]:
        """See `Source`."""
        return map(self.record_name, range(len(self)))


def make_photographs() -> list[bytes]:
    """Cuts 1,000 JPEGs of about 500x375 pixels from the two photographs of scikit-learn."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    pictures = load_sample_images().images
    return [_cut(pictures[i % 2], rng) for i in range(COUNT)]


def read_jpegs(folder: pathlib.Path) -> list[bytes]:
    """Reads the first 1,000 JPEGs of a folder and its subfolders.

    Raises:
      UserError: there are no JPEGs, or one cannot be read.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in JPEG_SUFFIXES)[:COUNT]
    if not files:
        raise UserError(f"--images={folder} holds no {' or '.join(JPEG_SUFFIXES)} files")
    images = [file.read_bytes() for file in files]
    for file, image in zip(files, images, strict=True):
        try:
            if jpeg.plain_size(image) is None:
                decode(image)
        except BadImage as e:
            raise UserError(f"--images: {file} cannot be read ({e}); leave it out") from e
    return images


def _cut(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    width, height = rng.integers(460, 541), rng.integers(340, 411)
    left = rng.integers(0, picture.shape[1] - width + 1)
    top = rng.integers(0, picture.shape[0] - height + 1)
    cut = picture[top : top + height, left : left + width]
    if rng.random() < 0.25:
        cut = np.rot90(cut)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(cut)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
