"""Requests to a server over HTTP, their answers graded: what users of a version get."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from gmpo.errors import ConfigError, ServerUnreachable
from gmpo.grading import Grader
from gmpo.own_servers import own_api_key
from gmpo.records import Prompt

__all__ = ["Answered", "ServerClient", "open_client"]

_PATIENCE = 5
"""Times that a request is sent again to a server that says it is busy or cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What came back for one request.

    Attributes:
        item: id of the prompt.
        is_correct: whether the answer was verified; False for an error.
        latency_seconds: from sending to the whole answer.
        version: of the model that answered; None for an error.
        request_id: as the server calls the request; None for an error.
        num_tokens: of the completion.
        error: what went wrong; None if the request was answered.
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

    def __init__(self, client: httpx2.Client, *, url: str, grader: Grader) -> None:
        self._client = client
        self._grader = grader
        self.url = url

    def served(self) -> tuple[str, str]:
        """Name and version of the model that serves.

        Raises:
            ServerUnreachable: it does not answer, or does not say.
        """
        try:
            response = self._client.get(f"{self.url}/models")
            response.raise_for_status()
            model = response.json()["data"][0]
            return model["id"], model["model_version"]
        except (httpx2.HTTPError, ValueError, KeyError, IndexError) as error:
            raise ServerUnreachable(
                f"the server at {self.url} does not say what it serves "
                f"({type(error).__name__}: {error}); start it with gmpo serve, or mend the address"
            ) from None

    def wait_for(self, version: str, *, seconds: float) -> bool:
        """Whether the server comes to serve a version within that time."""
        deadline = time.monotonic() + seconds
        while self.served()[1] != version:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def ask(
        self, prompts: Sequence[Prompt], *, max_tokens: int, at_once: int = 16
    ) -> list[Answered]:
        """Each prompt asked greedily and graded, in their order.

        Args:
            prompts: with their reference answers.
            max_tokens: longest completion.
            at_once: requests that wait for their answers together.
        """
        name, _ = self.served()
        with ThreadPoolExecutor(at_once, thread_name_prefix="gmpo-traffic") as pool:
            return list(pool.map(lambda prompt: self._answered(prompt, name, max_tokens), prompts))

    def _answered(self, prompt: Prompt, name: str, max_tokens: int) -> Answered:
        chat = prompt.messages is not None
        body: dict[str, Any] = {"model": name, "max_tokens": max_tokens, "temperature": 0}
        if prompt.messages is not None:
            body["messages"] = [
                {"role": turn.role, "content": turn.content} for turn in prompt.messages
            ]
        else:
            body["prompt"] = prompt.text
        started = time.perf_counter()
        path = "/chat/completions" if chat else "/completions"
        said, error = self._post(path, body)
        seconds = time.perf_counter() - started
        if said is None:
            return Answered(
                item=prompt.id,
                is_correct=False,
                latency_seconds=seconds,
                version=None,
                request_id=None,
                num_tokens=0,
                error=error,
            )
        choice = said["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        return Answered(
            item=prompt.id,
            is_correct=self._grader.grade_item(text or "", prompt.columns).is_correct,
            latency_seconds=seconds,
            version=said["system_fingerprint"],
            request_id=said["id"],
            num_tokens=said["usage"]["completion_tokens"],
            error=None,
        )

    def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The answer, or what went wrong."""
        said = ""
        for attempt in range(_PATIENCE):
            if attempt:
                time.sleep(0.1 * 2**attempt)
            try:
                response = self._client.post(f"{self.url}{path}", json=body)
            except httpx2.TransportError as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                answer: dict[str, Any] = response.json()
                return answer, ""
            said = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.status_code not in (429, 503):
                break
        return None, said


@contextmanager
def open_client(
    url: str, *, timeout_seconds: float = 60.0, session: str | None = None
) -> Iterator[ServerClient]:
    """A client of the server at a base URL, with the first key of `GMPO_API_KEYS` if there is one.

    Args:
        url: e.g. http://127.0.0.1:8000/v1.
        timeout_seconds: longest wait for one answer.
        session: under which a gateway records the requests; None names none.

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
        yield ServerClient(client, url=url.rstrip("/"), grader=grader)
