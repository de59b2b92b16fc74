"""The GMPO objective and the paper's three ablations, in float64 on the CPU."""

import inspect
import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objective_inputs import F64, assert_values, batch, gradient

from gmpo.objective import (
    OBJECTIVES,
    gmpo_loss,
    gmpo_no_clip_terms,
    gmpo_no_norm_terms,
    gmpo_sequence_clip_terms,
    gmpo_terms,
    grpo_terms,
)

QUICK = settings(max_examples=40)
CLIPPED = [gmpo_terms, gmpo_sequence_clip_terms, gmpo_no_norm_terms]
GEOMETRIC = [*CLIPPED, gmpo_no_clip_terms]


@st.composite
def batches(draw):
    """One to four sequences of one to six tokens, at least one of them counted."""
    num_rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))

    def matrix(elements):
        return draw(
            st.lists(
                st.lists(elements, min_size=width, max_size=width),
                min_size=num_rows,
                max_size=num_rows,
            )
        )

    mask = torch.tensor(matrix(st.booleans()))
    mask[:, 0] |= ~mask.any(dim=-1)
    advantages = draw(
        st.lists(st.one_of(st.just(0.0), st.floats(-3, 3)), min_size=num_rows, max_size=num_rows)
    )
    return batch(matrix(st.floats(-1.5, 1.5)), advantages, mask, old=matrix(st.floats(-5, 0)))


# --- values by hand ---------------------------------------------------------------------------


EXAMPLE = [[0.0, math.log(1.1), math.log(0.9), math.log(8.0)]]


def test_a_positive_row_caps_its_large_ratio_and_keeps_it_in_the_shared_weight():
    inputs = batch(EXAMPLE, [1.0], old=[[-1.0, -2.0, -0.5, -3.0]])
    terms = gmpo_terms(**inputs)
    # Clipped logs 0, 0.095310, -0.105361, 0.4 (for 2.079442) sum to 0.389950; over 4: 0.097487;
    # exp: 1.102398. Gradient -1.102398 / 4 = -0.275599 on the three tokens that are not clipped.
    weight = (1.1 * 0.9 * math.exp(0.4)) ** 0.25
    assert weight == pytest.approx(1.102398, abs=1e-6)
    assert_values(terms.sequence_ratio, [weight])
    assert_values(terms.loss, [-weight])
    assert_values(gradient(terms.loss, inputs), [[-weight / 4] * 3 + [0.0]])


def test_a_negative_row_leaves_its_large_ratio_open():
    inputs = batch(EXAMPLE, [-1.0], old=[[-1.0, -2.0, -0.5, -3.0]])
    terms = gmpo_terms(**inputs)
    # No log is below -0.4, so the ratio is the plain geometric mean (1 * 1.1 * 0.9 * 8)^(1/4) =
    # 7.92^0.25 = 1.677572 (the arithmetic mean is 2.75); gradient +1.677572 / 4 = 0.419393 each.
    weight = 7.92**0.25
    assert weight == pytest.approx(1.677572, abs=1e-6)
    assert_values(terms.loss, [weight])
    assert_values(gradient(terms.loss, inputs), [[weight / 4] * 4])


def test_a_negative_row_caps_its_small_ratios_from_below():
    inputs = batch([[-2.0, 0.2, 1.0]], [-2.0])
    terms = gmpo_terms(**inputs)
    # -2 becomes -0.4: (-0.4 + 0.2 + 1) / 3 = 0.266667; exp: 1.305606; loss +2 * 1.305606;
    # gradient 2 * 1.305606 / 3 on the tokens that are not clipped.
    weight = math.exp(0.8 / 3)
    assert_values(terms.sequence_ratio, [weight])
    assert_values(terms.loss, [2 * weight])
    assert_values(gradient(terms.loss, inputs), [[0.0, 2 * weight / 3, 2 * weight / 3]])


def test_low_and_high_clip_are_separate():
    inputs = batch([[1.0, -1.0], [1.0, -1.0]], [1.0, -1.0])
    terms = gmpo_terms(**inputs, clip_low=0.1, clip_high=0.6)
    # Row 1 caps 1 at 0.6: (0.6 - 1) / 2 = -0.2. Row 2 lifts -1 to -0.1: (1 - 0.1) / 2 = 0.45.
    assert_values(terms.sequence_ratio, [math.exp(-0.2), math.exp(0.45)])
    assert_values(terms.loss, [-math.exp(-0.2), math.exp(0.45)])


def test_the_mean_is_over_counted_tokens_and_each_row_has_its_own_count():
    inputs = batch(
        [[0.3, 0.1, 9.0], [9.0, 0.3, 9.0]],
        [1.0, 1.0],
        [[True, True, False], [False, True, False]],
    )
    terms = gmpo_terms(**inputs)
    # (0.3 + 0.1) / 2 = 0.2; 0.3 / 1 = 0.3
    assert_values(terms.sequence_ratio, [math.exp(0.2), math.exp(0.3)])
    assert_values(
        gradient(terms.loss, inputs),
        [[-math.exp(0.2) / 2, -math.exp(0.2) / 2, 0.0], [0.0, -math.exp(0.3), 0.0]],
    )


def test_without_the_clip_the_ratio_is_the_plain_geometric_mean_on_both_signs():
    inputs = batch(
        [*EXAMPLE, [-2.0, 0.0, 0.5, 0.0]], [1.0, -3.0], [[True] * 4, [True] * 3 + [False]]
    )
    terms = gmpo_no_clip_terms(**inputs)
    # 7.92^0.25 = 1.677572; exp((-2 + 0 + 0.5) / 3) = exp(-0.5) = 0.606531, times 3
    assert_values(terms.sequence_ratio, [7.92**0.25, math.exp(-0.5)])
    assert_values(terms.loss, [-(7.92**0.25), 3 * math.exp(-0.5)])
    assert not terms.clipped_low.any()
    assert not terms.clipped_high.any()
    assert terms.clipped_low.shape == terms.clipped_high.shape == (2, 4)


def test_the_sequence_clip_acts_on_the_sum_before_the_exponent():
    log_ratio = [[0.5, 0.3, -0.2, 7.0], [-0.5, -0.3, 0.2, 7.0]]
    inputs = batch(log_ratio * 2, [2.0, 2.0, -2.0, -2.0], [[True, True, True, False]] * 4)
    terms = gmpo_sequence_clip_terms(**inputs)
    # Sums +0.6, -0.6, +0.6, -0.6 over 3 tokens. A > 0: 0.6 -> 0.4, -0.6 stays; A < 0: 0.6 stays,
    # -0.6 -> -0.4. Over 3: 0.133333, -0.2, 0.2, -0.133333.
    ratios = [math.exp(0.4 / 3), math.exp(-0.2), math.exp(0.2), math.exp(-0.4 / 3)]
    assert_values(terms.sequence_ratio, ratios)
    assert_values(terms.loss, [-2 * ratios[0], -2 * ratios[1], 2 * ratios[2], 2 * ratios[3]])
    nothing, whole = [False] * 4, [True, True, True, False]
    assert terms.clipped_high.tolist() == [whole, nothing, nothing, nothing]
    assert terms.clipped_low.tolist() == [nothing, nothing, nothing, whole]
    down, up = [-2 * ratios[1] / 3] * 3 + [0.0], [2 * ratios[2] / 3] * 3 + [0.0]
    assert_values(gradient(terms.loss, inputs), [[0.0] * 4, down, up, [0.0] * 4])


def test_the_sequence_clip_has_two_separate_widths():
    inputs = batch([[0.4, 0.4], [-0.4, -0.4]], [1.0, -1.0])
    terms = gmpo_sequence_clip_terms(**inputs, clip_low=0.2, clip_high=0.6)
    # 0.8 -> 0.6, over 2: 0.3; -0.8 -> -0.2, over 2: -0.1
    assert_values(terms.sequence_ratio, [math.exp(0.3), math.exp(-0.1)])


def test_without_the_norm_the_ratio_is_the_product_of_the_clipped_ratios():
    inputs = batch(
        [[1.0, 0.3, 0.3, 9.0], [-1.0, 0.3, 0.3, 9.0]], [1.0, -2.0], [[True, True, True, False]] * 2
    )
    terms = gmpo_no_norm_terms(**inputs)
    # 1 -> 0.4: 0.4 + 0.3 + 0.3 = 1.0; -1 -> -0.4: -0.4 + 0.6 = 0.2. A enters once.
    assert_values(terms.sequence_ratio, [math.exp(1.0), math.exp(0.2)])
    assert_values(terms.loss, [-math.exp(1.0), 2 * math.exp(0.2)])
    assert_values(
        gradient(terms.loss, inputs),
        [[0.0, -math.e, -math.e, 0.0], [0.0, 2 * math.exp(0.2), 2 * math.exp(0.2), 0.0]],
    )
    assert terms.clipped_high.tolist() == [[True, False, False, False], [False] * 4]
    assert terms.clipped_low.tolist() == [[False] * 4, [True, False, False, False]]


def test_without_the_norm_low_and_high_clip_are_separate():
    terms = gmpo_no_norm_terms(
        **batch([[1.0, 0.0], [-1.0, 0.0]], [1.0, -1.0]), clip_low=0.1, clip_high=0.6
    )
    assert_values(terms.sequence_ratio, [math.exp(0.6), math.exp(-0.1)])


# --- references written another way -----------------------------------------------------------


def product_form_loss(inputs, *, low, high) -> list[float]:
    """Eq 4 as it is printed: a product of magnitudes, its root, the sign put back once."""
    losses = []
    for i, advantage in enumerate(inputs["advantages"].tolist()):
        product, length = 1.0, 0
        for t, counts in enumerate(inputs["mask"][i].tolist()):
            if not counts:
                continue
            new, old = inputs["policy_logprobs"][i, t].item(), inputs["old_logprobs"][i, t].item()
            ratio = math.exp(new) / math.exp(old)
            clipped = min(max(ratio, low), high)
            product *= abs(min(ratio * advantage, clipped * advantage))
            length += 1
        sign = 1.0 if advantage > 0 else -1.0
        losses.append(-sign * product ** (1 / length))
    return losses


def released_code_loss(inputs, *, clip) -> list[torch.Tensor]:
    """The semantics of the authors' code, which takes one sequence at a time.

    It mirrors the paper: the flipped sign, and the larger of the two instead of the smaller.
    """
    losses = []
    for i, advantage in enumerate(inputs["advantages"]):
        counted = inputs["mask"][i]
        distance = (inputs["policy_logprobs"] - inputs["old_logprobs"])[i][counted]
        flip = -1.0 if advantage >= 0 else 1.0
        flipped = flip * distance
        chosen = flip * torch.maximum(flipped, flipped.clamp(-clip, clip))
        losses.append(-advantage * torch.exp(chosen.sum() / counted.sum()))
    return losses


@given(inputs=batches())
@QUICK
def test_the_loss_equals_the_product_form_of_the_paper(inputs):
    expected = product_form_loss(inputs, low=math.exp(-0.4), high=math.exp(0.4))
    assert_values(gmpo_terms(**inputs).loss.detach(), expected)


@given(inputs=batches(), clip_low=st.floats(0.05, 1.0), clip_high=st.floats(0.05, 1.0))
@QUICK
def test_the_loss_equals_the_product_form_at_any_clip_range(inputs, clip_low, clip_high):
    expected = product_form_loss(inputs, low=math.exp(-clip_low), high=math.exp(clip_high))
    loss = gmpo_terms(**inputs, clip_low=clip_low, clip_high=clip_high).loss
    assert_values(loss.detach(), expected)


@given(inputs=batches())
@QUICK
def test_the_unclipped_loss_equals_the_product_form_without_bounds(inputs):
    expected = product_form_loss(inputs, low=0.0, high=math.inf)
    assert_values(gmpo_no_clip_terms(**inputs).loss.detach(), expected)


@given(inputs=batches())
@QUICK
def test_loss_and_gradient_equal_the_released_code_one_row_at_a_time(inputs):
    loss = gmpo_terms(**inputs).loss
    expected = torch.stack(released_code_loss(inputs, clip=0.4))
    # 1e-12: the same few operations in another order, so only float64 rounding may differ.
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        gradient(loss, inputs), gradient(expected, inputs), atol=1e-12, rtol=1e-12
    )


# --- gradients --------------------------------------------------------------------------------


@given(inputs=batches())
@QUICK
def test_the_gradient_is_the_shared_weight_on_every_token_that_is_not_clipped(inputs):
    terms = gmpo_terms(**inputs)
    advantages, mask = inputs["advantages"], inputs["mask"]
    log_ratio = (inputs["policy_logprobs"] - inputs["old_logprobs"]).detach()
    active = mask & ~((advantages > 0)[:, None] & (log_ratio > 0.4))
    active &= ~((advantages < 0)[:, None] & (log_ratio < -0.4))
    weight = -advantages * terms.sequence_ratio.detach() / mask.sum(dim=-1)
    expected = torch.where(active, weight[:, None], 0.0)
    torch.testing.assert_close(gradient(terms.loss, inputs), expected)


@pytest.mark.parametrize("objective", GEOMETRIC)
def test_autograd_agrees_with_finite_differences(objective):
    # No token (0.45 and -0.9 against 0.4) and no sum lies within 1e-2 of a kink.
    inputs = batch(
        [[0.1, 0.9, -0.2], [0.45, -0.9, 0.3], [0.1, 0.2, 0.0]],
        [1.5, -0.7, 0.0],
        [[True, True, True], [True, True, False], [False, True, True]],
        old=[[-1.0, -2.0, -0.3]] * 3,
    )
    leaf = inputs.pop("policy_logprobs")
    assert torch.autograd.gradcheck(
        lambda policy: objective(policy_logprobs=policy, **inputs).loss, (leaf,)
    )


def test_a_clipped_token_has_exactly_no_gradient_but_scales_the_others():
    free = batch([[0.1, 0.39]], [1.0])
    clipped = batch([[0.1, 5.0]], [1.0])
    more_clipped = batch([[0.1, 50.0]], [1.0])
    gradients = [gradient(gmpo_terms(**one).loss, one)[0] for one in (free, clipped, more_clipped)]
    assert gradients[1][1].item() == 0.0
    # The clipped token stands in the shared weight as 0.4: exp((0.1 + 0.4) / 2) / 2.
    assert_values(gradients[1][0], -math.exp(0.25) / 2)
    assert torch.equal(gradients[1], gradients[2])
    assert_values(gradients[0], [-math.exp(0.245) / 2] * 2)


def test_only_the_policy_carries_gradient():
    inputs = batch([[0.1, 0.2]], [1.0])
    inputs["policy_logprobs"] = inputs["policy_logprobs"].detach()
    terms = gmpo_terms(**inputs)
    assert not terms.loss.requires_grad


@given(inputs=batches())
@QUICK
def test_the_on_policy_gradient_is_the_sequence_mean_policy_gradient_and_that_of_grpo(inputs):
    old = inputs["old_logprobs"]
    inputs["policy_logprobs"] = old.clone().requires_grad_()
    mask, advantages = inputs["mask"], inputs["advantages"]
    # REINFORCE with every sequence weighing the same: -A / |o| * sum of log pi over its tokens.
    per_row = torch.where(mask, inputs["policy_logprobs"], 0.0).sum(-1) / mask.sum(-1)
    reinforce = gradient(-advantages * per_row, inputs)
    torch.testing.assert_close(gradient(gmpo_terms(**inputs).loss, inputs), reinforce)
    torch.testing.assert_close(gradient(grpo_terms(**inputs).loss, inputs), reinforce)


# --- what counts as clipped -------------------------------------------------------------------


def test_only_the_side_that_binds_counts_as_clipped():
    inputs = batch([[-1.0, 0.1, 1.0], [-1.0, 0.1, 1.0]], [1.0, -1.0])
    terms = gmpo_terms(**inputs)
    assert terms.clipped_high.tolist() == [[False, False, True], [False, False, False]]
    assert terms.clipped_low.tolist() == [[False, False, False], [True, False, False]]


def test_masked_tokens_are_never_clipped():
    inputs = batch([[9.0, 0.1], [-9.0, 0.1], [9.0, 0.1]], [1.0, -1.0, -1.0], [[False, True]] * 3)
    for objective in GEOMETRIC:
        terms = objective(**inputs)
        assert not terms.clipped_high.any()
        assert not terms.clipped_low.any()
    assert not gmpo_terms(**inputs, clip_negative_high=0.4).clipped_high.any()


@given(inputs=batches())
@QUICK
def test_a_token_counts_as_clipped_exactly_where_its_gradient_vanished(inputs):
    inputs["advantages"] = torch.where(inputs["advantages"].abs() < 0.1, 1.0, inputs["advantages"])
    terms = gmpo_terms(**inputs, clip_negative_high=0.6)
    vanished = inputs["mask"] & (gradient(terms.loss, inputs) == 0.0)
    assert torch.equal(terms.clipped_low | terms.clipped_high, vanished)
    assert not (terms.clipped_low & terms.clipped_high).any()


def test_without_the_second_clip_a_negative_row_has_no_upper_bound():
    inputs = batch([[20.0, 0.0]], [-1.0])
    terms = gmpo_terms(**inputs)
    # (20 + 0) / 2 = 10
    assert_values(terms.loss, [math.exp(10.0)])
    assert not terms.clipped_high.any()


def test_the_second_clip_caps_a_negative_row_and_kills_its_gradient():
    inputs = batch([[20.0, 0.1], [20.0, 0.1]], [-1.0, 1.0])
    terms = gmpo_terms(**inputs, clip_negative_high=1.3)
    # Row 1: (1.3 + 0.1) / 2 = 0.7. Row 2 keeps the usual cap: (0.4 + 0.1) / 2 = 0.25.
    assert_values(terms.sequence_ratio, [math.exp(0.7), math.exp(0.25)])
    assert_values(
        gradient(terms.loss, inputs), [[0.0, math.exp(0.7) / 2], [0.0, -math.exp(0.25) / 2]]
    )
    assert terms.clipped_high.tolist() == [[True, False], [True, False]]
    assert not terms.clipped_low.any()


@pytest.mark.parametrize("objective", CLIPPED)
@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
@pytest.mark.parametrize("width", [-0.4, 0.0])
def test_a_clip_width_that_is_not_positive_is_refused(objective, name, width):
    with pytest.raises(ValueError, match="clip half-widths are positive numbers"):
        objective(**batch([[0.1]], [1.0]), **{name: width})


@pytest.mark.parametrize("width", [-0.4, 0.0])
def test_a_second_clip_that_is_not_positive_is_refused(width):
    with pytest.raises(ValueError, match=f"negative_high={width}"):
        gmpo_loss(**batch([[0.1]], [1.0]), clip_negative_high=width)


# --- the paper's bound ------------------------------------------------------------------------


@given(inputs=batches())
@QUICK
def test_each_sequence_of_gmpo_is_no_larger_than_the_same_sequence_of_grpo(inputs):
    geometric = gmpo_no_clip_terms(**inputs).loss.abs()
    # These widths clip nothing within exp(+-1.5), so both sides are the paper's Eq 2 and Eq 3.
    arithmetic = grpo_terms(**inputs, clip_low=0.99, clip_high=100.0)
    assert not (arithmetic.clipped_low | arithmetic.clipped_high).any()
    assert (geometric <= arithmetic.loss.abs() + 1e-12).all()


@given(inputs=batches())
@QUICK
def test_the_bound_also_holds_where_both_clip_the_same_ratios(inputs):
    geometric = gmpo_terms(**inputs, clip_low=-math.log1p(-0.2), clip_high=math.log1p(0.2))
    arithmetic = grpo_terms(**inputs, clip_low=0.2, clip_high=0.2)
    assert torch.equal(geometric.clipped_low, arithmetic.clipped_low)
    assert torch.equal(geometric.clipped_high, arithmetic.clipped_high)
    assert (geometric.loss.abs() <= arithmetic.loss.abs() + 1e-12).all()


def test_the_bound_does_not_hold_for_a_batch_whose_advantages_cancel():
    inputs = batch([[math.log(1.1)] * 2, [math.log(0.5), math.log(1.7)]], [1.0, -1.0])
    # GRPO: (1.1 - (0.5 + 1.7) / 2) / 2 = 0. GMPO: (1.1 - sqrt(0.85)) / 2 = 0.089023.
    grpo = -grpo_terms(**inputs, clip_low=0.99, clip_high=100.0).loss.mean()
    gmpo = -gmpo_no_clip_terms(**inputs).loss.mean()
    assert_values(grpo, 0.0)
    assert_values(gmpo, (1.1 - math.sqrt(0.85)) / 2)
    assert gmpo.item() == pytest.approx(0.089, abs=1e-3)


# --- the interface ----------------------------------------------------------------------------


@given(inputs=batches())
@QUICK
def test_the_loss_is_minus_the_advantage_times_the_sequence_ratio(inputs):
    for objective in GEOMETRIC:
        terms = objective(**inputs)
        assert torch.equal(terms.loss, -inputs["advantages"] * terms.sequence_ratio)


@given(inputs=batches())
@QUICK
def test_the_log_ratio_is_reported_before_the_clip_and_is_zero_off_the_mask(inputs):
    measured = torch.where(
        inputs["mask"],
        inputs["policy_logprobs"] - inputs["old_logprobs"],
        torch.zeros((), dtype=F64),
    )
    for objective in GEOMETRIC:
        assert torch.equal(objective(**inputs).log_ratio, measured)


def test_the_loss_function_is_the_loss_of_the_terms():
    inputs = batch([[0.9, -0.9], [0.9, -0.9], [0.9, -0.9]], [1.0, -1.0, 0.0])
    assert torch.equal(gmpo_loss(**inputs), gmpo_terms(**inputs).loss)
    widths = {"clip_low": 0.1, "clip_high": 0.3, "clip_negative_high": 0.7}
    assert torch.equal(gmpo_loss(**inputs, **widths), gmpo_terms(**inputs, **widths).loss)
    assert not torch.equal(gmpo_loss(**inputs, **widths), gmpo_loss(**inputs))


@pytest.mark.parametrize("objective", [gmpo_loss, *CLIPPED])
def test_the_default_clip_is_the_papers_on_both_sides(objective):
    parameters = inspect.signature(objective).parameters
    assert parameters["clip_low"].default == 0.4
    assert parameters["clip_high"].default == 0.4


@pytest.mark.parametrize("objective", [gmpo_loss, gmpo_terms])
def test_the_second_clip_is_off_by_default(objective):
    assert inspect.signature(objective).parameters["clip_negative_high"].default is None


def test_arguments_that_could_be_swapped_are_keyword_only():
    for objective in [*OBJECTIVES.values(), gmpo_loss]:
        kinds = {one.kind for one in inspect.signature(objective).parameters.values()}
        assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("objective", [gmpo_loss, *GEOMETRIC])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("old_logprobs", torch.zeros(2, 4, dtype=F64)),
        ("old_logprobs", torch.zeros(2, 1, dtype=F64)),
        ("advantages", torch.zeros(1, dtype=F64)),
        ("advantages", torch.zeros(2, 3, dtype=F64)),
        ("mask", torch.ones(2, 2, dtype=torch.bool)),
        ("mask", torch.ones(2, 3, dtype=F64)),
    ],
)
def test_mismatching_shapes_are_refused(objective, name, wrong):
    inputs = batch([[0.1, 0.2, 0.3]] * 2, [1.0, -1.0])
    with pytest.raises(jaxtyping.TypeCheckError):
        objective(**{**inputs, name: wrong})
