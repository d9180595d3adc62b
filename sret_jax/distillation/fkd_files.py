"""Reads the published soft labels of Fast Knowledge Distillation: one torch file per image.

FOLDER/.../CLASS/IMAGE.tar contains a list (coordinates, flips, labels) for K crops. Coordinates
(K, 4) are top, left, height and width as fractions of the image's sides; flips are (K,). Labels are
class numbers and probabilities of the k best classes (K, 2, k) or of the best class (K, 2), the
number of the best class (K,), or probabilities of all classes (K, classes). See
github.com/szq0214/FKD.
"""

import dataclasses
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from sret_jax.data.sources.source import Source
from sret_jax.data.views.crops import CROP, UNIT
from sret_jax.errors import UserError, few
from sret_jax.weights.weight_files import read_torch

SUFFIXES = (".tar", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class FkdLabels:
    """The contents of a file.

    Attributes:
      crops: (K,) CROP.
      soft: probabilities (K, k).
      classes: classes of the probabilities, (K, k); None if `soft` contains all classes.
    """

    crops: np.ndarray
    soft: np.ndarray
    classes: np.ndarray | None

    @property
    def keep(self) -> str:
        """The value of `Manifest.keep` for these labels."""
        return "full" if self.classes is None else f"topk{self.soft.shape[1]}"


class FkdFolder:
    """The files in a folder, found by the names of their images.

    Raises:
      UserError: there are no such files, or an image has none or several.
    """

    def __init__(self, folder: epath.Path, source: Source):
        found: dict[str, list[epath.Path]] = {}
        paths = (place / name for place, _, names in folder.walk() for name in names)
        for path in paths:
            if path.suffix not in SUFFIXES:
                continue
            for key in (path.stem, f"{path.parent.name}/{path.stem}"):
                found.setdefault(key, []).append(path)
        if not found:
            raise UserError(f"{folder} holds no soft labels ({', '.join(SUFFIXES)}); correct it")
        self._files: list[epath.Path] = []
        missing = []
        for index in range(len(source)):
            files = found.get(_key(source.file_name(index)), [])
            if len(files) == 1:
                self._files.append(files[0])
            else:
                missing.append(f"{source.record_name(index)} has {len(files)}")
        if missing:
            raise UserError(
                f"{len(missing):,} of {len(source):,} images have not one file of labels in "
                f"{folder}: {few(missing, 3)}; give the labels of this data set"
            )
        self._classes = len(source.class_names)

    def __getitem__(self, index: int) -> FkdLabels:
        """The labels of image `index`; raises UserError if the file has another form."""
        path = self._files[index]
        content = read_torch(path)
        try:
            coordinates, flips, labels = (np.asarray(part) for part in content)
            return _checked(coordinates, flips, labels, self._classes)
        except (TypeError, ValueError) as e:
            raise UserError(
                f"{path} holds no soft labels as FKD publishes them ({e}); expected coordinates "
                f"(K, 4), flips (K,) and labels of {self._classes:,} classes"
            ) from e


def _key(file_name: str) -> str:
    """The part of a name that identifies an image: cats/001.jpg in .../train/cats/001.jpg.

    For a name without a folder it is the name without its suffix.
    """
    path = PurePath(file_name)
    return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem


def _checked(coordinates: Any, flips: Any, labels: Any, classes: int) -> FkdLabels:
    count = len(coordinates)
    if coordinates.shape != (count, 4) or flips.shape != (count,) or len(labels) != count:
        raise ValueError(f"shapes {coordinates.shape}, {flips.shape}, {labels.shape}")
    soft, best = _parts(labels.astype(np.float64), classes)
    if not ((soft >= 0) & (soft <= 1)).all():
        raise ValueError("probabilities outside 0 to 1")
    if best is not None and not ((best >= 0) & (best < classes) & (best % 1 == 0)).all():
        raise ValueError(f"classes outside 0 to {classes - 1}")
    top, left, height, width = coordinates.astype(np.float64).T
    box = np.stack([left, top, left + width, top + height], axis=1)  # (K, 4)
    if not ((box > -1e-4) & (box < 1 + 1e-4)).all():
        raise ValueError("crops outside the image")
    crops = np.zeros(count, CROP)
    crops["box"], crops["flip"] = np.round(box.clip(0, 1) * UNIT), flips.astype(bool)
    return FkdLabels(crops, soft, best)


def _parts(labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns probabilities and their classes, which are None for all classes."""
    if labels.shape[1:] == (classes,):
        return labels, None
    if labels.ndim == 1:
        return np.ones((len(labels), 1)), labels[:, None]
    if labels.shape[1] == 2 and labels.ndim <= 3:
        return labels[:, 1].reshape(len(labels), -1), labels[:, 0].reshape(len(labels), -1)
    raise ValueError(f"labels of shape {labels.shape}")
