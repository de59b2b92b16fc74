"""Keys and values of running rows: each prompt's once for all its rows, and each row's own.

A group's rows follow one prompt. Their queries meet its keys in one product for the whole group,
so memory and time grow with completion tokens and with distinct prompts, not with their product.
The scores of both parts stand side by side in one softmax, which is therefore exact.

Keys and values are kept in fp32 (fp64 for such a model): CPUs multiply these small matrices faster
so than in bf16, whose 8 bits would also leave scores off by up to 0.03 nats.

Bytes: 2 x layers x K x D x 4 x (slots x prompt positions + rows x completion positions), where
positions are those of the longest, rounded up to `_STEP` (or `_STEP` times a power of two), and
slots are the prompts running at once, rounded up to a power of two.

Dimensions: **R** rows, **P** prompts, **G** most rows of one prompt, **K** key heads, **Q** query
heads of a key head, **D** head size, **L** prompt positions, **S** own positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gmpo.policy.head import widened

__all__ = ["FixedRows", "PromptState", "RowPlan", "SharedCache", "StepPlan", "power_of_two"]

_STEP = 32
"""Either part grows by this many positions at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptState:
    """One prompt's keys and values, each [K, L, D], of every layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.layers[0][0].shape[1])


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What all layers of one step have in common.

    Attributes:
        mask: added to the scores of prompt and own positions: 0 or -inf.
        row_index: 0 .. R - 1.
        own_places: where among its own positions each row's new token goes.
        to_groups: for each prompt, key head and place the row and key head it comes from; places
            beyond a prompt's rows repeat its first.
        to_rows: for each row and key head the place among those above.
        own: of each layer, keys and values of the rows' own positions, the new one included.
        prompts: of each layer, keys and values of the prompts that rows follow.
    """

    mask: Float[Tensor, "RK 1 LS"]
    row_index: Int[Tensor, " R"]
    own_places: Int[Tensor, " R"]
    to_groups: Int[Tensor, " PKG"]
    to_rows: Int[Tensor, " RK"]
    own: Sequence[tuple[Float[Tensor, "RK S D"], Float[Tensor, "RK S D"]]]
    prompts: Sequence[tuple[Float[Tensor, "PK L D"], Float[Tensor, "PK L D"]]]


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """A step for functions that walk each row's positions one by one.

    Attributes:
        prompts: both parts are keys and values of all layers, with room for C positions.
        own: the rows' own positions, with room for the new token.
        table: of each row, on the CPU: where its prompt lies, the prompt's length, and that of its
            own part, the new token left out.
    """

    prompts: Float[Tensor, "A 2 N K C D"]
    own: Float[Tensor, "A 2 n K c D"]
    table: Int[Tensor, "3 R"]


@dataclass(frozen=True, kw_only=True)
class FixedRows:
    """A step over buffers that stay where they are; the numbers in them are read on the device.

    Attributes:
        prompts: as in `RowPlan`.
        own: likewise, with room for R rows.
        table: of each row its new token, then as in `RowPlan`. A row of zeros follows no prompt and
            sees nothing but the new token, which it writes to its first place.
        prompt_positions: places of the prompts' part that are looked at.
        own_positions: likewise of the own one.
    """

    prompts: Float[Tensor, "A 2 N K C D"]
    own: Float[Tensor, "A 2 n K c D"]
    table: Int[Tensor, "4 R"]
    prompt_positions: int
    own_positions: int

    @property
    def token_ids(self) -> Int[Tensor, " R"]:
        """The tokens that the step appends."""
        return self.table[0]

    @property
    def slots(self) -> Int[Tensor, " R"]:
        """Where each row's prompt lies."""
        return self.table[1]

    @property
    def prompt_lengths(self) -> Int[Tensor, " R"]:
        """Tokens of each row's prompt."""
        return self.table[2]

    @property
    def own_lengths(self) -> Int[Tensor, " R"]:
        """Tokens of each row's own part, the new one left out."""
        return self.table[3]


class SharedCache:
    """Rows join at the end and leave anywhere; the last ones move into the places left.

    Args:
        max_rows: rows held at once.
        num_layers: layers of the model.
        num_key_heads: K.
        head_dim: D.
        device: where everything lies.
        doubles: whether positions are rounded up to a power of two instead: few sizes occur.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        num_layers: int,
        num_key_heads: int,
        head_dim: int,
        device: torch.device,
        doubles: bool = False,
    ) -> None:
        self._max_rows = max_rows
        self._doubles = doubles
        self._num_layers = num_layers
        self._num_key_heads = num_key_heads
        self._head_dim = head_dim
        self.device = device
        # One tensor a part: [layer, keys or values, row or slot, K, position, D].
        self._prompts: Tensor | None = None
        self._own: Tensor | None = None
        self._states: list[weakref.ref[PromptState]] = []
        self._prompt_lengths: list[int] = []
        self._slots: list[int] = []
        self._own_lengths: list[int] = []
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """Rows running."""
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Memory that both parts take."""
        parts = (part for part in (self._prompts, self._own) if part is not None)
        return sum(part.numel() * part.element_size() for part in parts)

    def add_rows(self, state: PromptState, num_rows: int) -> None:
        """Let rows follow a prompt, which is stored unless other rows follow it already."""
        assert self.num_rows + num_rows <= self._max_rows, "more rows than the cache has"
        slot = next((s for s, known in enumerate(self._states) if known() is state), None)
        if slot is None:
            slot = self._store(state)
        self._slots += [slot] * num_rows
        self._own_lengths += [0] * num_rows
        self._tables = None

    def positions(self) -> Int[Tensor, " R"]:
        """Where each row's next token stands."""
        prompts = (self._prompt_lengths[slot] for slot in self._slots)
        totals = [p + own for p, own in zip(prompts, self._own_lengths, strict=True)]
        return torch.tensor(totals, device=self.device)

    def begin_step(self) -> StepPlan:
        """Make room for one more token a row; what its layers need."""
        own_positions = max(self._own_lengths) + 1
        self._reserve_own(own_positions)
        if self._tables is None:
            self._tables = self._new_tables()
        to_groups, to_rows, prompt_mask = self._tables
        own_lengths = torch.tensor(self._own_lengths, device=self.device)
        unseen = torch.arange(own_positions, device=self.device) > own_lengths[:, None]
        own_mask = torch.zeros_like(unseen, dtype=prompt_mask.dtype).masked_fill_(
            unseen, -torch.inf
        )
        mask = torch.cat((prompt_mask, own_mask), dim=1)
        return StepPlan(
            mask=mask.repeat_interleave(self._num_key_heads, dim=0)[:, None],
            row_index=torch.arange(self.num_rows, device=self.device),
            own_places=own_lengths,
            to_groups=to_groups,
            to_rows=to_rows,
            own=_by_layer(self._own, self.num_rows, own_positions),
            prompts=_by_layer(self._prompts, len(self._states), prompt_mask.shape[1]),
        )

    def begin_rows(self) -> RowPlan:
        """Make room as `begin_step` does; what a walk over each row's positions needs."""
        self._reserve_own(max(self._own_lengths) + 1)
        assert self._own is not None and self._prompts is not None
        lengths = [self._prompt_lengths[slot] for slot in self._slots]
        table = torch.tensor([self._slots, lengths, self._own_lengths])
        return RowPlan(prompts=self._prompts, own=self._own, table=table)

    def attend(
        self,
        layer: int,
        plan: StepPlan,
        queries: Float[Tensor, "R H D"],
        keys_values: Float[Tensor, "R KK D"],
    ) -> Float[Tensor, "R H D"]:
        """Write the new tokens' keys and values (heads of both, in this order), and attend.

        With q of row r and key head k, over the keys of its prompt and its own:
        sum_s softmax_s(q . key_s / sqrt(D)) value_s.
        """
        assert self._own is not None
        rows, heads, dim = queries.shape
        pairs, per_key = rows * self._num_key_heads, heads // self._num_key_heads
        self._own[layer][:, plan.row_index, :, plan.own_places] = keys_values.view(
            rows, 2, self._num_key_heads, dim
        )
        own_keys, own_values = plan.own[layer]
        prompt_keys, prompt_values = plan.prompts[layer]
        groups, prompt_positions = prompt_keys.shape[:2]
        by_row = queries.reshape(pairs, per_key * dim)
        by_group = by_row.index_select(0, plan.to_groups).view(groups, -1, dim)
        prompt_scores = torch.bmm(by_group, prompt_keys.transpose(1, 2))
        prompt_scores = prompt_scores.view(-1, per_key * prompt_positions)
        scores = torch.cat(
            (
                prompt_scores.index_select(0, plan.to_rows).view(pairs, per_key, -1),
                torch.bmm(by_row.view(pairs, per_key, dim), own_keys.transpose(1, 2)),
            ),
            dim=-1,
        )
        weights = torch.add(plan.mask, scores, alpha=dim**-0.5).softmax(dim=-1)
        of_groups = weights.index_select(0, plan.to_groups).view(groups, -1, weights.shape[-1])
        from_prompts = torch.bmm(of_groups[..., :prompt_positions], prompt_values)
        from_prompts = from_prompts.view(-1, per_key * dim).index_select(0, plan.to_rows)
        attended = torch.baddbmm(
            from_prompts.view(pairs, per_key, dim),
            weights[..., prompt_positions:],
            own_values,
        )
        return attended.view(rows, heads, dim)

    def end_step(self) -> None:
        """Count the token that every layer has written."""
        self._own_lengths = [length + 1 for length in self._own_lengths]

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Forget these rows; the remaining ones' old places, in their new order."""
        order, moves = _without(len(self._slots), set(rows))
        if moves and self._own is not None:
            _move(self._own[..., : max(self._own_lengths), :], moves)
        self._slots = [self._slots[row] for row in order]
        self._own_lengths = [self._own_lengths[row] for row in order]
        self._forget_prompts()
        self._tables = None
        return order

    def clear(self) -> None:
        """Forget every row, also where adding or dropping some was interrupted."""
        self._slots, self._own_lengths = [], []
        self._states, self._prompt_lengths = [], []
        self._tables = None

    def _forget_prompts(self) -> None:
        """Drop prompts that no row follows any more."""
        used = set(self._slots)
        unused = set(range(len(self._states))) - used
        if not unused:
            return
        order, moves = _without(len(self._states), unused)
        if moves:
            assert self._prompts is not None
            _move(self._prompts, moves)
        self._states = [self._states[slot] for slot in order]
        self._prompt_lengths = [self._prompt_lengths[slot] for slot in order]
        new_slots = {old: new for new, old in enumerate(order)}
        self._slots = [new_slots[slot] for slot in self._slots]

    def _store(self, state: PromptState) -> int:
        """Copy a prompt's keys and values into the next free slot."""
        slot, length = len(self._states), state.length
        wanted = max(length, *self._prompt_lengths, 0)
        slots = min(1 << slot.bit_length(), self._max_rows)
        dtype = widened(state.layers[0][0][:0]).dtype
        self._prompts = self._grown(self._prompts, slots, wanted, dtype)
        for layer, (keys, values) in enumerate(state.layers):
            self._prompts[layer, 0, slot, :, :length] = keys
            self._prompts[layer, 1, slot, :, :length] = values
        self._states.append(weakref.ref(state))
        self._prompt_lengths.append(length)
        return slot

    def _reserve_own(self, positions: int) -> None:
        assert self._prompts is not None, "no row was added yet"
        self._own = self._grown(self._own, self._max_rows, positions, self._prompts.dtype)

    def _grown(self, old: Tensor | None, rows: int, positions: int, dtype: torch.dtype) -> Tensor:
        """A part with room for so many rows and positions; what it holds stays."""
        if old is not None:
            rows = max(rows, old.shape[2])
            if old.shape[2] >= rows and old.shape[4] >= positions:
                return old
            positions = max(positions, old.shape[4])
        steps = -(-positions // _STEP)
        capacity = _STEP * (power_of_two(steps) if self._doubles else steps)
        shape = (self._num_layers, 2, rows, self._num_key_heads, capacity, self._head_dim)
        # Zeros, not empty: a masked NaN would still poison a softmax-weighted sum.
        new = torch.zeros(shape, dtype=dtype, device=self.device)
        if old is not None:
            new[:, :, : old.shape[2], :, : old.shape[4]] = old
        return new

    def _new_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """`StepPlan.to_groups`, `StepPlan.to_rows` and the mask over prompt positions."""
        rows_of: list[list[int]] = [[] for _ in self._states]
        for row, slot in enumerate(self._slots):
            rows_of[slot].append(row)
        largest = max(map(len, rows_of))
        places = [slot * self._num_key_heads * largest for slot in self._slots]
        for members in rows_of:
            for place, row in enumerate(members):
                places[row] += place
        table = [members + members[:1] * (largest - len(members)) for members in rows_of]
        heads = torch.arange(self._num_key_heads, device=self.device)
        rows = torch.tensor(table, device=self.device)[:, None]
        to_groups = rows * self._num_key_heads + heads[:, None]
        to_rows = torch.tensor(places, device=self.device)[:, None] + heads * largest
        lengths = torch.tensor(self._prompt_lengths, device=self.device)
        unseen = torch.arange(int(lengths.max()), device=self.device) >= lengths[:, None]
        assert self._prompts is not None
        mask = _as_added(unseen, self._prompts.dtype)
        slots = torch.tensor(self._slots, device=self.device)
        return to_groups.flatten(), to_rows.flatten(), mask[slots]


def power_of_two(number: int) -> int:
    """The least power of two that is no less than a positive number."""
    return 1 << (number - 1).bit_length()


def _without(count: int, dropped: set[int]) -> tuple[list[int], dict[int, int]]:
    """Old places in their new order, and those of them that move: from the end, to the holes."""
    order = [place for place in range(count) if place not in dropped]
    holes = [place for place in sorted(dropped) if place < len(order)]
    movers = [place for place in order if place >= len(order)]
    moves = dict(zip(holes, movers, strict=True))
    return [moves.get(place, place) for place in range(len(order))], moves


def _by_layer(
    part: Float[Tensor, "N 2 X K C D"] | None, count: int, positions: int
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, [count * K, positions, D], of every layer: views, all made at once."""
    assert part is not None, "no row was added yet"
    used = part[:, :, :count, :, :positions].flatten(2, 3).flatten(0, 1).unbind(0)
    return list(zip(used[::2], used[1::2], strict=True))


def _as_added(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)


def _move(part: Tensor, moves: dict[int, int]) -> None:
    part[:, :, list(moves)] = part[:, :, list(moves.values())]
