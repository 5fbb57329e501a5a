"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a header row; every row has one cell per column."""
    lines = [columns, *rows]
    if bad := [line for line in lines if len(line) != len(columns)]:
        raise ValueError(f"table: expected {len(columns)} cells a row ({', '.join(columns)}), found {list(bad[0])}")
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|" + "---|" * len(columns), *body])
