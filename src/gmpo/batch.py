"""From scored groups to the micro-batches of each optimizer step.

Dimensions: **P** prompts of a micro-batch, **L** prompt tokens, **B** sequences, **T** completion
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gmpo.errors import DataError
from gmpo.records import Group, Prompt, Rollout

__all__ = [
    "MicroBatch",
    "StepBatch",
    "build_dead_batches",
    "build_step",
    "reward_table",
    "split_steps",
]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Tensors of a few groups' rows: prompts apart from completions, both padded on the right.

    Attributes:
        prompt_ids: each prompt once.
        prompt_lengths: tokens of each prompt.
        prompt_of_row: which prompt a row continues.
        completion_ids: one completion a row.
        completion_lengths: tokens of each completion.
        mask: True exactly where the policy sampled the token.
        advantages: one per row.
        sampler_logprobs: nats, as the sampler reported them.
        old_logprobs: nats; the ratio's denominator.
        reference_logprobs: nats under the reference policy, or None without a KL term.
        row_names: prompt id and rollout index, to name a row in an error.
    """

    prompt_ids: Int[Tensor, "P L"]
    prompt_lengths: Int[Tensor, " P"]
    prompt_of_row: Int[Tensor, " B"]
    completion_ids: Int[Tensor, "B T"]
    completion_lengths: Int[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    advantages: Float[Tensor, " B"]
    sampler_logprobs: Float[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    reference_logprobs: Float[Tensor, "B T"] | None
    row_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One optimizer step's work.

    `num_rollouts` is the denominator of the step's mean: every usable rollout of its groups, also
    those whose rows were left out because their gradient is exactly zero. `dead_batches` holds
    these rows where they are to be measured all the same (`build_dead_batches`).
    """

    micro_batches: tuple[MicroBatch, ...]
    num_rollouts: int
    num_skipped_rows: int
    dead_batches: tuple[MicroBatch, ...] = ()


_PromptKey = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class _Row:
    prompt: Prompt
    rollout: Rollout
    advantage: float

    @property
    def key(self) -> _PromptKey:
        """What tells its prompt from others: groups of several data sets may share ids."""
        return self.prompt.id, self.prompt.token_ids or ()


def reward_table(
    groups: Sequence[Group],
) -> tuple[Float[Tensor, "P G"], Bool[Tensor, "P G"]]:
    """Rewards of the groups as one float64 table, and which entries are usable rollouts."""
    width = max(len(group.rollouts) for group in groups)
    rewards = torch.zeros(len(groups), width, dtype=torch.float64)
    valid = torch.zeros(len(groups), width, dtype=torch.bool)
    for row, group in enumerate(groups):
        for column, rollout in enumerate(group.rollouts):
            if rollout.error is None and rollout.reward is not None:
                rewards[row, column] = rollout.reward
                valid[row, column] = True
    return rewards, valid


def split_steps(num_groups: int, *, steps_per_round: int) -> list[range]:
    """The groups of each optimizer step: whole groups, in order, equally many."""
    if num_groups % steps_per_round:
        raise DataError(
            f"{num_groups} groups do not divide into {steps_per_round} steps; "
            "use a number of prompts that is a multiple of the steps"
        )
    size = num_groups // steps_per_round
    return [range(start, start + size) for start in range(0, num_groups, size)]


def build_step(  # noqa: PLR0913 - all by keyword but two, and each is its own concern
    groups: Sequence[Group],
    advantages: Float[Tensor, "P G"],
    *,
    max_tokens: int,
    shares_prompts: bool,
    skips_dead_rows: bool,
    device: torch.device,
    least_batches: int = 1,
) -> StepBatch:
    """One step's micro-batches.

    Args:
        groups: the step's scored groups.
        advantages: one per rollout, in the order of the groups' rollouts.
        max_tokens: budget of a micro-batch in tokens, padding included; one row may exceed it.
        shares_prompts: whether the budget counts a prompt once a group or once a row.
        skips_dead_rows: leave out rows with advantage exactly 0; sound only without KL and entropy.
        device: where the tensors go.
        least_batches: where there would be fewer, as many as can be had of like size: a process
            works on whole micro-batches.

    Raises:
        DataError: a completion has no token sampled by the policy; the row is named.
    """
    rows = _usable_rows(groups, advantages)
    live = [row for row in rows if not (skips_dead_rows and row.advantage == 0.0)]
    packs = _pack(live, max_tokens=max_tokens, shares_prompts=shares_prompts)
    if live and len(packs) < least_batches:
        packs = _pack_evenly(live, count=least_batches, shares_prompts=shares_prompts)
    return StepBatch(
        micro_batches=tuple(_collate(pack, device=device) for pack in packs),
        num_rollouts=len(rows),
        num_skipped_rows=len(rows) - len(live),
    )


def build_dead_batches(
    groups: Sequence[Group],
    advantages: Float[Tensor, "P G"],
    *,
    max_tokens: int,
    shares_prompts: bool,
    device: torch.device,
) -> tuple[MicroBatch, ...]:
    """The rows that `build_step` leaves out with `skips_dead_rows`; its arguments and errors."""
    rows = _usable_rows(groups, advantages)
    dead = [row for row in rows if row.advantage == 0.0]
    packs = _pack(dead, max_tokens=max_tokens, shares_prompts=shares_prompts)
    return tuple(_collate(pack, device=device) for pack in packs)


def _usable_rows(groups: Sequence[Group], advantages: Float[Tensor, "P G"]) -> list[_Row]:
    rows: list[_Row] = []
    for group, of_group in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group.rollouts, of_group.tolist(), strict=False):
            if rollout.error is not None or rollout.reward is None:
                continue
            if not rollout.from_policy.any():
                raise DataError(
                    f"rollout {rollout.index} of prompt {rollout.prompt_id!r} has no token "
                    "sampled by the policy, so its mean is undefined; mark it with an error"
                )
            rows.append(_Row(prompt=group.prompt, rollout=rollout, advantage=advantage))
    return rows


def _pack(rows: list[_Row], *, max_tokens: int, shares_prompts: bool) -> list[list[_Row]]:
    """Rows cut into runs whose padded size fits the budget; equal lengths lie together."""
    longest: dict[_PromptKey, int] = {}
    for row in rows:
        longest[row.key] = max(longest.get(row.key, 0), row.rollout.num_tokens)
    ordered = sorted(rows, key=lambda row: (longest[row.key], row.key, row.rollout.num_tokens))
    packs: list[list[_Row]] = []
    for row in ordered:
        candidate = [*packs[-1], row] if packs else [row]
        if packs and _padded_tokens(candidate, shares_prompts=shares_prompts) <= max_tokens:
            packs[-1].append(row)
        else:
            packs.append([row])
    return packs


def _pack_evenly(rows: list[_Row], *, count: int, shares_prompts: bool) -> list[list[_Row]]:
    """Rows cut into at most so many runs by the smallest budget that does it.

    A prompt that is cut apart is run more than once, so that a smaller one may cost more than it
    shares out.
    """
    low, high = 1, _padded_tokens(rows, shares_prompts=shares_prompts)
    while low < high:
        middle = (low + high) // 2
        if len(_pack(rows, max_tokens=middle, shares_prompts=shares_prompts)) <= count:
            high = middle
        else:
            low = middle + 1
    return _pack(rows, max_tokens=low, shares_prompts=shares_prompts)


def _padded_tokens(rows: list[_Row], *, shares_prompts: bool) -> int:
    prompts = {row.key: len(row.prompt.token_ids or ()) for row in rows}
    copies = len(prompts) if shares_prompts else len(rows)
    longest_completion = max(row.rollout.num_tokens for row in rows)
    return copies * max(prompts.values()) + len(rows) * longest_completion


def _collate(rows: list[_Row], *, device: torch.device) -> MicroBatch:
    prompts = {row.key: row.prompt for row in rows}
    place = {key: index for index, key in enumerate(prompts)}
    prompt_ids = [np.asarray(prompt.token_ids, dtype=np.int64) for prompt in prompts.values()]
    rollouts = [row.rollout for row in rows]
    dtype = torch.float64 if rollouts[0].sampler_logprobs.dtype == np.float64 else torch.float32
    sampler_logprobs = _pad([r.sampler_logprobs for r in rollouts], device=device).to(dtype)
    return MicroBatch(
        prompt_ids=_pad(prompt_ids, device=device),
        prompt_lengths=torch.tensor([len(ids) for ids in prompt_ids], device=device),
        prompt_of_row=torch.tensor([place[row.key] for row in rows], device=device),
        completion_ids=_pad([r.token_ids for r in rollouts], device=device),
        completion_lengths=torch.tensor([r.num_tokens for r in rollouts], device=device),
        mask=_pad([r.from_policy for r in rollouts], device=device),
        advantages=torch.tensor([row.advantage for row in rows], dtype=dtype, device=device),
        sampler_logprobs=sampler_logprobs,
        old_logprobs=sampler_logprobs,
        reference_logprobs=None,
        row_names=tuple(f"{row.prompt.id}#{row.rollout.index}" for row in rows),
    )


def _pad(arrays: Sequence[np.ndarray], *, device: torch.device) -> Tensor:
    width = max(len(array) for array in arrays)
    table = np.zeros((len(arrays), width), dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        table[row, : len(array)] = array
    return torch.from_numpy(table).to(device)
