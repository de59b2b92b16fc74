"""Requests to a server over HTTP, their answers graded: what users of a version get."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from gmpo.errors import ConfigError, RunStopped, ServerUnreachable
from gmpo.grading import Grader
from gmpo.own_servers import own_api_key
from gmpo.records import Prompt

__all__ = ["Answered", "ServerClient", "open_client"]

_PATIENCE = 5
"""Times that a request is sent to a server that says it is busy or cannot be reached."""
_ANSWER_SECONDS = 60.0
_POLL_SECONDS = 0.2
_UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What came back for one request.

    Attributes:
        item: id of the prompt.
        is_correct: whether the answer was verified; False for an error.
        latency_seconds: from sending, for the last time if it was sent again, to the whole answer.
        version: of the model that answered, "unknown" if the server does not say; None where
            nothing was answered.
        request_id: as the server calls the request; None where nothing was answered.
        num_tokens: of the completion.
        error: what went wrong, an answer of another version among it; None if all is well.
    """

    item: str
    is_correct: bool
    latency_seconds: float
    version: str | None
    request_id: str | None
    num_tokens: int
    error: str | None


class ServerClient:
    """A server of OpenAI's interface, asked with several requests at once; see `open_client`."""

    def __init__(
        self,
        client: httpx2.Client,
        *,
        url: str,
        grader: Grader,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._grader = grader
        self._should_stop = should_stop
        self.url = url

    def served(self, *, seconds: float | None = None) -> tuple[str, str]:
        """Name and version of the model that serves.

        Args:
            seconds: longest wait for the answer; None is the client's own.

        Raises:
            ServerUnreachable: it does not answer, or does not say.
        """
        timeout = self._client.timeout if seconds is None else seconds
        try:
            response = self._client.get(f"{self.url}/models", timeout=timeout)
            response.raise_for_status()
            model = response.json()["data"][0]
            return model["id"], model["model_version"]
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerUnreachable(
                f"the server at {self.url} does not say what it serves "
                f"({type(error).__name__}: {error}); start it with gmpo serve, or mend the address"
            ) from None

    def behind(self, version: str, *, seconds: float) -> str | None:
        """Why the server does not come to serve a version; None as soon as it does.

        One that does not answer may be starting, or have been killed while it loads the version.

        Args:
            version: that is waited for.
            seconds: longest wait.

        Raises:
            RunStopped: the client's `should_stop` said so.
        """
        deadline = time.monotonic() + seconds
        while True:
            left = min(_ANSWER_SECONDS, max(1.0, deadline - time.monotonic()))
            try:
                _, found = self.served(seconds=left)
            except ServerUnreachable as error:
                trouble = str(error)
            else:
                if found == version:
                    return None
                trouble = f"it serves version {found}"
            if time.monotonic() > deadline:
                return trouble
            self._require_going_on()
            time.sleep(_POLL_SECONDS)

    def ask(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        at_once: int = 16,
        version: str | None = None,
        most_failures: int | None = None,
    ) -> list[Answered]:
        """Each prompt asked greedily and graded, in their order.

        Args:
            prompts: with their reference answers.
            max_tokens: longest completion.
            at_once: requests that wait for their answers together.
            version: that has to answer: another one's answer is an error; None takes any.
            most_failures: once more have failed, no more are sent; None sends all.

        Returns:
            What came of those that were sent: all of them, unless too many failed.

        Raises:
            ServerUnreachable: the server does not say what it serves.
            RunStopped: the client's `should_stop` said so; what was under way has ended.
        """
        name, _ = self.served()
        sending = _Sending(name, max_tokens=max_tokens, version=version, most=most_failures)
        with ThreadPoolExecutor(at_once, thread_name_prefix="gmpo-traffic") as pool:
            futures = [pool.submit(self._answered, prompt, sending) for prompt in prompts]
            try:
                while wait(futures, timeout=_POLL_SECONDS).not_done:
                    self._require_going_on()
            finally:
                sending.is_over.set()
        answers = (future.result() for future in futures)
        return [answer for answer in answers if answer is not None]

    def _require_going_on(self) -> None:
        if self._should_stop():
            raise RunStopped(
                f"stopped while {self.url} was asked; give the same command again to go on"
            )

    def _answered(self, prompt: Prompt, sending: _Sending) -> Answered | None:
        """What came of one request; None if no more are sent."""
        if sending.is_over.is_set():
            return None
        said, error, seconds = self._post(prompt, sending)
        if said is None:
            answer = Answered(
                item=prompt.id,
                is_correct=False,
                latency_seconds=seconds,
                version=None,
                request_id=None,
                num_tokens=0,
                error=error,
            )
        else:
            other = sending.another(said.version)
            columns = prompt.columns
            answer = Answered(
                item=prompt.id,
                is_correct=not other and self._grader.grade_item(said.text, columns).is_correct,
                latency_seconds=seconds,
                version=said.version,
                request_id=said.request_id,
                num_tokens=said.num_tokens,
                error=other,
            )
        sending.note(answer)
        return answer

    def _post(self, prompt: Prompt, sending: _Sending) -> tuple[_Said | None, str, float]:
        """The answer, or what went wrong, and the seconds that this took.

        Only what says that it is busy, or is gone, is asked again: one that hangs would hang again.
        """
        path, body = _request(prompt, sending)
        said, error, seconds = None, "", 0.0
        for attempt in range(_PATIENCE):
            if attempt and sending.is_over.wait(0.1 * 2**attempt):
                break
            began, may_pass = time.perf_counter(), False
            try:
                response = self._client.post(f"{self.url}{path}", json=body)
                if response.status_code == 200:
                    said, error = _read(response), ""
                else:
                    error = f"HTTP {response.status_code}: {response.text[:200]}"
                    may_pass = response.status_code in (429, 503)
            except httpx2.TransportError as failure:
                error = f"{type(failure).__name__}: {failure}"
                may_pass = not isinstance(failure, httpx2.TimeoutException)
            except (ValueError, LookupError, TypeError) as failure:
                error = f"no answer of OpenAI's interface ({type(failure).__name__}: {failure})"
            seconds = time.perf_counter() - began
            if not may_pass:
                break
        return said, error, seconds


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What an answer holds."""

    text: str
    version: str
    request_id: str
    num_tokens: int


class _Sending:
    """Requests that are sent together, and whether any more are."""

    def __init__(
        self, model: str, *, max_tokens: int, version: str | None, most: int | None
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.is_over = threading.Event()
        self._version = version
        self._most = most
        self._num_failures = 0
        self._lock = threading.Lock()

    def another(self, version: str) -> str | None:
        """What is wrong with an answer of that version, if anything is."""
        if self._version in (None, version):
            return None
        return f"answered by version {version} in place of {self._version}"

    def note(self, answer: Answered) -> None:
        """Send no more after too many failures."""
        with self._lock:
            self._num_failures += answer.error is not None
            if self._most is not None and self._num_failures > self._most:
                self.is_over.set()


def _request(prompt: Prompt, sending: _Sending) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "model": sending.model,
        "max_tokens": sending.max_tokens,
        "temperature": 0,
    }
    if prompt.messages is None:
        return "/completions", {**body, "prompt": prompt.text}
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    return "/chat/completions", {**body, "messages": turns}


def _read(response: httpx2.Response) -> _Said:
    answer = response.json()
    choice = answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return _Said(
        text=text or "",
        version=answer["system_fingerprint"] or _UNKNOWN,
        request_id=answer["id"],
        num_tokens=answer["usage"]["completion_tokens"],
    )


@contextmanager
def open_client(
    url: str,
    *,
    timeout_seconds: float = _ANSWER_SECONDS,
    session: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[ServerClient]:
    """A client of the server at a base URL, with the first key of `GMPO_API_KEYS` if there is one.

    Args:
        url: e.g. http://127.0.0.1:8000/v1.
        timeout_seconds: longest wait for one answer.
        session: under which a gateway records the requests; None names none.
        should_stop: asked while the server is waited for.

    Raises:
        ConfigError: the URL is none of HTTP.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"the server's address is {url!r}; give http://HOST:PORT/v1")
    key = own_api_key()
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    if session is not None:
        headers["x-gmpo-session"] = session
    with (
        Grader() as grader,
        httpx2.Client(timeout=timeout_seconds, headers=headers) as client,
    ):
        yield ServerClient(client, url=url.rstrip("/"), grader=grader, should_stop=should_stop)
