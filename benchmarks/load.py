"""The gateway under load: what is answered, how fast beside the offline sampler, what it adds.

Clients in a process of their own ask for S seconds, each again as soon as it was answered. Before
and after, the offline sampler works off the same prompts with as many in flight, so that a machine
whose speed drifts does not favour either. Then one client asks for single tokens, over HTTP and
straight from the engine in turns: the difference is what the gateway adds. The engine is asked once
more in each turn, so that one sees how far it differs from itself. A second gateway with room for
half of the clients is asked by all of them: the others must be turned away with 429 and nothing
else. At last what a gateway adds is measured before a server, each a process of its own
(`benchmarks.upstream_latency`): short answers, asked of the server and of the gateway in turns.

Answers are greedy and compared with the offline sampler's. In bf16 a few may differ: rounding
depends on how many rows are decoded together. Another prompt's answer must never be among them; in
fp32 (`--dtype fp32`) each must be its own.

    python -m benchmarks.load --json docs/results/load.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from benchmarks.circumstances import REPOSITORY, busy_warning, circumstances
from benchmarks.differences import Difference, quantile_difference, shown
from benchmarks.load_clients import answers_of, tokens_per_second
from benchmarks.options import (
    add_threads,
    ends_clearly,
    require_at_least_one,
    require_threads,
    results_file,
)
from benchmarks.results import write_results
from benchmarks.upstream_latency import (
    NAME,
    WARM_UP,
    added_to_upstream,
    report_upstream,
    seconds_of_answer,
)
from gmpo.config import ModelConfig
from gmpo.records import Message, Prompt
from gmpo.sampler.requests import Completion, SampleRequest
from gmpo.serving.access import ApiKeys
from gmpo.serving.admission import AdmissionLimits
from gmpo.serving.app import GatewayLimits, build_gateway
from gmpo.serving.backend import GenerationRequest
from gmpo.serving.engine import EmbeddedBackend, EngineLimits, ServedModel, load_served_model
from gmpo.serving.judging import AnswerJudge, QualityRules
from gmpo.serving.router import VariantRouter
from gmpo.serving.server import GatewayServer, ServerSettings, bound_socket

NEEDED_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked."""

    clients: int
    seconds: float
    overload_seconds: float
    rows: int
    max_tokens: int
    num_prompts: int
    latency_pairs: int
    upstream_pairs: int
    upstream_tokens: int


@dataclass(frozen=True, kw_only=True)
class Offline:
    """The sampler's speed without a gateway, and the texts that it gives."""

    tokens_per_second: float
    texts: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the clients saw."""

    statuses: dict[int, int]
    tokens_per_second: float
    median_seconds: float
    p99_seconds: float
    num_compared: int
    num_equal: int
    num_mixed_up: int


@dataclass(frozen=True, kw_only=True)
class Added:
    """What the gateway adds to an answer, in milliseconds: percentile less percentile.

    `engine_p99` is the same difference between the engine and itself, asked a second time in each
    turn: what the machine alone does to a 99th percentile.
    """

    p50: Difference
    p99: Difference
    engine_p99: Difference
    direct_p50: float
    pairs: int


def prompts_of(load: Load) -> list[str]:
    """Turns that are all different, so that an answer tells whose it is."""
    return [f"Tell a long story about the number {n}." for n in range(load.num_prompts)]


def on_passing_thread(work: Callable[..., Offline], *arguments: Any) -> Offline:
    """A thread on which torch ran keeps OpenMP workers, which would slow the gateway's own."""
    with ThreadPoolExecutor(max_workers=1) as passing:
        return passing.submit(work, *arguments).result()


def run_offline(model: ServedModel, load: Load, seconds: float) -> Offline:
    """Work off the prompts with as many in flight as there are clients."""
    turns = [(Message(role="user", content=turn),) for turn in prompts_of(load)]
    rendered = model.renderer.render_all([Prompt(id="", messages=turn) for turn in turns])
    ids = [prompt.token_ids or () for prompt in rendered]
    sampler = model.source.sampler
    numbers = itertools.count()

    def submit() -> None:
        number = next(numbers)
        sampler.submit(
            SampleRequest(
                id=str(number),
                token_ids=ids[number % len(ids)],
                max_tokens=load.max_tokens,
                temperature=0.0,
                stop_ids=model.stop_ids,
            )
        )

    for _ in range(load.clients):
        submit()
    texts: dict[int, str] = {}
    # Up to the last completion: what is running then counts neither tokens nor time.
    num_tokens, last, began = 0, 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds or not num_tokens:
        for event in sampler.step():
            if isinstance(event, Completion):
                num_tokens, last = num_tokens + len(event.token_ids), time.perf_counter() - began
                place = int(event.request_id) % len(ids)
                texts[place] = model.texts.of_completion(event.token_ids.tolist())
                submit()
    sampler.forget()  # the rows that were not finished
    return Offline(tokens_per_second=num_tokens / last, texts=texts)


@contextmanager
def gateway(
    backend: EmbeddedBackend, admission: AdmissionLimits
) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """Serve on a thread of this process; the URL, and the event loop that serves."""
    bound = bound_socket("127.0.0.1", 0)
    judge = AnswerJudge(QualityRules())
    router = VariantRouter(NAME, {NAME: backend}, order=(NAME,), judge=judge)
    limits = GatewayLimits(admission=admission)
    entrance = build_gateway(router, limits=limits, keys=ApiKeys(()))
    is_started = threading.Event()
    server = GatewayServer(
        entrance, settings=ServerSettings(drain_seconds=60), started=is_started.set
    )
    loop = server.new_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([bound])))
    thread.start()
    is_started.wait()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1", loop
    finally:
        loop.call_soon_threadsafe(server.drain)
        thread.join()
        loop.close()


def half_the_room(load: Load) -> AdmissionLimits:
    """A quarter of the clients runs, a quarter waits, and the rest is one too many."""
    quarter = max(1, load.clients // 4)
    return AdmissionLimits(max_running=quarter, max_queued=quarter)


def run_clients(url: str, load: Load, offline: Offline) -> Served:
    """Let the clients ask, and compare what they got with the sampler's own."""
    job = {
        "url": url,
        "model": NAME,
        "prompts": prompts_of(load),
        "clients": load.clients,
        "seconds": load.seconds,
        "max_tokens": load.max_tokens,
    }
    answers = answers_of(job, folder=REPOSITORY)
    good = [answer for answer in answers if answer["status"] == 200]
    compared = [answer for answer in good if answer["place"] in offline.texts]
    other = [one for one in compared if one["text"] != offline.texts[one["place"]]]
    mixed_up = [one for one in other if one["text"] in offline.texts.values()]
    seconds = np.array([answer["seconds"] for answer in good] or [np.nan])
    return Served(
        statuses=dict(Counter(answer["status"] for answer in answers)),
        tokens_per_second=tokens_per_second(answers, load.seconds),
        median_seconds=float(np.median(seconds)),
        p99_seconds=float(np.quantile(seconds, 0.99)),
        num_compared=len(compared),
        num_equal=len(compared) - len(other),
        num_mixed_up=len(mixed_up),
    )


def added_latency(
    backend: EmbeddedBackend, url: str, loop: asyncio.AbstractEventLoop, pairs: int
) -> Added:
    """One client's single tokens, through the gateway and straight from the engine in turns."""
    asked: dict[str, Any] = {"prompt": "1 + 1 =", "max_tokens": 1, "temperature": 0.0}

    async def direct(name: str) -> float:
        request = GenerationRequest(id=name, route="completions", model=NAME, **asked)
        began = time.perf_counter()
        async for _ in backend.generate(request):
            pass
        return time.perf_counter() - began

    body = {"model": NAME, **asked}
    address = urlsplit(url)
    connection = HTTPConnection(address.hostname or "", address.port)

    def over_http() -> float:
        return seconds_of_answer(connection, f"{address.path}/completions", body)

    def straight(number: int, turn: str) -> float:
        return asyncio.run_coroutine_threadsafe(direct(f"{turn}-{number}"), loop).result()

    times = np.array(
        [
            (straight(number, "before"), over_http(), straight(number, "after"))
            for number in range(pairs + WARM_UP)  # the first ones open the connection
        ][WARM_UP:]
    )
    connection.close()
    before, through, after = 1000 * times.T
    return Added(
        p50=quantile_difference(before, through, 0.5),
        p99=quantile_difference(before, through, 0.99),
        engine_p99=quantile_difference(before, after, 0.99),
        direct_p50=float(np.quantile(before, 0.5)),
        pairs=pairs,
    )


def measure(model: str, dtype: str, load: Load) -> dict[str, Any]:
    """All figures of one run."""
    served = load_served_model(ModelConfig(name=model, dtype=dtype), max_rows=load.rows)
    before = on_passing_thread(run_offline, served, load, load.seconds / 2)
    limits = EngineLimits(max_rows=load.rows, max_tokens=load.max_tokens)
    backend = EmbeddedBackend(served, name=NAME, limits=limits)
    with gateway(backend, AdmissionLimits()) as (url, loop):
        through = run_clients(url, load, before)
        added = added_latency(backend, url, loop, load.latency_pairs)
    served.source.sampler.forget()
    backend = EmbeddedBackend(served, name=NAME, limits=limits)
    with gateway(backend, half_the_room(load)) as (url, _):
        overloaded = run_clients(url, replace(load, seconds=load.overload_seconds), before)
    served.source.sampler.forget()
    after = on_passing_thread(run_offline, served, load, load.seconds / 2)
    upstream = added_to_upstream(
        model,
        dtype,
        pairs=load.upstream_pairs,
        max_tokens=load.upstream_tokens,
        threads=torch.get_num_threads(),
    )
    offline = (before.tokens_per_second + after.tokens_per_second) / 2
    num_answers = sum(through.statuses.values())
    return {
        "load": asdict(load),
        "answers": num_answers,
        "answered_200": through.statuses.get(200, 0) / num_answers,
        "answered_429": through.statuses.get(429, 0) / num_answers,
        "served": asdict(through),
        "overloaded": asdict(overloaded),
        "offline_tokens_per_second": [before.tokens_per_second, after.tokens_per_second],
        "goodput": through.tokens_per_second / offline,
        "added_milliseconds": asdict(added),
        "added_to_upstream_milliseconds": asdict(upstream),
    }


def report(figures: dict[str, Any]) -> str:
    """The figures in lines."""
    served, added = figures["served"], figures["added_milliseconds"]
    overloaded = figures["overloaded"]
    before, after = figures["offline_tokens_per_second"]
    return "\n".join(
        (
            f"{figures['answers']} answers: {figures['answered_200']:.1%} with 200, "
            f"{figures['answered_429']:.1%} with 429; all statuses {served['statuses']}",
            f"{served['num_equal']} of {served['num_compared']} texts equal the offline sampler's, "
            f"{served['num_mixed_up']} are another prompt's",
            f"latency {served['median_seconds']:.2f} s median, {served['p99_seconds']:.2f} s p99",
            f"{served['tokens_per_second']:.0f} tokens/s through the gateway, offline "
            f"{before:.0f} before and {after:.0f} after: goodput {figures['goodput']:.2f}",
            f"with room for half of the clients: all statuses {overloaded['statuses']}, "
            f"{overloaded['num_mixed_up']} texts are another prompt's",
            f"the gateway adds {shown(added['p50'])} at p50 and {shown(added['p99'])} at p99 to "
            f"{added['direct_p50']:.1f} ms ({added['pairs']} pairs, one client)",
            f"the engine asked twice differs from itself by {shown(added['engine_p99'])} at p99",
            report_upstream(figures["added_to_upstream_milliseconds"]),
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
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--overload-seconds", type=float, default=20.0)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--latency-pairs", type=int, default=1000)
    parser.add_argument("--upstream-pairs", type=int, default=500)
    parser.add_argument("--upstream-tokens", type=int, default=8)
    parser.add_argument("--json", type=results_file, help="file for all figures")
    add_threads(parser)
    options = parser.parse_args(arguments)
    require_threads(parser, options.threads)
    require_at_least_one(
        parser,
        clients=options.clients,
        seconds=options.seconds,
        overload_seconds=options.overload_seconds,
        rows=options.rows,
        max_tokens=options.max_tokens,
        prompts=options.prompts,
        latency_pairs=options.latency_pairs,
        upstream_pairs=options.upstream_pairs,
        upstream_tokens=options.upstream_tokens,
    )
    torch.set_num_threads(options.threads)
    under = circumstances(*NEEDED_PACKAGES)
    if warning := busy_warning(under["load_before"]):
        print(warning, file=sys.stderr)
    load = Load(
        clients=options.clients,
        seconds=options.seconds,
        overload_seconds=options.overload_seconds,
        rows=options.rows,
        max_tokens=options.max_tokens,
        num_prompts=options.prompts,
        latency_pairs=options.latency_pairs,
        upstream_pairs=options.upstream_pairs,
        upstream_tokens=options.upstream_tokens,
    )
    figures = measure(options.model, options.dtype, load)
    print(report(figures))
    if options.json is not None:
        whole = {
            "model": options.model,
            "dtype": options.dtype,
            "threads": options.threads,
            "circumstances": under,
            **figures,
        }
        write_results(options.json, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
