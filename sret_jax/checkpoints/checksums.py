"""Checksums of an item's files: what storage damaged is found before it is trained on.

zarr's zstd and Orbax check nothing that they read, and a flipped byte is another number. The CRC-32
of every file of an item is written beside them before the checkpoint is complete.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

CHECKSUMS = "checksums.json"
CHUNK = 1 << 24  # bytes
NOT_SUMMED = (CHECKSUMS, "commit_success.txt")  # Orbax writes the latter last


class Handler(ocp.StandardCheckpointHandler):
    """Writes checksums with an item, on process 0."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        sums = {name: checksum(directory / name) for name in files(directory)}
        (directory / CHECKSUMS).write_text(json.dumps(sums))


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.StandardSave):
    """What to save."""


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.StandardRestore):
    """What to restore."""


class Damaged(ValueError):
    """Files of a checkpoint are missing, or are not what was written."""


def check(folder: epath.Path) -> None:
    """Reads all files of an item, if it has checksums.

    Raises:
      Damaged: a file is missing, or is not what was written.
      OSError: the storage fails.
    """
    if not (folder / CHECKSUMS).exists():
        return
    try:
        sums = dict(json.loads((folder / CHECKSUMS).read_bytes()))
    except (ValueError, TypeError) as e:
        raise Damaged(f"{CHECKSUMS} is damaged") from e
    for name, expected in sums.items():
        try:
            found = checksum(folder / name)
        except FileNotFoundError as e:
            raise Damaged(f"{name} is missing") from e
        if found != expected:
            raise Damaged(f"{name} is not what was written: its checksum differs")


def checksum(path: epath.Path) -> int:
    """CRC-32 of a file, which any change within 32 neighbouring bits alters."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of all files in a folder and its subfolders, relative to it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path, f"{prefix}{path.name}/")
        elif path.name not in NOT_SUMMED:
            yield f"{prefix}{path.name}"
