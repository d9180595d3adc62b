"""Small files and paths, local or in a bucket."""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from etils import epath

from sret_jax.errors import UserError

HUB = "hf://"  # begins the names of weights on the Hugging Face hub


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path, which Orbax needs; a path in a bucket is absolute already.

    Raises:
      UserError: see `check_storage`.
    """
    check_storage(path)
    return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().resolve()


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is a URI such as gs://bucket/run."""
    return "://" in str(path)


def is_on_hub(path: epath.PathLike) -> bool:
    """Whether the path names weights on the Hugging Face hub, such as hf://owner/name."""
    return str(path).startswith(HUB)


def is_name(path: epath.PathLike) -> bool:
    """Whether the path is a single word, which may name weights that come with this package."""
    return re.fullmatch(r"\w+", str(path)) is not None


def check_storage(path: epath.PathLike) -> None:
    """Checks that a bucket can be reached, if the path is in one; the path itself may be missing.

    Raises:
      UserError: it cannot, or the library that reads Google's buckets is missing.
    """
    if not is_remote(path):
        return
    if is_on_hub(path):
        raise UserError(
            f"{path} names weights on the Hugging Face hub, and this is no place for weights; give "
            "a local file or folder, or one in a bucket"
        )
    readers = ("gcsfs", "tensorflow")
    if str(path).startswith("gs://") and not any(map(importlib.util.find_spec, readers)):
        raise UserError(f"{path} is in a bucket, which gcsfs reads; pip install gcsfs")
    try:
        epath.Path(path).exists()
    except KeyError as e:
        raise UserError(f"{path}: there is no storage {e}; use gs://") from e
    except Exception as e:  # each library has exceptions of its own
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UserError(
            f"{path} cannot be reached ({reason}); correct the path, or check the network and that "
            "this machine may read the bucket"
        ) from e


@contextlib.contextmanager
def written_whole(path: epath.Path, mode: str = "w") -> Iterator[IO]:
    """Opens a new file that replaces the old one when it is complete; after an error the old stays.

    If there are several writers at once, the last to finish wins.

    Raises:
      UserError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open(mode) as file:  # text is UTF-8
            yield file
        temporary.replace(path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(e, OSError):
            raise
        raise _not_written(path, e) from e


class GrowingFile:
    """A file that grows.

    A flush appends new bytes. Buckets cannot append, so there a thread rewrites the whole file. The
    whole file is also rewritten if its size differs from that of the last flush.

    Args:
      path: path of the file.
      content: initial content, which replaces that of an existing file.
    """

    def __init__(self, path: epath.Path, content: bytes = b""):
        self._path = path
        self._content = bytearray(content)
        there = path.exists() and path.read_bytes() == content
        self._on_disk = len(content) if there else -1  # bytes; -1: other content
        self._uploader = ThreadPoolExecutor(1) if is_remote(path) else None
        self._uploads: list[Future[None]] = []

    def write(self, data: bytes) -> None:
        """Adds bytes, which the next flush writes to disk."""
        self._content += data

    def replace(self, content: bytes) -> None:
        """Replaces the content; the next flush writes all of it to disk."""
        self._content = bytearray(content)
        self._on_disk = -1

    def flush(self) -> None:
        """Writes new bytes to disk; does not wait for a bucket.

        Raises:
          UserError: the file cannot be written; the next flush tries again.
        """
        if self._uploader is not None:
            self._start_upload(self._uploader)
        elif self._on_disk != _size(self._path):
            self._write_whole()
        elif self._on_disk < len(self._content):
            self._append(bytes(self._content[self._on_disk :]))

    def close(self) -> None:
        """Writes new bytes to disk, and waits until they are there.

        Raises:
          UserError: the file cannot be written.
        """
        if self._uploader is None:
            self.flush()
        else:
            self._uploader.shutdown()
            self._write_whole()

    def _start_upload(self, uploader: ThreadPoolExecutor) -> None:
        done = [upload for upload in self._uploads if upload.done()]
        self._uploads = [upload for upload in self._uploads if upload not in done]
        if len(self._uploads) < 2:  # a waiting upload will include these bytes too
            self._uploads.append(uploader.submit(self._write_whole))
        for upload in done:
            upload.result()

    def _append(self, data: bytes) -> None:
        path = pathlib.Path(self._path)
        try:
            with path.open("ab", buffering=0) as file:
                written = file.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            with contextlib.suppress(OSError):
                os.truncate(path, self._on_disk)  # removes a partly written line
            raise _not_written(self._path, e) from e
        self._on_disk += len(data)

    def _write_whole(self) -> None:
        content = bytes(self._content)
        with written_whole(self._path, "wb") as file:
            file.write(content)
        self._on_disk = len(content)


def _size(path: epath.Path) -> int:
    """The size of a file in bytes; 0 if there is none."""
    return path.stat().length if path.exists() else 0


def _not_written(path: epath.Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror or error}); fix the storage")


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically.

    Raises:
      UserError: the file cannot be written.
    """
    with written_whole(path) as file:
        file.write(text)


def write_json(path: epath.Path, content: Any) -> None:
    """Writes readable JSON atomically; see `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
