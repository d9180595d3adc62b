"""Writes a store of soft labels shard by shard; an interrupted store can be continued."""

import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from sret_jax.distillation.label_manifest import MANIFEST, Manifest, as_dict
from sret_jax.distillation.soft_labels import finished_shards, read_manifest
from sret_jax.errors import UserError
from sret_jax.files import is_remote, write_json
from sret_jax.terminal import Progress

INCOMPLETE = "incomplete."
WRITER = "group_size:1,uncompressed"  # records are read singly; probabilities hardly compress


def begin_store(folder: epath.Path, manifest: Manifest) -> None:
    """Creates a store without shards, or continues one that was begun with the same settings.

    Raises:
      UserError: the folder contains something else or labels made with other settings, cannot be
        written, or its disk has no room for the store.
    """
    begun = read_manifest(folder)
    if begun is not None:
        _check_begun_alike(folder, begun, manifest)
        return
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out={folder} exists and holds something else; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={folder} cannot be made ({e.strerror or e}); give another") from e
    _check_room(folder, manifest)
    _write_manifest(folder, manifest)


def write_shard(
    folder: epath.Path, manifest: Manifest, shard: int, records: Iterable[bytes]
) -> None:
    """Writes a shard; it appears only when it is complete.

    Raises:
      UserError: the shard cannot be written.
    """
    path = manifest.shard_path(folder, shard)
    # A unique name: two hosts that write the same shard by mistake write the same bytes.
    temporary = path.with_name(f"{INCOMPLETE}{uuid.uuid4().hex}.{path.name}")
    try:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), WRITER)
        for record in records:
            writer.write(record)
        writer.close()
        temporary.replace(path)
    except (RuntimeError, OSError) as e:
        reason = (str(e) or repr(e)).splitlines()[0]
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({reason}); fix the storage or free some room, and start "
            "again: finished shards are kept"
        ) from e


def write_store(
    folder: epath.Path,
    manifest: Manifest,
    records: Callable[[range], Iterable[bytes]],
    *,
    hosts: int,
    host: int,
) -> bool:
    """Writes the missing shards of one host; returns whether the store is complete.

    Args:
      folder: folder of the store.
      manifest: manifest of the store.
      records: returns the records of a shard for the numbers of its images.
      hosts: number of hosts; shards are assigned to them in turn.
      host: number of this host, 0 to hosts - 1.

    Raises:
      UserError: see `begin_store` and `write_shard`; or there is no such host.
    """
    if not 0 <= host < hosts:
        raise UserError(f"--shard={host} of --shards={hosts} does not exist; count from 0")
    begin_store(folder, manifest)
    there = finished_shards(folder, manifest)
    own = {shard: manifest.shard_range(shard) for shard in range(host, manifest.shards, hosts)}
    images = sum(map(len, own.values()))
    done = sum(len(numbers) for shard, numbers in own.items() if shard in there)
    with Progress("Storing labels", images, "images", done=done) as progress:
        for shard, numbers in own.items():
            if shard not in there:
                write_shard(folder, manifest, shard, progress.counted(records(numbers)))
    return complete_store(folder, manifest)


def complete_store(folder: epath.Path, manifest: Manifest) -> bool:
    """Marks the store as complete if it is; returns whether it is."""
    sizes = finished_shards(folder, manifest)
    if len(sizes) < manifest.shards:
        return False
    for leftover in folder.glob(f"{INCOMPLETE}*.array_record"):  # left by killed runs
        leftover.unlink(missing_ok=True)
    in_order = tuple(sizes[i] for i in range(manifest.shards))
    _write_manifest(folder, dataclasses.replace(manifest, shard_bytes=in_order))
    return True


def pack(
    manifest: Manifest, crops: np.ndarray, probs: np.ndarray, classes: np.ndarray | None
) -> bytes:
    """Packs the labels of an image into a record.

    Shapes: crops (K,) with the fields of CROP, probs (K, k), classes (K, k), or None for "full".
    """
    packed = np.zeros(len(crops), manifest.layout)
    packed["box"], packed["flip"], packed["soft"] = crops["box"], crops["flip"], probs
    if classes is not None:
        packed["soft_classes"] = classes
    return packed.tobytes()


def most_probable(
    manifest: Manifest, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities and numbers of the classes to keep; all probabilities and None for "full".

    Shapes: (K, classes) -> (K, k), (K, k).
    """
    if manifest.keep == "full":
        return probabilities, None
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, : manifest.kept]
    return np.take_along_axis(probabilities, best, axis=1), best


def _check_begun_alike(folder: epath.Path, begun: Manifest, manifest: Manifest) -> None:
    old, new = _facts(begun), _facts(manifest)
    for name, value in new.items():
        if old[name] != value:
            raise UserError(
                f"the soft labels in {folder} were begun with {name}={old[name]}, and this command "
                f"has {name}={value}; give the same, or --out another folder"
            )


def _facts(manifest: Manifest) -> dict[str, Any]:
    """The facts that must agree between all runs that write a store; paths may differ."""
    facts: dict[str, Any] = {}
    for name, value in as_dict(manifest).items():
        if isinstance(value, dict):
            facts.update({f"{name}.{key}": of for key, of in value.items()})
        else:
            facts[name] = value
    # The digest covers the class names.
    for name in ("data.name", "data.split", "data.class_names", "teacher.path", "shard_bytes"):
        del facts[name]
    return facts


def _check_room(folder: epath.Path, manifest: Manifest) -> None:
    if is_remote(folder):
        return
    free, needed = shutil.disk_usage(folder).free, manifest.expected_bytes
    if free < needed:
        raise UserError(
            f"the disk of --out={folder} has {free / 1e6:,.1f} MB left, and the soft labels take "
            f"{needed / 1e6:,.1f} MB; free some, store fewer --crops, or give another folder"
        )


def _write_manifest(folder: epath.Path, manifest: Manifest) -> None:
    # Several hosts may write it at the same time, with the same content.
    temporary = folder / f"{INCOMPLETE}{uuid.uuid4().hex}.{MANIFEST}"
    write_json(temporary, manifest.to_json())
    temporary.replace(folder / MANIFEST)
