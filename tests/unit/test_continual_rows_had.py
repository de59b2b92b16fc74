"""Which rows a model's cycles had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmpo.continual.rows_had import keep_digests, num_new_rows
from gmpo.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store.db")) as opened:
        yield opened


def rows(*numbers: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in numbers]


def cycle_with(store: Store, folder: Path, listed: list[dict[str, Any]], **result: str) -> Path:
    """The folder of a step of a cycle that had these rows and is over."""
    begun = store.begin_cycle("bot", state="validate", payload={"request": {}})
    store.move_cycle(begun, state="over", payload={"request": {}, "result": result}, ends=True)
    step = folder / f"cycle-{begun.number:06}" / "validate"
    step.mkdir(parents=True)
    keep_digests(listed, step)
    return step


def test_rows_that_an_earlier_cycle_had_are_not_new(store: Store, tmp_path: Path):
    assert num_new_rows(store, "bot", rows(1, 2, 3), folder=tmp_path) == 3
    cycle_with(store, tmp_path, rows(1, 2), outcome="promoted")
    cycle_with(store, tmp_path, rows(7), outcome="refused", reason="Safety test failed")
    assert num_new_rows(store, "bot", rows(1, 2, 3, 7), folder=tmp_path) == 1
    assert num_new_rows(store, "bot", rows(7, 1), folder=tmp_path) == 0
    assert num_new_rows(store, "another", rows(1, 2, 3), folder=tmp_path / "another") == 3


def test_rows_alike_count_once_whatever_their_ids(store: Store, tmp_path: Path):
    named = [{"id": f"row-{place}", **row} for place, row in enumerate(rows(1, 1, 2))]
    assert num_new_rows(store, "bot", named, folder=tmp_path) == 2
    cycle_with(store, tmp_path, rows(1), outcome="promoted")
    assert num_new_rows(store, "bot", named, folder=tmp_path) == 1
    mended = [{**row, "answer": "another"} for row in rows(1)]
    assert num_new_rows(store, "bot", mended, folder=tmp_path) == 1


@pytest.mark.parametrize(
    "result",
    [
        {"outcome": "refused", "reason": "Data validation failed: too_few_rows"},
        {"outcome": "abandoned", "reason": "Abandoned"},
    ],
)
def test_what_a_cycle_gave_back_is_new_again(store: Store, tmp_path: Path, result: dict[str, str]):
    cycle_with(store, tmp_path, rows(1, 2), **result)
    assert num_new_rows(store, "bot", rows(1, 2), folder=tmp_path) == 2


def test_what_is_kept_of_rows_holds_no_text_and_its_loss_makes_them_new(
    store: Store, tmp_path: Path
):
    step = cycle_with(store, tmp_path, rows(1, 2), outcome="promoted")
    (kept,) = step.iterdir()
    assert "What" not in kept.read_text()
    kept.unlink()
    assert num_new_rows(store, "bot", rows(1, 2), folder=tmp_path) == 2
