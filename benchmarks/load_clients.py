"""Clients that ask again as soon as they were answered; a process of its own, without torch.

Reads {url, clients, seconds, prompts, max_tokens, model} from standard input and writes every
answer to standard output, so that nothing it does runs in the server's process.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2


async def ask_until(
    client: httpx2.AsyncClient, job: dict[str, Any], first: int, start: float
) -> list[dict[str, Any]]:
    """One client's answers, all begun before the end; they may end after it."""
    answers = []
    number = first
    while (began := time.perf_counter()) < start + job["seconds"]:
        place = number % len(job["prompts"])
        number += job["clients"]
        response = await client.post(
            "/chat/completions",
            json={
                "model": job["model"],
                "messages": [{"role": "user", "content": job["prompts"][place]}],
                "max_tokens": job["max_tokens"],
                "temperature": 0,
            },
        )
        ended = time.perf_counter()
        answer: dict[str, Any] = {
            "place": place,
            "status": response.status_code,
            "seconds": ended - began,
            "ended": ended - start,
        }
        if response.status_code == 200:
            body = response.json()
            answer["text"] = body["choices"][0]["message"]["content"]
            answer["tokens"] = body["usage"]["completion_tokens"]
        else:
            await asyncio.sleep(float(response.headers.get("retry-after", "0.1")))
        answers.append(answer)
    return answers


async def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """All clients' answers."""
    limits = httpx2.Limits(max_connections=job["clients"], max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=job["url"], timeout=120, limits=limits) as client:
        start = time.perf_counter()
        each = await asyncio.gather(
            *(ask_until(client, job, first, start) for first in range(job["clients"]))
        )
    return [answer for of_one in each for answer in of_one]


def answers_of(job: dict[str, Any], *, folder: Path) -> list[dict[str, Any]]:
    """What clients in a process of their own got; `folder` is the repository."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_clients"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def tokens_per_second(answers: Sequence[Mapping[str, Any]], seconds: float) -> float:
    """Tokens of the answers that were whole within the timed seconds, over the time of the last.

    What was still on its way when the seconds were over counts neither tokens nor time: clients
    ask no more then, so fewer and fewer are answered together, and that would be measured with it.
    A span that ends with an answer does not depend on how many answers fit into the seconds. The
    offline sampler is measured likewise (`benchmarks.load.run_offline`).

    Args:
        answers: as `answers_of` gives them; those without status 200 have no tokens.
        seconds: how long clients asked. If no answer was whole by then, all of them count, over
            the time of the last; 0 where there is none.
    """
    whole = [answer for answer in answers if answer["status"] == 200]
    in_time = [answer for answer in whole if answer["ended"] <= seconds] or whole
    if not in_time:
        return 0.0
    tokens: int = sum(answer["tokens"] for answer in in_time)
    last: float = max(answer["ended"] for answer in in_time)
    return tokens / last


if __name__ == "__main__":
    json.dump(asyncio.run(run(json.load(sys.stdin))), sys.stdout)
