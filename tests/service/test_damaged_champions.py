"""The alert of a damaged champion on both databases: what ends it, and what is not restored."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.registries import NAME, added, decision

from gmpo.errors import DataError, PromotionRefused
from gmpo.registry import Registry
from gmpo.store import ModelVersion, Store


def two_champions(registry: Registry, tmp_path: Path) -> tuple[ModelVersion, ModelVersion]:
    """The predecessor and the champion, whose files are gone; an alert says so."""
    old, new = added(registry, tmp_path, 1.0), added(registry, tmp_path, 2.0)
    registry.adopt(NAME, old.version, reason="first")
    evidence = decision(old.version, new.version)
    registry.promote(NAME, expected_champion=old.version, candidate=new.version, evidence=evidence)
    (Path(new.path) / "model.safetensors").unlink()
    assert registry.servable(NAME).version == old.version
    return old, new


def test_a_rollback_ends_the_alert_of_the_damaged_champion(
    registry: Registry, store: Store, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    assert len(store.alerts("firing")) == 1
    registry.rollback(NAME, expected_champion=new.version, reason="damaged")
    assert store.alerts("firing") == []
    (alert,) = store.alerts()
    assert alert.payload["annotations"]["serving"] == old.version
    assert store.count_events(kinds=["alert"]) == 2


def test_adding_the_champion_again_ends_its_alert_and_adding_another_does_not(
    registry: Registry, store: Store, tmp_path: Path
):
    two_champions(registry, tmp_path)
    added(registry, tmp_path, 3.0)
    assert len(store.alerts("firing")) == 1
    added(registry, tmp_path, 2.0)
    assert store.alerts("firing") == []


def test_files_that_lie_in_another_folder_are_not_said_to_be_restored(
    registry: Registry, store: Store, tmp_path: Path
):
    two_champions(registry, tmp_path)
    elsewhere = Registry(store, tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"not restored; give --folder {tmp_path / 'models'}"):
        added(elsewhere, tmp_path, 2.0)


def test_a_rollback_with_nothing_whole_to_go_back_to_says_what_is_damaged(
    registry: Registry, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    (Path(old.path) / "model.safetensors").unlink()
    said = rf"no predecessor to go back to whose files are whole \(damaged: {old.version}\)"
    with pytest.raises(PromotionRefused, match=said):
        registry.rollback(NAME, expected_champion=new.version, reason="damaged")
