"""Completions scored with their prompt run once, its keys and values shared with gradient.

Dimensions: **P** prompts, **L** prompt tokens, **B** sequences, **T** completion tokens, **N**
scored positions, **M** hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gmpo.batch import MicroBatch
from gmpo.policy.llama import LlamaBody, attend

__all__ = ["scored_hidden_states"]


def scored_hidden_states(body: LlamaBody, batch: MicroBatch) -> Float[Tensor, "N M"]:
    """Final hidden states at the positions that predict each masked completion token.

    The prompt's last position predicts the first completion token, completion token t predicts
    t + 1, so the last one is never run. The order is that of `completion_ids[mask]`. Gradients of a
    prompt's keys and values from all its completions add up in one backward pass.
    """
    prompt_hidden, prefixes = _run_prompts(body, batch)
    last = batch.prompt_lengths - 1
    first_predictor = prompt_hidden[torch.arange(len(last), device=last.device), last]
    hidden = first_predictor[batch.prompt_of_row][:, None]
    if batch.completion_ids.shape[1] > 1:
        hidden = torch.cat((hidden, _run_completions(body, batch, prefixes)), dim=1)
    return body.final_norm(hidden[batch.mask])


def _run_prompts(
    body: LlamaBody, batch: MicroBatch
) -> tuple[Float[Tensor, "P L M"], list[tuple[Tensor, Tensor]]]:
    """Hidden states and each layer's keys and values; right padding is never attended to."""
    hidden = body.embed(batch.prompt_ids)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    rotary = body.rotary(hidden, positions[None])
    causal = (positions[:, None] >= positions[None, :])[None, None]
    prefixes = []
    for layer in body.layers:
        queries, keys, values = body.project(layer, hidden, rotary)
        prefixes.append((keys, values))
        hidden = body.finish(layer, hidden, attend(queries, keys, values, mask=causal))
    return hidden, prefixes


def _run_completions(
    body: LlamaBody, batch: MicroBatch, prefixes: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, "B U M"]:
    """Hidden states of every completion token but the last (U = T - 1)."""
    token_ids = batch.completion_ids[:, :-1]
    hidden = body.embed(token_ids)
    offsets = torch.arange(token_ids.shape[1], device=token_ids.device)
    positions = batch.prompt_lengths[batch.prompt_of_row][:, None] + offsets[None]
    rotary = body.rotary(hidden, positions)
    mask = _completion_mask(batch, offsets)
    for layer, (prompt_keys, prompt_values) in zip(body.layers, prefixes, strict=True):
        queries, keys, values = body.project(layer, hidden, rotary)
        keys = torch.cat((prompt_keys[batch.prompt_of_row], keys), dim=2)
        values = torch.cat((prompt_values[batch.prompt_of_row], values), dim=2)
        hidden = body.finish(layer, hidden, attend(queries, keys, values, mask=mask))
    return hidden


def _completion_mask(batch: MicroBatch, offsets: Int[Tensor, " U"]) -> Bool[Tensor, "B 1 U S"]:
    """What a completion token sees: its whole prompt and the completion up to itself."""
    rows, length = len(batch.row_names), len(offsets)
    prompt_positions = torch.arange(batch.prompt_ids.shape[1], device=offsets.device)
    prompt_length = batch.prompt_lengths[batch.prompt_of_row]
    sees_prompt = (prompt_positions[None] < prompt_length[:, None])[:, None, None]
    sees_completion = (offsets[:, None] >= offsets[None, :])[None, None]
    return torch.cat(
        (
            sees_prompt.expand(rows, 1, length, -1),
            sees_completion.expand(rows, 1, length, length),
        ),
        dim=-1,
    )
