"""`gmpo monitor` on a run folder, to a receiver over HTTP."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.commands import COMMAND, gmpo, jsonl, refusal


def mismatch(number: int, value: float) -> dict[str, Any]:
    return {"kind": "round", "round": number, "rollout/mismatch_mean": value}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").touch()
    jsonl(folder / "metrics.jsonl", [mismatch(1, 9.0)])
    return folder


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_look_prints_and_sends_what_goes_on(
    run: Path, receiver: tuple[str, list[dict[str, Any]]]
):
    url, bodies = receiver
    result = gmpo("monitor", run, "--webhook", url, "--once")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"firing critical GmpoSamplerMismatch {run}: ")
    (body,) = bodies
    assert body["commonLabels"]["run"] == str(run)
    assert body["status"] == "firing"


def test_it_follows_a_run_until_it_is_told_to_end(
    run: Path, receiver: tuple[str, list[dict[str, Any]]]
):
    url, bodies = receiver
    process = subprocess.Popen(
        [COMMAND, "monitor", run, "--webhook", url, "--every", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("firing critical GmpoSamplerMismatch")
        jsonl(run / "metrics.jsonl", [mismatch(1, 9.0), mismatch(2, 0.001)])
        assert process.stdout.readline().startswith("resolved critical GmpoSamplerMismatch")
        shutil.rmtree(run)
        assert process.stdout.readline().startswith("firing critical GmpoRunUnreadable")
        process.send_signal(signal.SIGTERM)
        rest, said = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
    assert (process.returncode, rest, said) == (0, "", "")
    assert [body["status"] for body in bodies] == ["firing", "resolved", "firing"]


def test_ctrl_c_ends_it_with_130(run: Path):
    process = subprocess.Popen(
        [COMMAND, "monitor", run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "stopped: the runs are no longer watched; they go on\n"


def test_what_cannot_be_watched_or_delivered_is_one_sentence(run: Path, tmp_path: Path):
    assert "is no run folder" in refusal("monitor", tmp_path, "--once")
    assert "alerts cannot be sent to" in refusal("monitor", run, "--webhook", "nowhere", "--once")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    said = refusal("monitor", run, "--alertmanager", url, "--once")
    assert said.startswith("1 messages did not reach alertmanager: ")
    assert "was not reached" in said
