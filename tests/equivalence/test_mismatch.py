"""What happens when the sampler's log-probabilities are not the trainer's."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo.assembly import TrainingParts, build_parts
from gmpo.batch import StepBatch
from gmpo.steps import build_steps, run_steps
from gmpo.update import Mismatch, accumulate_gradients, with_old_logprobs


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


# By -1000 the ratio of a row with a negative advantage, which has no upper clip, is infinite.
@pytest.mark.parametrize("nats", [0.2, -1000.0])
def test_a_sampler_beyond_the_bounds_restarts_the_round_as_if_never_trusted(
    nats: float, tmp_path: Path
):
    parts, steps = parts_and_steps(tmp_path / "one")
    with closing(parts):
        update = run_steps(
            parts, shifted(steps, nats), first_step=0, measures_cosine=False, trusts_sampler=True
        )
        redone = weights(parts)
    mismatch = update.mismatch
    assert not update.used_sampler_logprobs
    assert mismatch is not None and not mismatch.is_small
    # So many nats off everywhere, up to the rounding of two kernels.
    assert mismatch.mean == pytest.approx(abs(nats), abs=1e-4, rel=1e-6)
    assert update.steps[0].metrics["ratio/min"] == update.steps[0].metrics["ratio/max"] == 1.0

    parts, steps = parts_and_steps(tmp_path / "two")
    with closing(parts):
        run_steps(parts, steps, first_step=0, measures_cosine=False, trusts_sampler=False)
        never_trusted = weights(parts)
    assert torch.equal(redone, never_trusted)


def test_gradients_of_a_call_that_was_interrupted_are_not_added_to_the_next_ones(tmp_path: Path):
    ended = []
    for name, is_interrupted in (("one", True), ("two", False)):
        parts, steps = parts_and_steps(tmp_path / name)
        with closing(parts):
            if is_interrupted:  # before its step was taken
                accumulate_gradients(parts.policy, steps[0], parts.loss, may_stay_narrow=True)
            run_steps(parts, steps, first_step=0, measures_cosine=False, trusts_sampler=True)
            ended.append(weights(parts))
    assert torch.equal(*ended)


def test_mismatches_of_parts_are_those_of_all_their_tokens():
    one = Mismatch(mean=0.1, max=0.2, num_tokens=1)
    other = Mismatch(mean=0.4, max=0.5, num_tokens=3)
    both = Mismatch.over([one, None, other])
    # (0.1 + 3 * 0.4) / 4 = 0.325
    assert both is not None
    assert both.mean == pytest.approx(0.325, rel=1e-15)
    assert (both.max, both.num_tokens) == (0.5, 4)
    assert Mismatch.over([None]) is None


def test_the_first_steps_own_scores_are_the_old_log_probabilities(tmp_path: Path):
    parts, steps = parts_and_steps(tmp_path / "model")
    masters = parts.policy.masters

    def gradients() -> list[torch.Tensor]:
        taken = [weight.grad for weight in masters.values() if weight.grad is not None]
        parts.optimizer.zero_gradients()
        return taken

    with closing(parts):
        # A wrong denominator on the step must not be used.
        step = shifted(steps, 0.3)[0]
        (rescored,), _ = with_old_logprobs(parts.policy, [step], temperature=1.0)
        accumulate_gradients(parts.policy, rescored, parts.loss)
        expected = gradients()
        measures = accumulate_gradients(parts.policy, step, parts.loss, is_old_policy=True)
        actual = gradients()
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert all(bool((terms.sequence_ratio == 1).all()) for terms in measures.terms)
