"""metrics.jsonl: one line per step and kind of report, without duplicates after a resume."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from sret_jax.files import GrowingFile, write_text

METRICS_FILE, DAMAGED_FILE = "metrics.jsonl", "metrics_damaged.jsonl"


class JsonlWriter:
    """Writes scalars as lines {"step": s, name: value, ...}.

    Lines after `last_step` come from a run that got further before it was interrupted; they are
    dropped. Damaged lines are dropped too, after the whole file is copied to
    metrics_damaged.jsonl.
    """

    def __init__(self, workdir: epath.Path, *, last_step: int):
        self._path = workdir / METRICS_FILE
        lines = read_metrics(workdir)
        self._keep_damaged(len(lines))
        self._lines = {_key(line): line for line in lines if line["step"] <= last_step}
        self._file = GrowingFile(self._path, self._content())

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds a line or replaces one of the same step and names, without nan, which JSON lacks."""
        values = {name: float(np.asarray(value)) for name, value in scalars.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, **values}
        replaces = _key(line) in self._lines
        self._lines[_key(line)] = line
        if replaces:
            self._file.replace(self._content())
        else:
            self._file.write(_encoded(line))

    def flush(self) -> None:
        """Writes all lines to disk; see `GrowingFile.flush`."""
        self._file.flush()

    def close(self) -> None:
        """Writes all lines to disk and waits until they are there."""
        self._file.close()

    def _content(self) -> bytes:
        return b"".join(map(_encoded, self._lines.values()))

    def _keep_damaged(self, readable: int) -> None:
        """If the file has more lines than the readable ones, copies it and says so."""
        text = _read(self._path)
        there = len(text.splitlines())
        if there > readable:
            copy = self._path.with_name(DAMAGED_FILE)
            write_text(copy, text)
            print(
                f"{there - readable} of the {there} lines of {self._path} are damaged and left "
                f"out; {copy} keeps them.",
                flush=True,
            )


def _encoded(line: dict[str, float]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _key(line: dict[str, float]) -> tuple:
    return line["step"], *sorted(line)


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """The readable lines of a workdir's metrics.jsonl; empty if there is no file yet."""
    lines = map(_parse, _read(workdir / METRICS_FILE).splitlines())
    return [line for line in lines if line is not None]


def _read(path: epath.Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _parse(text: str) -> dict[str, float] | None:
    """Parses a line of numbers by name with a whole "step"; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return line if all(isinstance(value, int | float) for value in line.values()) else None
