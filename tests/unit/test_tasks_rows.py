"""Rows of any source: columns that are named, rows that are filtered, left out or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.errors import DataError
from gmpo.records import Prompt
from gmpo.tasks import RowForm
from gmpo.tasks.rows import FILTERED, UNUSABLE, ReadRows, Row, read_rows
from gmpo.tasks.splits import question_text, sides_of_rows

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def read(*rows: Mapping[str, Any], prefix: str = "", **form: Any) -> ReadRows:
    placed = (Row(f"row {number}", str(number), row) for number, row in enumerate(rows))
    return read_rows(placed, RowForm(**form), source="data", id_prefix=prefix)


def prompt(row: Mapping[str, Any], **form: Any) -> Prompt:
    (only,) = read(row, **form).prompts
    return only


def refusal(*rows: Mapping[str, Any], **form: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*rows, **form)
    return str(caught.value)


# Columns


def test_columns_are_those_that_were_named():
    row = {"question": "1+1?", "solution": 2, "key": 9, "level": 3}
    found = prompt(row, prompt_column="question", answer_column="solution", id_column="key")
    assert found.id == "9"
    assert found.messages is not None
    assert [message.content for message in found.messages] == ["1+1?"]
    # A reward function of the field asks for the answer by the data set's own name.
    assert found.columns == {"solution": 2, "level": 3, "answer": "2"}


def test_a_chat_may_stand_in_any_column_that_is_named():
    found = prompt({"messages": CHAT, "answer": "1"}, prompt_column="messages")
    assert found.messages is not None
    assert [(m.role, m.content) for m in found.messages] == [("system", "s"), ("user", "u")]


def test_a_list_in_the_answer_column_is_accepted_forms():
    found = prompt({"problem": "p", "gold": ["1/2", 0.5]}, answer_column="gold")
    assert found.columns["answer"] == "1/2"
    assert found.columns["answers"] == ("1/2", "0.5")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("48/2 = 24\n48+24 = 72\n#### 72", "72"),
        (r"so it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<answer>B</answer>", "B"),
        ("Adding up, the answer is 12.", "12"),
    ],
)
def test_the_answer_that_a_worked_solution_marks_is_taken(solution: str, answer: str):
    row = {"problem": "p", "answer": solution}
    assert prompt(row, answer_is_marked=True).columns == {"answer": answer}


def test_a_row_with_a_character_that_rendering_drops_is_refused_or_left_out():
    row = {"problem": "a\U000f0001b", "answer": "1"}
    with pytest.raises(DataError, match=r"U\+F0000 or U\+F0001 is in a turn"):
        read(row)
    chat = {"prompt": [{"role": "user", "content": "\U000f0000"}], "answer": "1"}
    kept = {"problem": "p", "answer": "2"}
    found = read(row, chat, kept, unusable="drop")
    assert [one.columns["answer"] for one in found.prompts] == ["2"]
    assert sum(found.left_out.values()) == 2


def test_only_the_columns_to_keep_go_to_the_prompt():
    row = {"problem": "p", "answer": "1", "level": 3, "image": b"..."}
    assert prompt(row, keep_columns=("level",)).columns == {"level": 3, "answer": "1"}


def test_ids_get_the_prefix_and_default_to_the_rows_own():
    named = read({"problem": "p", "answer": "1", "id": 7}, prefix="train-")
    numbered = read({"problem": "p", "answer": "1"}, prefix="train-")
    assert [named.prompts[0].id, numbered.prompts[0].id] == ["train-7", "train-0"]


def test_the_columns_that_must_be_read_are_the_needed_and_the_kept():
    form = RowForm(prompt_column="q", keep_columns=("level",), where={"set": ("a",)})
    there = ["image", "q", "answer", "level", "set", "other"]
    assert form.needed_columns(there) == ["q", "answer", "level", "set"]
    assert RowForm(prompt_column="q").needed_columns(there) == there


@pytest.mark.parametrize(
    ("form", "there", "message"),
    [
        (
            {"prompt_column": "questoin"},
            ["question", "answer"],
            "there is no column 'questoin'; did you mean 'question'? "
            "there are ['answer', 'question']",
        ),
        (
            {"where": {"lvl": (1,)}},
            ["problem", "answer", "difficulty"],
            "there is no column 'lvl'; there are ['answer', 'difficulty', 'problem']",
        ),
        (
            {},
            ["question", "answer"],
            "neither 'prompt' nor 'problem' is there, only ['answer', 'question']; say with "
            "prompt_column which one holds the problem",
        ),
        (
            {},
            ["prompt", "solution"],
            "neither 'answer' nor 'answers' is a column; there are ['prompt', 'solution']; say "
            "with answer_column which one holds the reference answer",
        ),
    ],
)
def test_a_wrong_column_is_named_with_the_nearest(
    form: dict[str, Any], there: list[str], message: str
):
    with pytest.raises(DataError) as caught:
        RowForm(**form).needed_columns(there)
    assert str(caught.value) == message


# Rows that do not count


def test_rows_that_where_does_not_want_are_left_out_and_counted():
    rows = [{"problem": f"p{n}", "answer": "1", "level": n, "set": "a"} for n in range(1, 6)]
    found = read(*rows, where={"level": (2, 3), "set": ("a", "b")})
    assert [p.columns["level"] for p in found.prompts] == [2, 3]
    assert found.left_out == {FILTERED: 3}


def test_a_filter_that_wants_nothing_says_what_there_is():
    rows = [{"problem": f"p{n}", "answer": "1", "level": str(n)} for n in (1, 2)]
    assert refusal(*rows, where={"level": (1, 2)}) == (
        "data has no row left (2 rows that `where` does not want); 'level' has '1', '2'"
    )


def test_a_filter_on_a_column_that_a_row_lacks_is_refused():
    row = {"problem": "p", "answer": "1", "level": 1}
    assert refusal(row, where={"levle": (1,)}).startswith(
        "row 0: there is no column 'levle'; did you mean 'level'?"
    )


UNUSABLE_ROWS = [
    {"problem": "p", "answer": None},
    {"problem": " ", "answer": "1"},
    {"problem": "p", "answer": "  "},
]


@pytest.mark.parametrize("row", UNUSABLE_ROWS)
def test_a_row_without_problem_or_answer_is_refused_by_place(row: dict[str, Any]):
    message = refusal({"problem": "p", "answer": "1"}, row)
    assert message.startswith("row 1: ")
    assert message.endswith(
        "; complete the row, or leave such rows out, counted, with unusable_rows = 'drop'"
    )


def test_unusable_rows_are_left_out_and_counted_on_request():
    found = read(*UNUSABLE_ROWS, {"problem": "p", "answer": "1"}, unusable="drop")
    assert [p.id for p in found.prompts] == ["3"]
    assert found.left_out == {UNUSABLE: 3}


def test_a_data_set_of_unusable_rows_alone_is_refused_with_the_first_reason():
    assert refusal(*UNUSABLE_ROWS, unusable="drop").startswith(
        "data has no row left (3 rows without a usable problem or answer); the first: row 0: "
        "answer is missing; it must be a text or a number"
    )
    assert refusal() == "data holds no row; it needs at least one"


rows_of_any_kind = st.lists(
    st.fixed_dictionaries(
        {
            "problem": st.sampled_from(["p", "", None, 3]),
            "answer": st.sampled_from(["1", None, 2.5]),
            "level": st.integers(1, 3),
        }
    ),
    min_size=1,
    max_size=12,
)


@given(rows_of_any_kind)
def test_every_row_becomes_a_prompt_or_is_counted(rows: list[dict[str, Any]]):
    good = {"problem": "good", "answer": "1", "level": 2}
    found = read(*rows, good, unusable="drop", where={"level": (2, 3)})
    assert len(found.prompts) + sum(found.left_out.values()) == len(rows) + 1
    assert found.left_out.get(FILTERED, 0) == sum(row["level"] == 1 for row in rows)


# Rows that are refused whatever is asked


def test_chats_beside_texts_are_refused_with_both_places():
    text, chat = {"prompt": "a", "answer": "1"}, {"prompt": CHAT, "answer": "1"}
    for unusable in ("refuse", "drop"):
        assert refusal(text, text, chat, unusable=unusable) == (
            "row 2: the prompt is a chat, but at row 0 it is a text; make all prompts of a data "
            "set texts, or all chats"
        )
    assert "row 1: the prompt is a text, but at row 0 it is a chat" in refusal(chat, text)


def test_an_id_used_twice_is_refused_with_both_places():
    rows = [{"problem": "p", "answer": "1", "id": 5}, {"problem": "q", "answer": "1", "id": "5"}]
    assert refusal(*rows, unusable="drop") == (
        "row 1: id '5' was used by row 0; make the ids differ"
    )


def test_a_second_column_that_grading_would_read_is_refused():
    row = {"problem": "p", "solution": "1", "answer": "2"}
    assert "a column 'answer' beside answer_column = 'solution'" in refusal(
        row, answer_column="solution"
    )
    kept = prompt(row, answer_column="solution", keep_columns=())
    assert kept.columns == {"answer": "1"}


def test_a_worked_solution_that_marks_no_answer_is_refused():
    assert "row 0: the answer 'so seven' marks none as final" in refusal(
        {"problem": "p", "answer": "so seven"}, answer_is_marked=True
    )


def test_a_turn_with_more_than_a_chat_can_show_is_refused():
    turn = {"role": "user", "content": "u", "tool_calls": [{"name": "f"}], "name": None}
    assert "a turn has ['tool_calls'] beside role and content" in refusal(
        {"prompt": [turn], "answer": "1"}
    )


# Two sides


def both_sides(
    train: list[dict[str, Any]], held_out: list[dict[str, Any]], *, drops: bool = False
) -> Any:
    return sides_of_rows(
        read(*train, prefix="train-"),
        read(*held_out, prefix="test-"),
        held_out_items=0,
        split_seed=0,
        names=("a", "b"),
        drops_shared=drops,
    )


def test_a_training_problem_that_is_held_out_is_left_out_of_training_on_request():
    train = [{"problem": text, "answer": "1"} for text in ("p", "What  IS q?", "r", "what is q?")]
    held_out = [{"problem": "what is q?", "answer": "1"}]
    sides = both_sides(train, held_out, drops=True)
    assert [p.id for p in sides.train] == ["train-0", "train-2"]
    assert sides.left_out == {"training rows that are also held out": 2}
    with pytest.raises(DataError) as caught:
        both_sides(train, held_out)
    assert str(caught.value) == (
        "2 problems of a are also in b (first: 'train-1', which is 'test-0'); remove them, or "
        "leave them out of training, counted, with unusable_rows = 'drop'"
    )
    with pytest.raises(DataError, match="all 1 problems of a are also in b"):
        both_sides(train[1:2], held_out, drops=True)


def test_an_id_on_both_sides_is_refused():
    with pytest.raises(DataError, match=r"1 ids are in both a and b \(first: '0'\)"):
        sides_of_rows(
            read({"problem": "p", "answer": "1"}),
            read({"problem": "q", "answer": "1"}),
            held_out_items=0,
            split_seed=0,
            names=("a", "b"),
            drops_shared=False,
        )


def test_what_a_chat_asks_is_all_its_turns_but_the_system_turn():
    def asked(*turns: tuple[str, str]) -> str:
        chat = [{"role": role, "content": content} for role, content in turns]
        return question_text(prompt({"prompt": chat, "answer": "1"}))

    assert asked(("system", "s"), ("user", "U  v")) == asked(("system", "t"), ("user", "u v"))
    first = asked(("user", "2"), ("assistant", "ok"), ("user", "its double?"))
    second = asked(("user", "3"), ("assistant", "ok"), ("user", "its double?"))
    assert first != second
