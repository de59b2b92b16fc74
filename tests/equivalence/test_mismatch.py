"""What happens when the sampler's log-probabilities are not the trainer's."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo.assembly import TrainingParts, build_parts
from gmpo.batch import StepBatch
from gmpo.steps import build_steps, run_steps


def shifted(steps: list[StepBatch], nats: float) -> list[StepBatch]:
    """The same steps from a sampler whose log-probabilities are off by so much."""

    def off(step: StepBatch) -> StepBatch:
        batches = (
            replace(
                batch,
                sampler_logprobs=batch.sampler_logprobs + nats,
                old_logprobs=batch.old_logprobs + nats,
            )
            for batch in step.micro_batches
        )
        return replace(step, micro_batches=tuple(batches))

    return [off(step) for step in steps]


def parts_and_steps(folder: Path) -> tuple[TrainingParts, list[StepBatch]]:
    parts = build_parts(tiny_recipe(save_tiny(folder)), warn=print)
    groups = parts.sample(parts.prompts.take(0, 8), settings=parts.sampling, key=(0, 0))
    steps = build_steps(parts, parts.score(groups, step=0, prompts_taken=0).groups)
    assert steps[0].micro_batches, "the first step needs live rows for this test"
    return parts, steps


def weights(parts: TrainingParts) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in parts.policy.named_weights()])


def test_a_sampler_within_the_bounds_is_trusted(tmp_path: Path):
    parts, steps = parts_and_steps(tmp_path / "model")
    with closing(parts):
        update = run_steps(parts, steps, first_step=0, measures_cosine=False, trusts_sampler=True)
    assert update.used_sampler_logprobs
    assert update.mismatch is not None and update.mismatch.is_small
    assert len(update.steps) == len(steps)


def test_a_sampler_beyond_the_bounds_restarts_the_round_as_if_never_trusted(tmp_path: Path):
    parts, steps = parts_and_steps(tmp_path / "one")
    with closing(parts):
        update = run_steps(
            parts, shifted(steps, 0.2), first_step=0, measures_cosine=False, trusts_sampler=True
        )
        redone = weights(parts)
    mismatch = update.mismatch
    assert not update.used_sampler_logprobs
    assert mismatch is not None and not mismatch.is_small
    # 0.2 nats off everywhere, up to the rounding of two kernels.
    assert abs(mismatch.mean - 0.2) < 1e-4
    assert update.steps[0].metrics["ratio/min"] == update.steps[0].metrics["ratio/max"] == 1.0

    parts, steps = parts_and_steps(tmp_path / "two")
    with closing(parts):
        run_steps(parts, steps, first_step=0, measures_cosine=False, trusts_sampler=False)
        never_trusted = weights(parts)
    assert torch.equal(redone, never_trusted)
