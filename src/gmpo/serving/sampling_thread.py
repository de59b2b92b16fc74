"""One thread on which samplers run, so that the event loop never waits for a model.

Requests join while others are being drawn. Several samplers may run at once: after a change of
weights the old one finishes what it began while the new one takes what comes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue

from gmpo.errors import ConfigError, GmpoError
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
        self.sampler = make()

    def renew(self) -> None:
        """Leave a broken sampler, whose rows are in no known state, and take a new one."""
        self.sampler = self._make()


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


class SamplingThread:
    """Runs samplers; its methods may be called from any thread."""

    def __init__(self) -> None:
        # None ends the thread.
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._asked: dict[str, _Asked] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self.num_failures = 0
        """Times a sampler broke, ending all requests that it had."""
        self._thread = threading.Thread(target=self._run, name="gmpo-sampling", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return len(self._asked)

    def submit(self, source: SamplerSource, request: SampleRequest) -> Mailbox:
        """Hand a request to a sampler; must be called on an event loop.

        Raises:
            BackendError: the thread was closed.
        """
        mailbox = Mailbox(asyncio.get_running_loop())
        asked = _Asked(source=source, mailbox=mailbox, num_left=request.num_completions)

        def take() -> None:
            try:
                source.sampler.submit(request)
            except ConfigError as error:
                self._send([(mailbox, BackendError(str(error), fault="bad_request"))])
            else:
                self._asked[request.id] = asked

        self._command(take)
        return mailbox

    def cancel(self, request_id: str) -> None:
        """End a request, if it is still in flight; its mailbox gets no more letters to read."""

        def take() -> None:
            asked = self._asked.get(request_id)
            if asked:
                asked.source.sampler.cancel(request_id)

        with self._lock:
            if not self._is_closed:
                self._commands.put(take)

    def close(self) -> None:
        """End the thread after the step it is in; requests in flight get an error."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(None)
        self._thread.join()

    def _command(self, take: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                raise BackendError("the engine was closed; start it again", fault="unavailable")
            self._commands.put(take)

    def _run(self) -> None:
        while self._take_commands():
            for source in list(dict.fromkeys(asked.source for asked in self._asked.values())):
                self._step(source)
            self._deliver()
        error = BackendError("the engine is closing; ask another server", fault="unavailable")
        self._send((asked.mailbox, error) for asked in self._asked.values())
        self._asked.clear()

    def _take_commands(self) -> bool:
        """Do what was asked since the last step, waiting where there is nothing else to do."""
        while not self._asked or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _step(self, source: SamplerSource) -> None:
        try:
            events = source.sampler.step()
        except (GmpoError, RuntimeError, MemoryError) as error:
            # torch says RuntimeError for whatever goes wrong inside an operation.
            self._fail(source, error)
            return
        for event in events:
            asked = self._asked[event.request_id]
            asked.events.append(event)
            asked.num_left -= isinstance(event, Completion)

    def _fail(self, source: SamplerSource, error: Exception) -> None:
        self.num_failures += 1
        source.renew()
        lost = [name for name, asked in self._asked.items() if asked.source is source]
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        message = f"the engine failed while this request was running: {said[0]}; ask again"
        self._send(
            (self._asked.pop(name).mailbox, BackendError(message, fault="failed")) for name in lost
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
            # Nobody reads on a loop that has ended.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, its_letters)


def _put_all(letters: list[tuple[Mailbox, _Letter]]) -> None:
    for mailbox, letter in letters:
        mailbox.put(letter)
