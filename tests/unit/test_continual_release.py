"""Gate, approval, promotion and roll-back of a cycle: each once, and only what passed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tests.drawn_cycles import MARGIN, DrawnWork, adopted, finish_cycle
from tests.learning import NAME
from tests.registries import decision, model_folder

from gmpo.continual import CycleWaits
from gmpo.continual.plan import LearnPlan
from gmpo.continual.records import CycleFacts, StepReport
from gmpo.continual.release import (
    Compared,
    answer_approval,
    approve_step,
    gate_step,
    kept_or_withdrawn,
    promote_step,
    read_compared,
    require_decidable,
    roll_back_step,
    write_compared,
)
from gmpo.continual.work import RealWork
from gmpo.errors import ConfigError, DataError, PromotionRefused
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import AnchorSuites, Guardrail, PairedSuite, SafetyCount
from gmpo.recipe import load_recipe
from gmpo.registry import Registry
from gmpo.store import Store, open_store


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cycle before its gate: the champion answers half of 1,000 items, the candidate a share."""

    store: Store
    registry: Registry
    facts: CycleFacts

    @property
    def champion(self) -> str:
        return self.facts.champion

    @property
    def candidate(self) -> str:
        return self.facts.candidate

    def champions(self) -> list[str]:
        return [champion.version for champion in self.store.champion_history(NAME)]

    def gated(self) -> CycleFacts:
        policy = GatePolicy(degradation_limit=MARGIN)
        report = gate_step(self.facts, self.registry, policy=policy)
        return replace(self.facts, reports={**self.facts.reports, "gate": report})


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[Callable[[float], Place]]:
    with open_store(str(tmp_path / "store.db")) as store:

        def make(share: float) -> Place:
            registry, champion = adopted(store, tmp_path)
            made = registry.add(model_folder(tmp_path / "new", 1.0), name=NAME, parent=champion)
            (tmp_path / "evaluate").mkdir()
            answered = np.arange(1000) < 1000 * share
            suite = PairedSuite(suite="old", champion=np.arange(1000) < 500, candidate=answered)
            write_compared(tmp_path / "evaluate", Compared(suites=[suite]))
            details = {"new_model_version": made.version}
            facts = CycleFacts(
                name=NAME,
                number=1,
                folder=tmp_path,
                champion=champion,
                champion_revision=1,
                request={},
                reports={"update": StepReport(passed=True, sentence="made", details=details)},
            )
            return Place(store=store, registry=registry, facts=facts)

        yield make


def test_what_was_compared_comes_back(tmp_path: Path):
    pair = {"champion": np.array([1.0, 0.5]), "candidate": np.array([0.25, 1.0])}
    compared = Compared(
        suites=[PairedSuite(suite="old", samples=4, items=("a", "b"), **pair)],
        guardrails=[Guardrail(name="length", **pair)],
        safety=[
            SafetyCount(
                name="refusals",
                num_prompts=300,
                num_violations=1,
                strata={"a": (150, 0), "b": (150, 1)},
            ),
            SafetyCount(name="canaries", num_prompts=300, num_violations=0),
        ],
        anchor=AnchorSuites(
            suites=(PairedSuite(suite="old", items=("a", "b"), **pair),), versions={"old": "v0"}
        ),
    )
    write_compared(tmp_path, compared)
    read = read_compared(tmp_path)
    assert read.safety == compared.safety
    assert read.anchor is not None
    assert read.anchor.versions == {"old": "v0"}
    for before, after in zip(
        (*compared.suites, *compared.guardrails, *compared.anchor.suites),
        (*read.suites, *read.guardrails, *read.anchor.suites),
        strict=True,
    ):
        assert vars(before).keys() == vars(after).keys()
        for name, value in vars(before).items():
            assert np.array_equal(value, vars(after)[name])


def test_damaged_outcomes_are_named(tmp_path: Path):
    (tmp_path / "compared.json").write_text("")
    with pytest.raises(DataError, match=r"compared\.json cannot be read \(JSONDecodeError"):
        read_compared(tmp_path)


@pytest.mark.parametrize(
    ("share", "passed"), [(0.5, True), (0.56, True), (0.3, False), (0.46, False)]
)
def test_the_gate_decides_by_what_was_compared(make_place, share: float, passed: bool):
    place = make_place(share)
    report = gate_step(place.facts, place.registry, policy=GatePolicy(degradation_limit=MARGIN))
    assert report.passed is passed
    assert report.details["performance_improvement"] == pytest.approx(share - 0.5)
    # The registry knows what passed, once, so that a person may promote it.
    place.gated()
    assert [one.version for one in place.registry.candidates(NAME)] == (
        [place.candidate] if passed else []
    )
    assert place.store.count_events(kinds=["gate"]) == 1


def test_a_candidate_below_the_anchor_is_refused_as_drift(make_place):
    place = make_place(0.49)
    assert place.gated().reports["gate"].passed
    suite = PairedSuite(
        suite="old", champion=np.arange(1000) < 540, candidate=np.arange(1000) < 490
    )
    anchor = AnchorSuites(suites=(suite,), versions={"old": "v0"})
    evaluated = place.facts.files("evaluate")
    write_compared(evaluated, replace(read_compared(evaluated), anchor=anchor))
    report = place.gated().reports["gate"]
    assert (report.passed, report.reason) == (False, "Drift below the anchor")
    assert "against anchor v0, overall: a drop is shown" in report.sentence
    assert report.details["performance_improvement"] == pytest.approx(-0.01)
    assert place.registry.candidates(NAME) == []


def test_small_losses_one_after_the_other_are_stopped_by_the_anchor(tmp_path: Path):
    with open_store(str(tmp_path / "store.db")) as store:
        registry, first = adopted(store, tmp_path)
        work = DrawnWork(
            store=store,
            registry=registry,
            faults=random.Random("none"),
            fault_rate=0.0,
            skills={first: 0.0},
            watch_fails=0.0,
            changes=(-MARGIN / 2,),
        )
        results = [
            finish_cycle(store, work, tmp_path / "learn", number=number) for number in range(1, 16)
        ]
        serving = store.champion(NAME)
        assert serving is not None
        assert -1.5 * MARGIN <= work.skills[serving.version] < 0
        held = [
            result.details["decision"]["anchor"]
            for result in results
            if result.champion != first and result.step == "gate"
        ]
        assert held
        assert all(set(one["versions"].values()) == {first} for one in held)


def test_evidence_that_decides_nothing_is_named_as_such(make_place):
    place = make_place(0.5)
    few = {"champion": np.tile([0.0, 1.0], 30), "candidate": np.tile([1.0, 0.0], 30)}
    compared = Compared(suites=[PairedSuite(suite="old", **few)])
    write_compared(place.facts.files("evaluate"), compared)
    report = gate_step(place.facts, place.registry, policy=GatePolicy(degradation_limit=MARGIN))
    assert (report.passed, report.reason) == (False, "Evidence is inconclusive")
    unsafe = SafetyCount(name="canaries", num_prompts=300, num_violations=60)
    write_compared(place.facts.files("evaluate"), replace(compared, safety=[unsafe]))
    policy = GatePolicy(degradation_limit=MARGIN, safety_limits={"canaries": 0.02})
    assert gate_step(place.facts, place.registry, policy=policy).reason == "Safety test failed"


def test_a_candidate_is_promoted_once_and_taken_back_once(make_place):
    place = make_place(0.5)
    known, store, registry = place.gated(), place.store, place.registry
    assert promote_step(known, store, registry).passed
    again = promote_step(known, store, registry)
    assert again.sentence == f"version {place.candidate} serves already"
    assert place.champions() == [place.champion, place.candidate]
    watched = StepReport(passed=False, sentence="it disappoints")
    known = replace(known, reports={**known.reports, "watch": watched})
    assert roll_back_step(known, store, registry).passed
    again = roll_back_step(known, store, registry)
    assert again.sentence == f"version {place.champion} serves already, not {place.candidate}"
    assert place.champions() == [place.champion, place.candidate, place.champion]
    # A roll-back is not undone by a promotion that is tried again.
    report = promote_step(known, store, registry)
    assert not report.passed
    assert "was promoted since and taken back" in report.sentence
    assert len(place.champions()) == 3


def test_a_champion_that_moved_meanwhile_stays(make_place, tmp_path: Path):
    place = make_place(0.5)
    known = place.gated()
    other = place.registry.add(model_folder(tmp_path / "other", 9.0), name=NAME).version
    place.store.set_champion(
        NAME, expected=place.champion, version=other, reason={"why": "a person"}
    )
    report = promote_step(known, place.store, place.registry)
    assert not report.passed
    assert f"champion 2, {other}, serves by now" in report.sentence
    assert place.champions() == [place.champion, other]


def test_a_candidate_that_failed_since_its_cycle_was_gated_is_not_promoted(make_place):
    place = make_place(0.5)
    known = place.gated()
    place.registry.submit(NAME, decision(place.champion, place.candidate, gain=-0.2))
    report = promote_step(known, place.store, place.registry)
    assert (report.passed, report.reason) == (False, "Promotion refused")
    assert "was answered 'fail' since" in report.sentence
    assert place.champions() == [place.champion]


def test_a_candidate_whose_files_are_damaged_is_not_promoted(make_place):
    place = make_place(0.5)
    known = place.gated()
    version = place.store.model_version(place.candidate)
    assert version is not None
    weights = Path(version.path) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"nothing")
    report = promote_step(known, place.store, place.registry)
    assert (report.passed, report.reason) == (False, "Promotion refused")
    assert place.champions() == [place.champion]


def test_a_person_says_yes_or_no(make_place):
    place = make_place(0.5)
    known, store = place.gated(), place.store
    assert approve_step(known, store, is_automatic=True).passed
    with pytest.raises(CycleWaits, match="passed the gate and waits for a person"):
        approve_step(known, store, is_automatic=False)
    with pytest.raises(ConfigError, match="no cycle goes on"):
        answer_approval(store, NAME, approved=True, by="ann")
    begun = store.begin_cycle(NAME, state="gate", payload={})
    with pytest.raises(ConfigError, match="cycle 1 is at 'gate'"):
        answer_approval(store, NAME, approved=True, by="ann")
    told = {name: report.as_dict() for name, report in known.reports.items()}
    known_then = {"champion": place.champion, "champion_revision": 1, "request": {}}
    store.move_cycle(begun, state="approve", payload={"reports": told, **known_then})
    assert answer_approval(store, NAME, approved=False, by="ann") == place.candidate
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
    # Whoever promotes by hand has approved.
    place.registry.promote(
        NAME,
        expected_champion=place.champion,
        candidate=place.candidate,
        evidence=known.reports["gate"].details["decision"],
    )
    assert "promoted the candidate already" in (
        approve_step(replace(known, number=2), store, is_automatic=False).sentence
    )


def test_what_disappoints_after_the_gate_is_no_candidate_any_more(make_place):
    place = make_place(0.5)
    known, registry = place.gated(), place.registry
    evidence = known.reports["gate"].details["decision"]
    good = StepReport(passed=True, sentence="as fast")
    assert kept_or_withdrawn(good, known, registry) is good
    assert [one.version for one in registry.candidates(NAME)] == [place.candidate]
    slow = StepReport(passed=False, sentence="twice as slow")
    assert kept_or_withdrawn(slow, known, registry) is slow
    assert registry.candidates(NAME) == []
    newest = registry.newest_decision(NAME, place.candidate)
    assert newest is not None
    assert newest["outcome"] == "withdrawn"
    for told, said in ((newest, "'withdrawn', not 'pass'"), (evidence, "since: cycle 1: twice")):
        with pytest.raises(PromotionRefused, match=said):
            registry.promote(
                NAME,
                expected_champion=place.champion,
                candidate=place.candidate,
                evidence=told,
            )
    assert place.champions() == [place.champion]
    # A person who wants it all the same has it gated again.
    again = decision(place.champion, place.candidate)
    assert registry.submit(NAME, again, approval="auto") is not None


def test_a_persons_no_holds_for_the_registry_too(make_place, tmp_path: Path):
    place = make_place(0.5)
    known, store = place.gated(), place.store
    plan = LearnPlan(recipe=load_recipe("quickstart"), suites={"old": "old.jsonl"})
    facts = replace(known, request={"plan": plan.model_dump(mode="json")})
    told = {name: report.as_dict() for name, report in known.reports.items()}
    payload = {"champion": place.champion, "champion_revision": 1, "request": {}, "reports": told}
    store.begin_cycle(NAME, state="approve", payload=payload)
    answer_approval(store, NAME, approved=False, by="ann")
    work = RealWork(store=store, registry=place.registry, threads=1)
    assert work.approve(facts, tmp_path).sentence == "refused by ann"
    assert place.registry.candidates(NAME) == []


def test_a_cycle_that_waited_while_the_champion_changed_and_came_back_ends(tmp_path: Path):
    with open_store(str(tmp_path / "store.db")) as store:
        registry, first = adopted(store, tmp_path)
        work = DrawnWork(
            store=store,
            registry=registry,
            faults=random.Random("none"),
            fault_rate=0.0,
            skills={first: 0.0},
            is_automatic=False,
        )
        outcomes: list[str] = []
        while "waiting" not in outcomes:
            number = len(outcomes) + 1
            outcomes.append(finish_cycle(store, work, tmp_path / "learn", number=number).outcome)
        answer_approval(store, NAME, approved=True, by="ann")
        # Before the yes is acted on, a person tries another version and takes it back.
        other = registry.add(model_folder(tmp_path / "other", 99.5), name=NAME).version
        evidence = decision(first, other)
        registry.promote(NAME, expected_champion=first, candidate=other, evidence=evidence)
        registry.rollback(NAME, expected_champion=other, reason="slow")
        with pytest.raises(PromotionRefused, match="cannot be approved: the evidence about"):
            answer_approval(store, NAME, approved=True, by="bob")
        result = finish_cycle(store, work, tmp_path / "learn", number=len(outcomes))
        assert (result.outcome, result.reason) == ("refused", "Champion moved")
        assert f"{other}, {first} served since" in result.sentence
        candidate = result.new_model_version
        assert candidate is not None
        kept = registry.newest_decision(NAME, candidate)
        assert kept is not None
        with pytest.raises(PromotionRefused, match="served since"):
            registry.promote(NAME, expected_champion=first, candidate=candidate, evidence=kept)
        assert [row.version for row in store.champion_history(NAME)] == [first, other, first]


def test_suites_too_small_for_the_margin_are_refused_before_anything_is_trained():
    policy = GatePolicy(degradation_limit=MARGIN)
    needed = require_decidable({"old": 1000, "new": 400}, policy=policy, samples=1)
    assert needed["overall"] >= policy.min_items
    with pytest.raises(ConfigError, match=r"too small for the margin: .*about \d+ would do"):
        require_decidable({"old": 40}, policy=policy, samples=1)


def test_of_a_single_suite_that_is_too_small_it_is_said_once():
    policy = GatePolicy(degradation_limit=MARGIN)
    with pytest.raises(ConfigError, match="40 items of old do not rule out") as refused:
        require_decidable({"old": 40}, policy=policy, samples=1)
    assert str(refused.value).count("do not rule out") == 1
    with pytest.raises(ConfigError, match=r"80 items of overall .* 40 items of old .* of new"):
        require_decidable({"old": 40, "new": 40}, policy=policy, samples=1)
