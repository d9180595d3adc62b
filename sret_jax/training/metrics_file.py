"""metrics.jsonl: one line per step and kind of report, each step once, however often resumed."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from clu import metric_writers
from etils import epath

from sret_jax.files import write_text

METRICS_FILE = "metrics.jsonl"


class JsonlWriter(metric_writers.MetricWriter):
    """Writes scalars as lines {"step": s, name: value, ...}.

    Lines after `last_step`, left by a run that went further before it was interrupted, are
    dropped. The file is written anew at each flush, for object stores cannot append.
    """

    def __init__(self, workdir: epath.Path, *, last_step: int):
        self._path = workdir / METRICS_FILE
        self._lines = {
            _key(line): line for line in read_metrics(workdir) if line["step"] <= last_step
        }

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds one line, in place of one of the same step and names; JSON has no nan."""
        values = {name: float(np.asarray(value)) for name, value in scalars.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, **values}
        self._lines[_key(line)] = line

    def flush(self) -> None:
        """Puts everything on disk, whole or not at all."""
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines.values()))

    def close(self) -> None:
        """Flushes."""
        self.flush()

    def _scalars_only(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        raise TypeError(f"{METRICS_FILE} holds scalars only")

    write_summaries = write_images = write_videos = write_audios = _scalars_only
    write_texts = write_histograms = write_pointcloud = write_hparams = _scalars_only


def _key(line: dict[str, float]) -> tuple:
    return line["step"], *sorted(line)


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
    """The lines of a workdir's metrics.jsonl; none if there is no file yet."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
