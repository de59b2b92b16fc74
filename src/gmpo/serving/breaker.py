"""A circuit breaker: whether a backend that keeps failing is asked again, and when.

Pure: state, rules and the time go in, the next state comes out. Closed lets everything through;
`failures` in a row open it; open lets nothing through until `open_seconds` are over; then, half
open, a few probes may pass. Probes that succeed close it, one that fails opens it again for twice
as long, up to `max_open_seconds`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, model_validator

from gmpo.task_config import Table

__all__ = [
    "BreakerRules",
    "BreakerState",
    "Phase",
    "Ticket",
    "admit",
    "failed",
    "retry_after",
    "succeeded",
    "withdrawn",
]

Phase = Literal["closed", "open", "half_open"]


class BreakerRules(Table):
    """When a breaker opens, and for how long."""

    failures: int = Field(default=5, ge=1)
    """Failures in a row that open it."""
    open_seconds: float = Field(default=5.0, gt=0)
    """How long it stays open the first time."""
    max_open_seconds: float = Field(default=120.0, gt=0)
    """Longest time that it stays open, not below `open_seconds`; a probe that has not reported for
    so long is given up."""
    probes: int = Field(default=1, ge=1)
    """Requests that are tried at once while it is half open, and that must all succeed before it
    closes."""

    @model_validator(mode="after")
    def _longest_is_longest(self) -> BreakerRules:
        if self.max_open_seconds < self.open_seconds:
            raise ValueError(
                f"max_open_seconds is {self.max_open_seconds}, below open_seconds "
                f"{self.open_seconds}; raise it"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class BreakerState:
    """Where a breaker stands.

    Attributes:
        phase: closed, open or half open.
        epoch: changes of phase so far; an outcome counts only in the epoch its request began in.
        failures: in a row, while closed.
        since: when this phase began, in seconds of the caller's clock.
        open_seconds: how long the present or last opening lasts; 0 if it never opened since it
            last closed.
        probing: probes under way, while half open.
        passed: probes that succeeded, while half open.
    """

    phase: Phase = "closed"
    epoch: int = 0
    failures: int = 0
    since: float = 0.0
    open_seconds: float = 0.0
    probing: int = 0
    passed: int = 0


@dataclass(frozen=True)
class Ticket:
    """A request that was let through; its outcome is reported with it, once.

    Requests that began before a breaker opened still end while it is half open. They say nothing
    about the backend as it is now, so the epoch sets them apart.

    Attributes:
        epoch: of the breaker when it was let through.
        is_probe: False for one that passes beside a probe of the same response: its failure counts
            as any, its success proves no more than the probe's own.
    """

    epoch: int
    is_probe: bool = True


def admit(
    state: BreakerState, rules: BreakerRules, *, now: float
) -> tuple[BreakerState, Ticket | None]:
    """Ask for a request to be let through; None is no."""
    if state.phase == "closed":
        return state, Ticket(state.epoch)
    if _is_due(state, rules, now):
        state = _enter(state, "half_open", now)
    if state.phase == "half_open" and state.probing + state.passed < rules.probes:
        return replace(state, probing=state.probing + 1), Ticket(state.epoch)
    return state, None


def succeeded(
    state: BreakerState, rules: BreakerRules, ticket: Ticket, *, now: float
) -> BreakerState:
    """The request came to a good end, or the fault was the caller's own."""
    if ticket.epoch != state.epoch:
        return state
    if state.phase == "closed":
        return replace(state, failures=0)
    if not ticket.is_probe:
        return state
    passed = state.passed + 1
    if passed >= rules.probes:
        return replace(_enter(state, "closed", now), open_seconds=0.0)
    return replace(state, probing=state.probing - 1, passed=passed)


def failed(state: BreakerState, rules: BreakerRules, ticket: Ticket, *, now: float) -> BreakerState:
    """The backend did not answer, answered with an error, or broke off."""
    if ticket.epoch != state.epoch:
        return state
    if state.phase == "closed" and state.failures + 1 < rules.failures:
        return replace(state, failures=state.failures + 1)
    longer = min(max(rules.open_seconds, 2 * state.open_seconds), rules.max_open_seconds)
    return replace(_enter(state, "open", now), open_seconds=longer)


def withdrawn(state: BreakerState, ticket: Ticket) -> BreakerState:
    """The request ended without saying anything about the backend, as when the client left."""
    if ticket.epoch != state.epoch or state.phase != "half_open" or not ticket.is_probe:
        return state
    return replace(state, probing=state.probing - 1)


def retry_after(state: BreakerState, *, now: float) -> float:
    """Seconds until an open breaker lets a probe through; 0 if it is not open."""
    if state.phase != "open":
        return 0.0
    return max(0.0, state.since + state.open_seconds - now)


def _is_due(state: BreakerState, rules: BreakerRules, now: float) -> bool:
    if state.phase == "open":
        return now >= state.since + state.open_seconds
    # A probe whose end is never reported must not keep a healthy backend out for good.
    return now >= state.since + rules.max_open_seconds


def _enter(state: BreakerState, phase: Phase, now: float) -> BreakerState:
    return BreakerState(
        phase=phase, epoch=state.epoch + 1, since=now, open_seconds=state.open_seconds
    )
