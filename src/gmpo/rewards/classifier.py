"""A reward model: a sequence classifier's single output as the reward."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gmpo.errors import ModelError
from gmpo.policy.hub import why_unknown
from gmpo.records import control_token_marker
from gmpo.rewards.convention import RewardFault

__all__ = ["ClassifierReward", "load_classifier_reward"]

_BATCH_TOKENS = 4096
"""Tokens of one forward pass, padding included; a single text may exceed it."""


class ClassifierReward:
    """The model's output for each prompt with its completion; any real number.

    A chat is rendered by the classifier's own chat template. Without one its turns are joined by
    line breaks, and a plain prompt and completion are joined as they are; the tokenizer then adds
    the special tokens that the model was trained with.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def __call__(
        self, *, prompts: list[Any], completions: list[Any], **kwargs: Any
    ) -> list[float | RewardFault]:
        """The rewards, in the order of the completions; a fault where a text is not read whole."""
        encoded = [self._encoded_pair(p, c) for p, c in zip(prompts, completions, strict=True)]
        fitting = {place: ids for place, ids in enumerate(encoded) if isinstance(ids, list)}
        lengths = [len(fitting.get(place, ())) for place in range(len(encoded))]
        values: dict[int, float] = {}
        for places in _batches(list(fitting), lengths):
            outputs = self._outputs([fitting[place] for place in places])
            values |= dict(zip(places, outputs, strict=True))
        return [
            one if isinstance(one, RewardFault) else values[place]
            for place, one in enumerate(encoded)
        ]

    def _encoded_pair(self, prompt: Any, completion: Any) -> list[int] | RewardFault:
        """Token ids, or why these texts have none."""
        is_rendered = self.tokenizer.chat_template is not None and not isinstance(prompt, str)
        turns = [*prompt, *completion] if is_rendered else []
        if any(control_token_marker(turn["content"]) for turn in turns):
            return RewardFault(
                what="cannot be given: U+F0000 or U+F0001 is in a turn, which rendering it for the "
                "reward model would drop; leave it out of prompts"
            )
        try:
            token_ids = self._token_ids(prompt, completion)
        except ValueError as error:
            if not str(error).startswith("Can't sanitize"):
                raise
            return RewardFault(
                what="cannot be given: a turn spells a control token that the reward model's "
                f"tokenizer cannot encode as text ({error})"
            )
        limit = self._context_length()
        if len(token_ids) <= limit:
            return token_ids
        return RewardFault(
            what=f"cannot be given: prompt and completion have {len(token_ids)} tokens, and the "
            f"reward model takes {limit}; lower sampling.max_length"
        )

    def _context_length(self) -> int:
        positions: int = self.model.config.to_dict().get("max_position_embeddings", sys.maxsize)
        return min(positions, self.tokenizer.model_max_length)

    def _outputs(self, token_ids: Sequence[Sequence[int]]) -> list[float]:
        width = max(len(ids) for ids in token_ids)
        shape = (len(token_ids), width)
        padded = torch.full(shape, self.model.config.pad_token_id, dtype=torch.long)
        attended = torch.zeros(shape, dtype=torch.long)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = torch.tensor(ids)
            attended[row, : len(ids)] = 1
        device = self.model.device
        outputs = self.model(padded.to(device), attention_mask=attended.to(device))
        values: list[float] = outputs.logits[:, 0].float().tolist()
        return values

    def _token_ids(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._encoded(prompt + completion)
        turns = [*prompt, *completion]
        if self.tokenizer.chat_template is None:
            return self._encoded("\n".join(turn["content"] for turn in turns))
        # A completion that spells a control token would else write a turn for the reward model.
        rendered: Any = self.tokenizer.apply_chat_template(
            turns, return_dict=False, sanitize_control_tokens=True
        )
        token_ids: list[int] = rendered
        return token_ids

    def _encoded(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text)["input_ids"]
        return token_ids


def load_classifier_reward(
    name: str, *, device: torch.device, dtype: torch.dtype
) -> ClassifierReward:
    """The named sequence classifier and its tokenizer as a reward function.

    Args:
        name: a hub name, or a folder.
        device: where it runs.
        dtype: precision of its weights and its forward pass.

    Raises:
        ModelError: there is none, weights of its head are missing, or it has not one output.
    """
    hint = "give the hub name or the folder of a sequence classifier with its tokenizer"
    why = why_unknown(name)
    if why is not None:
        raise ModelError(f"cannot load reward model {name!r}: {why}; {hint}")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load reward model {name!r}: {first_line}; {hint}") from None
    if report["missing_keys"]:
        raise ModelError(
            f"reward model {name!r} lacks the weights {sorted(report['missing_keys'])[:3]}, which "
            "would be random; give a model that was trained as a sequence classifier"
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"reward model {name!r} has {model.config.num_labels} outputs; it must have one "
            "(num_labels = 1), which is the reward"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of reward model {name!r} has neither a pad nor an end token, so texts "
            "cannot be batched; set tokenizer.pad_token and save it"
        )
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Decoder classifiers look for the last token that is not this one.
    model.config.pad_token_id = padding
    return ClassifierReward(model.to(device).eval().requires_grad_(False), tokenizer)


def _batches(places: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places in batches of similar length that stay within the budget."""
    batch: list[int] = []
    for place in sorted(places, key=lambda place: lengths[place]):
        if batch and lengths[place] * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
