"""What time a run will need, by a short trial at its start."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gmpo.assembly import TrainingParts
from gmpo.batch import build_step
from gmpo.config import RunConfig
from gmpo.records import Group, Prompt, Rollout
from gmpo.sampler.requests import SampleRequest

__all__ = ["TimeForecast", "forecast_time"]

_LEAST_TIMINGS, _MOST_TIMINGS = 2, 4
"""Timings of each part; the fastest and the slowest make the interval."""
_TRIAL_SECONDS = 2.0
"""A part is timed no more once it has taken this long."""


@dataclass(frozen=True, kw_only=True)
class TimeForecast:
    """Seconds at the speed of a short trial, fastest and slowest timing, with everything at most.

    Every completion runs to its limit and every group is live, so a round takes less unless the
    machine slows down.

    Attributes:
        round_seconds: of one round, (fastest, slowest).
        evaluation_seconds: of all evaluations of the run.
        run_seconds: of the rounds to come and all evaluations.
    """

    round_seconds: tuple[float, float]
    evaluation_seconds: tuple[float, float]
    run_seconds: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self)


def forecast_time(parts: TrainingParts, prompts: Sequence[Prompt], *, rounds: int) -> TimeForecast:
    """Time decoding and scoring for a moment, and multiply.

    A backward pass is taken as two forward passes. AdamW's step is not timed: it is small beside
    them for all but tiny batches. Nothing of the run changes: weights stay, no gradient is made.

    Args:
        parts: of the run.
        prompts: of one round.
        rounds: to come.
    """
    config = parts.config
    sampling, evaluation = config.sampling, config.evaluation
    rows = min(sampling.max_rows, len(prompts) * sampling.group_size)
    starts, steps = _time_decoding(parts, prompts, rows=rows)
    scores = _time_scoring(parts, prompts)
    waves = math.ceil(len(prompts) * sampling.group_size / rows)
    passes = 3 if _trusts_sampler(config) else 4
    updates = config.training.steps_per_round

    def round_at(pick: Callable[[Sequence[float]], float]) -> float:
        rollout = waves * (pick(starts) + sampling.max_new_tokens * pick(steps))
        return rollout + updates * passes * pick(scores)

    tokens = evaluation.max_new_tokens or sampling.max_new_tokens
    ways = 1 + bool(evaluation.few_shot) + evaluation.sampled
    every = evaluation.every_rounds
    during = min(evaluation.items_during, len(parts.held_out)) * (rounds // every if every else 0)
    waves_of_items = (2 * ways * len(parts.held_out) + during) / rows

    def evaluations_at(pick: Callable[[Sequence[float]], float]) -> float:
        return waves_of_items * (pick(starts) + tokens * pick(steps))

    per_round = round_at(min), round_at(max)
    evaluating = evaluations_at(min), evaluations_at(max)
    whole = (rounds * per_round[0] + evaluating[0], rounds * per_round[1] + evaluating[1])
    return TimeForecast(round_seconds=per_round, evaluation_seconds=evaluating, run_seconds=whole)


def _trusts_sampler(config: RunConfig) -> bool:
    """Whether old log-probabilities usually come from the sampler, at no pass of their own."""
    return config.training.engine == "fast" and config.model.dtype != "bf16"


def _time_decoding(
    parts: TrainingParts, prompts: Sequence[Prompt], *, rows: int
) -> tuple[list[float], list[float]]:
    """Seconds to run the prompts of `rows` completions with their first token, and a step after."""
    each = min(rows, parts.config.sampling.group_size)
    requests = [
        _trial_request(parts, prompt, place=place, num_completions=each)
        for place, prompt in enumerate(prompts[: rows // each])
    ]
    for request in requests:
        parts.sampler.submit(request)
    seconds: list[float] = []
    while not parts.sampler.is_idle:
        started = time.perf_counter()
        parts.sampler.step()
        seconds.append(time.perf_counter() - started)
        if len(seconds) > _LEAST_TIMINGS and sum(seconds) > _TRIAL_SECONDS:
            for request in requests:
                parts.sampler.cancel(request.id)
            parts.sampler.step()  # not timed: it only drops them
    return seconds[:1], seconds[1:] or seconds


def _trial_request(
    parts: TrainingParts, prompt: Prompt, *, place: int, num_completions: int
) -> SampleRequest:
    """A few tokens that nothing ends."""
    assert prompt.token_ids is not None, "prompts are rendered before they are sampled"
    return SampleRequest(
        id=f"trial-{place}",
        token_ids=prompt.token_ids,
        num_completions=num_completions,
        max_tokens=min(1 + _MOST_TIMINGS, parts.sampling.max_tokens),
        temperature=parts.sampling.temperature,
        key=("trial", place),
    )


def _time_scoring(parts: TrainingParts, prompts: Sequence[Prompt]) -> list[float]:
    """Seconds of a forward pass over one optimizer step's rows, completions at their limit."""
    config = parts.config
    per_step = config.sampling.prompts_per_round // config.training.steps_per_round
    length = config.sampling.max_new_tokens
    groups = [_longest_group(p, config.sampling.group_size, length) for p in prompts[:per_step]]
    step = build_step(
        groups,
        torch.ones(len(groups), config.sampling.group_size, dtype=torch.float64),
        max_tokens=config.training.max_tokens_per_micro_batch,
        shares_prompts=parts.policy.shares_prompts,
        skips_dead_rows=False,
        device=parts.policy.device,
    )
    seconds: list[float] = []
    while len(seconds) < _LEAST_TIMINGS or (
        sum(seconds) < _TRIAL_SECONDS and len(seconds) < _MOST_TIMINGS
    ):
        started = time.perf_counter()
        with torch.no_grad():
            for batch in step.micro_batches:
                scores = parts.policy.score(batch, temperature=parts.loss.temperature)
                float(scores.logprobs.sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds


def _longest_group(prompt: Prompt, group_size: int, length: int) -> Group:
    """A prompt with completions of the prompt's first token, as long as they may be."""
    assert prompt.token_ids is not None
    token_ids = np.full(length, prompt.token_ids[0], dtype=np.int64)
    rollouts = tuple(
        Rollout(
            prompt_id=prompt.id,
            index=index,
            token_ids=token_ids,
            from_policy=np.ones(length, dtype=np.bool_),
            sampler_logprobs=np.zeros(length, dtype=np.float32),
            text="",
            finish_reason="length",
            first_version=0,
            last_version=0,
            reward=0.0,
        )
        for index in range(group_size)
    )
    return Group(prompt=prompt, rollouts=rollouts)
