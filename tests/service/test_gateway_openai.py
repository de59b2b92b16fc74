"""The official OpenAI client, unchanged, against a real gateway over a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.gateways import RunningGateway, running_gateway, tiny_backend
from tests.models import character_tokenizer, save_tiny, tiny_model

from gmpo.engine import build_sampler
from gmpo.policy.load import end_token_ids
from gmpo.policy.score import Policy
from gmpo.rollouts import decode_text
from gmpo.sampler.requests import SampleRequest, complete

KEY = "sk-of-the-tests"
CHAT = [{"role": "user", "content": "1+1="}]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    with running_gateway(lambda: tiny_backend(folder), keys=[KEY]) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def offline_texts(asked: list[dict[str, Any]]) -> list[list[str]]:
    """What the training sampler draws for the same prompts and seeds."""
    model, tokenizer = tiny_model(), character_tokenizer()
    sampler = build_sampler(Policy(model, engine="fast", warn=print), tokenizer, max_rows=4)
    requests = [
        SampleRequest(
            id=str(place),
            token_ids=tuple(tokenizer(one["prompt"])["input_ids"]),
            num_completions=one.get("n", 1),
            max_tokens=one["max_tokens"],
            temperature=one["temperature"],
            stop_ids=end_token_ids(model, tokenizer),
            key=(one["seed"],),
        )
        for place, one in enumerate(asked)
    ]
    done = complete(sampler, requests)
    return [
        [decode_text(tokenizer, c.token_ids.tolist()) for c in done[str(place)]]
        for place in range(len(asked))
    ]


def test_models_are_listed(client: openai.OpenAI, gateway: RunningGateway):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").model_dump()["model_version"] == (
        gateway.backend.model_version
    )


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI, gateway: RunningGateway):
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": CHAT,
        "temperature": 0,
        "max_completion_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert whole.usage is not None and choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert len(tokens) == whole.usage.completion_tokens
    assert all(one.top_logprobs[0].logprob == one.logprob for one in tokens)
    assert bytes(tokens[0].bytes or []).decode() == tokens[0].token
    told = whole.model_dump()["gmpo"]
    assert told["model_version"] == whole.system_fingerprint == gateway.backend.model_version
    assert told["fell_back"] is False and told["request_id"] == whole.id

    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    pieces = [event.choices[0] for event in events if event.choices]
    assert len(pieces) > 3
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
    assert pieces[-1].finish_reason == choice.finish_reason
    assert events[-1].usage == whole.usage and not events[-1].choices
    streamed = [one for p in pieces if p.logprobs for one in p.logprobs.content or []]
    assert streamed == tokens
    (carrier,) = [event.model_dump() for event in events if "gmpo" in event.model_dump()]
    assert carrier["gmpo"]["model_version"] == gateway.backend.model_version


def test_completions_with_n_stop_seed_echo_and_several_prompts(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["12+3=", "4*5="],
        "n": 3,
        "seed": 7,
        "temperature": 0.9,
        "max_tokens": 10,
    }
    one, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) > 3
    expected = offline_texts([{**asked, "prompt": prompt} for prompt in asked["prompt"]])
    assert texts == [text for of_one in expected for text in of_one]
    assert [choice.index for choice in one.choices] == list(range(6))
    assert one.usage is not None and one.usage.prompt_tokens == 5 + 4
    other = client.completions.create(**{**asked, "seed": 8})
    assert [choice.text for choice in other.choices] != texts

    stop = texts[0][2:4]
    stopped = client.completions.create(**{**asked, "stop": [stop, "never"]})
    assert stopped.choices[0].text == texts[0][: texts[0].index(stop)]
    assert stopped.choices[0].finish_reason == "stop"

    echoed = client.completions.create(**{**asked, "echo": True})
    shown = [
        prompt + text
        for prompt, of_one in zip(asked["prompt"], expected, strict=True)
        for text in of_one
    ]
    assert [choice.text for choice in echoed.choices] == shown

    streamed = [""] * 6
    for event in client.completions.create(**asked, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_offsets_and_alternatives_of_the_plain_endpoint(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "12+3=",
        "temperature": 1,
        "seed": 3,
        "max_tokens": 6,
        "logprobs": 2,
        "echo": True,
    }
    (choice,) = client.completions.create(**asked).choices
    told = choice.logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert told.tokens[:5] == list("12+3=") and told.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert told.token_logprobs is not None and told.top_logprobs is not None
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    columns = (told.tokens, told.token_logprobs, told.top_logprobs)
    for token, logprob, top in list(zip(*columns, strict=True))[1:]:
        assert 2 <= len(top) <= 3 and top[token] == logprob
    (streamed,) = [
        event.choices[0]
        for event in client.completions.create(**asked, stream=True)
        if event.choices and event.choices[0].finish_reason
    ]
    assert streamed.logprobs is not None
    assert streamed.logprobs.text_offset == told.text_offset[5:]
    plain = client.completions.create(**{**asked, "logprobs": None}).choices[0]
    assert plain.logprobs is None and plain.text == choice.text


def test_thirty_two_clients_at_once_get_their_own_answers(gateway: RunningGateway):
    asked = [
        {
            "prompt": f"{number} and {number * 3}",
            "n": 1 + number % 2,
            "seed": number,
            "temperature": 0.0 if number % 3 == 0 else 0.8,
            "max_tokens": 5 + number % 9,
        }
        for number in range(32)
    ]

    async def one(client: openai.AsyncOpenAI, number: int) -> list[str]:
        texts = [""] * asked[number]["n"]
        if number % 2:
            stream = await client.completions.create(model="tiny", stream=True, **asked[number])
            async for event in stream:
                for choice in event.choices:
                    texts[choice.index] += choice.text
            return texts
        answer = await client.completions.create(model="tiny", **asked[number])
        return [choice.text for choice in answer.choices]

    async def work() -> list[list[str]]:
        base = f"{gateway.url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
            return list(await asyncio.gather(*(one(client, number) for number in range(32))))

    assert asyncio.run(work()) == offline_texts(asked)


@pytest.mark.parametrize(
    ("error", "fields", "said"),
    [
        (openai.NotFoundError, {"model": "other"}, "there is no model 'other'; there are: tiny"),
        (openai.BadRequestError, {"temperature": 3}, "temperature: .* not 3"),
        (openai.BadRequestError, {"tools": [{"type": "function"}]}, "does not follow 'tools'"),
        (openai.BadRequestError, {"max_tokens": 65}, "at most 64"),
        (
            openai.BadRequestError,
            {"messages": [{"role": "user", "content": "a" * 200}]},
            "takes 120; shorten it",
        ),
    ],
)
def test_refusals_reach_the_client_as_its_own_errors(
    client: openai.OpenAI, error: type[openai.APIStatusError], fields: dict[str, Any], said: str
):
    for stream in (False, True):
        with pytest.raises(error, match=said):
            client.chat.completions.create(
                **{"model": "tiny", "messages": CHAT, "stream": stream, **fields}
            )


def test_a_wrong_key_is_refused(gateway: RunningGateway):
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-wrong") as client,
        pytest.raises(openai.AuthenticationError, match="missing or wrong"),
    ):
        client.models.list()
