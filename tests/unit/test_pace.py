"""The trial that time is forecast from: what it times, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo import pace
from gmpo.assembly import TrainingParts, build_parts
from gmpo.batch import MicroBatch, build_step
from gmpo.pace import forecast_time
from gmpo.policy.score import TokenScores
from gmpo.records import Rollout


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingParts]:
    model = save_tiny(tmp_path_factory.mktemp("model"))
    config = tiny_recipe(
        model,
        sampling__max_new_tokens=12,
        sampling__max_rows=16,
        evaluation={"every_rounds": 1, "few_shot": 2, "items_during": 3},
        sampling__max_length=128,
    )
    built = build_parts(config, warn=lambda _: None)
    yield built
    built.close()


def never() -> bool:
    return False


def time_decoding(parts: TrainingParts) -> tuple[list[float], list[float]]:
    return pace._time_decoding(parts, parts.prompts.take(0, 8), rows=16, should_stop=never)


def timings(
    parts: TrainingParts,
    monkeypatch: pytest.MonkeyPatch,
    *,
    start: list[float],
    step: list[float],
    score: list[float],
) -> None:
    """Let the trial find these seconds."""
    monkeypatch.setattr(pace, "_time_decoding", lambda *_, **__: (start, step))
    monkeypatch.setattr(pace, "_time_scoring", lambda *_, **__: score)


def test_seconds_are_multiplied_up_by_hand(parts: TrainingParts, monkeypatch: pytest.MonkeyPatch):
    timings(parts, monkeypatch, start=[3.0], step=[1.0, 2.0], score=[10.0, 20.0])
    time = forecast_time(parts, parts.prompts.take(0, 8), rounds=2)
    # 64 completions in 4 waves of 16 rows, each a start and 12 steps; 4 updates of 3 passes
    assert time.round_seconds == (4 * (3 + 12 * 1) + 12 * 10, 4 * (3 + 12 * 2) + 12 * 20)
    # 5 items before and after in 3 ways, and 3 items after each of 2 rounds, 16 at once
    waves = (2 * 3 * 5 + 2 * 3) / 16
    assert time.evaluation_seconds == (waves * (3 + 12 * 1), waves * (3 + 12 * 2))
    assert time.run_seconds == tuple(
        2 * one + evaluation
        for one, evaluation in zip(time.round_seconds, time.evaluation_seconds, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 3),  # forward, and backward twice as long
        ({"training__engine": "plain"}, 4),  # old log-probabilities besides
        ({"model__dtype": "bf16"}, 4),
        ({"objective": {"kl_coefficient": 0.1}}, 4),  # the reference's besides
        ({"training__gradient_checkpointing": True}, 4),  # layers run again
        ({"lora": {"rank": 2}}, 2),  # frozen weights have no gradient
        ({"lora": {"rank": 2}, "training__gradient_checkpointing": True}, 3),
    ],
    ids=str,
)
def test_passes_that_a_recipe_adds_or_spares_are_counted(
    parts: TrainingParts,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    passes: int,
):
    timings(parts, monkeypatch, start=[0.0], step=[0.0], score=[10.0])
    changed = replace(parts, config=tiny_recipe("any", **changes))
    time = forecast_time(changed, parts.prompts.take(0, 8), rounds=2)
    assert time.round_seconds[0] == 4 * passes * 10


def test_measuring_the_gradient_cosine_is_part_of_the_run(
    parts: TrainingParts, monkeypatch: pytest.MonkeyPatch
):
    timings(parts, monkeypatch, start=[0.0], step=[0.0], score=[10.0])
    changed = replace(parts, config=tiny_recipe("any", training__gradient_cosine_every=2))
    time = forecast_time(changed, parts.prompts.take(0, 8), rounds=5)
    # five rounds of 4 steps of 3 passes, and twice two gradients of 3 passes
    assert time.run_seconds[0] == (5 * 4 * 3 + 2 * 2 * 3) * 10


def test_what_cannot_be_timed_before_is_named(parts: TrainingParts):
    assert forecast_time(parts, parts.prompts.take(0, 8), rounds=1).not_counted == ()
    config = tiny_recipe(
        "any",
        sampling__dynamic="refill",
        sampling__rollout="tools:rollout",
        reward={"weights": {"mine": 1.0}, "functions": {"mine": "own:mine"}},
    )
    changed = replace(parts, config=config)
    assert forecast_time(changed, parts.prompts.take(0, 8), rounds=1).not_counted == (
        "the rollout function's own work and further turns",
        "reward functions",
        "refilled groups",
    )


def test_a_step_of_many_micro_batches_is_timed_by_one(
    parts: TrainingParts, monkeypatch: pytest.MonkeyPatch
):
    rows: list[int] = []
    score = parts.policy.score

    def counted(batch: MicroBatch, **settings: Any) -> TokenScores:
        rows.append(len(batch.row_names))
        return score(batch, **settings)

    monkeypatch.setattr(parts.policy, "score", counted)
    training = parts.config.training.model_copy(update={"max_tokens_per_micro_batch": 70})
    changed = replace(parts, config=parts.config.model_copy(update={"training": training}))
    clock = iter(range(100))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    # 17 prompt tokens and 4 rows of 12 tokens fit into 70; a step has 16 rows.
    assert pace._time_scoring(changed, parts.prompts.take(0, 8), should_stop=never) == [4.0, 4.0]
    assert rows == [4, 4]


def with_sizes(parts: TrainingParts, *, group_size: int, budget: int) -> TrainingParts:
    config = parts.config
    sampling = config.sampling.model_copy(update={"group_size": group_size})
    training = config.training.model_copy(update={"max_tokens_per_micro_batch": budget})
    changed = config.model_copy(update={"sampling": sampling, "training": training})
    return replace(parts, config=changed)


# 1 is less than a row; a prompt of 17 tokens and 10 rows of 12 fit into 137; groups of 2 and of 5
# end within a micro-batch; 4,000 holds a whole step.
@pytest.mark.parametrize("group_size", [2, 5, 8])
@pytest.mark.parametrize("budget", [1, 40, 137, 138, 4000])
@pytest.mark.parametrize("repeats", [False, True], ids=["different", "one prompt twice"])
def test_the_micro_batch_of_the_trial_is_the_first_of_the_whole_step(
    parts: TrainingParts, group_size: int, budget: int, repeats: bool
):
    changed = with_sizes(parts, group_size=group_size, budget=budget)
    prompts = parts.prompts.take(0, 3)
    prompts += prompts[:1] if repeats else []
    whole = build_step(
        [pace._longest_group(prompt, group_size, 12) for prompt in prompts],
        torch.ones(len(prompts), group_size, dtype=torch.float64),
        max_tokens=budget,
        shares_prompts=parts.policy.shares_prompts,
        skips_dead_rows=False,
        device=parts.policy.device,
    ).micro_batches[0]
    found = pace._first_micro_batch(changed, prompts)
    assert len(found.row_names) == len(whole.row_names)
    for name in ("prompt_ids", "prompt_lengths", "prompt_of_row", "completion_ids", "mask"):
        assert torch.equal(getattr(found, name), getattr(whole, name))


def test_the_trial_makes_no_more_rows_than_it_times(
    parts: TrainingParts, monkeypatch: pytest.MonkeyPatch
):
    made: list[int] = []
    monkeypatch.setattr(pace, "Rollout", lambda **fields: made.append(1) or Rollout(**fields))
    changed = with_sizes(parts, group_size=1_000_000, budget=70)
    seconds = pace._time_scoring(changed, parts.prompts.take(0, 8), should_stop=never)
    assert len(made) == 70 // 12
    assert min(seconds) > 0


def test_a_slow_machine_is_timed_twice_and_no_more(
    parts: TrainingParts, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pace, "_TRIAL_SECONDS", 0.0)
    starts, steps = time_decoding(parts)
    assert (len(starts), len(steps)) == (1, 2)
    assert len(pace._time_scoring(parts, parts.prompts.take(0, 8), should_stop=never)) == 2
    assert parts.sampler.is_idle


def test_a_fast_machine_is_timed_four_times(parts: TrainingParts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pace, "_TRIAL_SECONDS", 60.0)
    starts, steps = time_decoding(parts)
    assert (len(starts), len(steps)) == (1, 4)
    assert len(pace._time_scoring(parts, parts.prompts.take(0, 8), should_stop=never)) == 4


def test_the_trial_leaves_weights_gradients_and_sampler_as_they_were(parts: TrainingParts):
    before = {name: weight.clone() for name, weight in parts.policy.named_weights()}
    time = forecast_time(parts, parts.prompts.take(0, 8), rounds=1)
    assert 0 < time.round_seconds[0] <= time.round_seconds[1]
    assert all(torch.equal(before[name], weight) for name, weight in parts.policy.named_weights())
    assert all(weight.grad is None for weight in parts.policy.masters.values())
    assert parts.sampler.is_idle


def test_a_prompt_that_comes_twice_in_a_round_is_tried_twice(parts: TrainingParts):
    prompt = parts.prompts.take(0, 8)[0]
    assert forecast_time(parts, [prompt] * 8, rounds=1).round_seconds[0] > 0


@pytest.mark.parametrize("asked_before", [0, 1, 3, 5])
def test_a_trial_that_is_asked_to_stop_times_no_more_and_leaves_the_sampler_idle(
    parts: TrainingParts, monkeypatch: pytest.MonkeyPatch, asked_before: int
):
    # A clock on which nothing takes long: 5 steps of decoding and 4 of scoring would be timed.
    clock = iter(range(10**6))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock) * 1e-3)
    asked, done = [0], [0]
    step, score = parts.sampler.step, parts.policy.score

    def should_stop() -> bool:
        asked[0] += 1
        return asked[0] > asked_before

    def stepped() -> Any:
        done[0] += 1
        return step()

    def scored(batch: MicroBatch, **settings: Any) -> TokenScores:
        done[0] += 1
        return score(batch, **settings)

    monkeypatch.setattr(parts.sampler, "step", stepped)
    monkeypatch.setattr(parts.policy, "score", scored)
    prompts = parts.prompts.take(0, 8)
    assert forecast_time(parts, prompts, rounds=1, should_stop=should_stop) is None
    assert done[0] == asked_before + (asked_before < 5)  # one more only drops what was asked
    assert parts.sampler.is_idle
