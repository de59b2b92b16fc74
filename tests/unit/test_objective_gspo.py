"""The GSPO objective, in float64 on the CPU."""

import inspect
import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objective_inputs import F64, assert_values, batch, gradient

from gmpo.objective import gmpo_no_clip_terms, gspo_loss, gspo_terms

QUICK = settings(max_examples=40)
matrices = st.lists(st.tuples(*[st.floats(-1.5, 1.5)] * 4).map(list), min_size=3, max_size=3)
triples = st.tuples(*[st.floats(-3, 3)] * 3).map(list)
MASK = [[True, True, True, True], [False, True, True, False], [True, False, False, False]]


LOG_RATIO = [[0.5, 0.3, -0.2, 7.0], [-0.5, -0.3, 0.2, 7.0]]
THREE_TOKENS = [True, True, True, False]


def test_the_mean_comes_first_and_then_the_clip():
    inputs = batch(LOG_RATIO * 2, [2.0, 2.0, -2.0, -2.0], [THREE_TOKENS] * 4)
    terms = gspo_terms(**inputs)
    # Means +-0.2. A > 0: exp(0.2) = 1.2214 -> 1.0004, exp(-0.2) = 0.8187 stays;
    # A < 0: 1.2214 stays, 0.8187 -> 0.9997.
    ratios = [1.0004, math.exp(-0.2), math.exp(0.2), 0.9997]
    assert_values(terms.sequence_ratio, ratios)
    assert_values(terms.loss, [-2 * ratios[0], -2 * ratios[1], 2 * ratios[2], 2 * ratios[3]])


def test_a_clipped_sequence_loses_all_its_gradient_and_counts_all_its_tokens():
    inputs = batch(LOG_RATIO * 2, [2.0, 2.0, -2.0, -2.0], [THREE_TOKENS] * 4)
    terms = gspo_terms(**inputs)
    nothing = [False] * 4
    assert terms.clipped_high.tolist() == [THREE_TOKENS, nothing, nothing, nothing]
    assert terms.clipped_low.tolist() == [nothing, nothing, nothing, THREE_TOKENS]
    # Open rows: -A * s / 3 on each of the three tokens.
    down, up = [-2 * math.exp(-0.2) / 3] * 3 + [0.0], [2 * math.exp(0.2) / 3] * 3 + [0.0]
    assert_values(gradient(terms.loss, inputs), [[0.0] * 4, down, up, [0.0] * 4])


def test_a_sequence_inside_the_range_is_left_alone():
    inputs = batch([[2e-4, 4e-4], [-1e-4, -3e-4]], [1.0, -1.0], old=[[-1.0, -2.0]] * 2)
    terms = gspo_terms(**inputs)
    # Means 3e-4 (below log 1.0004 = 3.9992e-4) and -2e-4 (above log 0.9997 = -3.00045e-4)
    assert_values(terms.sequence_ratio, [math.exp(3e-4), math.exp(-2e-4)])
    assert not terms.clipped_low.any()
    assert not terms.clipped_high.any()


def test_low_and_high_clip_are_separate_and_in_ratio_space():
    terms = gspo_terms(**batch([[1.0], [-2.0]], [1.0, -1.0]), clip_low=0.3, clip_high=0.5)
    # exp(1) = 2.718 -> 1 + 0.5; exp(-2) = 0.135 -> 1 - 0.3
    assert_values(terms.sequence_ratio, [1.5, 0.7])


@given(log_ratio=matrices, advantages=triples)
@QUICK
def test_the_loss_equals_the_clipped_minimum_of_the_sequence_ratio(log_ratio, advantages):
    inputs = batch(log_ratio, advantages, MASK)
    expected = []
    for row, counted, advantage in zip(log_ratio, MASK, advantages, strict=True):
        product, length = 1.0, 0
        for value, counts in zip(row, counted, strict=True):
            product, length = (
                (product * math.exp(value), length + 1) if counts else (product, length)
            )
        ratio = product ** (1 / length)
        clipped = min(max(ratio, 0.8), 1.3)
        expected.append(-min(ratio * advantage, clipped * advantage))
    loss = gspo_terms(**inputs, clip_low=0.2, clip_high=0.3).loss
    assert_values(loss.detach(), expected)


@given(log_ratio=matrices, advantages=triples)
@QUICK
def test_a_clip_too_wide_to_act_leaves_gmpo_without_its_clip(log_ratio, advantages):
    inputs = batch(log_ratio, advantages, MASK)
    wide = gspo_terms(**inputs, clip_low=0.99, clip_high=100.0)
    assert_values(wide.loss, gmpo_no_clip_terms(**inputs).loss.tolist())


def test_autograd_agrees_with_finite_differences():
    # Means 0.1, -0.25, 0.3 and -0.4 are far from the bounds log 0.8 and log 1.2.
    inputs = batch([[0.0, 0.2], [-0.5, 0.0], [0.6, 0.0], [-0.8, 0.0]], [1.5, 0.7, -1.0, -2.0])
    leaf = inputs.pop("policy_logprobs")
    assert torch.autograd.gradcheck(
        lambda policy: (
            gspo_terms(policy_logprobs=policy, **inputs, clip_low=0.2, clip_high=0.2).loss
        ),
        (leaf,),
    )


@given(log_ratio=matrices, advantages=triples)
@QUICK
def test_the_loss_is_minus_the_advantage_times_the_sequence_ratio(log_ratio, advantages):
    inputs = batch(log_ratio, advantages, MASK)
    terms = gspo_terms(**inputs)
    assert torch.equal(terms.loss, -inputs["advantages"] * terms.sequence_ratio)
    assert torch.equal(
        terms.log_ratio, inputs["policy_logprobs"].where(inputs["mask"], torch.zeros((), dtype=F64))
    )


def test_the_loss_function_is_the_loss_of_the_terms():
    inputs = batch([[0.9, 0.9], [-0.9, -0.9]], [1.0, -1.0])
    assert torch.equal(gspo_loss(**inputs), gspo_terms(**inputs).loss)
    widths = {"clip_low": 0.1, "clip_high": 0.3}
    assert torch.equal(gspo_loss(**inputs, **widths), gspo_terms(**inputs, **widths).loss)
    assert not torch.equal(gspo_loss(**inputs, **widths), gspo_loss(**inputs))


@pytest.mark.parametrize("objective", [gspo_loss, gspo_terms])
def test_the_default_clip_is_the_papers(objective):
    parameters = inspect.signature(objective).parameters
    assert parameters["clip_low"].default == 3e-4
    assert parameters["clip_high"].default == 4e-4


@pytest.mark.parametrize("width", [-0.2, 0.0, 1.0, 1.5])
def test_a_lower_width_outside_zero_to_one_is_refused(width):
    message = f"clip_low must lie between 0 and 1 in ratio space, got {width}"
    with pytest.raises(ValueError, match=message):
        gspo_terms(**batch([[0.1]], [1.0]), clip_low=width)


@pytest.mark.parametrize("width", [-1.5, -1.0, -0.2, 0.0])
def test_an_upper_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match=f"clip_high must be above 0 in ratio space, got {width}"):
        gspo_terms(**batch([[0.1]], [1.0]), clip_high=width)


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
    with pytest.raises(jaxtyping.TypeCheckError):
        gspo_terms(**{**batch([[0.1, 0.2, 0.3]] * 2, [1.0, -1.0]), name: wrong})
