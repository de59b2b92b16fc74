"""What a gateway adds in front of a server: the same requests to both, in turns, by one client.

The server is a process of `gmpo serve` with the model, the gateway is another one with `--upstream`
at that server, and the client is this process. What the gateway adds is what it adds in practice:
reading the request, asking the server for a stream with log-probabilities, scoring, answering.
In each turn the server is asked directly both as the client asks the gateway, for one plain answer,
and as the gateway asks the server. The one says what the gateway adds to what a client would have
had, the other how much of that is the stream and how much the gateway itself.

    python -m benchmarks.upstream_latency --json docs/results/upstream_latency.json

A model beside the gateway varies by more than a gateway adds, and takes its processors. With
`--paced 10` the server gives a token each 10 ms and computes nothing (`benchmarks.paced_server`),
as one on a machine of its own: what is added then is the gateway's alone.
"""

from __future__ import annotations

import argparse
import json
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.circumstances import busy_warning, circumstances
from benchmarks.differences import Difference, quantile_difference, quantile_of_differences, shown
from benchmarks.options import (
    add_threads,
    ends_clearly,
    require_at_least_one,
    require_threads,
    results_file,
)
from benchmarks.paced_server import paced_server
from benchmarks.results import write_results
from gmpo.continual.serving import served_process

NAME = "model"
WARM_UP = 5
"""Turns that are not counted: the first ones open connections and meet cold code."""
NEEDED_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")
LONGEST_PACE = 1000.0
"""Milliseconds from token to token of a server without a model, at most."""
_START_SECONDS = 300.0

Question = tuple[str, dict[str, Any]]
"""A server's URL, and the body of a completions request to it."""


@dataclass(frozen=True, kw_only=True)
class AddedToUpstream:
    """What the gateway adds to a server's answers, in milliseconds.

    `p50` and `p99` are percentile less percentile; `paired_p50` and `paired_p99` are percentiles of
    the differences, pair by pair. `stream_...` are the same of the server, asked as the gateway
    asks it, and `beyond_stream_...` of the gateway against that: the gateway's own part.
    `server_...` are the same of the server against itself, asked a second time in each turn: what
    the machine alone does to such a figure.
    """

    p50: Difference
    p99: Difference
    paired_p50: Difference
    paired_p99: Difference
    stream_p50: Difference
    stream_paired_p50: Difference
    beyond_stream_p50: Difference
    beyond_stream_p99: Difference
    beyond_stream_paired_p50: Difference
    beyond_stream_paired_p99: Difference
    server_p50: Difference
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
    model: str,
    dtype: str,
    *,
    pairs: int,
    max_tokens: int,
    threads: int,
    paced_milliseconds: float | None = None,
) -> AddedToUpstream:
    """Start a server and a gateway before it, and ask both for the same short answers.

    The server is asked for a plain answer twice in each turn, and once as the gateway asks it.

    Args:
        model: name or folder, of the server.
        dtype: as for `gmpo serve`.
        pairs: turns that count.
        max_tokens: of each answer, which is greedy.
        threads: of this measurement. The server gets one less, if there are two, so that gateway
            and client have a core as they would on a machine of their own.
        paced_milliseconds: from token to token of a server without a model; None starts one with.
    """
    plain = {"model": NAME, "prompt": "1 + 1 =", "max_tokens": max_tokens, "temperature": 0.0}
    server_threads = max(1, threads - 1)
    named = ("--name", NAME)
    with (
        served_process(
            model,
            arguments=(*named, "--dtype", dtype),
            threads=server_threads,
            seconds=_START_SECONDS,
        )
        if paced_milliseconds is None
        else paced_server(paced_milliseconds) as server,
        served_process(
            NAME,
            arguments=(*named, "--upstream", server),
            threads=1,
            seconds=_START_SECONDS,
            what="the gateway before the server",
        ) as gateway,
    ):
        streamed = (server, as_the_gateway_asks(plain))
        questions = [(server, plain), streamed, (gateway, plain), (server, plain)]
        times = times_in_turns(questions, pairs)
    before, stream, through, after = 1000 * times.T
    return AddedToUpstream(
        p50=quantile_difference(before, through, 0.5),
        p99=quantile_difference(before, through, 0.99),
        paired_p50=quantile_of_differences(before, through, 0.5),
        paired_p99=quantile_of_differences(before, through, 0.99),
        stream_p50=quantile_difference(before, stream, 0.5),
        stream_paired_p50=quantile_of_differences(before, stream, 0.5),
        beyond_stream_p50=quantile_difference(stream, through, 0.5),
        beyond_stream_p99=quantile_difference(stream, through, 0.99),
        beyond_stream_paired_p50=quantile_of_differences(stream, through, 0.5),
        beyond_stream_paired_p99=quantile_of_differences(stream, through, 0.99),
        server_p50=quantile_difference(before, after, 0.5),
        server_p99=quantile_difference(before, after, 0.99),
        server_paired_p99=quantile_of_differences(before, after, 0.99),
        direct_p50=float(np.quantile(before, 0.5)),
        pairs=pairs,
        max_tokens=max_tokens,
        server_threads=server_threads if paced_milliseconds is None else 0,
    )


def as_the_gateway_asks(plain: dict[str, Any]) -> dict[str, Any]:
    """What a gateway asks its server where a client asks it for a plain completion."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {**plain, "n": 1, "top_p": 1.0, "logprobs": 0, **stream}


def times_in_turns(questions: Sequence[Question], turns: int) -> np.ndarray:
    """Seconds of each turn's answers over connections that stay open, a column for each question.

    What follows a question is not the same in each turn, lest one be always asked after another.
    """
    addresses = {url: urlsplit(url) for url, _ in questions}
    connections = {
        url: HTTPConnection(one.hostname or "", one.port) for url, one in addresses.items()
    }
    drawn = np.random.default_rng(0)
    times = np.empty((turns + WARM_UP, len(questions)))
    try:
        for turn in times:
            for place in drawn.permutation(len(questions)):
                url, asked = questions[place]
                path = f"{addresses[url].path}/completions"
                turn[place] = seconds_of_answer(connections[url], path, asked)
    finally:
        for connection in connections.values():
            connection.close()
    return times[WARM_UP:]


def report_upstream(added: dict[str, Any]) -> str:
    """The figures of `AddedToUpstream`, as a dictionary, in lines."""
    return "\n".join(
        (
            f"before a server of its own it adds {shown(added['p50'])} at p50 and "
            f"{shown(added['p99'])} at p99 to {added['direct_p50']:.1f} ms "
            f"({added['pairs']} pairs, {added['max_tokens']} tokens each)",
            f"pair by pair {shown(added['paired_p50'])} at p50 and {shown(added['paired_p99'])} "
            "at p99",
            "of that the server's stream with log-probabilities is "
            f"{shown(added['stream_p50'])} at p50, pair by pair "
            f"{shown(added['stream_paired_p50'])}",
            f"the gateway itself is {shown(added['beyond_stream_p50'])} at p50 and "
            f"{shown(added['beyond_stream_p99'])} at p99, pair by pair "
            f"{shown(added['beyond_stream_paired_p50'])} and "
            f"{shown(added['beyond_stream_paired_p99'])}",
            f"the server asked twice differs from itself by {shown(added['server_p50'])} at p50 "
            f"and {shown(added['server_p99'])} at p99, pair by pair by "
            f"{shown(added['server_paired_p99'])} at p99",
        )
    )


@ends_clearly
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument(
        "--paced", type=float, metavar="MS", help="a server without a model, a token each MS ms"
    )
    parser.add_argument("--json", type=results_file, help="file for all figures")
    add_threads(parser)
    options = parser.parse_args(arguments)
    require_threads(parser, options.threads)
    require_at_least_one(parser, pairs=options.pairs, tokens=options.tokens)
    if options.paced is not None and not 0 < options.paced <= LONGEST_PACE:
        parser.error(
            f"--paced is {options.paced:g}; above 0 and at most {LONGEST_PACE:g} is needed"
        )
    under = circumstances(*NEEDED_PACKAGES)
    if warning := busy_warning(under["load_before"]):
        print(warning, file=sys.stderr)
    figures = asdict(
        added_to_upstream(
            options.model,
            options.dtype,
            pairs=options.pairs,
            max_tokens=options.tokens,
            threads=options.threads,
            paced_milliseconds=options.paced,
        )
    )
    print(report_upstream(figures))
    if options.json is not None:
        with_model = {"model": options.model, "dtype": options.dtype}
        what = with_model if options.paced is None else {"paced_milliseconds": options.paced}
        asked = {**what, "threads": options.threads}
        whole = {**asked, "circumstances": under, **figures}
        write_results(options.json, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
