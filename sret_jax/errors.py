"""UserError, the exception for errors that a user can fix, and help to write its messages."""

import difflib
from collections.abc import Iterable, Sequence

MOST_NAMED = 20  # a sentence about an unknown name lists at most so many known names


class UserError(ValueError):
    """Bad input. The message is one sentence with the value, what was expected, and the fix."""


def did_you_mean(what: str, value: str, known: Iterable[str]) -> str:
    """A sentence about an unknown name: suggests the nearest known name, lists all if few."""
    known = sorted(known)
    some = f" (one of {', '.join(known)})" if len(known) <= MOST_NAMED else ""
    nearest = difflib.get_close_matches(value, known, 1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {what} {value!r}{hint}{some}"


def quoted(names: Iterable[str], most: int = 8) -> str:
    """The first names, quoted: "'ape', 'cat', ..."."""
    names = [repr(name) for name in names]
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


def few(sentences: Sequence[str], most: int = 8) -> str:
    """The first sentences, joined, and the number of further ones."""
    more = f"; and {len(sentences) - most} more" if len(sentences) > most else ""
    return "; ".join(sentences[:most]) + more
