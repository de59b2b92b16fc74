"""Tasks from JSON Lines files: what a row may hold, how files are split, what is refused."""

import gzip
import json

import pytest

from gmpo.errors import DataError
from gmpo.tasks import jsonl_rows, jsonl_rows_and_faults, jsonl_task
from gmpo.tasks.rows import Row


def write(path, *rows):
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path


def rows(count):
    return [{"problem": f"What is {n}?", "answer": str(n)} for n in range(count)]


def test_a_row_becomes_a_prompt_with_its_other_fields_as_columns(tmp_path):
    path = write(tmp_path / "own.jsonl", {"id": 7, "problem": "1+1?", "answer": 2, "level": 3})
    task = jsonl_task(path=path, instruction="Be brief.")
    (prompt,) = task.train
    assert task.name == "own"
    assert task.held_out == ()
    assert prompt.id == "7"
    assert [(m.role, m.content) for m in prompt.messages] == [("user", "1+1?\nBe brief.")]
    assert prompt.columns == {"answer": "2", "level": 3}


def test_numbers_become_texts_and_whole_floats_lose_their_point(tmp_path):
    path = write(tmp_path / "n.jsonl", *({"problem": "p", "answer": a} for a in (142.0, 0.5, -3)))
    assert [p.columns["answer"] for p in jsonl_task(path=path).train] == ["142", "0.5", "-3"]


def test_accepted_forms_stand_beside_or_instead_of_the_answer(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"problem": "p", "answer": "1/2", "answers": ["1/2", 0.5]},
        {"problem": "q", "answers": ["3", "three"]},
    )
    columns = [prompt.columns for prompt in jsonl_task(path=path).train]
    assert columns[0] == {"answer": "1/2", "answers": ("1/2", "0.5")}
    assert columns[1] == {"answer": "3", "answers": ("3", "three")}


def test_a_chat_is_kept_and_the_instruction_goes_to_its_last_turn(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path / "c.jsonl", {"prompt": turns, "answer": "1"})
    (prompt,) = jsonl_task(path=path, instruction="now").train
    assert [(m.role, m.content) for m in prompt.messages] == [("system", "s"), ("user", "u\nnow")]
    assert prompt.id == "c-1"


def test_a_line_separator_inside_a_text_does_not_break_the_row(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text('{"problem": "a\u2028b", "answer": "1"}\n', encoding="utf-8")
    assert jsonl_task(path=path).train[0].messages[0].content == "a\u2028b"


def test_compressed_files_bom_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "z.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"problem": "p", "answer": "1"}\r\n\n'))
    assert jsonl_task(path=path).name == "z"


def test_rows_with_the_same_text_stay_on_one_side(tmp_path):
    doubled = [
        {"problem": text, "answer": str(n)}
        for n in range(30)
        for text in (f"What is {n}?", f"what  IS {n}? ")
    ]
    task = jsonl_task(path=write(tmp_path / "d.jsonl", *doubled), held_out_items=20)
    train = {prompt.columns["answer"] for prompt in task.train}
    held_out = [prompt.columns["answer"] for prompt in task.held_out]
    assert len(held_out) == 20
    assert train.isdisjoint(held_out)


def test_a_row_keeps_its_side_when_others_come_and_go(tmp_path):
    few = jsonl_task(path=write(tmp_path / "f.jsonl", *rows(50)), held_out_items=10)
    fewer = jsonl_task(path=write(tmp_path / "g.jsonl", *rows(49)), held_out_items=10)
    assert len({p.columns["answer"] for p in (*few.held_out,)} & {
        p.columns["answer"] for p in fewer.held_out}) >= 9  # fmt: skip
    other = jsonl_task(path=tmp_path / "f.jsonl", held_out_items=10, split_seed=1)
    assert few.held_out != other.held_out


def test_a_second_file_is_the_held_out_side_or_a_part_of_it(tmp_path):
    train = write(tmp_path / "train.jsonl", *rows(5))
    test = write(tmp_path / "test.jsonl", *({"problem": f"t{n}", "answer": n} for n in range(4)))
    assert len(jsonl_task(path=train, held_out_path=test).held_out) == 4
    part = jsonl_task(path=train, held_out_path=test, held_out_items=3)
    assert (len(part.train), len(part.held_out)) == (5, 3)


def test_a_problem_in_both_files_is_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", *rows(5))
    test = write(tmp_path / "test.jsonl", {"problem": "what is  3?", "answer": "3"})
    with pytest.raises(DataError, match=r"1 problems of .*'train-4', which is 'test-1'"):
        jsonl_task(path=train, held_out_path=test)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"{oops", r"x.jsonl:2: not readable as JSON .*each line must be one JSON object"),
        (b'{"problem": "p", "answer": NaN}', "NaN is not JSON"),
        (b"[1]", r"x.jsonl:2: a row must be a JSON object, this is \[1\]"),
        (b'{"answer": "1"}', "x.jsonl:2: neither 'prompt' nor 'problem' is there"),
        (
            b'{"problem": "p"}',
            "answer is missing; .*or leave such rows out, counted",
        ),
        (b'{"problem": "p", "answer": " "}', "answer is ' '; it must be a text or a number"),
        (b'{"problem": "p", "answer": true}', "answer is True"),
        (b'{"problem": "p", "answers": []}', r"answers is \[\]; it must be a list of one or more"),
        (b'{"problem": "", "answer": "1"}', "a turn or problem is ''"),
        (b'{"problem": [1], "answer": "1"}', r"problem is \[1\]; it must be a text"),
        (b'{"prompt": [], "answer": "1"}', "it must be a text or a list of chat turns"),
        (b'{"prompt": [3], "answer": "1"}', "a turn or problem is None"),
        (
            b'{"prompt": [{"role": "tool", "content": "c"}], "answer": "1"}',
            "role 'tool'; it must be 'system', 'user' or 'assistant'",
        ),
        (
            b'{"prompt": [{"role": "assistant", "content": "c"}], "answer": "1"}',
            "ends in the turn of 'assistant'; it must end in 'user'",
        ),
        (
            b'{"id": "first", "problem": "p", "answer": "1"}',
            "'first' was used by .*x.jsonl:1;",
        ),
        (b'{"id": null, "problem": "p", "answer": "1"}', "id is None; it must be a text or"),
        (b'{"problem": "\xff", "answer": "1"}', "x.jsonl:2: not UTF-8 .*save the file as UTF-8"),
    ],
)
def test_an_unusable_row_is_named_by_file_and_line(tmp_path, line, text):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "first", "problem": "p", "answer": "1"}\n' + line + b"\n")
    with pytest.raises(DataError, match=text):
        jsonl_task(path=path)


def test_missing_empty_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl does not exist; give the path"):
        jsonl_task(path=tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"empty.jsonl holds no row"):
        jsonl_task(path=write(tmp_path / "empty.jsonl"))
    damaged = tmp_path / "bad.jsonl.gz"
    damaged.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"bad.jsonl.gz cannot be read"):
        jsonl_task(path=damaged)


def test_splits_that_leave_nothing_are_refused(tmp_path):
    path = write(tmp_path / "r.jsonl", *rows(3))
    with pytest.raises(DataError, match="held_out_items is 3 with 3 rows; it must be from 0 to 2"):
        jsonl_task(path=path, held_out_items=3)
    same = write(tmp_path / "s.jsonl", *[{"problem": "p", "answer": "1"}] * 3)
    with pytest.raises(DataError, match=r"1 rows cannot be held out .*\(0 can\)"):
        jsonl_task(path=same, held_out_items=1)


def test_lines_that_are_no_rows_can_be_had_beside_those_that_are(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n[2]\n{"b": \n{"c": "\xff"}\n{"d": NaN}\n{"e": 5}')
    found = list(jsonl_rows_and_faults(path))
    rows = [one for one in found if isinstance(one, Row)]
    assert [row.columns for row in rows] == [{"a": 1}, {"e": 5}]
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:7"]
    faults = [(text, str(error)) for text, error in (one for one in found if one not in rows)]
    assert [text for text, _ in faults] == ["[2]", '{"b": ', '{"c": "\\xff"}', '{"d": NaN}']
    for (_, said), line, wrong in zip(
        faults, (3, 4, 5, 6), ("a JSON object", "readable as JSON", "UTF-8", "NaN"), strict=True
    ):
        assert said.startswith(f"{path}:{line}: ")
        assert wrong in said
    with pytest.raises(DataError, match=r"mixed\.jsonl:3"):
        list(jsonl_rows(path))
    with pytest.raises(DataError, match="does not exist"):
        list(jsonl_rows_and_faults(tmp_path / "none.jsonl"))
