"""Checks whether stored soft labels fit a config, and opens them for training."""

from typing import Any

from ml_collections import ConfigDict

from sret_jax.data.sources.classes import difference
from sret_jax.data.sources.source import Source
from sret_jax.distillation.label_manifest import CropLaw, DataFacts
from sret_jax.distillation.soft_labels import SoftLabels, open_soft_labels
from sret_jax.errors import UserError
from sret_jax.files import absolute

# Settings that change an image after its label was made, with the values at which they do not.
UNCHANGED: dict[str, Any] = dict(policy="", color_jitter=0.0, erasing=0.0, mixup=0.0, cutmix=0.0)


def stored_labels(config: ConfigDict) -> SoftLabels | None:
    """Opens the store in config.data.soft_labels if it fits the config; None if none is given.

    Raises:
      UserError: a sentence about what does not fit.
    """
    if not config.data.soft_labels:
        if config.data.crops_per_image != 1:
            raise UserError(
                f"config.data.crops_per_image={config.data.crops_per_image} requires stored soft "
                "labels; set config.data.soft_labels, or crops_per_image=1"
            )
        return None
    if config.teacher:
        raise UserError(
            f"config.teacher={config.teacher} and config.data.soft_labels="
            f"{config.data.soft_labels} both give soft labels; leave one out"
        )
    if config.data.synthetic:
        raise UserError(
            "config.data.synthetic=True has no images to label; leave out config.data.soft_labels"
        )
    for name, unchanged in UNCHANGED.items():
        value = config.augment[name]
        if value != unchanged:
            raise UserError(
                f"config.augment.{name}={value!r} changes what the teacher saw, so its stored "
                f"label would be wrong; set config.augment.{name}={unchanged!r}"
            )
    if config.augment.repeats != 1:
        raise UserError(
            f"config.augment.repeats={config.augment.repeats} repeats images as "
            "config.data.crops_per_image does with stored soft labels; set config.augment.repeats=1"
        )
    labels = open_soft_labels(absolute(config.data.soft_labels))
    _check_settings(config, labels)
    return labels


def data_facts(config: ConfigDict, source: Source) -> DataFacts:
    """Describes the data set that a config trains on; `source` is its training split."""
    return DataFacts.of(source, config.data.name, config.data.train_split)


def check_same_data(labels: SoftLabels, source: Source, config: ConfigDict) -> None:
    """Raises UserError if a store was made from other images than those of `source`."""
    made, here = labels.manifest.data, data_facts(config, source)
    if (made.examples, made.classes, made.digest) != (here.examples, here.classes, here.digest):
        if made.class_names and (
            differs := difference(made.class_names, here.class_names or (), "in the data")
        ):
            raise UserError(
                f"the soft labels in {labels.folder} are of other classes: {differs}; give the "
                "labels of these classes, in this order"
            )
        same_size = (made.examples, made.classes) == (here.examples, here.classes)
        what = "its images differ" if same_size else _size(made)
        raise UserError(
            f"the soft labels in {labels.folder} were made of {made.name} {made.split} ({what}), "
            f"and this is {here.name} {here.split} ({_size(here)}); give the labels of these images"
        )


def crop_law(config: ConfigDict) -> CropLaw:
    """The distribution from which a config draws the crops to be labelled."""
    augment = config.augment
    return CropLaw(
        image_size=config.model.image_size,
        crop_scale=tuple(augment.crop_scale),
        crop_ratio=tuple(augment.crop_ratio),
        flip=augment.flip,
        seed=config.seed,
    )


def _check_settings(config: ConfigDict, labels: SoftLabels) -> None:
    manifest = labels.manifest
    pairs = [("distill.temperature", manifest.temperature, config.distill.temperature)]
    for name, here in vars(crop_law(config)).items():
        made = getattr(manifest.law, name)
        if name != "seed" and made is not None:  # a seed draws other crops of the same distribution
            section = "model" if name == "image_size" else "augment"
            pairs.append((f"{section}.{name}", made, here))
    for name, made, here in pairs:
        if made != here:
            raise UserError(
                f"the soft labels in {labels.folder} were made with config.{name}={made}, and this "
                f"config has {here}; set it to {made}, or make other labels"
            )
    if config.model.num_classes not in (None, manifest.data.classes):
        raise UserError(
            f"the soft labels in {labels.folder} are of {manifest.data.classes:,} classes, and "
            f"config.model.num_classes={config.model.num_classes}; leave it out"
        )
    if config.data.crops_per_image > manifest.crops:
        raise UserError(
            f"config.data.crops_per_image={config.data.crops_per_image} is more than the "
            f"{manifest.crops} crops of each image in {labels.folder}; use {manifest.crops} or "
            "fewer"
        )


def _size(facts: DataFacts) -> str:
    return f"{facts.examples:,} images of {facts.classes:,} classes"
