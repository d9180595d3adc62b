"""Small files and paths, local or in a bucket."""

import contextlib
import json
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from sret_jax.errors import UserError


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path, which Orbax asks for; a bucket's is absolute already."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().resolve()


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is an URI such as gs://bucket/run."""
    return "://" in str(path)


@contextlib.contextmanager
def written_whole(path: epath.Path, mode: str = "w") -> Iterator[IO]:
    """A new file that takes its place once it is whole; what is raised leaves the old one.

    Of several writers at once, the last to end wins.

    Raises:
      UserError: the storage does not take it.
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
        raise UserError(f"{path} cannot be written ({e.strerror or e}); fix the storage") from e


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
      UserError: the storage does not take it.
    """
    with written_whole(path) as file:
        file.write(text)


def write_json(path: epath.Path, content: Any) -> None:
    """Writes readable JSON, whole or not at all; see `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
