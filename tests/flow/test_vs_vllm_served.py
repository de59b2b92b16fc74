"""Servers asked in turns: real ones of a tiny model in all three places, and figures by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import vs_vllm_served
from benchmarks.options import BenchmarkError
from benchmarks.vs_vllm_served import NAME, SERVERS, measure, parsed, prompts_of, summary, table
from tests.models import save_tiny

from gmpo.continual.serving import served_process


def turn(*rates: float) -> dict[str, Any]:
    return {
        name: {"tokens_per_second": rate, "median_seconds": 1.0, "answers": 2, "tokens": 4}
        for name, rate in zip(SERVERS, rates, strict=True)
    }


def test_ratios_are_of_one_turn_each():
    # gmpo / vLLM: 2, 0.5, 1; before vLLM / vLLM: 1, 0.75, 1.
    found = summary([turn(20, 10, 10), turn(2, 4, 3), turn(5, 5, 5)])
    assert found["ratios"]["gmpo / vLLM"] == {"median": 1, "min": 0.5, "max": 2}
    assert found["ratios"]["gmpo before vLLM / vLLM"] == {"median": 1, "min": 0.75, "max": 1}
    assert found["servers"]["vLLM"]["tokens_per_second"] == {"median": 5, "min": 4, "max": 10}
    assert found["servers"]["vLLM"]["answers"] == 6


def test_no_prompt_comes_twice():
    supply = [prompt for t in range(3) for p in range(3) for prompt in prompts_of(t, p)]
    assert len(set(supply)) == len(supply)


def test_real_servers_are_asked_in_alternating_order(tmp_path: Path):
    options = parsed(
        [*("--turns", "5", "--clients", "2", "--seconds", "1", "--max-tokens", "4"), "--no-build"]
    )
    folder = save_tiny(tmp_path / "tiny")
    named = ("--name", NAME, "--dtype", "fp32")
    with served_process(folder, arguments=named, threads=1, seconds=120) as url:
        rows = measure(dict.fromkeys(SERVERS, url), options)
    assert [row["first"] for row in rows] == [SERVERS[0], SERVERS[-1]] * 2 + [SERVERS[0]]
    found = summary(rows)
    assert all(one["answers"] >= 10 for one in found["servers"].values())
    assert all(one["tokens_per_second"]["min"] > 0 for one in found["servers"].values())
    made_with = {"processor": "a processor", "cores": 2}
    settings = {"model": folder, "dtype": "fp32", "clients": 2, "max_tokens": 4}
    lines = table({"made_with": made_with, **settings, **found}).splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == [f"| {name}" for name in SERVERS]


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path):
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "print('no such device'); raise SystemExit(3)"], stdout=output
        )
        process.wait()
        with pytest.raises(
            BenchmarkError, match=r"ended with code 3; its log ends:\nno such device"
        ):
            vs_vllm_served.wait_for("http://127.0.0.1:1/health", process, log)


def test_refused_requests_end_the_benchmark(tmp_path: Path):
    options = parsed(["--turns", "5", "--clients", "1", "--seconds", "1", "--no-build"])
    folder = save_tiny(tmp_path / "tiny")
    with (
        served_process(
            folder, arguments=("--name", "other", "--dtype", "fp32"), threads=1, seconds=120
        ) as url,
        pytest.raises(BenchmarkError, match=r"failed \(status 404\), so its times"),
    ):
        vs_vllm_served.asked(url, ["1"], options)


def test_too_few_turns_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parsed(["--turns", "4"])
    assert "--turns 4 must be at least 5" in capsys.readouterr().err
