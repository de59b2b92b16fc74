"""A gateway before a real vLLM server; its environment is named by GMPO_VLLM_VENV."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from tests.gateways import RunningGateway, running_gateway

from gmpo.policy.load import model_folder
from gmpo.serving.judging import AnswerJudge, QualityRules
from gmpo.serving.router import VariantRouter
from gmpo.serving.server import bound_socket
from gmpo.serving.upstream import UpstreamBackend, UpstreamSettings

pytestmark = [
    pytest.mark.verify,
    pytest.mark.real_model,
    pytest.mark.skipif(
        "GMPO_VLLM_VENV" not in os.environ,
        reason="GMPO_VLLM_VENV names no environment with vLLM (benchmarks/vllm_environment.py)",
    ),
]
STARTING_SECONDS = 400
CHAT: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "What is 2 + 3? Answer with just the number."}],
    "temperature": 0,
    "max_tokens": 24,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    venv = Path(os.environ["GMPO_VLLM_VENV"]).resolve()
    with bound_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    preloaded = venv / "lib" / "libiomp5.so"
    environment = {
        **os.environ,
        **({"LD_PRELOAD": str(preloaded)} if preloaded.exists() else {}),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    command = [
        str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server",
        "--model", model_folder("smollm2-135m"), "--served-model-name", "smollm2",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx2.get(url).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(f"vLLM did not serve in time:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def gateway(server: str) -> Iterator[RunningGateway]:
    settings = UpstreamSettings(url=server, model="smollm2", version="v1")
    router = VariantRouter(
        "smollm2",
        {"vllm": UpstreamBackend("vllm", settings)},
        order=["vllm"],
        judge=AnswerJudge(QualityRules()),
    )
    with running_gateway(router=router) as running:
        yield running


@pytest.fixture(scope="module")
def clients(server: str, gateway: RunningGateway) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    """The official client at the gateway, and at vLLM itself."""
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", timeout=300) as ours,
        openai.OpenAI(base_url=server, api_key="x", timeout=300) as theirs,
    ):
        yield ours, theirs


def test_a_chat_is_vllms_own_whole_and_streamed_and_has_a_quality(clients):
    ours, theirs = clients
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2}
    mine = ours.chat.completions.create(**asked)
    direct = theirs.chat.completions.create(**asked)
    assert mine.choices[0].message.content == direct.choices[0].message.content != ""
    assert mine.choices[0].finish_reason == direct.choices[0].finish_reason
    assert mine.usage.completion_tokens == direct.usage.completion_tokens
    assert mine.usage.prompt_tokens == direct.usage.prompt_tokens
    shown = [
        [(one.token, one.logprob) for one in answer.choices[0].logprobs.content]
        for answer in (mine, direct)
    ]
    for (token, logprob), (same, expected) in zip(*shown, strict=True):
        assert token == same and logprob == pytest.approx(expected, abs=1e-3)
    told = mine.model_dump()["gmpo"]
    assert told["model_version"] == "v1" and 0 < told["quality_score"] <= 1
    assert set(told["quality_components"]) == {"probability", "distinct", "terminated"}
    pieces = list(ours.chat.completions.create(**CHAT, stream=True))
    text = "".join(one.choices[0].delta.content or "" for one in pieces if one.choices)
    assert text == direct.choices[0].message.content


def test_completions_with_n_stop_and_seed_are_vllms_own(clients):
    ours, theirs = clients
    asked: dict[str, Any] = {
        "model": "smollm2",
        "prompt": "Numbers: 1, 2, 3,",
        "n": 2,
        "seed": 5,
        "temperature": 0.7,
        "stop": [", 9"],
        "max_tokens": 30,
    }
    mine, direct = (client.completions.create(**asked) for client in (ours, theirs))
    assert sorted(one.text for one in mine.choices) == sorted(one.text for one in direct.choices)


def test_an_echoed_prompt_is_scored_as_vllm_scores_it(clients):
    ours, theirs = clients
    asked: dict[str, Any] = {
        "model": "smollm2",
        "prompt": "2 + 3 = 5",
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
    }
    mine, direct = (client.completions.create(**asked).choices[0] for client in (ours, theirs))
    assert mine.text == direct.text
    assert mine.logprobs.tokens == direct.logprobs.tokens
    assert mine.logprobs.token_logprobs[1:] == pytest.approx(
        direct.logprobs.token_logprobs[1:], abs=1e-3
    )


def test_what_vllm_refuses_is_refused(clients):
    ours, _ = clients
    with pytest.raises(openai.BadRequestError, match=r"max_tokens|context|length"):
        ours.completions.create(model="smollm2", prompt="a", max_tokens=5000)


def test_a_client_that_leaves_ends_the_work_there(server: str, clients):
    ours, _ = clients
    stream = ours.completions.create(
        model="smollm2", prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    metrics = server.removesuffix("/v1") + "/metrics"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = httpx2.get(metrics).text.splitlines()
        running = [line for line in lines if line.startswith("vllm:num_requests_running")]
        if running and all(float(line.split()[-1]) == 0 for line in running):
            return
        time.sleep(0.2)
    raise AssertionError(f"vLLM goes on: {running}")
