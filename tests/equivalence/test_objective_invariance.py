"""The same sequences must give the same loss and gradient however they are laid out."""

import math

import pytest
import torch
from tests.objective_inputs import F64, every_objective, terms_of
from torch import Tensor

NUM_ROLLOUTS, NUM_TOKENS = 8, 10


def rollouts() -> dict[str, Tensor]:
    """Eight sequences of 1 to 10 tokens; both signs, a dead one, ratios in and out of the clips."""
    generator = torch.Generator().manual_seed(20250728)
    old = -3.0 * torch.rand(NUM_ROLLOUTS, NUM_TOKENS, generator=generator, dtype=F64)
    noise = 0.5 * torch.randn(NUM_ROLLOUTS, NUM_TOKENS, generator=generator, dtype=F64)
    lengths = torch.tensor([10, 3, 1, 7, 5, 10, 2, 8])
    return {
        "policy": old + noise,
        "old": old,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -2.0, 0.0, 0.9, -0.1, 2.5], dtype=F64),
        "mask": torch.arange(NUM_TOKENS)[None] < lengths[:, None],
    }


def loss_and_gradient(
    name: str, data: dict[str, Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Sum of per-sequence losses over the number of rollouts, one backward a micro-batch."""
    policy = data["policy"].clone().requires_grad_()
    total = torch.zeros((), dtype=F64)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        terms = terms_of(
            name,
            policy=policy[part],
            old=data["old"][part],
            advantages=data["advantages"][part],
            mask=data["mask"][part],
        )
        share = terms.loss.sum() / NUM_ROLLOUTS
        share.backward()
        total += share.detach()
        start += size
    assert start == len(policy)
    assert policy.grad is not None
    return total, policy.grad


def assert_equal_to_rounding(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0.0)


def test_the_rollouts_of_this_file_reach_both_clips():
    terms = terms_of("gmpo", **rollouts())
    assert terms.clipped_low.any()
    assert terms.clipped_high.any()


@every_objective
@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2], [1] * 8, [5, 3], [1, 6, 1], [7, 1]])
def test_the_cut_into_micro_batches_does_not_matter(name, sizes):
    whole_loss, whole_gradient = loss_and_gradient(name, rollouts(), [8])
    loss, gradient = loss_and_gradient(name, rollouts(), sizes)
    assert_equal_to_rounding(loss, whole_loss)
    assert_equal_to_rounding(gradient, whole_gradient)


@every_objective
def test_each_row_alone_gives_its_own_loss(name):
    data = rollouts()
    together = terms_of(name, **data).loss
    alone = [
        terms_of(name, **{key: value[i : i + 1] for key, value in data.items()}).loss
        for i in range(NUM_ROLLOUTS)
    ]
    assert_equal_to_rounding(torch.cat(alone), together)


@every_objective
def test_the_order_of_rows_does_not_matter(name):
    data = rollouts()
    order = torch.tensor([3, 0, 7, 5, 1, 6, 4, 2])
    loss, gradient = loss_and_gradient(name, data, [8])
    shuffled = {key: value[order] for key, value in data.items()}
    shuffled_loss, shuffled_gradient = loss_and_gradient(name, shuffled, [8])
    assert_equal_to_rounding(shuffled_loss, loss)
    assert_equal_to_rounding(shuffled_gradient, gradient[order])


@every_objective
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize(
    ("policy_pad", "old_pad"),
    [(0.0, 0.0), (-math.inf, -math.inf), (-math.inf, -1.0), (-1.0, -math.inf), (math.nan, 7.0)],
)
def test_the_width_and_content_of_padding_do_not_matter(name, side, width, policy_pad, old_pad):
    data = rollouts()
    loss, gradient = loss_and_gradient(name, data, [8])
    ends = (width, 0) if side == "left" else (0, width)
    mask = torch.nn.functional.pad(data["mask"], ends, value=False)
    padded = {
        **data,
        "policy": torch.nn.functional.pad(data["policy"], ends).where(mask, policy_pad),
        "old": torch.nn.functional.pad(data["old"], ends).where(mask, old_pad),
        "mask": mask,
    }
    padded_loss, padded_gradient = loss_and_gradient(name, padded, [8])
    assert_equal_to_rounding(padded_loss, loss)
    assert not padded_gradient[~mask].any()
    kept = padded_gradient[:, width:] if side == "left" else padded_gradient[:, :-width]
    assert_equal_to_rounding(kept, gradient)
