"""Lays out a cache of the Hugging Face hub on disk, as huggingface_hub leaves it."""

import hashlib
import pathlib

import pytest


class HubCache:
    """The cache that huggingface_hub reads while a test runs: CACHE/models--OWNER--NAME."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        constants = pytest.importorskip(
            "huggingface_hub.constants", reason="names on the hub need huggingface_hub"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
        self._folder = folder

    def add(self, name: str, files: dict[str, bytes], *revisions: str) -> str:
        """Adds a commit, to which the branches or tags point; returns its hash."""
        repository = self._folder / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for folder in ("blobs", "refs"):
            (repository / folder).mkdir(exist_ok=True)
        for file, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            (repository / "blobs" / digest).write_bytes(content)
            (snapshot / file).symlink_to(f"../../blobs/{digest}")
        for revision in revisions:
            (repository / "refs" / revision).write_text(commit)
        return commit


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
