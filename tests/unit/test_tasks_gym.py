"""reasoning-gym's tasks, from the real library: what is drawn, refused, and called right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from gmpo.errors import DataError
from gmpo.grading import Grader, Verdict
from gmpo.grading.gym import GymItem, GymProcess, GymSpec, gym_answer
from gmpo.records import Prompt
from gmpo.tasks import Task, gym_task
from gmpo.tasks import gym as gym_module
from gmpo.tasks.splits import question_text

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def make(name: str, **arguments: Any) -> Task:
    return gym_task(**{"name": name, "train_items": 6, "held_out_items": 2, **arguments})


def refusal(name: str, **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        make(name, **arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(time_limit_seconds=5.0) as shared:
        yield shared


@pytest.fixture(scope="module")
def process() -> Iterator[GymProcess]:
    with GymProcess() as shared:
        yield shared


def prompt_of(process: GymProcess, name: str, index: int = 0) -> Prompt:
    """One item as `gym_task` would make it, without waiting for a process of its own."""
    spec = GymSpec(name=name, seed=7, size=50)
    return gym_module._prompt(process.item(spec, index), vars(spec))


# What is drawn


def test_no_question_is_on_both_sides_and_none_is_repeated():
    # Two terms of one digit have 200 questions, so 160 of them cannot be drawn without repeats.
    one_digit = {**SUMS, "max_digits": 1}
    task = make("chain_sum", options=one_digit, train_items=120, held_out_items=40)
    train, held_out = (
        [question_text(prompt) for prompt in side] for side in (task.train, task.held_out)
    )
    assert (len(train), len(held_out)) == (120, 40)
    assert len({*train, *held_out}) == 160
    assert len({prompt.id for prompt in (*task.train, *task.held_out)}) == 160


def test_the_seed_of_the_split_decides_the_items_and_nothing_else_does():
    first, again = (make("word_ladder", instruction="Think.") for _ in range(2))
    # word_ladder depends on the order of a set, which differs between processes by default.
    assert first == again
    assert make("word_ladder", split_seed=1).train != first.train
    (message,) = first.train[0].messages or ()
    assert message.content.endswith("\nThink.")


def test_tasks_can_be_mixed():
    parts = [
        {"name": "gcd", "weight": 1.0, "config": {}},
        {"name": "chain_sum", "weight": 1.0, "config": SUMS},
    ]
    task = make("composite", options={"datasets": parts}, train_items=20)
    questions = " ".join(question_text(prompt) for prompt in task.train)
    assert "greatest common divisor" in questions
    assert "arithmetic problem" in questions


# The scorers' traps: each is first shown to be there


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chain_sum", "{answer} or not"),  # part of a point for holding the answer
        ("spell_backward", "zzz"),  # 0.17 for letters that happen to stand right
        ("countdown", "zzz"),  # a floor for any text
        ("fraction_simplification", "zzz"),
        ("sentence_reordering", "zzz"),
        ("color_cube_rotation", "zzz"),
    ],
)
def test_part_of_a_point_is_wrong(process: GymProcess, grader: Grader, name: str, text: str):
    spec = GymSpec(name=name, seed=7, size=50)
    for index in range(20):
        prompt = prompt_of(process, name, index)
        answer = text.format(answer=prompt.columns["answer"])
        entry = prompt.columns["gym_entry"]
        score = process.score(spec, entry, answer, limit_seconds=10.0)
        assert score is not None and score.value is not None
        if 0 < score.value < 1:
            break
    else:
        pytest.fail(f"{name} gave no part of a point in 20 items, so there is no trap to test")
    verdict = grader.grade_item(f"<answer>{answer}</answer>", prompt.columns)
    assert (verdict.is_correct, verdict.status, verdict.method) == (False, "graded", "gym")
    right = grader.grade_item(f"<answer>{prompt.columns['answer']}</answer>", prompt.columns)
    assert right.is_correct


def test_a_completion_stuffed_with_numbers_is_judged_by_its_last(
    process: GymProcess, grader: Grader
):
    prompt = prompt_of(process, "chain_sum")
    right = prompt.columns["answer"]
    assert grader.grade_item(f"It is 1 and 2, so {right}.", prompt.columns).is_correct
    assert not grader.grade_item(f"7 {right} 9 10 11", prompt.columns).is_correct
    assert not grader.grade_item(f"<answer>7 {right} 9</answer>", prompt.columns).is_correct
    assert grader.grade_item("no idea", prompt.columns).status == "no_answer"


def test_a_scorer_that_finds_the_answer_in_any_text_sees_the_last_line_alone(
    process: GymProcess, grader: Grader
):
    prompt = prompt_of(process, "knights_knaves")
    right, spec = prompt.columns["answer"], GymSpec(**prompt.columns["gym"])
    stuffed = f"7 {right} 9 10 11"
    score = process.score(spec, prompt.columns["gym_entry"], stuffed, limit_seconds=10.0)
    assert score is not None and score.value == 1.0
    assert not grader.grade_item(f"{stuffed}\nI cannot say.", prompt.columns).is_correct
    assert grader.grade_item(f"Let me see.\n{right}", prompt.columns).is_correct


def test_a_scorer_that_raises_makes_the_answer_wrong_and_is_counted_and_named(
    process: GymProcess,
):
    notes: list[str] = []
    prompt = prompt_of(process, "prime_factorization")
    with Grader(time_limit_seconds=5.0, warn=notes.append) as grader:
        verdicts = [grader.grade_item(f"<answer>{a}</answer>", prompt.columns) for a in ("zz", "y")]
        assert grader.counts["scorer_errors"] == 2
        assert grader.counts["gym"] == grader.counts["worker_restarts"] == 0
        assert grader.grade_item(prompt.columns["answer"], prompt.columns).is_correct
    error = "ValueError: invalid literal for int() with base 10: 'zz'"
    assert verdicts[0] == Verdict(
        is_correct=False, status="scorer_error", answer="zz", method="none", error=error
    )
    assert notes == [
        f"the scorer of 'prime_factorization' raised {error} on the answer 'zz'; such answers "
        "count as wrong, and as scorer errors"
    ]


def test_a_scorer_that_hangs_is_stopped_in_time_and_its_process_replaced(process: GymProcess):
    prompt = prompt_of(process, "countdown")
    with Grader(time_limit_seconds=2.0) as grader:
        right = prompt.columns["answer"]
        assert grader.grade_item(right, prompt.columns).is_correct
        start = time.monotonic()
        # Evaluated by a computer algebra system, with more digits than there are atoms.
        verdict = grader.grade_item("<answer>9**9**9**9</answer>", prompt.columns)
        assert time.monotonic() - start < 4.0
        assert (verdict.is_correct, verdict.status) == (False, "timeout")
        assert grader.grade_item(right, prompt.columns).is_correct
        assert grader.counts["timeouts"] == 1
        assert grader.counts["gym"] == 2


def test_a_process_that_was_killed_is_replaced_and_knows_the_item_again(process: GymProcess):
    prompt = prompt_of(process, "chain_sum")
    right = prompt.columns["answer"]
    with Grader(time_limit_seconds=30.0) as grader:
        assert grader.grade_item(right, prompt.columns).is_correct
        worker = grader._gym._worker
        assert worker is not None
        worker._process.kill()
        worker._process.wait()
        assert grader.grade_item(right, prompt.columns).is_correct
        assert grader.counts["worker_restarts"] == 1


def test_a_task_without_reference_answers_is_refused():
    assert refusal("propositional_logic") == (
        "item 0 of 'propositional_logic' has no reference answer, so neither its scorer can be "
        "checked nor an example shown; choose another task"
    )


def test_a_task_that_rewards_any_text_is_refused():
    assert refusal("game_of_life_halting") == (
        "the scorer of 'game_of_life_halting' gives a meaningless answer to item 0 1.0, so any "
        "text would be rewarded; choose another task"
    )


def test_an_item_whose_own_answer_is_not_right_is_left_out_and_counted(
    monkeypatch: pytest.MonkeyPatch,
):
    def item(self: GymProcess, spec: GymSpec, index: int) -> GymItem:
        score = 0.5 if index % 4 == 0 else 1.0
        return GymItem(
            question=f"{index}?", answer="1", entry="", reference_score=score, nonsense_score=0.0
        )

    monkeypatch.setattr(GymProcess, "item", item)
    # Items 1, 2, 3, 5, 6, 7, 9 and 10 are the first 8 that count; 0, 4 and 8 do not.
    task = make("any")
    assert task.notes() == [
        "task any: 3 items whose scorer does not give its own answer 1.0 left out"
    ]


# What an answer is


@pytest.mark.parametrize(
    ("text", "reference", "answer"),
    [
        ("12 + 7 = 19", "19", "19"),
        ("<answer>12 + 7</answer>", "19", "12 + 7"),
        (r"so \boxed{-3}", "-3", "-3"),
        ("first\n3 knights", "3 knights", "3 knights"),  # not the number alone
        ("at 12:30\nor 12:45", "12:30", "or 12:45"),
        ("1 2\n3 4\n", "1 2\n3 4", "1 2\n3 4"),
        ("thinking\n<answer>1 2\n3 4</answer>", "1 2\n3 4", "1 2\n3 4"),
        (" \n", "1 2\n3 4", None),
        ("", "yes", None),
        ("nothing", "19", None),
    ],
)
def test_the_answer_is_taken_in_the_form_of_the_reference(
    text: str, reference: str, answer: str | None
):
    assert gym_answer(text, reference) == answer


# What is refused


def test_unknown_names_and_options_are_refused_with_the_nearest():
    start = "reasoning-gym's 'chain_sum' cannot be made: "
    assert refusal("chain_sums") == (
        "reasoning-gym's 'chain_sums' cannot be made: LookupError: there is no such task; "
        "did you mean 'chain_sum'?"
    )
    for option in ("min_term", "seed"):
        assert refusal("chain_sum", options={option: 2}) == (
            f"{start}LookupError: it has no option {option!r}; allowed: ['allow_negation', "
            "'max_digits', 'max_terms', 'min_digits', 'min_terms']"
        )
    assert refusal("chain_sum", options={"min_terms": 3, "max_terms": 2}) == (
        f"{start}AssertionError: max_terms must be >= min_terms"
    )


def test_too_few_questions_and_impossible_numbers_are_refused():
    times_table = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert refusal("products", options=times_table, train_items=120) == (
        "1220 draws of 'products' gave 100 usable different questions, but held_out_items and "
        "train_items need 122; lower them, or widen task.options"
    )
    assert refusal("gcd", train_items=0) == (
        "held_out_items is 2 and train_items 0; they must be at least 0 and 1"
    )


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    def find_spec(name: str) -> ModuleSpec | None:
        assert name == "reasoning_gym"
        return None

    monkeypatch.setattr(gym_module, "find_spec", find_spec)
    assert refusal("gcd") == "task.kind = 'gym' needs reasoning-gym; pip install 'gmpo[gym]'"
