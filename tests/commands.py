"""The command inside this process and in one of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from click.testing import Result
from typer.testing import CliRunner

from gmpo.cli import app

LAST_LINE = re.compile(r"held-out accuracy: before \d\.\d{3}, after \d\.\d{3}")
COMMAND = Path(sys.executable).with_name("gmpo")


def gmpo(*arguments: str | Path, stdin: str | None = None) -> Result:
    """The command inside this process; standard output and error are kept apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def process(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )


@contextmanager
def serving_as(
    name: str, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], httpx2.Client, str]]:
    """`gmpo serve`, once it has said where it serves the model of that name, and that line."""
    process = subprocess.Popen(
        [COMMAND, "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
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
