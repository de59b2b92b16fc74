"""From scored groups to micro-batches: what each tensor holds, and how rows are packed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.rollout_groups import group, one_step, random_groups, rollout

from gmpo.batch import MicroBatch, build_dead_batches, reward_table, split_steps
from gmpo.errors import DataError

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def padded_tokens(batch: MicroBatch, *, shares_prompts: bool) -> int:
    num_rows, width = batch.completion_ids.shape
    copies = len(batch.prompt_ids) if shares_prompts else num_rows
    return copies * batch.prompt_ids.shape[1] + num_rows * width


def test_a_micro_batch_by_hand():
    first = group(
        [5, 6, 7],
        [
            rollout([20, 21], index=0, prompt_id="a", logprobs=[-0.5, -1.5]),
            rollout([22], index=1, prompt_id="a", logprobs=[-0.25]),
        ],
    )
    mixed = rollout(
        [30, 31, 32], prompt_id="b", logprobs=[-1, 0, -2], from_policy=[True, False, True]
    )
    step = one_step([first, group([8], [mixed])], [[1.0, -1.0], [0.5, 0.0]])
    (batch,) = step.micro_batches
    assert batch.row_names == ("a#1", "a#0", "b#0")
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.prompt_of_row.tolist() == [0, 0, 1]
    assert batch.completion_ids.tolist() == [[22, 0, 0], [20, 21, 0], [30, 31, 32]]
    assert batch.completion_lengths.tolist() == [1, 2, 3]
    assert batch.mask.tolist() == [[True, False, False], [True, True, False], [True, False, True]]
    assert batch.advantages.tolist() == [-1.0, 1.0, 0.5]
    assert batch.sampler_logprobs.tolist() == [[-0.25, 0, 0], [-0.5, -1.5, 0], [-1, 0, -2]]
    assert torch.equal(batch.old_logprobs, batch.sampler_logprobs)
    assert batch.reference_logprobs is None
    assert (step.num_rollouts, step.num_skipped_rows) == (3, 0)


def test_numbers_keep_the_samplers_precision():
    for dtype, expected in ((np.float32, torch.float32), (np.float64, torch.float64)):
        step = one_step([group([5], [rollout([20], dtype=dtype)])], [[1.0]])
        (batch,) = step.micro_batches
        assert batch.sampler_logprobs.dtype == expected
        assert batch.advantages.dtype == expected


def test_the_reward_table_marks_errors_and_missing_rollouts():
    groups = [
        group([5], [rollout([20], reward=0.5), rollout([21], reward=1.0, error="lost")]),
        group([6], [rollout([22], reward=-2.0)]),
        group([7], [rollout([23], reward=None), rollout([24], reward=0.25)]),
    ]
    rewards, valid = reward_table(groups)
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [[0.5, 0.0], [-2.0, 0.0], [0.0, 0.25]]
    assert valid.tolist() == [[True, False], [True, False], [False, True]]


def test_failed_and_unscored_rollouts_are_neither_rows_nor_in_the_denominator():
    of_group = [
        rollout([20], index=0),
        rollout([21], index=1, error="lost"),
        rollout([22], index=2, reward=None),
        rollout([23], index=3),
    ]
    step = one_step([group([5], of_group)], [[1.0, 2.0, 3.0, 4.0]])
    (batch,) = step.micro_batches
    assert sorted(zip(batch.row_names, batch.advantages.tolist(), strict=True)) == [
        ("p#0", 1.0),
        ("p#3", 4.0),
    ]
    assert step.num_rollouts == 2


def test_dead_rows_are_left_out_on_request_and_stay_in_the_denominator():
    groups = random_groups(PROMPTS, [[2, 3], [1, 4], [5, 2]])
    advantages = [[1.0, 0.0], [0.0, 0.0], [-1.0, -0.0]]
    kept = one_step(groups, advantages)
    skipped = one_step(groups, advantages, skips_dead_rows=True)
    assert (kept.num_rollouts, kept.num_skipped_rows) == (6, 0)
    assert (skipped.num_rollouts, skipped.num_skipped_rows) == (6, 4)
    names = {name for batch in skipped.micro_batches for name in batch.row_names}
    assert names == {"p0#0", "p2#0"}
    # A prompt without a live row is not run at all.
    assert sum(len(batch.prompt_ids) for batch in skipped.micro_batches) == 2


def test_the_rows_left_out_can_be_had_beside_the_step():
    groups = random_groups(PROMPTS, [[2, 3], [1, 4], [5, 2]])
    advantages = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, -0.0]], dtype=torch.float64)
    for max_tokens, num_batches in ((10_000, 1), (1, 4)):
        batches = build_dead_batches(
            groups,
            advantages,
            max_tokens=max_tokens,
            shares_prompts=True,
            device=torch.device("cpu"),
        )
        names = sorted(name for batch in batches for name in batch.row_names)
        assert names == ["p0#1", "p1#0", "p1#1", "p2#1"]
        assert len(batches) == num_batches


def test_a_step_of_dead_groups_has_no_micro_batch():
    step = one_step(random_groups([[5]], [[2, 2]]), [[0.0, 0.0]], skips_dead_rows=True)
    assert step.micro_batches == ()
    assert (step.num_rollouts, step.num_skipped_rows) == (2, 2)


def test_a_rollout_without_a_policy_token_is_refused_by_name():
    wrong = rollout([20, 21], index=3, prompt_id="q", from_policy=[False, False])
    with pytest.raises(DataError, match=r"rollout 3 of prompt 'q' has no token sampled"):
        one_step([group([5], [wrong])], [[1.0]])
    empty = rollout([], index=1, prompt_id="q")
    with pytest.raises(DataError, match=r"rollout 1 of prompt 'q'"):
        one_step([group([5], [empty])], [[1.0]])


@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=3, max_size=3),
    max_tokens=st.integers(1, 120),
    shares_prompts=st.booleans(),
)
def test_packing_keeps_every_row_once_and_respects_the_budget(lengths, max_tokens, shares_prompts):
    groups = random_groups(PROMPTS, lengths)
    width = max(len(of_group) for of_group in lengths)
    step = one_step(
        groups, [[1.0] * width] * 3, max_tokens=max_tokens, shares_prompts=shares_prompts
    )
    names = [name for batch in step.micro_batches for name in batch.row_names]
    expected = [
        f"p{p}#{index}" for p, of_group in enumerate(lengths) for index in range(len(of_group))
    ]
    assert sorted(names) == sorted(expected)
    for batch in step.micro_batches:
        fits = padded_tokens(batch, shares_prompts=shares_prompts) <= max_tokens
        assert fits or len(batch.row_names) == 1


def test_every_row_keeps_its_own_tokens_in_any_packing():
    groups = random_groups(PROMPTS, [[2, 9], [4, 4], [7, 1]])
    for max_tokens in (1, 25, 60, 10_000):
        step = one_step(groups, [[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]], max_tokens=max_tokens)
        for batch in step.micro_batches:
            for row, name in enumerate(batch.row_names):
                number, index = int(name[1]), int(name[3])
                expected = groups[number].rollouts[index]
                length = int(batch.completion_lengths[row])
                assert batch.completion_ids[row, :length].tolist() == expected.token_ids.tolist()
                assert int(batch.mask[row].sum()) == length
                prompt = int(batch.prompt_of_row[row])
                prompt_length = int(batch.prompt_lengths[prompt])
                assert batch.prompt_ids[prompt, :prompt_length].tolist() == PROMPTS[number]
                assert batch.advantages[row] == (number + 1) * (-1) ** index


def test_prompts_of_one_id_keep_their_own_tokens():
    # Rows without ids are numbered anew in each call that samples them.
    pair = [group([5, 6, 7], [rollout([9, 9])]), group([8, 8], [rollout([3, 3])])]
    assert len({one.prompt.id for one in pair}) == 1
    for shares_prompts in (True, False):
        step = one_step(pair, [[1.0], [-1.0]], max_tokens=1000, shares_prompts=shares_prompts)
        (batch,) = step.micro_batches
        prompts = [
            batch.prompt_ids[place, : batch.prompt_lengths[place]].tolist()
            for place in batch.prompt_of_row.tolist()
        ]
        found = dict(zip(map(tuple, prompts), batch.completion_ids.tolist(), strict=True))
        assert found == {(5, 6, 7): [9, 9], (8, 8): [3, 3]}


def test_shared_prompts_let_more_rows_into_the_same_budget():
    groups = random_groups([[5] * 40], [[4] * 6])
    shared = one_step(groups, [[1.0] * 6], max_tokens=64, shares_prompts=True)
    apart = one_step(groups, [[1.0] * 6], max_tokens=64, shares_prompts=False)
    # 40 + 6 * 4 = 64 tokens with the prompt once; 44 a row otherwise.
    assert [len(batch.row_names) for batch in shared.micro_batches] == [6]
    assert [len(batch.row_names) for batch in apart.micro_batches] == [1] * 6


def test_steps_take_whole_groups_in_order():
    assert split_steps(8, steps_per_round=4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert split_steps(3, steps_per_round=1) == [range(3)]


def test_groups_that_do_not_divide_into_steps_are_refused_with_both_numbers():
    with pytest.raises(DataError, match="10 groups do not divide into 4 steps"):
        split_steps(10, steps_per_round=4)
