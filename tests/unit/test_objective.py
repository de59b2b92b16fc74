"""What every objective of `OBJECTIVES` promises."""

import pytest
import torch
from tests.objective_inputs import F64, every_objective, terms_of
from torch import Tensor

from gmpo.objective import (
    OBJECTIVES,
    dr_grpo_terms,
    gmpo_no_clip_terms,
    gmpo_no_norm_terms,
    gmpo_sequence_clip_terms,
    gmpo_terms,
    grpo_terms,
    gspo_terms,
)


def rollouts() -> dict[str, Tensor]:
    """Both signs and a dead row, log-ratios in and out of every clip, unequal lengths."""
    old = torch.full((4, 3), -2.0, dtype=F64)
    log_ratio = torch.tensor(
        [[0.1, 0.9, -0.3], [-0.9, 0.2, 0.1], [0.5, 0.1, 0.0], [0.3, 0.2, 0.1]], dtype=F64
    )
    lengths = torch.tensor([3, 3, 2, 1])
    return {
        "policy": old + log_ratio,
        "old": old,
        "advantages": torch.tensor([1.2, -0.7, 0.0, -2.0], dtype=F64),
        "mask": torch.arange(3)[None] < lengths[:, None],
    }


def test_the_objectives_are_found_under_these_names():
    assert dict(OBJECTIVES) == {
        "gmpo": gmpo_terms,
        "gmpo_no_clip": gmpo_no_clip_terms,
        "gmpo_sequence_clip": gmpo_sequence_clip_terms,
        "gmpo_no_norm": gmpo_no_norm_terms,
        "grpo": grpo_terms,
        "dr_grpo": dr_grpo_terms,
        "gspo": gspo_terms,
    }


@every_objective
def test_a_zero_advantage_gives_no_loss_and_no_gradient_where_the_ratio_overflows(name):
    # exp(100) is inf in float32, and 0 * inf would be nan.
    policy = torch.tensor([[100.0, 100.0, 100.0], [0.1, 0.2, 0.3]], requires_grad=True)
    terms = terms_of(
        name,
        policy=policy,
        old=torch.zeros(2, 3),
        advantages=torch.tensor([0.0, 1.0]),
        mask=torch.tensor([[True, True, True], [True, True, True]]),
    )
    assert torch.isinf(policy.detach()[0].exp()).all()
    assert terms.loss[0].item() == 0.0
    assert terms.log_ratio[0].tolist() == [100.0] * 3
    assert not terms.clipped_low[0].any()
    assert not terms.clipped_high[0].any()
    (gradient,) = torch.autograd.grad(terms.loss.sum(), policy)
    assert gradient[0].tolist() == [0.0, 0.0, 0.0]
    assert gradient.isfinite().all()


@every_objective
def test_an_empty_row_is_refused_with_its_index(name):
    data = rollouts()
    data["mask"] = data["mask"].clone()
    data["mask"][[0, 3]] = False
    with pytest.raises(ValueError, match=r"sequences \[0, 3\] have no unmasked token"):
        terms_of(name, **data)


@every_objective
def test_the_loss_is_minus_the_advantage_times_the_sequence_ratio(name):
    data = rollouts()
    terms = terms_of(name, **data)
    assert torch.equal(terms.loss, -data["advantages"] * terms.sequence_ratio)


@every_objective
def test_the_precision_of_the_inputs_is_kept(name):
    data = rollouts()
    assert terms_of(name, **data).loss.dtype == F64
    single = {key: value.float() if key != "mask" else value for key, value in data.items()}
    assert terms_of(name, **single).loss.dtype == torch.float32
    # Default tolerances for float32 against the float64 result.
    torch.testing.assert_close(
        terms_of(name, **single).loss, terms_of(name, **data).loss, check_dtype=False
    )
