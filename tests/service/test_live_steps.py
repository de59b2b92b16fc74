"""Live test and watch over real gateways: who answers, who hangs, who is gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.routed_gateways import Served, begin, served
from tests.tiny_runs import tiny_recipe
from tests.upstreams import Behaviour, Body, Reply, in_turn, refuses, says

from gmpo.continual.asked import keep_asked, read_asked
from gmpo.continual.live import live_step, watch_step
from gmpo.continual.plan import LearnPlan, write_rows
from gmpo.continual.records import CycleFacts, StepReport
from gmpo.continual.traffic import Answered, open_client
from gmpo.errors import RunStopped, ServerUnreachable
from gmpo.records import Message, Prompt
from gmpo.store import ModelVersion

CHAMPION, CANDIDATE = "v1-model", "v2-model"
"""Versions of the upstreams `v1` and `v2`."""
PROMPTS = [Prompt(id=f"i{n}", text=f"{n}+4-{n}=", columns={"answer": "4"}) for n in range(40)]
GONE = "http://127.0.0.1:9/v1"


def facts(folder: Path) -> CycleFacts:
    made = StepReport(passed=True, sentence="made", details={"new_model_version": CANDIDATE})
    tested = StepReport(passed=True, sentence="fine", details={"users": {"source": "own"}})
    return CycleFacts(
        name="bot",
        number=1,
        folder=folder,
        champion=CHAMPION,
        champion_revision=1,
        request={},
        reports={"update": made, "live_test": tested},
    )


def plan(folder: Path, gateway: str, **changes: Any) -> LearnPlan:
    rows = [{"id": one.id, "prompt": one.text, "answer": "4"} for one in PROMPTS]
    write_rows(folder / "items.jsonl", rows)
    return LearnPlan(
        recipe=tiny_recipe("unused"),
        suites={"old": str(folder / "items.jsonl")},
        gateway=gateway,
        **{"serve_seconds": 0.3, "growth_limits": {"latency": 50.0, "length": 1.5}, **changes},
    )


def right(prompt: Prompt) -> Answered:
    return Answered(
        item=prompt.id,
        is_correct=True,
        latency_seconds=0.1,
        version=CHAMPION,
        request_id=f"r-{prompt.id}",
        num_tokens=1,
        error=None,
    )


def after_live_test(folder: Path) -> CycleFacts:
    """A cycle whose live test asked the 40 prompts, all of which the champion answered right."""
    known = facts(folder)
    known.files("live_test").mkdir()
    keep_asked(known.files("live_test"), PROMPTS, [right(prompt) for prompt in PROMPTS])
    return known


class Models(BaseHTTPRequestHandler):
    """Serves the candidate, as far as it says."""

    def do_GET(self) -> None:
        self._says(json.dumps({"data": [{"id": "bot", "model_version": CANDIDATE}]}).encode())

    def _says(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def gateway(folder: Path, behaviours: dict[str, Behaviour], **more: Any) -> Iterator[Served]:
    """Of the first upstream's model; the others are asked where it fails."""
    folder.mkdir(exist_ok=True)
    with served(folder / "store.db", behaviours, **more) as made:
        yield made


def url(made: Served) -> str:
    return f"{made.gateway.url}/v1"


async def hangs(reply: Reply, body: Body) -> None:
    await reply.client_gone()


def watched(made: Served, known: CycleFacts, **changes: Any) -> StepReport:
    return watch_step(known, plan=plan(known.folder, url(made), **changes), store=made.store)


def test_a_gateway_that_the_candidate_knocked_out_does_not_pass_the_watch(tmp_path: Path):
    known = after_live_test(tmp_path)
    with gateway(tmp_path / "served", {"v1": says("4")}) as made:
        report = watched(made, known)
        assert "within 0.3 seconds: it serves version v1-model" in report.sentence
        gone = plan(tmp_path, GONE)
        report = watch_step(known, plan=gone, store=made.store)
    assert (report.passed, report.reason) == (False, "New version is not served")
    assert f"{GONE} did not come to serve version v2-model within 0.3 seconds" in report.sentence
    assert "ConnectError" in report.sentence


def test_a_server_that_is_gone_for_a_while_is_waited_for():
    with HTTPServer(("127.0.0.1", 0), Models) as first:
        address = first.server_address
    later: list[HTTPServer] = []

    def begin_again() -> None:
        time.sleep(0.3)
        later.append(HTTPServer(address, Models))
        later[0].serve_forever(0.01)

    thread = threading.Thread(target=begin_again)
    thread.start()
    with open_client(f"http://127.0.0.1:{address[1]}/v1") as client:
        assert client.behind(CANDIDATE, seconds=20.0) is None
    later[0].shutdown()
    later[0].server_close()
    thread.join()


def test_a_gateway_that_dies_once_it_is_asked_does_not_pass(tmp_path: Path):
    known = after_live_test(tmp_path)

    async def dies(reply: Reply, body: Body) -> None:
        reply.cut()

    with gateway(tmp_path / "served", {"v2": dies}) as made:
        report = watched(made, known)
    assert (report.passed, report.reason) == (False, "New version fails to answer")
    assert report.details["not_sent"] > 0
    assert f"so the last {report.details['not_sent']} of 40 were not sent" in report.sentence


def test_answers_of_the_fallback_are_no_answers_of_the_candidate(tmp_path: Path):
    known = after_live_test(tmp_path)
    behaviours = {"v2": refuses(500), "other": says("4")}
    with gateway(tmp_path / "served", behaviours) as made:
        report = watched(made, known)
    assert (report.passed, report.reason) == (False, "New version fails to answer")
    assert report.details["of_another_version"] == report.details["failed"] > 1
    assert "(another version answered " in report.sentence
    # All of them are the candidate's once it answers.
    behaviours = {"v2": says("4"), "other": says("no")}
    with gateway(tmp_path / "served", behaviours) as made:
        report = watched(made, known)
    assert report.passed, report.sentence
    assert (report.details["failed"], report.details["of_another_version"]) == (0, 0)


def test_a_cycles_requests_are_no_unit_of_an_experiment(tmp_path: Path):
    known = after_live_test(tmp_path)
    behaviours = {"v2": says("4"), "other": says("no")}
    # Nearly everybody is in the arm of the other model.
    arms = {"control": "v2", "candidate": "other"}
    weights = {"control": 0.001, "candidate": 0.999}
    with gateway(
        tmp_path / "served",
        behaviours,
        experiment="e",
        before=lambda store: begin(store, models=arms, weights=weights),
    ) as made:
        report = watched(made, known)
        made.ask(**{"x-gmpo-unit": "ann"})
        (exposed,) = made.events("exposure", count=1)
        assert made.health()["routing"]["not_split"] == 40
    assert report.passed, report.sentence
    assert exposed.unit == "ann"


def test_a_hanging_server_is_asked_once_and_given_up(tmp_path: Path):
    with (
        gateway(tmp_path / "served", {"v2": hangs}) as made,
        open_client(url(made), timeout_seconds=0.3) as client,
    ):
        began = time.monotonic()
        answers = client.ask(PROMPTS, max_tokens=3, at_once=4, most_failures=1)
        assert time.monotonic() - began < 5
        # No more are sent once two have failed: those that are then under way end.
        assert 2 <= len(answers) <= 8
        assert all("ReadTimeout" in (answer.error or "") for answer in answers)
        assert all(answer.latency_seconds < 3 for answer in answers)
        assert len(made.upstreams["v2"].bodies) == len(answers)


def test_a_busy_server_is_asked_again_and_the_wait_is_no_latency(tmp_path: Path):
    behave = in_turn(refuses(503), refuses(503), says("4"))
    with (
        gateway(tmp_path / "served", {"v2": behave}) as made,
        open_client(url(made)) as client,
    ):
        began = time.perf_counter()
        (answer,) = client.ask(PROMPTS[:1], max_tokens=3)
        took = time.perf_counter() - began
    assert answer.error is None
    # 0.2 and 0.4 seconds lay between.
    assert took - answer.latency_seconds > 0.5


def test_a_stop_is_heard_while_a_server_hangs(tmp_path: Path):
    stop = threading.Event()
    with (
        gateway(tmp_path / "served", {"v2": hangs}) as made,
        open_client(url(made), timeout_seconds=0.5, should_stop=stop.is_set) as client,
    ):
        stop.set()
        with pytest.raises(RunStopped, match="give the same command again"):
            client.ask(PROMPTS, max_tokens=3, at_once=4)
        assert len(made.upstreams["v2"].bodies) <= 4
        with pytest.raises(RunStopped):
            client.behind("another", seconds=60.0)


def test_what_is_no_answer_of_the_interface_is_a_failure():
    class Page(Models):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._says(b"<html>a proxy</html>")

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        with open_client(f"http://127.0.0.1:{server.server_address[1]}/v1") as client:
            (answer,) = client.ask(PROMPTS[:1], max_tokens=3)
        server.shutdown()
        thread.join()
    assert "no answer of OpenAI's interface" in (answer.error or "")


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StepReport]]:
    """The live test of a champion's and a candidate's gateway, in place of a process of its own."""

    def test(
        champion: dict[str, Behaviour], candidate: Behaviour, **changes: Any
    ) -> tuple[StepReport, Served, Served]:
        made = stack.enter_context(gateway(tmp_path / "served", champion))
        beside = stack.enter_context(gateway(tmp_path / "beside", {"v2": candidate}))

        @contextmanager
        def process(model: str, **_: Any) -> Iterator[str]:
            yield url(beside)

        monkeypatch.setattr("gmpo.continual.live.served_process", process)
        made.store.put_model_version(
            ModelVersion(
                version=CANDIDATE,
                created=0.0,
                name="bot",
                path="",
                parent=CHAMPION,
                lineage={},
                metrics={},
            )
        )
        (tmp_path / "live_test").mkdir()
        settings = plan(tmp_path, url(made), **changes)
        report = live_step(
            facts(tmp_path), tmp_path / "live_test", plan=settings, store=made.store, threads=1
        )
        return report, made, beside

    with ExitStack() as stack:
        yield test


def test_the_watch_asks_what_the_live_test_asked_though_the_file_has_changed(
    live: Callable[..., Any], tmp_path: Path
):
    report, _, beside = live({"v1": says("4")}, says("4"), live_items=20)
    assert report.passed, report.sentence
    prompts, answers = read_asked(tmp_path / "live_test")
    assert [one.id for one in prompts] == [one.item for one in answers]
    assert all(one.is_correct and one.version == CHAMPION for one in answers)
    beside.upstreams["v2"].bodies.clear()
    known = facts(tmp_path)
    changed = plan(tmp_path, url(beside), live_items=20)
    for count in (60, 10):
        rows = [{"id": f"x{n}", "prompt": f"{n}?", "answer": "5"} for n in range(count)]
        write_rows(tmp_path / "items.jsonl", rows)
        report = watch_step(known, plan=changed, store=beside.store)
        assert report.passed, report.sentence
    asked = {body["messages"][0]["content"] for body in beside.upstreams["v2"].bodies}
    assert asked == {(one.messages or ())[0].content for one in prompts}


def test_a_candidate_is_not_held_against_another_models_answers(live: Callable[..., Any]):
    behaviours = {"v1": refuses(500), "other": says("no")}
    said = "had 40 of 40 requests answered by other-model in place of the champion v1-model"
    with pytest.raises(ServerUnreachable, match=said):
        live(behaviours, says("4"))


def test_a_few_answers_of_another_model_are_left_out(live: Callable[..., Any]):
    # The first 16 warm the server up; of the other 40 it refuses one.
    refuses_one = in_turn(*[says("4")] * 20, refuses(500), says("4"))
    report, _, _ = live({"v1": refuses_one, "other": says("no")}, says("4"))
    assert report.passed, report.sentence
    assert report.details["failed_champion"] == 1
    assert report.details["of_another_version_champion"] == 1
    assert "another version answered 0, and 1 of the champion's" in report.sentence
    (suite,) = report.details["decision"]["suites"]
    assert (suite["num_items"], suite["champion"]) == (39, 1.0)


def test_a_candidate_that_fails_is_not_asked_on(live: Callable[..., Any]):
    report, _, beside = live({"v1": says("4")}, refuses(400))
    assert (report.passed, report.reason) == (False, "New version fails to answer")
    # 40 requests are three waves of 14, 13 and 13.
    assert report.details["not_sent"] == 26
    assert "14 requests failed, 0 of the champion's, so the last 26 of 40 were not" in (
        report.sentence
    )
    assert len(beside.upstreams["v2"].bodies) == 16 + 14


def test_without_the_champions_answers_the_candidate_is_taken_back(tmp_path: Path):
    known = after_live_test(tmp_path)
    with gateway(tmp_path / "served", {"v2": says("4")}) as made:
        (known.files("live_test") / "asked.jsonl").write_text("")
        report = watched(made, known)
    assert (report.passed, report.reason) == (False, "Live test's answers are lost")
    assert "asked.jsonl (ValueError: it is empty)" in report.sentence


def test_what_was_asked_comes_back(tmp_path: Path):
    turns = (Message(role="system", content="brief"), Message(role="user", content="a\u2028b"))
    prompts = [PROMPTS[0], Prompt(id="chat", messages=turns, columns={"answers": ["1", "2"]})]
    answers = [right(prompt) for prompt in prompts]
    keep_asked(tmp_path, prompts, answers)
    assert read_asked(tmp_path) == (prompts, answers)
    assert (tmp_path / "asked.jsonl").stat().st_mode & 0o077 == 0
