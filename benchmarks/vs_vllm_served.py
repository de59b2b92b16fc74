"""Servers beside each other: gmpo's gateway, vLLM's CPU build, and the gateway before that vLLM.

Each is a process of its own with the same weights in the same precision. Eight clients, in one more
process, ask one server at a time for some seconds, each again as soon as it was answered; which is
first alternates. No prompt comes twice, so vLLM's prefix cache finds what prompts have in common
and never an answer it gave before. Answers are greedy; gmpo's are scored with the log-probabilities
that its sampler always computes, and those that it takes from vLLM with vLLM's, so that the third
server shows what quality and fallback cost before a server. vLLM's environment is that of
`benchmarks.vs_vllm`, which builds it.

    python -m benchmarks.vs_vllm_served --json docs/results/vs_vllm_served.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.circumstances import REPOSITORY, busy_warning, circumstances
from benchmarks.load_clients import answers_of, tokens_per_second
from benchmarks.options import (
    BenchmarkError,
    add_threads,
    ends_clearly,
    require_at_least_one,
    require_threads,
    results_file,
)
from benchmarks.results import write_results
from benchmarks.spread import Spread, paired_ratios, spread
from benchmarks.vllm_environment import python_of
from benchmarks.vs_vllm import LEAST_PAIRS, add_vllm, require_vllm, vllm_environment
from gmpo.continual.serving import served_process
from gmpo.leash import end_process
from gmpo.policy.load import model_folder
from gmpo.serving.server import bound_socket

NAME = "model"
GMPO, VLLM_ALONE, BEFORE_VLLM = "gmpo", "vLLM", "gmpo before vLLM"
SERVERS = (GMPO, VLLM_ALONE, BEFORE_VLLM)
RATIOS = ((GMPO, VLLM_ALONE), (BEFORE_VLLM, VLLM_ALONE))
NEEDED_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")
_START_SECONDS = 400.0
_CACHE_POSITIONS = 1024


@ends_clearly
def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    model = model_folder(options.model)
    require_vllm(options)
    made_with = circumstances(*NEEDED_PACKAGES)
    if warning := busy_warning(made_with["load_before"]):
        print(warning)
    with ExitStack() as stack:
        urls = started(stack, model, options)
        rows = measure(urls, options)
    report = {
        "made_with": made_with,
        "model": options.model,
        "dtype": options.dtype,
        "threads": options.threads,
        "clients": options.clients,
        "seconds": options.seconds,
        "max_tokens": options.max_tokens,
        "vllm_block_size": options.block_size,
        **summary(rows),
    }
    print(table(report))
    if options.json:
        write_results(options.json, report)
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="on all sides")
    parser.add_argument("--turns", type=int, default=7, help=f"at least {LEAST_PAIRS}")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="of one server's turn")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    add_threads(parser, what="of the model's server; all cores unless given")
    add_vllm(parser)
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every figure here too"
    )
    options = parser.parse_args(arguments)
    if options.turns < LEAST_PAIRS:
        parser.error(f"--turns {options.turns} must be at least {LEAST_PAIRS}")
    require_at_least_one(
        parser,
        clients=options.clients,
        seconds=options.seconds,
        max_tokens=options.max_tokens,
    )
    require_threads(parser, options.threads)
    return options


def started(stack: ExitStack, model: str, options: argparse.Namespace) -> dict[str, str]:
    """The servers' base URLs; they end with the stack."""
    named = ("--name", NAME)

    def gmpo(model: str, *more: str, threads: int, what: str | None = None) -> str:
        return stack.enter_context(
            served_process(
                model,
                arguments=(*named, *more),
                threads=threads,
                seconds=_START_SECONDS,
                # One server is asked at a time, and each waits as it does by default.
                shares_cores=False,
                what=what,
            )
        )

    vllm = stack.enter_context(vllm_server(model, options))
    return {
        GMPO: gmpo(model, "--dtype", options.dtype, threads=options.threads),
        VLLM_ALONE: vllm,
        BEFORE_VLLM: gmpo(NAME, "--upstream", vllm, threads=1, what=f"the server of {BEFORE_VLLM}"),
    }


@contextmanager
def vllm_server(model: str, options: argparse.Namespace) -> Iterator[str]:
    """vLLM's own server on a free port, and its base URL."""
    with bound_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    # It starts in another folder, where a module of this repository cannot be taken for its own.
    python = python_of(options.venv).absolute()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", os.path.abspath(model), "--served-model-name", NAME]
    command += ["--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", str(_CACHE_POSITIONS)]
    command += ["--dtype", {"fp32": "float32", "bf16": "bfloat16"}[options.dtype]]
    command += ["--block-size", str(options.block_size), "--enable-prefix-caching"]
    environment = {**os.environ, **vllm_environment(options)}
    environment["PATH"] = f"{python.parent}:{os.environ['PATH']}"
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        print("starting vLLM", flush=True)
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd="/")
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, Path(log.name))
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            end_process(process)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a server answers; a process that ends, or takes too long, ends the benchmark."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(url).status_code == httpx2.codes.OK:
                return
        except httpx2.TransportError:
            pass  # it does not listen yet; the deadline is above
        time.sleep(0.5)
    end = "\n".join(log.read_text().splitlines()[-15:])
    code = process.poll()
    how = "did not serve in time" if code is None else f"ended with code {code}"
    raise BenchmarkError(f"vLLM's server {how}; its log ends:\n{end}")


def measure(urls: Mapping[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One warm-up, then turns in which every server is asked, in alternating order."""
    rows = []
    for number in range(options.turns + 1):
        order = list(urls) if number % 2 else [*urls][::-1]
        turn = {
            name: asked(urls[name], prompts_of(number, place), options)
            for place, name in enumerate(order)
        }
        if number:
            rows.append({"first": order[0], **turn})
            told = ", ".join(f"{name} {turn[name]['tokens_per_second']:.0f}" for name in urls)
            print(f"turn {number} of {options.turns}, tokens/s: {told}", flush=True)
    return rows


def prompts_of(turn: int, place: int) -> list[str]:
    """Turns of a chat that no other server, and no other turn, is asked."""
    first = (turn * len(SERVERS) + place) * 1000
    return [f"Tell a long story about the number {first + n}." for n in range(1000)]


def asked(url: str, prompts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """What the clients got of one server: tokens/s and latency; all must be answered by 200.

    Raises:
        BenchmarkError: one was not.
    """
    answers = answers_of(
        {
            "url": url,
            "model": NAME,
            "prompts": list(prompts),
            "clients": options.clients,
            "seconds": options.seconds,
            "max_tokens": options.max_tokens,
        },
        folder=REPOSITORY,
    )
    if failed := [answer["status"] for answer in answers if answer["status"] != httpx2.codes.OK]:
        raise BenchmarkError(
            f"{len(failed)} of {len(answers)} requests to {url} failed (status {failed[0]}), so "
            "its times cannot be compared"
        )
    return {
        "answers": len(answers),
        "tokens": sum(answer["tokens"] for answer in answers),
        "tokens_per_second": tokens_per_second(answers, options.seconds),
        "median_seconds": float(np.median([answer["seconds"] for answer in answers])),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens/s and latency of each server, and ratios of tokens/s turn by turn."""
    rates = {name: [row[name]["tokens_per_second"] for row in rows] for name in SERVERS}
    return {
        "turns": len(rows),
        "servers": {
            name: {
                "tokens_per_second": spread(rates[name]).as_dict(),
                "median_seconds": spread([row[name]["median_seconds"] for row in rows]).as_dict(),
                "answers": sum(row[name]["answers"] for row in rows),
            }
            for name in SERVERS
        },
        "ratios": {
            f"{one} / {other}": spread(paired_ratios(rates[one], rates[other])).as_dict()
            for one, other in RATIOS
        },
        "samples": list(rows),
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table: medians over turns, with smallest and largest."""
    lines = [
        f"{report['model']}, {report['dtype']}, {report['made_with']['processor']}, "
        f"{report['made_with']['cores']} cores, {report['clients']} clients, answers of at most "
        f"{report['max_tokens']} tokens",
        "",
        "| server | tokens/s | latency of an answer, s | tokens/s over vLLM's |",
        "|---|---|---|---|",
    ]
    for name, of_server in report["servers"].items():
        ratio = report["ratios"].get(f"{name} / {VLLM_ALONE}")
        cells = [
            name,
            Spread(**of_server["tokens_per_second"]).text(),
            Spread(**of_server["median_seconds"]).text(),
            "" if ratio is None else Spread(**ratio).text(),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
