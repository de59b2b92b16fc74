"""What servers on the same cores cost each other, by how their idle threads wait.

Two processes of `gmpo serve` for each way of waiting: threads that spin, as libgomp has it by
default, that spin briefly (`gmpo.shared_cores`), and that sleep at once. The ways are measured in
turns: 16 short requests at one server alone, and at both servers at once.

    python -m benchmarks.shared_cores --json docs/results/shared_cores.json
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.circumstances import busy_warning, circumstances
from benchmarks.options import (
    BenchmarkError,
    add_threads,
    ends_clearly,
    require_at_least_one,
    require_threads,
    results_file,
)
from benchmarks.results import write_results
from gmpo.continual.serving import served_process
from gmpo.continual.traffic import ServerClient, open_client
from gmpo.policy.load import model_folder
from gmpo.records import Prompt
from gmpo.shared_cores import sharing_cores

WAYS = {
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "spin briefly": sharing_cores({}),
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""The environment of each; 300,000 turns is what libgomp takes where nothing is said."""
AT_ONCE = 16
MAX_TOKENS = 8


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", required=True, type=results_file, metavar="FILE")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--cycles", type=int, default=8, help="measurements of each")
    add_threads(parser)
    arguments = parser.parse_args(argv)
    require_at_least_one(parser, cycles=arguments.cycles)
    require_threads(parser, arguments.threads)
    around = circumstances("torch", "transformers")
    if (warning := busy_warning(around["load_before"])) is not None:
        print(warning, file=sys.stderr)
    seconds = measure(arguments)
    report = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "requests": AT_ONCE,
        "max_tokens": MAX_TOKENS,
        "circumstances": around,
        "seconds": seconds,
    }
    print_table(seconds)
    write_results(arguments.json, report)
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of each measurement, by way and by "alone" or "both at once"."""
    model = model_folder(arguments.model)
    seconds: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        pairs = {way: servers(stack, model, way, arguments) for way in WAYS}
        crowd = stack.enter_context(ThreadPoolExecutor(2))
        for pair in pairs.values():  # the first answers of a server are slow
            for server in pair:
                asked(server)
        for _ in range(arguments.cycles):
            for way, pair in pairs.items():
                of_way = seconds.setdefault(way, {"alone": [], "both at once": []})
                of_way["alone"].append(asked(pair[0]))
                of_way["both at once"].append(max(crowd.map(asked, pair)))
    return seconds


def servers(
    stack: ExitStack, model: str, way: str, arguments: argparse.Namespace
) -> list[ServerClient]:
    """Two servers whose threads wait in that way."""
    options = ("--name", "bench", "--dtype", arguments.dtype)
    before = dict(os.environ)
    for name in {name for environment in WAYS.values() for name in environment}:
        os.environ.pop(name, None)
    os.environ.update(WAYS[way])
    try:
        urls = [
            stack.enter_context(
                served_process(model, arguments=options, threads=arguments.threads, seconds=120)
            )
            for _ in range(2)
        ]
    finally:
        os.environ.clear()
        os.environ.update(before)
    return [stack.enter_context(open_client(url)) for url in urls]


def asked(server: ServerClient) -> float:
    """Seconds until a server has answered all requests, which are sent at once."""
    questions = [f"Which number is larger, {7 * n} or {5 * n + 9}?" for n in range(AT_ONCE)]
    prompts = [
        Prompt(id=str(n), text=question, columns={"answer": "0"})
        for n, question in enumerate(questions)
    ]
    began = time.perf_counter()
    answers = server.ask(prompts, max_tokens=MAX_TOKENS, at_once=AT_ONCE)
    took = time.perf_counter() - began
    failed = [answer.error for answer in answers if answer.error is not None]
    if failed:
        raise BenchmarkError(f"{len(failed)} of {AT_ONCE} requests failed, the first: {failed[0]}")
    return took


def print_table(seconds: dict[str, dict[str, list[float]]]) -> None:
    table = Table(title=f"seconds of {AT_ONCE} requests a server, median (least to most)")
    for name in ("idle threads", "one server alone", "both servers at once"):
        table.add_column(name)
    for way, figures in seconds.items():
        table.add_row(way, *map(shown, figures.values()))
    Console(width=100).print(table)


def shown(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
