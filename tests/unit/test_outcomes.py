"""Outcomes of items: what is kept, what it is worth, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.suite_outcomes import ASKED_WITH, GREEDY, completion, greedy, outcomes

from gmpo.errors import DataError, RunFolderError
from gmpo.grading import Verdict
from gmpo.outcomes import ItemOutcome, Mix, item_outcome, stored_outcomes, write_outcomes
from gmpo.records import Group, Message, Prompt, Rollout

RIGHT = Verdict(is_correct=True, status="graded", answer="4", method="exact")


def group(question: str, *, answer: str = "4", finish: str = "stop") -> Group:
    prompt = Prompt(
        id="q", messages=(Message(role="user", content=question),), columns={"answer": answer}
    )
    rollout = Rollout(
        prompt_id="q",
        index=0,
        token_ids=np.array([7, 8, 9]),
        from_policy=np.ones(3, dtype=bool),
        sampler_logprobs=np.zeros(3),
        text="it is 4",
        finish_reason=finish,  # type: ignore[arg-type]
        first_version=0,
        last_version=0,
    )
    return Group(prompt=prompt, rollouts=(rollout,))


def kept(made: Group, *, keep_texts: bool = False) -> ItemOutcome:
    return item_outcome(made, [RIGHT], keep_texts=keep_texts)


def test_an_item_keeps_verdict_length_cut_and_text_if_wanted():
    (one,) = kept(group("2+2?", finish="length")).completions
    assert (one.is_correct, one.answer, one.num_tokens) == (True, "4", 3)
    assert (one.is_truncated, one.text) == (True, None)
    (one,) = kept(group("2+2?"), keep_texts=True).completions
    assert (one.is_truncated, one.text) == (False, "it is 4")


def test_the_digest_tells_questions_instructions_and_answers_apart_but_not_spaces():
    digest = kept(group("What is 2+2?")).digest
    assert kept(group("What  is\n2+2?")).digest == digest
    assert kept(group("What is 2+2? Box it.")).digest != digest
    assert kept(group("What is 2+2?", answer="5")).digest != digest


def test_an_item_is_worth_pass_at_k():
    item = outcomes("a", {"q": [True, False, False, False]}).items[0]
    assert item.num_correct == 1
    assert item.value(1) == pytest.approx(0.25)
    assert item.value(2) == pytest.approx(0.5)  # 1 - C(3,2) / C(4,2) = 1 - 3/6
    assert item.value(4) == 1.0


def test_means_are_over_items():
    sampled = outcomes("a", {"x": [True, True], "y": [True, False], "z": [False, False]})
    assert sampled.mean(1) == pytest.approx(0.5)  # (1 + 1/2 + 0) / 3
    assert sampled.mean(2) == pytest.approx(2 / 3)  # (1 + 1 + 0) / 3


def test_one_completion_an_item_gives_wilsons_interval():
    # 1 of 10: (0.1 + 1.92 / 10 -+ 1.96 * sqrt(0.09 / 10 + 0.96 / 100)) / (1 + 3.84 / 10)
    assert greedy("a", {3}, 10).interval(1) == pytest.approx((0.0179, 0.4042), abs=1e-4)


def test_items_that_are_all_alike_still_have_an_interval():
    low, high = outcomes("a", {f"q{n}": [False] * 4 for n in range(10)}).interval(1)
    assert (low, high) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Wilson's of 0 of 10


def test_what_a_score_hides_is_counted():
    cut = completion(False, is_truncated=True, status="no_answer", answer=None)
    late = completion(False, status="timeout")
    item = ItemOutcome(id="q", digest="d", completions=(cut, late, completion(True)))
    one = replace(greedy("a", set(), 1), items=(item,))
    counts = one.counts()
    assert counts["completions"] == 3
    assert (counts["truncated"], counts["no_answer"], counts["timeouts"]) == (1, 1, 1)
    assert counts["scorer_errors"] == 0


def test_files_are_read_back_whole_and_in_the_order_placed(tmp_path: Path):
    made_with = {"gmpo": "0.1.0", "commit": None}
    mix = Mix(name="runs/other", weight=0.25)
    asked_with = replace(ASKED_WITH, system="Be brief.", stop_strings=("Q:",), mix=mix)
    first = replace(greedy("b", {0}, 2), made_with=made_with, asked_with=asked_with)
    second = outcomes("a", {"x": [True, False]}, suite="svamp")
    second = replace(second, way=replace(second.way, best_of=8))
    write_outcomes(tmp_path / "zz", first, place=1)
    write_outcomes(tmp_path / "aa", second, place=2)
    assert stored_outcomes(tmp_path) == [first, second]
    assert stored_outcomes(tmp_path / "aa") == [second]
    assert first.way == GREEDY


def test_a_file_that_does_not_say_what_made_it_or_how_it_asked_is_read(tmp_path: Path):
    path = write_outcomes(tmp_path, greedy("a", {0}, 2), place=1)
    record = json.loads(path.read_text())
    del record["way"]["best_of"], record["asked_with"]["mix"]
    path.write_text(json.dumps(record))
    assert stored_outcomes(tmp_path) == [greedy("a", {0}, 2)]
    del record["made_with"], record["asked_with"]
    path.write_text(json.dumps(record))
    assert stored_outcomes(tmp_path) == [replace(greedy("a", {0}, 2), asked_with=None)]


def test_damaged_and_other_files_are_refused(tmp_path: Path):
    path = write_outcomes(tmp_path, greedy("a", {0}, 2), place=1)
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(DataError, match="no whole file of outcomes"):
        stored_outcomes(tmp_path)
    path.write_text(json.dumps({**json.loads(whole), "items": []}))
    with pytest.raises(DataError, match="holds no item; remove it or evaluate anew"):
        stored_outcomes(tmp_path)
    path.write_text(json.dumps({**json.loads(whole), "format": 9}))
    with pytest.raises(DataError, match="has format 9, this version reads 1"):
        stored_outcomes(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written to"):
        write_outcomes(tmp_path / "file", greedy("a", {0}, 1), place=1)
