"""What a request's answer is graded by, and that a task's own scorer grades it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmpo.errors import ConfigError, DataError
from gmpo.recipe import dump_recipe, load_recipe
from gmpo.serving.backend import GenerationRequest
from gmpo.serving.judging import QualityRules, QualitySettings
from gmpo.serving.quality import FinishedChoice
from gmpo.serving.verifying import AnswerVerifier, GradedTask, graded_task

COUNTDOWN = GradedTask(
    kind="countdown",
    items={
        "c-1": {"grading": "countdown", "numbers": (3, 5, 7), "target": 26, "answer": "3 * 7 + 5"}
    },
    time_limit_seconds=2.0,
)


def recipe(folder: Path, task: str, more: str = "") -> str:
    path = folder / "own.toml"
    path.write_text(f"[task]\nheld_out_items = 2\n{task}\n{more}")
    return str(path)


@contextmanager
def verifying(task: GradedTask | None) -> Iterator[Any]:
    """A function from an answer and its request's metadata to the verdict; with its counts."""
    counts: Counter[str] = Counter()
    verifier = AnswerVerifier(task, counts)

    def verdict(text: str, metadata: object) -> bool | None:
        request = GenerationRequest(
            id="r", route="completions", model="m", prompt="p", body={"metadata": metadata}
        )
        choice = FinishedChoice(text=text, finish_reason="stop")
        (judged,) = asyncio.run(verifier.verified(request, [choice]))
        assert (judged.text, judged.finish_reason) == (text, "stop")
        return judged.verified

    verdict.counts = counts  # type: ignore[attr-defined]
    try:
        yield verdict
    finally:
        verifier.close()


@pytest.mark.parametrize(
    "metadata",
    [
        {"item": "c-1"},
        {"numbers": [3, 5, 7], "target": 26},
        {"numbers": "3, 5, 7", "target": "26"},  # as OpenAI's metadata has it: texts
        {"item": "c-1", "numbers": [1, 1], "target": 2},  # the item is what is graded
    ],
)
def test_any_right_expression_of_a_countdown_counts(metadata: dict[str, Any]):
    with verifying(COUNTDOWN) as verdict:
        assert verdict("5 + 7 * 3", metadata) is True  # not the item's own solution
        assert verdict("5 * 7 - 3", metadata) is False
        assert verdict("26", metadata) is False
        assert verdict.counts == Counter(verified=3)


@pytest.mark.parametrize(
    "metadata",
    [
        {"item": "c-2"},
        {"item": 1},
        {"item": ["c-1"]},
        {"numbers": [3, 5, 7]},
        {"target": 26},
        {"numbers": [], "target": 26},
        {"numbers": [3, "x"], "target": 26},
        {"numbers": [3, True], "target": 26},
        {"numbers": {"a": 3}, "target": 26},
        {"numbers": "3 5 7", "target": "2" * 5000},
        {"numbers": "3 5 7", "target": int("2" * 4000)},
        {"numbers": "3 5 7", "target": "-5"},
        {"numbers": "3 5 7", "target": -5},
        {"numbers": "3 5 7", "target": "26.0"},
        {"numbers": "3 5 7", "target": 26.0},
        {"numbers": "1" + 18 * "0", "target": 26},
        {"numbers": [10**18], "target": 26},
        {"numbers": "-3 5 7", "target": 26},
        {"numbers": [-3, 5, 7], "target": 26},
        {"numbers": "3 5 7", "target": "\u00b2\u2076"},
        {"reference": "3 * 7 + 5"},  # one solution of many: comparing with it would be unjust
    ],
)
def test_what_a_countdown_cannot_be_graded_by_is_counted(metadata: dict[str, Any]):
    with verifying(COUNTDOWN) as verdict:
        assert verdict("3 * 7 + 5", metadata) is None
        assert verdict.counts == Counter(not_verified=1)


@pytest.mark.parametrize("write", [int, str])
def test_a_number_and_its_text_have_one_limit(write: Any):
    longest = 10**18 - 1
    with verifying(COUNTDOWN) as verdict:
        assert (
            verdict(f"{longest} + 0", {"numbers": [write(longest), 0], "target": longest}) is True
        )
        assert verdict("3 - 3", {"numbers": [write(3), write(3)], "target": write(0)}) is True
        assert verdict(f"{longest} + 1", {"numbers": [longest, 1], "target": write(10**18)}) is None


@pytest.mark.parametrize("metadata", [None, {}, {"team": "blue"}, {"item": None}])
def test_a_request_that_wants_no_verdict_gets_none(metadata: object):
    for task in (None, COUNTDOWN):
        with verifying(task) as verdict:
            assert verdict("3 * 7 + 5", metadata) is None
            assert not verdict.counts


def test_without_a_task_only_a_reference_is_looked_at():
    with verifying(None) as verdict:
        assert verdict("The answer is 15", {"reference": "15"}) is True
        assert verdict("5 + 7 * 3", {"item": "c-1", "numbers": [3, 5, 7], "target": 26}) is None
        assert verdict.counts == Counter(verified=1)


def test_a_task_with_references_takes_the_requests_or_its_items(tmp_path: Path):
    task = graded_task(recipe(tmp_path, 'kind = "arithmetic"'))
    identity, columns = next(iter(task.items.items()))
    with verifying(task) as verdict:
        assert verdict(f"It is {columns['answer']}.", {"item": identity}) is True
        assert verdict("It is 7000.", {"item": identity}) is False
        assert verdict("It is 1/2.", {"reference": "0.5"}) is True


def test_an_item_of_reasoning_gym_is_judged_by_its_own_scorer(tmp_path: Path):
    options = "options = {min_terms = 2, max_terms = 2}\ntrain_items = 3"
    task = graded_task(recipe(tmp_path, f'kind = "gym"\nname = "chain_sum"\n{options}'))
    identity, columns = next(iter(task.items.items()))
    with verifying(task) as verdict:
        assert verdict(columns["answer"], {"item": identity}) is True
        assert verdict(f"{columns['answer']}1", {"item": identity}) is False
        # A client's record of an item would be unpickled: it is never looked at.
        own = {name: columns[name] for name in ("answer", "gym", "gym_entry", "grading")}
        assert verdict(columns["answer"], own) is None
        assert verdict(columns["answer"], {**own, "reference": columns["answer"]}) is None
        assert verdict.counts == Counter(verified=2, not_verified=1)


def test_a_grader_that_fails_is_counted_and_the_answer_is_served(tmp_path: Path):
    broken = GradedTask(kind="jsonl", items={"a": {"question": "?"}}, time_limit_seconds=2.0)
    with verifying(broken) as verdict:
        assert verdict("7", {"item": "a"}) is None
        assert verdict.counts == Counter(not_verified=1)


def test_a_run_folders_own_recipe_is_read(tmp_path: Path):
    own = load_recipe(recipe(tmp_path, 'kind = "countdown"\ntrain_items = 3'))
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(
        dump_recipe(
            own.model_copy(
                update={"reward": own.reward.model_copy(update={"timeout_seconds": 7.0})}
            )
        )
    )
    rules = QualityRules.of(QualitySettings(task=str(run)))
    assert rules.verifies and rules.task is not None
    assert rules.task.kind == "countdown" and len(rules.task.items) == 5
    assert rules.task.time_limit_seconds == 7.0


def test_a_task_without_a_scorer_of_single_answers_is_refused(tmp_path: Path):
    given = recipe(tmp_path, 'kind = "given"\ntrain_items = 3\ndigest = "d"')
    with pytest.raises(ConfigError, match=r"handed over in Python .* no scorer grades a single"):
        graded_task(given)
    measured = recipe(tmp_path, 'kind = "arithmetic"', '[evaluation]\nmeasure = "reward"')
    with pytest.raises(ConfigError, match=r"measures by its reward functions .* no scorer"):
        graded_task(measured)
    with pytest.raises(ConfigError, match="there is no recipe 'nothing'"):
        graded_task("nothing")
    missing = recipe(tmp_path, 'kind = "jsonl"\npath = "none.jsonl"')
    with pytest.raises(DataError, match=r"none\.jsonl"):
        graded_task(missing)
