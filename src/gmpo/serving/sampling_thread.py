"""One thread on which samplers run, so that the event loop never waits for a model.

Requests join while others are being drawn. Several samplers may run at once: after a change of
weights the old one finishes what it began while the new one takes what comes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from gmpo.errors import GmpoError
from gmpo.sampler.requests import Completion, SampledToken, Sampler, SampleRequest
from gmpo.serving.backend import BackendError

__all__ = ["Mailbox", "SamplerEvent", "SamplerSource", "SamplingThread"]

SamplerEvent = SampledToken | Completion
_Letter = list[SamplerEvent] | BackendError


class SamplerSource:
    """A sampler, and a new one in its place after it broke.

    Args:
        make: a new sampler over the same weights.
    """

    def __init__(self, make: Callable[[], Sampler]) -> None:
        self._make = make
        self._sampler: Sampler | None = make()

    @property
    def sampler(self) -> Sampler:
        """The sampler; one that broke is made anew here, which raises whatever that raises."""
        if self._sampler is None:
            self._sampler = self._make()
        return self._sampler

    def drop(self) -> None:
        """Leave a broken sampler, whose rows are in no known state.

        The next one is made when it is needed: its memory may be there only once this one is gone.
        """
        self._sampler = None


class Mailbox:
    """Where one request's events arrive, on the event loop that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._letters: asyncio.Queue[_Letter] = asyncio.Queue()

    def put(self, letter: _Letter) -> None:
        """Deliver; on the loop's own thread."""
        self._letters.put_nowait(letter)

    async def get(self) -> list[SamplerEvent]:
        """Events of one or more steps, in their order.

        Raises:
            BackendError: the request ended without an answer.
        """
        letter = await self._letters.get()
        if isinstance(letter, BackendError):
            raise letter
        return letter


@dataclass
class _Asked:
    """A request in flight."""

    source: SamplerSource
    mailbox: Mailbox
    num_left: int
    events: list[SamplerEvent] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Command:
    """Something that the thread is to do, and who waits for what comes of it."""

    act: Callable[[], None]
    mailbox: Mailbox | None = None


class SamplingThread:
    """Runs samplers; its methods may be called from any thread."""

    def __init__(self) -> None:
        # None ends the thread.
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        self._asked: dict[str, _Asked] = {}
        self._lock = threading.Lock()
        self._refusal: str | None = None
        """Why no more requests are taken."""
        self.num_failures = 0
        """Times a sampler broke, ending all requests that it had, or could not be made anew."""
        self._thread = threading.Thread(target=self._run, name="gmpo-sampling", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self._refusal is None

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._asked)

    def submit(self, source: SamplerSource, request: SampleRequest) -> Mailbox:
        """Hand a request to a sampler; must be called on an event loop.

        Raises:
            BackendError: the thread was closed, or ended by itself.
        """
        mailbox = Mailbox(asyncio.get_running_loop())
        asked = _Asked(source=source, mailbox=mailbox, num_left=request.num_completions)
        command = _Command(act=lambda: self._take(asked, request), mailbox=mailbox)
        with self._lock:
            if self._refusal is not None:
                raise BackendError(self._refusal, fault="unavailable")
            self._commands.put(command)
        return mailbox

    def cancel(self, request_id: str) -> None:
        """End a request, if it is still in flight; its mailbox gets no more letters to read."""

        def act() -> None:
            asked = self._asked.get(request_id)
            if asked:
                with self._failing(asked.source):
                    asked.source.sampler.cancel(request_id)

        with self._lock:
            if self._refusal is None:
                self._commands.put(_Command(act=act))

    def close(self) -> None:
        """End the thread after the step it is in; requests in flight get an error."""
        with self._lock:
            if self._refusal is None:
                self._refusal = "the engine was closed; start it again"
                self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        error = BackendError("the engine is closing; ask another server", fault="unavailable")
        try:
            self._serve()
        except Exception as broke:  # noqa: BLE001  (whoever waits would wait for good)
            self.num_failures += 1
            refusal = f"the engine's thread has ended: {_said(broke)}; restart the server"
            error = BackendError(refusal, fault="unavailable")
            with self._lock:
                self._refusal = refusal
        self._send((asked.mailbox, error) for asked in self._asked.values())
        self._asked.clear()
        self._send((mailbox, error) for mailbox in self._left_waiting())

    def _serve(self) -> None:
        while self._do_commands():
            for source in list(dict.fromkeys(asked.source for asked in self._asked.values())):
                self._step(source)
            self._deliver()

    def _do_commands(self) -> bool:
        """Do what was asked since the last step, waiting where there is nothing else to do."""
        while not self._asked or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command.act()
        return True

    def _left_waiting(self) -> Iterator[Mailbox]:
        """Whose requests were queued and never taken."""
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            if command is not None and command.mailbox is not None:
                yield command.mailbox

    def _take(self, asked: _Asked, request: SampleRequest) -> None:
        try:
            sampler = asked.source.sampler
        except Exception as error:  # noqa: BLE001  (whatever a model raises; told and counted)
            self.num_failures += 1
            message = f"the engine broke and cannot be made anew: {_said(error)}; ask again later"
            self._send([(asked.mailbox, BackendError(message, fault="unavailable"))])
            return
        self._asked[request.id] = asked
        with self._failing(asked.source):
            try:
                sampler.submit(request)
            except GmpoError as error:
                del self._asked[request.id]
                self._send([(asked.mailbox, BackendError(str(error), fault="bad_request"))])

    def _step(self, source: SamplerSource) -> None:
        with self._failing(source):
            for event in source.sampler.step():
                asked = self._asked[event.request_id]
                asked.events.append(event)
                asked.num_left -= isinstance(event, Completion)

    @contextmanager
    def _failing(self, source: SamplerSource) -> Iterator[None]:
        """Take whatever a sampler raises for the end of its requests, and of nothing else.

        torch says RuntimeError for what goes wrong inside an operation, and a model's own code may
        raise anything.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001  (told to each request, and counted)
            self.num_failures += 1
            source.drop()
            lost = [name for name, asked in self._asked.items() if asked.source is source]
            message = f"the engine failed while this request was running: {_said(error)}; ask again"
            self._send(
                (self._asked.pop(name).mailbox, BackendError(message, fault="failed"))
                for name in lost
            )

    def _deliver(self) -> None:
        letters: list[tuple[Mailbox, _Letter]] = []
        for name, asked in list(self._asked.items()):
            if asked.events:
                letters.append((asked.mailbox, asked.events))
                asked.events = []
            if not asked.num_left:
                del self._asked[name]
        self._send(letters)

    def _send(self, letters: Iterable[tuple[Mailbox, _Letter]]) -> None:
        """Wake each event loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, _Letter]]] = {}
        for mailbox, letter in letters:
            by_loop.setdefault(mailbox.loop, []).append((mailbox, letter))
        for loop, its_letters in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, its_letters)
            except RuntimeError:
                if not loop.is_closed():  # nobody reads on a loop that has ended
                    raise


def _put_all(letters: list[tuple[Mailbox, _Letter]]) -> None:
    for mailbox, letter in letters:
        mailbox.put(letter)


def _said(error: Exception) -> str:
    """The first line of what an error says: torch adds a trace to its own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
