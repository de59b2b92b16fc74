"""lm-eval's local-completions requests, field by field, against the policy's own scores."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import pytest
import torch
from tests.gateways import RunningGateway, running_gateway, tiny_backend
from tests.models import character_tokenizer, save_tiny, tiny_model


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    with running_gateway(lambda: tiny_backend(folder)) as running:
        yield running


def payload(messages: list[list[int]] | list[str], *, max_tokens: int = 1) -> dict[str, Any]:
    """What lm-eval 0.4.13 sends for log-likelihoods."""
    return {
        "model": "tiny",
        "prompt": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def parsed(
    out: dict[str, Any], context_lengths: list[int], *, ends: int | None = -1
) -> list[tuple[float, bool]]:
    """What lm-eval 0.4.13 makes of the answer: its sum, and whether greedy decoding says it."""
    found = []
    choices = sorted(out["choices"], key=itemgetter("index"))
    for choice, length in zip(choices, context_lengths, strict=True):
        of_tokens = choice["logprobs"]["token_logprobs"][length:ends]
        of_best = choice["logprobs"]["top_logprobs"][length:ends]
        is_greedy = all(
            own == max(top.values()) for own, top in zip(of_tokens, of_best, strict=True)
        )
        found.append((sum(of_tokens), is_greedy))
    return found


def scored(token_ids: list[int], context_length: int) -> tuple[float, bool]:
    """The same from one forward of the model."""
    with torch.no_grad():
        logprobs = tiny_model()(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
    places = range(context_length, len(token_ids))
    total = sum(logprobs[place - 1, token_ids[place]].item() for place in places)
    is_greedy = all(int(logprobs[p - 1].argmax()) == token_ids[p] for p in places)
    return total, is_greedy


def rows() -> list[tuple[str, str]]:
    """Contexts with continuations, among them what the model itself would say."""
    model, tokenizer = tiny_model(), character_tokenizer()
    found = [("2+2=", "4"), ("2+2=", "5"), ("what is red", " blue green")]
    for context in ("12+3=", "abc"):
        ids = tokenizer(context)["input_ids"]
        for _ in range(4):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        text = tokenizer.decode(ids)
        if tokenizer(text)["input_ids"] == ids:
            found.append((context, text[len(context) :]))
    return found


@pytest.mark.parametrize("as_tokens", [True, False])
def test_log_likelihoods_are_the_policys_own(gateway: RunningGateway, as_tokens: bool):
    tokenizer = character_tokenizer()
    pairs = rows()
    token_ids = [tokenizer(context + ending)["input_ids"] for context, ending in pairs]
    lengths = [len(tokenizer(context)["input_ids"]) for context, _ in pairs]
    messages: Any = token_ids if as_tokens else [context + ending for context, ending in pairs]
    with gateway.client() as client:
        one = client.post("/v1/completions", json=payload(messages)).json()
        alone = client.post("/v1/completions", json=payload(messages, max_tokens=0)).json()
    expected = [scored(ids, length) for ids, length in zip(token_ids, lengths, strict=True)]
    assert {greedy for _, greedy in expected} == {True, False}
    for found in (parsed(one, lengths), parsed(alone, lengths, ends=None)):
        assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [choice["text"] for choice in alone["choices"]]
    assert texts == [context + ending for context, ending in pairs]
    assert alone["usage"]["completion_tokens"] == 0


def test_generation_until_a_text(gateway: RunningGateway):
    asked = {
        "prompt": ["12+3="],
        "model": "tiny",
        "max_tokens": 20,
        "temperature": 0,
        "stop": ["\n\n", "Q:"],
        "seed": 1234,
    }
    with gateway.client() as client:
        (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
    assert choice["index"] == 0 and choice["text"] and "Q:" not in choice["text"]
