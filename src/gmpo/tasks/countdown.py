"""Countdown: make a target from given numbers, each used exactly once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

from gmpo.errors import DataError
from gmpo.records import Message, Prompt
from gmpo.tasks.task import Task

__all__ = ["countdown_task"]

_ATTEMPTS_PER_ITEM = 50


def countdown_task(  # noqa: PLR0913  (plain keywords, so that a recipe table maps onto them)
    *,
    num_numbers: int = 3,
    max_number: int = 20,
    max_target: int = 100,
    held_out_items: int = 200,
    train_items: int = 2000,
    split_seed: int = 0,
    instruction: str = "Answer with just the expression.",
) -> Task:
    """Questions like "Make 26 from 3, 5 and 7 ...", each with at least one solution.

    Numbers are drawn from 1 to `max_number`, then joined by random operations whose results are
    all whole numbers; the outcome is the target. An item is the sorted numbers with the target,
    and is on one side only. Columns: `answer` (one solution), `numbers`, `target`, `key`, and
    `grading` = "countdown", which says that any right expression counts, not this answer alone.

    Args:
        num_numbers: numbers given, 2 to 8.
        max_number: largest number given, at least 1.
        max_target: largest target; targets are at least 1.
        held_out_items: held-out prompts, 0 or more.
        train_items: training prompts, at least 1.
        split_seed: decides which items are drawn, and which of them are held out.
        instruction: put after the question; may be empty.

    Raises:
        DataError: an argument is outside its range, or too few items were found.
    """
    if not (2 <= num_numbers <= 8 and max_number >= 1 and max_target >= 1):
        raise DataError(
            f"num_numbers is {num_numbers}, max_number {max_number} and max_target {max_target}; "
            "they must be 2 to 8, at least 1, and at least 1"
        )
    if held_out_items < 0 or train_items < 1:
        raise DataError(
            f"held_out_items is {held_out_items} and train_items {train_items}; "
            "they must be at least 0 and 1"
        )
    rng = random.Random(f"countdown {split_seed}")
    wanted = held_out_items + train_items
    found: dict[str, Prompt] = {}
    for _ in range(_ATTEMPTS_PER_ITEM * wanted):
        if len(found) == wanted:
            break
        numbers = [rng.randint(1, max_number) for _ in range(num_numbers)]
        target, solution = _random_solution(numbers, rng)
        if 1 <= target <= max_target:
            prompt = _prompt(numbers, target, solution, instruction)
            found.setdefault(prompt.columns["key"], prompt)
    if len(found) < wanted:
        raise DataError(
            f"{len(found)} different items were found, but held_out_items={held_out_items} and "
            f"train_items={train_items} need {wanted}; lower them, or raise max_number, "
            "max_target or num_numbers"
        )
    prompts = tuple(found.values())
    return Task(
        name="countdown",
        train=prompts[held_out_items:],
        held_out=prompts[:held_out_items],
        instruction=instruction,
    )


def _random_solution(numbers: Sequence[int], rng: random.Random) -> tuple[int, str]:
    """A target and the expression that makes it, from joining two random parts until one is left.

    A division is only chosen where it comes out even, so every part is a whole number.
    """
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (left, left_text), (right, right_text) = parts.pop(), parts.pop()
        results = {"+": left + right, "-": left - right, "*": left * right}
        if right != 0 and Fraction(left, right).denominator == 1:
            results["/"] = left // right
        operator = rng.choice(list(results))
        parts.append((results[operator], f"({left_text} {operator} {right_text})"))
    value, text = parts[0]
    return value, text[1:-1]


def _prompt(numbers: Sequence[int], target: int, solution: str, instruction: str) -> Prompt:
    shown = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    question = f"Make {target} from {shown}. Use each number exactly once, with +, -, * and /."
    key = ",".join(map(str, sorted(numbers))) + f"={target}"
    return Prompt(
        id="countdown-" + key,
        messages=(Message(role="user", content=f"{question} {instruction}".strip()),),
        columns={
            "answer": solution,
            "numbers": tuple(numbers),
            "target": target,
            "key": key,
            "grading": "countdown",
        },
    )
