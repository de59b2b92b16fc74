"""Tables of a report on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from gmpo.text_tables import open_table


def shown(table: Table, *, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def test_texts_stand_to_the_left_and_numbers_to_the_right():
    table = open_table(["arm", "[b]runs"], title="[i] all")
    table.add_row("grpo", "3")
    title, *_, head, _, row = [line for line in shown(table, width=40).splitlines() if line]
    # No mark-up is read: a label may hold brackets.
    assert (title, head.split()) == ("[i] all", ["arm", "[b]runs"])
    assert row.startswith(" grpo ") and head.startswith(" arm ")
    assert row.endswith(" 3") and len(row) == len(head)


def test_a_long_word_is_folded_and_not_cut():
    table = open_table(["arm"])
    table.add_row("abcdefghijkl")
    assert "…" not in shown(table, width=8)
    assert "".join(shown(table, width=8).split()).endswith("abcdefghijkl")
