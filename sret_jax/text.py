"""Formats figures and tables as text."""

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """3725.0 -> '1h02m'; 65 -> '1m05s'; 5 -> '5s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligns columns under headings: the first column to the left, the others to the right.

    Raises:
      ValueError: the number of cells in a row differs from the number of headings.
    """
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats the same as a Markdown table, unaligned."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
