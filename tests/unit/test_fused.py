"""Backward passes written by hand against autograd over the operations they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.models import tiny_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from gmpo.policy import fused
from gmpo.policy.lora import adapters_of, adapters_off, add_adapters

F64 = torch.float64
TOLERANCES = {F64: 1e-12, torch.float32: 1e-5}
precisions = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def random(*sizes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=F64).to(dtype).requires_grad_()


def layer_of(family: str = "llama", *, dtype: torch.dtype = F64) -> Any:
    return tiny_model(family, dtype=dtype).model.layers[0]


def adapted_layer(
    family: str = "llama", *, targets: Sequence[str] | None = None, dtype: torch.dtype = F64
) -> Any:
    """Frozen, with adapters that are scaled by 1.5 and nowhere 0."""
    model = tiny_model(family, dtype=dtype)
    add_adapters(model, rank=2, alpha=3.0, targets=targets)
    for number, adapter in enumerate(adapters_of(model).values()):
        adapter.lora_B.data.copy_(random(*adapter.lora_B.shape, dtype=dtype, seed=number))
    return model.model.layers[0]


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def obvious_norm(hidden: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def obvious_feed_forward(hidden: Tensor, attended: Tensor, layer: Any) -> Tensor:
    stream = hidden + layer.self_attn.o_proj(attended)
    normed = obvious_norm(stream, layer.post_attention_layernorm)
    mlp = layer.mlp
    return stream + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def assert_same(
    actual: Sequence[Tensor], expected: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Results and the gradients of a sum in which every number of them has another weight."""
    gradients = []
    for results in (actual, expected):
        total = sum((torch.sin(torch.arange(r.numel()) + 1.0) * r.flatten()).sum() for r in results)
        gradients.append(torch.autograd.grad(total, inputs))
    tolerance = TOLERANCES[inputs[0].dtype]
    for result, other in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        scale = other.detach().abs().max().item()
        assert scale > 0, "nothing to compare"
        torch.testing.assert_close(result, other, rtol=0, atol=tolerance * max(1.0, scale))


@precisions
@pytest.mark.parametrize("sizes", [(7, 32), (5, 4, 32)], ids=["tokens", "heads"])
def test_the_norm(sizes: tuple[int, ...], dtype: torch.dtype):
    norm = layer_of(dtype=dtype).input_layernorm
    hidden = random(*sizes, dtype=dtype)
    normed = fused.rms_norm(hidden, norm.weight, eps=norm.variance_epsilon)
    assert_same([normed], [obvious_norm(hidden, norm)], [hidden, norm.weight])


@precisions
@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["without bias", "with bias"])
def test_projections_of_normed_tokens(family: str, dtype: torch.dtype):
    layer = layer_of(family, dtype=dtype)
    norm, attention = layer.input_layernorm, layer.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    hidden = random(7, 32, dtype=dtype)
    weights = [norm.weight, *(p for linear in linears for p in linear.parameters())]
    assert len(weights) == (7 if family == "qwen2" else 4)
    normed = obvious_norm(hidden, norm)
    assert_same(
        fused.project(hidden, norm, linears),
        [hidden * 1.0, *(linear(normed) for linear in linears)],
        [hidden, *weights],
    )


SOME_LAYERS = pytest.mark.parametrize(
    ("targets", "factors"), [(None, 14), (["k_proj", "up_proj"], 4), (["v_proj", "down_proj"], 4)]
)


@precisions
@SOME_LAYERS
def test_projections_through_adapters(targets: list[str] | None, factors: int, dtype: torch.dtype):
    layer = adapted_layer("qwen2", targets=targets, dtype=dtype)  # with biases, which are frozen
    attention = layer.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    hidden = random(7, 32, dtype=dtype)
    assert len(trained(layer)) == factors
    normed = obvious_norm(hidden, layer.input_layernorm)
    assert_same(
        fused.project(hidden, layer.input_layernorm, linears),
        [hidden * 1.0, *(linear(normed) for linear in linears)],
        [hidden, *trained(*linears)],
    )


@precisions
@SOME_LAYERS
def test_the_second_half_of_a_layer_with_adapters(
    targets: list[str] | None, factors: int, dtype: torch.dtype
):
    layer = adapted_layer(targets=targets, dtype=dtype)
    hidden, attended = (random(7, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    assert len(trained(layer)) == factors
    assert_same(
        [fused.feed_forward(hidden, attended, layer)],
        [obvious_feed_forward(hidden, attended, layer)],
        [hidden, attended, *trained(layer.self_attn.o_proj, layer.mlp)],
    )


def test_adapters_that_are_switched_off_do_nothing():
    layer = adapted_layer()
    hidden, attended = (random(7, 32, dtype=F64, seed=seed) for seed in (1, 2))
    linears = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    moved = fused.feed_forward(hidden, attended, layer)
    with adapters_off(layer):
        base = fused.feed_forward(hidden, attended, layer)
        _, *projected = fused.project(hidden, layer.input_layernorm, linears)
        torch.testing.assert_close(base, obvious_feed_forward(hidden, attended, layer))
    assert (moved - base).abs().max() > 0.01
    normed = obvious_norm(hidden, layer.input_layernorm)
    for result, linear in zip(projected, linears, strict=True):
        torch.testing.assert_close(result, functional.linear(normed, linear.weight))


def test_a_frozen_first_layer_forms_no_gradient_of_its_input():
    layer = adapted_layer()
    part = layer.self_attn
    flops = []
    for hidden in (random(7, 32, dtype=F64), random(7, 32, dtype=F64).detach()):
        linears = (part.q_proj, part.k_proj, part.v_proj)
        _, *projected = fused.project(hidden, layer.input_layernorm, linears)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward([each.sum() for each in projected])
        flops.append(counter.get_total_flops())
    # of all three adapters x A^T again, dB, g B and dA; of the frozen weights nothing
    outputs, inputs, rank = 32 + 16 + 16, 3 * 32, 2
    assert flops[1] == 2 * 7 * 2 * rank * (inputs + outputs)
    # g W of queries besides; the counter leaves out what is added in place
    assert flops[0] - flops[1] == 2 * 7 * 32 * 32


@precisions
def test_the_second_half_of_a_layer(dtype: torch.dtype):
    layer = layer_of(dtype=dtype)
    hidden, attended = (random(7, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    weights = [layer.post_attention_layernorm.weight, layer.self_attn.o_proj.weight]
    weights += [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight]
    assert_same(
        [fused.feed_forward(hidden, attended, layer)],
        [obvious_feed_forward(hidden, attended, layer)],
        [hidden, attended, *weights],
    )


def test_bf16_weights_leave_the_stream_as_exact_as_fp32():
    layer = layer_of(dtype=torch.bfloat16)
    large = random(7, 32, dtype=torch.float32).detach() * 1000  # bf16 knows it to 4 at best
    stream = large.requires_grad_()
    attended = random(7, 32, dtype=torch.bfloat16, seed=2)
    result = fused.feed_forward(stream, attended, layer)
    assert result.dtype == torch.float32
    exact = layer_of(dtype=F64)
    exact.load_state_dict(layer.state_dict())
    expected = obvious_feed_forward(stream.to(F64), attended.to(F64), exact)
    assert (result - expected).abs().max() < 0.05
    (gradient,) = torch.autograd.grad(result.sum(), stream)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=0, atol=0.01)


@precisions
def test_rotation(dtype: torch.dtype):
    states = random(7, 4, 8, dtype=dtype)
    angles = random(7, 1, 4, dtype=dtype, seed=1).detach().repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = states.chunk(2, dim=-1)
    expected = states * cos + torch.cat((-second, first), dim=-1) * sin
    assert_same([fused.rotate(states, cos, sin)], [expected], [states])


def test_rows_are_gathered_and_padding_has_no_gradient():
    tokens = random(5, 3, dtype=F64)
    padded = torch.tensor([[0, 1, 2], [3, 4, 4]])  # rows of 3 and 2 tokens
    real = torch.tensor([0, 1, 2, 3, 4])
    rows = fused.gathered_rows(tokens, padded, real)
    torch.testing.assert_close(rows, tokens[padded], rtol=0, atol=0)
    weights = torch.arange(18, dtype=F64).view(2, 3, 3) + 1
    (gradient,) = torch.autograd.grad((weights * rows).sum(), tokens)
    torch.testing.assert_close(gradient, weights.flatten(0, 1)[:5], rtol=0, atol=0)


def test_rows_of_one_length_are_not_copied():
    tokens = random(6, 3, dtype=F64)
    rows = fused.gathered_rows(tokens, torch.arange(6).view(2, 3), torch.arange(6))
    assert rows.data_ptr() == tokens.data_ptr()


def kept_numbers(results: Sequence[Tensor], known: Sequence[Tensor]) -> int:
    """Of what a function keeps for its backward pass, without weights and inputs."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}
    for result in results:
        for tensor in result.grad_fn.saved_tensors:  # type: ignore[union-attr]
            if tensor is not None and tensor.untyped_storage().data_ptr() not in seen:
                saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
    return sum(saved.values())


@pytest.mark.parametrize("make", [layer_of, adapted_layer])
def test_of_a_layers_second_half_the_stream_and_both_feed_forward_halves_are_kept(
    make: Callable[[], Any],
):
    layer = make()
    hidden, attended = (random(7, 32, dtype=F64, seed=seed) for seed in (1, 2))
    result = fused.feed_forward(hidden, attended, layer)
    known = [hidden, attended, *layer.parameters()]
    # a stream of 32, two halves of 48 and a statistic, of 7 tokens
    assert kept_numbers([result], known) == 7 * (32 + 2 * 48 + 1)


def test_a_weight_that_is_frozen_by_itself_gets_no_gradient():
    layer = layer_of()
    layer.mlp.down_proj.requires_grad_(False)
    layer.post_attention_layernorm.requires_grad_(False)
    hidden, attended = (random(7, 32, dtype=F64, seed=seed) for seed in (1, 2))
    assert fused.is_covered(layer)
    second_half = (layer.self_attn.o_proj, layer.mlp)
    assert len(trained(*second_half)) == 3
    assert_same(
        [fused.feed_forward(hidden, attended, layer)],
        [obvious_feed_forward(hidden, attended, layer)],
        [hidden, attended, *trained(*second_half)],
    )


def test_biases_of_the_feed_forward_part_and_unknown_layers_are_left_to_autograd():
    for layer in (layer_of("llama"), layer_of("qwen2"), adapted_layer(targets=["q_proj"])):
        assert fused.is_covered(layer)
    biased, unknown = layer_of(), layer_of()
    biased.mlp.up_proj.bias = nn.Parameter(torch.zeros(48, dtype=F64))
    assert not fused.is_covered(biased)

    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    unknown.self_attn.v_proj.__class__ = Doubled
    assert not fused.is_covered(unknown)
