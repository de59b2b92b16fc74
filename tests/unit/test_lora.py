"""Adapters: what a layer computes, which layers get one, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.adapters import adapted_policy
from tests.models import FAMILIES, tiny_model
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from gmpo.errors import ModelError
from gmpo.policy.lora import (
    LoraLayer,
    adapters_of,
    adapters_off,
    add_adapters,
    merged_weight,
)

F64 = torch.float64
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GPT2_LAYERS = {"c_attn", "c_proj", "c_fc"}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_layer(kind: type[nn.Module]) -> LoraLayer:
    """W = [[1, 2], [3, 4], [5, 6]], bias = [10, 20, 30], A = [[1, -1]], B = [[2], [0.5], [1]]."""
    layer = nn.Linear(2, 3) if kind is nn.Linear else Conv1D(3, 2)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    adapted = LoraLayer(layer, rank=1, alpha=3.0, generator=random())
    with torch.no_grad():
        layer.weight.copy_(weight if kind is nn.Linear else weight.T)
        layer.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
        adapted.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        adapted.lora_B.copy_(torch.tensor([[2.0], [0.5], [1.0]]))
    return adapted


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_adds_the_scaled_product_of_its_factors(kind: type[nn.Module]):
    # x = [1, 2]: x W^T + bias = [15, 31, 47]; x A^T = -1, times alpha / rank = 3 is -3,
    # times B is [-6, -1.5, -3].
    output = small_layer(kind)(torch.tensor([[[1.0, 2.0]]]))
    assert output.tolist() == [[[9.0, 29.5, 44.0]]]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_switched_off_it_is_the_layer_it_took_the_place_of(kind: type[nn.Module]):
    layer = small_layer(kind)
    layer.is_on = False
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[15.0, 31.0, 47.0]]


def test_a_merged_weight_is_w_plus_scale_times_b_a():
    # B A = [[2, -2], [0.5, -0.5]], times 3 is [[6, -6], [1.5, -1.5]].
    weight, a = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0]])
    b = torch.tensor([[2.0], [0.5]])
    merged = merged_weight(weight, a, b, scale=3.0, is_transposed=False)
    assert merged.tolist() == [[7.0, -4.0], [4.5, 2.5]]
    transposed = merged_weight(weight.T, a, b, scale=3.0, is_transposed=True)
    assert transposed.tolist() == [[7.0, 4.5], [-4.0, 2.5]]


@given(
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    rank=st.integers(1, 8),
    alpha=st.floats(0.1, 64.0),
    seed=st.integers(0, 1000),
    is_transposed=st.booleans(),
)
def test_a_plain_layer_with_the_merged_weight_equals_the_adapted_one(
    inputs: int, outputs: int, rank: int, alpha: float, seed: int, is_transposed: bool
):
    plain = Conv1D(outputs, inputs) if is_transposed else nn.Linear(inputs, outputs)
    plain.double()
    layer = LoraLayer(plain, rank=rank, alpha=alpha, generator=random(seed))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random(seed + 1)))
        x = torch.randn(4, inputs, generator=random(seed + 2), dtype=F64)
        merged = merged_weight(
            layer.weight,
            layer.lora_A,
            layer.lora_B,
            scale=layer.scale,
            is_transposed=is_transposed,
        )
        expected = functional.linear(x, merged.T if is_transposed else merged, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_model_is_exactly_its_base(family: str, dtype: torch.dtype):
    token_ids = torch.tensor([[11, 12, 13, 14, 15]])
    model = tiny_model(family, dtype=dtype)
    with torch.no_grad():
        before = model(token_ids).logits
        add_adapters(model, rank=4, alpha=8.0)
        assert torch.equal(model(token_ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_every_linear_layer_but_the_head_gets_one(family: str):
    model = tiny_model(family, tied=False)
    add_adapters(model, rank=2, alpha=4.0)
    adapted = adapters_of(model)
    expected = GPT2_LAYERS if family == "gpt2" else LLAMA_LAYERS
    assert {name.rpartition(".")[2] for name in adapted} == expected
    # Two layers of each; GPT-2 has a c_proj in attention and one in the feed-forward.
    assert len(adapted) == 2 * (4 if family == "gpt2" else 7)
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_factors_are_trained_and_all_other_names_stay(family: str):
    before = dict(tiny_model(family).named_parameters())
    model = tiny_model(family)
    add_adapters(model, rank=2, alpha=4.0)
    after = dict(model.named_parameters())
    added = {f"{name}.lora_{kind}" for name in adapters_of(model) for kind in "AB"}
    assert after.keys() == before.keys() | added
    assert {name for name, parameter in after.items() if parameter.requires_grad} == added


def test_a_is_drawn_by_the_seed_within_its_bound_and_b_is_zero():
    drawn = {}
    for seed in (0, 0, 1):
        model = tiny_model()
        add_adapters(model, rank=4, alpha=8.0, seed=seed)
        layer = adapters_of(model)["model.layers.1.mlp.down_proj"]
        assert layer.lora_A.shape == (4, 48) and layer.lora_B.shape == (32, 4)
        assert not layer.lora_B.any()
        bound = 1 / math.sqrt(48)
        assert 0.9 * bound < float(layer.lora_A.detach().abs().max()) <= bound
        drawn.setdefault(seed, []).append(layer.lora_A.detach())
    assert torch.equal(*drawn[0])
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_what_is_drawn_does_not_depend_on_the_precision():
    factors = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(dtype=dtype)
        add_adapters(model, rank=4, alpha=8.0)
        factors.append(adapters_of(model)["model.layers.0.mlp.up_proj"].lora_A.detach())
    assert torch.equal(factors[0].bfloat16(), factors[1])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["self_attn.v_proj"], [f"model.layers.{n}.self_attn.v_proj" for n in (0, 1)]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["0.mlp.up_proj", "up_proj"], [f"model.layers.{n}.mlp.up_proj" for n in (0, 1)]),
    ],
)
def test_targets_name_layers_by_the_ends_of_their_names(targets: list[str], expected: list[str]):
    model = tiny_model()
    add_adapters(model, rank=2, alpha=4.0, targets=targets)
    assert list(adapters_of(model)) == expected


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("q_prj", "did you mean 'q_proj' or "),
        ("self_attn.qproj", "did you mean 'q_proj' or "),
        ("proj", "did you mean "),  # the end of a part is no part
        (
            "lm_head",
            "allowed: ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', "
            "'v_proj']",
        ),
        ("embed_tokens", "allowed: ['down_proj', "),
    ],
)
def test_a_target_that_names_no_layer_is_refused_with_the_nearest_names(target: str, hint: str):
    model = tiny_model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ModelError) as caught:
        add_adapters(model, rank=2, alpha=4.0, targets=["v_proj", target])
    assert str(caught.value).startswith(
        f"lora.targets names {target!r}, but no linear layer that can be adapted is called so (the "
        f"output head and the embeddings stay as they are); {hint}"
    )
    # Refused before anything was changed.
    assert [type(module) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_a_linear_layer_is_refused():
    model = tiny_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError) as caught:
        add_adapters(model, rank=2, alpha=4.0)
    assert str(caught.value) == (
        "model type 'llama' has no linear layer that an adapter fits; train all its weights: "
        "lora.rank = 0"
    )


def test_off_and_on_again_also_after_an_error():
    policy = adapted_policy()
    layers = policy.adapters.values()
    with pytest.raises(KeyError), adapters_off(policy.model):
        assert not any(layer.is_on for layer in layers)
        raise KeyError
    assert all(layer.is_on for layer in layers)
