"""A run of two processes is a run of one, to the rounding of sums; helpers are real processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import save_tiny
from tests.tiny_runs import kept_in, metric_lines, tiny_recipe, weights

from gmpo.assembly import TrainingParts, build_parts
from gmpo.config import RunConfig
from gmpo.data_parallel.leader import Leader
from gmpo.errors import ConfigError, NonFiniteError, NonFiniteLossError, ProcessLost
from gmpo.records import Group
from gmpo.resumption import Given
from gmpo.rewards import ScoredGroups
from gmpo.steps import build_steps, update_policy
from gmpo.training import train

WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "adapters and KL": {"lora": {"rank": 2}, "objective__kl_coefficient": 0.1},
    "KL and entropy": {
        "objective__kl_coefficient": 0.1,
        "objective__entropy_coefficient": 0.01,
    },
    "the plain engine": {"training__engine": "plain"},
}
Pair = tuple[TrainingParts, TrainingParts]


def recipe(model: str, *, processes: int, **changes: Any) -> RunConfig:
    # With a small epsilon AdamW's steps are of a gradient's sign, that of rounding near 0.
    steady = {"training__processes": processes, "training__adam_eps": 1e-3}
    return tiny_recipe(model, **steady, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=WAYS)
def pair(request: pytest.FixtureRequest, model: str) -> Iterator[Pair]:
    """The parts of a run of one process, and of one of two."""
    with ExitStack() as opened:
        alone, several = (
            opened.enter_context(
                closing(
                    build_parts(
                        recipe(model, processes=processes, **WAYS[request.param]), warn=print
                    )
                )
            )
            for processes in (1, 2)
        )
        assert isinstance(several.processes, Leader)
        yield alone, several


def drawn(parts: TrainingParts, *, round_number: int) -> list[Group]:
    prompts = parts.prompts.take(8 * round_number, 8)
    return parts.sample([*prompts, prompts[0]], settings=parts.sampling, key=(0, round_number))


def scored(parts: TrainingParts, groups: list[Group]) -> ScoredGroups:
    return parts.score(groups[:8], step=0, prompts_taken=0)


def assert_same_groups(one: list[Group], other: list[Group]) -> None:
    assert [group.prompt for group in one] == [group.prompt for group in other]
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left.rollouts, right.rollouts, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=1e-4)
            assert (a.first_version, a.last_version) == (b.first_version, b.last_version)


def moved(parts: TrainingParts) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in parts.policy.trained_weights().items()}


# Those without `pair` come first: a process is in one group at a time.


def test_a_run_of_two_processes_learns_what_one_of_one_does_and_is_resumed_by_one(
    model: str, tmp_path: Path
):
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path / f"of{processes}"
        train(recipe(model, processes=processes), folder=folders[processes], warn=kept_in([]))
    one, two = (metric_lines(folder, "round") for folder in folders.values())
    for left, right in zip(one, two, strict=True):
        assert left["rollout/reward"] == right["rollout/reward"]
        assert left["update/loss"] == pytest.approx(right["update/loss"], rel=1e-3, abs=1e-6)
    first, second = (
        weights(folder / "checkpoints" / "round-000002") for folder in folders.values()
    )
    assert all((first[name] - second[name]).abs().mean() < 1e-6 for name in first)
    said: list[str] = []
    train(recipe(model, processes=1), folder=folders[2], resume=True, warn=kept_in(said))
    assert any("processes was 2, is 1" in sentence for sentence in said), said


def test_a_helper_that_is_killed_ends_the_run_with_a_reason(model: str):
    with closing(build_parts(recipe(model, processes=2), warn=print)) as parts:
        assert isinstance(parts.processes, Leader)
        drawn(parts, round_number=0)
        helper = parts.processes._helpers._processes[0]
        helper.kill()
        with pytest.raises(ProcessLost, match=r"process 1 of this run ended \(signal 9\)"):
            drawn(parts, round_number=1)
    assert torch.distributed.is_initialized() is False


def test_what_a_helper_cannot_begin_with_is_the_runs_error(model: str, tmp_path: Path):
    for given in (Given(tokenizer=build_tokenizer()),):
        with pytest.raises(ConfigError, match="name them in the recipe"):
            build_parts(recipe(model, processes=2), warn=print, given=given)
    assert torch.distributed.is_initialized() is False


def build_tokenizer() -> Any:
    from tests.models import character_tokenizer

    return character_tokenizer()


def test_a_policy_that_has_diverged_is_told_by_whichever_process_meets_it(model: str):
    with closing(build_parts(recipe(model, processes=2), warn=print)) as parts:
        groups = scored(parts, drawn(parts, round_number=0)).groups
        for weight in parts.policy.masters.values():
            weight.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError):
            update_policy(
                parts, groups, first_step=0, may_trust_sampler=False, measures_cosine=False
            )


def test_rounds_of_two_processes_are_those_of_one(pair: Pair):
    alone, several = pair
    for number in range(2):  # the second round's draws are of weights that have moved
        groups = drawn(alone, round_number=number)
        assert_same_groups(groups, drawn(several, round_number=number))
        # The prompt that comes again has draws of its own.
        assert [r.token_ids.tolist() for r in groups[0].rollouts] != [
            r.token_ids.tolist() for r in groups[8].rollouts
        ]
        updates = []
        for parts in pair:
            before = moved(parts)
            trained = scored(parts, groups).groups
            updates.append(
                update_policy(
                    parts,
                    trained,
                    first_step=4 * number,
                    may_trust_sampler=True,
                    measures_cosine=number == 1,
                )
            )
            parts.publish_weights(4 * (number + 1))
            assert any(not torch.equal(w, before[name]) for name, w in moved(parts).items())
        one, two = updates
        assert one.mismatch is not None
        assert two.mismatch is not None
        assert one.mismatch.num_tokens == two.mismatch.num_tokens
        for left, right in zip(one.steps, two.steps, strict=True):
            assert left.metrics.keys() == right.metrics.keys()
            assert sorted(left.measures.row_names) == sorted(right.measures.row_names)
            for name, value in left.metrics.items():
                assert value == pytest.approx(right.metrics[name], rel=2e-3, abs=2e-5), name
        for name, weight in moved(alone).items():
            apart = (weight - moved(several)[name]).abs()
            assert apart.mean() < 2e-6, name


def test_shares_are_really_computed_elsewhere(pair: Pair):
    _, several = pair
    steps = build_steps(several, scored(several, drawn(several, round_number=3)).groups)
    assert all(len(step.micro_batches) != 1 for step in steps)
    asked: list[str] = []
    leader = several.processes
    assert isinstance(leader, Leader)
    ask = leader._helpers.ask

    def told(requests: Any) -> None:
        asked.extend(request.name for request in requests)
        ask(requests)

    leader._helpers.ask = told  # type: ignore[method-assign]
    try:
        live = next(step for step in steps if step.micro_batches)
        leader.accumulate(live, several.loss, is_old_policy=True)
    finally:
        leader._helpers.ask = ask  # type: ignore[method-assign]
        several.policy.forget_gradients()
    assert asked[-2:] == ["accumulate", "gradients"]


def test_what_a_helper_raises_is_raised_here_and_the_next_step_is_whole(pair: Pair):
    alone, several = pair
    several.policy.load_weights(
        alone.policy.trained_weights().items()
        if several.policy.adapters
        else alone.policy.own_weights()
    )
    groups = drawn(alone, round_number=4)
    # Small enough for each to have several, so that the helper has a gradient before it fails.
    training = several.config.training.model_copy(update={"max_tokens_per_micro_batch": 20})
    small = several.under(several.config.model_copy(update={"training": training}))
    steps = build_steps(small, scored(several, groups).groups)
    step = next(step for step in steps if len(step.micro_batches) > 3)
    leader = several.processes
    from gmpo.data_parallel import shares_of_batches

    theirs = shares_of_batches(step.micro_batches, 2)[1][-1]
    batches = list(step.micro_batches)
    batches[theirs] = replace(
        batches[theirs], advantages=torch.full_like(batches[theirs].advantages, float("inf"))
    )
    broken = replace(step, micro_batches=tuple(batches))
    with pytest.raises(NonFiniteLossError, match=re.escape(batches[theirs].row_names[0])):
        leader.accumulate(broken, several.loss, is_old_policy=True)
    found = []
    for parts in pair:
        parts.policy.forget_gradients()
        parts.processes.accumulate(step, parts.loss, is_old_policy=True)
        found.append(
            {n: w.grad.clone() for n, w in parts.policy.masters.items() if w.grad is not None}
        )
        parts.policy.forget_gradients()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-4 * max(scale, 1e-6))
