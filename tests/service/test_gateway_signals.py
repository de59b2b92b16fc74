"""Signals to a real `gmpo serve`: what runs is cut where a second one comes, and nothing traces."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.commands import serving_as
from tests.forks import ForkedProcess
from tests.models import save_tiny

from gmpo.store import open_store

# One row at a time, so that the completions take seconds.
serving = partial(serving_as, "tiny", "--dtype", "fp32", "--max-rows", "1")
LONG = {
    "model": "tiny",
    "prompt": "12+3=",
    "max_tokens": 200,
    "temperature": 1.0,
    "n": 16,
    "stream": True,
    "seed": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def _events(lines: Iterator[str]) -> list[dict[str, Any]]:
    told = [line.removeprefix("data: ") for line in lines if line]
    assert "[DONE]" not in told
    return [json.loads(one) for one in told]


def _end(process: ForkedProcess) -> tuple[int, str]:
    code = process.wait(60)
    said = process.stderr.read()
    assert "Traceback" not in said and "Exception" not in said and "ASGI" not in said, said
    return code, said


@pytest.mark.parametrize(
    ("number", "pause"),
    [(signal.SIGTERM, 0.1), (signal.SIGTERM, 0.01), (signal.SIGINT, 0.1), (signal.SIGINT, 0.01)],
)
def test_a_second_signal_cuts_what_runs_and_says_so(
    folder: str, tmp_path: Path, number: signal.Signals, pause: float
):
    path = str(tmp_path / "store.db")
    with serving(folder, "--store", path) as (process, client, _):
        with client.stream("POST", "/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            time.sleep(pause)  # two of a kind that wait together are one to the system
            process.send_signal(number)
            last = _events(lines)[-1]
        code, said = _end(process)
    assert last["error"]["code"] == "draining" and "ending" in last["error"]["message"]
    assert code == 128 + number
    assert said == f"note: a second signal ({number.name}) ended it: 1 request was cut\n"
    with open_store(path, read_only=True) as store:
        (answer,) = store.events(kinds=["answer"])
    assert answer.payload["status"] == 499 and "the server ended" in answer.payload["error"]


def test_a_whole_answer_that_is_cut_gets_the_one_error_shape(folder: str):
    with serving(folder, "--drain-seconds", "0.1") as (process, client, _):
        with ThreadPoolExecutor(max_workers=1) as pool:
            asking = pool.submit(client.post, "/completions", json={**LONG, "stream": False})
            health = f"{client.base_url}".removesuffix("v1/") + "health"
            while not httpx2.get(health).json()["running_completions"]:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            answer = asking.result()
        code, said = _end(process)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
    assert code == 0
    assert said == "note: 1 request was cut, not over after 0.1 s\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_signals_to_an_idle_server_end_it_in_order(folder: str, number: signal.Signals):
    with serving(folder) as (process, _, _):
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(number)
        code, said = _end(process)
    assert code == 128 + number
    assert said == f"note: a second signal ({number.name}) ended it: 0 requests were cut\n"
