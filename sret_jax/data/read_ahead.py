"""Reads chunks of samples before they are needed, in threads or processes, with bounded memory."""

import dataclasses
import functools
import math
import multiprocessing
import signal
import sys

import grain
from absl import flags

from sret_jax.parallel.freed_memory import keep_buffers
from sret_jax.parallel.host import available_cores, shared_memory_left, sharers_of_memory
from sret_jax.parallel.processes import die_with_parent, shield_spawned

LARGEST_CHUNK = 32  # rows; larger chunks are no faster
SMALLEST_CHUNK = 8  # rows, if there are as many; fewer workers are better than smaller chunks
LEAST_HELD = 4  # chunks per worker; Grain holds no fewer
LAST_ARRAY_SECONDS = 1.0  # time for a worker to register the shared memory that it is creating
LEAST_SHARED = 1 << 16  # bytes; smaller arrays travel faster through a pipe than as shared memory

# Grain leaves its last arrays to Python's resource tracker, which removes them with a warning.
QUIET_TRACKER = "ignore:resource_tracker:UserWarning"


@dataclasses.dataclass(frozen=True)
class ReadAhead:
    """How many chunks are read ahead, how large they are, and who reads them.

    Attributes:
      chunk: rows per chunk, the unit of work.
      workers: number of processes; 0: threads of this process.
      ahead: number of chunks that each worker, or all threads together, may hold.
    """

    chunk: int
    workers: int
    ahead: int

    @classmethod
    def plan(cls, rows: int, budget: int, workers: int) -> "ReadAhead":
        """Chooses chunks small enough for every worker to hold four; may use fewer workers.

        Args:
          rows: rows per device, a multiple of the chunk size.
          budget: number of rows that may be held in all.
          workers: number of processes asked for; 0: threads, -1: one process per core.
        """
        readers = workers if workers > 0 else available_cores()
        readers = min(readers, max(1, budget // (LEAST_HELD * min(rows, SMALLEST_CHUNK))))
        most = min(LARGEST_CHUNK, max(1, budget // (LEAST_HELD * readers)))
        chunk = max(size for size in range(1, most + 1) if rows % size == 0)
        if workers and budget >= LEAST_HELD:
            return cls(chunk, readers, budget // (readers * chunk))
        return cls(chunk, 0, max(1, budget // chunk))

    def without_shared_memory(self, row_bytes: int) -> bool:
        """Whether /dev/shm is too small for workers to pass their chunks in; if so, says it.

        Training and evaluation hold the same amount each, beside other processes of the run. The
        kernel kills a worker that writes beyond the end of shared memory.

        Args:
          row_bytes: size of one row in bytes.
        """
        left, sharers = shared_memory_left(), sharers_of_memory()
        needed = 2 * sharers * self.workers * self.ahead * self.chunk * row_bytes
        if left is None or needed <= left:
            return False
        _say(
            "Images are read in threads: worker processes may need "
            f"{needed / 1e6:,.0f} MB of shared memory, and /dev/shm has {left / 1e6:,.0f} MB left; "
            "give a container more with docker run "
            f"--shm-size={math.ceil(needed / 1e9) + 1}g, or set config.data.workers=0."
        )
        return True

    def read(self, chunks: grain.MapDataset) -> grain.IterDataset:
        """Reads the chunks ahead; their order stays the same."""
        keep_buffers()
        if not self.workers:
            threads = min(available_cores(), self.ahead)
            return chunks.to_iter_dataset(grain.ReadOptions(threads, self.ahead))
        if QUIET_TRACKER not in sys.warnoptions:
            sys.warnoptions.append(QUIET_TRACKER)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers require it when absl.app is not used
        shield_spawned("grain-")  # Grain starts them from threads of its own
        in_turn = chunks.to_iter_dataset(grain.ReadOptions(0, 0))
        options = grain.experimental.DatasetOptions(min_shm_size=LEAST_SHARED)
        return grain.experimental.WithOptionsIterDataset(in_turn, options).mp_prefetch(
            # Grain fills such a buffer in the worker and another here, plus one chunk beside each.
            grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=self.ahead // 2 - 1),
            worker_init_fn=_start_worker,
        )


@functools.cache
def _say(sentence: str) -> None:
    """Prints the sentence once per process."""
    print(sentence, flush=True)


def _start_worker(worker: int, workers: int) -> None:
    """Makes this worker end when the training process ends, and not before."""
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT):  # these may be sent to the whole process group
        signal.signal(number, signal.SIG_IGN)
    keep_buffers()
    if parent := multiprocessing.parent_process():
        die_with_parent(parent.pid or 0, patience=LAST_ARRAY_SECONDS)
