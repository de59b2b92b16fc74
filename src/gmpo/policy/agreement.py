"""Start-up checks: does each fast forward compute the logits of the model's own one?

A fast path is used only after it was compared with the module on a few fixed tokens. Mistakes in
layers, positions, masks or the order of weights show at most positions in most logits, so a few
positions tell.

Dimensions: **B** sequences, **T** tokens, **N** positions, **V** vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gmpo.batch import MicroBatch
from gmpo.policy.head import widened
from gmpo.policy.llama import LlamaBody
from gmpo.policy.packed import scored_hidden_states
from gmpo.policy.prefix import extend

__all__ = [
    "LARGEST_LOGIT_DIFFERENCE",
    "LARGEST_OVER_POSITIONS",
    "check_tokens",
    "extended_difference",
    "logit_differences",
    "over_positions",
    "own_logits",
    "scored_difference",
    "why_not_alike",
]

LARGEST_LOGIT_DIFFERENCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 0.25}
"""What is allowed at the farthest position, as a fraction of the logits' spread.

In bf16 the model's own stream is rounded after every layer, which the fast path's is not, and more
so after training. `test_smollm2s_exchanged_layers_are_told_from_rounding` holds both ends for the
default model: what rounding makes, and what two neighbouring layers in each other's place make."""

LARGEST_OVER_POSITIONS = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 0.15}
"""What is allowed over all positions, likewise."""

_PROMPT_TOKENS = 12
_COMPLETION_TOKENS = 6


def check_tokens(model: PreTrainedModel, *, rows: int, length: int) -> Int[Tensor, "B T"]:
    """Fixed tokens, spread over the vocabulary, other ones in each row."""
    numbers = torch.arange(1, 1 + rows * length, device=model.device).view(rows, length)
    known: int = model.config.vocab_size
    return numbers * 7919 % known


@torch.no_grad()
def own_logits(model: PreTrainedModel, token_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """The module's own logits, in fp64 on the CPU."""
    logits: Tensor = model(token_ids, use_cache=False).logits
    return logits.double().cpu()


def logit_differences(
    found: Float[Tensor, "N V"], expected: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """How far logits are apart at each position, as a fraction of the expected ones' spread.

    The root mean square over the vocabulary: the largest of a million single differences would
    tell more of rounding than of mistakes.
    """
    difference = found.double().cpu() - expected
    apart: Tensor = difference.square().mean(dim=-1).sqrt() / expected.std()
    return apart


def over_positions(differences: Float[Tensor, " N"]) -> float:
    """The root mean square of the positions' differences; NaN if any is.

    In bf16 rounding alone may put a single position far off.
    """
    return float(differences.square().mean().sqrt())


@torch.no_grad()
def extended_difference(body: LlamaBody) -> float:
    """Of `extend`, by which prompts are run, from the module's own: of the farthest position.

    It is the same arithmetic but for the stream between layers.
    """
    token_ids = check_tokens(body.model, rows=1, length=24)
    hidden, _ = extend(body, token_ids, torch.full_like(token_ids[:, 0], token_ids.shape[1]))
    found, expected = body.logits(hidden)[0], own_logits(body.model, token_ids)[0]
    return float(logit_differences(found, expected).max())


@torch.no_grad()
def scored_difference(body: LlamaBody) -> float:
    """Of `scored_hidden_states`, which scores and trains completions, from the module's own.

    Two prompts with a beginning in common and two completions each, so that every generation of
    the packed pass has rows. Over all positions.
    """
    prompts = check_tokens(body.model, rows=2, length=_PROMPT_TOKENS)
    prompts[1, : _PROMPT_TOKENS // 2] = prompts[0, : _PROMPT_TOKENS // 2]
    completions = check_tokens(body.model, rows=4, length=_COMPLETION_TOKENS).flip(1)
    prompt_of_row = torch.tensor([0, 0, 1, 1], device=prompts.device)
    whole = torch.cat((prompts[prompt_of_row], completions), dim=1)
    # The prompt's last position predicts the first completion token.
    expected = own_logits(body.model, whole)[:, _PROMPT_TOKENS - 1 : -1].flatten(0, 1)
    hidden = scored_hidden_states(body, _batch(prompts, completions, prompt_of_row))
    found = widened(body.model.lm_head(hidden))
    return over_positions(logit_differences(found, expected))


def why_not_alike(what: str, *, difference: float, allowed: float) -> str | None:
    """A sentence's beginning that says how far one fast forward is off; None if it may be used."""
    if difference <= allowed:  # false of NaN too
        return None
    return (
        f"the fast path's logits ({what}) differ from the model's own by {difference:.2g} of their "
        f"spread (allowed {allowed:g})"
    )


def _batch(
    prompts: Int[Tensor, "P L"], completions: Int[Tensor, "B T"], prompt_of_row: Int[Tensor, " B"]
) -> MicroBatch:
    nothing = torch.zeros(completions.shape, device=completions.device)
    return MicroBatch(
        prompt_ids=prompts,
        prompt_lengths=torch.full_like(prompts[:, 0], prompts.shape[1]),
        prompt_of_row=prompt_of_row,
        completion_ids=completions,
        completion_lengths=torch.full_like(completions[:, 0], completions.shape[1]),
        mask=torch.ones_like(completions, dtype=torch.bool),
        advantages=nothing[:, 0],
        sampler_logprobs=nothing,
        old_logprobs=nothing,
        reference_logprobs=None,
        row_names=("check",) * len(completions),
    )
