"""Compiled attention over a tree of rows against the obvious expression and torch's operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import tiny_model
from tests.rollout_groups import one_step, random_groups
from torch import Tensor

from gmpo.kernels.attention import Row, attend, is_compiled, tree_of
from gmpo.kernels.library import kernels_off
from gmpo.policy.lora import add_adapters
from gmpo.policy.score import Policy

F64 = torch.float64
pytestmark = pytest.mark.skipif(
    not is_compiled(torch.zeros(1)), reason="no compiled functions here"
)

Generations = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Of each generation the rows' lengths, and which rows of the generation before they follow."""

TREES: dict[str, Generations] = {
    "one token": [([1], [])],
    "three generations": [([37], []), ([3, 40], [0, 0]), ([31, 1, 200], [0, 1, 1])],
    "an empty row": [([9, 33], []), ([0, 5, 32], [0, 0, 1])],
    "a long prompt": [([300, 20], []), ([64, 1, 45], [0, 0, 1])],
}


@dataclass(frozen=True, kw_only=True)
class Heads:
    query: int = 6
    key: int = 2
    size: int = 16


def rows_of(generations: Generations) -> list[Row]:
    rows: list[Row] = []
    first = before = 0
    for number, (lengths, parents) in enumerate(generations):
        own = len(rows)
        for place, length in enumerate(lengths):
            parent = before + parents[place] if parents else None
            is_shared = number < len(generations) - 1
            rows.append(Row(first=first, length=length, parent=parent, is_shared=is_shared))
            first += length
        before = own
    return rows


def inputs_of(rows: Sequence[Row], heads: Heads) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Queries, keys and values, and cos and sin, in fp64 from numbers that bf16 has."""
    generator = torch.Generator().manual_seed(len(rows))
    count = sum(row.length for row in rows)

    def random(*sizes: int) -> Tensor:
        drawn = torch.randn(*sizes, generator=generator, dtype=F64)
        return drawn.bfloat16().to(F64)

    states = [random(count, number, heads.size) for number in (heads.query, heads.key, heads.key)]
    angles = random(count, heads.size // 2).repeat(1, 2)
    return states, (angles.cos().bfloat16().to(F64), angles.sin().bfloat16().to(F64))


def obvious(
    states: Sequence[Tensor], rotary: tuple[Tensor, Tensor] | None, rows: Sequence[Row]
) -> Tensor:
    """Every pair of tokens, masked."""
    queries, keys, values = states
    if rotary is not None:
        queries, keys = (rotated(x, rotary) for x in (queries, keys))
    count, num_heads, size = queries.shape
    attends = torch.zeros(count, count, dtype=torch.bool)
    for row in rows:
        own = slice(row.first, row.first + row.length)
        attends[own, own] = torch.ones(row.length, row.length).tril().bool()
        parent = row.parent
        while parent is not None:
            before = rows[parent]
            attends[own, before.first : before.first + before.length] = True
            parent = before.parent
    keys, values = (x.repeat_interleave(num_heads // keys.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("nhd,mhd->hnm", queries, keys) / math.sqrt(size)
    shares = scores.masked_fill(~attends, -math.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", shares, values).flatten(1)


def rotated(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    cos, sin = (part[:, None] for part in rotary)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def results(
    generations: Generations, heads: Heads, dtype: torch.dtype, *, has_positions: bool = True
) -> list[Tensor]:
    """What is attended to, and the gradients of a sum with different weights: compiled, or in fp64
    the obvious expression."""
    rows = rows_of(generations)
    states, rotary = inputs_of(rows, heads)
    states = [x.to(dtype).requires_grad_() for x in states]
    cos, sin = (part.to(dtype) for part in rotary)
    positions = (cos, sin) if has_positions else None
    if dtype == F64:
        attended = obvious(states, positions, rows)
    else:
        tree = tree_of(rows, num_heads=heads.query, num_key_heads=heads.key, head_dim=heads.size)
        attended = attend(*states, positions, tree)
    weights = torch.sin(torch.arange(attended.numel()) + 1.0).view_as(attended)
    gradients = torch.autograd.grad(attended, states, weights.bfloat16().to(dtype))
    return [attended.detach(), *gradients]


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], *, tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.to(F64), other.to(F64), rtol=0, atol=tolerance * scale)


def test_two_tokens_by_hand():
    # Head size 2, so scores are q k / sqrt(2). The second token's are 0 and sqrt(2) log 3 / sqrt(2)
    # = log 3: shares 1/4 and 3/4 of the values (4, 0) and (0, 8).
    queries = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]], requires_grad=True)
    keys = torch.tensor([[[0.0, 0.0]], [[math.sqrt(2) * math.log(3), 0.0]]], requires_grad=True)
    values = torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]]], requires_grad=True)
    rows = [Row(first=0, length=2, parent=None, is_shared=False)]
    tree = tree_of(rows, num_heads=1, num_key_heads=1, head_dim=2)
    attended = attend(queries, keys, values, None, tree)
    torch.testing.assert_close(attended, torch.tensor([[4.0, 0.0], [1.0, 6.0]]))
    attended[1, 0].backward()
    # dp = (4, 0), their mean 1: ds = (1/4 3, 3/4 (-1)); dq = ds k / sqrt(2), dk = ds q / sqrt(2)
    torch.testing.assert_close(values.grad, torch.tensor([[[0.25, 0.0]], [[0.75, 0.0]]]))
    torch.testing.assert_close(
        queries.grad, torch.tensor([[[0.0, 0.0]], [[-0.75 * math.log(3), 0.0]]])
    )
    slope = 0.75 / math.sqrt(2)
    torch.testing.assert_close(keys.grad, torch.tensor([[[slope, 0.0]], [[-slope, 0.0]]]))


@pytest.mark.parametrize("has_positions", [True, False], ids=["rotated here", "rotated before"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", TREES)
def test_every_tree_gives_what_the_obvious_expression_gives(
    name: str, dtype: torch.dtype, tolerance: float, has_positions: bool
):
    expected = results(TREES[name], Heads(), F64, has_positions=has_positions)
    actual = results(TREES[name], Heads(), dtype, has_positions=has_positions)
    assert all(tensor.dtype == dtype for tensor in actual)
    assert_near(actual, expected, tolerance=tolerance)


@given(
    lengths=st.tuples(*(st.lists(st.integers(1, 70), min_size=1, max_size=3) for _ in range(2))),
    heads=st.builds(
        Heads,
        key=st.just(2),
        query=st.sampled_from([2, 4, 14]),
        size=st.sampled_from([2, 6, 64, 80]),
    ),
)
def test_any_lengths_and_heads(lengths: tuple[list[int], list[int]], heads: Heads):
    first, second = lengths
    generations = [(first, []), (second, [n % len(first) for n in range(len(second))])]
    actual = results(generations, heads, torch.float32)
    assert_near(actual, results(generations, heads, F64), tolerance=5e-6)


def test_one_and_two_threads_give_the_same_bits():
    # One key head, and long enough that both threads have gradients for the prompt at once.
    tree: Generations = [([300], []), ([64] * 8, [0] * 8)]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2, 2):
            torch.set_num_threads(count)
            runs.append(results(tree, Heads(query=3, key=1, size=64), torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_parts_cut_shared_rows_anywhere_and_others_nowhere():
    # 64 tokens of two query heads are a block: the shared row has five, each of the others two.
    rows = rows_of([([320], []), ([128] * 6, [0] * 6)])
    plan = tree_of(rows, num_heads=2, num_key_heads=1, head_dim=8).plan.tolist()
    num_rows, num_blocks = plan[:2]
    first = 10 + 3 * num_rows
    row_of_block = [plan[first + 4 * block] for block in range(num_blocks)]
    assert row_of_block == [0] * 5 + [row for row in range(1, 7) for _ in range(2)]
    ends = plan[-5:]
    # Work is tokens times keys seen: 64 x (64 + ... + 320) = 61,440 for the prompt, 53,248 for
    # each other row, 380,928 in all; parts end where 95,232, 190,464 and 285,696 are passed.
    assert ends == [0, 7, 11, 15, 17]


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["queries", "keys", "values"])
def test_what_is_not_finite_is_seen_in_the_result(which: int, fault: float):
    rows = rows_of(TREES["three generations"])
    states, _ = inputs_of(rows, Heads())
    states = [x.float() for x in states]
    states[which][-1, 0, 0] = fault
    tree = tree_of(rows, num_heads=6, num_key_heads=2, head_dim=16)
    attended = attend(*states, None, tree)
    assert not attended[-1].isfinite().all()
    assert attended[: rows[-1].first].isfinite().all()


def test_scores_small_and_large_stay_exact():
    rows = [Row(first=0, length=40, parent=None, is_shared=False)]
    states, _ = inputs_of(rows, Heads())
    states[0] *= 60.0
    tree = tree_of(rows, num_heads=6, num_key_heads=2, head_dim=16)
    attended = attend(*(x.float() for x in states), None, tree)
    assert_near([attended], [obvious(states, None, rows)], tolerance=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapters"])
def test_a_policys_scores_and_gradients_are_those_of_torchs_operations(family: str, adapted: bool):
    model = tiny_model(family, dtype=torch.float32)
    if adapted:
        add_adapters(model, rank=3, alpha=6.0, targets=None)
    policy = Policy(model, warn=lambda _: None)
    groups = random_groups([[1, 2, 3, 4, 5], [1, 2, 3, 9]], [[1, 7, 3], [4, 2, 9]])
    step = one_step(groups, [[1.0, -1.0, 1.0]] * 2, max_tokens=500, shares_prompts=True)
    (batch,) = step.micro_batches
    weights = [w for w in policy.model.parameters() if w.requires_grad]

    def scored() -> list[Tensor]:
        logprobs = policy.score(batch).logprobs
        counted = logprobs[batch.mask]
        order = torch.sin(torch.arange(len(counted)) + 1.0).to(counted.dtype)
        return [counted.detach(), *torch.autograd.grad((counted * order).sum(), weights)]

    compiled = scored()
    with kernels_off():
        expected = scored()
    assert_near(compiled, expected, tolerance=2e-6)
