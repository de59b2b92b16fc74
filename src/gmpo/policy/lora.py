"""Low-rank adapters (LoRA, arXiv 2106.09685): small trained factors beside frozen weights.

An adapted layer computes

    y = x W^T + bias + (alpha / rank) (x A^T) B^T

with W and bias frozen, A drawn at random and B zero, so that training starts at exactly the base
model. The frozen weights get no gradient, and none is computed for them. There is no dropout: the
policy that is scored would differ from the one that sampled.

Dimensions: **R** rank, **I** inputs and **O** outputs of a layer.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gmpo.errors import ModelError

__all__ = [
    "LoraLayer",
    "adapters_of",
    "adapters_off",
    "add_adapters",
    "has_these_adapters",
    "merged_weight",
]


class LoraLayer(nn.Module):
    """A linear layer with an adapter; its own weight and bias keep their names and are frozen.

    Args:
        layer: the layer it takes the place of: `nn.Linear`, or GPT-2's `Conv1D`, whose weight
            lies the other way round.
        rank: R, columns of the adapter's bottleneck.
        alpha: the adapter's output is scaled by alpha / rank.
        generator: A is drawn from it, uniformly within 1 / sqrt(I).
    """

    def __init__(
        self, layer: nn.Linear | Conv1D, *, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.is_transposed = isinstance(layer, Conv1D)
        self.alpha = alpha
        self.scale = alpha / rank
        self.is_on = True
        outputs, inputs = self.weight.shape[:: -1 if self.is_transposed else 1]
        # Drawn on the CPU in fp32, so that device and precision do not change what is drawn.
        drawn = (2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs)
        self.lora_A = nn.Parameter(drawn.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(outputs, rank))

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[0]

    def forward(self, inputs: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The layer's output, with the adapter's added unless it is switched off."""
        output = self._base(inputs)
        if not self.is_on:
            return output
        # Scaled where the tensor is R wide, which costs next to nothing.
        narrow = self.scale * functional.linear(inputs, self.lora_A)
        return output + functional.linear(narrow, self.lora_B)

    def _base(self, inputs: Tensor) -> Tensor:
        if not self.is_transposed:
            return functional.linear(inputs, self.weight, self.bias)
        # As Conv1D does it, bit for bit.
        assert self.bias is not None
        flat = torch.addmm(self.bias, inputs.view(-1, inputs.shape[-1]), self.weight)
        return flat.view(*inputs.shape[:-1], flat.shape[-1])


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Freeze the model and put adapters on its linear layers, in place.

    Args:
        model: whose output head and embeddings stay as they are.
        rank: at least 1.
        alpha: the adapters' outputs are scaled by alpha / rank.
        targets: last parts of the adapted layers' names, e.g. "q_proj" or "self_attn.q_proj"; None
            takes all linear layers of attention and feed-forward.
        seed: of the random factors.

    Raises:
        ModelError: a target names no such layer; the nearest names are offered.
    """
    layers = _targeted_layers(model, targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        adapted = LoraLayer(layer, rank=rank, alpha=alpha, generator=generator)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, adapted)


def adapters_of(model: nn.Module) -> dict[str, LoraLayer]:
    """The model's adapted layers by name; empty for a model without adapters."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def has_these_adapters(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str] | None
) -> bool:
    """Whether the model's adapters are of the form that `add_adapters` would give its base."""
    adapters = adapters_of(model)
    wanted = {
        name
        for name in (*adapters, *_linear_layers(model))
        if targets is None or any(_is_named(name, target) for target in targets)
    }
    return wanted == adapters.keys() and all(
        (layer.rank, layer.alpha) == (rank, alpha) for layer in adapters.values()
    )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its frozen base."""
    layers = adapters_of(model).values()
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


@torch.no_grad()
def merged_weight(
    weight: Float[Tensor, "n m"],
    lora_a: Float[Tensor, "R I"],
    lora_b: Float[Tensor, "O R"],
    *,
    scale: float,
    is_transposed: bool,
) -> Float[Tensor, "n m"]:
    """W + scale B A, in the precision of the factors: a plain layer with it equals the adapted one.

    Args:
        weight: W, [O, I], or [I, O] where `is_transposed`.
        lora_a: A.
        lora_b: B.
        scale: alpha / rank.
        is_transposed: whether the weight lies the other way round, as in GPT-2.
    """
    change = scale * (lora_b @ lora_a)
    return weight.to(change) + (change.T if is_transposed else change)


def _targeted_layers(
    model: PreTrainedModel, targets: Sequence[str] | None
) -> dict[str, nn.Linear | Conv1D]:
    layers = _linear_layers(model)
    if not layers:
        raise ModelError(
            f"model type {model.config.model_type!r} has no linear layer that an adapter fits; "
            "train all its weights: lora.rank = 0"
        )
    if targets is None:
        return layers
    for target in targets:
        if not any(_is_named(name, target) for name in layers):
            raise ModelError(_unknown_target(target, layers))
    return {n: m for n, m in layers.items() if any(_is_named(n, target) for target in targets)}


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Plain ones but the output head."""
    head = model.get_output_embeddings()
    # Exact types: a subclass's weight may be used elsewhere than in its own forward.
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head
    }


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unknown_target(target: str, layers: dict[str, nn.Linear | Conv1D]) -> str:
    names = sorted({name.rpartition(".")[2] for name in layers})
    near = difflib.get_close_matches(target.rpartition(".")[2], names, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"allowed: {names}"
    return (
        f"lora.targets names {target!r}, but no linear layer that can be adapted is called so (the "
        f"output head and the embeddings stay as they are); {hint}"
    )
