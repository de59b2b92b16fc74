"""Step sizes over a run, by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.schedules import ClipState, adapted_clip, learning_rate_factor


def factors(total: int, **settings) -> list[float]:
    return [learning_rate_factor(step, total_steps=total, **settings) for step in range(total + 1)]


def test_constant_stays_at_the_peak():
    assert factors(5) == [1.0] * 6


def test_warm_up_rises_linearly_and_the_first_step_already_moves():
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_linear_falls_from_the_peak_to_the_final_fraction():
    # After 2 steps of rise, 4 steps from 1 to 0.2: 1, 0.8, 0.6, 0.4, then 0.2.
    given_factors = factors(6, warmup_steps=2, schedule="linear", final_fraction=0.2)
    assert given_factors == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_falls_along_half_a_wave():
    # (1 + cos(pi k / 4)) / 2 for k = 0..4
    expected = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]
    assert factors(4, schedule="cosine") == pytest.approx(expected)


def test_cosine_arrives_at_its_final_fraction():
    assert factors(4, schedule="cosine", final_fraction=0.1)[-1] == pytest.approx(0.1)
    assert factors(4, schedule="cosine", final_fraction=0.1)[2] == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_steps_beyond_the_run_stay_at_the_final_fraction(schedule):
    factor = learning_rate_factor(50, total_steps=10, schedule=schedule, final_fraction=0.3)
    assert factor == pytest.approx(0.3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_warm_up_only_never_exceeds_the_peak(schedule):
    assert factors(3, warmup_steps=3, schedule=schedule)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors(2, warmup_steps=8, schedule=schedule) == pytest.approx([1 / 8, 2 / 8, 3 / 8])


@given(
    total=st.integers(1, 200),
    warmup=st.integers(0, 200),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    final=st.floats(0, 1),
)
def test_every_step_moves_by_a_positive_fraction_that_falls_after_the_rise(
    total, warmup, schedule, final
):
    values = factors(total, warmup_steps=warmup, schedule=schedule, final_fraction=final)
    assert all(0 < value <= 1 for value in values[:total])
    after = values[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


SHARES = st.floats(min_value=0, max_value=1)
WIDTHS = st.floats(min_value=0.1, max_value=0.8)


def test_a_clip_that_cuts_too_much_widens_by_at_most_4_percent():
    # The first share is the mean: log(0.05 / 0.01) = 1.6, cut to 0.2; exp(0.2 * 0.2) = 1.0408
    after = adapted_clip(0.05, ClipState(half_width=0.4), frozen=False)
    assert after.half_width == pytest.approx(0.4 * math.exp(0.04))
    assert after.clipped == 0.05


def test_a_clip_that_cuts_nothing_narrows():
    after = adapted_clip(0.0, ClipState(half_width=0.4), frozen=False)
    assert after.half_width == pytest.approx(0.4 * math.exp(-0.04))


@pytest.mark.parametrize("share", [0.0051, 0.01, 0.0199])
def test_within_a_factor_of_2_of_the_target_the_clip_stays(share: float):
    assert adapted_clip(share, ClipState(half_width=0.4), frozen=False).half_width == 0.4


def test_an_alarm_or_a_round_without_live_rows_changes_nothing():
    state = ClipState(half_width=0.3, clipped=0.2)
    assert adapted_clip(0.9, state, frozen=True) == state
    assert adapted_clip(None, state, frozen=False) == state


@given(st.lists(SHARES, max_size=60), WIDTHS)
def test_the_clip_stays_within_its_bounds(shares: list[float], width: float):
    state = ClipState(half_width=width)
    for share in shares:
        state = adapted_clip(share, state, frozen=False)
        assert 0.1 <= state.half_width <= 0.8


@given(SHARES, SHARES, WIDTHS, st.none() | SHARES)
def test_more_clipping_never_gives_a_narrower_clip(
    one: float, other: float, width: float, clipped: float | None
):
    state = ClipState(half_width=width, clipped=clipped)
    low, high = (adapted_clip(s, state, frozen=False) for s in sorted((one, other)))
    assert low.half_width <= high.half_width


def test_a_bound_that_was_held_long_is_left_in_the_first_round_that_says_so():
    state = ClipState(half_width=0.4)
    for _ in range(200):
        state = adapted_clip(0.03, state, frozen=False)
    assert state.half_width == 0.8
    rounds = 0
    while state.half_width == 0.8:
        state, rounds = adapted_clip(0.0, state, frozen=False), rounds + 1
    # 0.03 * 0.9^n falls below half of 0.01 at n = 18: the moving mean delays, nothing piles up.
    assert rounds == 18


def test_a_share_that_is_no_fraction_is_refused():
    with pytest.raises(ValueError, match=r"clipped share is 1\.5"):
        adapted_clip(1.5, ClipState(half_width=0.4), frozen=False)
