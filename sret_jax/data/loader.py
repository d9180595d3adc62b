"""Batches on devices: each host reads the rows of its own devices, ahead of the step."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sret_jax.data import order
from sret_jax.data.read_ahead import ReadAhead
from sret_jax.data.sources.source import Source
from sret_jax.data.views.images import EvalTransform
from sret_jax.data.views.training_view import TrainTransform
from sret_jax.errors import UserError

Batch = dict[str, jax.Array]
RECORD = "record"  # the samples' record numbers, which stay on the host


class Loader:
    """An iterator over global batches, starting at a given step.

    A batch is {"image": (B, S, S, 3) uint8, "label": (B,) int32, "bad": (B,) bool,
    "real": (B,) bool}, plus the stored soft labels if there are any. `sharding` places the arrays.

    Attributes:
      bad_records: numbers of the unreadable records that this host met; the caller clears it.
      recent_records: record numbers of all samples in this host's last two batches.
    """

    def __init__(
        self,
        samples: order.Positions,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        *,
        start_step: int,
        workers: int,
        prefetch: int,
    ):
        """Starts reading.

        Args:
          samples: the sample at each position of the stream.
          batch_size: size of the global batch.
          sharding: how the batch axis is split over the devices.
          start_step: the step whose batch comes first.
          workers: number of reading processes; 0: threads, -1: one process per core.
          prefetch: number of global batches kept in flight, including those being built.
        """
        self._batch_size = batch_size
        self._sharding = sharding
        self.bad_records: list[int] = []
        self.recent_records: deque[list[int]] = deque(maxlen=2)

        elements = batch_size // sharding.num_devices // samples.rows  # per device
        self._devices = _first_rows_by_device(sharding, batch_size)
        budget = prefetch * elements * len(self._devices)
        plan = ReadAhead.plan(elements, budget, workers)
        if plan.without_shared_memory(samples.element_bytes):
            plan = ReadAhead.plan(elements, budget, workers=0)
        self._chunks_per_device = elements // plan.chunk
        chunk_rows = plan.chunk * samples.rows
        chunks = order.HostChunks(
            samples.chunks(plan.chunk),
            chunks=[
                first // chunk_rows + i
                for first in self._devices.values()
                for i in range(self._chunks_per_device)
            ],
            per_step=batch_size // chunk_rows,
        )
        chunks = chunks[start_step * len(self._devices) * self._chunks_per_device :]
        self._iterator = iter(plan.read(chunks))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts = self.next_parts()
        records = np.concatenate([part["record"] for part in parts.values()])
        self.recent_records.append(records.tolist())
        for part in parts.values():
            self.bad_records.extend(part["record"][part["bad"]].tolist())
        names = next(iter(parts.values()))
        return {name: self._to_devices(parts, name) for name in names if name != RECORD}

    def next_parts(self) -> dict[jax.Device, dict[str, np.ndarray]]:
        """The rows of the next batch, for each device of this host."""
        return {device: self._next_part() for device in self._devices}

    def close(self) -> None:
        """Stops the worker processes."""
        self._iterator.close()

    def _next_part(self) -> dict[str, np.ndarray]:
        chunks = [next(self._iterator) for _ in range(self._chunks_per_device)]
        return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}

    def _to_devices(self, parts: dict[jax.Device, dict[str, np.ndarray]], key: str) -> jax.Array:
        arrays = [part[key] for part in parts.values()]
        placed = jax.device_put(arrays, list(parts))
        shape = (self._batch_size, *arrays[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._sharding, placed)


class SyntheticLoader:
    """Yields one and the same batch of noise, which is on the devices already: nothing to read."""

    def __init__(
        self, batch_size: int, image_size: int, classes: int, sharding: jax.sharding.Sharding
    ):
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8),
            "label": rng.integers(0, classes, batch_size, np.int32),
            "bad": np.zeros(batch_size, bool),
            "real": np.ones(batch_size, bool),
        }
        self.bad_records: list[int] = []
        self.recent_records: deque[list[int]] = deque()
        self._batch: Batch = jax.device_put(batch, sharding)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._batch

    def close(self) -> None:
        """Does nothing: there are no worker processes."""


def eval_loader(
    source: Source,
    config: Any,
    image_size: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> Loader | SyntheticLoader:
    """Endless passes over `source`; the last batch of each pass is padded (padding has "real" 0).

    One pass is `steps_per_pass` batches. Arguments and errors are as in `train_loader`.
    """
    check_batch_size("eval_batch_size", batch_size, sharding.num_devices)
    if config.data.synthetic:
        return SyntheticLoader(batch_size, image_size, len(source.class_names), sharding)
    transform = EvalTransform(image_size, config.data.test_crop)
    samples = order.Samples(
        order.padded(source, batch_size), transform, image_size, seed=0, replace=False
    )
    return Loader(
        samples,
        batch_size,
        sharding,
        start_step=0,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


def train_transform(augment: Any, image_size: int) -> TrainTransform:
    """The training transform for config.augment; raises UserError if a setting is out of range."""
    return TrainTransform(
        image_size,
        tuple(augment.crop_scale),
        tuple(augment.crop_ratio),
        augment.flip,
        augment.policy,
        augment.color_jitter,
    )


def steps_per_pass(source: Source, batch_size: int) -> int:
    """The number of batches that contain every example of `source` once."""
    return -(-len(source) // batch_size)


def check_batch_size(
    field: str,
    batch_size: int,
    devices: int,
    grad_accum: int = 1,
    *,
    in_pairs: bool = False,
    crops: int = 1,
    processes: int | None = None,
) -> None:
    """Raises UserError unless the batch splits evenly.

    Every device must get whole micro-batches, whole pairs (for mixup and cutmix) and all crops of
    an image. `processes` drive the devices; default: all processes of this run.
    """
    parts = batch_unit(devices, grad_accum, in_pairs=in_pairs, crops=crops)
    processes = jax.process_count() if processes is None else processes
    if batch_size < 1 or batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        micro = f" times config.grad_accum={grad_accum}" if grad_accum > 1 else ""
        of_all = f" of {processes} processes" if processes > 1 else ""
        why = ""
        if in_pairs:
            why = ", each of which mixes pairs of images (config.augment.mixup, cutmix)"
        elif crops > 1:
            why = f", each of which takes config.data.crops_per_image={crops} of every image"
        raise UserError(
            f"config.{field}={batch_size} is not divisible by the {devices} devices{of_all}"
            f"{micro}{why}; use {nearest}"
        )


def eval_batch_size(config: Any, devices: int) -> int:
    """config.eval_batch_size. The default is a training micro-batch, which is known to fit."""
    if config.eval_batch_size:
        return config.eval_batch_size
    return math.ceil(config.batch_size // config.grad_accum / devices) * devices


def batch_unit(devices: int, grad_accum: int = 1, *, in_pairs: bool = False, crops: int = 1) -> int:
    """The global batch must be a multiple of this number."""
    return devices * math.lcm(grad_accum * (2 if in_pairs else 1), crops)


def _first_rows_by_device(
    sharding: jax.sharding.Sharding, batch_size: int
) -> dict[jax.Device, int]:
    """The devices of this host, with the row of the global batch at which each one's rows begin."""
    indices = sharding.addressable_devices_indices_map((batch_size,))
    return {device: index[0].start or 0 for device, index in indices.items() if index}
