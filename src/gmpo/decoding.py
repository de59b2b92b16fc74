"""Two policies decoded as one, and the best of several completions by their own probability.

The article's `adjust_probabilities_geometric` subtracts one number from all log-probabilities of a
position, which a softmax takes back: it does nothing. What has an effect is here: the normalised
geometric mean of two policies, and the choice among completions by the geometric mean of their
tokens' probabilities.

Dimensions: **R** running rows, **B** rows of a batch, **T** tokens so far, **V** vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from gmpo.config import ModelConfig
from gmpo.engine import build_decoder
from gmpo.errors import ConfigError, DataError, ModelError
from gmpo.outcomes import Mix
from gmpo.policy.head import widened
from gmpo.policy.load import context_length, load_policy, load_tokenizer
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt, Rollout
from gmpo.rollouts import GroupSampler, SamplingSettings, decode_text, special_tokens
from gmpo.sampler.decoders import Decoder, Prefill
from gmpo.sampler.local import LocalSampler

__all__ = [
    "GeometricMixtureProcessor",
    "MixtureDecoder",
    "MixtureWeights",
    "best_of_draws",
    "best_rollout",
    "build_mixture_sampler",
    "mixed_sampler",
    "mixture_logits",
    "require_same_vocabulary",
    "token_probability",
]


@dataclass(frozen=True, kw_only=True)
class MixtureWeights:
    """Exponents of the two policies, 0 or more and not both 0.

    With a sum of 1 the mixture is a geometric mean; another sum s also acts as temperature 1 / s.
    """

    first: float
    second: float

    def __post_init__(self) -> None:
        both = (self.first, self.second)
        if not all(math.isfinite(weight) and weight >= 0 for weight in both) or not any(both):
            raise ConfigError(
                f"weights of a mixture are {self.first} and {self.second}; they must be finite, 0 "
                "or more, and not both 0; for a geometric mean let them sum to 1"
            )


def mixture_logits(
    *,
    first_logits: Float[Tensor, "*B V"],
    second_logits: Float[Tensor, "*B V"],
    weights: MixtureWeights,
) -> Float[Tensor, "*B V"]:
    """Logits whose softmax is the normalised geometric mixture of two policies.

    With p1 and p2 their softmaxes, the mixture is p1^w1 p2^w2 / Z, so that its logits are
    w1 log p1 + w2 log p2. A weight of 0 leaves a policy out, also where it gives a token no
    probability. Weights (1, 0) and (0, 1) return that policy's logits as they are, bit for bit.

    A token that a policy of positive weight rules out is ruled out. Where they rule out all tokens
    between them there is no mixture; drawing from such a row raises.

    Raises:
        ModelError: the logits are over vocabularies of different sizes.
    """
    if first_logits.shape != second_logits.shape:
        raise ModelError(
            f"two policies with logits of shapes {tuple(first_logits.shape)} and "
            f"{tuple(second_logits.shape)} have no mixture: both must know the same tokens; mix "
            "models with one tokenizer, e.g. a base model and what was trained from it"
        )
    if (weights.first, weights.second) == (1, 0):
        return first_logits
    if (weights.first, weights.second) == (0, 1):
        return second_logits
    parts = [
        weight * widened(logits).log_softmax(dim=-1)
        for weight, logits in ((weights.first, first_logits), (weights.second, second_logits))
        if weight  # 0 * -inf would be NaN
    ]
    return torch.stack(parts).sum(dim=0)


def require_same_vocabulary(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase
) -> None:
    """Refuse tokenizers that give some id another text.

    Raises:
        ModelError: they differ; one token is named.
    """
    one, other = first.get_vocab(), second.get_vocab()
    if one == other:
        return
    differing = [token for token in one | other if one.get(token) != other.get(token)]
    token = min(differing)
    raise ModelError(
        f"the two models have different vocabularies: {len(differing)} tokens differ, e.g. "
        f"{token!r} is id {one.get(token)} in the first and {other.get(token)} in the second; mix "
        "models with one tokenizer, e.g. a base model and what was trained from it"
    )


class GeometricMixtureProcessor(LogitsProcessor):
    """Turns one model's scores into the mixture with another, inside `transformers`' `generate`.

    It should be the first processor, so that temperature and cuts apply to the mixture. The other
    model keeps its cache while rows grow by a token, and reads them anew when they changed
    otherwise (beam search).

    Args:
        other: the second policy; on the device of the ids that it will be given.
        weights: of the model that generates (first) and of `other` (second).
        pad_token_id: of prompts padded on the left; None for prompts of one length.
    """

    def __init__(
        self, other: PreTrainedModel, *, weights: MixtureWeights, pad_token_id: int | None = None
    ) -> None:
        self._other = other
        self._weights = weights
        self._pad_token_id = pad_token_id
        self._seen: Tensor | None = None
        self._cache: Any = None

    def __call__(
        self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """The mixture's logits for the next token of every row."""
        return mixture_logits(
            first_logits=scores,
            second_logits=self._next_logits(input_ids),
            weights=self._weights,
        )

    @torch.no_grad()
    def _next_logits(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
        seen = self._seen
        grew = (
            seen is not None
            and seen.shape == input_ids[:, :-1].shape
            and torch.equal(seen, input_ids[:, :-1])
        )
        is_text = torch.ones_like(input_ids)
        if self._pad_token_id is not None:
            # Only leading padding: behind a finished row's end nothing is read any more.
            is_text = ((input_ids != self._pad_token_id).cumsum(dim=-1) > 0).long()
        positions = (is_text.cumsum(dim=-1) - 1).clamp(min=0)
        output = self._other(
            input_ids[:, -1:] if grew else input_ids,
            attention_mask=is_text,
            position_ids=positions[:, -1:] if grew else positions,
            past_key_values=self._cache if grew else None,
            use_cache=True,
            logits_to_keep=1,
        )
        self._seen, self._cache = input_ids, output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


class MixtureDecoder:
    """Two decoders run side by side as the decoder of their geometric mixture.

    Args:
        first: decoder of the first policy; rows are in its order.
        second: decoder of the second policy, over the same vocabulary.
        weights: of both.

    Raises:
        ModelError: they know different numbers of tokens.
    """

    def __init__(self, first: Decoder, second: Decoder, *, weights: MixtureWeights) -> None:
        if first.vocabulary_size != second.vocabulary_size:
            raise ModelError(
                f"the two models know {first.vocabulary_size} and {second.vocabulary_size} tokens "
                "and have no mixture; mix models with one tokenizer, e.g. a base model and what "
                "was trained from it"
            )
        self._first, self._second = first, second
        self._mix = partial(mixture_logits, weights=weights)
        # Decoders order rows each in their own way: where the second has each row of the first.
        self._places: list[int] = []

    @property
    def device(self) -> torch.device:
        """Where token ids are expected and logits come from."""
        return self._first.device

    @property
    def vocabulary_size(self) -> int:
        """Token ids lie below it."""
        return self._first.vocabulary_size

    def prefill(self, prompts: Sequence[Sequence[int]], *, all_logits: bool) -> list[Prefill]:
        """Run prompts through both models."""
        pairs = zip(
            self._first.prefill(prompts, all_logits=all_logits),
            self._second.prefill(prompts, all_logits=all_logits),
            strict=True,
        )
        return [
            Prefill(
                logits=self._mix(first_logits=first.logits, second_logits=second.logits),
                state=(first, second),
            )
            for first, second in pairs
        ]

    def add_rows(self, prefill: Prefill, num_rows: int) -> None:
        """Let new rows of both models continue a prompt."""
        first, second = prefill.state
        self._first.add_rows(first, num_rows)
        self._second.add_rows(second, num_rows)
        self._places += range(len(self._places), len(self._places) + num_rows)

    def advance(self, token_ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append one token to every row of both models; the mixture's logits of the next one."""
        places = torch.tensor(self._places, device=token_ids.device)
        second_ids = torch.empty_like(token_ids)
        second_ids[places] = token_ids
        first_logits = self._first.advance(token_ids)
        second_logits = self._second.advance(second_ids)[places]
        return self._mix(first_logits=first_logits, second_logits=second_logits)

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Forget these rows of both models."""
        second_order = self._second.drop([self._places[row] for row in rows])
        order = self._first.drop(rows)
        self._places = [second_order.index(self._places[row]) for row in order]
        return order

    def clear(self) -> None:
        """Forget every row of both models."""
        self._first.clear()
        self._second.clear()
        self._places = []

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """A mixture is not trained.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a mixture has two models' weights and takes none; build another mixture")


def build_mixture_sampler(
    first: Policy,
    second: Policy,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: MixtureWeights,
    max_rows: int,
) -> LocalSampler:
    """A sampler that draws from the geometric mixture of two policies.

    Its log-probabilities are the mixture's own.

    Args:
        first: one policy.
        second: the other, on the same device.
        tokenizer: of both; `require_same_vocabulary` tells whether they share it.
        weights: of both.
        max_rows: completions decoded at once.
    """
    decoder = MixtureDecoder(
        build_decoder(first, max_rows=max_rows),
        build_decoder(second, max_rows=max_rows),
        weights=weights,
    )
    return LocalSampler(
        decoder,
        context_length=min(context_length(first.model), context_length(second.model)),
        max_rows=max_rows,
        decode=partial(decode_text, tokenizer),
        special_tokens=special_tokens(tokenizer),
    )


def mixed_sampler(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mix: Mix,
    model: ModelConfig,
    max_rows: int,
    warn: Callable[[str], None],
) -> LocalSampler:
    """A sampler of the mixture of a policy with another model, which is loaded as the first was.

    Args:
        policy: of the first model.
        tokenizer: of the first model.
        mix: the second model and its weight.
        model: device and precision, as they were taken for the first.
        max_rows: completions decoded at once.
        warn: told in one sentence what is not as expected of the second.

    Raises:
        ConfigError: the weight is not in 0..1.
        ModelError: the second model cannot be had, or knows other tokens.
    """
    if not 0 <= mix.weight <= 1:
        raise ConfigError(
            f"weight of the second model is {mix.weight}; it must lie in [0, 1], and the first "
            "model has the rest"
        )
    require_same_vocabulary(tokenizer, load_tokenizer(mix.name))
    other = load_policy(mix.name, device=model.device, dtype=model.dtype, warn=warn)
    return build_mixture_sampler(
        policy,
        other,
        tokenizer,
        weights=MixtureWeights(first=1 - mix.weight, second=mix.weight),
        max_rows=max_rows,
    )


def token_probability(logprobs: Float[np.ndarray, " T"]) -> float:
    """Geometric mean of token probabilities, exp(mean log p): 1 / perplexity, from 0 to 1.

    Args:
        logprobs: of the counted tokens, in nats.

    Raises:
        DataError: there is no token.
    """
    if not len(logprobs):
        raise DataError(
            "a completion without counted tokens has no token probability; leave it out of the "
            "choice, or sample again"
        )
    return math.exp(float(np.mean(logprobs, dtype=np.float64)))


def best_rollout(group: Group) -> Rollout:
    """The rollout with the largest geometric mean of its sampled tokens' probabilities.

    Only tokens that the policy drew count. Rollouts with an error or without such tokens do not
    stand for choice; of equal ones the first is taken.

    Raises:
        DataError: none stands for choice.
    """
    usable = list(filter(_stands_for_choice, group.rollouts))
    if not usable:
        raise DataError(
            f"none of the {len(group.rollouts)} rollouts of prompt {group.prompt.id!r} is without "
            "error and has a sampled token, so there is no best one; sample again"
        )
    return max(
        usable,
        key=lambda rollout: token_probability(rollout.sampler_logprobs[rollout.from_policy]),
    )


def best_of_draws(sample: GroupSampler, *, count: int) -> GroupSampler:
    """Samples `count` times as many completions, and keeps the best of each `count` in a row.

    The draws are those that `sample` would give of so many. Where none of them stands for choice
    (see `best_rollout`) the first is kept, which then is no answer either.
    """
    if count == 1:
        return sample

    def chosen(
        prompts: Sequence[Prompt], *, settings: SamplingSettings, key: tuple[int | str, ...]
    ) -> list[Group]:
        draws = replace(settings, num_completions=settings.num_completions * count)
        return [_best_of_each(group, count) for group in sample(prompts, settings=draws, key=key)]

    return chosen


def _best_of_each(group: Group, count: int) -> Group:
    blocks = [group.rollouts[n : n + count] for n in range(0, len(group.rollouts), count)]
    kept = [
        best_rollout(replace(group, rollouts=block))
        if any(map(_stands_for_choice, block))
        else block[0]
        for block in blocks
    ]
    return replace(group, rollouts=tuple(kept))


def _stands_for_choice(rollout: Rollout) -> bool:
    return rollout.error is None and bool(np.any(rollout.from_policy))
