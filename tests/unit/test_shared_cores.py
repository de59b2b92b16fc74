"""Processes beside others sleep while they wait, unless the user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gmpo.shared_cores import share_cores, sharing_cores


def test_threads_sleep_while_they_wait():
    assert sharing_cores({"HOME": "/root"}) == {"HOME": "/root", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("choice", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "100"}])
def test_what_the_user_chose_is_kept(choice: dict[str, str]):
    assert sharing_cores(choice) == choice


def test_this_process_and_its_children_have_it(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_openmp_is_told_before_torch_brings_it():
    # The command line must not have imported torch when a command begins.
    code = "import sys, gmpo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
