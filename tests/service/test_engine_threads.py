"""The engine's threads: OpenMP's workers belong to the one that samples."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import os, threading, time, torch
from gmpo.config import ModelConfig
from gmpo.serving.engine import load_served_model

def others():
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())

torch.set_num_threads(2)
def settled(expected):
    # Threads that end do so in their own time.
    deadline = time.monotonic() + 10
    while others() - before != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return others() - before

before = others()
model = load_served_model(ModelConfig(), max_rows=2)
print(settled(0), end=" ")
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).sum()  # what a thread with a pool looks like
print(settled(1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_loaded_model_leaves_no_openmp_workers_behind():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
