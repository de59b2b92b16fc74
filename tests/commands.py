"""The command inside this process, in a fork of its own, and as it is installed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from click.testing import Result
from tests.forks import COMMAND, ForkedProcess, forked_gmpo
from typer.testing import CliRunner

from gmpo.cli import app

LAST_LINE = re.compile(r"held-out accuracy: before \d\.\d{3}, after \d\.\d{3}")


def gmpo(*arguments: str | Path, stdin: str | None = None) -> Result:
    """The command inside this process; standard output and error are kept apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def process(
    *arguments: str | Path, env: Mapping[str, str] | None = None, forks_too: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; what it starts is forked too, or is not."""
    command = forked_gmpo(*arguments, env=env, forks_too=forks_too)
    try:
        stdout, stderr = command.communicate()
    finally:
        command.kill()
    return subprocess.CompletedProcess(arguments, command.wait(), stdout, stderr)


def installed(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, which an interpreter of its own runs."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )


@contextmanager
def serving_as(name: str, *arguments: str) -> Iterator[tuple[ForkedProcess, httpx2.Client, str]]:
    """`gmpo serve`, once it has said where it serves the model of that name, and that line."""
    process = forked_gmpo("serve", *arguments, "--port", "0")
    try:
        said = process.stdout.readline()
        if not said.startswith(f"serving {name} (version "):
            process.kill()
            raise AssertionError((said, process.communicate()))
        with httpx2.Client(base_url=said.split()[-1], timeout=60) as client:
            yield process, client, said
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def refusal(*arguments: str | Path) -> str:
    """The one line of standard error with which the command refuses, exit code 2."""
    result = gmpo(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
