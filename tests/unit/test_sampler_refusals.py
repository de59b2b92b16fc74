"""What a sampler refuses, and what is left of it where a request or a step raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.models import tiny_model

from gmpo.errors import ConfigError
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import Completion, SampleRequest, complete

CONTEXT = 64


def sampler_of(**options: Any) -> LocalSampler:
    decoder = LlamaDecoder(LlamaBody(tiny_model(dtype=torch.float64)), max_rows=4)
    return LocalSampler(decoder, context_length=CONTEXT, max_rows=4, **options)


def request(name: str = "r", *, max_tokens: int = 6, **fields: Any) -> SampleRequest:
    return SampleRequest(id=name, token_ids=(7, 30, 12), max_tokens=max_tokens, key=(1,), **fields)


def only(sampler: LocalSampler, asked: SampleRequest) -> Completion:
    (completion,) = complete(sampler, [asked])[asked.id]
    return completion


def test_a_refused_request_or_an_interrupted_step_leaves_the_sampler_idle(
    monkeypatch: pytest.MonkeyPatch,
):
    sampler = sampler_of()
    endless = request("0", max_tokens=CONTEXT)
    with pytest.raises(ConfigError, match="exceed the model's context"):
        complete(sampler, [request("1"), endless])
    assert sampler.is_idle
    expected = only(sampler, request("0"))

    def interrupted(logits: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sampler, "_draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            complete(sampler, [request("0"), request("1")])
    assert sampler.is_idle
    assert only(sampler, request("0")).token_ids.tolist() == expected.token_ids.tolist()


@pytest.mark.parametrize("place", ["before the rows", "behind them", "at their numbers"])
def test_ctrl_c_while_rows_are_added_leaves_the_sampler_idle(
    place: str, monkeypatch: pytest.MonkeyPatch
):
    sampler = sampler_of()
    asked = request("0", num_completions=3)
    expected = [c.token_ids.tolist() for c in complete(sampler, [asked])["0"]]
    decoder = sampler._decoder
    add_rows, new_row = decoder.add_rows, sampler._new_row

    def interrupted(*arguments: Any) -> None:
        if place == "behind them":
            add_rows(*arguments)
        raise KeyboardInterrupt

    def interrupted_at_the_last(asked: SampleRequest, index: int, scores: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return new_row(asked, index, scores)

    with monkeypatch.context() as patched:
        if place == "at their numbers":
            patched.setattr(sampler, "_new_row", interrupted_at_the_last)
        else:
            patched.setattr(decoder, "add_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            complete(sampler, [asked])
    assert sampler.is_idle
    assert [c.token_ids.tolist() for c in complete(sampler, [asked])["0"]] == expected


def test_a_stop_string_that_is_a_special_tokens_text_stops_at_the_token():
    def spelt(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    plain = only(sampler_of(decode=spelt), request(max_tokens=8))
    drawn = plain.token_ids.tolist()
    hidden = {"<end>": drawn[3]}
    assert drawn.index(drawn[3]) == 3

    def without(ids: Sequence[int]) -> str:
        return spelt([token for token in ids if token not in hidden.values()])

    sampler = sampler_of(decode=without, special_tokens=hidden)
    stopped = only(sampler, request(max_tokens=8, stop_strings=("<end>",)))
    assert (stopped.token_ids.tolist(), stopped.finish_reason) == (drawn[:4], "stop")
    with pytest.raises(ConfigError, match="holds a special token and more"):
        sampler.submit(request(stop_strings=("<end> and more",)))
    assert sampler.is_idle
