"""`gmpo ab` over a real store, from the first unit to the decision."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.commands import gmpo, process, refusal

from gmpo.abtest.assignment import assign
from gmpo.abtest_report import metric_rows, report_of
from gmpo.serving.backend import GenerationRequest
from gmpo.serving.splitting import TrafficSplit
from gmpo.store import Event, Experiment, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> str:
    path = tmp_path / "store.db"
    began = gmpo(
        "ab", "start", "greeting", "--store", path, "--control", "old", "--candidate", "new",
        "--guardrail", "latency_p95=0.5", "--set", "tuned_for=300", "--json",
    )  # fmt: skip
    assert began.exit_code == 0, began.stderr
    plan = json.loads(began.stdout)["plan"]
    chance = random.Random(0)
    events = []
    for number in range(600):
        unit = f"user-{number}"
        arm = assign("greeting", plan["salt"], unit, plan["weights"])
        about = {"experiment": "greeting", "unit": unit, "request_id": f"r{number}"}
        events.append(
            Event(
                kind="exposure",
                time=float(number),
                payload={"variant": arm, "weight": 0.5},
                **about,
            )
        )
        success = int(chance.random() < (0.8 if arm == "candidate" else 0.5))
        payload = {"variant": arm, "success": success, "quality": None, "latency_s": 1.0}
        events.append(Event(kind="outcome", time=number + 0.5, payload=payload, **about))
    with open_store(str(path)) as opened:
        opened.add_events(events)
    return str(path)


def test_an_experiment_is_looked_at_and_ended(store: str, tmp_path: Path):
    status = process("ab", "status", "--store", store)
    assert status.returncode == 0, status.stderr
    assert "greeting (running): Promote the candidate (new)" in status.stdout
    picture = tmp_path / "sequence.png"
    shown = gmpo("ab", "report", "greeting", "--store", store, "--plot", picture)
    assert shown.exit_code == 0, shown.stderr
    assert "success rate" in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(gmpo("ab", "report", "greeting", "--store", store, "--json").stdout)
    assert report["num_units"] == 600
    assert report["decision"]["action"] == "promote"
    stopped = gmpo("ab", "stop", "greeting", "--store", store)
    assert "greeting is stopped. Promote" in stopped.stdout
    with open_store(store) as opened:
        kept = opened.experiment("greeting")
        assert kept is not None
        success, latency = metric_rows(report_of(opened, kept))
        assert success[4].endswith(" points") and latency[4].endswith(" %")
        assert kept.status == "stopped"
        assert kept.decision is not None
        assert kept.decision["decision"]["action"] == "promote"
        assert opened.count_events(kinds=["decision"], experiment="greeting") == 1
    assert "was stopped already" in refusal("ab", "stop", "greeting", "--store", store)
    again = json.loads(gmpo("ab", "status", "--store", store, "--json").stdout)
    assert again[0]["status"] == "stopped"


def test_changed_shares_move_the_border_and_begin_the_evidence_anew(tmp_path: Path):
    store = str(tmp_path / "store.db")
    begin = ("ab", "start", "e", "--store", store, "--control", "a", "--candidate", "b")
    assert gmpo(*begin, "--share", "0.1", "--set", "burn_in=10").exit_code == 0
    with open_store(store) as opened, ThreadPoolExecutor(1) as beside:
        put: list[Event] = []
        split = TrafficSplit(
            opened, "e", backend_of={"a": "a", "b": "b"}, put=put.append, tell=lambda _: None
        )

        def ask(units: range) -> dict[int, str]:
            asked = {
                unit: GenerationRequest(
                    id=f"r{unit}", route="chat", model="m", prompt="p", unit=f"u{unit}"
                )
                for unit in units
            }
            routes = {unit: split.assign(request) for unit, request in asked.items()}
            opened.add_events([put.pop(0) for _ in range(len(put))])
            return {unit: route.variant or "" for unit, route in routes.items() if route}

        first = ask(range(2000))
        # In a thread without a loop of its own, as in a process of its own.
        changed = beside.submit(gmpo, "ab", "weights", "e", "--store", store, "--share", "0.5")
        assert changed.result().exit_code == 0, changed.result().stderr
        said = " ".join(changed.result().stdout.split())
        assert "e: 50 % of the units get b, 10 % did" in said and "begins anew" in said
        asyncio.run(split.look())
        second = ask(range(4000))
        (event,) = opened.events(kinds=["weights"], experiment="e")
        kept = opened.experiment("e")
        assert kept is not None
        report = report_of(opened, kept)
    assert event.payload == {
        "before": {"control": 0.9, "candidate": 0.1},
        "after": {"control": 0.5, "candidate": 0.5},
    }
    moved = {unit for unit in first if first[unit] != second[unit]}
    assert moved and all(second[unit] == "candidate" for unit in moved)
    # The first 2,000 had 10 % by right: held to 50 % they would alarm, and so would all together.
    assert not report.ratio.alarm and report.num_units == 2000
    assert report.counts["units_under_other_weights"] == 2000
    assert "moved_units" not in report.counts, "all of them are left out"
    assert any("2000 units were first exposed under other shares" in w for w in report.warnings)


def test_shares_that_change_nothing_are_refused(store: str, tmp_path: Path):
    change = ("ab", "weights", "greeting", "--store", store, "--share")
    assert "has a share of 0.5 already" in refusal(*change, "0.5")
    assert "an arm without units" in refusal(*change, "1")
    assert "at least 0" in refusal(*change, "1.5")
    assert gmpo("ab", "stop", "greeting", "--store", store).exit_code == 0
    assert "splits no traffic any more" in refusal(*change, "0.2")
    over = str(tmp_path / "over.db")
    begin = ("ab", "start", "e", "--store", over, "--control", "a", "--candidate", "b")
    assert gmpo(*begin, "--set", "end_after_hours=0.00001").exit_code == 0
    time.sleep(0.1)
    ended = refusal("ab", "weights", "e", "--store", over, "--share", "0.2")
    assert "splits no traffic any more" in ended


def test_what_happens_to_an_experiment_while_it_is_read_is_not_overwritten(
    store: str, monkeypatch: pytest.MonkeyPatch
):
    weights = ("ab", "weights", "greeting", "--store", store, "--share", "0.2")
    stop = ("ab", "stop", "greeting", "--store", store)
    read = Store.experiment

    def meanwhile(*command: str) -> None:
        """Have another process's command come between the next one's reading and writing."""

        def reads(opened: Store, name: str) -> Experiment | None:
            found = read(opened, name)
            monkeypatch.setattr(Store, "experiment", read)
            done = gmpo(*command)
            assert done.exit_code == 0, done.stderr
            return found

        monkeypatch.setattr(Store, "experiment", reads)

    meanwhile(*weights)
    assert "'greeting' was changed meanwhile by another process" in refusal(*stop)
    meanwhile(*stop)
    assert "'greeting' was stopped meanwhile" in refusal(*weights[:-1], "0.3")
    with open_store(store) as opened:
        kept = opened.experiment("greeting")
        assert kept is not None and kept.status == "stopped" and kept.decision is not None
        assert kept.config["weights"] == {"control": 0.8, "candidate": 0.2}
        told = opened.events(kinds=["weights", "decision"])
    assert [event.kind for event in told] == ["weights", "decision"]


def test_the_status_tells_when_hours_end_and_that_they_are_over(tmp_path: Path):
    store = str(tmp_path / "store.db")
    for name, hours in (("young", "24"), ("old", "0.0001"), ("open", None)):
        end = () if hours is None else ("--set", f"end_after_hours={hours}")
        begin = ("ab", "start", name, "--store", store, "--control", "a", "--candidate", "b", *end)
        assert gmpo(*begin).exit_code == 0
    time.sleep(0.5)  # longer than 0.36 s, which 0.0001 hours are
    shown = gmpo("ab", "status", "--store", store).stdout
    ended = r"^old \(over since 20..-.* UTC, everybody gets a\): Stop and stay"
    assert re.search(ended, shown, re.M)
    assert re.search(r"^young \(running until 20..-.* UTC\): Keep running", shown, re.M)
    assert re.search(r"^open \(running\): Keep running", shown, re.M)
    told = json.loads(gmpo("ab", "status", "--store", store, "--json").stdout)
    found = {one["name"]: (one["status"], one["ends"] is None) for one in told}
    assert found == {"young": ("running", False), "old": ("over", False), "open": ("running", True)}


def test_a_stopped_experiment_says_when_and_what_the_data_said_last(tmp_path: Path):
    store = tmp_path / "store.db"
    begin = ("ab", "start", "early", "--store", store, "--control", "a", "--candidate", "b")
    assert gmpo(*begin, "--set", "end_after_hours=24").exit_code == 0
    before = time.time()
    said = gmpo("ab", "stop", "early", "--store", store).stdout
    assert said.startswith("early is stopped. Undecided: success rate is not judged yet, with 0")
    shown = gmpo("ab", "status", "--store", store).stdout
    assert re.match(r"early \(stopped at 20..-.* UTC\): Undecided: success rate is not", shown)
    (told,) = json.loads(gmpo("ab", "status", "--store", store, "--json").stdout)
    assert told["status"] == "stopped" and before <= told["stopped"] <= time.time()
    report = gmpo("ab", "report", "early", "--store", store).stdout
    assert report.startswith("Undecided") and "eep running" not in said + shown + report
    with open_store(str(store)) as opened:
        (decision,) = opened.events(kinds=["decision"], experiment="early")
    assert decision.payload["recommendation"].startswith("Undecided")
    assert decision.payload["time"] == told["stopped"]


def test_what_is_wrong_is_said_in_one_line(store: str, tmp_path: Path):
    begin = ("ab", "start", "other", "--store", store, "--control", "a", "--candidate", "b")
    assert "already" in refusal("ab", "start", "greeting", *begin[3:])
    assert "there are: greeting" in refusal("ab", "report", "nothing", "--store", store)
    assert "an arm without units" in refusal(*begin, "--share", "0")
    assert "must be METRIC=MARGIN" in refusal(*begin, "--guardrail", "latency")
    assert "must be KEY=VALUE" in refusal(*begin, "--set", "alpha")
    assert "alpha" in refusal(*begin, "--set", "alhpa=0.1")
    same = refusal(*begin[:-1], "a")
    assert same.startswith("experiment: both arms are 'a'; name two models")
    assert "candidate has an empty name" in refusal(*begin[:-1], " ")
    assert "the experiment's name is empty" in refusal("ab", "start", "", *begin[3:])
    assert "there is no store" in refusal("ab", "status", "--store", tmp_path / "none.db")


def test_the_size_of_an_experiment():
    shown = gmpo("ab", "size", "--base", "0.7", "--effect", "0.05", "--json")
    found = json.loads(shown.stdout)
    assert 3000 < found["median_units"] * 2 < 2 * found["units"] < 14_000
    assert "must lie between 0 and 1" in refusal("ab", "size", "--base", "0.7", "--effect", "0.4")
