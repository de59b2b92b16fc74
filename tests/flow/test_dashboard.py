"""`gmpo dashboard` as a process of its own: it serves its page, refuses clearly, ends."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from tests.commands import refusal
from tests.dashboard_stores import answers, fill, write_run
from tests.forks import ForkedProcess, forked_gmpo
from tests.models import save_tiny

from gmpo.store import open_store


@contextmanager
def showing(*arguments: str | Path, lines: int = 1) -> Iterator[tuple[ForkedProcess, str]]:
    """The command and what it has said, once it has said so many lines."""
    process = forked_gmpo("dashboard", *arguments, "--port", "0", forks_too=True)
    try:
        said = "".join(process.stdout.readline() for _ in range(lines))
        assert "dashboard at http://127.0.0.1:" in said, (said, process.poll())
        yield process, said
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def address(said: str, *, after: str) -> str:
    found = re.search(rf"{after} (http://\S+)", said)
    assert found is not None, said
    return found.group(1)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_its_page_until_a_signal(sent: signal.Signals, code: int, tmp_path: Path):
    url = fill(tmp_path / "store.db", list(answers(20, start=0, end=20)))
    with showing(write_run(tmp_path / "run"), "--store", url) as (process, said):
        page = address(said, after="dashboard at")
        assert "<title>" in httpx2.get(page, trust_env=False).text
        process.send_signal(sent)
        assert process.wait(60) == code
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(page, trust_env=False)


def test_one_command_serves_a_model_and_shows_what_it_answers(tmp_path: Path):
    model = save_tiny(tmp_path / "tiny")
    store = tmp_path / "store.db"
    arguments = ("--serve", model, "--serve-port", "0", "--store", store)
    with showing(*arguments, lines=2) as (process, said):
        gateway = address(said, after=r"\) at")
        asked = {"model": "tiny", "prompt": "12+3=", "max_tokens": 4}
        answer = httpx2.post(f"{gateway}/completions", json=asked, timeout=60, trust_env=False)
        assert answer.status_code == 200
        assert httpx2.get(address(said, after="dashboard at"), trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(gateway, trust_env=False)
    # The gateway ended in order: what it answered is in the store.
    with open_store(str(store), read_only=True) as opened:
        assert [event.request_id for event in opened.events(kinds=["answer"])] == [
            answer.json()["id"]
        ]


def test_a_gateway_that_cannot_start_ends_the_page(tmp_path: Path):
    process = forked_gmpo(
        *("dashboard", "--port", "0", "--store", tmp_path / "store.db"),
        *("--serve", tmp_path / "no-model", "--serve-port", "0"),
        forks_too=True,
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the gateway ended by itself with code 2" in said
    assert "no-model" in said


def test_what_is_not_there_is_refused(tmp_path: Path):
    assert "nothing to show" in refusal("dashboard")
    for runs in ((), (tmp_path,)):
        said = refusal("dashboard", *runs, "--serve", "smollm2-135m")
        assert said == "--serve records its answers; say where with --store"
    assert "there is no store" in refusal("dashboard", "--store", tmp_path / "gone.db")
    assert "gone is no folder" in refusal("dashboard", tmp_path / "gone")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refusal("dashboard", tmp_path, "--port", str(port))
