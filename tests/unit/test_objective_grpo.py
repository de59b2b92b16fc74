"""The GRPO and Dr. GRPO objectives, in float64 on the CPU."""

import inspect
import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objective_inputs import F64, assert_values, batch, gradient

from gmpo.objective import dr_grpo_terms, grpo_loss, grpo_terms

QUICK = settings(max_examples=40)
matrices = st.lists(st.tuples(*[st.floats(-1.5, 1.5)] * 4).map(list), min_size=3, max_size=3)
MASK = [[True, True, True, True], [False, True, True, False], [True, False, False, False]]


EXAMPLE = [[0.0, math.log(1.1), math.log(0.9), math.log(8.0)]]


def test_a_positive_row_caps_its_large_ratio():
    inputs = batch(EXAMPLE, [1.0], old=[[-1.0, -2.0, -0.5, -3.0]])
    terms = grpo_terms(**inputs)
    # (1 + 1.1 + 0.9 + 1.2) / 4 = 1.05; gradient -r / 4, and 0 on the clipped token
    assert_values(terms.sequence_ratio, [1.05])
    assert_values(terms.loss, [-1.05])
    assert_values(gradient(terms.loss, inputs), [[-0.25, -0.275, -0.225, 0.0]])


def test_a_negative_row_leaves_its_large_ratio_open():
    inputs = batch(EXAMPLE, [-1.0])
    terms = grpo_terms(**inputs)
    # (1 + 1.1 + 0.9 + 8) / 4 = 2.75; gradient r / 4
    assert_values(terms.loss, [2.75])
    assert_values(gradient(terms.loss, inputs), [[0.25, 0.275, 0.225, 2.0]])


def test_a_negative_row_caps_its_small_ratios_from_below():
    inputs = batch([[math.log(0.5), math.log(2.0)]], [-2.0])
    terms = grpo_terms(**inputs)
    # (0.8 + 2) / 2 = 1.4, times 2; gradient 2 * 2 / 2 = 2 on the open token
    assert_values(terms.loss, [2.8])
    assert_values(gradient(terms.loss, inputs), [[0.0, 2.0]])


def test_low_and_high_clip_are_separate_and_in_ratio_space():
    inputs = batch([[math.log(3.0)], [math.log(0.1)]], [1.0, -1.0])
    terms = grpo_terms(**inputs, clip_low=0.3, clip_high=0.5)
    # 3 -> 1 + 0.5 and 0.1 -> 1 - 0.3
    assert_values(terms.sequence_ratio, [1.5, 0.7])


def test_the_mean_is_over_counted_tokens():
    log_ratio = [[math.log(1.1), math.log(0.7), 9.0], [9.0, math.log(1.1), 9.0]]
    inputs = batch(log_ratio, [1.0, 1.0], [[True, True, False], [False, True, False]])
    # (1.1 + 0.7) / 2 = 0.9; 1.1 / 1
    assert_values(grpo_terms(**inputs).sequence_ratio, [0.9, 1.1])


def test_dr_grpo_divides_by_the_constant_length():
    log_ratio = [[math.log(1.1), math.log(0.7), 9.0], [9.0, math.log(8.0), 9.0]]
    inputs = batch(log_ratio, [1.0, -3.0], [[True, True, False], [False, True, False]])
    terms = dr_grpo_terms(**inputs, max_tokens=10)
    # (1.1 + 0.7) / 10 = 0.18; 8 / 10 = 0.8, times 3
    assert_values(terms.sequence_ratio, [0.18, 0.8])
    assert_values(terms.loss, [-0.18, 2.4])
    # -A r / 10
    assert_values(gradient(terms.loss, inputs), [[-0.11, -0.07, 0.0], [0.0, 2.4, 0.0]])


def test_dr_grpo_clips_like_grpo():
    inputs = batch([[math.log(3.0), 0.0], [math.log(0.1), 0.0]], [1.0, -1.0])
    terms = dr_grpo_terms(**inputs, max_tokens=4)
    # (1.2 + 1) / 4 = 0.55; (0.8 + 1) / 4 = 0.45
    assert_values(terms.sequence_ratio, [0.55, 0.45])
    assert terms.clipped_high.tolist() == [[True, False], [False, False]]
    assert terms.clipped_low.tolist() == [[False, False], [True, False]]
    terms = dr_grpo_terms(**inputs, max_tokens=4, clip_low=0.4, clip_high=0.6)
    # (1.6 + 1) / 4 = 0.65; (0.6 + 1) / 4 = 0.4
    assert_values(terms.sequence_ratio, [0.65, 0.4])


@given(log_ratio=matrices)
@QUICK
def test_dr_grpo_equals_grpo_where_every_row_has_the_constant_length(log_ratio):
    inputs = batch(log_ratio, [1.5, -0.5, 0.0])
    full, constant = grpo_terms(**inputs), dr_grpo_terms(**inputs, max_tokens=4)
    torch.testing.assert_close(constant.loss, full.loss)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_dr_grpo_refuses_a_length_below_one(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be at least 1, got {max_tokens}"):
        dr_grpo_terms(**batch([[0.1]], [1.0]), max_tokens=max_tokens)


def test_dr_grpo_takes_a_length_of_one():
    assert_values(dr_grpo_terms(**batch([[0.1]], [1.0]), max_tokens=1).loss, [-math.exp(0.1)])


@given(log_ratio=matrices, advantages=st.tuples(*[st.floats(-3, 3)] * 3).map(list))
@QUICK
def test_the_loss_equals_ppos_clipped_minimum_token_by_token(log_ratio, advantages):
    inputs = batch(log_ratio, advantages, MASK)
    expected = []
    for row, counted, advantage in zip(log_ratio, MASK, advantages, strict=True):
        kept = [math.exp(value) for value, counts in zip(row, counted, strict=True) if counts]
        clipped = [min(max(ratio, 0.8), 1.3) for ratio in kept]
        values = [min(r * advantage, c * advantage) for r, c in zip(kept, clipped, strict=True)]
        expected.append(-sum(values) / len(values))
    loss = grpo_terms(**inputs, clip_low=0.2, clip_high=0.3).loss
    assert_values(loss.detach(), expected)


@given(log_ratio=matrices)
@QUICK
def test_each_tokens_gradient_carries_its_own_ratio(log_ratio):
    inputs = batch(log_ratio, [1.5, -0.5, 0.0], MASK)
    terms = grpo_terms(**inputs)
    mask, advantages = inputs["mask"], inputs["advantages"]
    active = mask & ~terms.clipped_low & ~terms.clipped_high
    weight = -(advantages / mask.sum(dim=-1))[:, None] * terms.log_ratio.detach().exp()
    expected = torch.where(active, weight, 0.0)
    torch.testing.assert_close(gradient(terms.loss, inputs), expected)


def test_autograd_agrees_with_finite_differences():
    # No ratio lies within 1e-2 of 0.8 or 1.2.
    inputs = batch(
        [[0.1, 0.9, -0.5], [0.4, -0.9, 0.1]], [1.5, -0.7], [[True] * 3, [True, True, False]]
    )
    leaf = inputs.pop("policy_logprobs")
    assert torch.autograd.gradcheck(
        lambda policy: grpo_terms(policy_logprobs=policy, **inputs).loss, (leaf,)
    )
    assert torch.autograd.gradcheck(
        lambda policy: dr_grpo_terms(policy_logprobs=policy, **inputs, max_tokens=7).loss, (leaf,)
    )


def test_only_the_side_that_binds_counts_as_clipped_and_masked_tokens_never_do():
    log_ratio = [[-1.0, 0.1, 1.0, 9.0], [-1.0, 0.1, 1.0, -9.0]]
    terms = grpo_terms(**batch(log_ratio, [1.0, -1.0], [[True, True, True, False]] * 2))
    assert terms.clipped_high.tolist() == [[False, False, True, False], [False] * 4]
    assert terms.clipped_low.tolist() == [[False] * 4, [True, False, False, False]]


@given(log_ratio=matrices, advantages=st.tuples(*[st.floats(-3, 3)] * 3).map(list))
@QUICK
def test_the_loss_is_minus_the_advantage_times_the_sequence_ratio(log_ratio, advantages):
    inputs = batch(log_ratio, advantages, MASK)
    for terms in (grpo_terms(**inputs), dr_grpo_terms(**inputs, max_tokens=9)):
        assert torch.equal(terms.loss, -inputs["advantages"] * terms.sequence_ratio)
        assert torch.equal(
            terms.log_ratio,
            inputs["policy_logprobs"].where(inputs["mask"], torch.zeros((), dtype=F64)),
        )


def test_the_loss_function_is_the_loss_of_the_terms():
    inputs = batch([[0.9, -0.9], [0.9, -0.9]], [1.0, -1.0])
    assert torch.equal(grpo_loss(**inputs), grpo_terms(**inputs).loss)
    widths = {"clip_low": 0.1, "clip_high": 0.3}
    assert torch.equal(grpo_loss(**inputs, **widths), grpo_terms(**inputs, **widths).loss)
    assert not torch.equal(grpo_loss(**inputs, **widths), grpo_loss(**inputs))


@pytest.mark.parametrize("objective", [grpo_loss, grpo_terms, dr_grpo_terms])
def test_the_default_clip_is_a_fifth_on_both_sides(objective):
    parameters = inspect.signature(objective).parameters
    assert parameters["clip_low"].default == 0.2
    assert parameters["clip_high"].default == 0.2


@pytest.mark.parametrize("width", [-0.2, 0.0, 1.0, 1.5])
def test_a_lower_width_outside_zero_to_one_is_refused(width):
    message = f"clip_low must lie between 0 and 1 in ratio space, got {width}"
    with pytest.raises(ValueError, match=message):
        grpo_terms(**batch([[0.1]], [1.0]), clip_low=width)
    with pytest.raises(ValueError, match=message):
        dr_grpo_terms(**batch([[0.1]], [1.0]), max_tokens=4, clip_low=width)


@pytest.mark.parametrize("width", [-1.5, -1.0, -0.2, 0.0])
def test_an_upper_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match=f"clip_high must be above 0 in ratio space, got {width}"):
        grpo_terms(**batch([[0.1]], [1.0]), clip_high=width)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("old_logprobs", torch.zeros(2, 1, dtype=F64)),
        ("advantages", torch.zeros(3, dtype=F64)),
        ("mask", torch.ones(2, 2, dtype=torch.bool)),
        ("mask", torch.ones(2, 3, dtype=F64)),
    ],
)
def test_mismatching_shapes_are_refused(name, wrong):
    inputs = {**batch([[0.1, 0.2, 0.3]] * 2, [1.0, -1.0]), name: wrong}
    with pytest.raises(jaxtyping.TypeCheckError):
        grpo_terms(**inputs)
    with pytest.raises(jaxtyping.TypeCheckError):
        dr_grpo_terms(**inputs, max_tokens=3)
