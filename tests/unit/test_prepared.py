"""Linear layers laid out for decoding: the modules' own results, and never those of old weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from tests.models import FAMILIES, tiny_model
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from gmpo.kernels.library import kernels_off
from gmpo.kernels.linear import has_panels
from gmpo.policy.llama import LlamaBody
from gmpo.policy.lora import adapters_of, add_adapters
from gmpo.policy.prefix import extend
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.prefilling import prepared_layer_run
from gmpo.sampler.prepared import gated_projection, order_of, prepare_body, projection
from gmpo.sampler.requests import Completion, SampleRequest, complete

# bf16 keeps 8 bits; a difference of rounding order is a few of their last.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}
every_precision = pytest.mark.parametrize("dtype", list(TOLERANCE))
every_llama = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])


@pytest.fixture(params=["panels", "onednn"])
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """That fp32 takes: the compiled function's, or the one that is taken without a compiler."""
    wanted: str = request.param
    with kernels_off() if wanted == "onednn" else contextlib.nullcontext():
        if order_of(torch.float32, "cpu") != wanted:
            pytest.skip(f"{wanted} is not taken on this machine")
        yield wanted


every_order = pytest.mark.usefixtures("order")


def linear(inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@every_order
@every_precision
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
@pytest.mark.parametrize("rows", [1, 15, 16, 31, 32, 33, 64, 70])
def test_prepared_layers_give_the_modules_outputs(dtype, biases, rows: int):
    torch.manual_seed(rows)
    sizes = zip((96, 32, 48), biases, strict=True)
    modules = [linear(64, size, bias=bias, dtype=dtype) for size, bias in sizes]
    inputs = torch.randn(rows, 64, dtype=dtype)
    for chosen in (modules, modules[:1]):
        tolerance = TOLERANCE[dtype]
        outputs = projection(*chosen)(inputs)
        expected = torch.cat([module(inputs) for module in chosen], dim=-1)
        torch.testing.assert_close(outputs, expected, rtol=tolerance, atol=tolerance)


@every_order
@every_precision
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 33, 70])
def test_the_gated_half_is_no_farther_from_exact_than_the_modules(dtype, bias, rows: int):
    torch.manual_seed(rows)
    gate, up = (linear(64, 96, bias=bias, dtype=dtype) for _ in range(2))
    inputs = torch.randn(rows, 64, dtype=dtype)
    outputs = gated_projection(gate, up)(inputs)
    by_modules = functional.silu(gate(inputs)) * up(inputs)
    gate, up = gate.double(), up.double()  # in place
    exact = functional.silu(gate(inputs.double())) * up(inputs.double())

    def error(values):
        return float((values - exact).abs().mean())

    assert outputs.dtype == dtype
    assert error(outputs) <= 1.05 * error(by_modules.double()) + 1e-7


@every_order
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_rows_are_run_on_reordered_weights_after_some_steps(dtype):
    is_reordered = order_of(dtype, "cpu") is not None
    model = tiny_model(dtype=dtype)
    decoder = LlamaDecoder(LlamaBody(model), max_rows=3)
    (prefill,) = decoder.prefill([[5, 6, 7]], all_logits=False)
    decoder.add_rows(prefill, 3)
    plans = []
    for _ in range(9):
        decoder.advance(torch.tensor([8, 9, 10]))
        plans.append(decoder._prepared is not None)
    assert plans == [False] * 6 + [is_reordered] * 3
    decoder.drop([0, 1, 2])
    assert decoder._prepared is None


def test_what_order_is_taken():
    assert order_of(torch.float64, "cpu") is None
    assert order_of(torch.float32, "cuda") is None
    assert order_of(torch.bfloat16, "cuda") is None
    has_units = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert order_of(torch.bfloat16, "cpu") == ("onednn" if has_units else None)
    if has_panels(torch.empty(0)):
        assert order_of(torch.float32, "cpu") == "panels"
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    with kernels_off():
        assert order_of(torch.float32, "cpu") == ("onednn" if has_both else None)


@every_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_prepared_anew_follow_changed_weights(dtype):
    module = linear(64, 96, bias=False, dtype=dtype)
    inputs = torch.randn(32, 64, dtype=dtype)
    run, before = projection(module), module(inputs)
    same = run(inputs)
    torch.testing.assert_close(same, before, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    with torch.no_grad():
        module.weight.mul_(2)
    again = projection(module)(inputs)
    torch.testing.assert_close(again, 2 * before, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


def requests(num_completions: int) -> list[SampleRequest]:
    return [
        SampleRequest(
            id=name,
            token_ids=prompt,
            num_completions=num_completions,
            max_tokens=length,
            stop_ids=(1,),
            key=(name,),
        )
        for name, prompt, length in (
            ("a", [5, 6, 7, 8, 9], 7),
            ("b", [5, 6, 7, 30], 4),
            ("c", [20], 9),
        )
    ]


def sampler_over(model: PreTrainedModel, *, max_rows: int) -> LocalSampler:
    decoder = LlamaDecoder(LlamaBody(model), max_rows=max_rows)
    return LocalSampler(decoder, context_length=256, max_rows=max_rows)


@torch.no_grad()
def largest_difference(model: PreTrainedModel, asked: SampleRequest, drawn: Completion) -> float:
    """Nats between the sampler's log-probabilities and the module's own forward."""
    token_ids = torch.tensor([[*asked.token_ids, *drawn.token_ids.tolist()]])
    logits = model(token_ids, use_cache=False).logits[0, len(asked.token_ids) - 1 : -1].double()
    logprobs = logits.log_softmax(dim=-1).gather(-1, torch.from_numpy(drawn.token_ids)[:, None])
    return float((logprobs[:, 0] - torch.from_numpy(drawn.logprobs)).abs().max())


def check_against_the_full_forward(
    sampler: LocalSampler, model: PreTrainedModel, *, num_completions: int = 14
) -> None:
    asked = requests(num_completions)
    results = complete(sampler, asked)
    differences = [largest_difference(model, r, c) for r in asked for c in results[r.id]]
    dtype = next(model.parameters()).dtype
    # Logits of the tiny models spread over tens of nats, which bf16 rounds to a quarter of one.
    assert max(differences) < {torch.float64: 2e-5, torch.float32: 1e-3, torch.bfloat16: 1.5}[dtype]
    assert len(differences) == 3 * num_completions


@every_order
@every_llama
@every_precision
def test_decoding_many_rows_follows_the_full_forward(family: str, dtype):
    # 42 completions on 20 rows finish and are refilled at different times.
    model = tiny_model(family, dtype=dtype)
    check_against_the_full_forward(sampler_over(model, max_rows=20), model)


@every_order
@every_llama
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_few_rows_follows_the_full_forward_once_reordered(family: str, dtype: torch.dtype):
    # The longest of the three answers, nine tokens, outlasts the steps without reordered weights.
    model = tiny_model(family, dtype=dtype)
    check_against_the_full_forward(sampler_over(model, max_rows=20), model, num_completions=2)


@every_order
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_that_changed_are_decoded_from(dtype):
    model = tiny_model(dtype=dtype)
    sampler = sampler_over(model, max_rows=20)
    check_against_the_full_forward(sampler, model)
    for version, seed in enumerate((1, 2), start=1):
        with torch.no_grad():
            new = tiny_model(dtype=dtype, seed=seed).parameters()
            for parameter, other in zip(model.parameters(), new, strict=True):
                parameter.copy_(other)
        # The sampler's tensors are the policy's own: publishing them copies nothing.
        sampler.load_weights(version, model.named_parameters())
        check_against_the_full_forward(sampler, model)


@every_order
def test_adapters_are_run_and_not_merged():
    model = tiny_model()
    add_adapters(model, rank=3, alpha=6.0)
    with torch.no_grad():
        for layer in adapters_of(model).values():
            layer.lora_B.normal_(std=0.3)
    check_against_the_full_forward(sampler_over(model, max_rows=20), model)


@every_order
@every_llama
@every_precision
@pytest.mark.parametrize("with_past", [False, True])
@torch.no_grad()
def test_prompts_run_with_reordered_weights_as_with_the_modules(
    family: str, dtype: torch.dtype, with_past: bool
):
    body = LlamaBody(tiny_model(family, dtype=dtype))
    run = prepared_layer_run(body, prepare_body(body))
    beginning = torch.tensor([[5, 6, 7], [8, 9, 10]])
    past = extend(body, beginning, torch.tensor([3, 2]))[1] if with_past else None
    asked = torch.tensor([[11, 12, 13, 14], [20, 21, 0, 0]]), torch.tensor([4, 2])
    expected, expected_own = extend(body, *asked, past)
    hidden, own = extend(body, *asked, past, run=run)
    # The stream of these models grows to about 10.
    for ours, theirs in ((hidden[0], expected[0]), (hidden[1, :2], expected[1, :2])):
        assert (ours - theirs).abs().max() <= 10 * TOLERANCE[dtype]
    for pair, expected_pair in zip(own.layers, expected_own.layers, strict=True):
        for states, others in zip(pair, expected_pair, strict=True):
            assert states.shape == others.shape
            assert (states[0] - others[0]).abs().max() <= 10 * TOLERANCE[dtype]
