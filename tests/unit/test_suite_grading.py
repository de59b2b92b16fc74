"""Grading on each suite: rows in the form of its file, right answers right and wrong ones wrong.

`tests/flow/test_suite_answers.py` has every real item; most of those are not in this repository.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmpo.grading import Grader
from gmpo.records import Prompt
from gmpo.suites import SUITES, suite_items

FORMS = ("We compute, and so \\boxed{{{0}}}.", "We compute.\nThe answer is {0}")

# (row, right answers, wrong answers): kinds of answer that the real file has, with our own values.
Case = tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]
CASES: dict[str, tuple[Case, ...]] = {
    "aime24": (
        ({"answer": "204"}, ("204", "204.0"), ("205", "20", "2040", "-204", "2,04")),
        ({"answer": "073"}, ("73", "073"), ("37", "730", "0.73")),
    ),
    "amc": (
        ({"answer": "8178"}, ("8178", "8,178"), ("8179", "-8178", "817.8")),
        ({"answer": "2.5"}, ("2.5", "\\frac{5}{2}", "5/2"), ("25", "0.25", "\\frac{2}{5}")),
    ),
    "math500": (
        ({"answer": "\\frac{14}{3}"}, ("\\frac{14}{3}", "14/3"), ("\\frac{3}{14}", "4.67")),
        (
            {"answer": "\\left( 3, \\frac{\\pi}{2} \\right)"},
            ("(3, \\frac{\\pi}{2})",),
            ("(\\frac{\\pi}{2}, 3)", "(3, \\pi)", "3"),
        ),
        ({"answer": "p - q"}, ("p - q", "-q + p"), ("q - p", "p + q")),
        ({"answer": "[2,5)"}, ("[2, 5)",), ("(2, 5)", "[2, 5]", "[2, 6)")),
        ({"answer": "2\\sqrt{13}"}, ("2\\sqrt{13}", "\\sqrt{52}"), ("\\sqrt{13}", "4\\sqrt{13}")),
    ),
    "minerva": (
        (
            {"answer": "4.5e33", "answers": ["4.5e33", "4.5 \\times 10^{33}"]},
            ("4.5 \\times 10^{33}", "4.5e33"),
            ("4.5 \\times 10^{32}", "4.5", "-4.5e33"),
        ),
        ({"answer": "9.6", "answers": ["9.6"]}, ("9.6",), ("96", "6.9", "-9.6")),
        (
            {"answer": "\\arcsin{\\frac{1}{1.3}}", "answers": ["\\arcsin{\\frac{1}{1.3}}"]},
            ("\\arcsin(\\frac{10}{13})",),
            ("\\arccos(\\frac{10}{13})", "\\frac{10}{13}"),
        ),
    ),
    "olympiadbench": (
        ({"answer": "$\\frac{4}{9}$", "multiple": False}, ("4/9",), ("9/4", "-4/9", "0.4")),
        (
            {"answer": "$64$,$\\frac{1}{4}$", "multiple": True},
            ("64, \\frac{1}{4}", "\\frac{1}{4}, 64"),
            ("64", "\\frac{1}{4}", "64, 4"),
        ),
        (
            {"answer": "$(1,8,19), (2,7,13)$", "multiple": True},
            ("(1,8,19), (2,7,13)",),
            ("(1,8,19)", "(8,1,19), (2,7,13)"),
        ),
    ),
}
BUNDLED = ("gsm8k", "svamp")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(time_limit_seconds=10.0) as grader:
        yield grader


def verdicts(grader: Grader, prompt: Prompt, answers: tuple[str, ...]) -> set[tuple[str, bool]]:
    """Whether each answer is right, in every form in which it is given."""
    return {
        (answer, grader.grade_item(form.format(answer), prompt.columns).is_correct)
        for answer in answers
        for form in FORMS
    }


def test_every_suite_is_among_these():
    assert set(SUITES) == {*CASES, *BUNDLED}


@pytest.mark.parametrize("name", CASES)
def test_answers_in_the_forms_of_a_suites_file(name: str, grader: Grader, tmp_path: Path):
    rows = [{"id": str(n), "problem": "p", **row} for n, (row, _, _) in enumerate(CASES[name])]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    read = suite_items(SUITES[name], folder=tmp_path).prompts
    assert len(read) == len(rows)
    for prompt in read:
        _, right, wrong = CASES[name][int(prompt.id.rpartition(":")[2])]
        assert verdicts(grader, prompt, right) == {(answer, True) for answer in right}
        assert verdicts(grader, prompt, wrong) == {(answer, False) for answer in wrong}


@pytest.mark.parametrize("name", BUNDLED)
def test_the_suites_that_the_package_brings(name: str, grader: Grader):
    for prompt in suite_items(SUITES[name], items=40).prompts:
        answer = prompt.columns["answer"]
        number = float(answer.replace(",", ""))
        wrong = (f"{number + 1:g}", f"{10 * number or 10:g}", f"{-number or 5:g}")
        assert verdicts(grader, prompt, (answer,)) == {(answer, True)}
        assert verdicts(grader, prompt, wrong) == {(other, False) for other in wrong}
