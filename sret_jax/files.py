"""Small files and paths, local or in a bucket."""

import json
from typing import Any

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path, which Orbax asks for; a bucket's is absolute already."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().resolve()


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is an URI such as gs://bucket/run."""
    return "://" in str(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: epath.Path, content: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
