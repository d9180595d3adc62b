"""Writes event files, which TensorBoard reads, without TensorFlow."""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from sret_jax.files import GrowingFile

_numbers = itertools.count()


class EventWriter:
    """Writes scalars to a new event file in a folder."""

    def __init__(self, folder: epath.Path):
        folder.mkdir(parents=True, exist_ok=True)
        origin = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._file = GrowingFile(folder / f"events.out.tfevents.{int(time.time()):010d}.{origin}")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds the scalars of a step, by name."""
        for name, value in scalars.items():
            self._write(Event(step=step, summary=scalar_pb(name, np.float32(value))))

    def flush(self) -> None:
        """Writes everything to disk; see `GrowingFile.flush`."""
        self._file.flush()

    def close(self) -> None:
        """Writes everything to disk and waits until it is there."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
