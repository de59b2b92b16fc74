"""Every item of every suite is graded: its own answer is right, and answers near it are wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmpo.grading import Grader, parse_number
from gmpo.records import Prompt
from gmpo.suites import SUITES, SuiteItems, suite_items

FORMS = ("So we get \\boxed{{{0}}}.", "We compute.\nThe answer is {0}")

FUNCTION = (
    r"f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer "
    r"with $\mho(a)=0"
)

# Wrong answers that math-verify calls equal. It compares two equations by either sign of a side,
# keeps the right side of NAME = VALUE, does not read a factor before an equation, loses what
# stands after a comma in several pairs of dollar signs, and compares repeated roots as a set.
ACCEPTED: dict[str, set[tuple[str, str]]] = {
    "math500": {
        ("math500-algebra/2193", r"2\left(x=5\right)"),
    },
    "minerva": {
        ("minerva-61", r"-\frac{dx}{dt} = kx - a"),
        ("minerva-116", r"-m \frac{d v}{d t}+b v=f"),
        ("minerva-121", r"-I \frac{d \omega}{d t}+2 B \omega=T"),
        ("minerva-264", r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}+1"),
        ("minerva-264", r"-\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}"),
        (
            "minerva-264",
            r"2\left(\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}\right)",
        ),
    },
    "olympiadbench": {
        ("olympiadbench-1675", r"2\left(k=1\right)"),
        ("olympiadbench-1965", f"-{FUNCTION}"),
        ("olympiadbench-1965", rf"2\left({FUNCTION}\right)"),
        ("olympiadbench-2029", r"2\left(f(x)=1\right)"),
        ("olympiadbench-2177", r"2\left(k=3\right)"),
        ("olympiadbench-2212", "N=n+1"),
        ("olympiadbench-2349", "221,$8+1"),
        ("olympiadbench-2349", "221"),
        ("olympiadbench-2356", "16,3,1"),
        ("olympiadbench-2532", "-2"),
    },
}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(time_limit_seconds=5.0) as grader:
        yield grader


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> SuiteItems:
    found = SUITES[request.param]
    folder: Path | None = request.getfixturevalue("shared_data") if found.hub else None
    return suite_items(found, folder=folder, instruction="")


def plain(answer: str) -> str:
    return answer.strip().strip("$")


def wrong_answers(prompt: Prompt, other: Prompt) -> Iterator[str]:
    """Another item's answer, and this item's: one more, ten times, negated, doubled, a part."""
    answer, neighbour = plain(prompt.columns["answer"]), plain(other.columns["answer"])
    number = parse_number(answer)
    is_other_number = number is None or number != parse_number(neighbour)
    if is_other_number and _bare(answer) != _bare(neighbour):
        yield neighbour
    if number is not None:
        yield from (str(number + 1), str(10 * number or 10), str(-number or 5))
        return
    negated = answer[1:] if answer.startswith("-") else f"-{answer}"
    yield from (f"{answer}+1", f"2\\left({answer}\\right)")
    if not answer.startswith("0"):  # -0, 1 is 0, 1
        yield negated
    parts = re.split(r"\$,\s*\$|,", answer)
    if prompt.columns.get("multiple") and len(parts) > 1:
        yield from dict.fromkeys((parts[0], ",".join(parts[:-1])))


def _bare(answer: str) -> str:
    return re.sub(r"[\s$]|^x=", "", answer)


@pytest.mark.verify
def test_every_reference_answer_is_right(suite: SuiteItems, grader: Grader):
    refused = [
        (prompt.id, text)
        for prompt in suite.prompts
        for answer in prompt.columns.get("answers") or (prompt.columns["answer"],)
        for text in (FORMS[0].format(plain(answer)), FORMS[1].format(answer))
        if not grader.grade_item(text, prompt.columns).is_correct
    ]
    assert refused == []


@pytest.mark.verify
def test_wrong_answers_are_wrong_but_for_known_ones(suite: SuiteItems, grader: Grader):
    others = [*suite.prompts[1:], suite.prompts[0]]
    tried = [
        (prompt, answer)
        for prompt, other in zip(suite.prompts, others, strict=True)
        for answer in wrong_answers(prompt, other)
    ]
    accepted = {
        (prompt.id, answer)
        for prompt, answer in tried
        if grader.grade_item(FORMS[0].format(answer), prompt.columns).is_correct
    }
    assert len(tried) >= 3 * len(suite.prompts)  # not an empty proof
    assert accepted == ACCEPTED.get(suite.name, set())
