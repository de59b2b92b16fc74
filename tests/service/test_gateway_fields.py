"""Each field of a request is followed or refused by name, on the route that was asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.gateways import RunningGateway, running_gateway, tiny_backend
from tests.models import save_tiny

PLAIN: dict[str, Any] = {"model": "tiny", "prompt": "12+3=", "temperature": 0}
CHAT_PATH = "/v1/chat/completions"
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "1+1="}],
    "temperature": 0,
    "max_tokens": 4,
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    with running_gateway(lambda: tiny_backend(folder)) as running:
        yield running


@pytest.mark.parametrize(
    ("route", "fields", "param", "said"),
    [
        ("completions", {"top_logprobs": 2}, "top_logprobs", "one of /v1/chat/completions"),
        ("completions", {"messages": CHAT["messages"]}, "messages", "no field 'messages'"),
        ("completions", {"max_completion_tokens": 65}, "max_completion_tokens", "at most 64"),
        (
            "completions",
            {"max_tokens": 4, "max_completion_tokens": 4},
            "max_completion_tokens",
            "give one of them",
        ),
        ("chat", {"max_completion_tokens": 5}, "max_completion_tokens", "max_tokens is 4 and"),
        ("chat", {"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ("chat", {"top_logprobs": 2, "logprobs": False}, "top_logprobs", "set logprobs to true"),
        ("chat", {"echo": True}, "echo", "which is one of /v1/completions"),
        ("chat", {"prompt": "1+1="}, "prompt", "which is one of /v1/completions"),
        (
            "chat",
            {"stream": True, "stream_options": {"include_usage": True, "usage": 1}},
            "stream_options.usage",
            "there is no field",
        ),
        (
            "completions",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "False",
        ),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options", "in one piece"),
        ("chat", {"metadata": "42"}, "metadata", "metadata: it must be a JSON object, not '42'"),
    ],
)
def test_a_field_that_would_be_ignored_is_refused_by_name(
    gateway: RunningGateway, route: str, fields: dict[str, Any], param: str, said: str
):
    path, asked = {
        "chat": (CHAT_PATH, CHAT),
        "completions": ("/v1/completions", PLAIN),
    }[route]
    with gateway.client() as client:
        refused = client.post(path, json={**asked, **fields})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("reference", [15, 1.5, True, "", " \n", ["15"], {"answer": "15"}])
@pytest.mark.parametrize(("path", "asked"), [("/v1/completions", PLAIN), (CHAT_PATH, CHAT)])
def test_a_right_answer_that_would_not_be_graded_is_refused(
    gateway: RunningGateway, path: str, asked: dict[str, Any], reference: object
):
    with gateway.client() as client:
        refused = client.post(path, json={**asked, "metadata": {"reference": reference}})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == "metadata.reference"
    assert error["message"] == (
        "metadata.reference: it must be the right answer as a text that is not blank, such as "
        f'"42", not {reference!r}'
    )


@pytest.mark.parametrize(
    ("path", "asked", "fields"),
    [
        ("/v1/completions", PLAIN, {"top_logprobs": None, "messages": None}),
        ("/v1/completions", PLAIN, {"max_completion_tokens": None, "stream_options": None}),
        (CHAT_PATH, CHAT, {"echo": None, "prompt": None, "top_logprobs": None}),
        (CHAT_PATH, CHAT, {"echo": False, "top_logprobs": 0, "logprobs": None}),
        (CHAT_PATH, CHAT, {"max_completion_tokens": None, "stream_options": None}),
        (CHAT_PATH, CHAT, {"metadata": {"reference": "2", "team": "a"}, "user": None}),
        ("/v1/completions", PLAIN, {"metadata": {"reference": None, "line": 7}}),
        ("/v1/completions", PLAIN, {"metadata": None}),
    ],
)
def test_null_and_what_asks_for_nothing_are_as_absent(
    gateway: RunningGateway, path: str, asked: dict[str, Any], fields: dict[str, Any]
):
    with gateway.client() as client:
        plain, same = (client.post(path, json=body) for body in (asked, {**asked, **fields}))
    assert same.status_code == 200, same.text
    assert same.json()["choices"] == plain.json()["choices"]


def test_max_completion_tokens_limits_a_continued_text_too(gateway: RunningGateway):
    with gateway.client() as client:
        told = client.post("/v1/completions", json={**PLAIN, "max_completion_tokens": 3}).json()
    assert told["usage"]["completion_tokens"] == 3


def test_the_official_client_streams_with_the_options_that_it_knows(gateway: RunningGateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        events = list(
            client.chat.completions.create(
                **CHAT,
                stream=True,
                stream_options={"include_usage": True, "include_obfuscation": False},
            )
        )
    assert events[-1].usage is not None and events[-1].usage.completion_tokens > 0
