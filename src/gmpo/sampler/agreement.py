"""Start-up check: do decoding steps give the logits of the model's own forward?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gmpo.policy.agreement import (
    check_tokens,
    logit_differences,
    over_positions,
    own_logits,
)
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.cache import FixedRows
from gmpo.sampler.decoders import ENOUGH_ROWS, LlamaDecoder
from gmpo.sampler.graphed import Step

__all__ = ["decoded_difference"]

_PROMPT_TOKENS = 12
_STEPS = 3


@torch.no_grad()
def decoded_difference(body: LlamaBody, *, over_fixed_buffers: bool = False) -> float:
    """How far prefills and decoding steps are from the module's own logits, over all positions.

    Two sequences are decoded with the weights as they are, and then, as copies that fill as many
    rows as it takes, with reordered ones, which run a further prompt too. A decoder of its own is
    used.

    Args:
        body: the model.
        over_fixed_buffers: whether steps are those that a GPU captures, taken uncaptured: they are
            other operations.

    Returns:
        As `over_positions`.
    """
    sequences = check_tokens(body.model, rows=2, length=_PROMPT_TOKENS + _STEPS)
    sequences[1, :_PROMPT_TOKENS] = sequences[0, :_PROMPT_TOKENS]
    expected = own_logits(body.model, sequences)
    prompt = sequences[0, :_PROMPT_TOKENS].tolist()
    capture = _uncaptured if over_fixed_buffers else None
    decoder = LlamaDecoder(body, max_rows=ENOUGH_ROWS, capture=capture)
    differences = []
    for rows in (2, ENOUGH_ROWS):
        followed = torch.arange(rows, device=decoder.device) % 2
        [prefill] = decoder.prefill([prompt], all_logits=False)
        decoder.add_rows(prefill, rows)
        for place in range(_PROMPT_TOKENS, _PROMPT_TOKENS + _STEPS):
            logits = decoder.advance(sequences[followed, place])
            differences.append(logit_differences(logits, expected[followed.cpu(), place]))
        [prefill] = decoder.prefill([prompt], all_logits=True)
        differences.append(logit_differences(prefill.logits, expected[0, :_PROMPT_TOKENS]))
        decoder.drop(range(rows))
    return over_positions(torch.cat(differences))


def _uncaptured(step: Step, rows: FixedRows) -> Callable[[], Tensor]:
    return partial(step, rows)
