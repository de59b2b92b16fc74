"""The figures of an optimizer step, from the tensors its loss used."""

import itertools
import math

import jaxtyping
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gmpo.objective import (
    ObjectiveTerms,
    am_gm_gap,
    effective_sample_fraction,
    gmpo_terms,
    step_diagnostics,
)

F64 = torch.float64
QUICK = settings(max_examples=40)
LN2 = math.log(2)
log_ratio_rows = st.lists(st.tuples(*[st.floats(-1.5, 1.5)] * 4).map(list), min_size=1, max_size=5)


def gmpo_step(log_ratio, advantages, mask) -> tuple[ObjectiveTerms, torch.Tensor]:
    policy = torch.tensor(log_ratio, dtype=F64, requires_grad=True)
    counted = torch.tensor(mask)
    terms = gmpo_terms(
        policy_logprobs=policy,
        old_logprobs=torch.zeros_like(policy),
        advantages=torch.tensor(advantages, dtype=F64),
        mask=counted,
    )
    return terms, counted


def worked_example() -> dict[str, float]:
    """Ratios 1, 2, 4 with A > 0 and 1/2, 2 with A < 0; the sixth token is padding."""
    terms, mask = gmpo_step(
        [[0.0, LN2, 2 * LN2], [-LN2, LN2, math.nan]],
        [1.0, -1.0],
        [[True, True, True], [True, True, False]],
    )
    return step_diagnostics([terms], [mask])


def test_the_extreme_ratios_are_those_before_the_clip():
    figures = worked_example()
    assert figures["ratio/min"] == pytest.approx(0.5)
    assert figures["ratio/max"] == pytest.approx(4.0)


def test_the_quantiles_are_those_of_the_log_ratio():
    figures = worked_example()
    # Sorted: -1, 0, 1, 1, 2 times log 2. The median is the third. The 1 % point lies at place
    # 0.01 * 4 = 0.04, so -1 + 0.04 = -0.96; the 99 % point at 3.96, so 1 + 0.96 = 1.96.
    assert figures["ratio/log_q50"] == pytest.approx(LN2)
    assert figures["ratio/log_q01"] == pytest.approx(-0.96 * LN2)
    assert figures["ratio/log_q99"] == pytest.approx(1.96 * LN2)


def test_the_am_gm_gap_is_averaged_over_sequences():
    # Row 1: log((7 / 3) / 2) = log(7/6). Row 2: log(1.25 / 1). Mean: (0.154151 + 0.223144) / 2.
    expected = (math.log(7 / 6) + math.log(1.25)) / 2
    assert expected == pytest.approx(0.188647, abs=1e-6)
    assert worked_example()["ratio/am_gm_gap"] == pytest.approx(expected)


def test_the_effective_sample_fraction_is_over_all_counted_tokens():
    # Sum 1 + 2 + 4 + 0.5 + 2 = 9.5, squared 90.25; squares 1 + 4 + 16 + 0.25 + 4 = 25.25;
    # 90.25 / (5 * 25.25) = 0.714851
    assert worked_example()["ratio/effective_sample_fraction"] == pytest.approx(90.25 / 126.25)


def test_the_clip_fractions_count_the_binding_side_over_the_counted_tokens():
    figures = worked_example()
    # High: ratios 2 and 4 of the row with A > 0; low: ratio 1/2 of the row with A < 0; of 5.
    assert figures["clip/high_fraction"] == pytest.approx(2 / 5)
    assert figures["clip/low_fraction"] == pytest.approx(1 / 5)


def test_a_token_on_the_open_side_is_not_in_the_clip_fraction():
    terms, mask = gmpo_step([[-1.0, 0.1, 1.0]], [1.0], [[True, True, True]])
    figures = step_diagnostics([terms], [mask])
    # A count of |log ratio| > 0.4 would say 2 of 3.
    assert figures["clip/high_fraction"] == pytest.approx(1 / 3)
    assert figures["clip/low_fraction"] == 0.0


def test_the_kl_from_the_old_policy_is_minus_the_mean_log_ratio():
    # -(0 + 1 + 2 - 1 + 1) / 5 = -0.6, times log 2
    assert worked_example()["kl_old/k1"] == pytest.approx(-0.6 * LN2)


def test_the_figures_have_these_names_and_are_plain_numbers():
    figures = worked_example()
    assert sorted(figures) == [
        "clip/high_fraction",
        "clip/low_fraction",
        "kl_old/k1",
        "ratio/am_gm_gap",
        "ratio/effective_sample_fraction",
        "ratio/log_q01",
        "ratio/log_q50",
        "ratio/log_q99",
        "ratio/max",
        "ratio/min",
    ]
    assert {type(value) for value in figures.values()} == {float}


def test_an_on_policy_step_has_neutral_figures():
    terms, mask = gmpo_step([[0.0, 0.0], [0.0, 0.0]], [1.0, -1.0], [[True, True], [True, False]])
    assert step_diagnostics([terms], [mask]) == pytest.approx(
        {
            "ratio/min": 1.0,
            "ratio/max": 1.0,
            "ratio/log_q01": 0.0,
            "ratio/log_q50": 0.0,
            "ratio/log_q99": 0.0,
            "ratio/am_gm_gap": 0.0,
            "ratio/effective_sample_fraction": 1.0,
            "clip/low_fraction": 0.0,
            "clip/high_fraction": 0.0,
            "kl_old/k1": 0.0,
        }
    )


def test_the_loss_can_still_be_differentiated_after_its_figures_were_taken():
    terms, mask = gmpo_step([[0.1, 0.2]], [1.0], [[True, True]])
    assert terms.log_ratio.requires_grad
    step_diagnostics([terms], [mask])
    terms.loss.sum().backward()


def test_a_ratio_beyond_float32_is_reported_as_it_is():
    log_ratio = torch.tensor([[100.0, 0.0]])
    terms = gmpo_terms(
        policy_logprobs=log_ratio,
        old_logprobs=torch.zeros(1, 2),
        advantages=torch.zeros(1),
        mask=torch.ones(1, 2, dtype=torch.bool),
    )
    figures = step_diagnostics([terms], [torch.ones(1, 2, dtype=torch.bool)])
    assert figures["ratio/max"] == pytest.approx(math.exp(100.0))
    # (e^100 + 1)^2 / (2 * (e^200 + 1)) = 1/2 up to e^-100
    assert figures["ratio/effective_sample_fraction"] == pytest.approx(0.5)
    # log((e^100 + 1) / 2) - 50 = 50 - log 2
    assert figures["ratio/am_gm_gap"] == pytest.approx(50.0 - LN2)


def test_a_step_without_micro_batches_is_refused():
    with pytest.raises(ValueError, match="at least one micro-batch, got none"):
        step_diagnostics([], [])


def test_a_micro_batch_without_its_mask_is_refused():
    terms, mask = gmpo_step([[0.1, 0.2]], [1.0], [[True, True]])
    with pytest.raises(ValueError, match="zip"):
        step_diagnostics([terms, terms], [mask])


@given(
    log_ratio=log_ratio_rows,
    cuts=st.lists(st.integers(1, 4), max_size=3),
    bits=st.lists(st.integers(1, 15), min_size=5, max_size=5),
)
@QUICK
def test_the_figures_do_not_depend_on_the_cut_into_micro_batches(log_ratio, cuts, bits):
    num_rows = len(log_ratio)
    advantages = [1.0, -1.0, 0.5, 0.0, -2.0][:num_rows]
    mask = [[bool(bit >> place & 1) for place in range(4)] for bit in bits[:num_rows]]
    whole_terms, whole_mask = gmpo_step(log_ratio, advantages, mask)
    edges = sorted({0, num_rows, *[cut for cut in cuts if cut < num_rows]})
    terms, masks = [], []
    for start, stop in itertools.pairwise(edges):
        # Each micro-batch is also padded to a width of its own.
        pad = start + 1
        part = gmpo_step(
            [row + [math.nan] * pad for row in log_ratio[start:stop]],
            advantages[start:stop],
            [row + [False] * pad for row in mask[start:stop]],
        )
        terms.append(part[0])
        masks.append(part[1])
    whole = step_diagnostics([whole_terms], [whole_mask])
    # 1e-12: sums of the same numbers in another order.
    assert step_diagnostics(terms, masks) == pytest.approx(whole, rel=1e-12, abs=1e-12)


def test_the_gap_is_zero_where_the_ratios_are_equal():
    log_ratio = torch.tensor([[0.3, 0.3, 9.0], [-2.0, -2.0, -2.0], [0.7, 9.0, 9.0]], dtype=F64)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    gap = am_gm_gap(log_ratio, mask=mask)
    torch.testing.assert_close(gap, torch.zeros(3, dtype=F64), atol=1e-15, rtol=0.0)


def test_the_gap_of_one_and_four_is_log_of_two_and_a_half_over_two():
    # Arithmetic (1 + 4) / 2 = 2.5, geometric sqrt(4) = 2; the masked token has no say.
    gap = am_gm_gap(
        torch.tensor([[0.0, 2 * LN2, math.nan]], dtype=F64),
        mask=torch.tensor([[True, True, False]]),
    )
    torch.testing.assert_close(gap, torch.tensor([math.log(1.25)], dtype=F64))


@given(log_ratio=log_ratio_rows)
@example(log_ratio=[[0.7] * 6])  # unguarded, rounding leaves -3e-16
@example(log_ratio=[[2.3] * 7])  # and -4e-16
@QUICK
def test_the_gap_is_never_negative(log_ratio):
    values = torch.tensor(log_ratio, dtype=F64)
    assert (am_gm_gap(values, mask=torch.ones_like(values, dtype=torch.bool)) >= 0.0).all()


def test_the_gap_of_small_log_ratios_is_half_their_variance():
    log_ratio = 0.01 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=F64)
    gap = am_gm_gap(log_ratio, mask=torch.ones(4, 200, dtype=torch.bool))
    half_variance = log_ratio.var(dim=-1, unbiased=False) / 2
    # rtol 1e-2: the next term of the expansion is smaller by the log-ratio, 0.01.
    torch.testing.assert_close(gap, half_variance, rtol=1e-2, atol=0.0)


def test_the_gap_of_an_empty_row_is_refused():
    with pytest.raises(ValueError, match=r"sequences \[1\]"):
        am_gm_gap(torch.zeros(2, 2), mask=torch.tensor([[True, True], [False, False]]))


def test_equal_ratios_all_carry_weight():
    fraction = effective_sample_fraction(torch.full((7,), -3.0, dtype=F64))
    torch.testing.assert_close(fraction, torch.tensor(1.0, dtype=F64))


def test_one_dominant_ratio_of_four_leaves_a_quarter():
    fraction = effective_sample_fraction(torch.tensor([800.0, 0.0, 0.0, 0.0], dtype=F64))
    torch.testing.assert_close(fraction, torch.tensor(0.25, dtype=F64))


def test_the_effective_fraction_of_one_and_three_is_four_fifths():
    # (1 + 3)^2 / (2 * (1 + 9)) = 16 / 20
    fraction = effective_sample_fraction(torch.tensor([0.0, math.log(3)], dtype=F64))
    torch.testing.assert_close(fraction, torch.tensor(0.8, dtype=F64))


def test_mismatching_shapes_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        am_gm_gap(torch.zeros(2, 3), mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(jaxtyping.TypeCheckError):
        effective_sample_fraction(torch.zeros(2, 3))
