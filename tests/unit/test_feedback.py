"""Served answers as training rows, over a real store."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from tests.commands import gmpo, refusal

from gmpo.data_checks.quality import validate_batch
from gmpo.errors import ConfigError, StoreLocked
from gmpo.feedback import (
    FeedbackPolicy,
    policy_of,
    purge_texts,
    training_rows,
    verdict_event,
)
from gmpo.store import Event, Experiment, Store, open_store
from gmpo.store.tables import EVENTS

DAY = 86_400.0
NOW = 100 * DAY


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store.db")) as opened:
        yield opened


def served(
    request: str,
    asked: str | list[dict[str, str]],
    *said: str,
    at: float = NOW - DAY,
    experiment: str | None = None,
    unit: str | None = None,
    **more: Any,
) -> Event:
    payload = {
        "messages": asked if isinstance(asked, list) else [{"role": "user", "content": asked}],
        "prompt": None,
        "completions": list(said),
        "finish_reason": "stop",
        "consent": True,
        **more,
    }
    return Event(
        kind="text",
        time=at,
        payload=payload,
        request_id=request,
        experiment=experiment,
        unit=unit,
    )


def vote(request: str, score: float, at: float = NOW) -> Event:
    payload = {"score": score, "comment_length": 0}
    return Event(kind="feedback", time=at, payload=payload, request_id=request)


def answers(store: Store, **policy: Any) -> dict[str, str]:
    found = training_rows(store, policy=FeedbackPolicy(**policy), now=NOW)
    return {row["id"].removeprefix("served-"): row["answer"] for row in found.rows}


def left_out(store: Store, **policy: Any) -> dict[str, int]:
    return dict(training_rows(store, policy=FeedbackPolicy(**policy), now=NOW).left_out)


def test_a_liked_answer_becomes_a_row_that_training_reads(store: Store):
    store.add_events([served("r1", "What is 3 + 4?", "It is 7."), vote("r1", 1.0)])
    found = training_rows(store, now=NOW)
    assert found.rows == (
        {
            "id": "served-r1",
            "prompt": [{"role": "user", "content": "What is 3 + 4?"}],
            "answer": "7",
            "category": "served",
            "confirmed_by": "votes",
            "requests": 1,
        },
    )
    assert found.as_dict() == {"rows": 1, "texts": 1, "left_out": {}}
    assert validate_batch(found.rows).accepted == found.rows


def test_a_verifiers_reference_makes_a_row_of_a_wrong_answer(store: Store):
    store.add_events(
        [
            served("r1", "What is 3 + 4?", "It is 8."),
            verdict_event("r1", by="checker", is_correct=False, reference="7", now=NOW),
            served("r2", "What is 5 + 5?", r"So \boxed{10}"),
            verdict_event("r2", by="checker", is_correct=True, now=NOW),
        ]
    )
    assert answers(store) == {"r1": "7", "r2": "10"}
    assert answers(store, votes=False) == {"r1": "7", "r2": "10"}
    with pytest.raises(ConfigError, match="says nothing; give is_correct"):
        verdict_event("r1", by="checker", reference=" ")


def test_every_answer_that_becomes_no_row_is_counted_by_reason(store: Store):
    store.add_events(
        [
            served("a", "one?", "1", consent=False),
            served("b", "two?", "2", at=NOW - 31 * DAY),
            served("c", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
            served("d", "four?", "4"),  # nobody judged it
            served("e", "five?", "5"),
            vote("e", 0.0),  # disliked
            served("f", "six?", "6", finish_reason="length"),
            vote("f", 1.0),  # liked, but cut
            served("g", "seven?", "7", "8"),
            vote("g", 1.0),  # which of the two
            served("h", "eight?", "I do not know"),
            vote("h", 1.0),
            served("i", "nine?", "9"),
            vote("i", 1.0),
            verdict_event("i", by="checker", is_correct=False, now=NOW),
            served("j", "ten?", "10"),
            verdict_event("j", by="one", reference="10", now=NOW),
            verdict_event("j", by="two", reference="11", now=NOW),
            Event(kind="text", time=NOW, payload={"consent": True}),
        ]
    )
    found = training_rows(store, now=NOW)
    assert found.rows == ()
    assert found.left_out == {
        "liked, but wrong by a verdict": 1,
        "no chat that ends in a user turn": 1,
        "no confirmed answer": 5,
        "no consent": 1,
        "no request id": 1,
        "older than the retention": 1,
        "verdicts with different answers": 1,
    }
    assert sum(found.left_out.values()) == found.num_texts == 11


def test_users_of_one_problem_are_counted_together(store: Store):
    store.add_events(
        [
            served("r1", "What is 1/2 + 1/2?", "1"),
            vote("r1", 1.0),
            served("r2", "what IS  1/2 + 1/2?", "1.0"),
            vote("r2", 1.0),
            served("r3", "What is 1/2 + 1/2?", "2"),
            vote("r3", 1.0),
        ]
    )
    # Two of three votes stand behind 1.
    assert left_out(store) == {"votes disagree": 3}
    assert answers(store, least_agreement=0.6) == {"r1": "1"}
    assert left_out(store, least_agreement=0.6) == {"the same problem again": 2}
    assert left_out(store, least_agreement=0.6, least_votes=3) == {"too few votes": 3}


def test_a_user_has_one_vote_on_a_problem_however_often_it_asks(store: Store):
    for number in range(5):
        request = f"r{number}"
        store.add_events([served(request, "six?", "7", unit="loud"), vote(request, 1.0)])
    assert left_out(store, least_votes=5) == {"too few votes": 5}
    store.add_events([served("other", "six?", "6", unit="calm"), vote("other", 1.0)])
    # One against one, not five.
    assert left_out(store) == {"votes disagree": 6}
    store.add_events([served("late", "six?", "6", unit="loud"), vote("late", 1.0)])
    assert answers(store, least_votes=2) == {"r0": "6"}
    # Its last vote counts, also where that is on an earlier answer.
    store.add_events([vote("r0", 0.0)])
    assert left_out(store) == {"votes disagree": 7}


def test_users_without_a_name_are_told_apart_by_request(store: Store):
    for number in range(3):
        store.add_events([served(f"r{number}", "six?", "6"), vote(f"r{number}", 1.0)])
    assert answers(store, least_votes=3) == {"r0": "6"}


def test_the_last_word_of_a_user_counts(store: Store):
    store.add_events([served("r", "six?", "6"), vote("r", 1.0), vote("r", 0.0)])
    assert left_out(store) == {"no confirmed answer": 1}
    store.add_events([vote("r", 0.5)])
    assert answers(store) == {"r": "6"}
    assert answers(store, liked=0.6) == {}
    assert answers(store, votes=False) == {}


def test_what_a_running_experiment_asks_is_kept_out_of_its_training(store: Store):
    def put(status: Any) -> None:
        store.put_experiment(
            Experiment(name="e", created=1.0, status=status, config={}, decision=None),
            expected=store.experiment("e"),
        )

    put("running")
    store.add_events(
        [
            served("r1", "six?", "6", experiment="e", at=NOW - 40 * DAY),
            served("r2", "SIX?", "6"),  # the same problem elsewhere
            vote("r2", 1.0),
            served("r3", "seven?", "7"),
            vote("r3", 1.0),
        ]
    )
    assert answers(store) == {"r3": "7"}
    assert left_out(store)["asked in a running experiment"] == 1
    put("stopped")
    assert answers(store) == {"r2": "6", "r3": "7"}


def test_only_the_span_asked_for_is_read(store: Store):
    store.add_events(
        [
            event
            for number in range(4)
            for event in (
                served(f"r{number}", f"{number}?", str(number), at=NOW - number * DAY),
                vote(f"r{number}", 1.0),
            )
        ]
    )
    found = training_rows(store, since=NOW - 2 * DAY, until=NOW, now=NOW)
    assert [row["answer"] for row in found.rows] == ["1", "2"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from(["1", "2", "none"]),
            st.sampled_from([None, 0.0, 1.0]),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_each_text_becomes_part_of_a_row_or_is_counted(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, str, float | None, bool]]
):
    with open_store(str(tmp_path_factory.mktemp("store") / "store.db")) as store:
        for number, (problem, said, score, consent) in enumerate(asked):
            store.add_events([served(f"r{number}", problem, said, consent=consent)])
            if score is not None:
                store.add_events([vote(f"r{number}", score)])
        found = training_rows(store, now=NOW)
    assert len(found.rows) + sum(found.left_out.values()) == found.num_texts == len(asked)
    assert len({json.dumps(row["prompt"]) for row in found.rows}) == len(found.rows)


def test_a_purge_deletes_texts_by_age_user_and_request_and_nothing_else(store: Store):
    store.add_events(
        [
            served("r1", "secret one", "1", at=NOW - 40 * DAY, unit="u1"),
            served("r2", "secret two", "2", unit="u1"),
            served("r3", "secret three", "3", unit="u2"),
            served("r4", "secret four", "4", unit="u2"),
            verdict_event("r2", by="checker", reference="secret", now=NOW),
            vote("r2", 1.0),
            Event(kind="answer", time=NOW - 40 * DAY, payload={}, request_id="r1"),
        ]
    )
    assert purge_texts(store, before=NOW - 30 * DAY, dry_run=True) == 1
    assert store.count_events(kinds=["text"]) == 4
    assert purge_texts(store, before=NOW - 30 * DAY) == 1
    assert purge_texts(store, unit="u1") == 2  # the text and the verdict on it
    assert purge_texts(store, request_id="r4") == 1
    assert [event.request_id for event in store.events(kinds=["text", "verdict"])] == ["r3"]
    assert store.count_events(kinds=["answer", "feedback"]) == 2
    assert [event.payload["deleted"] for event in store.events(kinds=["purge"])] == [1, 2, 1]
    assert purge_texts(store, unit="u1") == 0
    with pytest.raises(ConfigError, match="nothing says which texts to delete"):
        purge_texts(store)


def test_what_was_purged_is_not_in_the_file_any_more(tmp_path: Path):
    path = tmp_path / "store.db"
    with open_store(str(path)) as store:
        store.add_events([served(f"r{n}", f"very secret {n}", "1") for n in range(50)])
    assert b"very secret" in path.read_bytes()
    with open_store(str(path)) as store:
        assert purge_texts(store, before=NOW) == 50
    assert b"very secret" not in path.read_bytes()


def test_what_was_purged_is_not_in_the_file_nor_its_log_while_a_gateway_has_them_open(
    tmp_path: Path, store: Store
):
    path = tmp_path / "store.db"
    store.add_events([served(f"r{n}", f"very secret {n}", "1") for n in range(50)])

    def still_there() -> list[str]:
        return [one.name for one in tmp_path.iterdir() if b"very secret" in one.read_bytes()]

    assert still_there()
    with open_store(str(path), timeout_seconds=0.2) as purging:
        with store._reading() as connection:
            connection.execute(select(EVENTS.c.id)).fetchone()
            with pytest.raises(StoreLocked, match=r"50 .* are deleted; .* delete again"):
                purge_texts(purging, before=NOW)
        assert purge_texts(purging, before=NOW) == 0
        assert still_there() == []


def test_rows_are_collected_checked_and_purged_from_the_command_line(tmp_path: Path):
    path, rows = tmp_path / "store.db", tmp_path / "rows.jsonl"
    now = time.time()
    with open_store(str(path)) as store:
        for number in range(3):
            store.add_events(
                [served(f"r{number}", f"What is {number} + 1?", str(number + 1), at=now - 60)]
            )
            store.add_events([vote(f"r{number}", float(number > 0))])
    done = gmpo("data", "collect", "--store", path, "--out", rows)
    assert done.exit_code == 0, done.stderr
    assert f"2 rows of 3 recorded answers written to {rows}" in done.stdout
    assert "left out: 1 no confirmed answer" in done.stdout
    checked = gmpo("data", "check", rows, "--out", tmp_path / "checked", "--json")
    assert json.loads(checked.stdout)["counts"]["accepted"] == 2, checked.stdout
    dry = gmpo("data", "purge", "--store", path, "--older-than-days", "0", "--dry-run", "--json")
    assert json.loads(dry.stdout) == {"events": 3, "dry_run": True}
    done = gmpo("data", "purge", "--store", path, "--older-than-days", "0")
    assert "3 recorded texts and verdicts deleted" in done.stdout
    again = gmpo("data", "collect", "--store", path, "--out", tmp_path / "none.jsonl", "--json")
    assert json.loads(again.stdout) == {"rows": 0, "texts": 0, "left_out": {}}
    assert "holds no row" in refusal(
        "data", "check", tmp_path / "none.jsonl", "--out", tmp_path / "c2"
    )
    assert "is there already" in refusal("data", "collect", "--store", path, "--out", rows)
    assert "--days is -1" in refusal(
        "data", "collect", "--store", path, "--out", tmp_path / "x", "--days", "-1"
    )
    assert "name an age, a unit or a request" in refusal("data", "purge", "--store", path)
    assert "did you mean 'least_votes'" in refusal(
        *("data", "collect", "--store", path, "--out", tmp_path / "x", "--set", "least_vote=3")
    )


def test_settings_are_refused_with_the_nearest_name():
    assert policy_of({"least_votes": 2}).least_votes == 2
    with pytest.raises(ConfigError, match=r"least_agreement = 0\.5: input should be greater"):
        policy_of({"least_agreement": 0.5})


def test_a_store_without_texts_says_how_they_are_kept(tmp_path: Path):
    path = str(tmp_path / "store.db")
    open_store(path).close()
    done = gmpo("data", "collect", "--store", path, "--out", tmp_path / "rows.jsonl")
    assert done.exit_code == 0 and done.stdout.startswith("0 rows of 0 recorded answers")
    assert "the gateway runs with --record-texts" in done.stderr
