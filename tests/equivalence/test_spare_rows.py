"""Rows added for the sake of a known shape change no score and no gradient."""

from __future__ import annotations

import pytest
import torch
from tests.models import tiny_model
from tests.rollout_groups import one_step, random_groups
from torch import Tensor

from gmpo.kernels.library import kernels_off, loaded
from gmpo.kernels.shapes import spare_rows
from gmpo.policy import head, packed
from gmpo.policy.score import Policy
from gmpo.update import LossSettings, accumulate_gradients, bind_objective

needs_kernels = pytest.mark.skipif(loaded() is None, reason="no compiled functions here")
SHARED = [[11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 15, 20, 21], [30, 31, 32], [40]]
LENGTHS = [[5, 1, 3], [2, 7, 4], [6, 6, 1], [3, 2, 2]]
ADVANTAGES = [[1.0, -1.2, 0.3], [0.7, -0.4, -0.3], [0.2, 0.0, -0.2], [1.5, 0.0, -1.5]]
SETTINGS = LossSettings(
    objective=bind_objective("gmpo", clips={}, max_tokens=16), entropy_coefficient=0.1
)


def found(
    monkeypatch: pytest.MonkeyPatch, spare: int, *, dtype: torch.dtype, lengths: list[list[int]]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients with so many rows added, to the table of tokens and to the head's."""
    for module in (packed, head):
        monkeypatch.setattr(module, "spare_rows", lambda count, *, like: spare)
    policy = Policy(tiny_model(dtype=dtype), warn=lambda _: None)
    assert policy.shares_prompts
    step = one_step(random_groups(SHARED, lengths), ADVANTAGES)
    measures = accumulate_gradients(policy, step, SETTINGS)
    gradients = {n: w.grad for n, w in policy.masters.items() if w.grad is not None}
    assert len(gradients) == len(policy.masters)
    return measures.loss, gradients


@pytest.mark.parametrize("spare", [1, 31])
@pytest.mark.parametrize("lengths", [LENGTHS, [[1] * 3] * 4], ids=["usual", "one token each"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), pytest.param(torch.float32, 1e-5, marks=needs_kernels)],
    ids=["torch's operations", "compiled"],
)
def test_spare_rows_change_neither_loss_nor_gradients(
    monkeypatch: pytest.MonkeyPatch,
    spare: int,
    lengths: list[list[int]],
    dtype: torch.dtype,
    bound: float,
):
    loss, gradients = found(monkeypatch, 0, dtype=dtype, lengths=lengths)
    padded_loss, padded = found(monkeypatch, spare, dtype=dtype, lengths=lengths)
    assert padded_loss == pytest.approx(loss, rel=bound)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(padded[name], gradient, rtol=0, atol=bound * scale, msg=name)


@needs_kernels
def test_bf16_tables_are_filled_up_to_a_multiple_of_32():
    weight = torch.zeros(4, 4, dtype=torch.bfloat16)
    assert [spare_rows(n, like=weight) for n in (0, 1, 31, 32, 33)] == [0, 31, 1, 0, 31]
    assert spare_rows(5, like=weight.float()) == 0
    with kernels_off():
        assert spare_rows(5, like=weight) == 0


@needs_kernels
def test_steps_of_other_lengths_are_products_of_the_same_sizes(monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Size] = []
    policy = Policy(tiny_model(dtype=torch.bfloat16), warn=lambda _: None)
    assert policy.body is not None
    embed = policy.body.embed

    def watched(token_ids: Tensor) -> Tensor:
        seen.append(token_ids.shape)
        return embed(token_ids)

    monkeypatch.setattr(policy.body, "embed", watched)
    longer = [[length + 1 for length in of_group] for of_group in LENGTHS]
    for lengths in (LENGTHS, longer):
        step = one_step(random_groups(SHARED, lengths), ADVANTAGES)
        accumulate_gradients(policy, step, SETTINGS)
    assert set(seen) == {torch.Size([1, 64])}, "42 and 54 tokens"
