"""What a gateway adds in front of a server: the same requests to both, in turns, by one client.

The server is a process of `gmpo serve` with the model, the gateway is another one with `--upstream`
at that server, and the client is this process. What the gateway adds is what it adds in practice:
reading the request, asking the server for a stream with log-probabilities, scoring, answering.
"""

from __future__ import annotations

import json
import select
import time
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.differences import Difference, quantile_difference, quantile_of_differences, shown
from gmpo.continual.serving import served_process

NAME = "model"
WARM_UP = 5
"""Turns that are not counted: the first ones open connections and meet cold code."""
_START_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class AddedToUpstream:
    """What the gateway adds to a server's answers, in milliseconds.

    `p50` and `p99` are percentile less percentile; `paired_p50` and `paired_p99` are percentiles of
    the differences, pair by pair. `server_...` are the same of the server against itself, asked a
    second time in each turn: what the machine alone does to such a figure.
    """

    p50: Difference
    p99: Difference
    paired_p50: Difference
    paired_p99: Difference
    server_p99: Difference
    server_paired_p99: Difference
    direct_p50: float
    pairs: int
    max_tokens: int
    server_threads: int


def seconds_of_answer(connection: HTTPConnection, path: str, asked: dict[str, Any]) -> float:
    """How long one answer takes over a connection that is open when the time begins."""
    body = json.dumps(asked)
    if connection.sock is None or _was_ended(connection):
        connection.close()
        connection.connect()
    began = time.perf_counter()
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    told = response.read()
    took = time.perf_counter() - began
    assert response.status == 200, (response.status, told)
    return took


def _was_ended(connection: HTTPConnection) -> bool:
    """Whether the other side has closed it, as servers do with those that are not used."""
    readable, _, _ = select.select([connection.sock], [], [], 0)
    return bool(readable)


def added_to_upstream(
    model: str, dtype: str, *, pairs: int, max_tokens: int, threads: int
) -> AddedToUpstream:
    """Start a server and a gateway before it, and ask both for the same short answers.

    Args:
        model: name or folder, of the server.
        dtype: as for `gmpo serve`.
        pairs: turns that count.
        max_tokens: of each answer, which is greedy.
        threads: of this measurement. The server gets one less, if there are two, so that gateway
            and client have a core as they would on a machine of their own.
    """
    asked = {"model": NAME, "prompt": "1 + 1 =", "max_tokens": max_tokens, "temperature": 0.0}
    server_threads = max(1, threads - 1)
    named = ("--name", NAME)
    with (
        served_process(
            model,
            arguments=(*named, "--dtype", dtype),
            threads=server_threads,
            seconds=_START_SECONDS,
        ) as server,
        served_process(
            NAME,
            arguments=(*named, "--upstream", server),
            threads=1,
            seconds=_START_SECONDS,
            what="the gateway before the server",
        ) as gateway,
    ):
        times = times_in_turns([server, gateway, server], asked, pairs)
    before, through, after = 1000 * times.T
    return AddedToUpstream(
        p50=quantile_difference(before, through, 0.5),
        p99=quantile_difference(before, through, 0.99),
        paired_p50=quantile_of_differences(before, through, 0.5),
        paired_p99=quantile_of_differences(before, through, 0.99),
        server_p99=quantile_difference(before, after, 0.99),
        server_paired_p99=quantile_of_differences(before, after, 0.99),
        direct_p50=float(np.quantile(before, 0.5)),
        pairs=pairs,
        max_tokens=max_tokens,
        server_threads=server_threads,
    )


def times_in_turns(urls: list[str], asked: dict[str, Any], turns: int) -> np.ndarray:
    """Seconds of each turn's answers over connections that stay open, a column for each URL."""
    addresses = {url: urlsplit(url) for url in urls}
    connections = {
        url: HTTPConnection(one.hostname or "", one.port) for url, one in addresses.items()
    }
    try:
        times = [
            [
                seconds_of_answer(connections[url], f"{addresses[url].path}/completions", asked)
                for url in urls
            ]
            for _ in range(turns + WARM_UP)
        ]
    finally:
        for connection in connections.values():
            connection.close()
    return np.array(times[WARM_UP:])


def report_upstream(added: dict[str, Any]) -> str:
    """The figures of `AddedToUpstream`, as a dictionary, in lines."""
    return "\n".join(
        (
            f"before a server of its own it adds {shown(added['p50'])} at p50 and "
            f"{shown(added['p99'])} at p99 to {added['direct_p50']:.1f} ms "
            f"({added['pairs']} pairs, {added['max_tokens']} tokens each)",
            f"pair by pair {shown(added['paired_p50'])} at p50 and {shown(added['paired_p99'])} "
            "at p99",
            f"the server asked twice differs from itself by {shown(added['server_p99'])} at p99, "
            f"pair by pair by {shown(added['server_paired_p99'])}",
        )
    )
