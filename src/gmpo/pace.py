"""What time a run will need, by a short trial at its start."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gmpo.assembly import TrainingParts
from gmpo.batch import MicroBatch, build_step
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
    """Seconds at the speed of a short trial, fastest and slowest timing.

    Every completion runs to its limit and every group is live, so there is seldom more to do than
    this, but the machine may be slower later on, and what was not counted comes on top.

    Attributes:
        round_seconds: of one round, (fastest, slowest).
        evaluation_seconds: of all evaluations of the run.
        run_seconds: of the rounds to come and all evaluations.
        not_counted: parts of a round whose time cannot be known before.
    """

    round_seconds: tuple[float, float]
    evaluation_seconds: tuple[float, float]
    run_seconds: tuple[float, float]
    not_counted: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self)


def forecast_time(
    parts: TrainingParts,
    prompts: Sequence[Prompt],
    *,
    rounds: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> TimeForecast | None:
    """Time decoding and scoring for a moment, and multiply; None if it was asked to stop.

    Not timed are AdamW's step and the graded answers, which are small beside the passes for all but
    small batches. Nothing of the run changes: weights stay, no gradient is made.

    Args:
        parts: of the run.
        prompts: of one round, `prompts_per_round` of them.
        rounds: to come.
        should_stop: asked before each timing.
    """
    config = parts.config
    sampling, training, evaluation = config.sampling, config.training, config.evaluation
    rows = min(sampling.max_rows, len(prompts) * sampling.group_size)
    starts, steps = _time_decoding(parts, prompts, rows=rows, should_stop=should_stop)
    scores = _time_scoring(parts, prompts, should_stop=should_stop)
    if should_stop():
        return None
    waves = math.ceil(len(prompts) * sampling.group_size / rows)
    every = training.gradient_cosine_every
    cosines = rounds // every if every else 0

    def round_at(pick: Callable[[Sequence[float]], float]) -> float:
        rollout = waves * (pick(starts) + sampling.max_new_tokens * pick(steps))
        return rollout + training.steps_per_round * _passes(config) * pick(scores)

    tokens = evaluation.max_new_tokens or sampling.max_new_tokens
    ways = 1 + bool(evaluation.few_shot) + evaluation.sampled
    between = rounds // evaluation.every_rounds if evaluation.every_rounds else 0
    during = min(evaluation.items_during, len(parts.held_out)) * between
    waves_of_items = (2 * ways * len(parts.held_out) + during) / rows

    def evaluations_at(pick: Callable[[Sequence[float]], float]) -> float:
        return waves_of_items * (pick(starts) + tokens * pick(steps))

    def run_at(pick: Callable[[Sequence[float]], float]) -> float:
        comparing = cosines * 2 * _gradient_passes(config) * pick(scores)
        return rounds * round_at(pick) + comparing + evaluations_at(pick)

    return TimeForecast(
        round_seconds=(round_at(min), round_at(max)),
        evaluation_seconds=(evaluations_at(min), evaluations_at(max)),
        run_seconds=(run_at(min), run_at(max)),
        not_counted=tuple(_not_counted(config)),
    )


def _passes(config: RunConfig) -> int:
    """Forward passes that a step's rows take in a round, or what is as long."""
    # Old log-probabilities usually come from the sampler, unless these say that they may not.
    recomputes_old = config.training.engine == "plain" or config.model.dtype == "bf16"
    return _gradient_passes(config) + recomputes_old + (config.objective.kl_coefficient > 0)


def _gradient_passes(config: RunConfig) -> int:
    """Of one gradient. A backward pass makes two products for each of the forward pass, one for
    the inputs' gradient and one for the weights', which frozen weights do not need.
    """
    backward = 1 if config.lora.rank else 2
    return 1 + backward + config.training.gradient_checkpointing


def _not_counted(config: RunConfig) -> Iterator[str]:
    if config.sampling.rollout is not None:
        yield "the rollout function's own work and further turns"
    if config.reward.functions or config.reward.models:
        yield "reward functions"
    if config.sampling.dynamic == "refill":
        yield "refilled groups"
    if config.training.processes > 1:
        yield "what other processes take off this one"


def _time_decoding(
    parts: TrainingParts,
    prompts: Sequence[Prompt],
    *,
    rows: int,
    should_stop: Callable[[], bool],
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
        is_enough = len(seconds) > _LEAST_TIMINGS and sum(seconds) > _TRIAL_SECONDS
        if is_enough or should_stop():
            for request in requests:
                parts.sampler.cancel(request.id)
            parts.sampler.step()  # not timed: it only drops them
            break
        started = time.perf_counter()
        parts.sampler.step()
        seconds.append(time.perf_counter() - started)
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


def _time_scoring(
    parts: TrainingParts, prompts: Sequence[Prompt], *, should_stop: Callable[[], bool]
) -> list[float]:
    """Seconds of a forward pass over one optimizer step's rows, completions at their limit,
    without gradient.
    """
    config = parts.config
    per_step = config.sampling.prompts_per_round // config.training.steps_per_round
    # The first one stands for all: a whole step of long completions may take minutes.
    batch = _first_micro_batch(parts, prompts[:per_step])
    share = len(batch.row_names) / (per_step * config.sampling.group_size)
    seconds: list[float] = []
    while not should_stop() and (
        len(seconds) < _LEAST_TIMINGS
        or (sum(seconds) < _TRIAL_SECONDS and len(seconds) < _MOST_TIMINGS)
    ):
        started = time.perf_counter()
        with torch.no_grad():
            scores = parts.policy.score(batch, temperature=parts.loss.temperature)
            float(scores.logprobs.sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return [value / share for value in seconds]


def _first_micro_batch(parts: TrainingParts, prompts: Sequence[Prompt]) -> MicroBatch:
    """The first of a step of these prompts, every completion at its limit.

    Only rows that may lie in it are made: those of a whole step may be more than fit into memory.
    """
    config = parts.config
    length, group_size = config.sampling.max_new_tokens, config.sampling.group_size
    budget = config.training.max_tokens_per_micro_batch
    left = max(1, budget // length)  # rows; one may exceed the budget
    groups: list[Group] = []
    for prompt in sorted(prompts, key=lambda prompt: prompt.id):  # as a step orders equal lengths
        groups.append(_longest_group(prompt, min(left, group_size), length))
        left -= len(groups[-1].rollouts)
        if not left:
            break
    step = build_step(
        groups,
        torch.ones(len(groups), len(groups[0].rollouts), dtype=torch.float64),
        max_tokens=budget,
        shares_prompts=parts.policy.shares_prompts,
        skips_dead_rows=False,
        device=parts.policy.device,
    )
    return step.micro_batches[0]


def _longest_group(prompt: Prompt, num_rows: int, length: int) -> Group:
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
        for index in range(num_rows)
    )
    return Group(prompt=prompt, rollouts=rollouts)
