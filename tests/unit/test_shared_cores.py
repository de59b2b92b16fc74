"""Processes beside others soon sleep while they wait, unless the user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.commands import gmpo

from gmpo.continual.serving import served_process
from gmpo.errors import ServerUnreachable
from gmpo.shared_cores import share_cores, sharing_cores

SHARING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def chosen(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in SHARING if name in environment}


def test_threads_soon_sleep_while_they_wait():
    assert sharing_cores({"HOME": "/root"}) == {"HOME": "/root", **SHARING}


def test_libgomp_spins_as_often_as_it_is_told():
    # It prints what it has read of its environment, once torch brings it.
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**sharing_cores(os.environ), "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = {line.strip().removeprefix("[host] ") for line in done.stderr.splitlines()}
    assert "GOMP_SPINCOUNT = '1000'" in told, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in told, done.stderr


@pytest.mark.parametrize("choice", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "100"}])
def test_what_the_user_chose_is_kept(choice: dict[str, str]):
    assert sharing_cores(choice) == choice


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing of waiting, as before when the test is over."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # remembered, so that what a command sets is undone
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("undecided")
def test_what_a_process_begins_shares_them_too():
    share_cores()
    code = "import os; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "PASSIVE 1000\n"


@pytest.mark.usefixtures("undecided")
def test_commands_that_run_beside_others_share_the_cores(tmp_path: Path):
    alone, beside = tmp_path / "alone.toml", tmp_path / "beside.toml"
    none = str(tmp_path / "none")
    text = f'name = "bot"\nmain = "here"\n[backends.here]\nengine = "{none}"\n'
    alone.write_text(text)
    beside.write_text(text + 'follow = "bot"\n')
    store = ("--store", str(tmp_path / "store.db"))
    for command, expected in (
        (("serve", "--config", str(alone), *store), {}),
        (("serve", none, *store), {}),
        (("serve", "--config", str(beside), *store), SHARING),
        (("serve", none, "--follow", "bot", *store), SHARING),
        (("learn", "--demo", "--name", "bot"), SHARING),
    ):
        for name in SHARING:
            os.environ.pop(name, None)
        refused = gmpo(*command)  # the model is not there
        assert refused.exit_code == 2, refused.stderr
        assert chosen(os.environ) == expected, (command, refused.stderr)


@pytest.mark.usefixtures("undecided")
def test_a_server_beside_a_controller_shares_the_cores(monkeypatch: pytest.MonkeyPatch):
    begun: list[dict[str, str]] = []
    real = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> Any:
        begun.append(options["env"])
        return real(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    with (
        pytest.raises(ServerUnreachable, match="the server of no-such-folder/at-all ended"),
        served_process("no-such-folder/at-all", threads=1, seconds=60),
    ):
        pass
    assert [chosen(environment) for environment in begun] == [SHARING]


def test_openmp_is_told_before_torch_brings_it():
    # The command line must not have imported torch when a command begins.
    code = "import sys, gmpo.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
