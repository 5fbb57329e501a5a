"""Markdown tables: one heading, one rule, as many cells as columns."""

import pytest

from rlawm_jax import markdown


def test_every_row_has_a_cell_under_each_heading():
    assert markdown.table(("a", "b"), [("1", "2"), ["3", "4"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"expected 2 cells a row \(a, b\), found \['1'\]"):
        markdown.table(("a", "b"), [["1"]])
