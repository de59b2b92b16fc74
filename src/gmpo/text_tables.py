"""The form that tables of a report have on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

__all__ = ["open_table"]


def open_table(heads: Sequence[str], *, title: str | None = None, left: int = 1) -> Table:
    """A table without vertical lines; what is too long for its column is folded, never cut.

    Args:
        heads: of its columns, shown as they are.
        title: stands above it, to the left.
        left: so many columns are texts, the others numbers, which stand to the right.
    """
    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if place < left else "right", overflow="fold")
    return table
