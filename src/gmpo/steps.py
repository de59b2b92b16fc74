"""The optimizer steps of one round: batches, old log-probabilities, gradients, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gmpo.advantages import group_advantages
from gmpo.assembly import TrainingParts
from gmpo.batch import StepBatch, build_dead_batches, build_step, reward_table, split_steps
from gmpo.errors import AFTER_DIVERGING, NonFiniteError, NonFiniteLossError
from gmpo.objective import step_diagnostics
from gmpo.records import Group
from gmpo.schedules import learning_rate_factor
from gmpo.spikes import MOST_NON_FINITE, NormHistory, StepVerdict, judge_step, verdict_on_loss
from gmpo.update import Mismatch, StepMeasures, gradient_cosine

__all__ = [
    "RoundUpdate",
    "StepResult",
    "advantages_of",
    "build_steps",
    "run_steps",
    "update_policy",
]


_NO_NORMS = NormHistory()
_OF_A_BROKEN_LOSS = StepMeasures(
    loss=math.nan,
    terms=(),
    masks=(),
    row_names=(),
    kl_ref_k3=None,
    entropy=None,
    mismatch=None,
)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step: what its gradient was made of, and its figures by metric name.

    `verdict` is None where steps are not judged.
    """

    measures: StepMeasures
    metrics: dict[str, float]
    verdict: StepVerdict | None


@dataclass(frozen=True, kw_only=True)
class RoundUpdate:
    """A round's steps, with how far sampler and trainer were apart (None without a live row).

    `norms` is what is remembered of gradients; as it was given where steps are not judged.
    """

    steps: tuple[StepResult, ...]
    mismatch: Mismatch | None
    used_sampler_logprobs: bool
    norms: NormHistory


def update_policy(  # noqa: PLR0913 - all by keyword, and each is its own concern
    parts: TrainingParts,
    groups: Sequence[Group],
    *,
    first_step: int,
    may_trust_sampler: bool,
    measures_cosine: bool,
    measures_kl_ref: bool = False,
    norms: NormHistory = _NO_NORMS,
) -> RoundUpdate:
    """Move the policy by the round's optimizer steps, whose old policy is the one at its start.

    Args:
        parts: of the run.
        groups: the round's groups with rewards.
        first_step: optimizer steps done before, for the step-size schedule.
        may_trust_sampler: whether the last mismatch allows the sampler's log-probabilities.
        measures_cosine: whether to measure the gradient's cosine to GRPO's on the last step.
        measures_kl_ref: whether to measure the KL to the starting model on all rollouts of the last
            step, if there is no KL term, which measures it on all steps.
        norms: of the gradients before, for `guard.skip_steps`.
    """
    steps = build_steps(parts, groups)
    if measures_kl_ref:
        steps = _with_dead_rows(parts, steps, groups)
    steps = _with_reference(parts, steps, measures_kl_ref=measures_kl_ref)
    trusts_sampler = (
        may_trust_sampler
        and parts.config.training.engine == "fast"
        # bf16 kernels differ too much between sampling and scoring: do not even try.
        and parts.policy.dtype != torch.bfloat16
        # The mismatch is measured on the first step, before anything moves.
        and bool(steps[0].micro_batches)
    )
    return run_steps(
        parts,
        steps,
        first_step=first_step,
        measures_cosine=measures_cosine,
        trusts_sampler=trusts_sampler,
        norms=norms,
    )


def _with_dead_rows(
    parts: TrainingParts, steps: list[StepBatch], groups: Sequence[Group]
) -> list[StepBatch]:
    """Steps of which the last one has the rows that it leaves out beside it.

    Of its live rows alone the KL would be that of prompts which the policy neither always nor
    never gets right, and no figure at all where there are none.
    """
    if parts.reference is None or not steps[-1].num_skipped_rows:
        return steps
    training = parts.config.training
    places = split_steps(len(groups), steps_per_round=training.steps_per_round)[-1]
    dead = build_dead_batches(
        [groups[place] for place in places],
        advantages_of(parts, groups)[places.start : places.stop],
        max_tokens=training.max_tokens_per_micro_batch,
        shares_prompts=parts.policy.shares_prompts,
        device=parts.policy.device,
    )
    return [*steps[:-1], replace(steps[-1], dead_batches=dead)]


def _with_reference(
    parts: TrainingParts, steps: list[StepBatch], *, measures_kl_ref: bool
) -> list[StepBatch]:
    """Steps with the reference's log-probabilities where the loss or a measurement needs them."""
    if parts.reference is None:
        return steps
    has_term = parts.loss.kl_coefficient > 0
    first = 0 if has_term else len(steps) - 1 if measures_kl_ref else len(steps)
    temperature = parts.loss.temperature
    compared = parts.processes.reference_logprobs(steps[first:], temperature=temperature)
    return [*steps[:first], *compared]


def build_steps(parts: TrainingParts, groups: Sequence[Group]) -> list[StepBatch]:
    """Micro-batches of every optimizer step, with group-relative advantages."""
    config = parts.config
    advantages = advantages_of(parts, groups)
    has_extra_terms = (
        config.objective.kl_coefficient > 0 or config.objective.entropy_coefficient > 0
    )
    return [
        build_step(
            [groups[place] for place in places],
            advantages[places.start : places.stop],
            max_tokens=config.training.max_tokens_per_micro_batch,
            least_batches=parts.processes.num_processes,
            shares_prompts=parts.policy.shares_prompts,
            skips_dead_rows=config.training.engine == "fast" and not has_extra_terms,
            device=parts.policy.device,
        )
        for places in split_steps(len(groups), steps_per_round=config.training.steps_per_round)
    ]


def run_steps(
    parts: TrainingParts,
    steps: list[StepBatch],
    *,
    first_step: int,
    measures_cosine: bool,
    trusts_sampler: bool,
    norms: NormHistory = _NO_NORMS,
) -> RoundUpdate:
    """Gradient and AdamW step of each batch.

    If the sampler is trusted and its log-probabilities turn out to be too far from the trainer's,
    the round's steps start again with recomputed ones. That is seen on the first step at no extra
    pass, and before any weight has moved.
    """
    parts.optimizer.zero_gradients()  # of a call that was interrupted, or that raised
    of_later: Mismatch | None = None
    if not trusts_sampler:
        # The first step's own scores are the old policy's: it needs no pass of its own.
        later, of_later = parts.processes.old_logprobs(
            steps[1:], temperature=parts.loss.temperature
        )
        steps = [steps[0], *later]
    mismatch: Mismatch | None = None
    results = []
    for number, step in enumerate(steps):
        is_last = number == len(steps) - 1
        is_old_policy = number == 0 and not trusts_sampler
        measures, extra = _gradients(
            parts,
            step,
            measures_cosine=measures_cosine and is_last,
            is_old_policy=is_old_policy,
            # The sampler's log-probabilities may be why, and are left then.
            may_be_broken=parts.config.guard.skip_steps or (number == 0 and trusts_sampler),
        )
        if number == 0:
            mismatch = Mismatch.over([measures.mismatch, of_later])
            if trusts_sampler and not _fits_sampler(measures, mismatch):
                return run_steps(
                    parts,
                    steps,
                    first_step=first_step,
                    measures_cosine=measures_cosine,
                    trusts_sampler=False,
                    norms=norms,
                )
        result = _apply_step(parts, measures, first_step + number, norms)
        norms = result.verdict.history if result.verdict else norms
        results.append(replace(result, metrics=result.metrics | extra))
    return RoundUpdate(
        steps=tuple(results),
        mismatch=mismatch,
        used_sampler_logprobs=trusts_sampler,
        norms=norms,
    )


def advantages_of(parts: TrainingParts, groups: Sequence[Group]) -> torch.Tensor:
    """Advantages [P, G] of scored groups, by the recipe's scale."""
    rewards, valid = reward_table(groups)
    objective = parts.config.objective
    return group_advantages(
        rewards, valid=valid, scale=objective.scale(), eps=objective.advantage_eps
    )


def _gradients(
    parts: TrainingParts,
    step: StepBatch,
    *,
    measures_cosine: bool,
    is_old_policy: bool,
    may_be_broken: bool,
) -> tuple[StepMeasures, dict[str, float]]:
    """The step's gradient and, where it is measured, its cosine to GRPO's.

    Where it may be broken, a loss that is not finite is one of the measures, and leaves nothing
    else to be measured.
    """
    try:
        extra = {}
        if measures_cosine:
            extra = _gradient_cosine(parts, step, is_old_policy=is_old_policy)
        measures = parts.processes.accumulate(step, parts.loss, is_old_policy=is_old_policy)
    except NonFiniteLossError:
        if not may_be_broken:
            raise
        return _OF_A_BROKEN_LOSS, {}
    return measures, extra


def _fits_sampler(measures: StepMeasures, mismatch: Mismatch | None) -> bool:
    """Whether the sampler's log-probabilities may stay the old ones, by the round's first step."""
    # They may be why a loss is not finite, and then nothing has measured the mismatch.
    return math.isfinite(measures.loss) and (mismatch is None or mismatch.is_small)


def _apply_step(
    parts: TrainingParts, measures: StepMeasures, step_number: int, norms: NormHistory
) -> StepResult:
    """Move the weights, unless the step is left out; the step's figures."""
    training = parts.config.training
    learning_rate = training.learning_rate * learning_rate_factor(
        step_number,
        total_steps=training.rounds * training.steps_per_round,
        warmup_steps=training.warmup_steps,
        schedule=training.schedule,
        final_fraction=training.final_learning_rate_fraction,
    )
    verdicts: list[StepVerdict] = []

    def is_wanted(norm: float) -> bool:
        verdicts.append(judge_step(norm, norms))
        _require_an_end(verdicts[-1].history)
        return verdicts[-1].is_taken

    if parts.config.guard.skip_steps and not math.isfinite(measures.loss):
        parts.optimizer.zero_gradients()
        norm = math.nan
        verdicts.append(verdict_on_loss(norms))
        _require_an_end(verdicts[-1].history)
    else:
        norm = parts.optimizer.apply_step(
            learning_rate=learning_rate,
            clip_norm=training.gradient_clip_norm,
            is_wanted=is_wanted if parts.config.guard.skip_steps else lambda _: True,
        )
    verdict = verdicts[0] if verdicts else None
    metrics = {
        "update/loss": measures.loss,
        "update/gradient_norm": norm,
        "update/learning_rate": learning_rate,
        "update/live_rollouts": float(len(measures.row_names)),
    }
    if measures.terms:
        metrics |= step_diagnostics(measures.terms, measures.masks)
    if measures.kl_ref_k3 is not None:
        metrics["kl_ref/k3"] = measures.kl_ref_k3
    if measures.entropy is not None:
        metrics["update/entropy"] = measures.entropy
    if verdict is not None:
        metrics["update/skipped_steps_total"] = float(not verdict.is_taken)
    return StepResult(measures=measures, metrics=metrics, verdict=verdict)


def _require_an_end(history: NormHistory) -> None:
    """Skipping is for accidents: a policy whose gradients stay broken has to be looked at."""
    if history.non_finite_in_a_row > MOST_NON_FINITE:
        raise NonFiniteError(
            f"losses or gradients of {history.non_finite_in_a_row} steps in a row are not finite, "
            f"and guard.skip_steps leaves out at most {MOST_NON_FINITE}; the weights were not "
            f"moved. {AFTER_DIVERGING}"
        )


def _gradient_cosine(
    parts: TrainingParts, step: StepBatch, *, is_old_policy: bool
) -> dict[str, float]:
    """How far the objective's gradient points away from GRPO's."""
    if not step.micro_batches:
        return {}
    plain = replace(parts.loss, kl_coefficient=0.0, entropy_coefficient=0.0)
    cosine = gradient_cosine(
        parts.policy, step, settings=plain, other=parts.grpo_loss, is_old_policy=is_old_policy
    )
    return {"update/gradient_cosine_grpo": cosine}
