"""Gradient checkpointing: a layer keeps its inputs and runs again in the backward pass.

The memory of a pass with gradient falls from all that the layers computed to what went into each of
them, and the time rises by one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gmpo.errors import ModelError

__all__ = ["keep_layers", "recompute_layers", "recomputed"]

_Result = TypeVar("_Result")


def recomputed(run: Callable[..., _Result], *inputs: Any) -> _Result:
    """`run`'s result; what it computes on the way is computed again in the backward pass."""
    # The layers draw no random numbers, so there is no generator state to keep.
    result: _Result = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def recompute_layers(model: PreTrainedModel) -> None:
    """Let the model's own layers run again in the backward pass, in place.

    transformers' switch acts in training mode only, which would also turn dropout on; so the layers
    that it marks as fit for it are wrapped here, once however often it is asked for.

    Raises:
        ModelError: transformers marks no layer of this model.
    """
    layers = _layers(model)
    if not layers:
        raise ModelError(
            f"model type {model.config.model_type!r} has no layer that transformers can run again "
            "in the backward pass; set training.gradient_checkpointing = false and lower "
            "training.max_tokens_per_micro_batch instead"
        )
    for layer in layers:
        if not _is_wrapped(layer):
            layer.forward = partial(_forward, layer.forward)


def keep_layers(model: PreTrainedModel) -> None:
    """Undo `recompute_layers`: layers keep what they compute again."""
    for layer in _layers(model):
        if _is_wrapped(layer):
            (layer.forward,) = layer.forward.args


def _layers(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _is_wrapped(layer: Any) -> bool:
    return isinstance(layer.forward, partial) and layer.forward.func is _forward


def _forward(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    run = partial(forward, **named)
    return recomputed(run, *inputs) if torch.is_grad_enabled() else run(*inputs)
