"""Processes of their own within moments: forks of one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pytest

FORKS = multiprocessing.get_context("forkserver")
# The one list for all tests: of a second one, and of one that comes too late, nothing is told.
FORKS.set_forkserver_preload(["tests.forked_imports"])

COMMAND = Path(sys.executable).with_name("gmpo")
_OURS = ("benchmarks", "gmpo", "scripts")


def is_forkable(command: Sequence[str | Path]) -> bool:
    """Whether it is the installed `gmpo`, or this interpreter with a module of ours or code."""
    match [str(word) for word in command]:
        case [program, *_] if program == str(COMMAND):
            return True
        case [program, "-m", module, *_] if program == sys.executable:
            return module.partition(".")[0] in _OURS
        case [program, "-c", *_]:
            return program == sys.executable
    return False


class ForkedProcess:
    """What `subprocess.Popen` of such a command is, without the interpreter's start and imports.

    The process has its own signals, environment, folder, pipes and end. It is a child of the
    process that forks, so Linux does not end it with the one that began it.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        start_new_session: bool = False,
        forks_too: bool = False,
    ) -> None:
        assert is_forkable(command), command
        self.args = [str(word) for word in command]
        self.stdin, its_input = _end_to_write(stdin, text=text)
        self.stdout, its_output = _end_to_read(stdout, 1, text=text)
        if stderr == subprocess.STDOUT:
            self.stderr, its_errors = None, os.dup(its_output)
        else:
            self.stderr, its_errors = _end_to_read(stderr, 2, text=text)
        # Connections are the one thing with a descriptor that goes with a fork's arguments.
        streams = [
            Connection(its_input, writable=False),
            *(Connection(each, readable=False) for each in (its_output, its_errors)),
        ]
        self._process = FORKS.Process(
            target=_run,
            args=(
                self.args,
                dict(os.environ if env is None else env),
                str(cwd or Path.cwd()),
                streams,
                start_new_session,
                forks_too,
            ),
        )
        self._process.start()
        for stream in streams:
            stream.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Minus the signal's number if one killed it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def communicate(
        self, input: str | None = None, timeout: float | None = None
    ) -> tuple[Any, Any]:
        """What it says until its end, which is waited for."""
        assert input is None, "a fork's input is written by whoever starts it"
        said: dict[str, Any] = {"stdout": None, "stderr": None}
        pipes = {name: pipe for name in said if (pipe := getattr(self, name)) is not None}

        def read(name: str) -> None:
            said[name] = "" if pipes[name].closed else pipes[name].read()

        readers = [threading.Thread(target=read, args=(name,)) for name in pipes]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        self._close()
        return said["stdout"], said["stderr"]

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        self.wait()

    def _close(self) -> None:
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()


def forked_gmpo(
    *arguments: str | Path, env: Mapping[str, str] | None = None, forks_too: bool = False
) -> ForkedProcess:
    """The command in a fork, its output in pipes; what it starts is forked too, or is not."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return ForkedProcess([COMMAND, *arguments], env=env, forks_too=forks_too, **pipes)


@contextmanager
def forked_starts() -> Iterator[None]:
    """What this process starts within the block is forked where it can be."""
    real = subprocess.Popen

    def start(command: Any, **options: Any) -> Any:
        return (ForkedProcess if is_forkable(command) else real)(command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", start)
        yield


def _end_to_read(
    wanted: int | IO[Any] | None, own: int, *, text: bool
) -> tuple[IO[Any] | None, int]:
    """This process's end of an output's pipe, where it has one, and the fork's end."""
    if wanted != subprocess.PIPE:
        return None, _opened(wanted, own, os.O_WRONLY)
    ours, theirs = os.pipe()
    return (open(ours, encoding="utf-8") if text else open(ours, "rb")), theirs


def _end_to_write(wanted: int | IO[Any] | None, *, text: bool) -> tuple[IO[Any] | None, int]:
    if wanted != subprocess.PIPE:
        return None, _opened(wanted, 0, os.O_RDONLY)
    theirs, ours = os.pipe()
    return (open(ours, "w", encoding="utf-8") if text else open(ours, "wb")), theirs


def _opened(wanted: int | IO[Any] | None, own: int, flags: int) -> int:
    if wanted is None:
        return os.dup(own)
    if wanted == subprocess.DEVNULL:
        return os.open(os.devnull, flags)
    return os.dup(wanted if isinstance(wanted, int) else wanted.fileno())


def _run(
    words: list[str],
    environment: Mapping[str, str],
    folder: str,
    streams: list[Connection],
    is_session: bool,
    forks_too: bool,
) -> None:
    """Become the command: what an interpreter of its own would begin with, and then its program."""
    if is_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in enumerate(streams):
        with stream:
            os.dup2(stream.fileno(), number)
    # Buffered as an interpreter's own are (what is not flushed is not seen), and open to the end.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    if environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # it was read at the import
    with forked_starts() if forks_too else nullcontext():
        _program(words)


def _program(words: list[str]) -> None:
    if words[1:3] == ["-m", "gmpo.leash"]:
        words = [str(COMMAND), *words[5:]]  # without the process and the signal
    if words[0] == str(COMMAND) or words[1:3] == ["-m", "gmpo.cli"]:
        from gmpo.cli import main

        sys.argv = ["gmpo", *(words[1:] if words[0] == str(COMMAND) else words[3:])]
        main()
    elif words[1] == "-m":
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *words[3:]]
        exec(compile(words[2], "<string>", "exec"), {"__name__": "__main__"})
