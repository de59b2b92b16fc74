"""Clip, step size and floor between rounds: by hand, then what must hold whatever comes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.schedules import (
    REWARD_AT_FIRST_FLOOR,
    ClipLaw,
    ClipSide,
    StepSize,
    StepSizeLaw,
    adapted_clip,
    adapted_step_size,
    deciding_strain,
    judged_metrics,
    scheduled_floor,
)

LAW = ClipLaw(
    narrowest=0.1,
    widest=0.8,
    share_min=0.005,
    share_max=0.02,
    gain=0.2,
    average_rounds=1,
    warm_up_rounds=0,
)
SIZE_LAW = StepSizeLaw(lowest=0.1, gain=0.5, tolerance=3.0, warm_up_rounds=5)


def half_width(share: float, *, start: float = 0.4) -> float:
    return adapted_clip(share, ClipSide(half_width=start), LAW, frozen=False).half_width


def test_a_half_width_follows_the_share_by_hand():
    # 0.022 is 10 % above the band: exp(0.2 x 0.1); 0.0045 is 10 % below: exp(-0.2 x 0.1).
    assert half_width(0.022) == pytest.approx(0.4 * math.exp(0.02))
    assert half_width(0.0045) == pytest.approx(0.4 * math.exp(-0.02))
    # Errors of 24 and -1 are cut to 0.2 and -0.2.
    assert half_width(0.5) == pytest.approx(0.4 * math.exp(0.04))
    assert half_width(0.0) == pytest.approx(0.4 * math.exp(-0.04))


@pytest.mark.parametrize("share", [0.005, 0.01, 0.02])
def test_inside_the_band_nothing_moves(share: float):
    assert half_width(share) == 0.4


def test_the_share_is_a_moving_mean_that_begins_as_a_plain_one():
    law, side = replace(LAW, average_rounds=2), ClipSide(half_width=0.4)
    means = []
    for share in (0.01, 0.03, 0.03):
        side = adapted_clip(share, side, law, frozen=False)
        means.append(side.share)
    # Half of each new share counts: 0.02 lies between 0.01 and 0.03, 0.025 between 0.02 and 0.03.
    assert means == pytest.approx([0.01, 0.02, 0.025])


def test_nothing_moves_before_the_warm_up_is_over():
    law, side = replace(LAW, warm_up_rounds=2), ClipSide(half_width=0.4)
    widths = []
    for _ in range(3):
        side = adapted_clip(0.5, side, law, frozen=False)
        widths.append(side.half_width)
    assert widths == pytest.approx([0.4, 0.4, 0.4 * math.exp(0.04)])


def test_an_alarm_and_a_round_without_live_rows_change_nothing_at_all():
    side = ClipSide(half_width=0.4, share=0.01, rounds=30)
    assert adapted_clip(0.5, side, LAW, frozen=True) == side
    assert adapted_clip(None, side, LAW, frozen=False) == side


def test_no_error_piles_up_at_a_bound():
    side = ClipSide(half_width=0.79)
    for _ in range(200):
        side = adapted_clip(0.5, side, LAW, frozen=False)
    assert side.half_width == 0.8
    assert adapted_clip(0.0, side, LAW, frozen=False).half_width < 0.8


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_no_fraction_is_refused(share: float):
    with pytest.raises(ValueError, match="must lie from 0 to 1"):
        adapted_clip(share, ClipSide(half_width=0.4), LAW, frozen=False)


@given(st.lists(st.none() | st.floats(0, 1), max_size=60), st.floats(0.1, 0.8))
def test_a_half_width_stays_in_bounds_and_moves_little(shares, start):
    side = ClipSide(half_width=start)
    for share in shares:
        before = side.half_width
        side = adapted_clip(share, side, replace(LAW, average_rounds=5), frozen=False)
        assert 0.1 <= side.half_width <= 0.8
        assert abs(math.log(side.half_width / before)) <= 0.04 + 1e-12


def test_a_clip_that_decides_its_own_share_settles_inside_the_band():
    # A share of exp(-width / 0.1): 2 % at 0.39, 0.5 % at 0.53.
    side, law = ClipSide(half_width=0.1), replace(LAW, average_rounds=10)
    for _ in range(300):
        side = adapted_clip(math.exp(-side.half_width / 0.1), side, law, frozen=False)
    assert 0.005 <= math.exp(-side.half_width / 0.1) <= 0.0201


def healthy(**changes: float) -> dict[str, float]:
    return {
        "update/gradient_norm": 1.0,
        "ratio/log_q99": 0.1,
        "ratio/log_q01": -0.1,
        "kl_old/k1": 0.001,
        "rollout/reward": 0.5,
    } | changes


def followed(*rounds: dict[str, float], frozen: bool = False) -> StepSize:
    size = StepSize()
    for metrics in rounds:
        size = adapted_step_size(metrics, size, SIZE_LAW, frozen=frozen)
    return size


def test_a_steady_run_keeps_its_step_size():
    assert followed(*[healthy()] * 40).factor == 1.0


@pytest.mark.parametrize(
    "trouble",
    [
        # 4 deviations each: 1.2 / 0.3 of a logarithm, 0.02 / 0.005 nats, 0.08 / 0.02 of reward.
        {"update/gradient_norm": math.exp(1.2)},
        {"ratio/log_q99": 0.1 * math.exp(1.2), "ratio/log_q01": -0.1 * math.exp(1.2)},
        {"kl_old/k1": 0.021},
        {"rollout/reward": 0.42},
    ],
)
def test_each_signal_lowers_the_step_size_by_hand(trouble: dict[str, float]):
    before = [healthy()] * 5 + [healthy(**trouble)] * 2
    assert followed(*before).factor == 1.0  # the median of 5 has not moved yet
    # Strain 4 over tolerance 3: an error of 1/3, cut to 0.2, so exp(-0.5 x 0.2) a round.
    size = followed(*before, healthy(**trouble))
    assert size.factor == pytest.approx(math.exp(-0.1))
    strain = deciding_strain(healthy(**trouble), size, SIZE_LAW)
    assert strain is not None
    assert strain.deviations == pytest.approx(4)
    assert set(strain.metric.split(" - ")) & set(trouble)
    assert not strain.low <= strain.value <= strain.high


def test_good_news_lowers_nothing():
    better = healthy(**{"update/gradient_norm": 0.1, "kl_old/k1": 0.0, "rollout/reward": 0.9})
    assert followed(*[healthy()] * 5, *[better] * 10).factor == 1.0


def test_a_reward_that_falls_from_where_it_rose_to_is_seen():
    high, less = healthy(**{"rollout/reward": 0.9}), healthy(**{"rollout/reward": 0.7})
    assert followed(*[healthy()] * 5, *[high] * 6, *[less] * 5).factor < 1
    # 0.7 alone is above the first rounds.
    assert followed(*[healthy()] * 5, *[less] * 5).factor == 1.0


def test_it_rises_at_a_fifth_of_the_pace_and_not_under_an_alarm():
    low = replace(followed(*[healthy()] * 5), factor=0.5)
    up = adapted_step_size(healthy(), low, SIZE_LAW, frozen=False)
    assert up.factor == pytest.approx(0.5 * math.exp(0.02))
    assert adapted_step_size(healthy(), low, SIZE_LAW, frozen=True).factor == 0.5
    strained = [healthy()] * 5 + [healthy(**{"kl_old/k1": 1.0})] * 3
    assert followed(*strained, frozen=True).factor < 1  # lower is the safe side


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1), st.booleans()), max_size=60))
def test_the_factor_stays_in_bounds(rounds):
    size = StepSize()
    for norm, reward, frozen in rounds:
        metrics = healthy(**{"update/gradient_norm": norm, "rollout/reward": reward})
        size = adapted_step_size(metrics, size, SIZE_LAW, frozen=frozen)
        assert 0.1 <= size.factor <= 1


def test_rounds_without_figures_leave_the_signals_as_they_were():
    size = followed(*[healthy()] * 6)
    nothing = {"update/gradient_norm": 0.0, "ratio/log_q99": None, "kl_old/k1": math.nan}
    assert adapted_step_size(nothing, size, SIZE_LAW, frozen=False) == size


def test_a_strain_that_the_round_did_not_measure_lowers_nothing():
    """Once every group is dead, the last gradients say nothing new."""
    size = followed(*[healthy()] * 5, *[healthy(**{"update/gradient_norm": 9.0})] * 3)
    assert size.factor < 1
    dead = {"update/gradient_norm": 0.0, "rollout/reward": 0.5}
    after = size
    for _ in range(30):
        after = adapted_step_size(dead, after, SIZE_LAW, frozen=False)
    assert after.factor == size.factor  # nor does it rise while they are not calm
    # A reward that falls meanwhile is measured, though gradients lie further off:
    # 4 deviations of 0.02 over tolerance 3.
    fallen = [dead | {"rollout/reward": 0.42}] * 3
    for metrics in fallen:
        after = adapted_step_size(metrics, after, SIZE_LAW, frozen=False)
    assert after.factor == pytest.approx(size.factor * math.exp(-0.1))
    strain = deciding_strain(fallen[-1], after, SIZE_LAW)
    assert strain is not None
    assert (strain.metric, strain.deviations) == ("rollout/reward", pytest.approx(4))


def test_a_reward_under_a_falling_floor_is_judged_at_the_first_one():
    plain = {"rollout/reward": 0.2}
    assert judged_metrics(plain) == plain
    assert judged_metrics(plain | {REWARD_AT_FIRST_FLOOR: 0.5})["rollout/reward"] == 0.5


def test_what_is_remembered_survives_json():
    size = followed(*[healthy()] * 5, *[healthy(**{"kl_old/k1": 1.0})] * 4)
    assert StepSize.from_record(json.loads(json.dumps(asdict(size)))) == size


def test_the_floor_falls_geometrically_from_the_first_round_to_the_last():
    floors = [scheduled_floor(rounds, first=0.1, last=0.001, total_rounds=3) for rounds in range(4)]
    assert floors == pytest.approx([0.1, 0.01, 0.001, 0.001])
