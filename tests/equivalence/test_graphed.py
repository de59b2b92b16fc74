"""Steps over fixed buffers, captured and repeated, draw what steps taken anew draw.

A trace stands for a CUDA graph: it has run the step's Python once and repeats its operations on the
buffers and weights that it was given, so that a number read on the host would stay what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.elsewhere import ELSEWHERE, elsewhere, move_there
from tests.models import FAMILIES, tiny_model
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from gmpo.kernels.library import kernels_off
from gmpo.kernels.triton_norm import has_triton
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.cache import FixedRows
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.graphed import Capture, Step, capture_for
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import Completion, SampleRequest, complete

F64 = torch.float64
LLAMAS = [name for name in FAMILIES if name != "gpt2"]


class Tracing:
    """A capture by trace; the shapes that it was asked for."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, int]] = []

    def __call__(self, step: Step, rows: FixedRows) -> Callable[[], Tensor]:
        self.shapes.append((rows.table.shape[1], rows.prompt_positions, rows.own_positions))

        def run(table: Tensor, prompts: Tensor, own: Tensor) -> Tensor:
            return step(replace(rows, table=table, prompts=prompts, own=own))

        buffers = rows.table, rows.prompts, rows.own
        with kernels_off():  # a trace does not see what compiled functions do
            traced = make_fx(run)(*buffers)
        return lambda: traced(*buffers)


def decoder_of(
    model: PreTrainedModel, capture: Capture | None, *, max_rows: int = 7
) -> LlamaDecoder:
    return LlamaDecoder(LlamaBody(model), max_rows=max_rows, capture=capture)


def requests() -> list[SampleRequest]:
    """They join, end at other times, free rows for those that wait, and outgrow both parts."""
    return [
        SampleRequest(
            id=str(number),
            token_ids=[5 + number] * (1 + 12 * number),
            num_completions=3 if number else 1,
            max_tokens=76 - 17 * number,
            stop_ids=(11,) if number else (),
            key=(number,),
        )
        for number in range(4)
    ]


def drawn(model: PreTrainedModel, capture: Capture | None) -> list[Completion]:
    """Completions of the requests, of shorter ones, and of both with other weights."""
    sampler = LocalSampler(decoder_of(model, capture), context_length=256, max_rows=7)
    first = complete(sampler, requests())
    with torch.no_grad():
        sampler.load_weights(1, ((n, 1.01 * p.detach()) for n, p in model.named_parameters()))
    second = complete(sampler, requests())
    return [one for results in (first, second) for ones in results.values() for one in ones]


@pytest.mark.parametrize("family", LLAMAS)
def test_repeated_steps_draw_what_new_ones_draw_through_refills_and_new_weights(family: str):
    expected = drawn(tiny_model(family, dtype=F64), None)
    tracing = Tracing()
    for one, other in zip(drawn(tiny_model(family, dtype=F64), tracing), expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-12)
    rows, prompt_positions, own_positions = map(set, zip(*tracing.shapes, strict=True))
    assert rows == {1, 2, 4, 8}
    assert prompt_positions == {32, 64}
    assert own_positions == {32, 64, 128}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_a_new_step_to_rounding(dtype: torch.dtype):
    model = tiny_model(dtype=dtype)
    decoders = [decoder_of(model, capture) for capture in (None, Tracing())]
    for decoder in decoders:
        prefills = decoder.prefill([[5, 6, 7], [8, 9]], all_logits=False)
        decoder.add_rows(prefills[0], 2)
        decoder.add_rows(prefills[1], 1)
    for token in range(20, 26):
        one, other = (d.advance(torch.tensor([token, token + 1, token + 2])) for d in decoders)
        assert one.dtype == other.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 0.25
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def steps_of_one_row(decoder: LlamaDecoder, count: int) -> list[Tensor]:
    (prefill,) = decoder.prefill([[5, 6, 7]], all_logits=False)
    decoder.add_rows(prefill, 1)
    logits = [decoder.advance(torch.tensor([20 + number])).clone() for number in range(count)]
    decoder.drop([0])
    return logits


def test_a_shape_is_captured_once_and_anew_only_where_a_weight_lies_elsewhere():
    model, tracing = tiny_model(), Tracing()
    decoder = decoder_of(model, tracing)
    steps_of_one_row(decoder, 4)
    assert tracing.shapes == [(1, 32, 32)]
    decoder.load_weights((n, 2 * p.detach()) for n, p in model.named_parameters())
    steps_of_one_row(decoder, 4)
    assert len(tracing.shapes) == 1
    norm = model.model.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(3 * norm.weight.detach())
    moved = steps_of_one_row(decoder, 4)
    assert len(tracing.shapes) == 2
    torch.testing.assert_close(moved, steps_of_one_row(decoder_of(model, None), 4))


def test_the_shapes_used_last_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gmpo.sampler.graphed._MOST_SHAPES", 1)
    tracing = Tracing()
    decoder = decoder_of(tiny_model(), tracing)
    (prefill,) = decoder.prefill([[5, 6, 7]], all_logits=False)
    for rows in (1, 2, 1):
        decoder.add_rows(prefill, rows)
        for _ in range(3):
            decoder.advance(torch.tensor([20] * rows))
        decoder.drop(list(range(rows)))
    assert [shape[0] for shape in tracing.shapes] == [1, 2, 1]


def test_where_nothing_can_be_captured_one_warning_says_so_and_steps_are_taken_anew():
    asked: list[Step] = []

    def refuse(step: Step, rows: FixedRows) -> Callable[[], Tensor]:
        asked.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(RuntimeWarning, match="take longer without: operation not permitted") as told:
        refused = drawn(tiny_model(dtype=F64), refuse)
    assert len(told) == len(asked) == 1
    expected = drawn(tiny_model(dtype=F64), None)
    assert [one.token_ids.tolist() for one in refused] == [
        one.token_ids.tolist() for one in expected
    ]


class _Waits(TorchDispatchMode):
    """Counts numbers read from the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_read = func is torch.ops.aten._local_scalar_dense.default
        is_copied = func is torch.ops.aten._to_copy.default and kwargs is not None
        leaves = is_copied and torch.device(kwargs.get("device") or ELSEWHERE) != ELSEWHERE
        self.count += (is_read or leaves) and args[0].device == ELSEWHERE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", LLAMAS)
def test_a_step_reads_nothing_from_the_device(family: str):
    # Capturing fails where the host waits for a number.
    model = tiny_model(family)
    move_there(model)
    waits = []

    def watched(step: Step, rows: FixedRows) -> Callable[[], Tensor]:
        with _Waits() as mode:
            step(rows)
        waits.append(mode.count)
        return lambda: step(rows)

    with elsewhere():
        sampler = LocalSampler(decoder_of(model, watched), context_length=256, max_rows=7)
        complete(sampler, requests())
    assert waits and not any(waits)


def test_only_cuda_captures():
    assert capture_for(torch.device("cpu")) is None
    assert capture_for(torch.device("mps")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("uses_triton", [True, False])
def test_cuda_graphs_draw_what_the_cpu_draws(
    family: str, uses_triton: bool, monkeypatch: pytest.MonkeyPatch
):
    if uses_triton:
        assert has_triton()
    else:
        for module in ("triton_norm", "triton_decoding"):
            monkeypatch.setattr(f"gmpo.kernels.{module}.has_triton", lambda: False)
    expected = drawn(tiny_model(family), None)
    model = tiny_model(family).cuda()
    captured = drawn(model, capture_for(model.device))
    for one, other in zip(captured, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
