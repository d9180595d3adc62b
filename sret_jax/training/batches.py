"""Makes the batches that a config trains on."""

from typing import Any

import jax

from sret_jax.data import order
from sret_jax.data.loader import Loader, SyntheticLoader, check_batch_size, train_transform
from sret_jax.data.sources.source import Source
from sret_jax.distillation.labelled_crops import LabelledCrops
from sret_jax.distillation.soft_labels import SoftLabels


def train_loader(
    source: Source,
    config: Any,
    image_size: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    *,
    start_step: int,
    soft_labels: SoftLabels | None = None,
) -> Loader | SyntheticLoader:
    """Yields augmented training batches endlessly, starting with that of `start_step`.

    Args:
      source: the training split.
      config: config of the experiment; its seed and its sections data and augment are used.
      image_size: side of the images in pixels.
      batch_size: size of the global batch.
      sharding: how the batch axis is split over the devices.
      start_step: the step whose batch comes first; earlier batches are not read.
      soft_labels: the open store that config.data.soft_labels names.

    Raises:
      UserError: the batch cannot be split over the devices, or a data setting is invalid.
    """
    check_batch_size(
        "batch_size", batch_size, sharding.num_devices, crops=config.data.crops_per_image
    )
    if config.data.synthetic:
        return SyntheticLoader(batch_size, image_size, len(source.class_names), sharding)
    return Loader(
        train_samples(source, config, image_size, soft_labels),
        batch_size,
        sharding,
        start_step=start_step,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


def train_samples(
    source: Source, config: Any, image_size: int, soft_labels: SoftLabels | None = None
) -> order.Positions:
    """The samples at each position of the training stream; arguments as in `train_loader`."""
    if bool(config.data.soft_labels) != (soft_labels is not None):
        raise ValueError(f"open the store that data.soft_labels={config.data.soft_labels!r} names")
    stream = order.shuffled(source, config.seed)
    if soft_labels is not None:
        return LabelledCrops(stream, soft_labels, config.data.crops_per_image)
    if config.augment.repeats > 1:
        stream = order.Repeated(stream, config.augment.repeats)
    transform = train_transform(config.augment, image_size)
    return order.Samples(stream, transform, image_size, seed=config.seed, replace=True)
