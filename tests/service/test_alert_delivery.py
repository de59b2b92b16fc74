"""Alerts over real connections: to an HTTP receiver, and to Debian's Alertmanager."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.programs import program

from gmpo.errors import ConfigError, DeliveryError
from gmpo.monitoring.alerts import Notification, fingerprint
from gmpo.monitoring.delivery import (
    Delivery,
    alertmanager_sink,
    apprise_sink,
    webhook_message,
    webhook_sink,
)


def notification(status: str = "firing", name: str = "SlowAnswers", **labels: str) -> Notification:
    begin = 1_800_000_000.0
    return Notification(
        status=status,  # type: ignore[arg-type]
        labels={"alertname": name, "severity": "critical", **labels},
        annotations={"summary": "p95 is 9 s"},
        starts_at=begin,
        ends_at=begin + 90.5 if status == "resolved" else None,
        valid_until=begin + 3600,
    )


def until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Receiver(ThreadingHTTPServer):
    """Keeps what is posted; answers with `statuses` first and 200 after them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[Any] = []
        self.statuses: list[int] = []
        self.encoding = ""
        self.held = threading.Event()
        self.held.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.held.wait()
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.bodies.append(body)
        answer = b"answered " + self.path.encode()
        self.send_response(status)
        if self.server.encoding:
            self.send_header("Content-Encoding", self.server.encoding)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.held.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_message_has_alertmanagers_fourth_format():
    message = webhook_message(
        [notification(variant="a"), notification("resolved", variant="b")], external_url="http://x"
    )
    first = notification(variant="a").labels
    assert message == {
        "version": "4",
        "groupKey": '{}:{alertname="SlowAnswers"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "gmpo",
        "groupLabels": {"alertname": "SlowAnswers"},
        "commonLabels": {"alertname": "SlowAnswers", "severity": "critical"},
        "commonAnnotations": {"summary": "p95 is 9 s"},
        "externalURL": "http://x",
        "alerts": [
            {
                "status": "firing",
                "labels": first,
                "annotations": {"summary": "p95 is 9 s"},
                "startsAt": "2027-01-15T08:00:00Z",
                "endsAt": "0001-01-01T00:00:00Z",
                "generatorURL": "http://x",
                "fingerprint": fingerprint(first),
            },
            {
                "status": "resolved",
                "labels": notification(variant="b").labels,
                "annotations": {"summary": "p95 is 9 s"},
                "startsAt": "2027-01-15T08:00:00Z",
                "endsAt": "2027-01-15T08:01:30.500000Z",
                "generatorURL": "http://x",
                "fingerprint": fingerprint(notification(variant="b").labels),
            },
        ],
    }
    assert webhook_message([notification("resolved")])["status"] == "resolved"


def test_a_message_for_each_kind_of_trouble_reaches_the_receiver_in_order(receiver: Receiver):
    delivery = Delivery({"hook": webhook_sink(receiver.url)})
    delivery.send([notification(), notification(name="Errors"), notification(variant="b")])
    delivery.send([notification("resolved")])
    delivery.close()
    names = [(body["groupLabels"]["alertname"], body["status"]) for body in receiver.bodies]
    assert names == [("SlowAnswers", "firing"), ("Errors", "firing"), ("SlowAnswers", "resolved")]
    assert len(receiver.bodies[0]["alerts"]) == 2
    assert delivery.counts() == {"hook": {"sent": 3, "dropped_closed": 0}}


def test_a_receiver_that_fails_for_a_while_is_asked_again(receiver: Receiver):
    receiver.statuses = [503, 429]
    delivery = Delivery({"hook": webhook_sink(receiver.url)}, first_pause_seconds=0.01)
    delivery.send([notification()])
    until(lambda: bool(receiver.bodies))
    delivery.close()
    assert delivery.counts()["hook"] == {"retried": 2, "sent": 1, "dropped_closed": 0}
    assert "answered 429" in delivery.last_errors()["hook"]


def test_a_receiver_that_refuses_is_not_asked_again(receiver: Receiver):
    receiver.statuses = [400]
    delivery = Delivery({"hook": webhook_sink(receiver.url)})
    delivery.send([notification()])
    until(lambda: "dropped_failed" in delivery.counts()["hook"])
    delivery.close()
    assert delivery.counts()["hook"] == {"dropped_failed": 1, "dropped_closed": 0}
    assert receiver.bodies == []


def test_what_fails_every_time_is_given_up_and_counted():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    delivery = Delivery({"hook": webhook_sink(url)}, attempts=3, first_pause_seconds=0.01)
    delivery.send([notification()])
    until(lambda: "dropped_failed" in delivery.counts()["hook"])
    delivery.close()
    assert delivery.counts()["hook"] == {"retried": 2, "dropped_failed": 1, "dropped_closed": 0}
    assert "was not reached" in delivery.last_errors()["hook"]


def test_a_receiver_that_hangs_holds_up_neither_the_caller_nor_other_receivers(receiver: Receiver):
    receiver.held.clear()
    taken: list[str] = []
    delivery = Delivery(
        {
            "hangs": webhook_sink(receiver.url),
            "works": lambda news: taken.append(news[0].labels["alertname"]),
        },
        queue_size=2,
    )
    delivery.send([notification(name="First")])
    until(lambda: taken == ["First"])
    began = time.monotonic()
    for name in ("A", "B", "C", "D"):
        delivery.send([notification(name=name)])
        until(lambda name=name: taken[-1] == name)
    assert time.monotonic() - began < 5, "the pace of a receiver that hangs"
    delivery.close(timeout_seconds=0.2)
    # Five came: one is in the receiver's hands, two wait, two found the queue full.
    assert delivery.counts()["hangs"] == {"dropped_full": 2, "dropped_closed": 3}
    assert delivery.counts()["works"] == {"sent": 5, "dropped_closed": 0}
    delivery.send([notification(name="Late")])
    assert delivery.counts()["works"]["dropped_closed"] == 1


# What apprise imports on Python 3.11 is deprecated there.
@pytest.mark.filterwarnings("ignore:'imghdr':DeprecationWarning")
def test_apprise_delivers_a_sentence_or_says_that_it_could_not(receiver: Receiver):
    send = apprise_sink([receiver.url.replace("http", "json", 1)])
    send([notification(variant="a")])
    (body,) = receiver.bodies
    assert body["title"] == "Alert: SlowAnswers"
    assert "alertname SlowAnswers, severity critical, variant a" in body["message"]
    receiver.statuses = [500]
    with pytest.raises(DeliveryError, match="could not deliver"):
        send([notification()])
    with pytest.raises(ConfigError, match="URL 1 of 1"):
        apprise_sink(["nonsense"])
    with pytest.raises(ConfigError, match="no URL"):
        apprise_sink([])


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:9093", "ftp://host/secret", "http://", "http://a:secret/@host"]
)
def test_addresses_that_are_none_are_refused(url: str):
    for sink in (alertmanager_sink, webhook_sink):
        with pytest.raises(ConfigError) as refused:
            sink(url)
        assert "secret" not in str(refused.value)


def test_a_receivers_path_and_password_are_not_repeated(receiver: Receiver):
    receiver.statuses = [400]
    host = receiver.url.removeprefix("http://")
    for url, said in (
        (f"http://ann:secret@{host}/services/secret", f"{receiver.url} answered 400"),
        ("http://ann:secret@127.0.0.1:1/services/secret?key=secret", "127.0.0.1:1 was not reached"),
    ):
        with pytest.raises(DeliveryError, match=said) as refused:
            webhook_sink(url)([notification()])
        assert "secret" not in str(refused.value)


def test_an_answer_that_cannot_be_decoded_may_pass(receiver: Receiver):
    receiver.encoding = "gzip"
    with pytest.raises(DeliveryError, match="was not read") as failed:
        webhook_sink(receiver.url)([notification()])
    assert failed.value.may_pass


def test_a_sink_that_raises_what_it_should_not_loses_one_message_and_no_more():
    taken: list[str] = []
    told: list[str] = []

    def sink(news: Any) -> None:
        if news[0].labels["alertname"] == "First":
            raise KeyError("http://host/secret")
        taken.append(news[0].labels["alertname"])

    delivery = Delivery({"odd": sink}, tell=told.append)
    delivery.send([notification(name="First"), notification(name="Second")])
    delivery.close()
    assert taken == ["Second"]
    assert delivery.counts()["odd"] == {"dropped_broken": 1, "sent": 1, "dropped_closed": 0}
    assert told == [f"a message for odd is dropped: {delivery.last_errors()['odd']}"]
    assert "its sink failed with KeyError" in told[0]
    assert "secret" not in told[0]


def test_a_delivery_without_receivers_or_places_is_refused():
    for wrong in ({"sinks": {}}, {"queue_size": 0}, {"attempts": 0}, {"first_pause_seconds": -1}):
        with pytest.raises(ConfigError, match="at least one sink"):
            Delivery(**{"sinks": {"a": lambda _: None}, **wrong})


@pytest.fixture
def alertmanager(tmp_path: Path) -> Iterator[str]:
    command = program("prometheus-alertmanager", package="prometheus-alertmanager")
    config = tmp_path / "alertmanager.yml"
    config.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [
                command,
                f"--config.file={config}",
                f"--storage.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address=",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            until(lambda: _is_ready(url, server, tmp_path / "log"), seconds=60)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def _is_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> bool:
    assert server.poll() is None, log.read_text()
    try:
        return httpx2.get(f"{url}/-/ready").is_success
    except httpx2.TransportError:
        return False


def test_alertmanager_takes_alerts_under_the_same_fingerprint_and_ends_them(alertmanager: str):
    now = time.time()
    firing = Notification(
        status="firing",
        labels={"alertname": "SlowAnswers", "severity": "critical", "model_version": "ab12"},
        annotations={"summary": "p95 is 9 s", "action": "look at the queue"},
        starts_at=now - 60,
        ends_at=None,
        valid_until=now + 3600,
    )

    def listed() -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = httpx2.get(f"{alertmanager}/api/v2/alerts").json()
        return answer

    delivery = Delivery({"alertmanager": alertmanager_sink(alertmanager)})
    delivery.send([firing])
    until(lambda: len(listed()) == 1)
    (alert,) = listed()
    assert alert["fingerprint"] == fingerprint(firing.labels)
    assert alert["labels"] == firing.labels
    assert alert["annotations"] == firing.annotations
    delivery.send(
        [
            Notification(
                status="resolved",
                labels=firing.labels,
                annotations=firing.annotations,
                starts_at=firing.starts_at,
                ends_at=now - 1,
                valid_until=now + 3600,
            )
        ]
    )
    until(lambda: listed() == [])
    delivery.close()
    assert delivery.counts() == {"alertmanager": {"sent": 2, "dropped_closed": 0}}


def test_the_pages_example_prints_what_the_page_says():
    page = (Path(__file__).resolve().parents[2] / "docs" / "monitoring.md").read_text()
    found = re.search(r"```bash\n(python - <<'EOF'\n.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert found is not None, "docs/monitoring.md has lost its example"
    command, says = found.groups()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, says), done.stderr
