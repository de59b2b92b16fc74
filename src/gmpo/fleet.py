"""A release over several model servers: each has to report the version before the release stands.

Two kinds of servers. A *gateway* of `gmpo serve --follow` loads the champion by itself and answers
with the old weights until it has, so the pointer moves first and every gateway is waited for; where
one does not come, the pointer goes back. A *vLLM* server holds adapters side by side, so the new
one is loaded everywhere before the pointer moves, and the old one is unloaded afterwards.

The way back waits for nobody: a version that was found bad is worse than a server without one. So a
rollback loads the predecessor where it can, moves the pointer in any case, and names the servers
that are not as they should be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import httpx2

from gmpo.errors import GmpoError, ServersBehind, ServerUnreachable
from gmpo.gate.records import GateDecision
from gmpo.registry import Registry
from gmpo.registry.line import ROLLBACK
from gmpo.store import Champion, ModelVersion

__all__ = ["Fleet", "FleetServer", "ServerKind"]

ServerKind = Literal["gateway", "vllm"]

_Found = TypeVar("_Found")

_NO_RELEASE = "; the release does not stand: mend them, then try again"

_HASTE_SECONDS = 10.0
"""A server that takes longer for one answer does not hold a rollback's pointer up."""


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
        adapters, followers = self._of_kind("vllm"), self._of_kind("gateway")
        champion = _promoted_already(registry, version, expected_champion)
        loaded: list[FleetServer] = []
        try:
            for server in adapters:
                self._load(server, version, loaded)
            self._wait(adapters, version.version, then=_NO_RELEASE)
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
            self._wait(followers, version.version, then=_NO_RELEASE)
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

    def rollback(
        self,
        registry: Registry,
        name: str,
        *,
        expected_champion: str | None,
        reason: str | Mapping[str, Any],
    ) -> Champion:
        """Make the predecessor serve again; the pointer moves whatever the servers do.

        vLLM servers load the predecessor first, all at once, and each may take ten seconds for an
        answer, or the patience if that is less. Once the pointer has moved, what was taken back is
        unloaded, and each server has the patience to report the predecessor.

        A rollback that was cut off or left servers behind goes on with the servers where it is
        begun again with the same `expected_champion`.

        Args:
            registry: moves the pointer.
            name: of the model.
            expected_champion: version that is to be taken back.
            reason: why, for the history.

        Raises:
            ServersBehind: the pointer has moved, and servers that are named have not followed.
            gmpo.errors.GmpoError: as for `Registry.rollback`; what was loaded is unloaded.
        """
        champion = _taken_back_already(registry, name, expected_champion)
        champion = champion or self._moved_back(
            registry, name, expected_champion=expected_champion, reason=reason
        )
        target, taken = registry.version(champion.version), str(champion.previous)
        found = self._at_once(self._servers, lambda one: self._troubles(one, target, taken))
        behind = list(dict.fromkeys(trouble for troubles in found for trouble in troubles))
        if behind:
            raise ServersBehind(
                f"the pointer has moved: {target.version} is the champion of {name!r} in place of "
                f"{taken}; but servers have not followed: {'; '.join(behind)}; mend them, then "
                f"give the same command with --expected {taken}, which goes on with the servers "
                "(without it would go further back); or by hand: vLLM has to unload "
                f"{taken} (/v1/unload_lora_adapter) and load {target.path} under the name "
                f"{target.version} (/v1/load_lora_adapter), and a gateway looks again on SIGHUP"
            )
        return champion

    def reported(self, server: FleetServer, *, seconds: float | None = None) -> set[str]:
        """Versions that a server says it serves.

        Args:
            server: to be asked.
            seconds: that it may take; None for the patience.

        Raises:
            ServerUnreachable: it does not answer, or not as it should.
        """
        answer = self._ask("GET", server, "/models", seconds=seconds)
        try:
            rows = json.loads(answer.text)["data"]
            key = "model_version" if server.kind == "gateway" else "id"
            return {str(row[key]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ServerUnreachable(
                f"{server.url}/models does not answer as a {server.kind} does "
                f"({type(error).__name__}: {error}); name the right address or kind"
            ) from None

    def _of_kind(self, kind: ServerKind) -> list[FleetServer]:
        return [server for server in self._servers if server.kind == kind]

    def _moved_back(
        self,
        registry: Registry,
        name: str,
        *,
        expected_champion: str | None,
        reason: str | Mapping[str, Any],
    ) -> Champion:
        """Move the pointer, with the predecessor loaded before where that goes quickly."""
        adapters = self._of_kind("vllm")
        if not adapters:
            return registry.rollback(name, expected_champion=expected_champion, reason=reason)
        target = registry.rollback_target(name, expected_champion=expected_champion)
        loaded: list[FleetServer] = []
        seconds = min(_HASTE_SECONDS, max(1.0, self._patience_seconds))

        def prepare(server: FleetServer) -> None:
            # What does not go well here is tried again, and said, once the pointer has moved.
            with suppress(ServerUnreachable):
                self._load(server, target, loaded, seconds=seconds)

        self._at_once(adapters, prepare)
        try:
            champion = registry.rollback(name, expected_champion=expected_champion, reason=reason)
        except GmpoError:
            self._unload(loaded, target.version)
            raise
        if champion.version != target.version:  # its files were damaged meanwhile
            self._unload(loaded, target.version)
        return champion

    def _troubles(self, server: FleetServer, version: ModelVersion, taken: str) -> list[str]:
        """Why a server still holds what was taken back, or does not serve what serves again."""
        troubles = []
        if server.kind == "vllm":
            try:
                self._unload_from(server, taken)
            except ServerUnreachable as error:
                troubles.append(str(error))
        try:
            if server.kind == "vllm":
                self._load(server, version, [])
            self._wait([server], version.version)
        except ServerUnreachable as error:
            troubles.append(str(error))
        return troubles

    @staticmethod
    def _at_once(
        servers: Sequence[FleetServer], act: Callable[[FleetServer], _Found]
    ) -> list[_Found]:
        """What is found on each: one that hangs keeps none of the others waiting."""
        if not servers:
            return []
        with ThreadPoolExecutor(max_workers=len(servers)) as pool:
            return list(pool.map(act, servers))

    def _wait(self, servers: Sequence[FleetServer], version: str, *, then: str = "") -> None:
        """Until each of them reports the version; `then` ends what is said if one does not."""
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
                    f"seconds{trouble}{then}"
                )
            if waiting:
                time.sleep(self._every_seconds)

    def _load(
        self,
        server: FleetServer,
        version: ModelVersion,
        loaded: list[FleetServer],
        *,
        seconds: float | None = None,
    ) -> None:
        """Where it is not loaded yet; `loaded` is told before, for an answer may be lost."""
        if version.version in self.reported(server, seconds=seconds):
            return
        loaded.append(server)
        told = {"lora_name": version.version, "lora_path": version.path}
        answer = self._ask("POST", server, "/load_lora_adapter", told, seconds=seconds)
        if answer.status_code == 200:
            return
        if version.version in self.reported(server, seconds=seconds):
            return  # by a request that was given up before and went on
        raise ServerUnreachable(
            f"{server.url} does not load {version.path} as an adapter (status "
            f"{answer.status_code}: {answer.text[:200]}); it needs --enable-lora, "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and the registry's folder"
        )

    def _unload(self, servers: Sequence[FleetServer], version: str) -> None:
        """Where it is loaded; a server on which that fails is told of and left alone."""
        for server in servers:
            try:
                self._unload_from(server, version)
            except ServerUnreachable as error:
                self._tell(f"version {version} may be loaded still: {error}")

    def _unload_from(self, server: FleetServer, version: str) -> None:
        if version not in self.reported(server):
            return
        answer = self._ask("POST", server, "/unload_lora_adapter", {"lora_name": version})
        if answer.status_code != 200:
            raise ServerUnreachable(
                f"{server.url} still holds version {version}: {answer.text[:200]}"
            )

    def _ask(
        self,
        method: str,
        server: FleetServer,
        path: str,
        body: Mapping[str, str] | None = None,
        *,
        seconds: float | None = None,
    ) -> httpx2.Response:
        url = server.url.rstrip("/") + path
        try:
            return httpx2.request(
                method,
                url,
                json=None if body is None else dict(body),
                headers=self._headers,
                timeout=max(1.0, self._patience_seconds) if seconds is None else seconds,
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


def _taken_back_already(registry: Registry, name: str, taken: str | None) -> Champion | None:
    """The champion, where a rollback that was cut off has moved the pointer before."""
    now = registry.history(name)[-1:]
    if taken and now and (now[0].reason.get("kind"), now[0].previous) == (ROLLBACK, taken):
        return now[0]
    return None
