"""Defines which sample is at each position of the stream; this depends on the seed alone.

Positions 0, 1, 2, ... run through one shuffle of the data per epoch, one epoch after another;
images may be repeated. Global batch s is positions [s*B, (s+1)*B). It is cut into equal chunks, and
a host loads the chunks of its own devices. Nothing here depends on the number of hosts, devices or
workers, so the step is all that a checkpoint needs to store about the data.
"""

import abc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from sret_jax.data.sources.source import Source
from sret_jax.data.views.images import BadImage
from sret_jax.errors import UserError

Transform = Callable[[bytes, np.random.Generator], np.ndarray]
Rows = dict[str, Any]  # arrays by name

SHUFFLE_STREAM, AUGMENT_STREAM = 0, 1
MAX_BAD_RUN = 100
REPEAT_GROUP = 32  # the copies of an image are spread over so many images


def shuffled(source: Source, seed: int) -> grain.MapDataset:
    """An endless stream of the records of `source`, shuffled anew in every epoch."""
    # Grain shuffles epoch e with seed + e, so nearby user seeds would share epochs without this.
    shuffle_seed = int(np.random.SeedSequence([seed, SHUFFLE_STREAM]).generate_state(1)[0])
    return grain.MapDataset.source(_Numbered(source)).shuffle(seed=shuffle_seed).repeat()


def padded(source: Source, batch_size: int) -> grain.MapDataset:
    """Endless passes over `source` in its own order, each padded to whole batches with None."""
    return _Padded(grain.MapDataset.source(_Numbered(source)), batch_size).repeat()


def padded_sample(source: Source, count: int, batch_size: int, seed: int) -> grain.MapDataset:
    """Like `padded`, but of `count` different records, which the seed draws."""
    return _Padded(shuffled(source, seed)[:count], batch_size).repeat()


class Repeated(grain.MapDataset):
    """Repeated augmentation (Hoffer et al. 2020): every image `times` times, near but not adjacent.

    With R = times and G = 32, position p holds element (p div RG) G + (p mod G + (p div G) mod R)
    mod G of the parent: the stream passes R times over each G elements, each time from another
    start. In data sets no larger than a few G, an image may repeat at once where two passes meet.
    """

    def __init__(self, parent: grain.MapDataset, times: int):
        super().__init__(parent)
        self._times = times

    def __len__(self) -> int:
        groups = len(self._parent) // REPEAT_GROUP
        return min(groups * REPEAT_GROUP * self._times, sys.maxsize)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        turn, place = divmod(index, REPEAT_GROUP)
        group, turn = divmod(turn, self._times)
        return self._parent[group * REPEAT_GROUP + (place + turn) % REPEAT_GROUP]


class Positions(grain.MapDataset):
    """Base class: turns every element of `parent` into rows of a batch.

    An element becomes one row, or several that belong together: {"image": (S, S, 3) uint8,
    "label", "bad", "record", "real"}, plus what a subclass adds. Padding has "real" 0.

    An image that cannot be read keeps its position. With `replace` the next readable image of the
    stream is shown there, otherwise a black one; "bad" is 1, and "record" is still the number of
    the unreadable record.

    Attributes:
      rows: rows of a batch per element.
      element_bytes: size of an element's large arrays in bytes.

    Raises (when read):
      UserError: a hundred successive images are unreadable.
    """

    rows = 1

    def __init__(self, parent: grain.MapDataset, size: int, *, replace: bool):
        super().__init__(parent)
        self._blank = np.zeros((size, size, 3), np.uint8)
        self._replace = replace
        self.element_bytes = self.rows * self._blank.nbytes

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        element = self._parent[index]
        if element is None:
            return self._sample(self._unseen(0), bad=False, record=-1, real=False)
        try:
            seen, bad = self.show(index, element), False
        except BadImage:
            seen, bad = self._instead_of(index, element), True
        return self._sample(seen, bad=bad, record=element["record"], real=True)

    @abc.abstractmethod
    def show(self, index: int, element: dict[str, Any]) -> Rows:
        """The rows of position `index`, made from an element; raises BadImage."""

    def chunks(self, elements: int) -> grain.MapDataset:
        """Stacks the rows of `elements` successive elements."""
        return self.batch(elements, drop_remainder=True)

    def _unseen(self, label: int) -> Rows:
        return {"image": self._blank, "label": np.int32(label)}

    def _instead_of(self, index: int, element: dict[str, Any]) -> Rows:
        if not self._replace:
            return self._unseen(element["label"])
        for ahead in range(index + 1, index + 1 + MAX_BAD_RUN):
            element = self._parent[ahead]
            try:
                return self.show(index, element)
            except BadImage:
                continue
        raise UserError(
            f"{MAX_BAD_RUN} images in a row cannot be read, the last one record "
            f"{element['record']}; check the data set"
        )

    def _sample(self, seen: Rows, *, bad: bool, record: int, real: bool) -> Rows:
        shape = np.shape(seen["label"])
        facts = {"bad": np.bool_(bad), "record": np.int64(record), "real": np.bool_(real)}
        return {**seen, **{name: np.full(shape, value)[()] for name, value in facts.items()}}


class Samples(Positions):
    """Applies `transform` at every position; its randomness depends on (seed, position) alone."""

    def __init__(
        self, parent: grain.MapDataset, transform: Transform, size: int, *, seed: int, replace: bool
    ):
        super().__init__(parent, size, replace=replace)
        self._transform = transform
        self._seed = seed

    def show(self, index: int, element: dict[str, Any]) -> Rows:
        """See `Positions`."""
        rng = np.random.default_rng([self._seed, AUGMENT_STREAM, index])
        image = self._transform(element["image"], rng)
        return {"image": image, "label": np.int32(element["label"])}


class HostChunks(grain.MapDataset):
    """The chunks that this host's devices hold, from a stream with `per_step` chunks per batch.

    Element i is chunk chunks[i mod L] of batch i div L, where L is the length of `chunks`.
    """

    def __init__(self, parent: grain.MapDataset, chunks: Sequence[int], per_step: int):
        super().__init__(parent)
        self._chunks = tuple(chunks)
        self._per_step = per_step

    def __len__(self) -> int:
        return len(self._parent) // self._per_step * len(self._chunks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, i = divmod(index, len(self._chunks))
        return self._parent[step * self._per_step + self._chunks[i]]


class _Numbered:
    """Adds its number to each record, so that a bad one can be reported."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        classes = len(self._source.class_names)
        if not 0 <= record["label"] < classes:
            raise UserError(
                f"{self._source.record_name(index)} has label {record['label']}, expected 0 to "
                f"{classes - 1}; choose a split with labels"
            )
        return {**record, "record": int(index)}


class _Padded(grain.MapDataset):
    """Pads a data set with None to a multiple of `batch_size`."""

    def __init__(self, parent: grain.MapDataset, batch_size: int):
        super().__init__(parent)
        self._length = -(-len(parent) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        index %= self._length
        return self._parent[index] if index < len(self._parent) else None
