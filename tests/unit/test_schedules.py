"""Step sizes over a run, by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.schedules import learning_rate_factor


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
