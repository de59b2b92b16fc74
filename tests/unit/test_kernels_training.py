"""The compiled passes of training against torch's operations and against fp64 autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from gmpo.kernels import training
from gmpo.kernels.calls import kernel
from gmpo.kernels.library import kernels_off, loaded
from gmpo.kernels.training import (
    TileSums,
    gated,
    gated_gradients,
    norm_again,
    norm_gradients,
    stream_sum,
    sum_norm,
    tile_slopes,
    weight_gradient,
)

pytestmark = pytest.mark.skipif(loaded() is None, reason="no compiled functions here")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
EPS = 1e-5
BOUNDS = {BF16: 2**-7, F32: 2e-6}
"""Of the largest number: of bf16 two steps at the upper end of a binade."""
precisions = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
shapes = given(rows=st.integers(1, 70), size=st.integers(1, 70), dtype=st.sampled_from([BF16, F32]))


def random(*sizes: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=F64).to(dtype)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_near(actual: Tensor, expected: Tensor, *, bound: float) -> None:
    """To a share of the largest expected number."""
    scale = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(actual.to(F64), expected.to(F64), rtol=0, atol=bound * scale)


def by_both(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], ...]:
    with kernels_off():
        expected = run()
    actual = run()
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    return actual, expected


def norm_case(rows: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "stream": random(rows, size, seed=1) * 3,
        "added": random(rows, size, dtype=dtype, seed=2),
        "weight": random(size, dtype=dtype, seed=3),
        "gradient": random(rows, size, dtype=dtype, seed=4),
        "residual": random(rows, size, seed=5),
    }


def normed_both_ways(case: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Forward, the norm again, and backward with and without a residual."""
    weight, gradient = case["weight"], case["gradient"]
    sums, normed, scale = sum_norm(case["stream"], case["added"], weight, eps=EPS)
    alone = sum_norm(sums, None, weight, eps=EPS)
    assert alone[0].data_ptr() == sums.data_ptr()
    assert torch.equal(alone[1], normed) and torch.equal(alone[2], scale)
    assert torch.equal(norm_again(sums, weight, scale), normed)
    backward = partial(norm_gradients, gradient, sums, weight, scale)
    return (sums, normed, scale, *backward(), *backward(residual=case["residual"]))


def test_the_norm_by_hand():
    # Rows (3, 1) + (1, 1) = (4, 2): mean square 10, r = 1 / sqrt(10).
    stream, added = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    weight = torch.tensor([1.0, 2.0])
    sums, normed, scale = sum_norm(stream, added, weight, eps=0.0)
    assert sums.tolist() == [[4.0, 2.0]] and stream.tolist() == [[3.0, 1.0]]
    assert scale.item() == pytest.approx(10**-0.5)
    assert normed[0].tolist() == pytest.approx([4 / 10**0.5, 4 / 10**0.5])
    # g = (1, 1): sum g w x = 1*4 + 2*2 = 8, its mean 4;  dx = r (1, 2) - (4, 2) 4 r / 10
    by_stream, _, by_weight = norm_gradients(torch.ones(1, 2), sums, weight, scale)
    assert by_stream[0].tolist() == pytest.approx([(1 - 1.6) / 10**0.5, (2 - 0.8) / 10**0.5])
    assert by_weight.tolist() == pytest.approx([4 / 10**0.5, 2 / 10**0.5])


@shapes
@settings(max_examples=30, deadline=None)
def test_the_norm_is_torchs(rows: int, size: int, dtype: torch.dtype):
    actual, expected = by_both(lambda: normed_both_ways(norm_case(rows, size, dtype)))
    assert torch.equal(actual[0], expected[0]), "a sum is rounded once"
    for one, other in zip(actual, expected, strict=True):
        bound = BOUNDS[BF16] if BF16 in (dtype, one.dtype) else BOUNDS[F32]
        assert_near(one, other, bound=bound)


@precisions
def test_the_norms_gradients_are_those_of_autograd_in_fp64(dtype: torch.dtype):
    case = norm_case(67, 45, dtype)
    sums, _, scale = sum_norm(case["stream"], case["added"], case["weight"], eps=EPS)
    exact = sums.to(F64).requires_grad_(), case["weight"].to(F64).requires_grad_()
    expected = functional.rms_norm(exact[0], (45,), exact[1], EPS)
    by_sums, by_weight = torch.autograd.grad(expected, exact, case["gradient"].to(F64))
    by_stream, narrow, by_norm = norm_gradients(
        case["gradient"], sums, case["weight"], scale, residual=case["residual"]
    )
    assert_near(by_stream, by_sums + case["residual"], bound=2e-6)
    assert_near(narrow, by_sums + case["residual"], bound=2**-8)
    assert_near(by_norm, by_weight, bound=2**-8 if dtype == BF16 else 2e-6)


def test_the_norm_is_rounded_before_it_is_weighted():
    """As the modules do; a single rounding would give a fifth of these numbers another value."""
    case = norm_case(64, 96, BF16)
    run = partial(sum_norm, case["stream"], case["added"], case["weight"], eps=EPS)
    actual, expected = by_both(run)
    assert (actual[1] != expected[1]).float().mean() < 0.01


def test_the_fp32_stream_needs_no_copy_of_its_gradient():
    case = norm_case(3, 5, F32)
    scale = torch.ones(3, 1)
    by_stream, narrow, _ = norm_gradients(case["gradient"], case["stream"], case["weight"], scale)
    assert by_stream is narrow


def test_gated_by_hand():
    # silu(1) = 1 / (1 + e^-1) = s; silu'(1) = s (1 + 1 - s)
    gate, up, gradient = (torch.tensor([[value]]) for value in (1.0, 3.0, 2.0))
    s = 1 / (1 + math.exp(-1))
    assert gated(gate, up).item() == pytest.approx(3 * s)
    by_gate, by_up, joined = gated_gradients(gradient, gate, up)
    assert by_up.item() == pytest.approx(2 * s)
    assert by_gate.item() == pytest.approx(2 * 3 * s * (2 - s))
    assert joined.item() == pytest.approx(3 * s)


@shapes
@settings(max_examples=30, deadline=None)
def test_gated_is_torchs_and_the_sum_is(rows: int, size: int, dtype: torch.dtype):
    gradient, gate, up = (random(rows, size, dtype=dtype, seed=seed) * 4 for seed in (1, 2, 3))
    actual, expected = by_both(
        lambda: (
            gated(gate, up),
            *gated_gradients(gradient, gate, up),
            stream_sum(gate.float(), up),
        )
    )
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other, bound=BOUNDS[dtype])
    assert torch.equal(actual[0], actual[3]), "joined again as it was"
    assert torch.equal(actual[4], expected[4])


@precisions
def test_gateds_gradients_are_those_of_autograd_in_fp64(dtype: torch.dtype):
    gradient, gate, up = (random(40, 50, dtype=dtype, seed=seed) * 4 for seed in (1, 2, 3))
    exact = gate.to(F64).requires_grad_(), up.to(F64).requires_grad_()
    expected = functional.silu(exact[0]) * exact[1]
    wanted = torch.autograd.grad(expected, exact, gradient.to(F64))
    by_gate, by_up, joined = gated_gradients(gradient, gate, up)
    for one, other in zip((by_gate, by_up, joined), (*wanted, expected.detach()), strict=True):
        assert_near(one, other, bound=2**-7 if dtype == BF16 else 2e-6)


@given(rows=st.integers(1, 70), outputs=st.integers(1, 70), number=st.sampled_from([1, 2]))
@settings(max_examples=30, deadline=None)
def test_a_table_is_turned_whatever_its_sizes(rows: int, outputs: int, number: int):
    table = random(rows, outputs, dtype=BF16)
    with threads(number):
        turned = training._transposed(table)
    assert turned.is_contiguous() and torch.equal(turned, table.t())
    wide = table.float()
    assert training._transposed(wide).data_ptr() == wide.data_ptr(), "fp32 products need no table"


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_the_weights_gradient_is_a_new_one_or_added_to_another(dtype: torch.dtype):
    gradient, inputs = random(300, 150, dtype=dtype, seed=1), random(300, 40, dtype=dtype, seed=2)
    expected = gradient.to(F64).t() @ inputs.to(F64)
    bound = {BF16: 2**-8, F32: 1e-6, F64: 1e-14}[dtype]
    assert_near(weight_gradient(gradient, inputs), expected, bound=bound)
    room = torch.full((150, 40), math.nan, dtype=dtype)
    assert weight_gradient(gradient, inputs, into=room) is room
    assert_near(room, expected, bound=bound)
    weight_gradient(gradient, inputs, into=room, adds=True)
    assert_near(room, 2 * expected, bound=bound)


def head_case(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two tiles of unequal width, and tokens of both and of neither."""
    logits = random(rows, 2 * width + 1, dtype=dtype) * 5
    tokens = torch.randint(2 * width + 1, (rows,), generator=torch.Generator().manual_seed(rows))
    return logits[:, :width].contiguous(), logits[:, width:].contiguous(), tokens


def summed(
    tiles: tuple[Tensor, Tensor], tokens: Tensor, *, temperature: float, with_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = TileSums.empty(tiles[0], with_mean=with_mean)
    sums.add(tiles[0].clone(), tokens, temperature=temperature)
    sums.add(tiles[1].clone(), tokens - tiles[0].shape[1], temperature=temperature)
    return sums.chosen, sums.log_total(), sums.mean()


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    dtype=st.sampled_from([BF16, F32]),
    temperature=st.sampled_from([1.0, 0.7]),
    with_entropy=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_sums_and_slopes_of_tiles_are_those_of_whole_logits_in_fp64(
    rows: int, width: int, dtype: torch.dtype, temperature: float, with_entropy: bool
):
    first, second, tokens = head_case(rows, width, dtype)
    whole = torch.cat((first, second), dim=1).to(F64).requires_grad_()
    logprobs = (whole / temperature).log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    run = partial(summed, (first, second), tokens, temperature=temperature, with_mean=with_entropy)
    actual, _ = by_both(run)
    torch.testing.assert_close((actual[0] - actual[1]).to(F64), chosen, rtol=0, atol=2e-5)
    own_entropy = actual[1] - actual[2]
    if with_entropy:
        torch.testing.assert_close(own_entropy.to(F64), entropy, rtol=0, atol=5e-5)
    by_logprob, by_entropy = random(rows, seed=7), random(rows, seed=8) * with_entropy
    (expected,) = torch.autograd.grad((by_logprob * chosen + by_entropy * entropy).sum(), whole)
    for tile, start in ((first, 0), (second, width)):
        slopes = tile_slopes(
            tile.clone(),
            tokens - start,
            actual[1],
            by_logprob / temperature,
            (own_entropy, by_entropy / temperature) if with_entropy else None,
            temperature=temperature,
        )
        assert slopes.dtype == dtype
        of_tile = expected[:, start : start + tile.shape[1]]
        difference = (slopes.to(F64) - of_tile).abs().max().item()
        assert difference <= (2**-8 if dtype == BF16 else 3e-5) * max(1.0, of_tile.abs().max())


@precisions
def test_one_tile_of_slopes_is_torchs(dtype: torch.dtype):
    first, second, tokens = head_case(33, 20, dtype)
    log_total, entropy = summed((first, second), tokens, temperature=1.0, with_mean=True)[1:]
    arguments = (tokens, log_total, random(33, seed=7), (log_total - entropy, random(33, seed=8)))
    actual, expected = by_both(lambda: (tile_slopes(first.clone(), *arguments, temperature=1.3),))
    assert_near(actual[0], expected[0], bound=BOUNDS[dtype])


def everything(value: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Each pass, with one number of the inputs replaced."""
    case = norm_case(5, 19, dtype)
    case["added"][2, 7] = value
    first, second, tokens = head_case(5, 19, dtype)
    first[3, 4] = value
    broken = case["gradient"].clone()
    broken[1, 3] = value
    sums = summed((first, second), tokens, temperature=1.0, with_mean=True)
    return (
        *normed_both_ways(norm_case(5, 19, dtype) | {"gradient": broken}),
        *sum_norm(case["stream"], case["added"], case["weight"], eps=EPS),
        gated(case["added"], broken),
        *gated_gradients(broken, case["added"], case["weight"].expand(5, -1)),
        stream_sum(case["stream"], case["added"]),
        *sums,
        tile_slopes(first.clone(), tokens, sums[1], random(5), None, temperature=1.0),
    )


@precisions
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0])
def test_what_is_not_finite_is_seen_where_torch_shows_it(value: float, dtype: torch.dtype):
    actual, expected = by_both(lambda: everything(value, dtype))
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one.isfinite(), other.isfinite()), number


@precisions
def test_threads_do_not_change_a_bit(dtype: torch.dtype):
    rows, size = 333, 211  # above what a second thread is started for
    gradient, gate, up = (random(rows, size, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    first, second, tokens = head_case(rows, size, dtype)

    def run() -> tuple[Tensor, ...]:
        sums = summed((first, second), tokens, temperature=1.0, with_mean=True)
        return (
            *normed_both_ways(norm_case(rows, size, dtype)),
            *gated_gradients(gradient, gate, up),
            *sums,
            tile_slopes(first.clone(), tokens, sums[1], random(rows), None, temperature=1.0),
        )

    with threads(1):
        alone = run()
    with threads(2):
        together = run()
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_rows_that_do_not_lie_end_to_end_are_read_as_what_they_are():
    case = norm_case(6, 8, F32)
    turned = {name: tensor.t().contiguous().t() for name, tensor in case.items()}
    turned["weight"] = case["weight"]
    assert not turned["stream"].is_contiguous()
    for one, other in zip(normed_both_ways(turned), normed_both_ways(case), strict=True):
        assert torch.equal(one, other)


def test_heads_are_normed_each_by_itself():
    case = norm_case(20, 8, F32)
    heads = {name: t if t.dim() == 1 else t.view(5, 4, 8) for name, t in case.items()}
    flat, by_head = normed_both_ways(case), normed_both_ways(heads)
    assert by_head[2].shape == (5, 4, 1)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(flat, by_head, strict=True))


def test_fp64_runs_torchs_operations():
    case = {name: tensor.to(F64) for name, tensor in norm_case(3, 5, F32).items()}
    assert kernel("sum_norm", "p", case["weight"]) is None
    assert all(tensor.dtype == F64 for tensor in normed_both_ways(case))


def test_both_sides_cut_the_weights_gradient_into_the_same_blocks():
    source: Any = training.__file__
    text = source.replace("training.py", "training.h")
    with open(text, encoding="utf-8") as file:
        assert f"#define BLOCK_ROWS {training._BLOCK_ROWS}\n" in file.read()
