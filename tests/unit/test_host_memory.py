"""Memory of this process and free memory, against files as Linux shows them."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gmpo.host_memory import available_bytes, peak_resident_bytes, resident_bytes


def test_this_process_holds_memory_and_some_is_free():
    assert 2**26 < resident_bytes() < 2**37
    free = available_bytes()
    assert free is None or 0 < free < 2**50


def test_the_peak_stays_when_memory_is_given_back():
    held = bytearray(b"x" * 2**28)
    with_it = resident_bytes()
    del held
    assert peak_resident_bytes() >= with_it - 2**20 > 2**28


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    held = bytearray(b"x" * 2**29)
    command = "from gmpo.host_memory import peak_resident_bytes as peak; print(peak())"
    child = subprocess.run([sys.executable, "-c", command], check=True, stdout=subprocess.PIPE)
    assert int(child.stdout) < len(held) / 2


def system(root: Path, *, groups: str, files: dict[str, str]) -> Path:
    """Files as Linux shows them: 8 GiB available."""
    texts = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n"}
    for name, text in {**texts, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(name: str, *, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{name}/memory.max": f"{limit}\n",
        f"{name}/memory.current": f"{used}\n",
        f"{name}/memory.stat": f"anon {used - cached}\ninactive_file {cached}\n",
    }


def test_without_limits_what_linux_calls_available_is_free(tmp_path: Path):
    root = system(tmp_path, groups="0::/user\n", files=group("sys/fs/cgroup", limit="max", used=0))
    assert available_bytes(root) == 8 * 2**30


def test_the_tightest_group_above_the_process_counts_and_its_file_pages_are_free(tmp_path: Path):
    files = group("sys/fs/cgroup/a/b", limit=str(6 * 2**30), used=2 * 2**30, cached=2**30)
    files |= group("sys/fs/cgroup/a", limit=str(4 * 2**30), used=3 * 2**30, cached=2**29)
    root = system(tmp_path, groups="0::/a/b\n", files=files)
    assert available_bytes(root) == 2**30 + 2**29


def test_the_first_version_of_control_groups_counts_too(tmp_path: Path):
    folder = "sys/fs/cgroup/memory/docker/x"
    files = {
        f"{folder}/memory.limit_in_bytes": str(3 * 2**30),
        f"{folder}/memory.usage_in_bytes": str(2**30),
        f"{folder}/memory.stat": "cache 5\ntotal_inactive_file 0\n",
    }
    root = system(tmp_path, groups="5:cpu,memory:/docker/x\n4:pids:/docker/x\n", files=files)
    assert available_bytes(root) == 2 * 2**30


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path):
    files = group("sys/fs/cgroup", limit="100", used=200)
    assert available_bytes(system(tmp_path, groups="0::/\n", files=files)) == 0


def test_a_system_that_does_not_say_is_not_guessed(tmp_path: Path):
    assert available_bytes(tmp_path) is None
    assert math.isfinite(resident_bytes())


TAKE_AND_FREE = """
import resource, torch
from gmpo.host_memory import keep_freed_memory
print(keep_freed_memory())
def take(): return [torch.ones(2**21, dtype=torch.float64) for _ in range(8)]  # 16 MiB each
for _ in range(3): take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def kept_and_faults(**environment: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", TAKE_AND_FREE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    kept, faults = kept_and_faults()
    assert kept
    for environment in (
        {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"},
    ):
        returned, more_faults = kept_and_faults(**environment)
        assert not returned
        # 4 x 128 MiB in pages of 4 KiB are taken from the system, or hardly any.
        assert faults < 1000 < 4 * 8 * 2**12 // 2 < more_faults
