"""Random access to stored soft labels; `label_manifest` describes their files."""

import dataclasses
import json
import os

import numpy as np
from array_record.python import array_record_data_source
from etils import epath

from sret_jax.distillation.label_manifest import MANIFEST, SHARD_RECORDS, Manifest
from sret_jax.errors import UserError

GENERATE = "python -m sret_jax.tools.soft_labels generate"


class SoftLabels:
    """The labels of a complete store, with random access.

    Attributes:
      folder: folder of the store.
      manifest: description of the store.
    """

    def __init__(self, folder: epath.Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        instructions = [
            _WholeFile(os.fspath(manifest.shard_path(folder, i)), len(manifest.shard_range(i)))
            for i in range(manifest.shards)
        ]
        self._records = array_record_data_source.ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> np.ndarray:
        """The crops and labels of an image, (K,) of the manifest's layout; empty for a bad image.

        Raises:
          UserError: the bytes are damaged.
        """
        manifest = self.manifest
        try:
            data = self._records[record]
        except RuntimeError as e:  # wrong checksum
            reason = (str(e) or "cut short").splitlines()[0]
            raise self._damaged(record, reason) from e
        if len(data) not in (0, manifest.crops * manifest.layout.itemsize):
            raise self._damaged(record, f"it has {len(data):,} bytes")
        return np.frombuffer(data, manifest.layout)

    def _damaged(self, record: int, reason: str) -> UserError:
        shard = self.manifest.shard_path(self.folder, record // SHARD_RECORDS)
        return UserError(
            f"the soft labels of image {record} in {shard} are damaged ({reason}); remove that "
            "file and generate it again"
        )


def open_soft_labels(folder: epath.Path) -> SoftLabels:
    """Opens a complete store.

    Raises:
      UserError: there is no store, it is incomplete, or a file is missing or truncated.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder} holds no soft labels (no {MANIFEST}); make some with: {GENERATE} "
            f"--config=... --teacher=... --out={folder}"
        )
    if manifest.shard_bytes is None:
        there = len(finished_shards(folder, manifest))
        raise UserError(
            f"the soft labels in {folder} are incomplete ({there} of {manifest.shards} shards "
            "exist); start the command that generates them again; it continues where it stopped"
        )
    sizes = finished_shards(folder, manifest)
    for shard, expected in enumerate(manifest.shard_bytes):
        if sizes.get(shard) != expected:
            found = f"has {sizes[shard]:,} bytes" if shard in sizes else "is missing"
            raise UserError(
                f"{manifest.shard_path(folder, shard)} {found}, expected {expected:,} bytes; "
                "remove it and generate it again"
            )
    return SoftLabels(folder, manifest)


def read_manifest(folder: epath.Path) -> Manifest | None:
    """Reads the manifest of a store; None if there is none.

    Raises:
      UserError: it is damaged or has another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}); fix it, or make the soft labels again") from e


def finished_shards(folder: epath.Path, manifest: Manifest) -> dict[int, int]:
    """The numbers and sizes of the existing shards."""
    names = {manifest.shard_path(folder, i).name: i for i in range(manifest.shards)}
    there = [path for path in folder.iterdir() if path.name in names]
    return {names[path.name]: path.stat().length for path in there}


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """A file of known length, which array_record then reads without opening it first."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard
