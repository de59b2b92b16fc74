"""The steps that decide: gate, approval, promotion and roll-back, by the registry and its store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmpo.continual.cycle import CycleWaits, open_cycle
from gmpo.continual.records import REASONS, CycleFacts, StepReport, facts_of
from gmpo.errors import ChampionMoved, ConfigError, DataError, PromotionRefused, RunFolderError
from gmpo.flushing import flush_file
from gmpo.gate import decide_gate, with_anchor
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import AnchorSuites, Guardrail, PairedSuite, SafetyCount
from gmpo.registry import Registry, stale_reason
from gmpo.store import Event, Store

__all__ = [
    "Compared",
    "answer_approval",
    "approve_step",
    "gate_step",
    "is_compared",
    "kept_or_withdrawn",
    "promote_step",
    "read_compared",
    "require_decidable",
    "roll_back_step",
    "write_compared",
]

_COMPARED = "compared.json"
_APPROVAL = "approval"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What champion and candidate made of the same items.

    Attributes:
        suites: their outcomes.
        guardrails: their completions' lengths or latencies.
        safety: the candidate's counts on safety sets.
        anchor: an earlier version's outcomes beside the candidate's; None holds it against none.
    """

    suites: Sequence[PairedSuite]
    guardrails: Sequence[Guardrail] = ()
    safety: Sequence[SafetyCount] = ()
    anchor: AnchorSuites | None = None


def write_compared(folder: Path, compared: Compared) -> None:
    """Write it into a step's folder; `read_compared` brings it back.

    Raises:
        RunFolderError: the file cannot be written.
    """
    anchor = compared.anchor
    record = {
        "suites": [_suite_record(suite) for suite in compared.suites],
        "anchor": None
        if anchor is None
        else {
            "suites": [_suite_record(suite) for suite in anchor.suites],
            "versions": dict(anchor.versions),
        },
        "guardrails": [{**_pair(one), "name": one.name} for one in compared.guardrails],
        "safety": [{**vars(count), "strata": dict(count.strata)} for count in compared.safety],
    }
    try:
        partial = folder / f"{_COMPARED}.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
        flush_file(partial)
        partial.rename(folder / _COMPARED)
    except OSError as error:
        raise RunFolderError(
            f"outcomes cannot be written to {folder}: {error.strerror}; free space, then give the "
            "same command again"
        ) from None


def is_compared(folder: Path) -> bool:
    """Whether `write_compared` wrote there, to its end."""
    return (folder / _COMPARED).is_file()


def read_compared(folder: Path) -> Compared:
    """What `write_compared` wrote there.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / _COMPARED
    try:
        return _compared_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"outcomes {path} cannot be read ({type(error).__name__}: {error}); put the file back, "
            "or end the cycle with gmpo learn --abandon and begin another"
        ) from None


def _compared_of(record: Mapping[str, Any]) -> Compared:
    anchor = record.get("anchor")
    return Compared(
        suites=[_suite_of(suite) for suite in record["suites"]],
        anchor=None
        if anchor is None
        else AnchorSuites(
            suites=tuple(_suite_of(suite) for suite in anchor["suites"]),
            versions=anchor["versions"],
        ),
        guardrails=[Guardrail(**{**one, **_arrays(one)}) for one in record["guardrails"]],
        safety=[
            SafetyCount(**{**count, "strata": {k: tuple(v) for k, v in count["strata"].items()}})
            for count in record["safety"]
        ],
    )


def _suite_record(suite: PairedSuite) -> dict[str, Any]:
    return {**_pair(suite), "suite": suite.suite, "samples": suite.samples, "items": suite.items}


def _suite_of(record: Mapping[str, Any]) -> PairedSuite:
    return PairedSuite(**{**record, **_arrays(record), "items": tuple(record["items"])})


def _pair(both: PairedSuite | Guardrail) -> dict[str, list[float]]:
    return {"champion": both.champion.tolist(), "candidate": both.candidate.tolist()}


def _arrays(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {side: np.array(record[side], dtype=float) for side in ("champion", "candidate")}


def gate_step(facts: CycleFacts, registry: Registry, *, policy: GatePolicy) -> StepReport:
    """Decide by what `evaluate` wrote; what is inconclusive is not released.

    The registry keeps the decision, so that a person may promote by it.
    """
    compared = read_compared(facts.files("evaluate"))
    against_champion = decide_gate(
        compared.suites,
        policy=policy,
        champion=facts.champion,
        candidate=facts.candidate,
        safety=compared.safety,
        guardrails=compared.guardrails,
    ).bound_to(facts.champion_revision)
    decision = against_champion
    if compared.anchor is not None:
        decision = with_anchor(against_champion, compared.anchor)
    kept = registry.newest_decision(facts.name, facts.candidate) or {}
    about = (decision.champion, decision.champion_revision, decision.outcome)
    if tuple(kept.get(key) for key in ("champion", "champion_revision", "outcome")) != about:
        registry.submit(facts.name, decision)
    reason = None
    if decision.outcome == "inconclusive":
        reason = "Evidence is inconclusive"
    elif any(result.verdict == "fail" for result in decision.safety):
        reason = "Safety test failed"
    elif decision.outcome == "fail" != against_champion.outcome:
        reason = "Drift below the anchor"
    return StepReport(
        passed=decision.passed,
        sentence=decision.sentence,
        reason=reason,
        details={
            "decision": decision.as_dict(),
            "performance_improvement": decision.performance_improvement,
        },
    )


def require_decidable(
    sizes: Mapping[str, int], *, policy: GatePolicy, samples: int
) -> Mapping[str, int]:
    """Refuse suites that could not show even an unchanged model to be no worse.

    Args:
        sizes: items of each suite.
        policy: of the gate.
        samples: completions an item.

    Returns:
        Items that are needed at least, overall and of each suite: for models that answer alike.

    Raises:
        ConfigError: there are too few items for the margin.
    """
    alike = [
        PairedSuite(suite=name, champion=np.zeros(size), candidate=np.zeros(size), samples=samples)
        for name, size in sizes.items()
    ]
    items_alone = policy.model_copy(update={"safety_limits": {}})
    decision = decide_gate(alike, policy=items_alone, champion="this", candidate="the same")
    if decision.outcome == "inconclusive":
        # Of a single suite, all items together are the same question.
        asked = decision.suites if len(sizes) == 1 else (decision.overall, *decision.suites)
        short = [
            f"{row.num_items} items of {row.suite} do not rule out a drop of {row.margin * 100:g} "
            f"points, about {row.items_needed} would do"
            for row in asked
            if row.verdict == "inconclusive"
        ]
        raise ConfigError(
            "the suites are too small for the margin: even if both models answered alike, "
            f"{'; '.join(short)}; add items, or raise degradation_limit"
        )
    return {row.suite: row.items_needed for row in (decision.overall, *decision.suites)}


def approve_step(facts: CycleFacts, store: Store, *, is_automatic: bool) -> StepReport:
    """Whether a person said yes, or nobody has to.

    What was measured against a champion that serves no more, or serves again, ends the cycle.

    Raises:
        CycleWaits: nobody has decided yet.
    """
    if is_automatic:
        return StepReport(passed=True, sentence="nobody has to approve: approval is automatic")
    champion = store.champion(facts.name)
    if champion is not None and champion.version == facts.candidate:
        return StepReport(passed=True, sentence="a person promoted the candidate already")
    stale = _stale(facts, store)
    if stale is not None:
        return StepReport(passed=False, sentence=stale, reason=REASONS["promote"])
    for event in store.events(kinds=[_APPROVAL], model_version=facts.candidate, newest_first=True):
        if (event.payload["name"], event.payload["cycle"]) == (facts.name, facts.number):
            said = "approved" if event.payload["approved"] else "refused"
            return StepReport(
                passed=event.payload["approved"],
                sentence=f"{said} by {event.payload['by']}",
                details=event.payload,
            )
    raise CycleWaits(
        f"version {facts.candidate} passed the gate and waits for a person: approve it with "
        "gmpo learn --approve or gmpo registry promote, or refuse it with --refuse"
    )


def kept_or_withdrawn(report: StepReport, facts: CycleFacts, registry: Registry) -> StepReport:
    """The report of a step after the gate; if it did not pass, nobody promotes by the gate's pass.

    Args:
        report: of the step.
        facts: of the cycle, the gate's decision among them.
        registry: that keeps the decision.
    """
    if not report.passed:
        registry.withdraw(
            facts.name,
            facts.reports["gate"].details["decision"],
            reason=f"cycle {facts.number}: {report.sentence}",
        )
    return report


def answer_approval(store: Store, name: str, *, approved: bool, by: str) -> str:
    """Say yes or no to the candidate that waits, and give its version.

    Args:
        store: with the cycle.
        name: of the model.
        approved: the answer.
        by: who answers.

    Raises:
        ConfigError: no candidate of that model waits.
        PromotionRefused: the answer is yes, and the champion was changed since the gate.
    """
    cycle = open_cycle(store, name)
    if cycle is None or cycle.state != "approve":
        state = (
            "no cycle goes on" if cycle is None else f"cycle {cycle.number} is at {cycle.state!r}"
        )
        raise ConfigError(f"no candidate of {name!r} waits for approval: {state}")
    candidate: str = cycle.payload["reports"]["update"]["details"]["new_model_version"]
    champion = store.champion(name)
    if approved and champion is not None and champion.version != candidate:
        stale = _stale(facts_of(cycle, folder=Path()), store)
        if stale is not None:
            raise PromotionRefused(
                f"cycle {cycle.number} of {name!r} cannot be approved: {stale}; gmpo learn without "
                "--approve ends this cycle, and the next one learns from the new champion"
            )
    payload = {"name": name, "cycle": cycle.number, "approved": approved, "by": by}
    store.add_events(
        [Event(kind=_APPROVAL, time=time.time(), payload=payload, model_version=candidate)]
    )
    return candidate


def promote_step(facts: CycleFacts, store: Store, registry: Registry) -> StepReport:
    """Make the candidate the champion once, however often it is asked for.

    A champion that a person took back meanwhile stays taken back.
    """
    now = store.champion(facts.name)
    is_later = now is not None and now.revision > facts.champion_revision
    if is_later and now is not None and now.version == facts.candidate:
        return StepReport(passed=True, sentence=f"version {facts.candidate} serves already")
    stale = _stale(facts, store)
    if stale is not None:
        return StepReport(passed=False, sentence=stale)
    evidence = facts.reports["gate"].details["decision"]
    try:
        champion = registry.promote(
            facts.name,
            expected_champion=facts.champion,
            candidate=facts.candidate,
            evidence=evidence,
            by=f"cycle {facts.number}",
        )
    except ChampionMoved as error:
        return StepReport(passed=False, sentence=str(error))
    except PromotionRefused as error:
        return StepReport(passed=False, sentence=str(error), reason="Promotion refused")
    return StepReport(
        passed=True,
        sentence=f"version {champion.version} serves in place of {facts.champion}",
        details={"revision": champion.revision},
    )


def _stale(facts: CycleFacts, store: Store) -> str | None:
    """Why the gate's evidence counts no more, if it does not."""
    return stale_reason(
        store.champion_history(facts.name, since_revision=facts.champion_revision),
        revision=facts.champion_revision,
        candidate=facts.candidate,
    )


def roll_back_step(facts: CycleFacts, store: Store, registry: Registry) -> StepReport:
    """Make the old champion serve again, unless somebody else has changed it already."""
    now = store.champion(facts.name)
    if now is None or now.version != facts.candidate:
        serving = "nothing" if now is None else f"version {now.version}"
        return StepReport(
            passed=now is not None and now.version == facts.champion,
            sentence=f"{serving} serves already, not {facts.candidate}",
        )
    reason = {"cycle": facts.number, "why": facts.reports["watch"].sentence}
    champion = registry.rollback(facts.name, expected_champion=facts.candidate, reason=reason)
    return StepReport(
        passed=True,
        sentence=f"version {champion.version} serves again in place of {facts.candidate}",
        details={"revision": champion.revision},
    )
