"""The alert of a damaged champion on both databases: what ends it, and what is not restored."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from tests.commands import gmpo, refusal
from tests.registries import NAME, added, decision, model_folder

from gmpo.continual.work import RealWork
from gmpo.errors import ChampionMoved, DataError, ModelError, PromotionRefused
from gmpo.registry import Registry
from gmpo.store import ModelVersion, Store, open_store


def two_champions(registry: Registry, tmp_path: Path) -> tuple[ModelVersion, ModelVersion]:
    """The predecessor and the champion, whose files are gone; an alert says so."""
    old, new = added(registry, tmp_path, 1.0), added(registry, tmp_path, 2.0)
    registry.adopt(NAME, old.version, reason="first")
    evidence = decision(old.version, new.version)
    registry.promote(NAME, expected_champion=old.version, candidate=new.version, evidence=evidence)
    (Path(new.path) / "model.safetensors").unlink()
    assert registry.servable(NAME).version == old.version
    return old, new


def lose(*versions: ModelVersion) -> None:
    for version in versions:
        (Path(version.path) / "model.safetensors").unlink(missing_ok=True)


def as_printed(said: str, verb: str, **words: str) -> list[str]:
    """A command of a message, with what stands for the user's own words put in."""
    (command,) = re.findall(rf"\(gmpo (registry {verb} [^)]*)\)", said)
    return [words.get(word, word) for word in shlex.split(command)]


def given(said: str, verb: str, store_url: str, **words: str) -> Result:
    done = gmpo(*as_printed(said, verb, STORE=store_url, WHY="the disk died", **words))
    assert done.exit_code == 0, done.stderr
    return done


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


def test_the_alert_of_a_damaged_champion_gives_commands_that_end_it(
    registry: Registry, store: Store, store_url: str, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    (action,) = store.alerts("firing")[0].payload["recommended_actions"]
    assert f"go back to version {old.version}" in action
    given(action, "add", store_url, MODEL=str(tmp_path / "run-2.0"))
    assert store.alerts("firing") == [] and registry.verify(new.version).is_whole
    lose(new)
    registry.servable(NAME)
    given(action, "rollback", store_url)
    assert store.alerts("firing") == [] and store.champion(NAME).version == old.version


def test_where_all_files_are_lost_the_commands_of_each_message_lead_out(
    registry: Registry, store: Store, store_url: str, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    other = added(registry, tmp_path, 3.0)
    lose(old, new)
    with pytest.raises(ModelError, match="can be served") as served:
        registry.servable(NAME)
    with pytest.raises(PromotionRefused, match="no predecessor") as taken_back:
        registry.rollback(NAME, expected_champion=new.version, reason="damaged")
    (alert,) = store.alerts("firing")
    messages = [
        str(served.value),
        str(taken_back.value),
        *alert.payload["recommended_actions"],
        registry.way_out(NAME),
    ]
    for said in messages:
        assert "rollback" not in said
        given(said, "add", store_url, MODEL=str(tmp_path / "run-2.0"))
        assert registry.servable(NAME).version == new.version
        lose(new)
    given(messages[0], "adopt", store_url, VERSION=other.version)
    assert registry.servable(NAME).version == other.version
    assert store.alerts("firing") == []
    assert len({tuple(as_printed(said, "adopt")) for said in messages}) == 1
    champion = registry.history(NAME)[-1]
    assert (champion.previous, champion.reason) == (
        new.version,
        {"kind": "adoption", "why": "the disk died", "damaged": [new.version, old.version]},
    )


def test_a_version_is_not_adopted_past_one_that_is_whole(
    registry: Registry, store: Store, store_url: str, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    other = added(registry, tmp_path, 3.0)
    with pytest.raises(PromotionRefused, match="without evidence") as refused:
        registry.adopt(NAME, other.version, reason="in a hurry")
    assert store.champion(NAME).version == new.version
    given(str(refused.value), "rollback", store_url)
    assert store.champion(NAME).version == old.version
    with pytest.raises(ChampionMoved):
        registry.adopt(NAME, other.version, reason="in a hurry")


def test_a_champion_is_replaced_only_by_a_whole_version_and_for_a_reason(
    registry: Registry, store: Store, store_url: str, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    other = added(registry, tmp_path, 3.0)
    lose(old, new)
    adopt = ("registry", "adopt", NAME, other.version, "--store", store_url)
    adopt += ("--folder", str(tmp_path / "models"))
    for more in ((), ("--reason", " ")):
        assert "say so with --reason" in refusal(*adopt, *more)
    lose(other)
    with pytest.raises(PromotionRefused, match="restores the files") as refused:
        registry.adopt(NAME, other.version, reason="lost")
    assert store.champion(NAME).version == new.version
    given(str(refused.value), "add", store_url, MODEL=str(tmp_path / "run-3.0"))
    assert gmpo(*adopt, "--reason", "lost").exit_code == 0
    assert store.champion(NAME).version == other.version


def test_a_first_champion_is_adopted_as_the_message_says(
    registry: Registry, store: Store, store_url: str, tmp_path: Path
):
    first = added(registry, tmp_path, 1.0)
    with pytest.raises(DataError, match="has no champion") as refused:
        registry.servable(NAME)
    done = given(str(refused.value), "adopt", store_url, VERSION=first.version)
    assert f"{first.version} is the champion of bot" in done.stdout
    assert store.champion(NAME).reason["why"] == "the first version"


def test_damaged_predecessors_of_a_whole_champion_are_added_again_as_the_message_says(
    registry: Registry, store_url: str, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    added(registry, tmp_path, 2.0)
    lose(old)
    with pytest.raises(PromotionRefused, match="promote another version, or add") as refused:
        registry.rollback(NAME, expected_champion=new.version, reason="slow")
    given(str(refused.value), "add", store_url, MODEL=str(tmp_path / "run-1.0"))
    back = registry.rollback(NAME, expected_champion=new.version, reason="slow")
    assert back.version == old.version


def test_other_files_beside_the_same_weights_do_not_restore_a_version(
    registry: Registry, tmp_path: Path
):
    _, new = two_champions(registry, tmp_path)
    other = model_folder(tmp_path / "other", 2.0, tokenizer='{"a": 1}')
    with pytest.raises(DataError, match=r"is not restored: tokenizer.json of the new folder"):
        registry.add(other, name=NAME)
    assert not registry.verify(new.version).is_whole


def test_commands_name_the_folder_that_is_not_beside_the_store(tmp_path: Path):
    with open_store(str(tmp_path / "my store.db")) as store:
        first = added(Registry(store, tmp_path / "else where"), tmp_path, 1.0)
        with pytest.raises(DataError) as refused:
            Registry(store, tmp_path).servable(NAME)
        given(str(refused.value), "adopt", "", VERSION=first.version)
        assert store.champion(NAME).version == first.version


def test_a_cycle_that_cannot_begin_says_with_commands_what_to_do_first(
    registry: Registry, store: Store, store_url: str, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    work = RealWork(store=store, registry=registry, threads=1)
    with pytest.raises(ModelError, match=f"{old.version} can serve in its place") as damaged:
        work.require_whole(NAME, new.version, then="then begin again")
    assert str(damaged.value).endswith(", then begin again")
    lose(old)
    with pytest.raises(ModelError, match="is not learned from: no version of") as lost:
        work.require_whole(NAME, new.version, then="then begin again")
    assert str(lost.value).endswith("--reason WHY), then begin again")
    shutil.rmtree(old.path)
    with pytest.raises(ModelError, match=f"version {old.version} has no folder") as gone:
        work.folder_of(old.version)
    given(str(gone.value), "add", store_url, MODEL=str(tmp_path / "run-1.0"))
    assert work.folder_of(old.version) == old.path
    given(str(damaged.value), "rollback", store_url)
    work.require_whole(NAME, old.version, then="then begin again")
    lose(old)
    other = added(registry, tmp_path, 3.0)
    given(str(lost.value), "adopt", store_url, VERSION=other.version)
    work.require_whole(NAME, other.version, then="then begin again")


def test_the_gate_says_how_the_files_of_a_version_are_restored(
    registry: Registry, store_url: str, tmp_path: Path
):
    old, new = two_champions(registry, tmp_path)
    gate = ("gate", new.version, old.version, "--suite", "svamp", "--store", store_url)
    said = refusal(*gate, "--name", NAME)
    given(said, "add", store_url, MODEL=str(tmp_path / "run-2.0"))
    assert registry.verify(new.version).is_whole
