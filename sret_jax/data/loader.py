"""Batches on devices: each host reads the chunks its own devices hold, ahead of the step."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from sret_jax.data import order
from sret_jax.data.images import EvalTransform, TrainTransform
from sret_jax.data.sources import Source
from sret_jax.errors import UserError

Batch = dict[str, jax.Array]


class Loader:
    """An iterator over global batches, from a given step on.

    A batch is {"image": (B, S, S, 3) uint8, "label": (B,) int32, "bad": (B,) bool,
    "real": (B,) bool}, sharded as `sharding` says.

    Attributes:
      bad_records: numbers of the unreadable records this host has met since last asked.
    """

    def __init__(
        self,
        samples: grain.MapDataset,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        *,
        start_step: int,
        workers: int,
        prefetch: int,
    ):
        self._batch_size = batch_size
        self._sharding = sharding
        self._devices = _chunks_by_device(sharding, batch_size)
        self.bad_records: list[int] = []

        per_step = sharding.num_devices
        chunks = order.HostChunks(
            samples.batch(batch_size // per_step, drop_remainder=True),
            chunks=list(self._devices.values()),
            per_step=per_step,
        )
        chunks = chunks[start_step * len(self._devices) :]
        self._iterator = iter(_read_ahead(chunks, prefetch * len(self._devices), workers))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        chunks = [next(self._iterator) for _ in self._devices]
        for chunk in chunks:
            self.bad_records.extend(chunk["record"][chunk["bad"]].tolist())
        keys = ("image", "label", "bad", "real")
        return {key: self._to_devices([chunk[key] for chunk in chunks]) for key in keys}

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator.close()

    def _to_devices(self, chunks: list[np.ndarray]) -> jax.Array:
        shape = (self._batch_size, *chunks[0].shape[1:])
        shards = jax.device_put(chunks, list(self._devices))
        return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)


def train_loader(
    source: Source,
    config: Any,
    image_size: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    *,
    seed: int,
    start_step: int,
) -> Loader:
    """Endless augmented training batches, starting with that of `start_step`.

    Args:
      source: the training split.
      config: the section config.data.
      image_size: side of the images, in pixels.
      batch_size: of the global batch.
      sharding: of the batch axis over the devices.
      seed: of the order and the augmentation.
      start_step: the step whose batch comes first; costs no reading of what came before.

    Raises:
      UserError: a batch that the devices do not divide, or a bad data setting.
    """
    check_batch_size("batch_size", batch_size, sharding.num_devices)
    transform = train_transform(config, image_size)
    samples = order.Samples(
        order.shuffled(source, seed), transform, image_size, seed=seed, replace=True
    )
    return Loader(
        samples,
        batch_size,
        sharding,
        start_step=start_step,
        workers=config.workers,
        prefetch=config.prefetch,
    )


def eval_loader(
    source: Source,
    config: Any,
    image_size: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> Loader:
    """Endless passes over the whole of `source`, each padded to whole batches ("real" 0).

    Args and errors are those of `train_loader`. One pass is `steps_per_pass` batches.
    """
    check_batch_size("eval_batch_size", batch_size, sharding.num_devices)
    transform = eval_transform(config, image_size)
    samples = order.Samples(
        order.padded(source, batch_size), transform, image_size, seed=0, replace=False
    )
    return Loader(
        samples,
        batch_size,
        sharding,
        start_step=0,
        workers=config.workers,
        prefetch=config.prefetch,
    )


def train_transform(config: Any, image_size: int) -> TrainTransform:
    """The training transform of config.data; raises UserError for a setting out of range."""
    return TrainTransform(
        image_size, tuple(config.crop_scale), tuple(config.crop_ratio), config.flip
    )


def eval_transform(config: Any, image_size: int) -> EvalTransform:
    """The evaluation transform of config.data; raises UserError for a setting out of range."""
    return EvalTransform(image_size, config.test_crop)


def steps_per_pass(source: Source, batch_size: int) -> int:
    """Batches that hold every example of `source` once."""
    return -(-len(source) // batch_size)


def name_bad_images(source: Source, loader: Loader) -> None:
    """Prints, on the host that met them, the names of the images that could not be read."""
    for record in loader.bad_records:
        print(f"Unreadable image: {source.record_name(record)}", flush=True)
    loader.bad_records.clear()


def check_batch_size(field: str, batch_size: int, devices: int, grad_accum: int = 1) -> None:
    """Raises UserError unless each device gets equally many images for each micro-batch."""
    parts = devices * grad_accum
    if batch_size < 1 or batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        micro = f" times config.grad_accum={grad_accum}" if grad_accum > 1 else ""
        raise UserError(
            f"config.{field}={batch_size} is not divisible by the {devices} devices "
            f"({jax.process_count()} hosts){micro}; use {nearest}"
        )


def _chunks_by_device(sharding: jax.sharding.Sharding, batch_size: int) -> dict[jax.Device, int]:
    """This host's devices and which chunk of the global batch each holds."""
    chunk = batch_size // sharding.num_devices
    indices = sharding.addressable_devices_indices_map((batch_size,))
    return {device: (index[0].start or 0) // chunk for device, index in indices.items() if index}


def _read_ahead(chunks: grain.MapDataset, ahead: int, workers: int) -> grain.IterDataset:
    """Reads `ahead` chunks early: in threads, or in worker processes (-1: one per core).

    Every thread and every worker holds at least one chunk.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    workers = cores if workers < 0 else workers
    if not workers:
        threads = min(cores, ahead)
        return chunks.to_iter_dataset(grain.ReadOptions(threads, max(ahead, threads)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers insist on it outside absl.app
    return chunks.to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, ahead // workers)),
        worker_init_fn=_die_with_parent,
    )


def _die_with_parent(worker: int, workers: int) -> None:
    """Makes the kernel end this worker when the training process is killed."""
    del worker, workers
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
