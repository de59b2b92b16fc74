"""`gmpo dashboard` as a process of its own: it serves its page, refuses clearly, ends."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from tests.commands import COMMAND, refusal
from tests.dashboard_stores import answers, fill, write_run


@contextmanager
def showing(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command and the address of its page, once it has said so."""
    process = subprocess.Popen(
        [COMMAND, "dashboard", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("dashboard at http://127.0.0.1:"), (said, process.stderr)
        yield process, said.split()[-1]
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_its_page_until_a_signal(sent: signal.Signals, code: int, tmp_path: Path):
    url = fill(tmp_path / "store.db", list(answers(20, start=0, end=20)))
    with showing(write_run(tmp_path / "run"), "--store", url) as (process, address):
        assert "<title>" in httpx2.get(address, trust_env=False).text
        process.send_signal(sent)
        assert process.wait(60) == code
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(address, trust_env=False)


def test_what_is_not_there_is_refused(tmp_path: Path):
    assert "nothing to show" in refusal("dashboard")
    assert "there is no store" in refusal("dashboard", "--store", tmp_path / "gone.db")
    assert "gone is no folder" in refusal("dashboard", tmp_path / "gone")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refusal("dashboard", tmp_path, "--port", str(port))
