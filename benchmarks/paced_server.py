"""A server of a model that costs nothing: a token at fixed times, with a log-probability each.

It speaks as much of OpenAI's completions as a gateway asks of it. What a gateway adds to its
answers is the gateway's own: the server computes nothing, so it neither varies nor takes the
processors that the gateway needs, as a model on the same machine does.

    python -m benchmarks.paced_server --milliseconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gmpo.serving.server import bound_socket

TOKEN = " one"


def application(milliseconds: float) -> Starlette:
    """Answers every completions request with as many tokens as it allows."""

    async def complete(request: Request) -> Response:
        asked = await request.json()
        if asked.get("stream"):
            events = _events(asked["max_tokens"], milliseconds / 1000)
            return StreamingResponse(events, media_type="text/event-stream")
        await asyncio.sleep(asked["max_tokens"] * milliseconds / 1000)
        whole = _choice(asked["max_tokens"], is_last=True)
        return JSONResponse(_body([whole], asked["max_tokens"]))

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


async def _events(tokens: int, seconds: float) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    for number in range(1, tokens + 1):
        # At times from the beginning, so that what sending takes does not add up.
        await asyncio.sleep(began + number * seconds - loop.time())
        body = _body([_choice(1, is_last=number == tokens)], None)
        if number < tokens:
            yield f"data: {json.dumps(body)}\n\n"
    end = json.dumps(_body([], tokens))
    yield f"data: {json.dumps(body)}\n\ndata: {end}\n\ndata: [DONE]\n\n"


def _choice(tokens: int, *, is_last: bool) -> dict[str, Any]:
    each = range(tokens)
    logprobs = {
        "tokens": [TOKEN for _ in each],
        "token_logprobs": [-0.5 for _ in each],
        "top_logprobs": [{} for _ in each],
        "text_offset": [len(TOKEN) * place for place in each],
    }
    reason = "length" if is_last else None
    return {"index": 0, "text": TOKEN * tokens, "logprobs": logprobs, "finish_reason": reason}


def _body(choices: list[dict[str, Any]], tokens: int | None) -> dict[str, Any]:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + (tokens or 0)}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "model"}
    return {**head, "choices": choices, "usage": None if tokens is None else usage}


@contextmanager
def paced_server(milliseconds: float) -> Iterator[str]:
    """The server in a process of its own, and its base URL."""
    command = [sys.executable, "-m", __spec__.name, "--milliseconds", str(milliseconds)]
    folder = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, "it ended before it served"
            yield url
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--milliseconds", type=float, required=True, help="from token to token")
    milliseconds = parser.parse_args().milliseconds
    with bound_socket("127.0.0.1", 0) as bound:
        bound.listen()  # so that whoever reads the line below can connect
        print(f"http://127.0.0.1:{bound.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(application(milliseconds), log_level="error")
        uvicorn.Server(config).run(sockets=[bound])


if __name__ == "__main__":
    main()
