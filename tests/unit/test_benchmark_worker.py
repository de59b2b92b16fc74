"""Processes that hold a side of a comparison: what becomes of one that dies, or does not answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from benchmarks.worker import REPOSITORY, TookTooLong, Worker, WorkerFailed
from tests.silent_worker import SILENT_SECONDS


def test_a_worker_that_dies_is_reported_with_the_end_of_its_log():
    worker = Worker("benchmarks.trl_side", {"threads": 1})
    with worker, pytest.raises(WorkerFailed, match=r"(?s)exit code 1 at 'about'.*KeyError"):
        worker.ask("about")


def test_a_worker_that_does_not_answer_in_time_is_ended():
    started = time.monotonic()
    with Worker("tests.silent_worker", {}) as worker:
        assert worker.ask("about", within=SILENT_SECONDS) == {"name": "silent"}
        with pytest.raises(TookTooLong, match=r"not answered 'round' after 1 s and was ended"):
            worker.ask("round", within=1.0)
    assert time.monotonic() - started < SILENT_SECONDS


def test_a_worker_that_dies_in_time_is_not_called_slow():
    with Worker("benchmarks.trl_side", {"threads": 1}) as worker:
        with pytest.raises(WorkerFailed, match=r"exit code 1 at 'about'") as failure:
            worker.ask("about", within=600.0)
        assert not isinstance(failure.value, TookTooLong)


def test_a_worker_gives_back_what_it_freed():
    # Allocated one by one, so that the C library keeps them when they are freed.
    program = """
import ctypes
import os
from pathlib import Path
from benchmarks.worker import serve
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}

def churn():
    held = [libc.malloc(100_000) for _ in range(1000)]
    for each in held:
        libc.memset(each, 1, 100_000)
    last = libc.malloc(100_000)  # what lies above keeps the heap from shrinking
    for each in held:
        libc.free(each)
    return resident()

serve({"churn": churn, "resident": resident})
"""
    asked = "".join(f'{{"command": "{name}"}}\n' for name in ("churn", "give_back", "resident"))
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=asked,
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    kept, nothing, left = (json.loads(line) for line in ran.stdout.splitlines())
    assert nothing == {}
    assert left["mib"] < kept["mib"] - 80  # of some 95
