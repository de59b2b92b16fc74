"""Which optimizer steps are left out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.spikes import NormHistory, judge_step, verdict_on_loss

STEADY = NormHistory(norms=(2.0,) * 16)


def test_the_threshold_has_a_hand_computed_value():
    # No scatter: the smallest scale, 0.3, six times: 2 e^1.8 = 12.099.
    verdict = judge_step(12.0, STEADY)
    assert (verdict.is_taken, verdict.baseline) == (True, pytest.approx(2.0))
    assert verdict.threshold == pytest.approx(2 * math.exp(1.8))
    assert not judge_step(12.2, STEADY).is_taken


def test_with_few_norms_every_finite_step_is_taken():
    young = NormHistory(norms=(2.0,) * 15)
    verdict = judge_step(1e9, young)
    assert verdict.is_taken
    assert verdict.threshold is None
    assert not judge_step(math.inf, young).is_taken


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_left_out_and_counted(norm):
    first = judge_step(norm, STEADY)
    second = judge_step(norm, first.history)
    assert not first.is_taken
    assert second.history.non_finite_in_a_row == 2
    assert second.history.norms == STEADY.norms
    assert judge_step(2.0, second.history).history.non_finite_in_a_row == 0


def test_a_loss_that_is_not_finite_counts_with_norms_that_are_not():
    first = verdict_on_loss(STEADY)
    assert (first.is_taken, first.metric) == (False, "update/loss")
    assert first.baseline is first.threshold is None
    second = judge_step(math.inf, first.history)
    assert second.metric == "update/gradient_norm"
    assert second.history.non_finite_in_a_row == 2
    assert second.history.norms == STEADY.norms


def test_a_step_without_live_rows_is_taken_and_says_nothing():
    verdict = judge_step(0.0, STEADY)
    assert verdict.is_taken
    assert verdict.history.norms == STEADY.norms


def test_one_spike_does_not_hide_the_next_but_a_new_level_becomes_the_rule():
    history = NormHistory(norms=(2.0,) * 64)
    taken = []
    for _ in range(40):
        verdict = judge_step(100.0, history)
        taken.append(verdict.is_taken)
        history = verdict.history
    assert not any(taken[:31])
    assert all(taken[33:])


@given(st.lists(st.floats(1e-3, 1e3), max_size=80), st.floats(0.1, 10))
def test_the_unit_of_the_norms_does_not_matter(norms, unit):
    def taken(factor: float) -> list[bool]:
        history, found = NormHistory(), []
        for norm in norms:
            verdict = judge_step(norm * factor, history)
            history = verdict.history
            found.append(verdict.is_taken)
        return found

    # A norm that lies exactly on the threshold may fall on either side.
    differing = sum(a != b for a, b in zip(taken(1.0), taken(unit), strict=True))
    assert differing <= 1


def test_the_history_survives_json():
    history = judge_step(3.0, STEADY).history
    assert NormHistory.from_record(json.loads(json.dumps(asdict(history)))) == history
    assert NormHistory.from_record({}) == NormHistory()
    assert not NormHistory().is_begun
