"""What running prompts began with is not run again for those that come later."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import tiny_model

from gmpo.policy import prefix
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import Completion, SampleRequest, complete

MODEL = tiny_model(dtype=torch.float64)
SYSTEM = [5, 6, 7, 8, 9, 10, 11, 12]
OTHER = [30, 31, 32, 33, 34, 35]
LONG = SampleRequest(id="long", token_ids=[*SYSTEM, 20], max_tokens=60, key=("k",))


def sampler_of(model: torch.nn.Module = MODEL) -> LocalSampler:
    decoder = LlamaDecoder(LlamaBody(model), max_rows=16)  # type: ignore[arg-type]
    return LocalSampler(decoder, context_length=128, max_rows=16)


def request(name: str, prompt: Sequence[int]) -> SampleRequest:
    return SampleRequest(id=name, token_ids=prompt, max_tokens=5, key=("k", name))


def alone(asked: SampleRequest, model: torch.nn.Module = MODEL) -> list[int]:
    (completion,) = complete(sampler_of(model), [asked])[asked.id]
    return [int(token) for token in completion.token_ids]


def beside_a_long_one(*arrivals: Sequence[SampleRequest]) -> dict[str, list[int]]:
    """Requests that arrive together, one lot after the other, while another one runs."""
    sampler = sampler_of()
    sampler.submit(LONG)
    drawn: dict[str, list[int]] = {}
    for lot in arrivals:
        sampler.step()
        for asked in lot:
            sampler.submit(asked)
        while not {asked.id for asked in lot} <= drawn.keys():
            for event in sampler.step():
                if isinstance(event, Completion):
                    drawn[event.request_id] = [int(token) for token in event.token_ids]
    assert "long" not in drawn
    return drawn


@pytest.fixture
def tokens_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of every pass over prompts, padding included."""
    run: list[int] = []

    def counted(body, token_ids, *rest, **named):  # type: ignore[no-untyped-def]
        run.append(token_ids.numel())
        return original(body, token_ids, *rest, **named)

    original = prefix.extend
    monkeypatch.setattr(prefix, "extend", counted)
    yield run


def test_a_prompt_that_begins_as_a_running_one_runs_its_own_tokens_alone(tokens_run: list[int]):
    lots = (
        [request("one", [*SYSTEM, 21, 22])],
        [request("two", [*SYSTEM, 23]), request("three", [*SYSTEM, 24, 25, 26])],
    )
    drawn = beside_a_long_one(*lots)
    assert tokens_run == [9, 2, 2 * 3]  # the long one's whole prompt; then what is new
    assert drawn == {asked.id: alone(asked) for lot in lots for asked in lot}


def test_prompts_that_have_more_in_common_with_each_other_run_that_once(tokens_run: list[int]):
    longer = [*SYSTEM, 40, 41, 42]
    lots = (
        [request("one", [*longer, 1]), request("two", [*longer, 2])],
        [request("three", [*longer, 3])],
    )
    drawn = beside_a_long_one(*lots)
    assert tokens_run == [9, 11, 2, 1]
    assert drawn == {asked.id: alone(asked) for lot in lots for asked in lot}


def test_another_beginning_takes_the_place_of_one_that_spares_little(tokens_run: list[int]):
    lots = (
        [request("one", [*OTHER, 21])],
        [request("two", [*OTHER, 22])],
        [request("three", [*SYSTEM, 23])],
    )
    drawn = beside_a_long_one(*lots)
    assert tokens_run == [9, 7, 1, 9]
    assert drawn == {asked.id: alone(asked) for lot in lots for asked in lot}


def test_the_same_prompt_again_runs_its_last_token(tokens_run: list[int]):
    asked = request("again", LONG.token_ids)
    assert beside_a_long_one([asked]) == {"again": alone(asked)}
    assert tokens_run[:2] == [9, 1]


def test_what_old_weights_left_is_forgotten_with_the_last_row():
    model = copy.deepcopy(MODEL)
    sampler = sampler_of(model)
    first, later = request("first", [*SYSTEM, 20]), request("later", [*SYSTEM, 21])
    complete(sampler, [first])
    with torch.no_grad():  # as an optimizer does: nobody tells the sampler
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    before = alone(later)
    (completion,) = complete(sampler, [later])["later"]
    drawn = [int(token) for token in completion.token_ids]
    assert drawn == alone(later, model) != before


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([[], SYSTEM[:3], SYSTEM, [*SYSTEM, *OTHER], OTHER]),
                st.lists(st.integers(2, 60), min_size=1, max_size=4),
            ),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_arrives_draws_what_it_draws_alone(prompts):
    lots = [
        [request(f"{lot}-{n}", [*begins, *ends]) for n, (begins, ends) in enumerate(of_lot)]
        for lot, of_lot in enumerate(prompts)
    ]
    drawn = beside_a_long_one(*lots)
    assert drawn == {asked.id: alone(asked) for lot in lots for asked in lot}
