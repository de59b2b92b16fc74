"""Notes on stderr: said as they are, and nothing ends where they cannot be said."""

from __future__ import annotations

import errno
import io
import os

import pytest
import typer

from gmpo.cli.conventions import refuses_clearly, warn
from gmpo.errors import ConfigError, NonFiniteError, ProcessLost, RunStopped, StillHeld


class Unwritable(io.StringIO):
    """A stderr that takes nothing."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_a_note_is_one_line_however_long_and_keeps_brackets(capsys: pytest.CaptureFixture[str]):
    message = "the file [red]runs/a[0].json " + 40 * "is long "
    warn(message)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"note: {message}\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_a_note_that_cannot_be_said_ends_nothing(number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stderr", Unwritable(OSError(number, os.strerror(number))))
    warn("the store is locked")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (NonFiniteError("no"), 3),
        (StillHeld("no"), 4),
        # Not 2, which a study takes for a recipe that no other try would help.
        (ProcessLost("no"), 5),
        (RunStopped("no"), 130),
    ],
)
def test_what_became_of_a_command_is_its_exit_code(error: Exception, code: int):
    @refuses_clearly
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as raised:
        command()
    assert raised.value.exit_code == code
