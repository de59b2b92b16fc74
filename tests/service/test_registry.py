"""The registry on both databases: whole versions, one champion, evidence for each change."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread

import pytest
from tests.registries import NAME, added, damage, decision, model_folder, promoted, serving

from gmpo.errors import (
    ChampionMoved,
    DataError,
    ModelError,
    PromotionRefused,
)
from gmpo.registry import Registry, serving_line
from gmpo.registry.files import copied_model
from gmpo.store import Champion, Event, ModelVersion, Store, open_store


def test_a_version_is_a_copy_under_its_digest(registry: Registry, store: Store, tmp_path: Path):
    source = model_folder(tmp_path / "run", 1.0)
    version = registry.add(
        source, name=NAME, parent="abc", lineage={"run": "r1"}, metrics={"accuracy": 0.5}
    )
    assert store.model_version(version.version) == version
    assert Path(version.path) == tmp_path / "models" / version.version
    assert version.lineage["run"] == "r1" and version.parent == "abc"
    assert set(version.lineage["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    (source / "model.safetensors").write_bytes(b"")
    assert registry.verify(version.version).is_whole
    assert [path.name for path in (tmp_path / "models").iterdir()] != []
    assert not list((tmp_path / "models").glob(".partial-*"))


def test_the_same_weights_are_the_same_version(registry: Registry, store: Store, tmp_path: Path):
    told: list[str] = []
    registry = Registry(store, tmp_path / "models", tell=told.append)
    first = added(registry, tmp_path, 1.0, parent="a")
    again = added(registry, tmp_path, 1.0, parent="b")
    assert again == first and told == []
    other = registry.add(model_folder(tmp_path / "x", 1.0, tokenizer="[]"), name=NAME)
    assert other == first
    assert "tokenizer.json of the new folder differ" in told[0]
    with pytest.raises(DataError, match=r"version .* of 'bot'"):
        registry.add(tmp_path / "x", name="other")
    assert len(store.model_versions()) == 1


def test_what_is_no_model_is_refused_and_leaves_nothing(registry: Registry, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(ModelError, match="holds no model"):
            registry.add(path, name=NAME)
    broken = model_folder(tmp_path / "broken", 1.0)
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="damaged"):
        registry.add(broken, name=NAME)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_promotion_needs_evidence_about_these_two(registry: Registry, tmp_path: Path):
    old, new, third = (added(registry, tmp_path, value).version for value in (1.0, 2.0, 3.0))
    with pytest.raises(PromotionRefused, match="adopt the first version"):
        registry.promote(NAME, expected_champion=None, candidate=new, evidence=decision(old, new))
    registry.adopt(NAME, old, reason="first")
    worse = decision(old, new, gain=-0.2)
    assert worse.outcome == "fail"
    for evidence, said in (
        (worse, "'fail'"),
        ({}, "no decision was given"),
        (decision(old, third), f"about {third}"),
        (decision(third, new), f"against {third}"),
        ({**decision(old, new).as_dict(), "outcome": "inconclusive"}, "'inconclusive'"),
    ):
        with pytest.raises(PromotionRefused, match=said):
            registry.promote(NAME, expected_champion=old, candidate=new, evidence=evidence)
    assert [row.version for row in registry.history(NAME)] == [old]
    champion = promoted(registry, old, new)
    assert (champion.version, champion.previous, champion.revision) == (new, old, 2)
    assert champion.reason["evidence"]["candidate"] == new
    json.dumps(champion.reason, allow_nan=False)


def test_only_the_first_champion_is_adopted(registry: Registry, store: Store, tmp_path: Path):
    old, new = serving(registry, tmp_path, 1.0, 2.0)
    with pytest.raises(ChampionMoved):
        registry.adopt(NAME, old, reason="because")
    with pytest.raises(DataError, match="is not registered"):
        registry.adopt("another", "0" * 16, reason="because")
    kinds = [event.kind for event in store.events(kinds=["promotion", "rollback"])]
    assert kinds == ["promotion", "promotion"] and new


def test_of_two_promoters_one_wins(store: Store, store_url: str, tmp_path: Path):
    registry = Registry(store, tmp_path / "models")
    old, *new = (added(registry, tmp_path, value).version for value in (1.0, 2.0, 3.0))
    registry.adopt(NAME, old, reason="first")
    barrier, ends = Barrier(2), {}

    def promoter(candidate: str) -> None:
        with open_store(store_url) as own:
            barrier.wait()
            try:
                ends[candidate] = promoted(Registry(own, tmp_path / "models"), old, candidate)
            except ChampionMoved as error:
                ends[candidate] = error

    threads = [Thread(target=promoter, args=[candidate]) for candidate in new]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kinds = sorted(type(end).__name__ for end in ends.values())
    assert kinds == ["Champion", "ChampionMoved"]
    winner = next(end for end in ends.values() if isinstance(end, Champion))
    assert store.champion(NAME) == winner


def test_a_passed_gate_makes_a_candidate_and_waits_for_a_person(
    registry: Registry, store: Store, tmp_path: Path
):
    old, new, third = (added(registry, tmp_path, value).version for value in (1.0, 2.0, 3.0))
    registry.adopt(NAME, old, reason="first")
    assert registry.submit(NAME, decision(old, new)) is None
    assert registry.submit(NAME, decision(old, third, gain=-0.2)) is None
    (candidate,) = registry.candidates(NAME)
    assert candidate.version == new and store.champion(NAME).version == old
    # A later decision about it counts alone.
    registry.submit(NAME, decision(old, new, gain=-0.2), approval="auto")
    assert registry.candidates(NAME) == []
    champion = registry.submit(NAME, decision(old, third), approval="auto")
    assert champion is not None and champion.version == third
    assert registry.candidates(NAME) == []  # it was compared with the old champion
    assert registry.candidates("nobody") == []
    # What was taken back has to pass again.
    registry.rollback(NAME, expected_champion=third, reason="worse")
    assert registry.candidates(NAME) == []
    registry.submit(NAME, decision(old, third))  # an old decision, told again
    assert registry.candidates(NAME) == []
    registry.submit(NAME, decision(old, third, revision=3))
    assert [candidate.version for candidate in registry.candidates(NAME)] == [third]


def test_evidence_from_before_a_rollback_promotes_nothing(registry: Registry, tmp_path: Path):
    old, new = serving(registry, tmp_path, 1.0, 2.0)
    registry.rollback(NAME, expected_champion=new, reason="latency doubled")
    stale = decision(old, new)
    with pytest.raises(PromotionRefused, match=r"promoted since and taken back \(latency doubled"):
        registry.promote(NAME, expected_champion=old, candidate=new, evidence=stale)
    with pytest.raises(PromotionRefused, match=r"champion 3, .* serves by now"):
        registry.submit(NAME, stale, approval="auto")
    assert [row.version for row in registry.history(NAME)] == [old, new, old]
    # What passes again may serve again.
    anew = decision(old, new, revision=3)
    assert registry.submit(NAME, anew, approval="auto") == registry.history(NAME)[-1]
    assert len(registry.history(NAME)) == 4


def test_evidence_counts_no_more_once_another_champion_served_meanwhile(
    registry: Registry, store: Store, tmp_path: Path
):
    old, other, waiting = (added(registry, tmp_path, value).version for value in (1.0, 2.0, 3.0))
    registry.adopt(NAME, old, reason="first")
    evidence = decision(old, waiting)
    registry.submit(NAME, evidence)
    assert [candidate.version for candidate in registry.candidates(NAME)] == [waiting]
    promoted(registry, old, other)
    with pytest.raises(ChampionMoved):
        registry.promote(NAME, expected_champion=old, candidate=waiting, evidence=evidence)
    registry.rollback(NAME, expected_champion=other, reason="slow")
    with pytest.raises(PromotionRefused, match=f"{other}, {old} served since; gate"):
        registry.promote(NAME, expected_champion=old, candidate=waiting, evidence=evidence)
    assert registry.candidates(NAME) == []
    # Also where the change falls between the look and the promotion.
    with pytest.raises(ChampionMoved, match=f"changed meanwhile, and is {old} again"):
        store.set_champion(
            NAME, expected=old, expected_revision=1, version=waiting, reason={"why": "late"}
        )
    assert len(registry.history(NAME)) == 3


def test_a_pass_promotes_nothing_once_the_gate_answered_otherwise(
    registry: Registry, store: Store, tmp_path: Path
):
    (old,) = serving(registry, tmp_path, 1.0)
    new = added(registry, tmp_path, 2.0).version
    passed = decision(old, new)
    registry.submit(NAME, passed)
    registry.withdraw(NAME, passed, reason="slow")
    registry.submit(NAME, replace(passed, outcome="inconclusive"))
    # Nor does a decision about another time of serving hide what was last said about this one.
    registry.submit(NAME, decision(old, new, revision=7))
    with pytest.raises(PromotionRefused, match="answered 'inconclusive' since"):
        registry.promote(NAME, expected_champion=old, candidate=new, evidence=passed)
    assert store.champion(NAME).version == old
    registry.submit(NAME, passed)
    assert registry.promote(
        NAME, expected_champion=old, candidate=new, evidence=passed
    ) == store.champion(NAME)


def test_a_candidate_is_known_where_the_clock_was_set_back(
    registry: Registry, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (old,) = serving(registry, tmp_path, 1.0)
    new = added(registry, tmp_path, 2.0).version
    monkeypatch.setattr(time, "time", lambda: store.champion(NAME).since - 3600.0)
    registry.submit(NAME, decision(old, new))
    assert [candidate.version for candidate in registry.candidates(NAME)] == [new]


def test_evidence_that_does_not_say_when_its_champion_served_is_refused(
    registry: Registry, store: Store, tmp_path: Path
):
    (old,) = serving(registry, tmp_path, 1.0)
    new = added(registry, tmp_path, 2.0).version
    loose = {**decision(old, new).as_dict(), "champion_revision": None}
    with pytest.raises(PromotionRefused, match="does not say when its champion"):
        registry.promote(NAME, expected_champion=old, candidate=new, evidence=loose)
    assert store.champion(NAME).version == old


def test_a_rollback_never_returns_to_what_was_taken_back(registry: Registry, tmp_path: Path):
    first, second, third = serving(registry, tmp_path, 1.0, 2.0, 3.0)
    champion = registry.rollback(NAME, expected_champion=third, reason="slow")
    assert (champion.version, champion.reason["why"]) == (second, "slow")
    with pytest.raises(ChampionMoved):
        registry.rollback(NAME, expected_champion=third, reason="again")
    assert registry.rollback(NAME, expected_champion=second, reason="").version == first
    with pytest.raises(PromotionRefused, match=r"to go back to; promote another version$"):
        registry.rollback(NAME, expected_champion=first, reason="")
    assert [row.version for row in registry.history(NAME)] == [first, second, third, second, first]


def test_a_rollback_passes_over_damaged_versions(registry: Registry, store: Store, tmp_path: Path):
    first, second, third = serving(registry, tmp_path, 1.0, 2.0, 3.0)
    damage(store.model_version(second))
    champion = registry.rollback(NAME, expected_champion=third, reason="worse")
    assert champion.version == first and champion.reason["damaged"] == [second]


def test_the_line_of_champions_by_hand():
    def line(*rows: tuple[str, str]) -> list[str]:
        made = [
            Champion(
                name=NAME,
                version=version,
                previous=None,
                revision=at,
                since=0.0,
                reason={"kind": kind},
            )
            for at, (kind, version) in enumerate(rows)
        ]
        return serving_line(made)

    assert line() == []
    assert line(("adoption", "a"), ("promotion", "b")) == ["a", "b"]
    assert line(("adoption", "a"), ("promotion", "b"), ("rollback", "a")) == ["a"]
    assert line(("adoption", "a"), ("promotion", "b"), ("promotion", "a")) == ["a", "b", "a"]
    # A rollback to what never served is a champion like any other.
    assert line(("adoption", "a"), ("rollback", "x")) == ["a", "x"]


def test_a_damaged_champion_is_replaced_by_its_predecessor_with_an_alert(
    registry: Registry, store: Store, tmp_path: Path
):
    old, new = serving(registry, tmp_path, 1.0, 2.0)
    assert registry.servable(NAME).version == new
    assert store.alerts() == []
    damage(store.model_version(new))
    for _ in range(2):
        assert registry.servable(NAME).version == old
    (alert,) = store.alerts("firing")
    assert alert.severity == "critical" and alert.payload["annotations"]["serving"] == old
    assert "model.safetensors was changed" in alert.payload["annotations"]["summary"]
    assert store.count_events(kinds=["alert"]) == 1
    assert store.champion(NAME).version == new
    added(registry, tmp_path, 2.0)  # restores the files
    assert registry.servable(NAME).version == new
    assert store.alerts("firing") == [] and store.alerts()[0].ends_at is not None


def test_when_nothing_is_whole_nothing_is_served(registry: Registry, store: Store, tmp_path: Path):
    with pytest.raises(DataError, match="no champion"):
        registry.servable(NAME)
    for version in serving(registry, tmp_path, 1.0, 2.0):
        damage(store.model_version(version))
    with pytest.raises(ModelError, match="no version of 'bot' can be served"):
        registry.servable(NAME)
    assert store.alerts("firing")[0].payload["annotations"]["serving"] == "nothing"


def test_damaged_and_missing_files_are_named_and_not_promoted(
    registry: Registry, store: Store, tmp_path: Path
):
    (old,) = serving(registry, tmp_path, 1.0)
    new = added(registry, tmp_path, 2.0)
    (Path(new.path) / "config.json").unlink()
    check = registry.verify(new.version)
    assert check.missing == ("config.json",) and "config.json is missing" in check.sentence
    with pytest.raises(PromotionRefused, match=r"config.json is missing"):
        promoted(registry, old, new.version)
    # The registry points at files that are gone altogether.
    row = ModelVersion(
        version="f" * 16,
        created=0.0,
        name=NAME,
        path=str(tmp_path / "gone"),
        parent=None,
        lineage={},
        metrics={},
    )
    store.put_model_version(row)
    with pytest.raises(PromotionRefused, match="its folder is missing"):
        promoted(registry, old, row.version)
    with pytest.raises(DataError, match="is not registered"):
        registry.verify("0" * 16)


def test_a_version_registered_elsewhere_is_checked_by_its_weights(
    registry: Registry, store: Store, tmp_path: Path
):
    version = added(registry, tmp_path, 1.0)
    source = model_folder(tmp_path / "elsewhere", 2.0)
    with copied_model(source, tmp_path / "models") as copy:
        digest = copy.version
    row = ModelVersion(
        version=digest,
        created=0.0,
        name=NAME,
        path=str(source),
        parent=version.version,
        lineage={},
        metrics={},
    )
    store.put_model_version(row)
    assert registry.verify(digest).is_whole
    model_folder(source, 3.0)
    assert registry.verify(digest).changed == ("its weights",)


def test_mirrors_are_told_after_each_change(store: Store, tmp_path: Path):
    told: list[str | None] = []

    def mirror(store: Store, name: str) -> None:
        champion = store.champion(name)
        told.append(champion.version if champion else None)

    registry = Registry(store, tmp_path / "models", mirrors=[mirror])
    old, new = serving(registry, tmp_path, 1.0, 2.0)
    taken = registry.rollback(NAME, expected_champion=new, reason={"why": "slow", "cycle": 3})
    assert taken.reason == {"kind": "rollback", "why": "slow", "cycle": 3, "damaged": []}
    assert told == [None, None, old, new, old]


def test_a_change_of_the_champion_and_its_event_are_one(
    registry: Registry, store: Store, tmp_path: Path
):
    old, new = serving(registry, tmp_path, 1.0, 2.0)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # Nothing that comes after the pointer has moved is needed for the event.
    store.add_events = store.alerts = killed  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        registry.rollback(NAME, expected_champion=new, reason="slow")
    told = store.events(kinds=["promotion", "rollback"])
    assert [(one.kind, one.model_version, one.payload["revision"]) for one in told] == [
        ("promotion", old, 1),
        ("promotion", new, 2),
        ("rollback", old, 3),
    ]
    assert told[-1].payload["reason"] == registry.history(NAME)[-1].reason
    with pytest.raises(ChampionMoved):
        store.set_champion(NAME, expected=new, version=old, reason={}, event_kind="rollback")
    assert store.count_events(kinds=["rollback"]) == 1


def test_other_gate_events_are_no_evidence(registry: Registry, store: Store, tmp_path: Path):
    (old,) = serving(registry, tmp_path, 1.0)
    store.add_events([Event(kind="gate", time=0.0, payload={"name": NAME, "champion": old})])
    assert registry.candidates(NAME) == []
