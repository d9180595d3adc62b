"""Reading chunks of samples before they are needed, within a bound, in threads or processes."""

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
from sret_jax.parallel.processes import die_with_parent, start_without_script

LARGEST_CHUNK = 32  # rows; larger ones gain no speed
SMALLEST_CHUNK = 8  # rows, where there are as many; fewer workers are better than smaller chunks
LEAST_HELD = 4  # chunks; Grain holds no fewer for each worker
LAST_ARRAY_SECONDS = 1.0  # in which a worker has noted the shared memory that it is making
LEAST_SHARED = 1 << 16  # bytes; smaller arrays travel faster through a pipe than as shared memory

# Grain leaves its last arrays to Python's resource tracker, which removes them, but complains.
QUIET_TRACKER = "ignore:resource_tracker:UserWarning"


@dataclasses.dataclass(frozen=True)
class ReadAhead:
    """How many chunks of how many rows are read early, and by whom.

    Attributes:
      chunk: rows of a chunk, the unit of work.
      workers: processes; 0: threads of this process.
      ahead: chunks each worker, or all threads together, may hold.
    """

    chunk: int
    workers: int
    ahead: int

    @classmethod
    def plan(cls, rows: int, budget: int, workers: int) -> "ReadAhead":
        """Chunks of which every worker can hold four; perhaps fewer workers than asked for.

        Args:
          rows: of a device, which chunks must divide.
          budget: rows that may be held in all.
          workers: processes asked for; 0: threads, -1: one process per core.
        """
        readers = workers if workers > 0 else available_cores()
        readers = min(readers, max(1, budget // (LEAST_HELD * min(rows, SMALLEST_CHUNK))))
        most = min(LARGEST_CHUNK, max(1, budget // (LEAST_HELD * readers)))
        chunk = max(size for size in range(1, most + 1) if rows % size == 0)
        if workers and budget >= LEAST_HELD:
            return cls(chunk, readers, budget // (readers * chunk))
        return cls(chunk, 0, max(1, budget // chunk))

    def without_shared_memory(self, row_bytes: int) -> bool:
        """Whether workers would not have the shared memory in which they hand over their chunks.

        Training and evaluation, which hold as much each, share it with other processes of the run.
        A worker that writes beyond its end is killed by the kernel. Says so.

        Args:
          row_bytes: of what a chunk has rows of.
        """
        left, sharers = shared_memory_left(), sharers_of_memory()
        needed = 2 * sharers * self.workers * self.ahead * self.chunk * row_bytes
        if left is None or needed <= left:
            return False
        _say(
            "Images are read in threads: worker processes may need "
            f"{needed / 1e6:,.0f} MB of shared memory, and /dev/shm has {left / 1e6:,.0f} MB left; "
            "give a container more of it, as docker run "
            f"--shm-size={math.ceil(needed / 1e9) + 1}g does, or set config.data.workers=0."
        )
        return True

    def read(self, chunks: grain.MapDataset) -> grain.IterDataset:
        """The chunks in their order, read ahead."""
        keep_buffers()
        if not self.workers:
            threads = min(available_cores(), self.ahead)
            return chunks.to_iter_dataset(grain.ReadOptions(threads, self.ahead))
        if QUIET_TRACKER not in sys.warnoptions:
            sys.warnoptions.append(QUIET_TRACKER)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers insist on it outside absl.app
        start_without_script("grain-")
        in_turn = chunks.to_iter_dataset(grain.ReadOptions(0, 0))
        options = grain.experimental.DatasetOptions(min_shm_size=LEAST_SHARED)
        return grain.experimental.WithOptionsIterDataset(in_turn, options).mp_prefetch(
            # Grain fills this buffer twice, in the worker and here, and holds a chunk beside each.
            grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=self.ahead // 2 - 1),
            worker_init_fn=_start_worker,
        )


@functools.cache
def _say(sentence: str) -> None:
    """Once in a process."""
    print(sentence, flush=True)


def _start_worker(worker: int, workers: int) -> None:
    """Lets this worker end with the training process, and not before it."""
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT):  # which may be sent to the whole group
        signal.signal(number, signal.SIG_IGN)
    keep_buffers()
    if parent := multiprocessing.parent_process():
        die_with_parent(parent.pid or 0, patience=LAST_ARRAY_SECONDS)
