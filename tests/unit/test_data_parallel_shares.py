"""Work divided among processes: everything once, evenly, and what belongs together in one place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.rollout_groups import one_step, random_groups

from gmpo.batch import StepBatch
from gmpo.data_parallel import shares_of_batches, shares_of_prompts
from gmpo.records import Prompt


@given(st.lists(st.sampled_from("abcdef"), max_size=12), st.integers(1, 4))
def test_each_prompt_is_one_shares_and_all_of_one_id_are_the_same_ones(ids: str, count: int):
    prompts = [Prompt(id=name, text="x") for name in ids]
    shares = shares_of_prompts(prompts, count)
    assert len(shares) == count
    assert sorted(place for share in shares for place in share) == list(range(len(prompts)))
    for share in shares:
        assert share == sorted(share)
    of_each = [{ids[place] for place in share} for share in shares]
    assert all(sum(name in names for names in of_each) == 1 for name in ids)


def test_prompts_of_different_ids_are_shared_evenly():
    prompts = [Prompt(id=str(n), text="x") for n in range(7)]
    assert shares_of_prompts(prompts, 3) == [[0, 3, 6], [1, 4], [2, 5]]


def step_of(lengths: list[list[int]], *, max_tokens: int, least_batches: int = 1) -> StepBatch:
    groups = random_groups([[11, 12, 13]] * len(lengths), lengths)
    advantages = [[1.0, -1.0][: len(of_group)] for of_group in lengths]
    return one_step(groups, advantages, max_tokens=max_tokens, least_batches=least_batches)


def test_the_largest_micro_batch_goes_first_to_whom_has_least():
    # Tokens with padding: 3 + 1 x 9, 3 + 1 x 5, 3 + 1 x 4, 3 + 1 x 2 of one row each.
    batches = step_of([[9], [5], [4], [2]], max_tokens=1).micro_batches
    sizes = [b.prompt_ids.numel() + b.completion_ids.numel() for b in batches]
    assert sizes == [5, 7, 8, 12]
    # 12 to the first, 8 and 7 to the second, 5 to the first: 17 and 15.
    assert shares_of_batches(batches, 2) == [[0, 3], [1, 2]]
    assert shares_of_batches(batches[:1], 3) == [[0], [], []]


def test_a_step_is_cut_where_there_would_be_less_to_share_out():
    lengths = [[4, 4], [4, 4]]
    assert len(step_of(lengths, max_tokens=1000).micro_batches) == 1
    cut = step_of(lengths, max_tokens=1000, least_batches=2)
    assert [len(batch.row_names) for batch in cut.micro_batches] == [2, 2]
    assert cut.num_rollouts == 4
    # A budget that cuts it already is kept.
    assert len(step_of(lengths, max_tokens=1, least_batches=2).micro_batches) == 4
    assert step_of([[4]], max_tokens=1000, least_batches=3).micro_batches[0].mask.shape == (1, 4)
    assert torch.equal(
        step_of(lengths, max_tokens=9, least_batches=1).micro_batches[0].mask,
        step_of(lengths, max_tokens=9).micro_batches[0].mask,
    )
