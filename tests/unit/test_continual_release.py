"""Gate, approval, promotion and roll-back of a cycle: each once, and only what passed."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.drawn_cycles import MARGIN, DrawnWork, StoreRegistry, finish_cycle
from tests.learning import NAME, START, begin_champion

from gmpo.continual import CycleWaits
from gmpo.continual_records import CycleFacts, StepReport
from gmpo.continual_release import (
    Compared,
    answer_approval,
    approve_step,
    gate_step,
    promote_step,
    read_compared,
    require_decidable,
    roll_back_step,
    write_compared,
)
from gmpo.errors import ConfigError
from gmpo.gate_policy import GatePolicy
from gmpo.gate_records import Guardrail, PairedSuite, SafetyCount
from gmpo.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store.db")) as opened:
        begin_champion(opened)
        yield opened


def facts(store: Store, folder: Path, *, shares: float = 0.5) -> CycleFacts:
    """A cycle whose candidate v1 answers this share of 1,000 items; the champion answers half."""
    StoreRegistry(store).add(folder / "v1", name=NAME, parent=START, lineage={}, metrics={})
    (folder / "evaluate").mkdir()
    champion = np.arange(1000) < 500
    write_compared(
        folder / "evaluate",
        Compared(
            suites=[
                PairedSuite(
                    suite="old", champion=champion, candidate=np.arange(1000) < 1000 * shares
                )
            ]
        ),
    )
    made = StepReport(passed=True, sentence="made", details={"new_model_version": "v1"})
    return CycleFacts(
        name=NAME,
        number=1,
        folder=folder,
        champion=START,
        champion_revision=1,
        request={},
        reports={"update": made},
    )


def gated(known: CycleFacts) -> CycleFacts:
    report = gate_step(known, policy=GatePolicy(degradation_limit=MARGIN))
    return replace(known, reports={**known.reports, "gate": report})


def champions(store: Store) -> list[str]:
    return [champion.version for champion in store.champion_history(NAME)]


def test_what_was_compared_comes_back(tmp_path: Path):
    pair = {"champion": np.array([1.0, 0.5]), "candidate": np.array([0.25, 1.0])}
    compared = Compared(
        suites=[PairedSuite(suite="old", samples=4, items=("a", "b"), **pair)],
        guardrails=[Guardrail(name="length", **pair)],
        safety=[SafetyCount(name="refusals", num_prompts=300, num_violations=1)],
    )
    write_compared(tmp_path, compared)
    read = read_compared(tmp_path)
    assert read.safety == compared.safety
    for before, after in zip(
        (*compared.suites, *compared.guardrails), (*read.suites, *read.guardrails), strict=True
    ):
        assert vars(before).keys() == vars(after).keys()
        for name, value in vars(before).items():
            assert np.array_equal(value, vars(after)[name])


@pytest.mark.parametrize(
    ("shares", "passed", "reason"),
    [
        (0.5, True, None),
        (0.56, True, None),
        (0.3, False, None),
        (0.46, False, None),
    ],
)
def test_the_gate_decides_by_what_was_compared(
    store: Store, tmp_path: Path, shares: float, passed: bool, reason: str | None
):
    report = gate_step(
        facts(store, tmp_path, shares=shares), policy=GatePolicy(degradation_limit=MARGIN)
    )
    assert report.passed is passed
    assert report.details["performance_improvement"] == pytest.approx(shares - 0.5)
    assert report.details["decision"]["candidate"] == "v1"


def test_evidence_that_decides_nothing_is_named_as_such(store: Store, tmp_path: Path):
    known = facts(store, tmp_path)
    few = {"champion": np.tile([0.0, 1.0], 30), "candidate": np.tile([1.0, 0.0], 30)}
    write_compared(known.files("evaluate"), Compared(suites=[PairedSuite(suite="old", **few)]))
    report = gate_step(known, policy=GatePolicy(degradation_limit=MARGIN))
    assert (report.passed, report.reason) == (False, "Evidence is inconclusive")
    unsafe = SafetyCount(name="canaries", num_prompts=300, num_violations=60)
    write_compared(
        known.files("evaluate"),
        Compared(suites=[PairedSuite(suite="old", **few)], safety=[unsafe]),
    )
    policy = GatePolicy(degradation_limit=MARGIN, safety_limits={"canaries": 0.02})
    assert gate_step(known, policy=policy).reason == "Safety test failed"


def test_a_candidate_is_promoted_once_and_taken_back_once(store: Store, tmp_path: Path):
    known, registry = gated(facts(store, tmp_path)), StoreRegistry(store)
    assert promote_step(known, store, registry).passed
    assert promote_step(known, store, registry).sentence == "version v1 serves already"
    assert champions(store) == [START, "v1"]
    watched = StepReport(passed=False, sentence="it disappoints")
    known = replace(known, reports={**known.reports, "watch": watched})
    assert roll_back_step(known, store, registry).passed
    assert (
        roll_back_step(known, store, registry).sentence == f"version {START} serves already, not v1"
    )
    assert champions(store) == [START, "v1", START]
    # A person's roll-back is not undone by a promotion that is tried again.
    report = promote_step(known, store, registry)
    assert not report.passed
    assert "taken back by somebody else" in report.sentence
    assert champions(store) == [START, "v1", START]


def test_a_champion_that_moved_meanwhile_stays(store: Store, tmp_path: Path):
    known, registry = gated(facts(store, tmp_path)), StoreRegistry(store)
    registry.add(tmp_path / "v9", name=NAME, parent=START, lineage={}, metrics={})
    store.set_champion(NAME, expected=START, version="v9", reason={"why": "a person"})
    report = promote_step(known, store, registry)
    assert not report.passed
    assert "is v9, not v0 as expected" in report.sentence
    assert champions(store) == [START, "v9"]


def test_a_person_says_yes_or_no(store: Store, tmp_path: Path):
    known = gated(facts(store, tmp_path))
    assert approve_step(known, store, is_automatic=True).passed
    with pytest.raises(CycleWaits, match="v1 passed the gate and waits for a person"):
        approve_step(known, store, is_automatic=False)
    with pytest.raises(ConfigError, match="none goes on"):
        answer_approval(store, NAME, approved=True, by="ann")
    begun = store.begin_cycle(NAME, state="gate", payload={})
    with pytest.raises(ConfigError, match="cycle 1 is at 'gate'"):
        answer_approval(store, NAME, approved=True, by="ann")
    told = {name: report.as_dict() for name, report in known.reports.items()}
    store.move_cycle(begun, state="approve", payload={"reports": told})
    assert answer_approval(store, NAME, approved=False, by="ann") == "v1"
    assert approve_step(known, store, is_automatic=False) == StepReport(
        passed=False,
        sentence="refused by ann",
        details={"name": NAME, "cycle": 1, "approved": False, "by": "ann"},
    )
    answer_approval(store, NAME, approved=True, by="bob")
    assert approve_step(known, store, is_automatic=False).sentence == "approved by bob"
    # Another cycle's candidate may have the same weights; its approval is its own.
    with pytest.raises(CycleWaits):
        approve_step(replace(known, number=2), store, is_automatic=False)


def test_suites_too_small_for_the_margin_are_refused_before_anything_is_trained():
    policy = GatePolicy(degradation_limit=MARGIN)
    needed = require_decidable({"old": 1000, "new": 400}, policy=policy, samples=1)
    assert needed["overall"] >= policy.min_items
    with pytest.raises(ConfigError, match=r"too small for the margin: .*about \d+ would do"):
        require_decidable({"old": 40}, policy=policy, samples=1)


def run_cycles(folder: Path, count: int) -> int:
    """Run cycles with faults; how many drops of twice the margin were promoted."""
    with open_store(str(folder / "store.db")) as store:
        begin_champion(store)
        work = DrawnWork(
            store=store,
            registry=StoreRegistry(store),
            faults=random.Random("faults"),
            fault_rate=0.05,
            skills={START: 0.0},
        )
        promoted = []
        for number in range(1, count + 1):
            serving = store.champion(NAME)
            result = finish_cycle(store, work, folder / "learn")
            now = store.champion(NAME)
            assert serving is not None
            assert now is not None
            assert result.number == number
            assert result.champion == serving.version
            if result.outcome == "promoted":
                assert now.version == result.new_model_version
                promoted.append(now.version)
            else:
                assert now.version == serving.version
            shutil.rmtree(folder / "learn")
        cycles = store.cycles(NAME)
        assert [cycle.number for cycle in cycles] == list(range(1, count + 1))
        assert all(cycle.ended is not None for cycle in cycles)
        _require_evidence(store)
        gains = [v for v, delta in work.deltas.items() if delta > 0]
        assert len([v for v in gains if v in promoted]) > 0.6 * len(gains)
        return sum(work.deltas[v] <= -2 * MARGIN for v in promoted)


def _require_evidence(store: Store) -> None:
    """One chain of champions: each but the first passed a gate, or is the one before, back."""
    history = store.champion_history(NAME)
    assert [champion.revision for champion in history] == list(range(1, len(history) + 1))
    for before, after in itertools.pairwise(history):
        assert after.previous == before.version
        evidence = after.reason.get("evidence")
        if evidence is None:
            assert after.version == before.previous
        else:
            assert evidence["outcome"] == "pass"
            assert (evidence["champion"], evidence["candidate"]) == (before.version, after.version)


def test_fifty_cycles_with_faults_never_release_what_did_not_pass(tmp_path: Path):
    assert run_cycles(tmp_path, 50) == 0


@pytest.mark.verify
def test_three_thousand_cycles_with_faults_never_release_what_did_not_pass(tmp_path: Path):
    assert run_cycles(tmp_path, 3000) <= 3
