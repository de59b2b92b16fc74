"""The steps on live traffic: the candidate in the champion's shadow, then where it serves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from gmpo.continual.asked import keep_asked, read_asked
from gmpo.continual.plan import LearnPlan, suite_prompts
from gmpo.continual.records import CycleFacts, StepReport
from gmpo.continual.serving import served_process
from gmpo.continual.suites import some_items
from gmpo.continual.traffic import Answered, ServerClient, open_client
from gmpo.continual.users import users_shadow, users_watch
from gmpo.errors import DataError, ServerUnreachable
from gmpo.gate import decide_gate
from gmpo.gate.records import Guardrail, PairedSuite
from gmpo.live_shadow import CONTROLLER_SESSION
from gmpo.records import Prompt
from gmpo.store import Event, Store

__all__ = ["live_step", "watch_step"]

_AT_ONCE = 16
_NO_GATEWAY = "no gateway is named, so there is no live traffic"


def live_step(
    facts: CycleFacts,
    folder: Path,
    *,
    plan: LearnPlan,
    store: Store,
    threads: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> StepReport:
    """Have a server of the candidate answer what users ask, and then requests of the step's own.

    Users' answers stay the champion's: gateways that follow the model send the candidate the same
    requests (`users_shadow`). Then gateway and candidate are asked the same verifiable requests.
    The candidate is refused if either shows it to be worse, the second to be slower beyond the
    limit, or if it fails where the champion does not; the gate has shown that it is not.

    Raises:
        ServerUnreachable: the gateway does not answer, does not serve the champion, or has too much
            answered by another version.
        gmpo.errors.RunStopped: `should_stop` said so while a server or users were waited for.
    """
    if plan.gateway is None:
        return StepReport(passed=True, sentence=_NO_GATEWAY)
    prompts = _requests(plan)
    model = store.model_version(facts.candidate)
    assert model is not None, "the update registered it"
    with open_client(plan.gateway, session=CONTROLLER_SESSION, should_stop=should_stop) as gateway:
        _require_champion(gateway, facts, plan)
        arguments = ("--name", facts.name, "--dtype", plan.recipe.model.dtype)
        try:
            with (
                served_process(
                    model.path,
                    arguments=arguments,
                    threads=threads,
                    seconds=plan.serve_seconds,
                    what="the server of the candidate",
                ) as url,
                open_client(url, should_stop=should_stop) as shadow,
            ):
                users = users_shadow(facts, plan, store, url=url, should_stop=should_stop)
                # One after the other: shadows would slow the candidate's measured answers.
                champion, candidate, wave = _asked_in_turn(facts, gateway, shadow, prompts, plan)
        except ServerUnreachable as error:
            return StepReport(passed=False, sentence=str(error))
    _require_its_own_answers(champion, facts, plan)
    _record(store, facts, champion, candidate)
    keep_asked(folder, prompts[: len(champion)], champion)
    own = _judged(
        facts,
        plan,
        champion,
        candidate,
        of=len(prompts),
        # Those that failed too often were not asked the waves that a comparison needs.
        guardrails=[_latency(facts, champion, candidate, wave)]
        if len(candidate) == len(prompts)
        else [],
    )
    return _with_users(own, users)


def watch_step(
    facts: CycleFacts,
    *,
    plan: LearnPlan,
    store: Store,
    should_stop: Callable[[], bool] = lambda: False,
) -> StepReport:
    """See what users get now that the gateway serves the candidate, and ask it again.

    Users' answers are held against those before (`users_watch`), the step's own requests, those of
    the live test, against what the champion made of them. A gateway that does not come to serve the
    candidate, or does not answer any more, does not pass: the candidate may have knocked it out.

    Raises:
        gmpo.errors.RunStopped: `should_stop` said so while the gateway or users were waited for.
    """
    if plan.gateway is None:
        return StepReport(passed=True, sentence=_NO_GATEWAY)
    try:
        prompts, before = read_asked(facts.files("live_test"))
    except DataError as error:
        return StepReport(passed=False, sentence=str(error), reason="Live test's answers are lost")
    with open_client(plan.gateway, session=CONTROLLER_SESSION, should_stop=should_stop) as gateway:
        behind = gateway.behind(facts.candidate, seconds=plan.serve_seconds)
        if behind is not None:
            return _not_served(
                f"{plan.gateway} did not come to serve version {facts.candidate} within "
                f"{plan.serve_seconds:g} seconds: {behind}"
            )
        try:
            after = gateway.ask(
                prompts,
                max_tokens=_max_tokens(plan),
                version=facts.candidate,
                most_failures=_num_failed(before) + _borne(len(prompts)),
            )
        except ServerUnreachable as error:
            return _not_served(
                f"{plan.gateway} served version {facts.candidate} and then did not answer: {error}"
            )
    # Latencies of other moments are not compared: the machine may have been busier.
    own = _judged(facts, plan, before, after, of=len(prompts), guardrails=[])
    if not own.passed:  # what is shown to be worse is taken back at once
        return own
    users = users_watch(facts, plan, store, should_stop=should_stop)
    return own if users is None else _with_users(own, users)


def _not_served(sentence: str) -> StepReport:
    return StepReport(passed=False, sentence=sentence, reason="New version is not served")


def _with_users(own: StepReport, users: StepReport) -> StepReport:
    """Both findings as one: what either speaks against does not pass."""
    return StepReport(
        passed=own.passed and users.passed,
        sentence=f"{own.sentence}; {users.sentence}",
        reason=own.reason if not own.passed else users.reason,
        details={**own.details, "users": dict(users.details)},
    )


def _requests(plan: LearnPlan) -> tuple[Prompt, ...]:
    if plan.traffic is not None:
        prompts = suite_prompts(plan.traffic)
    else:
        prompts = tuple(p for path in plan.suites.values() for p in suite_prompts(path))
    return some_items(prompts, plan.live_items, seed="live")


def _asked_in_turn(
    facts: CycleFacts,
    gateway: ServerClient,
    shadow: ServerClient,
    prompts: Sequence[Prompt],
    plan: LearnPlan,
) -> tuple[list[Answered], list[Answered], Int[np.ndarray, " N"]]:
    """Both asked a wave of requests at a time, in turn, so that a busy moment meets both alike.

    Once the candidate fails too often, the waves that are left are not sent.

    Returns:
        The champion's answers, the candidate's, and the wave of each.
    """
    champion: list[Answered] = []
    candidate: list[Answered] = []
    for client in (gateway, shadow):  # the first answers of a server are slow
        client.ask(prompts[:_AT_ONCE], max_tokens=_max_tokens(plan), at_once=_AT_ONCE)
    # Of a single wave nothing could be said.
    num_waves = max(2, math.ceil(len(prompts) / _AT_ONCE))
    waves = np.array_split(np.arange(len(prompts)), num_waves)
    wave = np.repeat(np.arange(len(waves)), [len(one) for one in waves])
    for number, places in enumerate(waves):
        part = [prompts[place] for place in places]
        turns = [(gateway, facts.champion, champion), (shadow, facts.candidate, candidate)]
        for client, version, answers in turns if number % 2 == 0 else reversed(turns):
            answers += client.ask(
                part, max_tokens=_max_tokens(plan), at_once=_AT_ONCE, version=version
            )
        if _breaks(champion, candidate, of=len(prompts)):
            break
    return champion, candidate, wave[: len(champion)]


def _latency(
    facts: CycleFacts,
    champion: Sequence[Answered],
    candidate: Sequence[Answered],
    wave: Int[np.ndarray, " N"],
) -> Guardrail:
    is_own = _answered_by(champion, facts.champion)
    return Guardrail(
        name="latency",
        champion=np.array([answer.latency_seconds for answer in champion])[is_own],
        candidate=np.array([answer.latency_seconds for answer in candidate])[is_own],
        wave=wave[is_own],
    )


def _max_tokens(plan: LearnPlan) -> int:
    return plan.recipe.evaluation.max_new_tokens or plan.recipe.sampling.max_new_tokens


def _require_champion(gateway: ServerClient, facts: CycleFacts, plan: LearnPlan) -> None:
    behind = gateway.behind(facts.champion, seconds=plan.serve_seconds)
    if behind is not None:
        raise ServerUnreachable(
            f"the gateway at {plan.gateway} does not serve the champion {facts.champion} "
            f"({behind}); start it with gmpo serve ... --store STORE --follow {facts.name}, then "
            "try again"
        )


def _require_its_own_answers(
    champion: Sequence[Answered], facts: CycleFacts, plan: LearnPlan
) -> None:
    """Refuse to hold a candidate against answers most of which may not be the champion's."""
    others = [one.version for one in champion if one.version not in (None, facts.champion)]
    if len(others) > len(champion) // 4:
        raise ServerUnreachable(
            f"the gateway at {plan.gateway} had {len(others)} of {len(champion)} requests answered "
            f"by {', '.join(sorted(set(map(str, others))))} in place of the champion "
            f"{facts.champion}, and a quarter is the most; mend what it falls back for, then give "
            "the same command again"
        )


def _record(
    store: Store, facts: CycleFacts, champion: Sequence[Answered], candidate: Sequence[Answered]
) -> None:
    """Shadow answers as events, paired with the served ones; once, however often it is done."""
    experiment = f"learn/{facts.name}/{facts.number}"
    if store.count_events(kinds=["shadow"], experiment=experiment):
        return
    now = time.time()
    store.add_events(
        [
            Event(
                kind="shadow",
                time=now,
                payload={
                    "variant": "candidate",
                    "quality": float(shadow.is_correct),
                    "latency_s": shadow.latency_seconds,
                    "completion_tokens": shadow.num_tokens,
                    "error": shadow.error,
                },
                model_version=facts.candidate,
                experiment=experiment,
                request_id=served.request_id,
            )
            for served, shadow in zip(champion, candidate, strict=True)
        ]
    )


def _judged(
    facts: CycleFacts,
    plan: LearnPlan,
    champion: Sequence[Answered],
    candidate: Sequence[Answered],
    *,
    of: int,
    guardrails: Sequence[Guardrail],
) -> StepReport:
    """What so many requests show; those that another version answered for the champion nothing."""
    lost, failed = _num_failed(champion), _num_failed(candidate)
    is_own = _answered_by(champion, facts.champion)
    details: dict[str, Any] = {
        "failed": failed,
        "failed_champion": lost,
        "of_another_version": int(np.sum(~_answered_by(candidate, facts.candidate))),
        "of_another_version_champion": int(np.sum(~is_own)),
        "not_sent": of - len(candidate),
    }
    breaks = "New version fails to answer" if _breaks(champion, candidate, of=of) else None
    if len(candidate) < of:
        return StepReport(
            passed=False,
            sentence=f"{_failures(details)}, so the last {of - len(candidate)} of {of} were not "
            "sent",
            reason=breaks,
            details=details,
        )
    decision = decide_gate(
        [
            PairedSuite(
                suite="live",
                champion=np.array([float(answer.is_correct) for answer in champion])[is_own],
                candidate=np.array([float(answer.is_correct) for answer in candidate])[is_own],
            )
        ],
        policy=plan.gate_policy(),
        champion=facts.champion,
        candidate=facts.candidate,
        guardrails=guardrails,
    )
    sentence = (
        f"{sum(answer.is_correct for answer in candidate)} of {len(candidate)} answers were right, "
        f"{sum(answer.is_correct for answer in champion)} of the champion's"
    )
    if failed or lost:
        sentence += f"; {_failures(details)}"
    if decision.outcome == "fail":
        sentence += f"; {decision.sentence}"
    return StepReport(
        passed=decision.outcome != "fail" and breaks is None,
        sentence=sentence,
        reason=breaks,
        details={"decision": decision.as_dict(), **details},
    )


def _breaks(champion: Sequence[Answered], candidate: Sequence[Answered], *, of: int) -> bool:
    """Whether the candidate fails where the champion did not, in so many requests."""
    return _num_failed(candidate) - _num_failed(champion) > _borne(of)


def _borne(count: int) -> int:
    """Failures more than the champion's that do not count, of so many requests."""
    return max(1, count // 100)


def _num_failed(answers: Sequence[Answered]) -> int:
    return sum(answer.error is not None for answer in answers)


def _answered_by(answers: Sequence[Answered], version: str) -> Bool[np.ndarray, " N"]:
    """Whether no other version answered in its place."""
    return np.array([answer.version in (None, version) for answer in answers], dtype=bool)


def _failures(details: Mapping[str, Any]) -> str:
    """What failed on both sides; another version's answer is a failure too."""
    sentence = (
        f"{details['failed']} requests failed, {details['failed_champion']} of the champion's"
    )
    others = details["of_another_version"], details["of_another_version_champion"]
    if any(others):
        sentence += f" (another version answered {others[0]}, and {others[1]} of the champion's)"
    return sentence
