"""The part of the live steps that users take: their own requests, answered by the candidate."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from gmpo.continual.plan import LearnPlan
from gmpo.continual.records import CycleFacts, StepReport
from gmpo.continual.trained_on import TrainedRequests
from gmpo.errors import RunStopped
from gmpo.live_shadow import (
    CONTROLLER_SESSION,
    LONGEST_ANSWER_SECONDS,
    ShadowCall,
    UsersPairs,
    UsersShadows,
    called,
    users_answers,
)
from gmpo.store import Event, Store

__all__ = ["fell_by_more", "users_shadow", "users_watch"]

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0
"""A call stands so much longer than it is waited for, should its process be killed."""
_FAILED = 500
"""Statuses from here on are the server's failures."""
_PAGE_EVENTS = 1000
"""Events that are in memory at once where they are only counted."""
_LEAST_USERS = 5
"""Fewer that all say the same prove nothing at level 0.05: 1 in 2^4 would by chance."""


def users_shadow(
    facts: CycleFacts,
    plan: LearnPlan,
    store: Store,
    *,
    url: str,
    should_stop: Callable[[], bool],
) -> StepReport:
    """Have gateways ask the candidate what users ask, and judge its unseen answers.

    Those to what it was trained on are not compared: memory would pass for skill. Where users ask
    too little nobody is waited for, and the report says so.

    Args:
        facts: of the cycle.
        plan: says how many requests are wanted, and how long they are waited for.
        store: of the gateways.
        url: of the candidate's server.
        should_stop: asked while it waits.

    Raises:
        DataError: the file of rows that the candidate was trained on is missing or damaged.
        RunStopped: `should_stop` said so.
    """
    now = time.time()
    asked = len(users_answers(store, facts.champion, since=now - plan.live_seconds))
    if asked < plan.live_least:
        return StepReport(
            passed=True,
            sentence=f"users asked {asked} requests in {plan.live_seconds:g} seconds, fewer than "
            f"{plan.live_least}, so none of theirs are waited for",
            details={"source": "own", "requests_before": asked},
        )
    call = ShadowCall(
        name=facts.name,
        cycle=facts.number,
        candidate=facts.candidate,
        url=url,
        until=now + plan.live_seconds + _GRACE_SECONDS,
    )
    # An earlier process of the cycle may have gathered some.
    gathered = store.events(kinds=["shadow"], experiment=call.experiment, limit=1)
    began = gathered[0].time if gathered else now
    trained = TrainedRequests(
        store, facts.files("update"), since=min(began, now) - LONGEST_ANSWER_SECONDS
    )

    shadows = UsersShadows(store, call, champion=facts.champion)

    def pairs() -> UsersPairs:
        return shadows.look(trained_on=trained.look())

    with called(store, call):
        _wait(
            lambda: pairs().num_compared >= plan.live_users, plan.live_seconds, facts, should_stop
        )
    return _shadow_report(pairs(), facts, plan)


def _shadow_report(pairs: UsersPairs, facts: CycleFacts, plan: LearnPlan) -> StepReport:
    details: dict[str, Any] = {
        "source": "users",
        "requests": pairs.num_shadows,
        "failed": pairs.num_failed,
        "trained_on": pairs.num_trained_on,
        "not_compared": pairs.num_unpaired,
        "users": len(pairs.served),
    }
    if not pairs.num_shadows:
        return StepReport(
            passed=True,
            sentence="no gateway had a user's request answered by the candidate in "
            f"{plan.live_seconds:g} seconds",
            details=details,
        )
    sentence = f"the candidate answered {pairs.num_shadows - pairs.num_failed} of "
    sentence += f"{pairs.num_shadows} requests of users{_left_out(pairs.num_trained_on)}"
    breaks = pairs.num_failed > max(1, pairs.num_shadows // 100)
    is_worse = False
    if len(pairs.served):
        details["quality"] = {
            "served": float(pairs.served.mean()),
            "shadow": float(pairs.shadow.mean()),
        }
        sentence += f", at a quality of {pairs.shadow.mean():.3f} ({pairs.served.mean():.3f} the "
        sentence += "champion's)"
        is_worse = _lost_more(
            pairs.served - pairs.shadow, margin=plan.degradation_limit, alpha=plan.alpha
        )
    if is_worse:
        sentence += f": a drop of more than {100 * plan.degradation_limit:g} points is shown"
    return StepReport(
        passed=not (breaks or is_worse),
        sentence=sentence,
        reason="New version fails to answer" if breaks else None,
        details=details,
    )


def users_watch(
    facts: CycleFacts, plan: LearnPlan, store: Store, *, should_stop: Callable[[], bool]
) -> StepReport | None:
    """Hold what users got since the candidate serves against what they got before.

    On neither side does the quality of answers to what the candidate was trained on count. Requests
    that failed before any version was asked are told and held against none.

    Args:
        facts: of the cycle, whose live test was on users' requests; else None is returned.
        plan: says how many answers are wanted, and how long they are waited for.
        store: of the gateways.
        should_stop: asked while it waits.

    Raises:
        DataError: the file of rows that the candidate was trained on is missing or damaged.
        RunStopped: `should_stop` said so.
    """
    users = facts.reports["live_test"].details.get("users") or {}
    if users.get("source") != "users":
        return None
    champion = store.champion(facts.name)
    since = time.time() if champion is None else champion.since
    earliest = since - 2 * plan.live_seconds
    before = users_answers(store, facts.champion, since=earliest)
    trained = TrainedRequests(store, facts.files("update"), since=earliest)

    after: list[Event] = []

    def look() -> None:
        # Each answer is read once, however long users are waited for.
        last = after[-1].id if after else None
        after.extend(users_answers(store, facts.candidate, since=since, after_id=last))

    def enough() -> bool:
        look()
        known = trained.look()
        return sum(event.request_id not in known for event in after) >= plan.live_users

    _wait(enough, plan.live_seconds, facts, should_stop)
    look()
    without_version = {
        "without_version": _num_without_version(store, since=since),
        "without_version_before": _num_without_version(store, since=earliest, until=since),
    }
    return _watch_report(
        before, after, plan, trained_on=trained.look(), without_version=without_version
    )


def _num_without_version(store: Store, *, since: float, until: float | None = None) -> int:
    """Users' requests that failed before any version was asked, of whatever model they were."""
    count, last = 0, None
    while True:
        page = store.events(
            kinds=["answer"], since=since, until=until, after_id=last, limit=_PAGE_EVENTS
        )
        count += _num_failed(
            [
                event
                for event in page
                if event.model_version is None
                and event.payload.get("session") != CONTROLLER_SESSION
            ]
        )
        if len(page) < _PAGE_EVENTS:
            return count
        last = page[-1].id


def _watch_report(
    before: Sequence[Event],
    after: Sequence[Event],
    plan: LearnPlan,
    *,
    trained_on: Set[str],
    without_version: Mapping[str, int],
) -> StepReport:
    num_known, num_known_before = (
        sum(event.request_id in trained_on for event in events) for events in (after, before)
    )
    failed, failed_before = (_num_failed(events) for events in (after, before))
    details = {
        "source": "users",
        "answers": len(after),
        "answers_before": len(before),
        "failed": failed,
        "failed_before": failed_before,
        "trained_on": num_known,
        "trained_on_before": num_known_before,
        **without_version,
    }
    # As many failures as the champion's share would give, and one or a hundredth more.
    borne = failed_before * len(after) / max(len(before), 1) + max(1, len(after) // 100)
    was, now = (_qualities(events, without=trained_on) for events in (before, after))
    sentence = f"users got {len(after) - failed} of {len(after)} answers{_left_out(num_known)}"
    is_worse = False
    if len(was) and len(now):
        sentence += f", at a quality of {now.mean():.3f} ({was.mean():.3f} before)"
        is_worse = fell_by_more(was, now, margin=plan.degradation_limit, alpha=plan.alpha)
    if is_worse:
        sentence += f": a drop of more than {100 * plan.degradation_limit:g} points is shown"
    if any(without_version.values()):
        # A store may be that of gateways of other models too, so nobody is blamed for these.
        sentence += f"; {without_version['without_version']} requests failed before any version "
        sentence += f"was asked ({without_version['without_version_before']} before the promotion)"
    return StepReport(
        passed=failed <= borne and not is_worse,
        sentence=sentence,
        reason="New version fails to answer" if failed > borne else None,
        details=details,
    )


def fell_by_more(
    before: NDArray[np.float64], after: NDArray[np.float64], *, margin: float, alpha: float
) -> bool:
    """Whether a mean fell by more than a margin, by Welch's one-sided test.

    Args:
        before: [N], independent values.
        after: [M], independent values of other requests.
        margin: that may be lost.
        alpha: level of the test. With fewer than five values on a side nothing is shown.
    """
    if min(len(before), len(after)) < _LEAST_USERS:
        return False
    parts = [float(values.var(ddof=1)) / len(values) for values in (before, after)]
    error = math.sqrt(sum(parts))
    beyond = float(before.mean() - after.mean()) - margin
    if error == 0.0:
        return beyond > 0
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (before, after), strict=True)
    )
    return bool(stdtr(freedom, -beyond / error) < alpha)


def _lost_more(differences: NDArray[np.float64], *, margin: float, alpha: float) -> bool:
    """Whether the mean of paired losses is above a margin, by Student's one-sided test."""
    count = len(differences)
    if count < _LEAST_USERS:
        return False
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    beyond = float(differences.mean()) - margin
    if error == 0.0:
        return beyond > 0
    return bool(stdtr(count - 1, -beyond / error) < alpha)


def _num_failed(events: Sequence[Event]) -> int:
    return sum(event.payload["status"] >= _FAILED for event in events)


def _left_out(num_trained_on: int) -> str:
    """What to say of requests whose answers are not compared."""
    if not num_trained_on:
        return ""
    return f" ({num_trained_on} asked what the cycle trained on and are not compared)"


def _qualities(events: Sequence[Event], *, without: Set[str]) -> NDArray[np.float64]:
    """Of whole answers, each user's mean, [U], without those to some requests."""
    by_unit: dict[str, list[float]] = defaultdict(list)
    for event in events:
        quality = event.payload.get("quality")
        if quality is not None and event.request_id not in without:
            by_unit[str(event.unit or event.request_id)].append(quality)
    return np.array([np.mean(values) for values in by_unit.values()])


def _wait(
    enough: Callable[[], bool], seconds: float, facts: CycleFacts, should_stop: Callable[[], bool]
) -> None:
    """Until there is enough, or the time is over."""
    deadline = time.monotonic() + seconds
    while not enough() and time.monotonic() < deadline:
        if should_stop():
            raise RunStopped(
                f"cycle {facts.number} of {facts.name!r} was stopped while it waited for users' "
                "requests; give the same command again to go on"
            )
        time.sleep(_POLL_SECONDS)
