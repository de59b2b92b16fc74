"""What the tests fork: a process whose slow imports are done, and that is one of its own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from tests.commands import process
from tests.forks import FORKS, forked_gmpo


def _exit_with_imports(names: tuple[str, ...]) -> None:
    """Exit with the number of modules that this process has yet to import."""
    sys.exit(sum(name not in sys.modules for name in names))


def test_a_fork_has_imported_what_takes_seconds():
    names = ("torch", "transformers", "gmpo.training", "gmpo.serving.engine", "gmpo.tuning.trials")
    fork = FORKS.Process(target=_exit_with_imports, args=(names,))
    fork.start()
    fork.join()
    assert fork.exitcode == 0


def test_a_forked_command_has_its_environment_folder_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refused = process("serve", "no-model", env={**os.environ, "GMPO_API_KEYS": " ,"})
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "holds no key" in refused.stderr
    assert refused.stderr.count("\n") == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    monkeypatch.chdir(tmp_path)
    looked = process("monitor", "run", "--once")
    assert looked.stderr.startswith("note: nothing is wrong now")
    assert (looked.returncode, looked.stdout) == (0, "")


def test_a_forked_command_that_is_killed_says_by_which_signal(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    command = forked_gmpo("monitor", tmp_path / "run", "--every", "60")
    assert command.poll() is None
    command.send_signal(signal.SIGKILL)
    assert command.communicate(timeout=30) == ("", "")
    assert command.returncode == -signal.SIGKILL
