"""Group-relative advantages."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gmpo.advantages import group_advantages

F64 = torch.float64
QUICK = settings(max_examples=40)
reward_groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(-5, 5).map(float), min_size=size, max_size=size),
        min_size=1,
        max_size=4,
    )
)


def group(*rewards: float) -> torch.Tensor:
    return torch.tensor([rewards], dtype=F64)


def test_one_correct_rollout_of_eight_gets_seven_over_root_eight():
    # mean 1/8; deviations 7/8 and seven of -1/8; squares 49/64 + 7/64 = 7/8; over 7: 1/8;
    # std = 0.353553; 0.875 / 0.353553 = 2.474874 and -0.125 / 0.353553 = -0.353553
    advantages = group_advantages(group(1, 0, 0, 0, 0, 0, 0, 0))
    torch.testing.assert_close(advantages, group(7 / math.sqrt(8), *[-1 / math.sqrt(8)] * 7))
    assert advantages[0, 0].item() == pytest.approx(2.474874, abs=1e-6)


def test_eps_is_added_to_the_standard_deviation():
    # 0.875 / (0.353553 + 1e-4) = 2.474174 and -0.125 / 0.353653 = -0.353453
    advantages = group_advantages(group(1, 0, 0, 0, 0, 0, 0, 0), eps=1e-4)
    std = math.sqrt(1 / 8)
    torch.testing.assert_close(
        advantages, group(0.875 / (std + 1e-4), *[-0.125 / (std + 1e-4)] * 7)
    )
    assert advantages[0, 0].item() == pytest.approx(2.474174, abs=1e-6)


def test_eps_is_zero_unless_asked_for():
    rewards = group(1, 0, 0, 1)
    assert torch.equal(group_advantages(rewards), group_advantages(rewards, eps=0.0))
    assert not torch.equal(group_advantages(rewards), group_advantages(rewards, eps=1e-8))


def test_two_rollouts_use_the_unbiased_deviation():
    # mean 1; deviations +-1; variance 2 / (2 - 1) = 2; +-1 / 1.414214 = +-0.707107
    torch.testing.assert_close(
        group_advantages(group(2, 0)), group(1 / math.sqrt(2), -1 / math.sqrt(2))
    )


def test_scale_none_only_centers():
    # mean (3 + 1 + 2) / 3 = 2
    assert group_advantages(group(3, 1, 2), scale="none").tolist() == [[1.0, -1.0, 0.0]]


def test_scale_none_ignores_eps():
    assert group_advantages(group(3, 1, 2), scale="none", eps=1.0).tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_eight_rewards_of_a_tenth_give_exactly_zero(scale, eps, dtype):
    rewards = torch.full((1, 8), 0.1, dtype=dtype)
    assert group_advantages(rewards, scale=scale, eps=eps).tolist() == [[0.0] * 8]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.7, 1e12])
def test_a_constant_group_gives_exactly_zero(value):
    assert group_advantages(group(*[value] * 5)).tolist() == [[0.0] * 5]


def test_rewards_that_differ_by_rounding_alone_give_exactly_zero():
    assert 0.1 + 0.2 != 0.3
    assert group_advantages(group(0.1 + 0.2, 0.3, 0.3)).tolist() == [[0.0, 0.0, 0.0]]


def test_the_rounding_tolerance_grows_with_the_rewards():
    # Tolerance 1e-9 * 1e10 = 10: a spread of 1 is rounding at that size, 100 is not.
    assert group_advantages(group(1e10, 1e10 + 1)).tolist() == [[0.0, 0.0]]
    assert group_advantages(group(-1e10, -1e10 - 1)).tolist() == [[0.0, 0.0]]
    assert group_advantages(group(1e10, 1e10 + 100)).abs().min() > 0.7


def test_the_rounding_tolerance_is_one_billionth_for_small_rewards():
    assert group_advantages(group(1e-3, 1e-3 + 5e-10)).tolist() == [[0.0, 0.0]]
    assert group_advantages(group(1e-3, 1e-3 + 2e-9)).abs().min() > 0.7


def test_invalid_rollouts_get_zero_and_enter_neither_mean_nor_deviation():
    # Valid rewards (1, 0, 0): mean 1/3; deviations 2/3, -1/3, -1/3; squares 6/9; over 2: 1/3;
    # std 0.577350; 1.154701 and -0.577350
    valid = torch.tensor([[True, True, False, True]])
    advantages = group_advantages(group(1, 0, math.nan, 0), valid=valid)
    torch.testing.assert_close(
        advantages, group(2 / math.sqrt(3), -1 / math.sqrt(3), 0, -1 / math.sqrt(3))
    )
    assert advantages[0, 2].item() == 0.0


def test_scale_none_leaves_invalid_rollouts_out_too():
    # Valid rewards (4, 1): mean 2.5
    valid = torch.tensor([[True, False, True]])
    assert group_advantages(group(4, 100, 1), valid=valid, scale="none").tolist() == [
        [1.5, 0.0, -1.5]
    ]


def test_an_invalid_reward_does_not_hide_that_the_others_are_equal():
    valid = torch.tensor([[True, False, True]])
    assert group_advantages(group(0.1, 5, 0.1), valid=valid, eps=1e-8).tolist() == [[0.0] * 3]


def test_an_invalid_reward_does_not_widen_the_rounding_tolerance():
    valid = torch.tensor([[True, False, True]])
    assert group_advantages(group(0, 1e12, 1), valid=valid)[0, 2].item() > 0.7


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("num_valid", [0, 1])
def test_a_group_with_fewer_than_two_valid_rollouts_gives_zero(num_valid, scale):
    valid = torch.tensor([[True, False, False]]) & (num_valid == 1)
    assert group_advantages(group(1, 0, 3), valid=valid, scale=scale).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_valid_reward_that_is_not_finite_is_refused_with_its_group(broken):
    rewards = torch.tensor([[1.0, 0.0], [0.5, broken]], dtype=F64)
    with pytest.raises(ValueError, match=rf"group 1 has \[0\.5, {broken}\].*as not valid"):
        group_advantages(rewards)


def test_groups_do_not_touch_each_other():
    both = group_advantages(torch.tensor([[1.0, 0.0, 0.0], [9.0, 9.0, 0.0]], dtype=F64))
    assert torch.equal(both[:1], group_advantages(group(1, 0, 0)))
    assert torch.equal(both[1:], group_advantages(group(9, 9, 0)))


@given(rewards=reward_groups)
@QUICK
def test_the_advantages_of_a_group_sum_to_zero(rewards):
    sums = group_advantages(torch.tensor(rewards, dtype=F64)).sum(dim=-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums))


@given(rewards=reward_groups)
@QUICK
def test_a_group_that_is_not_constant_has_unit_deviation(rewards):
    assume(all(len(set(one)) > 1 for one in rewards))
    deviation = group_advantages(torch.tensor(rewards, dtype=F64)).std(dim=-1)
    torch.testing.assert_close(deviation, torch.ones_like(deviation))


@given(
    rewards=reward_groups,
    shift=st.integers(-3, 3).map(float),
    factor=st.sampled_from([0.5, 2.0, 4.0]),
)
@QUICK
def test_shifting_and_stretching_the_rewards_changes_nothing(rewards, shift, factor):
    rewards = torch.tensor(rewards, dtype=F64)
    torch.testing.assert_close(
        group_advantages(rewards * factor + shift), group_advantages(rewards)
    )


def test_mismatching_shapes_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        group_advantages(torch.zeros(2, 4), valid=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(jaxtyping.TypeCheckError):
        group_advantages(torch.zeros(4))
