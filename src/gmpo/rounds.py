"""A round's rollouts: sampled, rewarded, and refilled where groups are dead."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gmpo.advantages import group_advantages
from gmpo.assembly import TrainingParts
from gmpo.batch import reward_table
from gmpo.checkpoint import TrainingState
from gmpo.records import Group, Prompt
from gmpo.rewards import ScoredGroups, joined
from gmpo.saved_rounds import SampledRound

__all__ = ["live_groups", "prompts_of_round", "sample_round"]


def prompts_of_round(parts: TrainingParts, state: TrainingState) -> list[Prompt]:
    """The prompts from where the round begins, as many as it may take."""
    return parts.prompts.take(state.prompts_taken, parts.config.sampling.most_prompts())


def sample_round(parts: TrainingParts, state: TrainingState) -> SampledRound:
    """The next round's rewarded rollouts.

    With `dynamic = "refill"` further prompts follow, as many at a time as groups are dead, until
    `prompts_per_round` groups are live or the round may take no more. All of them are in `scored`.
    The round trains on the live ones and, if there are too few, on the first dead ones too, so
    that steps stay equally large.
    """
    wanted = parts.config.sampling.prompts_per_round
    prompts = prompts_of_round(parts, state)
    scored, seconds = _scored(parts, state, prompts[:wanted], refill=0)
    refill = 0
    while len(prompts) > (taken := len(scored.groups)) and wanted > (
        num_live := len(live_groups(scored.groups))
    ):
        refill += 1
        batch = prompts[taken : taken + wanted - num_live]
        more, more_seconds = _scored(parts, state, batch, refill=refill)
        scored = joined(scored, more)
        seconds = (seconds[0] + more_seconds[0], seconds[1] + more_seconds[1])
    live = live_groups(scored.groups)
    _warn(parts, state, scored, num_live=len(live))
    dead = [place for place in range(len(scored.groups)) if place not in live]
    trained = sorted((live + dead)[:wanted])
    return SampledRound(
        scored=scored,
        trained=tuple(trained),
        rollout_seconds=seconds[0],
        reward_seconds=seconds[1],
    )


def live_groups(groups: Sequence[Group]) -> list[int]:
    """Places of the groups whose rewards differ, so that they have a gradient."""
    rewards, valid = reward_table(groups)
    advantages = group_advantages(rewards, valid=valid, scale="none")
    is_live: list[bool] = (advantages != 0).any(dim=-1).tolist()
    return [place for place, live in enumerate(is_live) if live]


def _scored(
    parts: TrainingParts, state: TrainingState, prompts: Sequence[Prompt], *, refill: int
) -> tuple[ScoredGroups, tuple[float, float]]:
    """Groups of these prompts with rewards, and the seconds of sampling and of rewarding."""
    seed = parts.config.training.seed
    key: tuple[int | str, ...] = (seed, state.round)
    # After a roll-back the same draws would lead to the same trouble.
    key += ("attempt", state.attempt) if state.attempt else ()
    # A prompt that comes again in a refill of the same round draws anew.
    key += ("refill", refill) if refill else ()
    started = time.perf_counter()
    groups = parts.sample(prompts, settings=parts.sampling, key=key)
    sampled = time.perf_counter()
    scored = parts.score(groups, step=state.step, prompts_taken=state.prompts_taken)
    return scored, (sampled - started, time.perf_counter() - sampled)


def _warn(
    parts: TrainingParts, state: TrainingState, scored: ScoredGroups, *, num_live: int
) -> None:
    """Say what the round lacks: rollouts that a reward failed on, live groups."""
    number = state.round + 1
    for name, count in scored.component_errors.items():
        if count:
            parts.warn(
                f"round {number}: reward {name!r} failed on {count} of {scored.num_rollouts} "
                "rollouts, which are left out of training; their error is in rollouts.jsonl"
            )
    if scored.num_errors + scored.num_unrewarded == scored.num_rollouts:
        parts.warn(
            f"round {number}: none of the {scored.num_rollouts} rollouts has a reward, so the "
            "steps move nothing; each reward function failed on them or returned None"
        )
    sampling = parts.config.sampling
    if sampling.dynamic == "refill" and num_live < sampling.prompts_per_round:
        parts.warn(
            f"round {number}: {len(scored.groups)} prompts gave {num_live} live groups of the "
            f"{sampling.prompts_per_round} wanted; the round goes on with these. Make the task "
            "easier or harder, or raise sampling.group_size or sampling.max_extra_prompts"
        )
