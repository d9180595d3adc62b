"""Class names: their order, and comparing a model's names with those of data."""

import unicodedata
from collections.abc import Collection, Sequence
from itertools import zip_longest

from sret_jax.errors import UserError, quoted


def in_order(names: Collection[str]) -> list[str]:
    """Sorts names of class folders by label: numbers by value, other names as text."""
    return sorted(names, key=int) if are_numbered(names) else sorted(names)


def are_numbered(names: Collection[str]) -> bool:
    """Whether the names are the whole numbers 0 to N - 1, perhaps with leading zeros."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return False
    return sorted(map(int, names)) == list(range(len(names)))


def labels_of(names: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """The labels of `names`: their positions among the classes that a model was trained on.

    Raises:
      UserError: a name in `where` is not among the classes. If a class differs in case or blanks
        only, the message suggests it.
    """
    label = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in names if name not in label]
    if not unknown:
        return [label[name] for name in names]
    alike = {_plain(name): name for name in classes}
    twin = next((name for name in unknown if _plain(name) in alike), None)
    hint = f" (perhaps {twin!r} is {alike[_plain(twin)]!r})" if twin is not None else ""
    count, those = (f"{len(unknown):,} classes", "these") if len(unknown) > 1 else ("a class", "it")
    raise UserError(
        f"{where} has {count} that the training data lack, {quoted(unknown)}{hint}; the training "
        f"data have {quoted(classes, 4)}; rename {those}, or sort the images into folders with the "
        "names of the training classes"
    )


def near_duplicates(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in case, blanks or the encoding of accents."""
    first: dict[str, str] = {}
    return [(first[_plain(b)], b) for b in names if first.setdefault(_plain(b), b) != b]


def difference(there: Sequence[str], here: Sequence[str], where: str = "here") -> str:
    """Describes the first class whose names differ; "" if names and order are the same.

    Args:
      there: class names by label, e.g. those of a run.
      here: the class names to compare with them.
      where: what the message calls the place of `here`.
    """
    pairs = enumerate(zip_longest(there, here))
    number, pair = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (0, None))
    if pair is None:
        return ""
    old, new = ("none" if name is None else repr(name) for name in pair)
    facts = []
    if len(there) != len(here):
        facts.append(f"{len(there):,} classes there, {len(here):,} {where}")
    for place, names, others in (("there", there, here), (where, here, there)):
        known = set(others)
        if only := [repr(name) for name in names if name not in known]:
            facts.append(f"only {place}: {', '.join(only[:2])}{', ...' * (len(only) > 2)}")
    more = f" ({'; '.join(facts)})" if facts else ""
    return f"class {number} is {old} there and {new} {where}{more}"


def check_known(known: Sequence[str], here: Sequence[str], what: str, remedy: str) -> None:
    """Checks that a model was trained on all classes of some data, which may have fewer.

    Args:
      known: the model's class names.
      here: the data's class names, in any order.
      what: what the message calls the model.
      remedy: what the user can do about it.

    Raises:
      UserError: a class of the data is not among those of the model.
    """
    names = set(known)
    unknown = [name for name in here if name not in names]
    if unknown:
        raise UserError(
            f"{what} was not trained on the class {unknown[0]!r}: "
            f"{difference(known, here, 'in the data')}; {remedy}"
        )


def order_of_classes(there: Sequence[str], here: Sequence[str], logits: int) -> list[int] | None:
    """The model's logit for each class of the data, if both have the same classes.

    Args:
      there: the model's class names.
      here: the data's class names, in any order.
      logits: number of logits of the model. Logits without a name keep their positions.

    Returns:
      `logits` numbers; None if the classes are not the same.
    """
    if sorted(there) != sorted(here):
        return None
    number = {name: i for i, name in enumerate(there)}
    return [*(number[name] for name in here), *range(len(here), logits)]


def are_labels(names: Sequence[str]) -> bool:
    """Whether the names are 0, 1, ... in this order, so that each is the number of its label."""
    return are_numbered(names) and list(names) == in_order(names)


def _plain(name: str) -> str:
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())
