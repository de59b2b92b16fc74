"""A completion's final answer compared with the reference answer, within a time limit.

Exact comparison comes first and settles nearly all arithmetic; math-verify gets what is left.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from gmpo.errors import DataError
from gmpo.grading.answers import (
    MAX_ANSWER_CHARACTERS,
    exactly_equal,
    extract_answer,
    is_hopeless_power,
    parse_number,
)
from gmpo.grading.countdown import grade_countdown
from gmpo.grading.gym import GymProcess, GymSpec, gym_answer
from gmpo.grading.verdict import Verdict
from gmpo.grading.worker import Worker

__all__ = ["Grader"]


class Grader:
    """Compares final answers; holds the worker processes, which start when first needed.

    Safe to call from several threads, one comparison at a time in the process. It sets no signal
    handler or timer in the caller's process. Close it, or use it in a `with` statement.
    """

    def __init__(
        self, *, time_limit_seconds: float = 2.0, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        """Keep the limit; nothing is started.

        Args:
            time_limit_seconds: for one comparison by math-verify, or one call of a task's own
                scorer, above 0. Starting the process (about a second, once) is not part of it.
            warn: is told of each kind of error that a task's own scorer raises, once.

        Raises:
            DataError: the limit is not above 0.
        """
        if not time_limit_seconds > 0:
            raise DataError(f"time_limit_seconds is {time_limit_seconds}; it must be above 0")
        self._time_limit_seconds = time_limit_seconds
        self._warn = warn
        self._warned: set[str] = set()
        self._worker: Worker | None = None
        self._gym = GymProcess()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._was_started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one; the next comparison that needs it starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.stop()
                self._worker = None
            self._gym.close()

    @property
    def counts(self) -> dict[str, int]:
        """Verdicts so far, by what happened.

        `exact`, `math_verify`, `expression` and `gym` are verdicts by method; `no_answer`;
        `timeouts`, of which `refused_powers` were not even tried; `scorer_errors`, answers on
        which a task's own scorer raised; `too_long`, answers over 300 characters, which are
        compared as text only and also count as exact; `worker_restarts`.
        """
        names = (
            "exact", "math_verify", "expression", "gym", "no_answer", "timeouts",
            "refused_powers", "scorer_errors", "too_long", "worker_restarts",
        )  # fmt: skip
        with self._lock:
            counts = {name: self._counts[name] for name in names}
            counts["worker_restarts"] += self._gym.num_restarts
            return counts

    def grade(self, text: str, reference: str | Sequence[str]) -> Verdict:
        """The verdict on a completion.

        Numbers are compared as fractions; two further apart than 1e-5 are different. Where the
        reference is a number, an answer without a digit, or one that is still a computation
        ("12 + 7"), is wrong. What else is not equal as text is put to math-verify.

        Args:
            text: the completion.
            reference: the right answer, or several accepted forms of it.

        Raises:
            DataError: there is no reference answer.
            GmpoError: the math-verify process does not start.
        """
        accepted = [reference] if isinstance(reference, str) else list(reference)
        if not accepted or not all(form.strip() for form in accepted):
            raise DataError(
                f"the reference answer is {reference!r}; it must be a non-empty text or a list of "
                "them; drop the item from the data set"
            )
        wants_number = all(parse_number(form) is not None for form in accepted)
        answer = extract_answer(text, wants_number=wants_number)
        if answer is None:
            return self._counted(
                Verdict(is_correct=False, status="no_answer", answer=None, method="none")
            )
        decisions = {form: exactly_equal(answer, form) for form in accepted}
        undecided = [form for form, decision in decisions.items() if decision is None]
        is_equal = any(decisions.values())
        if is_equal or not undecided:
            if len(answer) > MAX_ANSWER_CHARACTERS:
                self._count("too_long")
            return self._counted(
                Verdict(is_correct=is_equal, status="graded", answer=answer, method="exact")
            )
        if is_hopeless_power(answer):
            self._count("refused_powers")
            is_verified = None
        else:
            with self._lock:
                is_verified = self._verified(answer, undecided)
        return self._counted(
            Verdict(
                is_correct=is_verified is True,
                status="timeout" if is_verified is None else "graded",
                answer=answer,
                method="none" if is_verified is None else "math_verify",
            )
        )

    def grade_countdown(self, text: str, numbers: Iterable[int], target: int) -> Verdict:
        """`grade_countdown`, counted."""
        return self._counted(grade_countdown(text, numbers, target))

    def grade_gym(self, text: str, columns: Mapping[str, Any]) -> Verdict:
        """The verdict of a reasoning-gym item's own scorer on the extracted answer.

        Only a score of exactly 1.0 is right. A scorer that raises makes the answer wrong, counted
        as a scorer error and named to `warn`; one that does not end is a time-out.

        Args:
            text: the completion.
            columns: `answer`, `gym` and `gym_entry`, as `gym_task` makes them.
        """
        answer = gym_answer(text, columns["answer"])
        if answer is None:
            return self._counted(
                Verdict(is_correct=False, status="no_answer", answer=None, method="none")
            )
        spec = GymSpec(**columns["gym"])
        with self._lock:
            score = self._gym.score(
                spec, columns["gym_entry"], answer, limit_seconds=self._time_limit_seconds
            )
        if score is None:
            return self._counted(
                Verdict(is_correct=False, status="timeout", answer=answer, method="none")
            )
        if score.error is not None:
            self._name_scorer_error(spec.name, score.error, answer)
            return self._counted(
                Verdict(
                    is_correct=False,
                    status="scorer_error",
                    answer=answer,
                    method="none",
                    error=score.error,
                )
            )
        return self._counted(
            Verdict(is_correct=score.value == 1.0, status="graded", answer=answer, method="gym")
        )

    def grade_item(self, text: str, columns: Mapping[str, Any]) -> Verdict:
        """The verdict on a completion of a task's prompt, by the prompt's columns.

        The reference is `answers` (any of) or else `answer`. Where `grading` is "countdown", any
        expression that makes `target` from `numbers` is right; where it is "gym", the item's own
        scorer decides.

        Raises:
            DataError: there is no answer, or no such kind of grading.
            GmpoError: the math-verify process does not start.
        """
        kind = columns.get("grading")
        if kind == "countdown":
            return self.grade_countdown(text, columns["numbers"], columns["target"])
        if kind == "gym":
            return self.grade_gym(text, columns)
        if kind is not None:
            raise DataError(f"grading is {kind!r}; the column must be 'countdown', 'gym' or absent")
        reference = columns.get("answers") or columns.get("answer")
        if not reference:
            raise DataError(
                f"there is no reference answer (columns: {sorted(columns)}); give the prompt an "
                "'answer' or 'answers' column, or use a reward that needs none"
            )
        return self.grade(text, reference)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _counted(self, verdict: Verdict) -> Verdict:
        names = {
            "timeout": "timeouts",
            "no_answer": "no_answer",
            "scorer_error": "scorer_errors",
            "graded": verdict.method,
        }
        self._count(names[verdict.status])
        return verdict

    def _name_scorer_error(self, task: str, error: str, answer: str) -> None:
        kind = f"{task} {error.partition(':')[0]}"
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(
                f"the scorer of {task!r} raised {error[:200]} on the answer {answer[:60]!r}; such "
                "answers count as wrong, and as scorer errors"
            )

    def _verified(self, answer: str, references: list[str]) -> bool | None:
        """Whether math-verify finds the answer equal to a reference; None if it did not end."""
        if self._worker is None or not self._worker.is_alive:
            self._counts["worker_restarts"] += self._was_started
            if self._worker is not None:
                self._worker.stop()
            self._worker = Worker("symbolic")
            self._was_started = True
        request = {"answer": answer, "references": references}
        reply = self._worker.ask(request, self._time_limit_seconds)
        return None if reply is None else reply["is_equal"]
