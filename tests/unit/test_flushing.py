"""What is on the disk before it has its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmpo.flushing import flush_folder, move_whole


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Inodes that were flushed."""
    found: set[int] = set()
    fsync = os.fsync

    def told(descriptor: int) -> None:
        fsync(descriptor)
        found.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", told)
    yield found


def inodes(*paths: Path) -> set[int]:
    return {path.stat().st_ino for path in paths}


def test_everything_in_a_folder_is_flushed_though_a_link_leads_nowhere(
    flushed: set[int], tmp_path: Path
):
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_text("a")
    (tmp_path / "in" / "b").write_text("b")
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nothing")
    flush_folder(tmp_path)
    assert flushed == inodes(tmp_path, tmp_path / "a", tmp_path / "in", tmp_path / "in" / "b")


def test_a_folder_has_its_name_once_it_is_on_the_disk(
    flushed: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    partial = tmp_path / "new" / "step.partial"
    partial.mkdir(parents=True)
    (partial / "a").write_text("a")
    before: list[set[int]] = []
    rename = Path.rename

    def renamed(path: Path, to: Path) -> Path:
        before.append(set(flushed))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", renamed)
    move_whole(partial, tmp_path / "new" / "step")
    step = tmp_path / "new" / "step"
    assert before == [inodes(step, step / "a")]
    assert flushed - before[0] == inodes(tmp_path / "new", tmp_path)
