"""The pieces every objective shares."""

import math

import jaxtyping
import pytest
import torch

from gmpo.objective.ratio import (
    ObjectiveTerms,
    count_tokens,
    masked_log_ratio,
    pessimistic_log_ratio,
    token_mean,
)

F64 = torch.float64


def test_tokens_are_counted_under_the_mask_alone():
    mask = torch.tensor([[True, True, False], [False, False, True]])
    assert count_tokens(mask).tolist() == [2.0, 1.0]


def test_every_row_without_a_token_is_named_in_the_error():
    mask = torch.tensor([[False, False], [True, False], [False, False]])
    with pytest.raises(ValueError, match=r"sequences \[0, 2\] have no unmasked token.*drop them"):
        count_tokens(mask)


def test_the_token_mean_divides_by_the_counted_tokens_and_ignores_the_rest():
    values = torch.tensor([[1.0, 4.0, math.nan], [math.inf, -2.0, 8.0]], dtype=F64)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    # (1 + 4) / 2 = 2.5 and (-2 + 8) / 2 = 3
    assert token_mean(values, mask=mask).tolist() == [2.5, 3.0]


def test_the_token_mean_refuses_an_empty_row():
    with pytest.raises(ValueError, match=r"sequences \[0\]"):
        token_mean(torch.zeros(1, 2), mask=torch.zeros(1, 2, dtype=torch.bool))


def test_the_token_mean_keeps_the_precision_of_its_values():
    ones = torch.ones(1, 3, dtype=torch.bool)
    assert token_mean(torch.zeros(1, 3, dtype=F64), mask=ones).dtype == F64
    assert token_mean(torch.zeros(1, 3, dtype=torch.float32), mask=ones).dtype == torch.float32


def test_the_log_ratio_is_policy_minus_old_and_zero_off_the_mask():
    log_ratio, used = masked_log_ratio(
        policy_logprobs=torch.tensor([[-1.0, -math.inf, -3.0]], dtype=F64),
        old_logprobs=torch.tensor([[-1.5, -math.inf, -1.0]], dtype=F64),
        advantages=torch.tensor([1.0], dtype=F64),
        mask=torch.tensor([[True, False, True]]),
    )
    # -1 - -1.5 = 0.5; -inf - -inf would be nan; -3 - -1 = -2
    assert log_ratio.tolist() == [[0.5, 0.0, -2.0]]
    assert torch.equal(used, log_ratio)


def test_a_zero_advantage_blanks_the_used_log_ratio_but_not_the_measured_one():
    log_ratio, used = masked_log_ratio(
        policy_logprobs=torch.tensor([[100.0, 1.0], [100.0, 1.0]], dtype=F64),
        old_logprobs=torch.zeros(2, 2, dtype=F64),
        advantages=torch.tensor([0.0, -1.0], dtype=F64),
        mask=torch.ones(2, 2, dtype=torch.bool),
    )
    assert log_ratio.tolist() == [[100.0, 1.0], [100.0, 1.0]]
    assert used.tolist() == [[0.0, 0.0], [100.0, 1.0]]


def test_the_clip_caps_a_positive_row_from_above_and_a_negative_row_from_below():
    log_ratio = torch.tensor([[-1.0, 0.1, 1.0], [-1.0, 0.1, 1.0]], dtype=F64)
    bounded, low, high = pessimistic_log_ratio(
        log_ratio, advantages=torch.tensor([2.0, -2.0], dtype=F64), low=-0.3, high=0.5
    )
    assert bounded.tolist() == [[-1.0, 0.1, 0.5], [-0.3, 0.1, 1.0]]
    assert low.tolist() == [[False, False, False], [True, False, False]]
    assert high.tolist() == [[False, False, True], [False, False, False]]


def test_a_value_exactly_on_a_bound_is_not_clipped():
    log_ratio = torch.tensor([[0.5], [-0.3], [0.7]], dtype=F64, requires_grad=True)
    bounded, low, high = pessimistic_log_ratio(
        log_ratio,
        advantages=torch.tensor([1.0, -1.0, -1.0], dtype=F64),
        low=-0.3,
        high=0.5,
        negative_high=0.7,
    )
    assert not low.any()
    assert not high.any()
    assert torch.equal(bounded, log_ratio)
    (gradient,) = torch.autograd.grad(bounded.sum(), log_ratio)
    assert gradient.tolist() == [[1.0], [1.0], [1.0]]


def test_no_value_of_a_zero_advantage_row_is_flagged():
    _, low, high = pessimistic_log_ratio(
        torch.tensor([[-9.0, 9.0]], dtype=F64),
        advantages=torch.zeros(1, dtype=F64),
        low=-0.4,
        high=0.4,
        negative_high=0.4,
    )
    assert not low.any()
    assert not high.any()


def test_the_second_clip_touches_negative_rows_alone():
    log_ratio = torch.tensor([[-1.0, 0.1, 0.7, 2.0]] * 2, dtype=F64)
    bounded, low, high = pessimistic_log_ratio(
        log_ratio,
        advantages=torch.tensor([1.0, -1.0], dtype=F64),
        low=-0.3,
        high=1.5,
        negative_high=0.5,
    )
    assert bounded.tolist() == [[-1.0, 0.1, 0.7, 1.5], [-0.3, 0.1, 0.5, 0.5]]
    assert low.tolist() == [[False] * 4, [True, False, False, False]]
    assert high.tolist() == [[False, False, False, True], [False, False, True, True]]


@pytest.mark.parametrize(
    ("low", "high", "negative_high"),
    [
        (0.4, 0.4, None),
        (0.0, 0.4, None),
        (-0.4, 0.0, None),
        (-0.4, -0.4, None),
        (-0.4, math.nan, None),
        (-0.4, 0.4, 0.0),
        (-0.4, 0.4, -0.1),
    ],
)
def test_a_bound_of_the_wrong_sign_is_refused_with_its_value(low, high, negative_high):
    with pytest.raises(ValueError, match="the clip range must hold low < 0 < high") as error:
        pessimistic_log_ratio(
            torch.zeros(1, 1),
            advantages=torch.ones(1),
            low=low,
            high=high,
            negative_high=negative_high,
        )
    assert f"got low={low}, high={high}, negative_high={negative_high}" in str(error.value)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        count_tokens(torch.ones(1, 2))


def test_terms_whose_tensors_disagree_in_shape_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        ObjectiveTerms(
            loss=torch.zeros(2),
            log_ratio=torch.zeros(3, 4),
            sequence_ratio=torch.zeros(2),
            clipped_low=torch.zeros(3, 4, dtype=torch.bool),
            clipped_high=torch.zeros(3, 4, dtype=torch.bool),
        )
