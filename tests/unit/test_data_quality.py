"""Batches of rows: what is rejected and why, and what is refused as a whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data_batches import poisoned, simulated_sampler, sums

from gmpo.data_checks.quality import (
    BatchReport,
    DataChecks,
    EarlierData,
    checks_of,
    profile_of,
    validate_batch,
)
from gmpo.data_checks.rows import Unreadable
from gmpo.data_checks.samples import sample_rows
from gmpo.errors import ConfigError, DataError
from gmpo.records import Message, Prompt
from gmpo.suites import SuiteItems
from gmpo.tasks.rows import Row, RowForm, read_rows


def prompts(rows: Sequence[dict[str, Any]]) -> tuple[Prompt, ...]:
    read = read_rows(
        [Row(f"row {n}", f"row-{n}", row) for n, row in enumerate(rows)], RowForm(), source="rows"
    )
    return tuple(read.prompts)


def reasons(report: BatchReport) -> dict[int, list[str]]:
    return {one.place: [reason.check for reason in one.reasons] for one in report.rejected}


def answering(*texts: str) -> Any:
    """A sampler that gives every prompt these completions."""
    return lambda asked: [list(texts) for _ in asked]


def test_each_fault_is_named_and_the_rest_accepted():
    suite = SuiteItems(
        name="amc",
        title="AMC",
        prompts=(Prompt(id="7", text="one two three four five six seven eight nine"),),
        max_tokens=10,
    )
    good = sums(3)
    rows: list[dict[str, Any] | Unreadable] = [
        *good,
        {"prompt": "", "answer": "1"},  # 4
        {"prompt": "no answer here"},  # 5
        {"prompt": good[0]["prompt"].upper(), "answer": good[0]["answer"]},  # 6
        {"prompt": "Write to kim@mail.kr about 2 + 2.", "answer": "4"},  # 7
        {"prompt": "Before one two three four five six seven EIGHT, after", "answer": "3"},  # 8
        {"prompt": "Why?", "answer": " ".join(["because"] * 21)},  # 9
        Unreadable(text="{oops", problem="not readable as JSON"),  # 10
        {"prompt": "Make 10.", "answer": "5+5", "grading": "countdown"},  # 11
        {
            "prompt": "Make 10 of 4 and 6.",
            "answer": "4+5",
            "grading": "countdown",
            "numbers": [4, 6],
            "target": 10,
        },  # 12
        {"id": good[1]["id"], "prompt": "another of this id", "answer": "1"},  # 13
        {"prompt": [{"role": "user", "content": "a chat"}], "answer": "1"},  # 14
    ]
    report = validate_batch(rows, suites=[suite])
    assert report.accepted == tuple(good)
    assert reasons(report) == {
        4: ["schema"],
        5: ["schema"],
        6: ["duplicate"],
        7: ["pii"],
        8: ["contamination"],
        9: ["unverifiable"],
        10: ["schema"],
        11: ["schema"],
        12: ["unverifiable"],
        13: ["schema"],
        14: ["schema"],
    }
    assert report.counts == {
        "rows": 14,
        "accepted": 3,
        "rejected": 11,
        "contamination": 1,
        "duplicate": 1,
        "pii": 1,
        "schema": 6,
        "unverifiable": 2,
    }
    details = {one.place: one.reasons[0].detail for one in report.rejected}
    assert details[6] == "repeats row 1"
    assert details[7] == "email ki...kr"
    assert details[8] == '50 % of item 7 of amc: "one two three four five six seven eight"'
    assert "needs numbers and target" in details[11]
    assert "that of row 2 too" in details[13]
    assert "a chat, and most of the batch is a text" in details[14]
    assert report.passed
    assert report.sentence.startswith("the batch of 14 rows may be trained on: 3 accepted, 11 rej")
    assert len(report.not_checked) == 3
    json.dumps(report.as_dict(), allow_nan=False)
    assert "{oops" in json.dumps([one.as_dict() for one in report.rejected])


@pytest.mark.parametrize("letter", ["\U000f0000", "\U000f0001"])
@pytest.mark.parametrize("as_chat", [True, False])
def test_a_row_that_rendering_would_change_is_rejected_alone(letter: str, as_chat: bool):
    texts = {"2 + 2?": "4", f"3{letter} + 3?": "6", "4 + \ue000?": "5"}
    rows = [
        {"prompt": [{"role": "user", "content": text}] if as_chat else text, "answer": answer}
        for text, answer in texts.items()
    ]
    report = validate_batch(rows)
    assert reasons(report) == {2: ["schema"]}
    assert "U+F0000 or U+F0001" in report.rejected[0].reasons[0].detail


def test_a_row_has_every_reason_against_it():
    row = {"prompt": "Call 010-1234-5678 or a@b.kr", "answer": " ".join("abcdefghijklmnopqrstuvw")}
    report = validate_batch([*sums(2), row, {**row, "answer": "x"}])
    assert reasons(report) == {
        3: ["contradiction", "pii", "pii", "unverifiable"],
        4: ["contradiction", "pii", "pii"],
    }


def test_of_rows_that_contradict_each_other_none_is_kept():
    one, two = sums(2)
    report = validate_batch([one, two, {**one, "id": "x", "answer": "1"}])
    assert report.accepted == (two,)
    assert reasons(report) == {1: ["contradiction"], 3: ["contradiction"]}
    earlier = EarlierData(prompts=prompts([{**one, "answer": "1"}]))
    report = validate_batch([one, two], earlier=earlier)
    assert reasons(report) == {1: ["contradiction"]}


def test_rows_that_earlier_data_have_are_rejected():
    rows = sums(4)
    report = validate_batch(rows, earlier=EarlierData(prompts=prompts(rows[:2])))
    assert reasons(report) == {1: ["duplicate"], 2: ["duplicate"]}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("3", "3", "5", "6"), []),  # half right
        (("5", "6", "7", "8"), ["never_solved"]),
        (("3", "3.0", r"\boxed{3}", "it is 3"), ["always_solved"]),
        (("4", "4.0", "8/2", "5"), ["disputed", "never_solved"]),
        (("4", "4", "4", "3"), ["disputed"]),
        (("4", "4", "3", "3"), []),  # 2 of 4 are no consensus of 0.6
        (("no", "no", "no", "no"), ["never_solved"]),  # nothing to agree on
    ],
)
def test_samples_say_how_hard_a_row_is_and_whether_its_answer_is_disputed(
    texts: tuple[str, ...], expected: list[str]
):
    row = {"prompt": "What is 1 + 2?", "answer": "3"}
    report = validate_batch([row], sampler=answering(*texts))
    assert reasons(report) == ({1: expected} if expected else {})
    kept = DataChecks(reject_never_solved=False, reject_always_solved=False, reject_disputed=False)
    report = validate_batch([row], sampler=answering(*texts), checks=kept)
    assert report.accepted == (row,)
    assert report.profile.num_disputed == ("disputed" in expected)


def test_right_answers_are_one_however_they_are_written():
    asked = prompts([{"prompt": "Half?", "answer": "1/2"}])
    (row,) = sample_rows(
        asked, sampler=answering("0.5", "1/2", r"\frac{1}{2}", "7"), scorer=None, consensus=0.6
    ).rows
    assert (row.num_right, row.agreed, row.is_disputed) == (3, "1/2", False)
    assert row.pass_rate == 0.75


def test_where_a_program_decides_agreement_says_nothing():
    row = {
        "prompt": "Make 10 of 4 and 6.",
        "answer": "4+6",
        "grading": "countdown",
        "numbers": [4, 6],
        "target": 10,
    }
    report = validate_batch([row], sampler=answering("6+4", "5+5", "5+5", "5+5"))
    assert report.passed
    assert report.profile.num_agreed == 0


def test_a_scorer_takes_the_graders_place():
    row = {"prompt": "Say it.", "answer": "yes"}
    report = validate_batch([row], scorer=lambda text, prompt: "never" in text)
    assert reasons(report) == {1: ["unverifiable"]}
    report = validate_batch(
        [row], scorer=lambda text, prompt: "yes" in text, sampler=answering("yes sir", "nothing")
    )
    assert report.profile.pass_rates == (0.5,)


def test_the_model_is_asked_only_about_rows_that_nothing_speaks_against():
    asked: list[str] = []

    def sampler(given: Sequence[Prompt]) -> list[list[str]]:
        asked.extend(prompt.id for prompt in given)
        return [["0", prompt.columns["answer"]] for prompt in given]

    rows = [*sums(2), {"id": "pii", "prompt": "a@b.kr", "answer": "1"}]
    assert validate_batch(rows, sampler=sampler).counts["accepted"] == 2
    assert asked == ["0-0", "0-1"]


@pytest.mark.parametrize("texts", [[], [["a"], []], [["a"], ["a", "b"]], [["a"]], [[], []]])
def test_a_sampler_has_to_answer_every_prompt_alike(texts: list[list[str]]):
    with pytest.raises(DataError, match="it must give as many of each"):
        validate_batch(sums(2), sampler=lambda _: texts)


def test_an_empty_batch_is_refused_with_one_error():
    with pytest.raises(DataError, match="the batch holds no row; give at least one"):
        validate_batch([])


def test_a_batch_of_which_no_row_is_left_is_refused():
    report = validate_batch([{"prompt": "x"}], sampler=answering("1"))
    assert not report.passed
    assert report.accepted == ()
    assert "no row is left" in report.sentence
    assert list(report.refusals) == ["no_row_left"]


def test_too_many_rejected_rows_refuse_the_batch():
    rows = [*sums(2), {"prompt": "x"}]
    assert validate_batch(rows, checks=DataChecks(most_rejected=0.34)).passed
    report = validate_batch(rows, checks=DataChecks(most_rejected=0.33))
    assert list(report.refusals) == ["too_many_rejected"]
    assert len(report.accepted) == 2


def earlier_of(count: int) -> EarlierData:
    trusted = prompts(sums(count, seed=1))
    profile = profile_of(trusted, sampler=simulated_sampler(), most_sampled=count)
    return EarlierData(prompts=trusted, profile=profile)


def test_a_poisoned_batch_is_found_and_its_rows_are():
    earlier = earlier_of(200)
    rows = poisoned(sums(200, seed=2), 40)
    report = validate_batch(rows, earlier=earlier, sampler=simulated_sampler())
    assert "poisoned" in report.refusals
    assert report.disputes is not None and report.disputes.p_value < 1e-4
    disputed = [one.row for one in report.rejected if "disputed" in {r.check for r in one.reasons}]
    right = sum("is_poisoned" in row for row in disputed)
    # The samples agree on about half of the rows; where they do they are seldom wrong.
    assert right >= 20
    assert right >= 0.75 * len(disputed)
    clean = validate_batch(sums(200, seed=2), earlier=earlier, sampler=simulated_sampler())
    assert clean.passed, clean.sentence


@pytest.mark.parametrize(
    "repeats", [20, pytest.param(500, marks=pytest.mark.verify)], ids=["few", "many"]
)
def test_clean_batches_are_called_poisoned_as_rarely_as_stated(repeats: int):
    alarms = 0
    for seed in range(repeats):
        sampler = simulated_sampler(seed=seed)
        earlier = prompts(sums(100, seed=3 + 2 * seed))
        profile = profile_of(earlier, sampler=sampler)
        new = profile_of(prompts(sums(60, seed=4 + 2 * seed)), sampler=sampler)
        from gmpo.data_checks.profile import dispute_test

        found = dispute_test(new, profile, alpha=0.05)
        assert found is not None
        alarms += found.is_alarm
    assert alarms <= 0.05 * repeats + 3 * (0.05 * 0.95 * repeats) ** 0.5


def test_a_shift_is_reported_and_refused_on_request():
    earlier = earlier_of(100)
    words = "Please think carefully about this before you answer it in your own words today, "
    rows = [{**row, "prompt": f"{words * 2} {row['prompt']}"} for row in sums(100, seed=2)]
    report = validate_batch(rows, earlier=earlier)
    assert report.passed
    assert "it differs from earlier data (length" in report.sentence
    refused = validate_batch(rows, earlier=earlier, checks=DataChecks(refuse_shift=True))
    assert list(refused.refusals) == ["shift"]
    alike = validate_batch(sums(100, seed=2), earlier=earlier)
    assert not any(figure.is_alarm for figure in alike.shift)


def test_settings_are_refused_with_the_nearest_name():
    assert checks_of({"near_overlap": 0.7}).near_overlap == 0.7
    with pytest.raises(ConfigError, match="did you mean 'near_overlap'"):
        checks_of({"near_overlp": 0.7})
    with pytest.raises(ConfigError, match=r"consensus = 0\.4: input should be greater than 0\.5"):
        checks_of({"consensus": 0.4})


ROW = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(st.none(), st.integers(), st.text(max_size=3), st.booleans()),
        "prompt": st.one_of(
            st.none(),
            st.integers(),
            st.text(max_size=12),
            st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"])}), max_size=2
            ),
            st.just([{"role": "user", "content": "hi"}]),
        ),
        "problem": st.one_of(st.none(), st.text(max_size=12)),
        "answer": st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=6)),
        "answers": st.one_of(st.none(), st.lists(st.text(max_size=3), max_size=2)),
        "grading": st.sampled_from([None, "countdown", "other", 3]),
        "numbers": st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=3)),
        "target": st.one_of(st.none(), st.integers(0, 9), st.text(max_size=2)),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6))
def test_whatever_the_rows_are_each_is_accepted_or_rejected_and_training_reads_the_accepted(
    rows: list[dict[str, Any]],
):
    report = validate_batch(rows)
    assert len(report.accepted) + len(report.rejected) == len(rows) == report.counts["rows"]
    assert all(one.reasons for one in report.rejected)
    by_check = Counter(
        check for one in report.rejected for check in {reason.check for reason in one.reasons}
    )
    for check, count in by_check.items():
        assert report.counts[check] == count
    if report.accepted:
        assert len(prompts(list(report.accepted))) == len(report.accepted)
    again = validate_batch(report.accepted).accepted if report.accepted else ()
    assert again == report.accepted


def test_a_system_turn_is_part_of_the_problem():
    chat = [
        {"role": "system", "content": "You are terse. Mail a@b.kr."},
        {"role": "user", "content": "2 + 2?"},
    ]
    report = validate_batch([{"prompt": chat, "answer": "4"}])
    assert reasons(report) == {1: ["pii"]}
    prompt = Prompt(id="x", messages=(Message(role="user", content="q"),), columns={"answer": "1"})
    assert profile_of([prompt]).lengths == (1,)
