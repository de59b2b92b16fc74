"""The registry's folder: what is added, by whom, what is cleared away, and who waits for whom."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tests.forks import FORKS
from tests.registries import NAME, added, decision, model_folder, serving

from gmpo.errors import RunFolderError, StoreLocked
from gmpo.registry import Registry, adding
from gmpo.registry.files import FolderLock
from gmpo.store import Experiment, Store, open_store


def test_garbage_spares_what_serves_could_serve_or_is_tried(
    registry: Registry, store: Store, tmp_path: Path
):
    first, second, third = serving(registry, tmp_path, 1.0, 2.0, 3.0)
    tried, learned, waiting, loose, new = (
        added(registry, tmp_path, value).version for value in (4.0, 5.0, 6.0, 7.0, 8.0)
    )
    experiment = Experiment(
        name="ab",
        created=0.0,
        status="running",
        config={"models": {"control": third, "candidate": store.model_version(tried).path}},
    )
    store.put_experiment(experiment, expected=None)
    store.begin_cycle(NAME, state="gate", payload={"reports": {"update": {"new": learned}}})
    registry.submit(NAME, decision(third, waiting, revision=3))
    foreign = registry.add(model_folder(tmp_path / "other", 9.0), name="other").version

    planned = registry.collect_garbage(NAME, keep=1, dry_run=True)
    assert set(planned.removed) == {first, loose} and planned.num_bytes > 0
    assert all(registry.verify(version).is_whole for version in planned.removed)
    assert planned.kept == {
        third: "champion",
        second: "predecessor",
        waiting: "candidate",
        tried: "in a running experiment or cycle",
        learned: "in a running experiment or cycle",
        new: "one of the newest 1",
    }
    done = registry.collect_garbage(NAME, keep=1)
    assert done.removed == planned.removed
    assert not registry.verify(loose).is_whole
    assert all(registry.verify(version).is_whole for version in (*planned.kept, foreign))
    assert store.count_events(kinds=["removed"]) == 2
    assert registry.collect_garbage(NAME, keep=1).removed == ()
    # What was cleared away can be added again.
    assert added(registry, tmp_path, 7.0).version == loose
    assert registry.verify(loose).is_whole


def test_after_a_rollback_the_version_taken_back_may_go_and_its_predecessors_may_not(
    registry: Registry, tmp_path: Path
):
    first, second, third = serving(registry, tmp_path, 1.0, 2.0, 3.0)
    registry.rollback(NAME, expected_champion=third, reason="worse")
    assert registry.collect_garbage(NAME, keep=0).removed == (third,)
    assert registry.verify(first).is_whole and registry.verify(second).is_whole


def test_leftovers_go_once_they_are_old(registry: Registry, tmp_path: Path):
    added(registry, tmp_path, 1.0)
    orphan = model_folder(tmp_path / "models" / "0123456789abcdef", 2.0)
    killed = model_folder(tmp_path / "models" / ".partial-1-x", 3.0)
    assert registry.collect_garbage(NAME).leftovers == ()
    hours_ago = time.time() - 7200
    for folder in (orphan, killed):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (hours_ago, hours_ago))
    assert set(registry.collect_garbage(NAME).leftovers) == {orphan.name, killed.name}
    assert not orphan.exists() and not killed.exists()


def test_versions_are_not_cleared_away_while_they_are_used(tmp_path: Path):
    folder = tmp_path / "models"
    with (
        FolderLock(folder).shared(),
        FolderLock(folder, patience_seconds=0.1).shared(),
        pytest.raises(StoreLocked, match="in use"),
        FolderLock(folder, patience_seconds=0.1).alone(),
    ):
        pass
    with FolderLock(folder, patience_seconds=0.1).alone():
        pass


def _add_and_die(url: str, folder: Path, source: Path, moment: str) -> None:
    """A process that is killed in the midst of registering a version."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with open_store(url) as store:
        registry = Registry(store, folder)
        if moment == "before the row":
            store.put_model_version = die  # type: ignore[method-assign]
        else:
            adding.keep = die
        registry.add(source, name=NAME)


@pytest.mark.parametrize("moment", ["before the name", "before the row"])
def test_a_process_killed_while_it_registers_leaves_no_version(
    moment: str, store_url: str, tmp_path: Path
):
    source = model_folder(tmp_path / "run", 1.0)
    process = FORKS.Process(
        target=_add_and_die, args=(store_url, tmp_path / "models", source, moment)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with open_store(store_url) as store:
        assert store.model_versions() == []
        registry = Registry(store, tmp_path / "models")
        version = registry.add(source, name=NAME)
        assert registry.verify(version.version).is_whole
        assert store.model_versions() == [version]


def test_a_folder_that_cannot_be_written_is_named(store: Store, tmp_path: Path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(RunFolderError, match="cannot be written"):
        added(Registry(store, tmp_path / "models"), tmp_path, 1.0)


def test_of_two_that_add_the_same_weights_the_first_ones_files_stay(store: Store, tmp_path: Path):
    told: list[str] = []
    first = Registry(store, tmp_path / "models")
    second = Registry(store, tmp_path / "models", tell=told.append)
    look = store.model_version

    def looked_too_early(version: str) -> None:
        store.model_version = look  # type: ignore[method-assign]
        first.add(model_folder(tmp_path / "first", 1.0), name=NAME)

    store.model_version = looked_too_early  # type: ignore[method-assign,assignment]
    version = second.add(model_folder(tmp_path / "second", 1.0, tokenizer="[]"), name=NAME)
    assert version == store.model_version(version.version)
    assert first.verify(version.version).is_whole
    assert (Path(version.path) / "tokenizer.json").read_text() == "{}"
    assert "tokenizer.json of the new folder differ" in told[0]


def test_a_folder_that_is_given_a_name_is_waited_for(tmp_path: Path):
    lock = FolderLock(tmp_path / "models", patience_seconds=0.1)
    with lock.shared(), lock.naming(), pytest.raises(StoreLocked, match="in use"), lock.naming():
        pass
