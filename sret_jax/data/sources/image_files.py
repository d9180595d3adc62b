"""The image files in a folder, recognised by their suffixes."""

import contextlib
import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from sret_jax.errors import UserError, few
from sret_jax.files import is_remote

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp")
# Files that systems and tools leave in folders, in lower case. Hidden files are skipped as well.
CLUTTER = (
    *("__macosx", "@eadir", "lost+found", "thumbs.db", "desktop.ini"),
    *("$recycle.bin", "system volume information"),
)


@dataclasses.dataclass(frozen=True)
class Images:
    """The images in a folder.

    Attributes:
      folder: path of the folder.
      files: paths of the images, sorted.
      passed_over: number of other files by suffix, without hidden files and clutter.
    """

    folder: str
    files: list[str]
    passed_over: Counter[str]


class Entry(NamedTuple):
    """A file or folder in a folder."""

    name: str
    path: str
    is_folder: bool

    @property
    def is_image(self) -> bool:
        """Whether the entry is a file with the suffix of an image."""
        return not self.is_folder and self.suffix in IMAGE_SUFFIXES

    @property
    def suffix(self) -> str:
        """The suffix in lower case, with its dot; "" if there is none."""
        return pathlib.PurePath(self.name).suffix.lower()


def images_in(folder: epath.PathLike) -> Images:
    """The images in a folder and its subfolders.

    Raises:
      UserError: a folder cannot be listed, or is a link to a folder that contains it.
    """
    path = os.fspath(folder)
    passed_over: Counter[str] = Counter()
    with listing(path):
        files = list(_images_in(path, set(_place(path).parents), passed_over))
    return Images(path, files, passed_over)


def entries(folder: str) -> list[Entry]:
    """The contents of a folder, sorted by name, without hidden files and clutter."""
    if is_remote(folder):
        paths = epath.Path(folder).iterdir()
        found = [Entry(path.name, os.fspath(path), path.is_dir()) for path in paths]
    else:
        with os.scandir(folder) as scan:
            found = [Entry(entry.name, entry.path, _is_folder(entry)) for entry in scan]
    return sorted(
        entry
        for entry in found
        if not entry.name.startswith(".") and entry.name.lower() not in CLUTTER
    )


@contextlib.contextmanager
def listing(root: epath.PathLike) -> Iterator[None]:
    """Turns an error in listing storage into a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{e.filename or root} cannot be listed ({e.strerror or e}); fix or remove it"
        ) from e


def counted(passed_over: Counter[str]) -> str:
    """Formats counts of files by suffix: "12 .heic; 3 .tif"."""
    by_number = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    return few([f"{count:,} {suffix or 'without a suffix'}" for suffix, count in by_number])


def passed_over(images: Images) -> str:
    """Describes the files of a folder that are not read."""
    suffixes = ", ".join(IMAGE_SUFFIXES)
    return f"files that are not read ({suffixes} are): {counted(images.passed_over)}"


def name_of_file(path: str) -> str:
    """Converts a path to text that can be printed and stored, whatever bytes it contains."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _images_in(
    folder: str, seen: set[pathlib.PurePath], passed_over: Counter[str]
) -> Iterator[str]:
    """The images in a folder and its subfolders; adds the folders it visits to `seen`."""
    place = _place(folder)
    if place in seen:
        raise UserError(
            f"{folder} leads to {place}, which it lies in or which is read already; remove the link"
        )
    seen.add(place)
    for entry in entries(folder):
        if entry.is_folder:
            yield from _images_in(entry.path, seen, passed_over)
        elif entry.is_image:
            yield entry.path
        else:
            passed_over[entry.suffix] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether the entry is a folder or a link to one; False for broken and circular links."""
    return pathlib.Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def _place(path: str) -> pathlib.PurePath:
    """The path with links resolved; buckets have no links."""
    return pathlib.PurePath(path if is_remote(path) else os.path.realpath(path))  # circles too
