"""A decoding step's compiled functions: torch's own results, row by row, whatever runs beside."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import FAMILIES, tiny_model
from torch import Tensor

from gmpo.kernels.calls import kernel
from gmpo.kernels.decoding import AttentionStep, _Step, add_norm, attends, attention_for
from gmpo.kernels.library import kernels_off, loaded
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import SampleRequest, complete

pytestmark = pytest.mark.skipif(loaded() is None, reason="there are no compiled functions")
PRECISIONS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
every_precision = pytest.mark.parametrize("dtype", list(PRECISIONS))
LAYERS, CAPACITY = 2, 40


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_step(
    rows: list[tuple[int, int]], *, prompts: list[int], dim: int, key_heads: int, per_key: int
) -> AttentionStep:
    """Rows as (slot, own length); room that nobody has written is NaN, so that reading it shows."""
    slots, own_lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
    of_prompts = torch.full((LAYERS, 2, len(prompts), key_heads, CAPACITY, dim), torch.nan)
    of_rows = torch.full((LAYERS, 2, len(rows) + 1, key_heads, CAPACITY, dim), torch.nan)
    for part, lengths in ((of_prompts, prompts), (of_rows, own_lengths.tolist())):
        for place, length in enumerate(lengths):
            part[:, :, place, :, :length] = torch.randn(LAYERS, 2, key_heads, length, dim)
    angles = torch.randn(len(rows), dim)
    return AttentionStep(
        prompts=of_prompts,
        own=of_rows,
        slots=slots,
        prompt_lengths=torch.tensor(prompts)[slots],
        own_lengths=own_lengths,
        cos=angles.cos(),
        sin=angles.sin(),
        num_heads=key_heads * per_key,
    )


def projected_for(step: AttentionStep, dtype: torch.dtype) -> Tensor:
    heads = step.num_heads + 2 * step.own.shape[3]
    return torch.randn(len(step.slots), heads * step.own.shape[-1]).to(dtype)


def turned(head: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = head.chunk(2)
    return head * cos + torch.cat((second, first)) * sin


def one_by_one(step: AttentionStep, layer: int, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The obvious way: each row and head alone, in fp64; and the rows' own part after it."""
    own, prompts = step.own[layer].double().clone(), step.prompts[layer].double()
    dim, key_heads = own.shape[-1], own.shape[2]
    attended = torch.zeros(len(step.slots), step.num_heads, dim, dtype=torch.float64)
    for row, flat in enumerate(projected.double()):
        heads = flat.view(-1, dim)
        cos, sin = step.cos[row].double(), step.sin[row].double()
        slot, before = int(step.slots[row]), int(step.prompt_lengths[row])
        place = int(step.own_lengths[row])
        for key_head in range(key_heads):
            own[0, row, key_head, place] = turned(heads[step.num_heads + key_head], cos, sin)
            own[1, row, key_head, place] = heads[step.num_heads + key_heads + key_head]
        for head in range(step.num_heads):
            key_head = head // (step.num_heads // key_heads)
            keys, values = (
                torch.cat((p[slot, key_head, :before], o[row, key_head, : place + 1]))
                for p, o in zip(prompts, own, strict=True)
            )
            scores = keys @ turned(heads[head], cos, sin) / dim**0.5
            attended[row, head] = scores.softmax(dim=0) @ values
    return attended.flatten(1), own


def check(step: AttentionStep, dtype: torch.dtype) -> None:
    attend = attention_for(step, dtype=dtype)
    for layer in range(LAYERS):
        projected = projected_for(step, dtype)
        other = step.own[1 - layer].clone()
        expected, own = one_by_one(step, layer, projected)
        attended = attend(layer, projected)
        assert attended.dtype == dtype
        tolerance = PRECISIONS[dtype]
        torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=5 * tolerance)
        close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(step.own[layer].double(), own, **close)
        torch.testing.assert_close(step.own[1 - layer], other, rtol=0, atol=0, equal_nan=True)


def test_by_hand():
    # One key head of 2 numbers, not turned (cos 1, sin 0). The query (sqrt(2) ln 3, 0) scores the
    # prompt's key (1, 0) with ln 3 and the new key (0, 1) with 0: weights 3/4 and 1/4.
    step = AttentionStep(
        prompts=torch.tensor([[1.0, 0.0], [8.0, 4.0]]).view(1, 2, 1, 1, 1, 2),
        own=torch.zeros(1, 2, 1, 1, 1, 2),
        slots=torch.tensor([0]),
        prompt_lengths=torch.tensor([1]),
        own_lengths=torch.tensor([0]),
        cos=torch.ones(1, 2),
        sin=torch.zeros(1, 2),
        num_heads=1,
    )
    query, key, value = [2**0.5 * torch.tensor(3.0).log().item(), 0.0], [0.0, 1.0], [0.0, 12.0]
    attend = attention_for(step, dtype=torch.float32)
    attended = attend(0, torch.tensor([query + key + value]))
    torch.testing.assert_close(attended, torch.tensor([[6.0, 6.0]]))
    assert step.own.flatten().tolist() == key + value


@every_precision
@pytest.mark.parametrize("dim", [2, 16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("per_key", [1, 2, 3, 4, 7])
def test_rows_attend_as_each_head_does_alone(dtype, dim: int, per_key: int):
    torch.manual_seed(dim + per_key)
    rows = [(1, 0), (0, 5), (1, 17), (2, 0), (0, 39)]
    check(random_step(rows, prompts=[3, 33, 1], dim=dim, key_heads=2, per_key=per_key), dtype)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_attend_as_each_head_does_alone_in_any_shape(data: st.DataObject):
    prompts = data.draw(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=4))
    slot, own = st.integers(0, len(prompts) - 1), st.integers(0, CAPACITY - 1)
    rows = data.draw(st.lists(st.tuples(slot, own), min_size=1, max_size=6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    step = random_step(
        rows,
        prompts=prompts,
        dim=2 * data.draw(st.integers(1, 40)),
        key_heads=data.draw(st.integers(1, 3)),
        per_key=data.draw(st.integers(1, 6)),
    )
    check(step, data.draw(st.sampled_from(list(PRECISIONS))))


@every_precision
def test_a_row_comes_out_the_same_bit_for_bit_whatever_runs_beside_it(dtype):
    torch.manual_seed(0)
    rows = [(slot % 3, 3 * slot % 37) for slot in range(48)]
    step = random_step(rows, prompts=[30, 40, 7], dim=64, key_heads=3, per_key=3)
    projected = projected_for(step, dtype)
    torch.set_num_threads(2)
    together = attention_for(step, dtype=dtype)(1, projected)
    torch.set_num_threads(1)
    assert torch.equal(attention_for(step, dtype=dtype)(1, projected), together)
    for row in (0, 17, 47):
        alone = replace(
            step,
            own=step.own[:, :, row : row + 1].contiguous(),
            **{
                name: getattr(step, name)[row : row + 1]
                for name in ("slots", "prompt_lengths", "own_lengths", "cos", "sin")
            },
        )
        attended = attention_for(alone, dtype=dtype)(1, projected[row : row + 1])
        assert torch.equal(attended[0], together[row])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_spoils_the_rows_that_see_it_and_no_other(part: int, value: float):
    torch.manual_seed(0)
    rows = [(0, 4), (1, 4), (0, 0)]
    step = random_step(rows, prompts=[20, 20], dim=16, key_heads=1, per_key=2)
    step.prompts[0, part, 1, 0, 7] = value
    projected = projected_for(step, torch.float32)
    expected, _ = one_by_one(step, 0, projected)
    attended = attention_for(step, dtype=torch.float32)(0, projected)
    assert attended[[0, 2]].isfinite().all()
    assert torch.equal(attended.isnan(), expected.isnan())
    assert torch.equal(attended.isinf(), expected.isinf())
    assert not attended[1].isfinite().all()


def test_what_the_compiled_function_covers():
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert attends(64, dtype=torch.bfloat16, like=single)
    assert attends(256, dtype=torch.float32, like=single)
    assert not attends(258, dtype=torch.float32, like=single)
    assert not attends(15, dtype=torch.float32, like=single)
    assert not attends(64, dtype=torch.float16, like=single)
    assert not attends(64, dtype=torch.float64, like=double)
    assert not attends(64, dtype=torch.float32, like=single.to("meta"))
    with kernels_off():
        assert not attends(64, dtype=torch.float32, like=single)


@every_precision
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("size", [7, 32, 576])
@pytest.mark.parametrize("adds", [False, True])
def test_adding_and_norming_is_torchs(dtype, rows: int, size: int, adds: bool):
    torch.manual_seed(size)
    stream, weight = torch.randn(rows, size) * 3, torch.randn(size).to(dtype)
    added = torch.randn(rows, size).to(dtype) if adds else None
    by_torch = stream.clone()
    with kernels_off():
        expected = add_norm(by_torch, added, weight, eps=1e-5)
    normed = add_norm(stream, added, weight, eps=1e-5)
    assert torch.equal(stream, by_torch)
    # A sum taken in another order may round the other way before the weight.
    tolerance = {"rtol": 1e-2, "atol": 0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(normed, expected, **tolerance)
    if dtype == torch.bfloat16:
        assert float((normed != expected).float().mean()) < 0.02


def test_a_stream_of_another_precision_or_layout_is_normed_by_torch():
    weight = torch.ones(4)
    rows = torch.randn(8, 4)
    expected = torch.nn.functional.rms_norm(rows, (4,), eps=1e-6)
    for stream in (rows.double(), rows.t().contiguous().t()):
        normed = add_norm(stream, None, weight, eps=1e-6)
        torch.testing.assert_close(normed, expected)


def test_the_step_has_the_sizes_that_c_reads():
    # Six addresses and nine numbers, as in decoding.h.
    assert ctypes.sizeof(_Step) == 8 * 15
    assert kernel("attend_step", "ppppp", torch.zeros(0)) is not None


def drawn(family: str, dtype: torch.dtype, *, max_rows: int) -> dict[str, list[list[int]]]:
    """Tokens of requests that join, end at other times and free rows for those that wait."""
    model = tiny_model(family, dtype=dtype)
    decoder = LlamaDecoder(LlamaBody(model), max_rows=max_rows)
    sampler = LocalSampler(decoder, context_length=256, max_rows=max_rows)
    requests = [
        SampleRequest(
            id=str(number),
            token_ids=[5 + number] * (1 + 7 * number),
            num_completions=3,
            max_tokens=40 - 9 * number,
            stop_ids=(11,),
            key=(number,),
        )
        for number in range(4)
    ]
    first = complete(sampler, requests)
    with torch.no_grad():
        sampler.load_weights(1, ((n, 1.01 * p.detach()) for n, p in model.named_parameters()))
    second = complete(sampler, requests)
    return {
        f"{swap} {name}": [completion.token_ids.tolist() for completion in completions]
        for swap, results in (("before", first), ("after", second))
        for name, completions in results.items()
    }


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_the_same_tokens_are_drawn_as_by_torch_through_refills_and_new_weights(family: str):
    expected_alone = drawn(family, torch.float32, max_rows=1)
    with kernels_off():
        expected = drawn(family, torch.float32, max_rows=7)
    assert drawn(family, torch.float32, max_rows=7) == expected == expected_alone
