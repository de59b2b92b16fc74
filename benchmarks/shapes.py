"""Rounds of the three workloads: real prompts, completions by length, and the steps on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks import flops, workloads
from gmpo.batch import MicroBatch, StepBatch, build_step, split_steps
from gmpo.config import TrainingConfig
from gmpo.policy.head import most_positions_kept
from gmpo.policy.load import load_tokenizer
from gmpo.policy.prefix import common_length, padded
from gmpo.records import Group, Prompt, Rollout
from gmpo.rollouts import PromptRenderer

STEPS_PER_ROUND = 4
PREFILL_TOKENS = 2048
"""Padded prompt tokens that gmpo's sampler runs in one prefill."""
MICRO_BATCH_TOKENS: int = TrainingConfig.model_fields["max_tokens_per_micro_batch"].default


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A round's size: prompts, completions of each, and the longest completion in tokens."""

    name: str
    num_prompts: int
    group_size: int
    max_tokens: int


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="short", num_prompts=8, group_size=8, max_tokens=32),
        Workload(name="words", num_prompts=8, group_size=8, max_tokens=128),
        Workload(name="long-prompt", num_prompts=4, group_size=8, max_tokens=64),
    )
}


@dataclass(frozen=True, kw_only=True)
class Round:
    """Prompts as token ids, and how long each one's completions are."""

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def num_rows(self) -> int:
        return sum(len(drawn) for drawn in self.completions)

    @property
    def longest_prompt(self) -> int:
        return max(len(prompt) for prompt in self.prompts)

    @property
    def longest_completion(self) -> int:
        return max(max(drawn) for drawn in self.completions)


def prompts_of(workload: Workload, model: str) -> list[tuple[int, ...]]:
    """The prompts that gmpo and TRL are timed with in their first round of this workload.

    Rendered with the model's own template.
    """
    renderer = PromptRenderer(
        load_tokenizer(model), prompt_format="auto", system=None, max_prompt_tokens=4096
    )
    timed = workloads.WORKLOADS[workload.name]
    asked = workloads.prompts_of(replace(timed, prompts_per_round=workload.num_prompts), 0)
    return [renderer.render(prompt).token_ids or () for prompt in asked]


def steps_of(
    one: Round,
    *,
    vocabulary: int,
    shares_prompts: bool,
    live: Sequence[bool],
    steps_per_round: int = STEPS_PER_ROUND,
) -> list[StepBatch]:
    """The round's optimizer steps as gmpo builds them, over random completions.

    Args:
        one: lengths and prompts.
        vocabulary: completions are drawn from it.
        shares_prompts: as `Policy.shares_prompts`.
        live: whether each group's rewards differ, so that it has a gradient.
        steps_per_round: optimizer steps that the groups are divided among.
    """
    generator = np.random.default_rng(0)
    groups = [
        group_of(f"p{number}", prompt, lengths, vocabulary, generator)
        for number, (prompt, lengths) in enumerate(zip(one.prompts, one.completions, strict=True))
    ]
    width = max(len(lengths) for lengths in one.completions)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(width)[:width]
    advantages = torch.tensor(live, dtype=torch.float64)[:, None] * signs
    return [
        build_step(
            [groups[place] for place in places],
            advantages[places.start : places.stop],
            max_tokens=MICRO_BATCH_TOKENS,
            shares_prompts=shares_prompts,
            skips_dead_rows=True,
            device=torch.device("cpu"),
        )
        for places in split_steps(len(groups), steps_per_round=steps_per_round)
    ]


def group_of(
    name: str,
    prompt: Sequence[int],
    lengths: Sequence[int],
    vocabulary: int,
    generator: np.random.Generator,
) -> Group:
    """A group of random completions of the given lengths."""
    rollouts = tuple(
        Rollout(
            prompt_id=name,
            index=index,
            token_ids=generator.integers(5, vocabulary, size=length),
            from_policy=np.ones(length, dtype=np.bool_),
            sampler_logprobs=np.full(length, -2.0, dtype=np.float32),
            text="",
            finish_reason="length",
            first_version=0,
            last_version=0,
            reward=0.0,
        )
        for index, length in enumerate(lengths)
    )
    return Group(prompt=Prompt(id=name, text=name, token_ids=tuple(prompt)), rollouts=rollouts)


def layout_of(batch: MicroBatch) -> flops.Layout:
    """The sizes that a micro-batch runs with."""
    shared = common_length(batch.prompt_ids, batch.prompt_lengths)
    rests = int((batch.prompt_lengths - shared).sum())
    return flops.Layout(
        tokens=shared + rests + int((batch.completion_lengths - 1).sum()),
        prompts=len(batch.prompt_ids),
        prompt_width=batch.prompt_ids.shape[1],
        shared=shared,
        rows=len(batch.completion_ids),
        completion_width=batch.completion_ids.shape[1],
        counted=int(batch.mask.sum()),
    )


def common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, as gmpo counts them: 0 where too few to matter."""
    return common_length(*padded(prompts, device=torch.device("cpu")))


def prefills_of(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Prompts that gmpo's sampler prefills together: their lengths and common beginning."""
    packs: list[list[Sequence[int]]] = [[]]
    for prompt in prompts:
        width = max(map(len, [*packs[-1], prompt]))
        if packs[-1] and width * (len(packs[-1]) + 1) > PREFILL_TOKENS:
            packs.append([])
        packs[-1].append(prompt)
    return [([len(prompt) for prompt in pack], common(pack)) for pack in packs]


def counts(model: flops.Model, one: Round, *, live: Sequence[bool]) -> dict[str, Any]:
    """Operations of a round, gmpo's and TRL's, by stage.

    gmpo takes the sampler's log-probabilities as the old policy's in fp32 and scores anew in bf16:
    both are given. TRL scores anew always, because it does not keep its sampler's.
    """
    steps = steps_of(one, vocabulary=model.vocabulary, shares_prompts=True, live=live)
    layouts = [layout_of(batch) for step in steps for batch in step.micro_batches]
    # In fp32 half as many are kept as in bf16.
    kept = most_positions_kept(model.vocabulary, width=torch.float32.itemsize)
    rows, width = one.num_rows, one.longest_prompt + one.longest_completion
    gmpo = {
        "rollouts": flops.gmpo_rollouts(
            model, prefills=prefills_of(one.prompts), completions=one.completions
        ),
        "old_logprobs": sum(flops.gmpo_scores(model, layout) for layout in layouts),
        "gradients": sum(flops.gmpo_gradient(model, layout, kept=kept) for layout in layouts),
    }
    trl = {
        "rollouts": flops.trl_rollouts(
            model, rows=rows, prompt_width=one.longest_prompt, steps=one.longest_completion
        ),
        "old_logprobs": flops.trl_scores(model, rows=rows, width=width),
        "gradients": flops.trl_gradient(model, rows=rows, width=width),
    }
    return {
        "gmpo": gmpo | {"round": sum(gmpo.values())},
        "gmpo_trusting_sampler": {"round": gmpo["rollouts"] + gmpo["gradients"]},
        "trl": trl | {"round": sum(trl.values())},
    }
