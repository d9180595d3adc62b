"""The layout of stored soft labels (Fast Knowledge Distillation, Shen and Xing 2022).

A store is a folder with manifest.json and ArrayRecord files of SHARD_RECORDS records each (the last
may have fewer). Record i belongs to image i of the data set. It is K packed structs, one per crop:

    box           4 x uint16   left, top, right, bottom, in 1/65535 of the image's sides
    flip          bool         whether the crop is mirrored
    soft_classes  k x uint16   the k most probable classes, best first (uint32 beyond 65,536
                               classes); absent if keep is "full"
    soft          k x float16  their probabilities; if keep is "full", those of all classes in order

all little-endian. The record of an unreadable image is empty. The classes that are not kept share
the remaining probability equally (the paper's marginal smoothing).
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
LABELS = ("soft", "soft_classes")  # names of a crop's label in a batch
MANIFEST = "manifest.json"
SHARD_RECORDS = 512
SHARD_OVERHEAD = 1 << 18  # most bytes that headers and padding to whole blocks add to a shard
EXAMINED = 64  # number of records of a data set in its digest


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """The data set that labels belong to.

    Attributes:
      name, split: names for people.
      examples, classes: numbers of examples and classes.
      digest: digest of the class names, and of labels and bytes of records spread over the data.
      class_names: names in the order of the labels; None in older stores, which lack them.
    """

    name: str
    split: str
    examples: int
    classes: int
    digest: str
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, source: Source, name: str, split: str) -> "DataFacts":
        """Describes a source; reads the records in the digest."""
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
    """The teacher that made the labels.

    Attributes:
      path: path of the teacher.
      fingerprint: fingerprint of its weights; None for imported labels.
      image_size: side of its input images in pixels; None if unknown.
    """

    path: str
    fingerprint: str | None
    image_size: int | None


@dataclasses.dataclass(frozen=True)
class CropLaw:
    """The distribution that the crops were drawn from.

    Attributes:
      image_size: side of a view in pixels.
      crop_scale, crop_ratio, flip, seed: settings of config.augment and config; None for imported
        crops.
    """

    image_size: int
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] | None = None
    flip: float | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json, which describes a store.

    Attributes:
      data, teacher, law: data set, teacher and distribution of the crops.
      temperature: T of the stored softmax(t / T).
      keep: "topN" for the N most probable classes, or "full".
      crops: K, the crops per image.
      shard_bytes: sizes of all shards; None until all are finished.
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
        """The number of probabilities in a label: k, or all classes."""
        return kept_classes(self.keep, self.data.classes) or self.data.classes

    @property
    def layout(self) -> np.dtype:
        """The dtype of one crop with its label."""
        classes = "<u2" if self.data.classes <= 2**16 else "<u4"
        indices = [] if self.keep == "full" else [("soft_classes", classes, (self.kept,))]
        return np.dtype([*CROP.descr, *indices, ("soft", "<f2", (self.kept,))])

    @property
    def row_labels(self) -> dict[str, np.dtype]:
        """The arrays of a crop's label in a batch row, with their dtypes."""
        return {name: self.layout[name] for name in LABELS if name in (self.layout.names or ())}

    @property
    def shards(self) -> int:
        """The number of files of the complete store."""
        return -(-self.data.examples // SHARD_RECORDS)

    @property
    def expected_bytes(self) -> int:
        """The size of the complete store in bytes."""
        label_bytes = self.data.examples * self.crops * self.layout.itemsize
        return label_bytes + self.shards * SHARD_OVERHEAD

    def shard_path(self, folder: epath.Path, shard: int) -> epath.Path:
        """The path of a shard."""
        return folder / f"labels-{shard:05d}-of-{self.shards:05d}.array_record"

    def shard_range(self, shard: int) -> range:
        """The numbers of a shard's records."""
        first = shard * SHARD_RECORDS
        return range(first, min(first + SHARD_RECORDS, self.data.examples))

    def to_json(self) -> dict[str, Any]:
        """The manifest in the form that is stored."""
        return {"format": FORMAT, "complete": self.shard_bytes is not None, **as_dict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Manifest":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError for other content."""
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
        manifest.layout  # noqa: B018, raises if `keep` is invalid
        return manifest


def kept_classes(keep: str, classes: int) -> int | None:
    """Parses `keep`: the k of "topk"; None for "full".

    Raises:
      UserError: it is another word, or k exceeds the number of classes.
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
    """The fields as JSON represents them."""
    return json.loads(json.dumps(dataclasses.asdict(manifest)))
