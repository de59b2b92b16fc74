"""What became of one completion when its answer was graded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Verdict"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one completion.

    `timeout` is a comparison that did not end, whether it ran out of time, was refused as sure to
    do so, or lost its process; it is not correct, and counted apart from wrong. `answer` is what
    was extracted, None where there was nothing. `scorer_error` is an answer on which a task's own
    scorer raised; it is not correct, and `error` says what was raised.
    """

    is_correct: bool
    status: Literal["graded", "timeout", "no_answer", "scorer_error"]
    answer: str | None
    method: Literal["exact", "math_verify", "expression", "gym", "none"]
    error: str | None = None
