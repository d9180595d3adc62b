"""Trained weights that come with this package, by name: results/weights/ in its repository."""

import importlib.resources

from etils import epath

from sret_jax.files import is_name

FOLDER = epath.Path(str(importlib.resources.files("sret_jax"))) / "trained"
SUFFIX = ".safetensors"


def packaged_names() -> list[str]:
    """The names of the weights."""
    return sorted(file.stem for file in FOLDER.glob(f"*{SUFFIX}"))


def packaged_file(name: epath.PathLike) -> epath.Path | None:
    """The file of the weights with this name; None if there is none."""
    file = FOLDER / f"{name}{SUFFIX}"
    return file if is_name(name) and file.exists() else None
