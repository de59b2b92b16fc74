"""Attention over a tree of rows of tokens, by a compiled function straight on the table of tokens.

Rows lie end to end; a row may follow an earlier one, and its tokens attend to all of the rows
before it and to their own row up to themselves. torch's attention needs rows of equal length with
the keys before them copied beside them and a mask; here nothing is padded, copied or masked out,
and positions are applied on the way. Of a pass with gradient only the inputs, the result and the
log of each query's sum of exponents are kept.

Dimensions: **N** tokens, **H** query heads, **K** key heads, **D** head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gmpo.kernels.calls import address, kernel

__all__ = ["Row", "Tree", "attend", "is_compiled", "tree_of"]

_PANEL = 32
"""Positions of one row that lie together; as in products.h."""
_KEY_BLOCK = 128
"""As in attention.h."""
_QUERY_ROWS = 128
"""Most queries of a block, all query heads of a key head counted: what it works on fits a cache."""
_PARTS = 4
"""Groups of query blocks whose gradients of shared rows are summed apart, so that they can run at
once; a fixed number, so that the sums are the same whatever the number of threads."""
_TILE_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens that lie together in the table.

    Attributes:
        first: place of the first one.
        length: may be 0.
        parent: number of the row that they follow, which comes earlier; None for none.
        is_shared: whether other rows may follow this one. Shared rows come before all others.
    """

    first: int
    length: int
    parent: int | None
    is_shared: bool


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Rows as the compiled function takes them.

    Attributes:
        plan: sizes, rows, blocks of queries, panels of keys, and the parts of the blocks.
        num_tokens: of all rows.
        num_key_heads: K.
        heads_of_key: query heads of a key head.
        positions: keys of all panels, padding included.
        summed_positions: the same where those of shared rows count once for each part.
        lane_size: numbers that a thread needs to work on.
        wide: the head size, padded.
    """

    plan: Int[Tensor, " n"]
    num_tokens: int
    num_key_heads: int
    heads_of_key: int
    positions: int
    summed_positions: int
    lane_size: int
    wide: int


def is_compiled(*tensors: Tensor) -> bool:
    """Whether `attend` takes such tensors: on the CPU, all in bf16 or all in fp32."""
    is_one_kind = len({tensor.dtype for tensor in tensors}) == 1
    return is_one_kind and _function("attend", tensors[0]) is not None


def tree_of(rows: Sequence[Row], *, num_heads: int, num_key_heads: int, head_dim: int) -> Tree:
    """The plan for rows that fill the table in their order."""
    group = num_heads // num_key_heads
    wide = _padded(head_dim, _PANEL)
    blocks = [block for number, row in enumerate(rows) for block in _blocks(number, row, group)]
    panels = [
        (row.first + start, min(_PANEL, row.length - start))
        for row in rows
        for start in range(0, row.length, _PANEL)
    ]
    num_shared = sum(-(-row.length // _PANEL) for row in rows if row.is_shared)
    block_rows = _padded(max((count for *_, count in blocks), default=1) * group, _TILE_ROWS)
    sizes = (len(rows), len(blocks), len(panels), num_shared, _PARTS, block_rows)
    tables = (_row_table(rows), blocks, panels)
    plan = [*sizes, num_key_heads, group, head_dim, wide]
    plan += [number for table in tables for entry in table for number in entry]
    plan += _part_ends(rows, blocks)
    return Tree(
        plan=torch.tensor(plan, dtype=torch.int64),
        num_tokens=sum(row.length for row in rows),
        num_key_heads=num_key_heads,
        heads_of_key=group,
        positions=len(panels) * _PANEL,
        summed_positions=(len(panels) + (_PARTS - 1) * num_shared) * _PANEL,
        lane_size=block_rows * (3 * wide + 2 * _KEY_BLOCK + 3),
        wide=wide,
    )


def attend(
    queries: Float[Tensor, "N H D"],
    keys: Float[Tensor, "N K D"],
    values: Float[Tensor, "N K D"],
    rotary: tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]] | None,
    tree: Tree,
) -> Float[Tensor, "N HD"]:
    """What each token attends to: softmax(q k^T D^-1/2) v over its row and those before it.

    Inside, all is fp32; queries and keys are rounded to their precision after their positions are
    applied, as the model's modules do.

    Args:
        queries: of all tokens, in bf16 or fp32 on the CPU (`is_compiled`).
        keys: in the same precision.
        values: in the same precision.
        rotary: cos and sin of each token's position; None where queries and keys have it already.
        tree: what follows what.
    """
    cos, sin = (None, None) if rotary is None else rotary
    inputs = (queries, keys, values, cos, sin)
    contiguous = (None if tensor is None else tensor.contiguous() for tensor in inputs)
    return cast(Tensor, _Attend.apply(*contiguous, tree))  # type: ignore[no-untyped-call]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, tree = inputs
        queries = tensors[0]
        attended = torch.empty_like(queries).flatten(1)
        log_sums = _empty(tree.num_key_heads, tree.num_tokens, tree.heads_of_key)
        lanes = torch.get_num_threads()
        scratch = (*_key_tables(tree, 3), _empty(lanes, tree.lane_size))
        _run("attend", (*tensors, attended, log_sums, *scratch), tree, lanes)
        ctx.save_for_backward(*tensors, attended, log_sums)
        ctx.tree = tree
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tree = ctx.tree
        *tensors, attended, log_sums = ctx.saved_tensors
        results = [torch.empty_like(tensor) for tensor in tensors[:3]]
        lanes = torch.get_num_threads()
        scratch = (
            *_key_tables(tree, 4),
            _empty(2, tree.num_key_heads, tree.summed_positions, tree.wide).zero_(),
            _empty(lanes, tree.lane_size),
        )
        inputs = (gradients[0].contiguous(), attended, *tensors, log_sums)
        _run("attend_backward", (*inputs, *results, *scratch), tree, lanes)
        return (*results, None, None, None)


def _run(name: str, tensors: Sequence[Tensor | None], tree: Tree, lanes: int) -> None:
    like = tensors[0]
    assert like is not None, "the first is the queries or their gradient"
    function = _function(name, like)
    assert function is not None, "the caller asks is_compiled before"
    function(*(address(tensor) for tensor in tensors), address(tree.plan), tree.num_tokens, lanes)


def _function(name: str, like: Tensor) -> Callable[..., None] | None:
    num_addresses = {"attend": 12, "attend_backward": 18}[name]
    return kernel(name, "p" * num_addresses + "ii", like)


def _key_tables(tree: Tree, count: int) -> Tensor:
    return _empty(count, tree.num_key_heads, tree.positions, tree.wide)


def _empty(*sizes: int) -> Tensor:
    return torch.empty(*sizes, dtype=torch.float32)


def _blocks(number: int, row: Row, group: int) -> list[tuple[int, int, int, int]]:
    """A row's queries as (row, first token in the row, in the table, tokens), evenly long."""
    count = -(-row.length // max(1, _QUERY_ROWS // group))
    starts = [row.length * block // max(1, count) for block in range(count + 1)]
    return [
        (number, start, row.first + start, stop - start)
        for start, stop in itertools.pairwise(starts)
    ]


def _row_table(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Of each row its first panel, its length and its parent."""
    table, panel = [], 0
    for row in rows:
        table.append((panel, row.length, -1 if row.parent is None else row.parent))
        panel += -(-row.length // _PANEL)
    return table


def _part_ends(rows: Sequence[Row], blocks: Sequence[tuple[int, int, int, int]]) -> list[int]:
    """Where each part of the blocks begins, and the end of the last.

    Parts are about equally much work. Rows that none follows are in one part each, since their
    keys get gradients from nowhere else.
    """
    before = [0] * len(rows)
    for number, row in enumerate(rows):
        if row.parent is not None:
            before[number] = before[row.parent] + rows[row.parent].length
    work, done = [], 0
    for number, offset, _, count in blocks:
        done += count * (before[number] + offset + count)
        work.append(done)
    ends = [0]
    for place in range(1, len(blocks)):
        number = blocks[place][0]
        may_end = rows[number].is_shared or number != blocks[place - 1][0]
        if len(ends) < _PARTS and may_end and work[place - 1] * _PARTS >= done * len(ends):
            ends.append(place)
    return ends + [len(blocks)] * (_PARTS + 1 - len(ends))


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step
