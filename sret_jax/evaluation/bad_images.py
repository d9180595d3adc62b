"""Unreadable images: each is reported once, and too many of them end the run."""

import math
from collections.abc import Callable

from sret_jax.data.loader import Loader, SyntheticLoader
from sret_jax.data.sources.source import Source
from sret_jax.errors import few
from sret_jax.parallel.distributed import AgreedError, gather_all


class TooManyBadImages(AgreedError):
    """More images are unreadable than the config allows."""


class BadImages:
    """Counts the distinct unreadable images of one source, over all processes."""

    def __init__(self, source: Source, max_fraction: float, say: Callable[[str], None]):
        """Starts with a count of zero.

        Args:
          source: gives the records' names.
          max_fraction: fraction of the source's images that may be unreadable, rounded up.
          say: prints a message.
        """
        self._source = source
        self._allowed = math.ceil(max_fraction * len(source))
        self._say = say
        self._names: dict[int, str] = {}

    def check(self, loader: Loader | SyntheticLoader) -> None:
        """Reports the images that the loader could not read since the last call.

        Every process calls it at the same step.

        Raises:
          TooManyBadImages: more images are unreadable than allowed.
        """
        records = gather_all(loader.bad_records)
        loader.bad_records.clear()
        for record in sorted(set(records) - self._names.keys()):
            self._names[record] = self._source.record_name(record)
            self._say(f"Unreadable image: {self._names[record]}")
        if len(self._names) > self._allowed:
            raise TooManyBadImages(
                f"{len(self._names)} of {len(self._source):,} images cannot be read, and "
                f"config.data.max_bad_fraction allows {self._allowed}; fix or remove them: "
                f"{few(list(self._names.values()), 3)}"
            )
