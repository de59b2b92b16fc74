"""Countdown answers: an expression evaluated exactly, with a count of the numbers it uses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from gmpo.grading.answers import MAX_ANSWER_CHARACTERS, marked_answer
from gmpo.grading.verdict import Verdict

__all__ = ["grade_countdown"]

_MAX_NESTING = 50


def grade_countdown(text: str, numbers: Iterable[int], target: int) -> Verdict:
    """Whether the last expression in `text` uses each number exactly once and makes the target.

    Allowed are whole numbers, the four operations, also as printed or LaTeX signs, and brackets;
    the value is exact. What follows an equals sign is ignored. A sign before a number is refused.
    """
    marked = marked_answer(text)
    candidate = _last_expression(text if marked is None else marked)
    if candidate is None:
        return Verdict(is_correct=False, status="no_answer", answer=None, method="none")
    outcome = _Expression(candidate).evaluate()
    is_correct = outcome is not None and (
        outcome[0] == target and sorted(outcome[1]) == sorted(numbers)
    )
    return Verdict(is_correct=is_correct, status="graded", answer=candidate, method="expression")


def _last_expression(text: str) -> str | None:
    """The last run of numbers, operators and brackets that holds an operator between numbers."""
    for latex, plain in (
        ("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\u00d7", "*"), ("\u00f7", "/"),
        ("\u2212", "-"), ("\\left", ""), ("\\right", ""), ("$", ""),
    ):  # fmt: skip
        text = text.replace(latex, plain)
    text = re.sub(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    runs: list[str] = re.findall(r"[\d(][\d \t+\-*/()]*", text)
    runs = [run.strip() for run in runs if re.search(r"[\d)]\s*[-+*/]\s*[\d(]", run)]
    return runs[-1] if runs else None


class _Expression:
    """Recursive descent over + - * / and brackets, in fractions, noting the numbers used."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = re.findall(r"\d+|\S", text[: MAX_ANSWER_CHARACTERS + 1])
        self._is_too_long = len(text) > MAX_ANSWER_CHARACTERS
        self._numbers: list[int] = []
        self._depth = 0

    def evaluate(self) -> tuple[Fraction, list[int]] | None:
        """The value and the numbers used, or None if it is no expression or divides by zero."""
        self._tokens.reverse()
        try:
            value = self._sum()
        except (_NoExpression, ZeroDivisionError):
            return None
        return None if self._tokens or self._is_too_long else (value, self._numbers)

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next() in ("+", "-"):
            is_plus = self._tokens.pop() == "+"
            term = self._product()
            value = value + term if is_plus else value - term
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while self._next() in ("*", "/"):
            is_times = self._tokens.pop() == "*"
            factor = self._atom()
            value = value * factor if is_times else value / factor
        return value

    def _atom(self) -> Fraction:
        token = self._tokens.pop() if self._tokens else ""
        if token.isdigit():
            self._numbers.append(int(token))
            return Fraction(int(token))
        self._depth += 1
        if token != "(" or self._depth > _MAX_NESTING:
            raise _NoExpression
        value = self._sum()
        if self._next() != ")":
            raise _NoExpression
        self._tokens.pop()
        self._depth -= 1
        return value

    def _next(self) -> str:
        return self._tokens[-1] if self._tokens else ""


class _NoExpression(Exception):
    """The text is not an expression of the allowed kind."""
