"""Contamination: runs of words that an item and a training text share."""

from __future__ import annotations

import pytest

from gmpo.contamination import (
    Contamination,
    HeldItem,
    TrainingText,
    find_contamination,
    items_in_rows,
    words,
)
from gmpo.errors import DataError
from gmpo.records import Prompt

LONG = "a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 a12 a13 a14"  # two runs of 13
MIDDLE = "b1 b2 b3 b4 b5 b6 b7 b8 b9 b10 b11 b12"  # five runs of 8
SHORT = "c1 c2 c3"  # one run of 3


def found(item: str, *training: str) -> Contamination:
    texts = [TrainingText(id=f"row {n}", text=text) for n, text in enumerate(training)]
    prompts = [Prompt(id="item", text=item), Prompt(id="clean", text="nothing of this is there")]
    (one,) = find_contamination([("amc", "AMC", prompts)], texts)
    return one


def first(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def test_words_are_letters_and_digits_in_lower_case():
    assert words("If $x_1 = 2.5$, then Área?") == ["if", "x", "1", "2", "5", "then", "área"]


@pytest.mark.parametrize(
    ("item", "shared", "coverage"),
    [
        (LONG, 14, 1.0),
        (LONG, 13, 1 / 2),
        (LONG, 12, None),
        (MIDDLE, 9, 2 / 5),
        (MIDDLE, 8, 1 / 5),
        (MIDDLE, 7, None),
        (SHORT, 3, 1.0),
        (SHORT, 2, None),
    ],
)
def test_coverage_is_the_share_of_the_items_runs(item: str, shared: int, coverage: float | None):
    one = found(item, f"before {first(item, shared)} after")
    assert one.num_items == 2
    if coverage is None:
        assert one.matches == ()
        return
    (match,) = one.matches
    assert match.item_id == "item"
    assert match.coverage == pytest.approx(coverage)
    assert match.is_whole == (coverage == 1.0)
    assert match.num_words == len(item.split())


def test_case_punctuation_and_line_breaks_do_not_hide_a_copy():
    assert found(LONG, LONG.upper().replace(" ", ",\n")).matches[0].is_whole


def test_the_row_with_most_is_named_and_all_are_counted():
    (match,) = found(LONG, first(LONG, 13), LONG, "other words").matches
    assert (match.training_id, match.num_rows) == ("row 1", 2)
    assert match.excerpt == " ".join(LONG.split()[1:])  # the run that one row has, not two


def test_items_of_which_most_was_found_come_first():
    prompts = [Prompt(id="part", text=LONG), Prompt(id="all", text=SHORT)]
    texts = [TrainingText(id="row", text=f"{first(LONG, 13)} x {SHORT}")]
    (one,) = find_contamination([("amc", "AMC", prompts)], texts)
    assert [match.item_id for match in one.matches] == ["all", "part"]
    written = one.as_dict()
    assert (written["items"], written["found"]) == (2, 2)
    assert [match["whole"] for match in written["matches"]] == [True, False]


def test_no_training_text_is_refused():
    with pytest.raises(DataError, match="no training text to check"):
        found(LONG)


def test_by_row_the_item_of_which_it_has_most_is_named():
    suites = [
        ("amc", "AMC", [Prompt(id="long", text=LONG), Prompt(id="middle", text=MIDDLE)]),
        ("svamp", "SVAMP", [Prompt(id="short", text=SHORT)]),
    ]
    rows = [
        TrainingText(id="both", text=f"{first(LONG, 13)} and {first(MIDDLE, 8)}"),  # 1/2 and 1/5
        TrainingText(id="clean", text="nothing of it"),
        TrainingText(id="short", text=f"so {SHORT}"),
    ]
    held = items_in_rows(suites, rows)
    assert held == {
        "both": HeldItem(suite="amc", item_id="long", coverage=1 / 2, excerpt=first(LONG, 13)),
        "short": HeldItem(suite="svamp", item_id="short", coverage=1.0, excerpt=SHORT),
    }
    # The same by item: whoever holds most of an item is named there.
    by_item = {
        match.item_id: (match.training_id, match.coverage)
        for found_ in find_contamination(suites, rows)
        for match in found_.matches
    }
    assert by_item == {"long": ("both", 1 / 2), "middle": ("both", 1 / 5), "short": ("short", 1.0)}
    assert items_in_rows(suites, []) == {}


INSTRUCTION = "solve the problem below step by step and put the answer alone on the last line"


def templated(*problems: str) -> list[Prompt]:
    return [Prompt(id=f"{n}", text=f"{INSTRUCTION} {text}") for n, text in enumerate(problems)]


def problem(number: int) -> str:
    return " ".join(f"w{number}x{place}" for place in range(13))


def test_an_instruction_that_the_items_repeat_makes_no_row_contaminated():
    suite = ("own", "own", templated(*map(problem, range(12))))
    rows = [
        TrainingText(id="new", text=f"{INSTRUCTION} {problem(99)}"),
        TrainingText(id="copy", text=f"{INSTRUCTION} {problem(3)}"),
    ]
    (one,) = find_contamination([suite], rows)
    (match,) = one.matches
    assert (match.item_id, match.training_id, match.coverage) == ("3", "copy", 1.0)
    assert len(words(INSTRUCTION)) == 16 and len(one.template) == 4
    assert one.template[0] in INSTRUCTION
    assert one.as_dict()["template"] == list(one.template)
    assert items_in_rows([suite], rows).keys() == {"copy"}


@pytest.mark.parametrize(
    ("copies", "others", "is_template"),
    [(10, 39, True), (9, 0, False), (10, 40, False), (11, 40, True)],
)
def test_a_template_is_what_a_fifth_of_the_items_and_ten_have(
    copies: int, others: int, is_template: bool
):
    plain = [Prompt(id=f"plain {n}", text=problem(100 + n)) for n in range(others)]
    suite = ("own", "own", [*templated(*map(problem, range(copies))), *plain])
    (one,) = find_contamination([suite], [TrainingText(id="row", text=INSTRUCTION)])
    assert bool(one.template) == is_template
    assert len(one.matches) == (0 if is_template else copies)


def test_items_that_are_nothing_but_a_template_are_still_looked_for():
    suite = ("own", "own", [Prompt(id=f"{n}", text=LONG) for n in range(12)])
    (one,) = find_contamination([suite], [TrainingText(id="row", text=LONG)])
    assert len(one.matches) == 12 and one.template == ()
