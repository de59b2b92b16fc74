"""What a model's server sends, read as chunks: by hand, in any pieces, and when it is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.upstreams import chat_event, text_event, usage_event

from gmpo.serving.backend import BackendError, Chunk, GenerationRequest, TokenLogprob, Usage
from gmpo.serving.upstream_events import EventDecoder, UpstreamAnswer


def request(**more) -> GenerationRequest:
    return GenerationRequest(**{"id": "r", "route": "completions", "model": "m", **more})


def reading(asked: GenerationRequest, version: str | None = "v") -> UpstreamAnswer:
    return UpstreamAnswer(asked, version=version, model="bot")


def read(answer: UpstreamAnswer, *events: dict[str, object] | str) -> list[Chunk]:
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return [chunk for text in texts for chunk in answer.read(text)]


def test_events_end_with_an_empty_line_and_comments_are_no_events():
    data = b": ping\r\n\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: cut"
    assert list(EventDecoder().feed(data)) == ["one", "two\nlines"]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n")), max_size=4),
    st.data(),
)
def test_events_are_the_same_however_the_body_is_cut(texts: list[str], data: st.DataObject):
    body = "".join(f"data: {text}\n\n" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    decoder = EventDecoder()
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == texts


def test_an_endless_event_and_bytes_that_are_no_text_are_broken():
    decoder = EventDecoder(max_bytes=10)
    with pytest.raises(BackendError, match="more than 10 bytes"):
        list(decoder.feed(b"data: 12345678"))
    with pytest.raises(BackendError, match="not UTF-8"):
        list(EventDecoder().feed(b"data: \xff\n\n"))


def test_a_text_stream_is_read_piece_by_piece_and_its_last_piece_knows_the_tokens():
    answer = reading(request(prompt="a"))
    seen = read(
        answer,
        text_event("b"),
        text_event("c", logprob=-1.0),
        text_event("", finish="stop"),
        usage_event(1, 2),
        "[DONE]",
    )
    assert [chunk.text for chunk in seen] == ["b", "c"]
    assert seen[1].logprobs == (TokenLogprob(token="c", logprob=-1.0),)
    assert answer.is_done
    (last,) = answer.end()
    assert last.finish_reason == "stop" and last.model_version == "v"
    assert last.usage == Usage(prompt_tokens=1, completion_tokens=2)


def test_a_chat_stream_tells_alternatives_and_an_event_of_the_role_alone_is_left_out():
    answer = reading(request(route="chat", messages=({"role": "user", "content": "a"},)))
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    told = chat_event("b")
    told["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [
        {"token": "x", "logprob": -0.2, "bytes": [120]}
    ]
    (chunk,) = read(answer, role, told)
    assert chunk.logprobs[0].top == (TokenLogprob(token="x", logprob=-0.2),)


def test_without_a_configured_version_the_servers_fingerprint_counts_and_then_its_name():
    answer = reading(request(prompt="a"), None)
    first, second = read(answer, text_event("b") | {"system_fingerprint": "fp"}, text_event("c"))
    assert first.model_version == second.model_version == "fp"
    (chunk,) = read(reading(request(prompt="a"), None), text_event("b"))
    assert chunk.model_version == "bot"


def test_each_of_several_choices_must_end():
    answer = reading(request(prompt="a", n=2))
    second = text_event("c", finish="length")
    second["choices"][0]["index"] = 1
    assert [chunk.index for chunk in read(answer, text_event("b"), second)] == [0, 1]
    with pytest.raises(BackendError, match="cut before the end") as caught:
        list(answer.end())
    assert caught.value.fault == "broken"
    read(answer, text_event("", finish="stop"))
    (last,) = answer.end()
    assert (last.index, last.usage) == (0, None)


@pytest.mark.parametrize(
    ("event", "what"),
    [
        ("{", "JSON"),
        ("{}", "choices: Field required"),
        ('{"choices": [{"index": 0}]}', "text: Field required"),
        (text_event("b", logprob=0.5), "logprob"),
        ('{"choices": [{"index": 3, "text": "b"}]}', "choice 3 was not asked for"),
        (text_event("", finish="abort"), "abort"),
        (
            '{"choices": [{"text": "b", "logprobs": {"tokens": ["b"], "token_logprobs": []}}]}',
            "different lengths",
        ),
        ('{"error": {"message": "worker died", "code": 500}}', "worker died"),
        ('{"error": "gone"}', "gone"),
    ],
)
def test_what_is_no_event_of_openais_is_a_broken_stream(event: dict[str, object] | str, what: str):
    with pytest.raises(BackendError, match=what) as caught:
        read(reading(request(prompt="a")), event)
    assert caught.value.fault == "broken"


def test_an_error_event_may_be_a_refusal_and_after_the_end_nothing_may_come():
    with pytest.raises(BackendError, match="too long") as caught:
        read(reading(request(prompt="a")), '{"error": {"message": "too long", "code": 400}}')
    assert caught.value.fault == "bad_request"
    answer = reading(request(prompt="a"))
    read(answer, text_event("", finish="stop"))
    with pytest.raises(BackendError, match="had ended"):
        read(answer, text_event("more"))


def test_what_a_chunk_cannot_carry_is_an_error_and_not_lost():
    asked = request(route="chat", messages=({"role": "user", "content": "a"},))
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "hm", "refusal": None}}]}
    with pytest.raises(BackendError, match="'reasoning_content', which this server does not pass"):
        read(reading(asked), thought)


def whole(text: str, **logprobs) -> str:
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs or None}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 1}})


def test_an_echoed_prompt_is_set_apart_with_its_log_probabilities():
    # Tokens "a", "b" are the prompt, "c" the completion; the first has no log-probability.
    told = {"tokens": ["a", "b", "c"], "token_logprobs": [None, -1.0, -2.0]}
    for asked, more in (
        (request(prompt="ab", echo=True), {}),
        (request(prompt=(7, 8), echo=True), {}),
        (request(prompt=(7, 8), echo=True), {"text_offset": [0, 1, 2]}),
    ):
        answer = reading(asked)
        (echo,) = answer.read_whole(whole("abc", **told, **more))
        (rest,) = answer.end()
        assert (echo.text, echo.is_echo) == ("ab", True)
        assert [one.logprob for one in echo.logprobs] == [None, -1.0]
        assert (rest.text, rest.finish_reason, rest.usage) == (
            "c",
            "length",
            Usage(prompt_tokens=2, completion_tokens=1),
        )
        assert rest.logprobs == (TokenLogprob(token="c", logprob=-2.0),)


def test_an_echo_that_cannot_be_told_from_the_answer_is_refused():
    with pytest.raises(BackendError, match="where the echoed prompt ends"):
        list(reading(request(prompt=(7, 8), echo=True)).read_whole(whole("abc")))
    with pytest.raises(BackendError, match="how many tokens"):
        list(reading(request(prompt="ab", echo=True)).read_whole('{"choices": []}'))
