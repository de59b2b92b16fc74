"""The circuit breaker: each change of phase by hand, then any order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gmpo.serving.breaker import (
    BreakerRules,
    BreakerState,
    Ticket,
    admit,
    failed,
    retry_after,
    succeeded,
    withdrawn,
)

RULES = BreakerRules(failures=3, open_seconds=10.0, max_open_seconds=35.0, probes=1)


def opened(rules: BreakerRules = RULES, *, now: float = 100.0) -> BreakerState:
    state = BreakerState()
    for _ in range(rules.failures):
        state, ticket = admit(state, rules, now=now)
        assert ticket is not None
        state = failed(state, rules, ticket, now=now)
    return state


def probe_fails(state: BreakerState, *, now: float) -> BreakerState:
    state, ticket = admit(state, RULES, now=now)
    assert ticket is not None
    return failed(state, RULES, ticket, now=now)


def test_failures_in_a_row_open_it_and_a_success_between_starts_the_count_again():
    state = BreakerState()
    for outcome, failures in [(failed, 1), (failed, 2), (succeeded, 0), (failed, 1), (failed, 2)]:
        state, ticket = admit(state, RULES, now=0.0)
        assert ticket is not None
        state = outcome(state, RULES, ticket, now=0.0)
        assert (state.phase, state.failures) == ("closed", failures)
    assert opened().phase == "open"


def test_open_lets_nothing_through_until_its_time_is_over():
    state = opened(now=100.0)
    assert retry_after(state, now=104.0) == 6.0  # opened at 100 for 10 seconds
    state, ticket = admit(state, RULES, now=109.9)
    assert (state.phase, ticket) == ("open", None)
    state, ticket = admit(state, RULES, now=110.0)
    assert state.phase == "half_open" and ticket is not None
    assert retry_after(state, now=110.0) == 0.0


def test_half_open_lets_one_probe_through_which_closes_it_or_opens_it_for_twice_as_long():
    state, probe = admit(opened(), RULES, now=110.0)
    assert probe is not None
    assert admit(state, RULES, now=111.0)[1] is None
    assert succeeded(state, RULES, probe, now=111.0).phase == "closed"
    again = failed(state, RULES, probe, now=111.0)
    assert (again.phase, again.open_seconds) == ("open", 20.0)
    # 10, 20, then 35 and not 40: the longest time is a bound.
    assert probe_fails(again, now=131.0).open_seconds == 35.0


def test_what_passes_beside_a_probe_may_fail_for_it_and_proves_nothing():
    state, probe = admit(opened(), RULES, now=110.0)
    assert probe is not None and probe.is_probe
    beside = Ticket(state.epoch, is_probe=False)
    assert succeeded(state, RULES, beside, now=111.0) == state
    assert withdrawn(state, beside) == state
    assert failed(state, RULES, beside, now=111.0).phase == "open"
    assert succeeded(state, RULES, probe, now=111.0).phase == "closed"


def test_once_closed_it_opens_for_the_short_time_again():
    state = probe_fails(opened(), now=110.0)
    state, probe = admit(state, RULES, now=130.0)
    assert probe is not None
    state = succeeded(state, RULES, probe, now=130.0)
    for _ in range(3):
        state = probe_fails(state, now=131.0)
    assert (state.phase, state.open_seconds) == ("open", 10.0)


def test_every_probe_must_succeed_where_several_are_asked_for():
    rules = BreakerRules(failures=1, open_seconds=1.0, max_open_seconds=9.0, probes=2)
    state, first = admit(opened(rules), rules, now=101.0)
    state, second = admit(state, rules, now=101.0)
    assert first is not None and second is not None
    state = succeeded(state, rules, first, now=102.0)
    assert state.phase == "half_open"
    assert admit(state, rules, now=102.0)[1] is None
    assert succeeded(state, rules, second, now=102.0).phase == "closed"


def test_requests_that_began_before_it_opened_say_nothing_about_a_probe():
    state, early = admit(BreakerState(), RULES, now=0.0)
    assert early is not None
    state = opened()
    state, probe = admit(state, RULES, now=110.0)
    assert probe is not None
    assert succeeded(state, RULES, early, now=110.0) == state
    assert failed(state, RULES, early, now=110.0) == state
    assert withdrawn(state, early) == state


def test_a_probe_whose_client_left_makes_room_for_another():
    state, probe = admit(opened(), RULES, now=110.0)
    assert probe is not None
    state = withdrawn(state, probe)
    assert state.phase == "half_open"
    assert admit(state, RULES, now=110.0)[1] is not None


def test_a_probe_that_never_reports_is_given_up():
    state, probe = admit(opened(), RULES, now=110.0)
    assert probe is not None
    assert admit(state, RULES, now=144.9)[1] is None
    state, another = admit(state, RULES, now=145.0)
    assert another is not None
    assert succeeded(state, RULES, probe, now=146.0) == state, "the lost one came back too late"


class AnyOrder(RuleBasedStateMachine):
    """Requests begin and end in any order while time goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.rules = BreakerRules(failures=2, open_seconds=4.0, max_open_seconds=16.0, probes=2)
        self.state = BreakerState()
        self.now = 0.0
        self.tickets: list[Ticket] = []

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 16.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        before = self.state
        self.state, ticket = admit(self.state, self.rules, now=self.now)
        if ticket is not None:
            self.tickets.append(ticket)
        if before.phase == "closed":
            assert ticket is not None
        if retry_after(before, now=self.now) > 0:
            assert ticket is None

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "withdrawn"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        if outcome == "succeeded":
            self.state = succeeded(self.state, self.rules, ticket, now=self.now)
        elif outcome == "failed":
            self.state = failed(self.state, self.rules, ticket, now=self.now)
        else:
            self.state = withdrawn(self.state, ticket)

    @invariant()
    def counts_are_those_of_the_phase(self) -> None:
        state, rules = self.state, self.rules
        assert 0 <= state.failures < rules.failures
        assert 0 <= state.probing <= rules.probes
        assert 0 <= state.passed < rules.probes
        current = sum(ticket.epoch == state.epoch for ticket in self.tickets)
        if state.phase == "half_open":
            assert state.probing == current
            assert state.probing + state.passed <= rules.probes
        if state.phase == "open":
            assert rules.open_seconds <= state.open_seconds <= rules.max_open_seconds

    @invariant()
    def it_never_stays_shut_for_good(self) -> None:
        late = self.now + self.rules.max_open_seconds
        assert admit(self.state, self.rules, now=late)[1] is not None


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
