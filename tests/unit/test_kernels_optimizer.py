"""AdamW from bf16 gradients: by hand, against torch's on widened ones, and whatever the threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmpo.kernels.library import kernels_off, loaded
from gmpo.kernels.optimizer import AdamWStep, adamw, gradient_norm, takes_narrow

pytestmark = pytest.mark.skipif(loaded() is None, reason="no compiled functions here")
BF16 = torch.bfloat16
BLOCK = 1 << 14


def step(number: int = 1, **changes: float) -> AdamWStep:
    numbers = {"learning_rate": 0.1, "eps": 1e-8, "weight_decay": 0.0, "scale": 1.0}
    return AdamWStep(**(numbers | changes), betas=(0.9, 0.95), number=number)


def random(size: int, *, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_two_steps_by_hand():
    weight, narrow = torch.tensor([1.0]), torch.tensor([1.0], dtype=BF16)
    moments = torch.zeros(1), torch.zeros(1)
    adamw(weight, torch.tensor([2.0], dtype=BF16), moments, narrow, step(weight_decay=0.5))
    # decay to 0.95; m = 0.2, v = 0.2, corrected 2 and 4: a move of 0.1 * 2 / 2
    assert [m.item() for m in moments] == pytest.approx([0.2, 0.2])
    assert weight.item() == pytest.approx(0.85)
    assert narrow.item() == torch.tensor(0.85).to(BF16).item()
    adamw(weight, torch.tensor([-4.0], dtype=BF16), moments, narrow, step(2, scale=0.5))
    # g = -2: m = 0.18 - 0.2, v = 0.19 + 0.2, corrected by 0.19 and 0.0975
    moved = 0.1 * (-0.02 / 0.19) / math.sqrt(0.39 / 0.0975)
    assert weight.item() == pytest.approx(0.85 - moved)


@settings(max_examples=20, deadline=None)
@given(
    size=st.one_of(st.integers(1, 70), st.integers(3 * BLOCK - 2, 3 * BLOCK + 2)),
    decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 0.03]),
)
def test_steps_are_torchs_on_widened_gradients(size: int, decay: float, scale: float):
    weight = random(size, seed=0)
    narrow, moments = weight.to(BF16), (torch.zeros(size), torch.zeros(size))
    expected = torch.nn.Parameter(weight.clone())
    torchs = torch.optim.AdamW(
        [expected], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True
    )
    for number in (1, 2, 3):
        gradient = random(size, seed=number).to(BF16)
        expected.grad = gradient.float() * scale
        torchs.step()
        adamw(
            weight,
            gradient,
            moments,
            narrow,
            step(number, learning_rate=0.01, weight_decay=decay, scale=scale),
        )
    state = torchs.state[expected]
    torch.testing.assert_close(weight, expected.detach(), rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(moments[0], state["exp_avg"], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(moments[1], state["exp_avg_sq"], rtol=2e-6, atol=1e-8)
    assert torch.equal(narrow, weight.to(BF16))


def test_no_gradient_is_one_of_zeros():
    results = []
    for gradient in (None, torch.zeros(40, dtype=BF16)):
        weight, moments = random(40, seed=0), (random(40, seed=1), random(40, seed=2).square())
        adamw(weight, gradient, moments, weight.to(BF16), step(5))
        results.append((weight, *moments))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(results[0][0], random(40, seed=0)), "the moments move it"


def test_bits_do_not_depend_on_the_number_of_threads():
    size, before = 5 * BLOCK + 7, torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weight, gradient = random(size, seed=0), random(size, seed=1).to(BF16)
            moments = torch.zeros(size), torch.zeros(size)
            adamw(weight, gradient, moments, weight.to(BF16), step())
            results.append((weight, *moments, gradient_norm([gradient])))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_norm_is_of_all_gradients_together():
    parts = [torch.tensor([3.0, 0.0], dtype=BF16), torch.full((BLOCK, 4), 0.0625, dtype=BF16)]
    # 9 + 4 * 16384 / 256 = 265
    assert gradient_norm(parts).item() == pytest.approx(math.sqrt(265), rel=1e-15)
    assert gradient_norm([]).item() == 0.0
    assert gradient_norm([torch.tensor([math.inf, 1.0], dtype=BF16)]).item() == math.inf
    assert math.isnan(gradient_norm([torch.tensor([math.nan, 1.0], dtype=BF16)]).item())
    # Squares beyond fp32 and below it.
    assert gradient_norm([torch.tensor([2.0**100], dtype=BF16)]).item() == 2.0**100
    assert gradient_norm([torch.tensor([2.0**-100], dtype=BF16)]).item() == 2.0**-100


def test_it_takes_contiguous_bf16_where_it_is_compiled():
    table = torch.zeros(4, 6, dtype=BF16)
    assert takes_narrow(table)
    assert not takes_narrow(table.float())
    assert not takes_narrow(table.T)
    with kernels_off():
        assert not takes_narrow(table)
