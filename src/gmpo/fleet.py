"""A release over several model servers: each has to report the version before the release stands.

Two kinds of servers. A *gateway* of `gmpo serve --follow` loads the champion by itself and answers
with the old weights until it has, so the pointer moves first and every gateway is waited for; where
one does not come, the pointer goes back. A *vLLM* server holds adapters side by side, so the new
one is loaded everywhere before the pointer moves, and the old one is unloaded afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from gmpo.errors import GmpoError, ServerUnreachable
from gmpo.gate.records import GateDecision
from gmpo.registry import Registry
from gmpo.store import Champion, ModelVersion

__all__ = ["Fleet", "FleetServer", "ServerKind"]

ServerKind = Literal["gateway", "vllm"]


@dataclass(frozen=True, kw_only=True)
class FleetServer:
    """A server of the fleet.

    Attributes:
        url: base of its interface, ending in /v1.
        kind: "gateway" for gmpo serve --follow, "vllm" for adapters behind vLLM.
    """

    url: str
    kind: ServerKind


class Fleet:
    """Servers that are to serve one version of one model.

    Args:
        servers: all of them.
        api_key: sent to each, if there is one.
        patience_seconds: how long a server may take to load a version.
        every_seconds: between two looks.
        tell: told in one sentence what happens.
    """

    def __init__(
        self,
        servers: Sequence[FleetServer],
        *,
        api_key: str | None = None,
        patience_seconds: float = 300.0,
        every_seconds: float = 1.0,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._servers = tuple(servers)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._patience_seconds = patience_seconds
        self._every_seconds = every_seconds
        self._tell = tell

    def release(
        self,
        registry: Registry,
        version: ModelVersion,
        *,
        expected_champion: str | None,
        evidence: GateDecision | Mapping[str, Any],
        by: str = "fleet",
    ) -> Champion:
        """Make a version the champion and have every server report it; else leave all as it was.

        A release that was cut off may be begun again: what is loaded is not loaded twice. What a
        server had loaded before (beside the champion, for an experiment) is left to it.

        Args:
            registry: moves the pointer, on evidence.
            version: to be released.
            expected_champion: version that serves.
            evidence: the gate's decision about the two.
            by: who decided, for the history.

        Raises:
            ServerUnreachable: a server did not report the version in time; the pointer is where it
                was before.
            gmpo.errors.GmpoError: as for `Registry.promote`; what was loaded for the release is
                unloaded.
        """
        adapters = [server for server in self._servers if server.kind == "vllm"]
        followers = [server for server in self._servers if server.kind == "gateway"]
        champion = _promoted_already(registry, version, expected_champion)
        loaded: list[FleetServer] = []
        try:
            for server in adapters:
                self._load(server, version, loaded)
            self._wait(adapters, version.version)
            champion = champion or registry.promote(
                version.name,
                expected_champion=expected_champion,
                candidate=version.version,
                evidence=evidence,
                by=by,
            )
        except GmpoError:
            if champion is None:  # else it serves since a call that was cut off, so it is needed
                self._unload(loaded, version.version)
            raise
        try:
            self._wait(followers, version.version)
        except ServerUnreachable as error:
            registry.rollback(
                version.name, expected_champion=version.version, reason=f"a release failed: {error}"
            )
            self._unload(loaded, version.version)
            raise ServerUnreachable(
                f"{error}; version {version.version} was taken back, so it has to pass the gate "
                "again"
            ) from None
        if expected_champion is not None:
            self._unload(adapters, expected_champion)
        return champion

    def reported(self, server: FleetServer) -> set[str]:
        """Versions that a server says it serves.

        Raises:
            ServerUnreachable: it does not answer, or not as it should.
        """
        answer = self._ask("GET", server, "/models")
        try:
            rows = json.loads(answer.text)["data"]
            key = "model_version" if server.kind == "gateway" else "id"
            return {str(row[key]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ServerUnreachable(
                f"{server.url}/models does not answer as a {server.kind} does "
                f"({type(error).__name__}: {error}); name the right address or kind"
            ) from None

    def _wait(self, servers: Sequence[FleetServer], version: str) -> None:
        """Until each of them reports the version."""
        until = time.monotonic() + self._patience_seconds
        waiting = list(servers)
        trouble = ""
        while waiting:
            still = []
            for server in waiting:
                try:
                    if version in self.reported(server):
                        self._tell(f"{server.url} reports version {version}")
                        continue
                except ServerUnreachable as error:
                    trouble = f" ({error})"  # it may be starting; it has until the end of patience
                still.append(server)
            waiting = still
            if waiting and time.monotonic() >= until:
                urls = ", ".join(server.url for server in waiting)
                raise ServerUnreachable(
                    f"{urls} did not report version {version} within {self._patience_seconds:g} "
                    f"seconds{trouble}; the release does not stand: mend them, then try again"
                )
            if waiting:
                time.sleep(self._every_seconds)

    def _load(self, server: FleetServer, version: ModelVersion, loaded: list[FleetServer]) -> None:
        """Where it is not loaded yet; `loaded` is told before, for an answer may be lost."""
        if version.version in self.reported(server):
            return
        loaded.append(server)
        told = {"lora_name": version.version, "lora_path": version.path}
        answer = self._ask("POST", server, "/load_lora_adapter", told)
        if answer.status_code != 200:
            raise ServerUnreachable(
                f"{server.url} does not load {version.path} as an adapter (status "
                f"{answer.status_code}: {answer.text[:200]}); it needs --enable-lora, "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and the registry's folder"
            )

    def _unload(self, servers: Sequence[FleetServer], version: str) -> None:
        """Where it is loaded; a server that does not answer is told of and left alone."""
        for server in servers:
            try:
                if version in self.reported(server):
                    answer = self._ask(
                        "POST", server, "/unload_lora_adapter", {"lora_name": version}
                    )
                    if answer.status_code != 200:
                        said = answer.text[:200]
                        self._tell(f"{server.url} still holds version {version}: {said}")
            except ServerUnreachable as error:
                self._tell(f"whether {server.url} holds version {version} is unknown: {error}")

    def _ask(
        self, method: str, server: FleetServer, path: str, body: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        url = server.url.rstrip("/") + path
        try:
            return httpx2.request(
                method,
                url,
                json=None if body is None else dict(body),
                headers=self._headers,
                timeout=max(1.0, self._patience_seconds),
            )
        except httpx2.HTTPError as error:
            raise ServerUnreachable(
                f"{url} does not answer: {type(error).__name__}: {error}; start it or take it out "
                "of the fleet"
            ) from None
        except httpx2.InvalidURL as error:
            raise ServerUnreachable(
                f"{url} is no address: {error}; write http://HOST:PORT/v1"
            ) from None


def _promoted_already(
    registry: Registry, version: ModelVersion, before: str | None
) -> Champion | None:
    """The champion, where a release that was cut off has moved the pointer before."""
    now = registry.history(version.name)[-1:]
    if now and (now[0].version, now[0].previous) == (version.version, before):
        return now[0]
    return None
