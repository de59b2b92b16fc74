"""HTTP servers of both kinds of a fleet, over real sockets, that load, follow or refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gmpo.fleet import Fleet, FleetServer
from gmpo.store import Store

NAME = "bot"


class Server:
    """A server of either kind, over a real socket.

    Its `versions` are what it reports, to begin with those that it holds; a gateway's follow the
    store's champion, `late_by` so many looks.
    """

    def __init__(
        self,
        *,
        store: Store | None = None,
        holds: Sequence[str] = (),
        refuses: bool = False,
        late_by: int = 0,
    ) -> None:
        self.store = store
        self.versions = list(holds)
        self.refuses = refuses
        self.late_by = late_by
        self.posted: list[tuple[str, dict[str, str]]] = []
        self.keys: set[str | None] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.keys.add(self.headers.get("Authorization"))
                self._answer(200, json.dumps({"data": server.rows()}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.posted.append((self.path, body))
                self._answer(*server.change(self.path, body))

            def _answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def rows(self) -> list[dict[str, str]]:
        if self.store is None:
            return [{"id": version} for version in ["base", *self.versions]]
        champion = self.store.champion(NAME)
        if champion is not None and not self.refuses:
            self.late_by -= 1
            if self.late_by < 0:
                self.versions = [champion.version]
        return [{"id": NAME, "model_version": version} for version in self.versions]

    def change(self, path: str, body: dict[str, str]) -> tuple[int, str]:
        if self.refuses:
            return 404, "no adapter there"
        if path == "/v1/load_lora_adapter":
            self.versions.append(body["lora_name"])
        else:
            self.versions.remove(body["lora_name"])
        return 200, "Success"


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    try:
        yield
    finally:
        for server in servers:
            server.http.shutdown()
            server.http.server_close()


def fleet(*servers: Server, told: list[str] | None = None, patience: float = 60.0) -> Fleet:
    """Asks often; the patience is for servers that come, however busy the machine is."""
    return Fleet(
        [
            FleetServer(url=server.url, kind="vllm" if server.store is None else "gateway")
            for server in servers
        ],
        api_key="secret",
        patience_seconds=patience,
        every_seconds=0.02,
        tell=(told if told is not None else []).append,
    )
