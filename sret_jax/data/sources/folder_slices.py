"""Slices of folders: "train[:80%]" takes 80% of the images of every class."""

import hashlib
import heapq
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow_datasets as tfds

from sret_jax.data.sources.image_files import Images
from sret_jax.errors import UserError

SLICES = ("stratified", "listed")

Classes = dict[str, Images]  # by class name, sorted


def splits_of(spec: str, known: Iterable[str]) -> list[str]:
    """The splits named in a specification such as "train[:99%]+val"; "all" is one of them.

    Raises:
      UserError: it does not follow TFDS's syntax; the message lists the `known` splits.
    """
    try:
        tfds.core.ReadInstruction.from_spec(spec)
    except (NotImplementedError, ValueError, AssertionError) as e:
        raise _unreadable(spec, known) from e
    return [part.partition("[")[0] for part in spec.split("+")]


def take(spec: str, splits: dict[str, Classes], slices: str) -> list[tuple[str, str]]:
    """The files that a specification such as "train[:99%]+val" takes, with their classes.

    Each slice lists its images class by class, sorted by name.

    Args:
      spec: in TFDS's slicing syntax.
      splits: all splits that `spec` names.
      slices: "stratified": a slice takes the same fraction of every class. The images of a class
        are ordered by a hash of their names, and `stratified_order` interleaves the classes.
        Slices that do not overlap have no image in common. "listed": a slice takes a part of the
        whole list, which cuts off whole classes.

    Raises:
      UserError: a slice is out of range, or `slices` is another word.
    """
    if slices not in SLICES:
        raise UserError(
            f"config.data.folder_slices={slices!r} must be {' or '.join(map(repr, SLICES))}"
        )
    counts = {name: [len(images.files) for images in of.values()] for name, of in splits.items()}
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[sum(counts[name])], num_bytes=0)
        for name in splits
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    except (NotImplementedError, ValueError, AssertionError) as e:
        raise _unreadable(spec, splits) from e
    taken = []
    for part in parts:
        classes, total = splits[part.splitname], sum(counts[part.splitname])
        first, last, _ = slice(part.from_, part.to).indices(total)
        if slices == "listed" or last - first == total:
            files = [(file, name) for name, images in classes.items() for file in images.files]
            taken += files[first:last]
        else:
            taken += _stratified(classes, first, max(first, last))
    return taken


def stratified_order(counts: Sequence[int]) -> np.ndarray:
    """The class at every position of a stratified order of images: (N,), N = sum of counts.

    The first k positions contain n k / N images of a class of n, rounded up or down. So the number
    of a class's images in a slice is less than two away from its exact share. The rule is
    Tijdeman's (The chairman assignment problem, 1980): each image has an earliest and a latest
    position; among the images whose earliest position is reached, the one with the smallest latest
    position comes next.

    Args:
      counts: number of images of each class.
    """
    sizes = np.asarray(counts, np.int64)
    total = int(sizes.sum())
    of_image = np.repeat(np.arange(len(sizes)), sizes)  # (N,), the class of each image
    rank = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its class, from 0
    margin = 1 / max(2, 2 * len(sizes) - 2)
    spacing = total / sizes[of_image]
    earliest, latest = (rank + margin) * spacing, (rank + 1 - margin) * spacing
    images = np.argsort(-earliest, kind="stable")  # the next image is last
    coming = list(zip(*(x[images].tolist() for x in (earliest, latest, of_image)), strict=True))
    ready: list[tuple[float, int]] = []
    order = np.empty(total, np.int64)
    for place in range(total):
        while coming and (not ready or coming[-1][0] <= place + 1):
            heapq.heappush(ready, coming.pop()[1:])
        _, order[place] = heapq.heappop(ready)
    return order


def _stratified(classes: Classes, first: int, last: int) -> list[tuple[str, str]]:
    """The files from position `first` to `last` of the stratified order, with their classes."""
    order = stratified_order([len(images.files) for images in classes.values()])
    bounds = (np.bincount(order[:place], minlength=len(classes)) for place in (first, last))
    taken = []
    for (name, images), lower, upper in zip(classes.items(), *bounds, strict=True):
        files, inside = images.files, len(images.folder)
        spread = sorted(range(len(files)), key=lambda i: _hash(files[i][inside:]))
        taken += [(files[i], name) for i in sorted(spread[lower:upper])]
    return taken


def _hash(name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).digest()


def _unreadable(spec: str, known: Iterable[str]) -> UserError:
    return UserError(
        f"cannot read the split {spec!r}; write it as TFDS does, e.g. 'train[:99%]', with the "
        f"folders there are: {', '.join(known)}"
    )
