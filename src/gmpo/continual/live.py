"""The steps on live traffic: the candidate in the champion's shadow, then where it serves."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Int

from gmpo.continual.plan import LearnPlan, suite_prompts
from gmpo.continual.records import CycleFacts, StepReport
from gmpo.continual.serving import served_process
from gmpo.continual.suites import some_items
from gmpo.continual.traffic import Answered, ServerClient, open_client
from gmpo.continual.users import users_shadow, users_watch
from gmpo.errors import ServerUnreachable
from gmpo.gate import decide_gate
from gmpo.gate.records import Guardrail, PairedSuite
from gmpo.live_shadow import CONTROLLER_SESSION
from gmpo.records import Prompt
from gmpo.store import Event, Store

__all__ = ["live_step", "watch_step"]

_ANSWERS = "champion.json"
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
        ServerUnreachable: the gateway does not answer or does not serve the champion.
        gmpo.errors.RunStopped: `should_stop` said so while users were waited for.
    """
    if plan.gateway is None:
        return StepReport(passed=True, sentence=_NO_GATEWAY)
    prompts = _requests(plan)
    model = store.model_version(facts.candidate)
    assert model is not None, "the update registered it"
    with open_client(plan.gateway, session=CONTROLLER_SESSION) as gateway:
        _require_champion(gateway.wait_for(facts.champion, seconds=plan.serve_seconds), facts, plan)
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
                open_client(url) as shadow,
            ):
                users = users_shadow(facts, plan, store, url=url, should_stop=should_stop)
                # One after the other: shadows would slow the candidate's measured answers.
                champion, candidate, wave = _asked_in_turn(gateway, shadow, prompts, plan)
        except ServerUnreachable as error:
            return StepReport(passed=False, sentence=str(error))
    _record(store, facts, champion, candidate)
    (folder / _ANSWERS).write_text(json.dumps([asdict(answer) for answer in champion]))
    latency = Guardrail(
        name="latency",
        champion=np.array([answer.latency_seconds for answer in champion]),
        candidate=np.array([answer.latency_seconds for answer in candidate]),
        wave=wave,
    )
    own = _judged(facts, plan, champion, candidate, guardrails=[latency])
    return _with_users(own, users)


def watch_step(
    facts: CycleFacts,
    *,
    plan: LearnPlan,
    store: Store,
    should_stop: Callable[[], bool] = lambda: False,
) -> StepReport:
    """See what users get now that the gateway serves the candidate, and ask it again.

    Users' answers are held against those before (`users_watch`), the step's own requests against
    what the champion made of them.

    Raises:
        ServerUnreachable: the gateway does not answer at all.
        gmpo.errors.RunStopped: `should_stop` said so while users were waited for.
    """
    if plan.gateway is None:
        return StepReport(passed=True, sentence=_NO_GATEWAY)
    told = json.loads((facts.files("live_test") / _ANSWERS).read_text(encoding="utf-8"))
    before = [Answered(**answer) for answer in told]
    with open_client(plan.gateway, session=CONTROLLER_SESSION) as gateway:
        if not gateway.wait_for(facts.candidate, seconds=plan.serve_seconds):
            return StepReport(
                passed=False,
                sentence=f"{plan.gateway} did not come to serve version {facts.candidate} within "
                f"{plan.serve_seconds:g} seconds",
                reason="New version is not served",
            )
        after = gateway.ask(_requests(plan), max_tokens=_max_tokens(plan))
    # Latencies of other moments are not compared: the machine may have been busier.
    own = _judged(facts, plan, before, after, guardrails=[])
    if not own.passed:  # what is shown to be worse is taken back at once
        return own
    users = users_watch(facts, plan, store, should_stop=should_stop)
    return own if users is None else _with_users(own, users)


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
    gateway: ServerClient, shadow: ServerClient, prompts: Sequence[Prompt], plan: LearnPlan
) -> tuple[list[Answered], list[Answered], Int[np.ndarray, " N"]]:
    """Both asked a wave of requests at a time, in turn, so that a busy moment meets both alike.

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
    for number, places in enumerate(waves):
        part = [prompts[place] for place in places]
        turns = [(gateway, champion), (shadow, candidate)]
        for client, answers in turns if number % 2 == 0 else reversed(turns):
            answers += client.ask(part, max_tokens=_max_tokens(plan), at_once=_AT_ONCE)
    return champion, candidate, np.repeat(np.arange(len(waves)), [len(one) for one in waves])


def _max_tokens(plan: LearnPlan) -> int:
    return plan.recipe.evaluation.max_new_tokens or plan.recipe.sampling.max_new_tokens


def _require_champion(serves: bool, facts: CycleFacts, plan: LearnPlan) -> None:
    if not serves:
        raise ServerUnreachable(
            f"the gateway at {plan.gateway} does not serve the champion {facts.champion}; start it "
            f"with gmpo serve ... --store STORE --follow {facts.name}, then try again"
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
    guardrails: Sequence[Guardrail],
) -> StepReport:
    decision = decide_gate(
        [
            PairedSuite(
                suite="live",
                champion=np.array([float(answer.is_correct) for answer in champion]),
                candidate=np.array([float(answer.is_correct) for answer in candidate]),
            )
        ],
        policy=plan.gate_policy(),
        champion=facts.champion,
        candidate=facts.candidate,
        guardrails=guardrails,
    )
    lost = sum(answer.error is not None for answer in champion)
    failed = sum(answer.error is not None for answer in candidate)
    breaks = failed - lost > max(1, len(candidate) // 100)
    sentence = (
        f"{sum(answer.is_correct for answer in candidate)} of {len(candidate)} answers were right, "
        f"{sum(answer.is_correct for answer in champion)} of the champion's"
    )
    if failed or lost:
        sentence += f"; {failed} requests failed, {lost} of the champion's"
    if decision.outcome == "fail":
        sentence += f"; {decision.sentence}"
    return StepReport(
        passed=decision.outcome != "fail" and not breaks,
        sentence=sentence,
        reason="New version fails to answer" if breaks else None,
        details={"decision": decision.as_dict(), "failed": failed, "failed_champion": lost},
    )
