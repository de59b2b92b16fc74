"""The sampler's cache: attention as if every row held its prompt, in memory for one prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmpo.sampler.cache import PromptState, SharedCache

LAYERS, KEY_HEADS, HEADS, DIM = 2, 2, 6, 4
F64 = torch.float64


def cache_of(max_rows: int = 12) -> SharedCache:
    return SharedCache(
        max_rows=max_rows,
        num_layers=LAYERS,
        num_key_heads=KEY_HEADS,
        head_dim=DIM,
        device=torch.device("cpu"),
    )


def prompt(length: int) -> PromptState:
    def one() -> Tensor:
        return torch.randn(KEY_HEADS, length, DIM, dtype=F64)

    return PromptState(layers=tuple((one(), one()) for _ in range(LAYERS)))


class Rows:
    """The obvious way: every row keeps all its keys and values, and attends alone."""

    def __init__(self) -> None:
        self.cache = cache_of()
        self.kept: list[list[tuple[Tensor, Tensor]]] = []

    def add(self, state: PromptState, count: int) -> None:
        self.cache.add_rows(state, count)
        self.kept += [list(state.layers) for _ in range(count)]

    def drop(self, rows: list[int]) -> None:
        order = self.cache.drop(rows)
        assert sorted(order) == [row for row in range(len(self.kept)) if row not in rows]
        self.kept = [self.kept[row] for row in order]

    def step(self) -> None:
        """One token of every row, on both sides; they must attend to the same."""
        lengths = [keys.shape[1] for (keys, _), *_ in self.kept]
        assert self.cache.positions().tolist() == lengths
        plan = self.cache.begin_step()
        for layer in range(LAYERS):
            queries = torch.randn(len(self.kept), HEADS, DIM, dtype=F64)
            new = torch.randn(len(self.kept), 2 * KEY_HEADS, DIM, dtype=F64)
            attended = self.cache.attend(layer, plan, queries, new)
            for row, kept in enumerate(self.kept):
                keys, values = (
                    torch.cat((old, part[:, None]), dim=1)
                    for old, part in zip(kept[layer], new[row].split(KEY_HEADS), strict=True)
                )
                kept[layer] = keys, values
                expected = self.alone(queries[row], keys, values)
                torch.testing.assert_close(attended[row], expected, rtol=1e-10, atol=1e-10)
        self.cache.end_step()

    @staticmethod
    def alone(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = []
        for head, query in enumerate(queries):
            key_head = head // (HEADS // KEY_HEADS)
            scores = keys[key_head] @ query / DIM**0.5
            heads.append(scores.softmax(dim=0) @ values[key_head])
        return torch.stack(heads)


@pytest.mark.parametrize("seed", range(4))
def test_rows_attend_as_if_each_held_its_prompt(seed: int):
    torch.manual_seed(seed)
    rows = Rows()
    first, second, third = prompt(5), prompt(40), prompt(1)
    rows.add(first, 4)
    rows.step()
    rows.add(second, 1)
    rows.add(third, 3)
    for _ in range(35):
        rows.step()
    rows.drop([0, 5])
    rows.step()
    rows.add(first, 2)
    rows.step()
    rows.drop([row for row in range(8) if seed + row != 3])
    rows.step()
    rows.add(prompt(70), 5)
    rows.add(second, 2)
    rows.step()
    rows.drop(list(range(len(rows.kept))))
    assert rows.cache.num_rows == 0
    rows.add(third, 2)
    rows.step()


def test_large_scores_stay_finite():
    cache = cache_of()
    big = tuple((1e3 * keys, values) for keys, values in prompt(6).layers)
    cache.add_rows(PromptState(layers=big), 2)
    plan = cache.begin_step()
    new = torch.randn(2, 2 * KEY_HEADS, DIM, dtype=F64)
    queries = 1e3 * torch.randn(2, HEADS, DIM, dtype=F64)
    assert cache.attend(0, plan, queries, new).isfinite().all()


def bytes_of(*, group_size: int, prompt_tokens: int, steps: int) -> int:
    cache = cache_of(max_rows=group_size)
    cache.add_rows(prompt(prompt_tokens), group_size)
    for _ in range(steps):
        cache.begin_step()
        cache.end_step()
    return cache.num_bytes


def test_memory_grows_with_completions_and_prompts_and_not_with_their_product():
    one_position = 2 * LAYERS * KEY_HEADS * DIM * 8
    for group_size in (1, 8, 32):
        for prompt_tokens in (32, 512):
            held = bytes_of(group_size=group_size, prompt_tokens=prompt_tokens, steps=64)
            assert held == one_position * (prompt_tokens + group_size * 64)


def test_a_prompt_is_stored_once_however_its_rows_come_and_forgotten_with_the_last():
    cache = cache_of()
    state = prompt(32)
    cache.add_rows(state, 2)
    stored = cache.num_bytes
    cache.add_rows(state, 3)
    assert cache.num_bytes == stored
    cache.drop([0, 1, 2, 3, 4])
    cache.add_rows(prompt(20), 1)
    assert cache.num_bytes == stored
