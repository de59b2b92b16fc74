"""The same rounds through TRL 1.16's trainers and through gmpo move the weights alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scripts.replay import (
    LIMITS,
    Replayed,
    advantages_of,
    relative_difference,
    through_gmpo,
    through_trl,
)
from tests.models import character_tokenizer, tiny_model
from tests.trl_trainers import rounds_of, tolerated

from gmpo.objective import ObjectiveTerms, gmpo_no_clip_terms, gmpo_terms, grpo_terms

pytestmark = tolerated

pairs = pytest.mark.parametrize(
    ("objective", "optimizer"),
    [(objective, optimizer) for objective in ("gmpo", "grpo") for optimizer in LIMITS],
)


@functools.cache
def replayed(objective: str, optimizer: str) -> Replayed:
    return through_trl(tiny_model(), character_tokenizer(), rounds_of(objective, optimizer))


def difference(
    objective: str,
    optimizer: str,
    *,
    engine: str = "fast",
    loss: Callable[..., ObjectiveTerms] | None = None,
) -> float:
    """Of gmpo's update from TRL's, relative; a `loss` stands in for the objective."""
    theirs = replayed(objective, optimizer)
    rounds = rounds_of(objective, optimizer)
    update, _ = through_gmpo(tiny_model(), rounds, theirs.steps, engine=engine, objective=loss)
    return relative_difference(update, theirs.update)


@pairs
@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_trls_trainer_and_gmpo_move_the_weights_alike(objective: str, optimizer: str, engine: str):
    gap = difference(objective, optimizer, engine=engine)
    print(f"\n{objective} {optimizer} {engine}: |d_gmpo - d_trl| / |d_trl| = {gap:.2e}")
    assert gap <= LIMITS[optimizer]


@pairs
def test_in_fp64_nothing_is_left_but_trls_advantages_and_head_in_fp32(
    objective: str, optimizer: str
):
    rounds = rounds_of(objective, optimizer)
    wide = {"dtype": torch.float64}
    theirs = through_trl(tiny_model(**wide), character_tokenizer(), rounds)
    ours, _ = through_gmpo(tiny_model(**wide), rounds, theirs.steps)
    assert relative_difference(ours, theirs.update) <= 2e-6


@pairs
def test_the_replay_leaves_the_first_ratio_and_clips_tokens_on_both_sides(
    objective: str, optimizer: str
):
    rounds, theirs = rounds_of(objective, optimizer), replayed(objective, optimizer)
    _, figures = through_gmpo(tiny_model(), rounds, theirs.steps)
    assert min(each["ratio/min"] for each in figures) < 0.5
    assert max(each["ratio/max"] for each in figures) > 2
    assert sum(each["clip/low_fraction"] for each in figures) > 0
    assert sum(each["clip/high_fraction"] for each in figures) > 0


def test_trl_shuffles_rows_so_that_a_step_holds_parts_of_groups():
    steps = replayed("gmpo", "sgd").steps
    assert [len(rows) for rows in steps] == [4] * 8
    assert len({row for rows in steps for row in rows}) == 32
    assert any(len({prompt for prompt, _ in rows}) > 1 for rows in steps)


def test_both_give_every_row_the_same_advantage():
    theirs = replayed("gmpo", "sgd").advantages
    ours = advantages_of(rounds_of("gmpo", "sgd").groups)
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    assert min(ours.values()) < 0 < max(ours.values())
    assert any(value == 0 for value in ours.values())


def sign_flipped(**tensors: Any) -> ObjectiveTerms:
    terms = gmpo_terms(**tensors)
    return replace(terms, loss=-terms.loss)


def clipped_on_the_open_side(**tensors: Any) -> ObjectiveTerms:
    terms = gmpo_terms(**{**tensors, "advantages": -tensors["advantages"]})
    return replace(terms, loss=-terms.loss)


WRONG = {
    "the sign flipped": sign_flipped,
    "the clip on the wrong side": clipped_on_the_open_side,
    "no clip": gmpo_no_clip_terms,
    "the arithmetic mean": grpo_terms,
}


@pytest.mark.parametrize("optimizer", list(LIMITS))
@pytest.mark.parametrize("fault", list(WRONG))
def test_a_wrong_loss_does_not_pass_as_parity(fault: str, optimizer: str):
    gap = difference("gmpo", optimizer, loss=WRONG[fault])
    print(f"\n{fault}, {optimizer}: {gap:.2e}")
    assert gap > 3 * LIMITS[optimizer]


def test_a_gradient_of_twice_the_size_does_not_pass_with_sgd():
    def doubled(**tensors: Any) -> ObjectiveTerms:
        terms = gmpo_terms(**tensors)
        return replace(terms, loss=2 * terms.loss)

    assert difference("gmpo", "sgd", loss=doubled) > 0.1
