"""Outcomes of a model on a suite, written as which completions were right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gmpo.outcomes import AskedWith, CompletionOutcome, ItemOutcome, SuiteOutcomes, Way

GREEDY = Way(name="greedy")
ASKED_WITH = AskedWith(
    prompt_format="chat", system=None, rollout=None, stop_strings=(), dtype="fp32"
)


def completion(is_correct: bool, **changes: Any) -> CompletionOutcome:
    plain: dict[str, Any] = {"status": "graded", "answer": "1", "is_truncated": False}
    return CompletionOutcome(is_correct=is_correct, **{**plain, "num_tokens": 5, **changes})


def outcomes(
    label: str,
    right: Mapping[str, Sequence[bool]],
    *,
    suite: str = "amc",
    digest: str = "d",
    max_tokens: int = 100,
) -> SuiteOutcomes:
    """Greedy for one completion an item, else sampled at temperature 1.

    Items of one suite have one digest, those of another suite another.
    """
    (count,) = {len(one) for one in right.values()}
    sampled = Way(name="sampled", num_samples=count, temperature=1.0)
    return SuiteOutcomes(
        label=label,
        model=f"models/{label}",
        suite=suite,
        title=suite.upper(),
        way=GREEDY if count == 1 else sampled,
        max_tokens=max_tokens,
        asked_with=ASKED_WITH,
        items=tuple(
            ItemOutcome(
                id=name, digest=f"{suite}-{digest}", completions=tuple(map(completion, one))
            )
            for name, one in right.items()
        ),
    )


def greedy(
    label: str, right: set[int], of: int, *, suite: str = "amc", **more: Any
) -> SuiteOutcomes:
    """Items q0, q1, ... asked once each, of which those of the numbers `right` were right."""
    return outcomes(label, {f"q{n}": [n in right] for n in range(of)}, suite=suite, **more)
