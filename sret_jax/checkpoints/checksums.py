"""Checksums of an item's files, which reveal storage damage before training continues.

Neither zarr's zstd nor Orbax verifies what it reads, so a flipped byte would silently change a
number. The CRC-32 of every file of an item is written beside the files before the checkpoint is
complete.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

CHECKSUMS = "checksums.json"
CHUNK = 1 << 24  # bytes
NOT_SUMMED = (CHECKSUMS, "commit_success.txt")  # Orbax writes the latter at the very end


class Handler(ocp.StandardCheckpointHandler):
    """Adds checksums to an item when it is saved; process 0 writes them."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        sums = {name: checksum(directory / name) for name in files(directory)}
        (directory / CHECKSUMS).write_text(json.dumps(sums))


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.StandardSave):
    """Arguments for saving an item."""


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.StandardRestore):
    """Arguments for restoring an item."""


class Damaged(ValueError):
    """Files of a checkpoint are missing or differ from what was written."""


def check(folder: epath.Path) -> None:
    """Verifies all files of an item, if it has checksums.

    Raises:
      Damaged: a file is missing or differs from what was written.
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
    """The CRC-32 of a file; it detects every change within 32 successive bits."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The names of all files in a folder and its subfolders, relative to the folder."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files(path, f"{prefix}{path.name}/")
        elif path.name not in NOT_SUMMED:
            yield f"{prefix}{path.name}"
