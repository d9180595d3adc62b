"""Shows the progress of long work: a line that a terminal rewrites, plain lines elsewhere.

Also keeps a process alive whose output cannot be written any more.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TextIO, TypeVar

from sret_jax.text import duration

LIVE_SECONDS, PLAIN_SECONDS = 1.0, 30.0  # time between two lines
BAR = 20  # characters
COLUMNS = 80  # assumed if a terminal does not report its width

Item = TypeVar("Item")


class _Outlasting(io.FileIO):
    """An output that drops what cannot be written: its reader has ended, or its disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlasting(stream: TextIO, file: int) -> TextIO:
    """A stream like `stream` that writes to a file descriptor, and drops what it cannot write."""
    buffer = io.BufferedWriter(_Outlasting(file, "w", closefd=False))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


def outlast_readers() -> None:
    """Lets this process continue when its output cannot be written.

    The reader may have left: `head -1` leaves after a line, and `tee` at Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not if this was done before, nor in a notebook
            setattr(sys, name, outlasting(stream, stream.fileno()))


def fitted(fields: Sequence[str], columns: int) -> str:
    """Joins as many fields as fit in a row, the most important first.

    The last column stays empty, because some terminals begin a new row when it is written.
    """
    line = fields[0]
    for field in fields[1:]:
        if len(longer := f"{line}  {field}") >= columns:
            break
        line = longer
    return line[: columns - 1]


class LiveLine:
    """The last row of a terminal, which is rewritten in place on stderr.

    Attributes:
      is_live: whether stderr is a terminal and the line is enabled; otherwise nothing is written.
    """

    def __init__(self, *, enabled: bool = True):
        self.is_live = enabled and sys.stderr.isatty()

    def show(self, fields: Sequence[str]) -> None:
        """Rewrites the row with as many fields as fit, the most important first."""
        if self.is_live:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
            self._write(f"\r\033[K{fitted(fields, columns)}")

    def clear(self) -> None:
        """Clears the row."""
        if self.is_live:
            self._write("\r\033[K")

    def _write(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


class Progress:
    """Shows the progress of the enclosed work on stderr.

    A terminal shows the line after the first second. Elsewhere a plain line is printed every
    PLAIN_SECONDS. Work that ends earlier prints nothing.

        with Progress("Evaluating", 50_000, "images") as progress:
            ...
            progress.add(128)
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        enabled: bool = True,
    ):
        """Describes the work.

        Args:
          what: the work, as the line names it.
          total: number of units; None: the line shows the elapsed time.
          unit: name of the unit in the plural.
          done: number of units that were done before.
          enabled: whether this process shows the line.
        """
        self._what, self._total, self._unit = what, total, unit
        self._before = self._done = done
        self._enabled = enabled
        self._line = LiveLine(enabled=enabled)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show_until_ended, daemon=True)

    def __enter__(self) -> "Progress":
        self._start = time.perf_counter()
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._enabled:
            self._thread.join()
        self._line.clear()

    def add(self, units: int) -> None:
        """Counts more units as done."""
        self._done += units

    def counted(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, and counts each as done when the next is requested."""
        for item in items:
            yield item
            self.add(1)

    def fields(self, seconds: float) -> list[str]:
        """The fields of the line after so many seconds, the most important first."""
        if self._total is None:
            return [f"{self._what}: {duration(seconds)}"]
        done = min(self._done, self._total)  # a last batch may be padded
        share = done / max(1, self._total)
        fields = [
            f"{self._what} {int(100 * share):3}%",
            f"[{'#' * int(BAR * share):.<{BAR}}]",
            f"{done:,}/{self._total:,} {self._unit}",
        ]
        if rate := (done - self._before) / seconds:
            digits = 0 if rate >= 10 else 1
            fields.append(f"{duration((self._total - done) / rate)} left")
            fields.append(f"{rate:,.{digits}f} {self._unit}/s")
        return fields

    def _show_until_ended(self) -> None:
        live = self._line.is_live
        while not self._ended.wait(LIVE_SECONDS if live else PLAIN_SECONDS):
            fields = self.fields(time.perf_counter() - self._start)
            if live:
                self._line.show(fields)
            else:
                print("  ".join(fields), file=sys.stderr, flush=True)
