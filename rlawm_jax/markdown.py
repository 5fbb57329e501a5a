"""Tables in Markdown, written in one place."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a heading line; every row has a cell for each column."""
    lines = [columns, *rows]
    if bad := [line for line in lines if len(line) != len(columns)]:
        raise ValueError(f"table: expected {len(columns)} cells a row ({', '.join(columns)}), found {list(bad[0])}")
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|" + "---|" * len(columns), *body])
