"""The same rounds through TRL 1.16's trainers and through gmpo move the weights alike."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # read when trl.experimental is imported

import pytest
from scripts.replay import (
    LIMITS,
    Replayed,
    Rounds,
    advantages_of,
    random_rounds,
    relative_difference,
    through_gmpo,
    through_trl,
)
from tests.models import character_tokenizer, tiny_model
from tests.rollout_groups import VOCABULARY

from gmpo.objective import ObjectiveTerms, gmpo_no_clip_terms, gmpo_terms, grpo_terms

# TRL passes an argument to transformers by a name that will be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

# Large enough for ratios from 0.3 to 12 and a few per cent of clipped tokens.
LEARNING_RATES = {"sgd": 0.1, "adamw": 0.01}
pairs = pytest.mark.parametrize(
    ("objective", "optimizer"),
    [(objective, optimizer) for objective in ("gmpo", "grpo") for optimizer in LIMITS],
)


@functools.cache
def rounds_of(objective: str, optimizer: str) -> Rounds:
    """Two rounds of 4 groups of 4 in 4 steps each; lengths from 1 to 9, one group in 4 is dead."""
    return random_rounds(
        vocabulary=VOCABULARY,
        prompt_lengths=[6, 7, 3, 1, 5, 2, 4, 8],
        group_size=4,
        longest=9,
        prompts_per_round=4,
        objective=objective,
        optimizer=optimizer,
        learning_rate=LEARNING_RATES[optimizer],
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
    assert any(1 < len({prompt for prompt, _ in rows}) for rows in steps)


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
