"""Tables as text."""

import pytest

from sret_jax.text import markdown_table, table


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_end_in_line():
    assert table(("", "images/s"), [("sret_jax", "9"), ("ViT", "1,024")]) == (
        "          images/s\nsret_jax         9\nViT          1,024"
    )


def test_a_row_with_too_few_cells_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        table(("run", "top-1"), [("w80",)])


def test_a_markdown_table_has_a_rule_below_its_headings():
    assert markdown_table(("run", "top-1"), [("w80", "97%")]) == (
        "| run | top-1 |\n| --- | --- |\n| w80 | 97% |"
    )
