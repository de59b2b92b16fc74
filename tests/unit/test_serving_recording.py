"""Events reach the store in order, whatever it does meanwhile, and nobody waits for it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gmpo.serving.answer_record import AnswerBook
from gmpo.serving.backend import AnswerReport, Chunk, GenerationRequest, Usage
from gmpo.serving.recording import EventWriter
from gmpo.store import Event, open_store


def event(number: int, **payload: object) -> Event:
    return Event(kind="answer", time=float(number), payload={"number": number, **payload})


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < deadline, "it did not happen"
        time.sleep(0.005)


def numbers(path: Path) -> list[int]:
    store = open_store(str(path), read_only=True)
    found = [one.payload["number"] for one in store.events(kinds=["answer"])]
    store.close()
    return found


def test_what_was_put_before_the_end_is_written_in_order(tmp_path: Path):
    path = tmp_path / "store.db"
    store = open_store(str(path))
    writer = EventWriter(store)
    for number in range(1000):
        writer.put(event(number))
    writer.close()
    writer.put(event(1000))
    store.close()
    assert numbers(path) == list(range(1000))
    assert writer.counts() == {
        "written": 1000,
        "waiting": 0,
        "lost": 1,
        "refused": 0,
        "failed_writes": 0,
        "failed_samples": 0,
    }


def test_a_locked_store_delays_nobody_and_loses_only_what_finds_no_room(tmp_path: Path):
    path = tmp_path / "store.db"
    store = open_store(str(path), timeout_seconds=0.05)
    told: list[str] = []
    writer = EventWriter(store, capacity=20, tell=told.append)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.perf_counter()
    for number in range(25):
        writer.put(event(number))
    assert time.perf_counter() - began < 0.05
    wait_for(lambda: writer.num_failures > 0)
    assert writer.num_lost == 5 and writer.num_written == 0
    other.execute("ROLLBACK")
    other.close()
    wait_for(lambda: writer.num_written == 20)
    writer.close()
    store.close()
    assert numbers(path) == list(range(20))
    # However often it was tried.
    failed, again = told
    assert failed.startswith("events cannot be written: ") and "locked" in failed
    assert "up to 20" in failed and again == "events are written again"


def test_a_full_disk_is_tried_again_until_there_is_room(tmp_path: Path):
    path = tmp_path / "store.db"
    store = open_store(str(path))
    writer = EventWriter(store)
    writer.put(event(0))
    wait_for(lambda: writer.num_written == 1)
    # SQLite counts pages against this limit as it would against a disk.
    with store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    writer.put(event(1, text="x" * 100_000))
    wait_for(lambda: writer.num_failures > 0)
    with store._engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 1000}")
    wait_for(lambda: writer.num_written == 2)
    writer.close()
    store.close()
    assert numbers(path) == [0, 1]


def test_an_event_that_no_store_can_hold_does_not_stop_the_others(tmp_path: Path):
    path = tmp_path / "store.db"
    store = open_store(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    told: list[str] = []
    writer = EventWriter(store, tell=told.append)
    for number in range(5):
        writer.put(event(number, **({"value": float("nan")} if number % 2 else {})))
    other.execute("ROLLBACK")
    other.close()
    wait_for(lambda: writer.num_written == 3)
    writer.close()
    store.close()
    assert writer.num_refused == 2 and numbers(path) == [0, 2, 4]
    left_out = [one for one in told if "left out" in one]
    assert len(left_out) == 1 and "Out of range float values" in left_out[0]


def test_what_is_never_taken_is_lost_when_the_time_for_closing_is_over(tmp_path: Path):
    store = open_store(str(tmp_path / "store.db"), timeout_seconds=0.05)
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = EventWriter(store)
    writer.put(event(0))
    began = time.perf_counter()
    writer.close(timeout_seconds=0.3)
    assert time.perf_counter() - began < 5
    other.close()
    store.close()
    assert writer.num_lost == 1 and writer.num_written == 0


def test_figures_of_the_process_are_sampled(tmp_path: Path):
    store = open_store(str(tmp_path / "store.db"))
    writer = EventWriter(store, sample=lambda: {"memory_bytes": 5.0}, sample_seconds=0.05)
    wait_for(lambda: writer.num_written >= 2)
    writer.close()
    samples = store.events(kinds=["metric"])
    store.close()
    assert [one.payload for one in samples[:2]] == [{"memory_bytes": 5.0}] * 2
    assert samples[1].time > samples[0].time


def test_a_sample_that_cannot_be_taken_ends_nothing(tmp_path: Path):
    store = open_store(str(tmp_path / "store.db"))
    left = [OSError(24, "Too many open files"), ValueError("no such page")]

    def sample() -> dict[str, float]:
        if left:
            raise left.pop()
        return {"memory_bytes": 5.0}

    told: list[str] = []
    writer = EventWriter(store, sample=sample, sample_seconds=0.02, tell=told.append)
    wait_for(lambda: writer.num_failed_samples == 2)
    writer.put(event(0))
    wait_for(lambda: writer.num_written >= 2)
    writer.close()
    store.close()
    assert numbers(tmp_path / "store.db") == [0] and writer.num_failed_samples == 2
    failed, again = told
    assert "ValueError: no such page" in failed and "every 0.02 s" in failed
    assert again == "the process's figures are taken again"


def test_whatever_a_store_raises_the_other_events_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = open_store(str(tmp_path / "store.db"))
    add, gate = store.add_events, threading.Event()
    short: list[Exception] = [MemoryError(), OSError(24, "Too many open files")]

    def odd(events: Sequence[Event]) -> None:
        assert gate.wait(5)
        if short:
            raise short.pop()
        if any(one.payload.get("number") == 1 for one in events):
            raise RecursionError("too deep")
        add(events)

    monkeypatch.setattr(store, "add_events", odd)
    told: list[str] = []
    writer = EventWriter(store, tell=told.append)
    for number in range(4):
        writer.put(event(number))
    gate.set()
    wait_for(lambda: writer.num_written == 3)
    writer.close()
    store.close()
    assert (writer.num_failures, writer.num_refused, writer.num_lost) == (2, 1, 0)
    assert numbers(tmp_path / "store.db") == [0, 2, 3]
    assert "Too many open files" in told[0]
    # Not what it says: a database's own error quotes the row.
    assert "left out: RecursionError;" in told[-1]


def test_closing_waits_no_longer_than_it_was_told_and_counts_what_is_left(tmp_path: Path):
    path = tmp_path / "store.db"
    store = open_store(str(path), timeout_seconds=20)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = EventWriter(store)
    for number in range(300):
        writer.put(event(number))
    began = time.perf_counter()
    writer.close(timeout_seconds=0.2)
    assert time.perf_counter() - began < 2
    assert writer.num_lost == 300 and writer.counts()["waiting"] == 0
    # A write that still ran may come through; nothing is counted twice, and no more is written.
    other.execute("ROLLBACK")
    other.close()
    wait_for(lambda: not writer._thread.is_alive())
    store.close()
    assert (writer.num_lost, writer.num_written, writer.num_failures) == (300, 0, 0)
    assert len(numbers(path)) <= 256


def test_between_two_batches_the_time_for_closing_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = open_store(str(tmp_path / "store.db"))
    add = store.add_events

    def slow(events: Sequence[Event]) -> None:
        time.sleep(0.2)
        add(events)

    monkeypatch.setattr(store, "add_events", slow)
    writer = EventWriter(store)
    for number in range(2560):
        writer.put(event(number))
    writer.close(timeout_seconds=0.5)
    wait_for(lambda: not writer._thread.is_alive())
    written = len(numbers(tmp_path / "store.db"))
    store.close()
    assert writer.num_lost + writer.num_written == 2560
    assert writer.num_written <= written <= writer.num_written + 256 and written < 2560


def test_an_answers_event_has_every_field_of_its_kind(tmp_path: Path):
    request = GenerationRequest(
        id="r", route="chat", model="m", prompt="a", n=2, unit="u", session="s", stream=True
    )
    book = AnswerBook(request)
    book.report = AnswerReport(backend="m", model_version="v", experiment="e", quality=0.5)
    book.add(Chunk(index=0, text="a", finish_reason="stop"))
    assert not book.is_whole
    usage = Usage(prompt_tokens=3, completion_tokens=8)
    book.add(Chunk(index=1, finish_reason="length", usage=usage))
    assert book.is_whole
    store = open_store(str(tmp_path / "store.db"))
    writer = EventWriter(store)
    writer.observe(book.close(200, None))
    writer.close()
    (kept,) = store.events()
    store.close()
    assert (kept.kind, kept.model_version, kept.experiment) == ("answer", "v", "e")
    assert (kept.unit, kept.request_id) == ("u", "r")
    payload = kept.payload
    assert payload["tokens_per_s"] == 8 / payload["latency_s"]
    assert payload.pop("latency_s") >= payload.pop("first_token_s") >= 0
    assert payload.pop("tokens_per_s") > 0
    assert payload == {
        "route": "chat",
        "assigned_variant": None,
        "served_variant": None,
        "backend": "m",
        "fell_back": False,
        "fallback_reason": None,
        "status": 200,
        "finish_reason": "length",
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "quality": 0.5,
        "mean_logprob": None,
        "quality_components": {},
        "error": None,
        "session": "s",
    }


def answered(**body: object) -> AnswerBook:
    book = AnswerBook(
        GenerationRequest(
            id="r",
            route="chat",
            model="m",
            messages=({"role": "user", "content": "What is 3 + 4?"},),
            n=2,
            unit="u",
            body=body,
        ),
        report=AnswerReport(backend="engine", model_version="v", experiment="e"),
    )
    for index, text in ((0, "It is "), (1, "8"), (0, "7")):
        book.add(Chunk(index=index, text=text))
    for index in (0, 1):
        book.add(Chunk(index=index, finish_reason="stop"))
    return book


def test_texts_are_kept_only_where_operator_and_client_allow_it(tmp_path: Path):
    store = open_store(str(tmp_path / "store.db"))
    silent, keeping = EventWriter(store), EventWriter(store, record_texts=True)
    silent.observe(answered(store=True).close(200, None))
    for allowed in (None, False, "true", 1):
        keeping.observe(answered(store=allowed).close(200, None))
    keeping.observe(answered().close(200, None))
    keeping.observe(answered(store=True).close(499, "the client left"))
    keeping.observe(answered(store=True).close(200, None))
    silent.close()
    keeping.close()
    assert store.count_events(kinds=["answer"]) == 8
    (text,) = store.events(kinds=["text"])
    store.close()
    assert (text.request_id, text.unit, text.model_version, text.experiment) == ("r", "u", "v", "e")
    assert text.payload == {
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "prompt": None,
        "completions": ["It is 7", "8"],
        "finish_reason": "stop",
        "consent": True,
    }
