"""New rows of known tasks are held against the champion's samples, those of new tasks are not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.tiny_runs import tiny_recipe

from gmpo.continual.batch import apart_from_suites, checked_batch
from gmpo.continual.demo import default_settings, larger_of_two_and_three
from gmpo.continual.plan import LearnPlan, write_rows
from gmpo.errors import DataError
from gmpo.records import Prompt


def sums(count: int, *, category: str = "sum", wrong: int = 0, start: int = 0) -> list[dict]:
    return [
        {
            "prompt": f"What is {n} + {n}?",
            "answer": str(2 * n + wrong),
            "category": category,
        }
        for n in range(start, start + count)
    ]


class KnowsSums:
    """A champion that adds rightly, three times of four."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[str]]:
        self.asked += [prompt.messages[0].content for prompt in prompts if prompt.messages]
        return [self._answers(prompt) for prompt in prompts]

    def _answers(self, prompt: Prompt) -> list[str]:
        assert prompt.messages is not None
        n = int(prompt.messages[0].content.split()[2])
        return [str(2 * n)] * 3 + ["no idea"]


@pytest.fixture
def champion() -> KnowsSums:
    return KnowsSums()


def checked(champion: KnowsSums, tmp_path: Path, rows: list[dict], earlier: list[dict]):
    suite = tmp_path / "suite.jsonl"
    write_rows(suite, sums(5, start=900))
    plan = LearnPlan(recipe=tiny_recipe("unused"), suites={"old": str(suite)})
    return checked_batch(plan, rows, earlier, sampler=champion, seed=0)


def test_wrong_answers_of_a_known_task_refuse_the_batch(champion: KnowsSums, tmp_path: Path):
    earlier = sums(60)
    good = checked(champion, tmp_path, sums(40, start=100), earlier).step(min_rows=20)
    assert good.passed, good.sentence
    bad = checked(champion, tmp_path, sums(40, start=200, wrong=1), earlier).step(min_rows=20)
    assert not bad.passed
    assert bad.reason is not None
    assert "poisoned" in bad.reason
    assert bad.reason.startswith("Data validation failed: ")


def test_the_champion_is_no_judge_of_a_task_that_it_has_not_learned(
    champion: KnowsSums, tmp_path: Path
):
    new = sums(30, category="other sums", wrong=1, start=300)
    batch = checked(champion, tmp_path, [*new, *sums(25, start=100)], sums(60))
    assert batch.step(min_rows=20).passed
    assert len(batch.accepted) == 55
    assert not any("What is 300 +" in text for text in champion.asked)
    details = batch.step(min_rows=20).details
    assert details["known tasks"]["counts"]["accepted"] == 25
    assert details["new tasks"]["counts"]["accepted"] == 30


def test_rows_of_a_known_task_that_are_all_rejected_do_not_refuse_those_of_a_new_one(
    champion: KnowsSums, tmp_path: Path
):
    new = sums(30, category="other sums", start=300)
    batch = checked(champion, tmp_path, [*new, *sums(3)], sums(60)).step(min_rows=20)
    assert batch.passed, batch.sentence
    assert batch.details["known tasks"]["counts"]["accepted"] == 0
    # More than half of all rows are another matter.
    many = checked(champion, tmp_path, [*new, *sums(31)], sums(60)).step(min_rows=20)
    assert many.reason == "Data validation failed: too_many_rejected"
    assert many.sentence.endswith("more than 50% of the rows are rejected")


def test_nothing_that_judges_a_candidate_is_trained_on(champion: KnowsSums, tmp_path: Path):
    files = {"suite": sums(5, start=900), "live": sums(5, start=950)}
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    plan = LearnPlan(
        recipe=tiny_recipe("unused"),
        suites={"old": str(tmp_path / "suite.jsonl")},
        gateway="http://127.0.0.1:1/v1",
        traffic=str(tmp_path / "live.jsonl"),
    )
    # Earlier rows may be older than the suite; some of the new ones are asked live.
    kept, left_out = apart_from_suites([*sums(7), *files["suite"], *files["live"][:2]], plan)
    assert (kept, left_out) == (sums(7), 7)
    assert apart_from_suites([], plan) == ([], 0)
    new = checked_batch(plan, [*sums(30), *files["live"]], [], sampler=None, seed=0)
    assert list(new.accepted) == sums(30)
    reasons = {reason["check"] for one in new.rejected for reason in one["reasons"]}
    assert reasons == {"contamination"}


def test_rows_known_by_now_are_left_out_and_too_few_are_refused(
    champion: KnowsSums, tmp_path: Path
):
    again = checked(champion, tmp_path, sums(40), sums(60)).step(min_rows=20)
    assert again.reason == "Data validation failed: no_row_left"
    few = checked(champion, tmp_path, sums(5, start=400), sums(60)).step(min_rows=20)
    assert few.reason == "Data validation failed: too_few_rows"
    held_out = checked(champion, tmp_path, sums(5, start=900), sums(60))
    assert held_out.accepted == []
    with pytest.raises(DataError, match="holds no row"):
        checked(champion, tmp_path, [], sums(60))


def test_the_demonstrations_items_are_never_learned():
    rows = larger_of_two_and_three()
    assert len(rows.old_held_out) == 1000
    held_out = {row["prompt"] for row in (*rows.old_held_out, *rows.new_held_out)}
    learned = [row["prompt"] for row in (*rows.old, *rows.new)]
    assert not held_out & set(learned)
    assert len(set(learned)) == len(learned)
    sizes = {2: (*rows.old, *rows.old_held_out), 3: (*rows.new, *rows.new_held_out)}
    for size, of_task in sizes.items():
        for row in of_task:
            numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
            assert len(numbers) == size and row["answer"] == str(max(numbers))


@pytest.mark.real_model
def test_the_demonstrations_settings_are_a_plan():
    settings = default_settings()
    assert settings.recipe.lora.rank
    assert len(settings.rows.old) > 5 * settings.batch_rows
