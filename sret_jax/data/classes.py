"""Classes compared by name: those of a model with those of data."""

from collections.abc import Sequence


def difference(there: Sequence[str], here: Sequence[str], where: str = "here") -> str:
    """The first class whose names differ, in words; "" where names and order are the same.

    Names that are only here come first, then those that are only there, then another order.

    Args:
      there: class names by number, e.g. of a run.
      here: those that are compared with them.
      where: what "here" is, in words.
    """
    theirs, ours = set(there), set(here)
    numbers = [
        *(number for number, name in enumerate(here) if name not in theirs),
        *(number for number, name in enumerate(there) if name not in ours),
        *(number for number, pair in enumerate(zip(there, here, strict=False)) if len({*pair}) > 1),
    ]
    if not numbers:
        return ""
    first = numbers[0]
    old, new = (repr(names[first]) if first < len(names) else "none" for names in (there, here))
    counts = ""
    if len(there) != len(here):
        counts = f" ({len(there):,} classes there, {len(here):,} {where})"
    return f"class {first} is {old} there and {new} {where}{counts}"
