"""Labels crops of every image of a data set with a teacher, and verifies such labels."""

import itertools
from collections.abc import Iterator

import grain
import numpy as np
from etils import epath

from sret_jax.data.sources.source import Source
from sret_jax.data.views.crops import CROP, draw_views, replay_views
from sret_jax.data.views.images import BadImage
from sret_jax.data.views.training_view import TrainTransform
from sret_jax.distillation.label_manifest import Manifest
from sret_jax.distillation.label_teachers import LabelTeacher, batch_rows, label
from sret_jax.distillation.label_writing import most_probable, pack, write_store
from sret_jax.distillation.soft_labels import SoftLabels
from sret_jax.distillation.soft_targets import marginal_smoothing
from sret_jax.errors import UserError
from sret_jax.parallel.host import available_cores

MOST_BYTES_AHEAD = 1 << 30  # crops that are drawn before the teacher labels them


def generate(
    source: Source,
    transform: TrainTransform,
    teacher: LabelTeacher,
    manifest: Manifest,
    folder: epath.Path,
    *,
    hosts: int = 1,
    host: int = 0,
) -> bool:
    """Labels the images of one host's shards; returns whether the store is complete.

    Args:
      source: the images.
      transform: draws the crops.
      teacher: labels the crops.
      manifest: manifest of the store.
      folder: folder of the store.
      hosts: number of hosts; see `write_store`.
      host: number of this host; see `write_store`.

    Raises:
      UserError: see `write_store`.
    """
    views = grain.MapDataset.source(_DrawnViews(source, transform, manifest))
    rows = batch_rows(manifest.crops)

    def records(numbers: range) -> Iterator[bytes]:
        drawn = iter(views[numbers.start : numbers.stop].to_iter_dataset(_read_options(manifest)))
        for images in _batched(drawn, max(1, rows // manifest.crops)):
            probabilities = label(teacher, np.concatenate([shown for _, shown in images]), rows)
            ends = np.cumsum([len(crops) for crops, _ in images])
            for (crops, _), of_image in zip(
                images, np.split(probabilities, ends[:-1]), strict=True
            ):
                yield pack(manifest, crops, *most_probable(manifest, of_image))

    return write_store(folder, manifest, records, hosts=hosts, host=host)


def verify(
    labels: SoftLabels, source: Source, teacher: LabelTeacher | None, count: int
) -> dict[str, float]:
    """Compares stored labels with the teacher's present labels, and with the true classes.

    Args:
      labels: the store.
      source: the images of the store.
      teacher: None: compares with the true classes only.
      count: number of images to compare, spread over the data set.

    Returns:
      {"images", "crops", "accuracy"}: the accuracy is the fraction of stored labels whose most
      probable class is the true one. With a teacher also "difference", the largest difference
      between two probabilities.

    Raises:
      UserError: none of the images is readable.
    """
    manifest = labels.manifest
    spread = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    right, differences, images = [], [0.0], 0
    for record in spread.tolist():
        stored, example = labels[record], source[record]
        try:
            shown = replay_views(example["image"], stored, manifest.law.image_size)
        except (BadImage, ValueError):
            continue
        images += 1
        there = _dense(manifest, *(stored[name] for name in manifest.row_labels))
        right.extend(there.argmax(axis=1) == example["label"])
        if teacher:
            now = label(teacher, shown, batch_rows(manifest.crops))
            differences.append(
                np.abs(there - _dense(manifest, *most_probable(manifest, now))).max()
            )
    if not images:
        raise UserError(f"none of {len(spread)} images of {manifest.data.name} can be read")
    result = {"images": images, "crops": len(right), "accuracy": float(np.mean(right))}
    return {**result, "difference": float(max(differences))} if teacher else result


def _dense(manifest: Manifest, kept: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(marginal_smoothing(kept, classes, manifest.data.classes))


class _DrawnViews:
    """The crops of every image and their pixels; no crops for an unreadable image."""

    def __init__(self, source: Source, transform: TrainTransform, manifest: Manifest):
        assert manifest.law.seed is not None
        self._source = source
        self._transform = transform
        self._count = manifest.crops
        self._seed = manifest.law.seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        data = self._source[index]["image"]
        try:
            return draw_views(
                data, self._transform, self._count, seed=self._seed, record=int(index)
            )
        except BadImage:
            size = self._transform.size
            return np.zeros(0, CROP), np.zeros((0, size, size, 3), np.uint8)


def _read_options(manifest: Manifest) -> grain.ReadOptions:
    image_bytes = manifest.crops * manifest.law.image_size**2 * 3
    ahead = max(1, min(2 * available_cores(), MOST_BYTES_AHEAD // image_bytes))
    return grain.ReadOptions(min(available_cores(), ahead), ahead)


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch
