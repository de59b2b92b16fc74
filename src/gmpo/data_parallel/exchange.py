"""How processes of a run speak: requests and answers over a pipe, tensors by torch.distributed.

A request is answered before the next one is sent, whatever it comes to, so that an error on one
side leaves both at the same place.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed

from gmpo.errors import ConfigError, ProcessLost

__all__ = [
    "Answer",
    "Helpers",
    "Orders",
    "Request",
    "answer_requests_from",
    "answered",
    "broadcast",
    "join_group",
    "receive",
    "reduce_sum",
    "send",
    "values_of",
]

_LONGEST = timedelta(minutes=10)
"""Of an exchange of tensors, which all processes enter at once: they wait for work on the pipe."""
_CLOSE_SECONDS = 2.0
"""That a helper has to end by itself; it holds nothing that could be lost."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a helper is told first.

    Attributes:
        recipe: of the run, as TOML, device and precision settled.
        rank: of the helper, from 1 on.
        size: number of processes.
        rendezvous: file by which they find each other.
        threads: CPU threads.
    """

    recipe: str
    rank: int
    size: int
    rendezvous: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """A piece of work: its name, and what it is done on."""

    name: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a piece of work came to: a value or an error."""

    value: Any = None
    error: Exception | None = None


class Helpers:
    """The other processes of a run, which this one started and ends.

    Args:
        recipe: of the run, as TOML.
        count: of helpers.
        device: kind of device that each has.

    Raises:
        ConfigError: this process has a group of torch.distributed already, or there are too few
            devices.
        ProcessLost: one ended before it was ready.
    """

    def __init__(self, recipe: str, *, count: int, device: str) -> None:
        _require_devices(device, count + 1)
        if distributed.is_initialized():
            raise ConfigError(
                "training.processes starts processes of its own, and this one is in a group of "
                "torch.distributed already; start it without torchrun, or set training.processes = "
                "1"
            )
        self._folder = TemporaryDirectory(prefix="gmpo-processes-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lines: list[Connection] = []
        self._threads_before = torch.get_num_threads()
        self._hook_before = sys.excepthook  # the group puts its own in its place
        self._has_joined = False
        threads = max(1, self._threads_before // (count + 1))
        if device == "cpu":
            torch.set_num_threads(threads)
        with ExitStack() as undone:
            undone.callback(self.close)
            self._start(recipe, count=count, device=device, threads=threads)
            undone.pop_all()

    def _start(self, recipe: str, *, count: int, device: str, threads: int) -> None:
        rendezvous = str(Path(self._folder.name) / "rendezvous")
        for rank in range(1, count + 1):
            mine, theirs = Pipe()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "gmpo.helper_process", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    # Ctrl-C in the terminal is for the leader, which ends its round.
                    start_new_session=True,
                )
            self._processes.append(process)
            self._lines.append(mine)
            orders = Orders(
                recipe=recipe,
                rank=rank,
                size=count + 1,
                rendezvous=rendezvous,
                threads=threads,
            )
            send(mine, orders)
        values_of(self.answers())  # they are ready: nobody waits for one that is not
        join_group(rendezvous, rank=0, size=count + 1, device=device)
        self._has_joined = True

    @property
    def count(self) -> int:
        """Of helpers."""
        return len(self._processes)

    def ask(self, requests: Sequence[Request]) -> None:
        """Send a request to each; `answers` has to follow.

        Raises:
            ProcessLost: one has ended.
        """
        for place, (line, request) in enumerate(zip(self._lines, requests, strict=True)):
            try:
                send(line, request)
            except OSError:
                raise self._lost(place) from None

    def answers(self) -> list[Answer]:
        """What each has answered, errors among them.

        Raises:
            ProcessLost: one has ended.
        """
        found = []
        for place, line in enumerate(self._lines):
            try:
                found.append(receive(line))
            except (EOFError, OSError):
                raise self._lost(place) from None
        return found

    def close(self) -> None:
        """End the helpers: those that wait at once, those that work once they are killed."""
        for line in self._lines:
            line.close()  # which ends what waits for a request
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_SECONDS)
            process.kill()
            process.wait()
        if self._has_joined:
            distributed.destroy_process_group()
            self._has_joined = False
        sys.excepthook = self._hook_before
        torch.set_num_threads(self._threads_before)
        self._folder.cleanup()

    def _lost(self, place: int) -> ProcessLost:
        process = self._processes[place]
        try:
            code = process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return ProcessLost(
                f"process {place + 1} of this run no longer answers; go on with --resume"
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return ProcessLost(
            f"process {place + 1} of this run ended ({how}); what it said is above. If it was "
            "killed for memory, lower sampling.max_rows, training.max_tokens_per_micro_batch or "
            "training.processes; go on with --resume"
        )


def answer_requests_from(line: Connection, work: Mapping[str, Callable[..., Any]]) -> None:
    """Do what is asked until the leader hangs up.

    Args:
        line: to the leader.
        work: what may be asked, by name.
    """
    while True:
        try:
            raw = line.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            line.send_bytes(answered(partial(_done, raw, work)))
        except OSError:  # the leader is gone
            return


def answered(work: Callable[[], Any]) -> bytes:
    """What a piece of work came to, ready to be sent, whatever it raised."""
    try:
        return pickle.dumps(Answer(value=work()))
    except Exception as error:  # noqa: BLE001 - the leader raises it
        return pickle.dumps(Answer(error=_that_travels(error)))


def _done(raw: bytes, work: Mapping[str, Callable[..., Any]]) -> Any:
    request: Request = pickle.loads(raw)
    return work[request.name](*request.arguments)


def _that_travels(error: Exception) -> Exception:
    """The error itself where another process can have it, else what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception's own code may raise anything
        return ProcessLost(f"a process of this run failed: {type(error).__name__}: {error}")
    return error


def send(line: Connection, value: Any) -> None:
    """Send a value as it is; the connection's own way would hand tensors over in shared memory."""
    line.send_bytes(pickle.dumps(value))


def receive(line: Connection) -> Any:
    """What `send` has sent, by a process of this run."""
    return pickle.loads(line.recv_bytes())


def values_of(answers: Iterable[Answer]) -> list[Any]:
    """The answers' values, unless one is an error, which is raised."""
    found = list(answers)
    for answer in found:
        if answer.error is not None:
            raise answer.error
    return [answer.value for answer in found]


def join_group(rendezvous: str, *, rank: int, size: int, device: str) -> None:
    """Become one of the processes that exchange tensors."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    with _on_this_machine():
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=_LONGEST,
        )


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """Let gloo use the loopback interface, whatever this machine's name leads to."""
    name = "GLOO_SOCKET_IFNAME"
    if sys.platform != "linux" or name in os.environ:
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the leader's values; all have to call it, on tensors of the same shapes.

    Raises:
        ProcessLost: another process has ended.
    """
    for tensor in tensors:
        _exchanged(partial(distributed.broadcast, src=0), tensor)


def reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Leave the sum over all processes with the leader; all have to call it.

    Raises:
        ProcessLost: another process has ended.
    """
    for tensor in tensors:
        _exchanged(partial(distributed.reduce, dst=0), tensor)


def _exchanged(call: Callable[[Tensor], Any], tensor: Tensor) -> None:
    try:
        call(tensor)
    except RuntimeError as error:
        raise ProcessLost(
            f"tensors cannot be exchanged with another process of this run, which may be gone "
            f"({str(error).splitlines()[0]}); go on with --resume"
        ) from None


def _require_devices(device: str, size: int) -> None:
    if device == "mps":
        raise ConfigError(
            "training.processes above 1 needs a CPU or CUDA devices, and model.device is mps; set "
            "training.processes = 1"
        )
    if device == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(
            f"training.processes is {size}, and this machine has {torch.cuda.device_count()} CUDA "
            "devices; each process needs one of its own"
        )
