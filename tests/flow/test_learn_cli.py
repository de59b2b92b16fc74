"""`gmpo learn` on the command line: refusals in one line, a dry run, a cycle as JSON."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from tests.commands import gmpo, refusal
from tests.registries import model_folder

from gmpo.continual.cycle import lease_name
from gmpo.continual.lease import held_lease
from gmpo.continual.plan import batch_digest, write_rows
from gmpo.registry import Registry
from gmpo.store import Event, open_store


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """Options that name a store with an adopted champion, a suite and new rows."""
    with open_store(str(tmp_path / "store.db")) as store:
        registry = Registry(store, tmp_path / "models")
        first = registry.add(model_folder(tmp_path / "first", 0.0), name="bot")
        registry.adopt("bot", first.version, reason="first")
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(500)]
    write_rows(tmp_path / "old.jsonl", rows[:400])
    write_rows(tmp_path / "new.jsonl", rows[400:])
    (tmp_path / "plan.toml").write_text("check_samples = 0\nmin_rows = 30\n")
    return [
        *("--store", str(tmp_path / "store.db"), "--name", "bot"),
        *("--suite", f"old={tmp_path / 'old.jsonl'}", "--data", str(tmp_path / "new.jsonl")),
        *("--plan", str(tmp_path / "plan.toml")),
    ]


def recorded(count: int) -> list[Event]:
    """Served answers that users liked, as a gateway records them with consent."""
    now, events = time.time(), []
    for n in range(count):
        asked = [{"role": "user", "content": f"What is {n} times {n + 7}?"}]
        said = {"messages": asked, "prompt": None, "completions": [str(n * (n + 7))]}
        payload = {**said, "finish_reason": "stop", "consent": True}
        vote = {"score": 1.0, "comment_length": 0}
        events += [
            Event(kind="text", time=now, payload=payload, request_id=f"r{n}"),
            Event(kind="feedback", time=now, payload=vote, request_id=f"r{n}"),
        ]
    return events


def feedback_files(folder: Path) -> list[Path]:
    return list(folder.rglob("feedback-*"))


def output(*arguments: str) -> str:
    result = gmpo(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def test_a_dry_run_says_what_a_cycle_would_do_and_stores_nothing(place: list[str], tmp_path: Path):
    told = json.loads(output("learn", *place, "--dry-run", "--json"))
    assert told["data_passes"]
    assert told["suites"] == {"old": 400}
    assert told["items_needed_at_least"]["overall"] <= 400
    assert told["trained_rows"] == 100
    with open_store(str(tmp_path / "store.db")) as store:
        assert store.cycles("bot") == []
    assert "data_passes: True" in output("learn", *place, "--dry-run")


def test_what_cannot_be_learned_is_refused_in_one_line(place: list[str], tmp_path: Path):
    assert "--store and --name" in refusal("learn")
    assert "NAME=FILE" in refusal("learn", *place, "--suite", "old")
    assert "give one of" in refusal("learn", *place, "--approve", "--dry-run")
    assert "no cycle goes on" in refusal("learn", *place, "--approve")
    assert "none to abandon" in refusal("learn", *place, "--abandon", "no reason")
    few = tmp_path / "few.jsonl"
    write_rows(few, [{"prompt": "What is 1 + 1?", "answer": "2"}])
    assert "too small for the margin" in refusal(
        "learn", *place[:4], "--suite", f"few={few}", *place[6:]
    )
    assert "no suite is named" in refusal("learn", *place[:4], *place[6:])
    assert "no champion" in refusal("learn", "--store", place[1], "--name", "other", *place[4:])
    (tmp_path / "plan.toml").write_text("margin = 1\n")
    assert "margin" in refusal("learn", *place)


def test_an_empty_batch_begins_no_cycle(place: list[str], tmp_path: Path):
    (tmp_path / "new.jsonl").write_text("\n")
    assert "there is no new row in" in refusal("learn", *place)
    assert "holds no row" in refusal("learn", *place, "--dry-run")
    feedback = [*place[:6], *place[8:], "--feedback"]
    assert "wait until answers are confirmed" in refusal("learn", *feedback)
    output("learn", *feedback, "--every-hours", "1")
    assert feedback_files(tmp_path) == []
    with open_store(str(tmp_path / "store.db")) as store:
        assert store.cycles("bot") == []


def test_a_batch_that_is_not_due_begins_no_cycle(place: list[str], tmp_path: Path):
    output("learn", *place, "--when-rows", "101")
    with open_store(str(tmp_path / "store.db")) as store:
        assert store.cycles("bot") == []


def test_rows_of_earlier_cycles_make_no_other_one_due(place: list[str], tmp_path: Path):
    known, data = [{"prompt": "What is 1 + 1?", "answer": "2"}], tmp_path / "new.jsonl"
    numbered = [{"question": f"What is {n} + 1?"} for n in range(40)]
    write_rows(data, [*numbered, *known])  # rows without an answer: the cycle is refused
    assert json.loads(output("learn", *place, "--when-rows", "41", "--json"))["number"] == 1
    grown = [*numbered, *known, *({"question": f"Is {n} odd?"} for n in range(5))]
    write_rows(data, grown)
    result = gmpo("learn", *place, "--when-rows", "6")
    assert "no cycle is due" in result.stderr
    write_rows(data, list(reversed(grown[:-5])))  # another batch, of no new row
    assert "no cycle is due" in gmpo("learn", *place, "--every-hours", "0.0000001").stderr
    write_rows(data, grown)
    assert json.loads(output("learn", *place, "--when-rows", "5", "--json"))["number"] == 2
    with open_store(str(tmp_path / "store.db")) as store:
        trigger = store.cycles("bot")[1].payload["request"]["trigger"]
    assert trigger == "5 new rows, at least 5 wanted"


@pytest.mark.parametrize("is_begun_before", [True, False])
def test_a_call_that_waited_decides_by_what_it_finds_then(
    place: list[str], tmp_path: Path, is_begun_before: bool
):
    where, data = str(tmp_path / "store.db"), str(tmp_path / "new.jsonl")
    holds = threading.Event()

    def another_controller() -> None:
        with (
            open_store(where) as store,
            held_lease(store, lease_name("bot"), holder="another", seconds=30) as lease,
        ):
            champion = store.champion("bot")
            assert champion is not None
            payload = {
                "request": {"data": [data], "data_digest": batch_digest([data])},
                "reports": {},
                "champion": champion.version,
                "champion_revision": champion.revision,
            }
            if not is_begun_before:
                holds.set()
                time.sleep(1.0)  # the call waits for the lease
            begun = store.begin_cycle("bot", state="validate", payload=payload, lease=lease.lease)
            if is_begun_before:
                holds.set()
                time.sleep(1.0)
            payload["result"] = {}
            store.move_cycle(begun, state="refused", payload=payload, ends=True, lease=lease.lease)

    other = threading.Thread(target=another_controller)
    other.start()
    assert holds.wait(30)
    said = gmpo("learn", *place, "--when-rows", "100", "--wait", "60")
    other.join()
    assert said.exit_code == 0, (said.stderr, said.exception)
    assert "no cycle is due; nothing was done" in said.stderr
    with open_store(where) as store:
        assert [cycle.state for cycle in store.cycles("bot")] == ["refused"]


def test_confirmed_answers_are_learned_from(place: list[str], tmp_path: Path):
    options = [*place[:6], *place[8:], "--feedback"]
    with open_store(str(tmp_path / "store.db")) as store:
        store.add_events(recorded(60))
    told = json.loads(output("learn", *options, "--dry-run", "--json"))
    assert told["data_passes"], told["data"]
    assert told["trained_rows"] == 60
    assert "give one of them" in refusal("learn", *place, "--feedback")
    assert "says what is learned" in refusal("learn", *options[:-1])


def test_users_texts_are_left_by_a_cycle_alone(
    place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = [*place[:6], *place[8:], "--feedback"]
    with open_store(str(tmp_path / "store.db")) as store:
        store.add_events(recorded(20))  # fewer than the plan's min_rows
    output("learn", *options, "--dry-run")
    assert not (tmp_path / "learn").exists()
    refusal("learn", *options, "--dry-run", "--replay", str(tmp_path / "gone.jsonl"))
    output("learn", *options, "--when-rows", "21")
    refusal("learn", *options, "--replay", str(tmp_path / "gone.jsonl"))
    assert feedback_files(tmp_path) == []
    assert list(tmp_path.rglob("gmpo-learn-*")) == []
    assert json.loads(output("learn", *options, "--json"))["outcome"] == "refused"
    assert feedback_files(tmp_path) == [tmp_path / "learn" / "bot" / "feedback-000001.jsonl"]


def test_a_batch_that_is_refused_is_told_as_one_object(place: list[str], tmp_path: Path):
    write_rows(tmp_path / "new.jsonl", [{"prompt": "What is 1 + 1?", "answer": "2"}] * 40)
    told = json.loads(output("learn", *place, "--json"))
    assert (told["success"], told["outcome"], told["step"]) == (False, "refused", "validate")
    assert told["reason"] == "Data validation failed: no_row_left"
    with open_store(str(tmp_path / "store.db")) as store:
        (cycle,) = store.cycles("bot")
        assert cycle.state == "refused"


def test_files_that_a_cycle_would_miss_later_begin_none(place: list[str], tmp_path: Path):
    gone = str(tmp_path / "gone.jsonl")
    assert "gone.jsonl does not exist" in refusal("learn", *place, "--replay", gone)
    (tmp_path / "plan.toml").write_text(f'check_samples = 0\ntraffic = "{gone}"\n')
    silent = "http://127.0.0.1:9/v1"
    assert "gone.jsonl does not exist" in refusal("learn", *place, "--gateway", silent)
    one = tmp_path / "one.jsonl"
    write_rows(one, [{"prompt": "What is 1 + 1?", "answer": "2"}])
    (tmp_path / "plan.toml").write_text(f'check_samples = 0\ntraffic = "{one}"\n')
    said = refusal("learn", *place, "--gateway", silent)
    assert "one.jsonl has 1 request, and the live test needs at least 2" in said
    (tmp_path / "plan.toml").write_text("check_samples = 0\n")
    for more in ((), ("--dry-run",)):
        said = refusal("learn", *place, "--gateway", silent, *more)
        assert f"the server at {silent} does not say what it serves" in said
    with open_store(str(tmp_path / "store.db")) as store:
        assert store.cycles("bot") == []


def test_a_damaged_champion_begins_no_cycle_and_raises_an_alert(place: list[str], tmp_path: Path):
    with open_store(str(tmp_path / "store.db")) as store:
        champion = store.champion("bot")
        assert champion is not None
        (tmp_path / "models" / champion.version / "model.safetensors").write_bytes(b"")
        add = f"(gmpo registry add MODEL --name bot --store {tmp_path / 'store.db'})"
        assert add in refusal("learn", *place, "--dry-run")
        assert store.alerts("firing") == []  # a dry run writes nothing
        said = refusal("learn", *place)
        assert "is not learned from: no version of 'bot' can be served" in said
        assert add in said and said.endswith("give this command again; no cycle was begun")
        assert store.cycles("bot") == []
        assert len(store.alerts("firing")) == 1
        output("registry", "add", str(tmp_path / "first"), "--name", "bot", *place[:2])
        assert store.alerts("firing") == []


def test_a_model_without_champion_is_told_how_to_get_one(place: list[str], tmp_path: Path):
    said = refusal("learn", *place[:2], "--name", "other", *place[4:])
    assert "gmpo registry add MODEL --name other --store STORE, then gmpo registry adopt" in said
    assert said.endswith("other models of this store: bot")


def test_rejected_rows_are_pointed_at_and_only_their_owner_reads_them(
    place: list[str], tmp_path: Path
):
    write_rows(tmp_path / "new.jsonl", [{"question": "What is 1 + 1?"}] * 40)
    result = gmpo("learn", *place)
    assert result.exit_code == 0
    rejected = tmp_path / "learn" / "bot" / "cycle-000001" / "validate" / "rejected.jsonl"
    assert f"the 40 rejected rows and why: {rejected}" in result.stderr
    assert rejected.stat().st_mode & 0o777 == 0o600
    assert len(rejected.read_text().splitlines()) == 40


def test_a_mistyped_store_is_refused_and_not_made(place: list[str], tmp_path: Path):
    mistyped = tmp_path / "stroe.db"
    assert "there is no store at" in refusal("learn", "--store", str(mistyped), *place[2:])
    assert not mistyped.exists()


def test_the_demonstration_refuses_options_that_it_would_not_follow(tmp_path: Path):
    store, folder = tmp_path / "store.db", tmp_path / "demo"
    beside = ("--folder", str(folder), "--json", "--store", str(store), "--when-rows", "5")
    said = refusal("learn", "--demo", *beside)
    assert "does not follow --store, --when-rows" in said
    assert not folder.exists() and not store.exists()
