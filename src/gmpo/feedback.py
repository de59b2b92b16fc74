"""Training rows made of served answers that their users, or a verifier, confirmed.

Only what a client allowed is read: texts that were recorded because its request said so. Rows go
through `gmpo data check` like any others before anything is trained on them.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from gmpo.data_checks.duplicates import text_digest
from gmpo.errors import ConfigError, StoreLocked
from gmpo.grading.answers import extract_answer, marked_answer, parse_number
from gmpo.recipe import settings_of
from gmpo.store import Event, Store
from gmpo.task_config import Table

__all__ = [
    "TEXT_KINDS",
    "FeedbackBatch",
    "FeedbackPolicy",
    "asked_chat",
    "chat_digest",
    "policy_of",
    "purge_texts",
    "training_rows",
    "verdict_event",
]

TEXT_KINDS = ("text", "verdict")
"""Events that hold what users or verifiers wrote; a purge deletes them, and no others."""

_DAY = 86_400.0


class FeedbackPolicy(Table):
    """Which served answers become training rows."""

    retention_days: float = Field(default=30.0, gt=0)
    """Days after which a recorded text is used no more, and `purge_texts` deletes it."""
    liked: float = Field(default=0.5, gt=0, le=1)
    """Score of a user from which on it confirms the answer; below it speaks against it."""
    least_votes: int = Field(default=1, ge=1)
    """Confirming users that an answer needs where no verifier judged it; each has one vote on a
    problem, the last."""
    least_agreement: float = Field(default=0.8, gt=0.5, le=1)
    """Share of the users who judged a problem's answers that must stand behind the one taken."""
    votes: bool = True
    """Whether users' scores confirm answers; else only verdicts do."""


def policy_of(settings: Mapping[str, Any]) -> FeedbackPolicy:
    """The policy that settings by name are.

    Raises:
        ConfigError: an unknown setting (the nearest name is offered), or a value not allowed.
    """
    return settings_of(FeedbackPolicy, settings, of="feedback policy")


@dataclass(frozen=True, kw_only=True)
class FeedbackBatch:
    """Rows made of served answers.

    Attributes:
        rows: in the form that training and `validate_batch` read: `id`, `prompt` (a chat),
            `answer`, and where they come from: `category` "served", `confirmed_by` ("verdict" or
            "votes"), `requests` (how many asked it).
        left_out: recorded answers that became no row, by reason.
        num_texts: recorded answers looked at.
    """

    rows: tuple[dict[str, Any], ...]
    left_out: Mapping[str, int]
    num_texts: int

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON, without the rows."""
        return {
            "rows": len(self.rows),
            "texts": self.num_texts,
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True)
class _Vote:
    """A user's last word on an answer; a later one has the higher place."""

    place: int
    liked: bool
    answer: str = ""


@dataclass
class _Problem:
    """What is known of one problem, however often it was asked."""

    chat: list[dict[str, str]]
    request_id: str
    num_requests: int = 0
    references: Counter[str] = field(default_factory=Counter)
    votes: dict[str, _Vote] = field(default_factory=dict)
    refuted: set[str] = field(default_factory=set)
    forms: dict[str, str] = field(default_factory=dict)


def verdict_event(
    request_id: str,
    *,
    by: str,
    is_correct: bool | None = None,
    reference: str | None = None,
    now: float | None = None,
) -> Event:
    """The event by which a verifier judges a served answer; add it to the store.

    Args:
        request_id: of the answer.
        by: who judges: a program's name.
        is_correct: whether the answer's final answer is right; None if only a reference is given.
        reference: the right answer, where the verifier knows it.
        now: unix seconds; None is the clock's.

    Raises:
        ConfigError: it says nothing.
    """
    if is_correct is None and not (reference and reference.strip()):
        raise ConfigError(
            f"the verdict on {request_id!r} says nothing; give is_correct, a reference, or both"
        )
    return Event(
        kind="verdict",
        time=time.time() if now is None else now,
        payload={"is_correct": is_correct, "reference": reference, "by": by},
        request_id=request_id,
    )


def training_rows(
    store: Store,
    *,
    since: float | None = None,
    until: float | None = None,
    policy: FeedbackPolicy | None = None,
    now: float | None = None,
) -> FeedbackBatch:
    """Rows of the answers recorded in a span of time.

    A row's answer is a verifier's reference, or the final answer of a completion that a verifier
    or enough users confirmed. Problems are one where their texts are (case and white space aside).
    A problem that a running experiment asks is left out wherever else it was asked, so that its
    candidate is not evaluated on what it was trained on.

    Args:
        store: of the gateway, started with --record-texts.
        since: texts recorded at this time or later, in unix seconds; None is from the start.
        until: texts recorded before this time; None is to the end.
        policy: what confirms an answer; None is the defaults.
        now: unix seconds; None is the clock's.
    """
    policy = policy or FeedbackPolicy()
    now = time.time() if now is None else now
    oldest = now - policy.retention_days * _DAY
    events = store.events(kinds=["text"], since=since, until=until)
    scores, verdicts = _judgements(store, policy)
    asked_now = _asked_in_running_experiments(store)
    left_out: Counter[str] = Counter()
    problems: dict[str, _Problem] = {}
    for event in events:
        reason = _unusable(event, oldest=oldest)
        chat = [] if reason else asked_chat(event.payload)
        if reason is None and not chat:
            reason = "no chat that ends in a user turn"
        if reason is not None:
            left_out[reason] += 1
            continue
        digest = chat_digest(chat)
        if digest in asked_now:
            left_out["asked in a running experiment"] += 1
            continue
        request_id = event.request_id or ""
        one = problems.setdefault(digest, _Problem(chat=chat, request_id=request_id))
        one.num_requests += 1
        _judge(one, event, scores.get(request_id), verdicts.get(request_id, ()))
    rows = []
    for one in problems.values():
        found = _answer(one, policy)
        if isinstance(found, str):
            left_out[found] += one.num_requests
            continue
        left_out["the same problem again"] += one.num_requests - 1
        rows.append(_row(one, *found))
    return FeedbackBatch(
        rows=tuple(rows),
        left_out={reason: count for reason, count in sorted(left_out.items()) if count},
        num_texts=len(events),
    )


def purge_texts(
    store: Store,
    *,
    before: float | None = None,
    unit: str | None = None,
    request_id: str | None = None,
    dry_run: bool = False,
) -> int:
    """Delete recorded texts and verdicts; figures of the same answers stay.

    Args:
        store: of the gateway.
        before: those recorded before this time, in unix seconds.
        unit: those of this user; their verdicts are found by request.
        request_id: those of this request.
        dry_run: only count.

    Returns:
        Events deleted, or that would be.

    Raises:
        ConfigError: nothing says which.
        StoreLocked: the store stayed in use, so that deleted texts may still lie in its file; the
            same call again goes on.
    """
    if before is None and unit is None and request_id is None:
        raise ConfigError("nothing says which texts to delete; name an age, a unit or a request")
    count = _purged(store, before=before, unit=unit, request_id=request_id, dry_run=dry_run)
    if not dry_run:
        try:
            store.overwrite_deleted()
        except StoreLocked as error:
            raise StoreLocked(f"{count} recorded texts and verdicts are deleted; {error}") from None
    return count


def _purged(
    store: Store, *, before: float | None, unit: str | None, request_id: str | None, dry_run: bool
) -> int:
    if unit is None:
        return store.delete_events(TEXT_KINDS, until=before, request_id=request_id, dry_run=dry_run)
    requests = {
        event.request_id
        for event in store.events(kinds=["text"], until=before, request_id=request_id)
        if event.unit == unit and event.request_id is not None
    }
    return sum(
        store.delete_events(TEXT_KINDS, until=None, request_id=one, dry_run=dry_run)
        for one in sorted(requests)
    )


def _judgements(
    store: Store, policy: FeedbackPolicy
) -> tuple[dict[str, _Vote], dict[str, list[Mapping[str, Any]]]]:
    """By request, whether its user liked the answer (the last word counts), and the verdicts."""
    scores: dict[str, _Vote] = {}
    verdicts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for place, event in enumerate(store.events(kinds=["feedback", "verdict"])):
        if event.request_id is None:
            continue
        if event.kind == "verdict":
            verdicts[event.request_id].append(event.payload)
        elif policy.votes:
            is_liked = event.payload["score"] >= policy.liked
            scores[event.request_id] = _Vote(place, is_liked)
    return scores, verdicts


def _asked_in_running_experiments(store: Store) -> set[str]:
    running = [one.name for one in store.experiments() if one.status == "running"]
    return {
        chat_digest(chat)
        for name in running
        for event in store.events(kinds=["text"], experiment=name)
        if (chat := asked_chat(event.payload))
    }


def _unusable(event: Event, *, oldest: float) -> str | None:
    """Why a recorded answer is not looked at further."""
    if event.payload.get("consent") is not True:
        return "no consent"
    if event.time < oldest:
        return "older than the retention"
    if event.request_id is None:
        return "no request id"
    return None


def asked_chat(payload: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns that were asked, a plain prompt as a user's turn; empty if they are not usable.

    Args:
        payload: of a "text" event.
    """
    prompt = payload.get("prompt")
    turns = payload.get("messages") or [{"role": "user", "content": prompt}]
    chat = [{"role": turn.get("role"), "content": turn.get("content")} for turn in turns]
    is_usable = chat[-1]["role"] == "user" and all(
        turn["role"] in ("system", "user", "assistant")
        and isinstance(turn["content"], str)
        and turn["content"].strip()
        for turn in chat
    )
    return chat if is_usable else []


def chat_digest(chat: Sequence[Mapping[str, str]]) -> str:
    """Of a problem's turns; the same whatever the case and white space."""
    return text_digest("\n".join(f"{turn['role']}: {turn['content']}" for turn in chat))


def _judge(
    one: _Problem,
    event: Event,
    vote: _Vote | None,
    verdicts: Iterable[Mapping[str, Any]],
) -> None:
    """Note what users and verifiers say of one recorded answer."""
    answer = _final_answer(event.payload)
    for verdict in verdicts:
        reference = verdict.get("reference") or (answer if verdict.get("is_correct") else None)
        if reference:
            one.references[_noted(one, reference)] += 1
        if verdict.get("is_correct") is False and answer is not None:
            one.refuted.add(_noted(one, answer))
    if vote is not None and answer is not None:
        voter = event.unit or event.request_id or ""
        earlier = one.votes.get(voter)
        if earlier is None or earlier.place < vote.place:
            one.votes[voter] = replace(vote, answer=_noted(one, answer))


def _noted(one: _Problem, answer: str) -> str:
    """A key that equal answers share; the form that came first is kept."""
    number = parse_number(answer)
    key = " ".join(answer.casefold().split()) if number is None else str(number)
    one.forms.setdefault(key, answer)
    return key


def _final_answer(payload: Mapping[str, Any]) -> str | None:
    """The one completion's final answer, if it is marked or a number; a cut one has none."""
    completions = payload.get("completions") or []
    if len(completions) != 1 or payload.get("finish_reason") != "stop":
        return None
    text = str(completions[0])
    return marked_answer(text) or extract_answer(text, wants_number=True)


def _answer(one: _Problem, policy: FeedbackPolicy) -> tuple[str, str] | str:
    """The answer and what confirms it, or why there is none."""
    if len(one.references) > 1:
        return "verdicts with different answers"
    if one.references:
        (key,) = one.references
        return one.forms[key], "verdict"
    liked = Counter(vote.answer for vote in one.votes.values() if vote.liked)
    if not liked:
        return "no confirmed answer"
    key, count = liked.most_common(1)[0]
    if key in one.refuted:
        return "liked, but wrong by a verdict"
    if count < policy.least_votes:
        return "too few votes"
    if count < policy.least_agreement * len(one.votes):
        return "votes disagree"
    return one.forms[key], "votes"


def _row(one: _Problem, answer: str, confirmed_by: str) -> dict[str, Any]:
    return {
        "id": f"served-{one.request_id}",
        "prompt": one.chat,
        "answer": answer,
        "category": "served",
        "confirmed_by": confirmed_by,
        "requests": one.num_requests,
    }
