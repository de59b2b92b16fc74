"""The local sampler on tiny models in fp64: what it draws, when it ends, what it does not see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import FAMILIES, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from gmpo.errors import ConfigError, ModelError
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.decoders import Decoder, LlamaDecoder, TransformersDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import Completion, SampledToken, SampleRequest, complete

F64 = torch.float64
END = 1
CONTEXT = 256
ENGINES = [(family, "transformers") for family in FAMILIES] + [
    (family, "llama") for family in FAMILIES if family != "gpt2"
]
# The modules of transformers take RMS-norm statistics and rotary angles in fp32 even in an fp64
# model, and gmpo's layers do the former in fp64: they agree to about 1e-6.
AGAINST_MODULE = 2e-5
every_engine = pytest.mark.parametrize(("family", "engine"), ENGINES)


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    """Shared by tests that leave its weights alone."""
    return tiny_model(family, dtype=F64)


def decoder_of(model: PreTrainedModel, engine: str, *, max_rows: int) -> Decoder:
    if engine == "llama":
        return LlamaDecoder(LlamaBody(model), max_rows=max_rows)
    return TransformersDecoder(model)


def sampler_of(
    family: str = "llama",
    engine: str = "llama",
    *,
    max_rows: int = 8,
    decode: Callable[[Sequence[int]], str] | None = None,
    model: PreTrainedModel | None = None,
) -> LocalSampler:
    decoder = decoder_of(model or model_of(family), engine, max_rows=max_rows)
    return LocalSampler(decoder, context_length=CONTEXT, max_rows=max_rows, decode=decode)


def request(
    name: str = "r", *, prompt: Sequence[int] = (7, 30, 12), **fields: Any
) -> SampleRequest:
    settings: dict[str, Any] = {"max_tokens": 10, "key": ("k", name), **fields}
    return SampleRequest(id=name, token_ids=prompt, **settings)


def only(sampler: LocalSampler, asked: SampleRequest) -> Completion:
    (completion,) = complete(sampler, [asked])[asked.id]
    return completion


def tokens_by_request(completions: dict[str, list[Completion]]) -> dict[str, list[list[int]]]:
    return {name: [c.token_ids.tolist() for c in of_one] for name, of_one in completions.items()}


@torch.no_grad()
def full_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits at every position from one forward without a cache: the obvious reference."""
    logits: Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def predicting_logits(model: PreTrainedModel, asked: SampleRequest, drawn: np.ndarray) -> Tensor:
    """Logits of the positions that predict each completion token."""
    prompt = list(asked.token_ids)
    return full_logits(model, prompt + drawn.tolist())[len(prompt) - 1 : -1]


MIXED_REQUESTS = [
    request("a", prompt=[5, 6, 7, 8, 9, 10], num_completions=3, max_tokens=6, stop_ids=(END,)),
    request("b", prompt=[5, 6, 7, 8, 9, 11, 12], num_completions=2, temperature=0.5, max_tokens=4),
    request("c", prompt=[20], max_tokens=8, stop_ids=(END, 40)),
    request("d", prompt=[5, 6, 7, 8], temperature=0.0, max_tokens=3),
    request("e", prompt=[5, 6, 7, 8, 9, 10], num_completions=4, max_tokens=5, top_p=0.7, top_k=20),
]


@every_engine
def test_greedy_is_the_step_by_step_argmax_of_the_models_own_forward(family: str, engine: str):
    asked = request(temperature=0.0, max_tokens=12)
    token_ids = list(asked.token_ids)
    for _ in range(asked.max_tokens):
        token_ids.append(int(full_logits(model_of(family), token_ids)[-1].argmax()))
    completion = only(sampler_of(family, engine), asked)
    assert completion.token_ids.tolist() == token_ids[len(asked.token_ids) :]
    assert completion.finish_reason == "length"


@every_engine
def test_completions_depend_neither_on_rows_nor_on_neighbours_nor_on_order(
    family: str, engine: str
):
    together = complete(sampler_of(family, engine, max_rows=64), MIXED_REQUESTS)
    expected = tokens_by_request(together)
    assert len({tuple(ids) for of_one in expected.values() for ids in of_one}) > 6
    for max_rows in (1, 3):
        again = complete(sampler_of(family, engine, max_rows=max_rows), MIXED_REQUESTS)
        assert tokens_by_request(again) == expected
    backwards = complete(sampler_of(family, engine, max_rows=3), MIXED_REQUESTS[::-1])
    assert tokens_by_request(backwards) == expected
    alone_sampler = sampler_of(family, engine, max_rows=2)
    for asked in MIXED_REQUESTS:
        alone = complete(alone_sampler, [asked])
        assert tokens_by_request(alone) == {asked.id: expected[asked.id]}
        for one, other in zip(alone[asked.id], together[asked.id], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=AGAINST_MODULE)


@every_engine
def test_logprobs_are_those_of_the_full_forward(family: str, engine: str):
    asked = request(num_completions=3, temperature=0.7)
    for completion in complete(sampler_of(family, engine), [asked])["r"]:
        logits = predicting_logits(model_of(family), asked, completion.token_ids)
        rows = torch.arange(len(logits))
        drawn = torch.from_numpy(completion.token_ids)
        plain = logits.log_softmax(dim=-1)[rows, drawn].numpy()
        sampled = (logits / 0.7).log_softmax(dim=-1)[rows, drawn].numpy()
        assert completion.logprobs.dtype == np.float64
        np.testing.assert_allclose(completion.logprobs, plain, rtol=0, atol=AGAINST_MODULE)
        np.testing.assert_allclose(
            completion.sampled_logprobs, sampled, rtol=0, atol=AGAINST_MODULE
        )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_both_decoders_draw_the_same(family: str):
    own = complete(sampler_of(family, "llama", max_rows=3), MIXED_REQUESTS)
    theirs = complete(sampler_of(family, "transformers", max_rows=3), MIXED_REQUESTS)
    assert tokens_by_request(own) == tokens_by_request(theirs)
    for name, completions in own.items():
        for one, other in zip(completions, theirs[name], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=AGAINST_MODULE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equally_long_prompts_share_a_forward_and_draw_what_they_draw_alone(family: str):
    ids = {"a": [5, 6, 7], "b": [20, 8, 9], "c": [11, 30, 4], "d": [9, 9]}
    asked = [
        request(name, prompt=ids[name], num_completions=2, max_tokens=4 + 2 * place)
        for place, name in enumerate(ids)
    ]
    model = tiny_model(family, dtype=F64)
    rows_of_forwards: list[int] = []
    model.register_forward_pre_hook(lambda _, given: rows_of_forwards.append(len(given[0])))
    together = complete(sampler_of(family, "transformers", max_rows=8, model=model), asked)
    # Four prefills of a prompt each; then 6 rows that are 3 long and 2 that are 2 long.
    assert rows_of_forwards[:6] == [1, 1, 1, 1, 6, 2]
    alone = {
        name: ids
        for each in asked
        for name, ids in tokens_by_request(
            complete(sampler_of(family, "transformers", model=model), [each])
        ).items()
    }
    assert tokens_by_request(together) == alone


@every_engine
def test_prompt_and_top_logprobs_are_those_of_the_full_forward(family: str, engine: str):
    plain = request(prompt=[9, 33, 50, 7], max_tokens=4)
    asked = replace(plain, top_logprobs=3, prompt_logprobs=True)
    completion = only(sampler_of(family, engine), asked)
    everything = list(asked.token_ids) + completion.token_ids.tolist()
    logprobs = full_logits(model_of(family), everything).log_softmax(dim=-1)
    expected = [logprobs[place, token].item() for place, token in enumerate([33, 50, 7])]
    assert completion.prompt_logprobs == pytest.approx(expected, abs=AGAINST_MODULE)
    assert len(completion.prompt_top_logprobs) == 3
    for place, alternatives in enumerate(completion.prompt_top_logprobs):
        best = logprobs[place].topk(3)
        assert [a.token_id for a in alternatives] == best.indices.tolist()
        values = [a.logprob for a in alternatives]
        assert values == pytest.approx(best.values.tolist(), abs=AGAINST_MODULE)
    assert len(completion.top_logprobs) == 4
    for place, alternatives in enumerate(completion.top_logprobs):
        best = logprobs[3 + place].topk(3)
        assert [a.token_id for a in alternatives] == best.indices.tolist()
        values = [a.logprob for a in alternatives]
        assert values == pytest.approx(best.values.tolist(), abs=AGAINST_MODULE)
    without = only(sampler_of(family, engine), plain)
    assert without.token_ids.tolist() == completion.token_ids.tolist()
    assert (without.prompt_logprobs, without.top_logprobs) == ((), ())


def test_prompt_logprobs_beside_requests_without_them_are_complete():
    prompts = {"x": [5, 6, 7, 8, 9, 10], "y": [5, 6, 7, 8, 9, 11], "z": [5, 6, 7, 8, 9, 12]}
    requests = [
        request(name, prompt=prompt, max_tokens=1, prompt_logprobs=name != "y")
        for name, prompt in prompts.items()
    ]
    results = complete(sampler_of(), requests)
    assert results["y"][0].prompt_logprobs == ()
    for name in ("x", "z"):
        alone = only(sampler_of(), next(r for r in requests if r.id == name))
        assert results[name][0].prompt_logprobs == pytest.approx(alone.prompt_logprobs, abs=1e-12)
        assert len(alone.prompt_logprobs) == 5


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_more_completions_than_rows_come_in_turns_with_their_own_indices(engine: str):
    asked = request(num_completions=7, stop_ids=(END,))
    wide = complete(sampler_of(engine=engine, max_rows=64), [asked])["r"]
    narrow = complete(sampler_of(engine=engine, max_rows=3), [asked])["r"]
    assert [completion.index for completion in narrow] == list(range(7))
    assert [c.token_ids.tolist() for c in narrow] == [c.token_ids.tolist() for c in wide]
    assert len({tuple(c.token_ids) for c in wide}) > 1


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_a_finished_row_is_refilled_at_the_next_step(engine: str):
    sampler = sampler_of(engine=engine, max_rows=2)
    for name, length in (("a", 1), ("b", 5), ("c", 3)):
        sampler.submit(request(name, max_tokens=length, stream=True))
    running = []
    while not sampler.is_idle:
        tokens = [event for event in sampler.step() if isinstance(event, SampledToken)]
        running.append("".join(sorted(token.request_id for token in tokens)))
    # a ends at once, c takes its row, b and c run side by side, b is alone at the end.
    assert running == ["ab", "bc", "bc", "bc", "b"]


def test_a_long_queue_of_long_prompts_is_run_in_several_prefills():
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 101, size=200 + place).tolist() for place in range(12)]
    requests = [
        request(str(place), prompt=prompt, max_tokens=2) for place, prompt in enumerate(prompts)
    ]
    together = complete(sampler_of(max_rows=64), requests)
    for asked in requests[::4]:
        assert together[asked.id][0].token_ids.tolist() == (
            only(sampler_of(), asked).token_ids.tolist()
        )


def test_the_cache_grows_with_the_longest_row_and_is_reused_after_it():
    sampler = sampler_of(max_rows=4)
    asked = [
        request("short", max_tokens=3, num_completions=2),
        request("long", prompt=[9] * 60, max_tokens=75, temperature=0.8),
        request("late", prompt=[11, 12], max_tokens=30, num_completions=3),
    ]
    together = complete(sampler, asked)
    again = complete(sampler, asked)
    assert tokens_by_request(again) == tokens_by_request(together)
    for each in asked:
        alone = complete(sampler_of(max_rows=1), [each])
        assert tokens_by_request(alone)[each.id] == tokens_by_request(together)[each.id]


def test_a_stop_id_ends_a_completion_and_stays_in_it():
    free = only(sampler_of(), request(max_tokens=12)).token_ids.tolist()
    stop = free[4]
    ended = only(sampler_of(), request(max_tokens=12, stop_ids=(stop,)))
    assert ended.token_ids.tolist() == free[: free.index(stop) + 1]
    assert ended.finish_reason == "stop"


def test_the_token_limit_ends_a_completion_as_length_unless_its_last_token_stops_it():
    free = only(sampler_of(), request(max_tokens=12)).token_ids.tolist()
    cut = only(sampler_of(), request(max_tokens=5))
    assert (cut.token_ids.tolist(), cut.finish_reason) == (free[:5], "length")
    first_seen = free.index(free[4])
    both = only(sampler_of(), request(max_tokens=first_seen + 1, stop_ids=(free[4],)))
    assert both.finish_reason == "stop"


def as_text(token_ids: Sequence[int]) -> str:
    """A character a token, two bytes each for most."""
    return "".join(chr(100 + token) for token in token_ids)


@pytest.mark.parametrize(("first", "length"), [(2, 1), (2, 3), (0, 2), (3, 40)])
def test_a_stop_string_ends_a_completion_whatever_its_length(first: int, length: int):
    asked = request(max_tokens=60, temperature=1.5)
    text = as_text(only(sampler_of(), asked).token_ids.tolist())
    stop = text[first : first + length]
    stopped = only(sampler_of(decode=as_text), replace(asked, stop_strings=("never", stop)))
    assert as_text(stopped.token_ids.tolist()) == text[: text.index(stop) + length]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_a_cancelled_request_comes_back_as_far_as_it_got_and_leaves_the_others(engine: str):
    asked = [request("a", num_completions=2), request("b"), request("c", num_completions=2)]
    whole = tokens_by_request(complete(sampler_of(engine=engine), asked))
    sampler = sampler_of(engine=engine, max_rows=4)
    for each in asked:
        sampler.submit(each)
    events: list[Any] = [*sampler.step(), *sampler.step(), *sampler.step()]
    sampler.cancel("a")
    while not sampler.is_idle:
        events += sampler.step()
    finished = {(event.request_id, event.index): event for event in events}
    assert sorted(finished) == [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1)]
    for (name, index), completion in finished.items():
        reason = "cancelled" if name == "a" else "length"
        expected = whole[name][index][:3] if name == "a" else whole[name][index]
        assert completion.finish_reason == reason
        assert completion.token_ids.tolist() == expected
        assert len(completion.logprobs) == len(expected)


def test_a_cancelled_request_that_waits_never_starts():
    sampler = sampler_of(max_rows=1)
    sampler.submit(request("a", max_tokens=2))
    sampler.submit(request("b"))
    sampler.step()
    sampler.cancel("b")
    nothing, last = sampler.step()
    assert isinstance(last, Completion) and last.request_id == "a"
    assert isinstance(nothing, Completion)
    assert (nothing.request_id, nothing.index, nothing.finish_reason) == ("b", 0, "cancelled")
    for values in (nothing.token_ids, nothing.logprobs, nothing.sampled_logprobs):
        assert values.shape == (0,)
    assert sampler.is_idle


def test_every_completion_of_a_cancelled_request_comes_back_once():
    sampler = sampler_of(max_rows=2)
    sampler.submit(request("r", num_completions=5, first_index=3))
    sampler.step()
    sampler.cancel("r")
    ended = [event for event in sampler.step() if isinstance(event, Completion)]
    assert [(event.index, len(event.token_ids)) for event in ended] == [
        *((3, 1), (4, 1), (5, 0), (6, 0), (7, 0))
    ]
    assert {event.finish_reason for event in ended} == {"cancelled"}
    assert sampler.is_idle


def test_cancelling_an_unknown_request_does_not_touch_a_later_one_of_that_name():
    sampler = sampler_of()
    sampler.cancel("r")
    assert only(sampler, request()).finish_reason == "length"


def test_streamed_tokens_are_the_completion():
    sampler = sampler_of(max_rows=2)
    sampler.submit(request("s", num_completions=3, stream=True))
    sampler.submit(request("quiet"))
    streamed: dict[tuple[str, int], list[SampledToken]] = {}
    finished: list[Completion] = []
    while not sampler.is_idle:
        for event in sampler.step():
            if isinstance(event, Completion):
                finished.append(event)
            else:
                streamed.setdefault((event.request_id, event.index), []).append(event)
    assert sorted(streamed) == [("s", 0), ("s", 1), ("s", 2)]
    for completion in finished:
        tokens = streamed.get((completion.request_id, completion.index), [])
        if completion.request_id == "quiet":
            continue
        assert [token.position for token in tokens] == list(range(10))
        assert [token.token_id for token in tokens] == completion.token_ids.tolist()
        assert [token.logprob for token in tokens] == completion.logprobs.tolist()


@every_engine
def test_new_weights_are_sampled_from_and_stamped(family: str, engine: str):
    other = tiny_model(family, dtype=F64, seed=1)
    expected = only(sampler_of(engine=engine, model=other), request())
    sampler = sampler_of(engine=engine, model=tiny_model(family, dtype=F64))
    before = only(sampler, request())
    sampler.load_weights(7, other.named_parameters())
    after = only(sampler, request())
    assert (before.first_version, before.last_version) == (0, 0)
    assert (after.first_version, after.last_version) == (7, 7)
    assert after.token_ids.tolist() == expected.token_ids.tolist() != before.token_ids.tolist()


@pytest.mark.parametrize("engine", ["transformers", "llama"])
def test_after_forgetting_nothing_runs_and_the_next_request_draws_what_it_draws_alone(engine: str):
    alone = only(sampler_of(engine=engine, max_rows=2), request("later"))
    sampler = sampler_of(engine=engine, max_rows=2)
    for name in ("running", "waiting"):
        sampler.submit(request(name, num_completions=2))
    sampler.step()
    sampler.cancel("waiting")
    sampler.forget()
    assert sampler.is_idle
    assert sampler.step() == []
    sampler.load_weights(1, model_of("llama").named_parameters())
    after = only(sampler, request("later"))
    assert after.token_ids.tolist() == alone.token_ids.tolist()
    assert after.logprobs.tolist() == alone.logprobs.tolist()


def test_new_weights_are_refused_while_completions_run():
    sampler = sampler_of(model=tiny_model(dtype=F64))
    sampler.submit(request(num_completions=2))
    sampler.step()
    with pytest.raises(ConfigError, match="2 completions are running; let them finish"):
        sampler.load_weights(1, tiny_model(dtype=F64, seed=1).named_parameters())


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_a_waiting_completion_never_starts_from_a_prompt_run_with_old_weights(engine: str):
    other = tiny_model(dtype=F64, seed=1)
    asked = request(num_completions=2, max_tokens=1)
    expected = complete(sampler_of(engine=engine, model=other), [asked])["r"][1]
    sampler = sampler_of(engine=engine, model=tiny_model(dtype=F64), max_rows=1)
    sampler.submit(asked)
    (first,) = sampler.step()
    sampler.load_weights(1, other.named_parameters())
    (second,) = sampler.step()
    assert (first.first_version, second.first_version) == (0, 1)
    assert second.token_ids.tolist() == expected.token_ids.tolist()
    assert second.logprobs == pytest.approx(expected.logprobs, abs=1e-9)


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_weights_of_another_model_are_refused_with_a_name(engine: str):
    sampler = sampler_of(engine=engine, model=tiny_model(dtype=F64))
    foreign = tiny_model("gpt2", dtype=F64)
    with pytest.raises(ModelError, match=r"weights are of another model: \d+ names differ"):
        sampler.load_weights(1, foreign.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, r"its prompt is empty; give at least one token"),
        (
            {"prompt": [5] * 250, "max_tokens": 7},
            r"250 prompt tokens plus max_tokens 7 exceed the model's context of 256",
        ),
        ({"max_tokens": 0}, r"max_tokens 0 and num_completions 1 must be at least 1"),
        ({"num_completions": 0}, r"max_tokens 10 and num_completions 0 must be at least 1"),
        ({"temperature": -0.5}, r"temperature -0.5 must be 0, which is greedy, or at least 0.0001"),
        ({"temperature": 9e-5}, r"temperature 9e-05 must be 0, which is greedy, or at least"),
        ({"temperature": float("nan")}, r"temperature nan must be 0, which is greedy, or"),
        ({"top_p": 0.0}, r"top_p 0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.2}, r"top_p 1.2 must lie in \(0, 1\]"),
        ({"top_k": -1}, r"top_k -1 must be 0 \(off\) or more"),
        ({"top_logprobs": -2}, r"top_logprobs -2 must be 0 to 101, the vocabulary"),
        ({"top_logprobs": 102}, r"top_logprobs 102 must be 0 to 101, the vocabulary"),
        (
            {"prompt": [5, 101, -1]},
            r"prompt token ids \[101, -1\] are none of the model's, 0 to 100; tokenize with",
        ),
        ({"media": ("picture",)}, r"media are given, and this sampler takes text only"),
        ({"stop_strings": ("x",)}, r"stop strings need a sampler with a tokenizer's decode"),
        ({"stop_strings": ("x", "")}, r"a stop string is empty"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_not_queued(fields, message):
    sampler = sampler_of()
    with pytest.raises(ConfigError, match=rf"request 'r': .*{message}"):
        sampler.submit(request(**fields))
    assert sampler.is_idle


def test_an_id_in_flight_is_refused_until_it_is_done():
    sampler = sampler_of(max_rows=1)
    sampler.submit(request("a", max_tokens=1))
    sampler.submit(request("b", max_tokens=1))
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match=f"request '{name}': its id is already in flight"):
            sampler.submit(request(name))
    sampler.step()
    sampler.submit(request("a", max_tokens=1))


def test_a_prompt_may_fill_the_context_to_the_last_token():
    assert only(sampler_of(), request(prompt=[5] * 250, max_tokens=6)).token_ids.shape == (6,)


@pytest.mark.parametrize("engine", ["llama", "transformers"])
def test_a_bf16_model_reports_fp32_logprobs(engine: str):
    model = tiny_model(dtype=torch.bfloat16)
    completion = only(sampler_of(engine=engine, model=model), request())
    assert completion.logprobs.dtype == np.float32
    assert np.isfinite(completion.logprobs).all()
