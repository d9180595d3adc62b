"""Stored soft labels (Fast Knowledge Distillation, Shen and Xing 2022): layout, reading, writing.

A store is a folder of ArrayRecord files, SHARD_RECORDS records each but the last, and of
manifest.json. Record i belongs to image i of the data set and is K packed structs, one a crop:

    box           4 x uint16   left, top, right, bottom, in 1/65535 of the image's sides
    flip          bool         shown mirrored
    soft_classes  k x uint16   the k most probable, the best first (uint32 beyond 65,536 classes)
    soft          k x float16  their probabilities; keep "full": of all classes in their order,
                               and no `soft_classes`

all little-endian. Of an image that could not be read the record is empty. The classes not kept
share the rest of the probability equally (the paper's marginal smoothing).
"""

import dataclasses
import hashlib
import json
import re
from typing import Any

import numpy as np
from etils import epath

from sret_jax.data.sources.source import Source
from sret_jax.data.views.crops import CROP
from sret_jax.errors import UserError

FORMAT = 1
LABELS = ("soft", "soft_classes")  # of a crop, as a row of a batch has them
MANIFEST = "manifest.json"
SHARD_RECORDS = 512
SHARD_OVERHEAD = 1 << 18  # bytes at most, of a shard: headers, and padding to whole blocks
EXAMINED = 64  # records of a data set that its digest covers


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """Which data set labels belong to.

    Attributes:
      name, split: as a person knows it.
      examples, classes: how many.
      digest: of the class names, and of labels and bytes of records spread over the data set.
      class_names: in the order of the labels; None in a store that was made before it kept them.
    """

    name: str
    split: str
    examples: int
    classes: int
    digest: str
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, source: Source, name: str, split: str) -> "DataFacts":
        """Reads what the digest covers."""
        count = len(source)
        digest = hashlib.sha256(json.dumps([count, source.class_names]).encode())
        for index in np.linspace(0, count - 1, min(count, EXAMINED)).round().astype(int).tolist():
            record = source[index]
            digest.update(json.dumps([index, record["label"], len(record["image"])]).encode())
            digest.update(record["image"])
        names = tuple(source.class_names)
        return cls(name, split, count, len(names), digest.hexdigest(), names)


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """Whose labels they are.

    Attributes:
      path: where the teacher came from.
      fingerprint: of its weights; None where labels were imported.
      image_size: side of what it was shown, in pixels; None where that is not known.
    """

    path: str
    fingerprint: str | None
    image_size: int | None


@dataclasses.dataclass(frozen=True)
class CropLaw:
    """How the crops were drawn.

    Attributes:
      image_size: side of a view, in pixels.
      crop_scale, crop_ratio, flip, seed: of config.augment and config; None where the crops were
        imported.
    """

    image_size: int
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] | None = None
    flip: float | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says of a store.

    Attributes:
      data, teacher, law: see there.
      temperature: T of the stored softmax(t / T).
      keep: "topN" classes, or "full".
      crops: K of every image.
      shard_bytes: sizes of the finished shards; None while they are not all there.
    """

    data: DataFacts
    teacher: TeacherFacts
    law: CropLaw
    temperature: float
    keep: str
    crops: int
    shard_bytes: tuple[int, ...] | None = None

    @property
    def kept(self) -> int:
        """Probabilities of a label: k, or all classes."""
        return kept_classes(self.keep, self.data.classes) or self.data.classes

    @property
    def layout(self) -> np.dtype:
        """Of one crop."""
        classes = "<u2" if self.data.classes <= 2**16 else "<u4"
        indices = [] if self.keep == "full" else [("soft_classes", classes, (self.kept,))]
        return np.dtype([*CROP.descr, *indices, ("soft", "<f2", (self.kept,))])

    @property
    def row_labels(self) -> dict[str, np.dtype]:
        """What a row of a batch has of a crop's label, and its type."""
        return {name: self.layout[name] for name in LABELS if name in (self.layout.names or ())}

    @property
    def shards(self) -> int:
        """Files of the whole store."""
        return -(-self.data.examples // SHARD_RECORDS)

    @property
    def expected_bytes(self) -> int:
        """Of the whole store."""
        label_bytes = self.data.examples * self.crops * self.layout.itemsize
        return label_bytes + self.shards * SHARD_OVERHEAD

    def shard_path(self, folder: epath.Path, shard: int) -> epath.Path:
        """Where a shard of that number lies."""
        return folder / f"labels-{shard:05d}-of-{self.shards:05d}.array_record"

    def shard_range(self, shard: int) -> range:
        """The records of a shard."""
        first = shard * SHARD_RECORDS
        return range(first, min(first + SHARD_RECORDS, self.data.examples))

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {"format": FORMAT, "complete": self.shard_bytes is not None, **as_dict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """Raises KeyError, TypeError or ValueError for what `to_json` did not make."""
        content = dict(content)
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        content.pop("complete")
        for name, kind in (("data", DataFacts), ("teacher", TeacherFacts), ("law", CropLaw)):
            values: dict[str, Any] = content[name]
            ranges = {key: tuple(value) for key, value in values.items() if type(value) is list}
            content[name] = kind(**{**values, **ranges})
        if content["shard_bytes"] is not None:
            content["shard_bytes"] = tuple(content["shard_bytes"])
        manifest = cls(**content)
        manifest.layout  # noqa: B018, raises for another keep
        return manifest


def kept_classes(keep: str, classes: int) -> int | None:
    """The k of "topk"; None for "full".

    Raises:
      UserError: another word, or more classes than there are.
    """
    if keep == "full":
        return None
    match = re.fullmatch(r"topk([1-9]\d{0,8})", keep)
    if not match:
        raise UserError(f"--keep={keep} must be topk5, topk10 or full")
    if int(match[1]) > classes:
        raise UserError(f"--keep={keep} is more than the {classes} classes there are; use full")
    return int(match[1])


def as_dict(manifest: Manifest) -> dict[str, Any]:
    """Its fields as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(manifest)))
