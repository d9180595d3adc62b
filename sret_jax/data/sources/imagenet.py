"""The names of ImageNet's 1,000 classes.

Data sets and checkpoints identify the classes by their WordNet ids.
"""

import functools
from collections.abc import Sequence
from importlib import resources

CLASSES = 1000


@functools.cache
def _names() -> dict[str, str]:
    """The name of each WordNet id, in the order of the logits."""
    file = resources.files("sret_jax.data.sources") / "imagenet_classes.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def imagenet_ids() -> list[str]:
    """The WordNet ids of ImageNet's classes in sorted order, which is the order of the logits."""
    return list(_names())


def assumed_ids(logits: int, data: Sequence[str]) -> list[str] | None:
    """Class names for weights stored without names: ImageNet's ids, if the number of logits fits.

    Args:
      logits: number of logits of the weights.
      data: class names of the data; all must be ImageNet ids.

    Returns:
      None if the weights need not be ImageNet's.
    """
    ids = imagenet_ids()
    return ids if logits == len(ids) and {*data} <= {*ids} else None


def display_names(classes: Sequence[str]) -> list[str]:
    """The names to show to a person: English names if all classes are ImageNet's WordNet ids.

    For example "n01440764" becomes "tench". Other names stay the same.
    """
    names = _names()
    if all(name in names for name in classes):
        return [names[name] for name in classes]
    return list(classes)
