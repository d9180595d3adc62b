"""The one exception for what a user can get wrong."""

import difflib
from collections.abc import Iterable, Sequence

MOST_NAMED = 20  # known names in a sentence on an unknown one


class UserError(ValueError):
    """Bad input. The message is one sentence: the value, what was expected, and the fix."""


def did_you_mean(what: str, value: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: the nearest known one, and all where they are few."""
    known = sorted(known)
    some = f" (one of {', '.join(known)})" if len(known) <= MOST_NAMED else ""
    nearest = difflib.get_close_matches(value, known, 1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {what} {value!r}{hint}{some}"


def quoted(names: Iterable[str], most: int = 8) -> str:
    """The first names: "'ape', 'cat', ..."."""
    names = [repr(name) for name in names]
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


def few(sentences: Sequence[str], most: int = 8) -> str:
    """The first sentences, joined, and how many more there are."""
    more = f"; and {len(sentences) - most} more" if len(sentences) > most else ""
    return "; ".join(sentences[:most]) + more
