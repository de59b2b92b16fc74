"""Rows with planted faults, and a simulated model that solves them at a known rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from gmpo.data_checks.samples import Sampler
from gmpo.records import Prompt


def sums(count: int, *, seed: int = 0, least: int = 100) -> list[dict[str, Any]]:
    """Different sums of three-digit numbers, told in words of their own."""
    generator = random.Random(seed)
    names = ("Mina", "Joon", "Sora", "Hana", "Tae", "Yuri", "Bora", "Dohyun")
    things = ("apples", "stamps", "shells", "cards", "coins", "books", "stones", "buttons")
    rows = []
    for place in range(count):
        one, two = generator.randint(least, 999), generator.randint(least, 999)
        name, other = generator.sample(names, 2)
        thing = generator.choice(things)
        rows.append(
            {
                "id": f"{seed}-{place}",
                "prompt": f"{name} has {one} {thing}. {other} brings {two} more. How many?",
                "answer": str(one + two),
            }
        )
    return rows


def poisoned(rows: Sequence[dict[str, Any]], count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The same rows, of which so many have a wrong answer; those say so in `is_poisoned`."""
    generator = random.Random(seed)
    chosen = set(generator.sample(range(len(rows)), count))
    return [
        {**row, "answer": str(int(row["answer"]) + generator.randint(1, 9)), "is_poisoned": True}
        if place in chosen
        else dict(row)
        for place, row in enumerate(rows)
    ]


def simulated_sampler(
    *, num_samples: int = 8, least: float = 0.3, most: float = 0.95, seed: int = 0
) -> Sampler:
    """Solutions that give the true sum of a row's numbers at a rate that is the row's own.

    A wrong solution is off by something of its own, and by the same thing half of the time: a
    model's mistakes repeat themselves.
    """

    def sample(prompts: Sequence[Prompt]) -> list[list[str]]:
        drawn = []
        for prompt in prompts:
            generator = random.Random(f"{seed} {prompt.id}")
            assert prompt.messages is not None
            words = prompt.messages[-1].content.split()
            truth = sum(int(word) for word in words if word.isdigit())
            rate = generator.uniform(least, most)
            usual = generator.choice((-10, 10, 100))
            texts = []
            for _ in range(num_samples):
                answer = truth
                if generator.random() > rate:
                    answer += usual if generator.random() < 0.5 else generator.randint(1, 90)
                texts.append(f"The answer is {answer}.")
            drawn.append(texts)
        return drawn

    return sample
