"""Prompts in, groups of completions out: rendering for a model, then sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from gmpo.errors import DataError, ModelError
from gmpo.records import Group, Message, Prompt, Rollout, control_token_marker
from gmpo.sampler.requests import Completion, Sampler, SampleRequest, complete

__all__ = [
    "GroupSampler",
    "PromptRenderer",
    "SamplingSettings",
    "decode_text",
    "prompt_keys",
    "sample_groups",
    "special_tokens",
]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How completions are drawn: the part of a request that all prompts of a call share."""

    num_completions: int
    max_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()


class GroupSampler(Protocol):
    """Groups of completions: `sample_groups` bound to a sampler, or a user's rollouts."""

    def __call__(
        self, prompts: Sequence[Prompt], *, settings: SamplingSettings, key: tuple[int | str, ...]
    ) -> list[Group]:
        """One group a rendered prompt, in the prompts' order; `key` names the randomness."""


class PromptRenderer:
    """Turns prompts into token ids, always in the same format.

    What a turn says is text: where it spells a control token (`<|im_end|>`), the letters are
    encoded, so that nobody closes a turn or writes another one by its content. Only the template's
    own control tokens become tokens. The characters U+F0000 and U+F0001, which transformers marks
    such letters with and drops from a turn, are refused. A prompt that is one text, not a chat, is
    its author's own template and encoded as it is.

    Args:
        tokenizer: of the model that will be sampled.
        prompt_format: "chat", "text", or "auto": chat where the tokenizer has a template.
        system: system turn put before every chat that has none; None leaves it to the template.
        max_prompt_tokens: a longer prompt is refused.

    Raises:
        ModelError: chat was asked for and the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_format: Literal["auto", "chat", "text"],
        system: str | None,
        max_prompt_tokens: int,
    ) -> None:
        has_template = tokenizer.chat_template is not None
        if prompt_format == "chat" and not has_template:
            raise ModelError(
                "prompt_format is 'chat' and the tokenizer has no chat template; "
                "use prompt_format = 'text', or set tokenizer.chat_template and save it"
            )
        self.uses_chat = has_template and prompt_format != "text"
        self.tokenizer = tokenizer
        self._system = system
        self._max_prompt_tokens = max_prompt_tokens

    def render(self, prompt: Prompt) -> Prompt:
        """The prompt with its token ids.

        Raises:
            DataError: it is empty, longer than allowed, or a turn has a character that rendering
                drops; its id and length or the character are named.
        """
        return self.render_all([prompt])[0]

    def render_all(
        self, prompts: Sequence[Prompt], *, remedy: str = "remove the prompt"
    ) -> list[Prompt]:
        """The prompts with their token ids, in order.

        Args:
            prompts: as a task has them.
            remedy: what helps against too long ones besides a larger limit, for the message.

        Raises:
            DataError: one is empty, has a character that rendering drops, or is longer than
                allowed; the longest is named with its length, and how many there are.
        """
        rendered = [self._render(prompt) for prompt in prompts]
        limit = self._max_prompt_tokens
        lengths = [len(prompt.token_ids or ()) for prompt in rendered]
        too_long = sum(length > limit for length in lengths)
        if too_long:
            longest = max(lengths)
            name = prompts[lengths.index(longest)].id
            raise DataError(
                f"prompt {name!r} has {longest} tokens, more than the {limit} that "
                f"sampling.max_length leaves beside the completion ({too_long} of {len(prompts)} "
                f"prompts are too long, this is the longest); raise sampling.max_length by "
                f"{longest - limit} or {remedy}"
            )
        return rendered

    def num_tokens(self, prompt: Prompt) -> int:
        """Tokens of the prompt, however long it is."""
        return len(self._render(prompt).token_ids or ())

    def _render(self, prompt: Prompt) -> Prompt:
        turns = self._turns(prompt)
        if not any(turn.content.strip() for turn in turns):
            raise DataError(f"prompt {prompt.id!r} is empty; give it some text")
        if self.uses_chat and prompt.messages is not None:
            token_ids = self._templated(turns, prompt_id=prompt.id)
        elif prompt.text is None:
            joined = "".join(f"{turn.content}\n" for turn in turns)
            encoded = self.tokenizer(joined, split_special_tokens=True)
            token_ids = cast(list[int], encoded["input_ids"])
        else:
            token_ids = cast(list[int], self.tokenizer(prompt.text)["input_ids"])
        return prompt.with_tokens(tuple(token_ids))

    def _templated(self, turns: Sequence[Message], *, prompt_id: str) -> list[int]:
        for turn in turns:
            _refuse_markers(turn.content, prompt_id=prompt_id)
        chat = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            rendered = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
        except ValueError as error:
            if not str(error).startswith("Can't sanitize"):
                raise
            raise DataError(
                f"prompt {prompt_id!r} spells a control token that this tokenizer cannot encode as "
                f"text ({error}); write it differently"
            ) from None
        return cast(list[int], rendered)

    def _turns(self, prompt: Prompt) -> tuple[Message, ...]:
        if prompt.messages is None:
            return (Message(role="user", content=prompt.text or ""),)
        has_system = prompt.messages[0].role == "system"
        if self._system is None or has_system:
            return prompt.messages
        return (Message(role="system", content=self._system), *prompt.messages)


def _refuse_markers(content: str, *, prompt_id: str) -> None:
    found = control_token_marker(content)
    if found is not None:
        raise DataError(
            f"prompt {prompt_id!r} has the private-use character U+{ord(found):X} in a turn, which "
            "the chat template's rendering keeps for itself and would drop; allowed is all text "
            "without U+F0000 and U+F0001; remove them"
        )


def sample_groups(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: SamplingSettings,
    key: tuple[int | str, ...],
) -> list[Group]:
    """One group a prompt, in the prompts' order.

    Args:
        sampler: idle; it keeps its weights for the whole call.
        prompts: rendered prompts.
        tokenizer: turns completions into text; the ids are kept as sampled.
        settings: shared by all prompts.
        key: randomness of the call, e.g. (seed, round); each prompt adds its id and how often it
            has occurred before in this call.
    """
    requests = []
    for place, (prompt, prompt_key) in enumerate(
        zip(prompts, prompt_keys(prompts, key), strict=True)
    ):
        assert prompt.token_ids is not None, "prompts are rendered before they are sampled"
        requests.append(
            SampleRequest(
                id=str(place),
                token_ids=prompt.token_ids,
                media=prompt.media,
                num_completions=settings.num_completions,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                stop_ids=settings.stop_ids,
                stop_strings=settings.stop_strings,
                key=prompt_key,
            )
        )
    completions = complete(sampler, requests)
    return [
        Group(
            prompt=prompt,
            rollouts=tuple(_rollout(c, prompt, tokenizer) for c in completions[str(place)]),
        )
        for place, prompt in enumerate(prompts)
    ]


def prompt_keys(
    prompts: Sequence[Prompt], key: tuple[int | str, ...]
) -> Iterator[tuple[int | str, ...]]:
    """Each prompt's randomness: the call's key, its id, and how often the id has come before."""
    occurrences: Counter[str] = Counter()
    for prompt in prompts:
        yield (*key, prompt.id, occurrences[prompt.id])
        occurrences[prompt.id] += 1


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a completion, without end tokens."""
    return cast(str, tokenizer.decode(list(token_ids), skip_special_tokens=True))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the special tokens, which `decode_text` leaves out, by their own texts."""
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    return {text: id for text, id in special.items() if not decode_text(tokenizer, [id])}


def _rollout(completion: Completion, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    return Rollout(
        prompt_id=prompt.id,
        index=completion.index,
        token_ids=completion.token_ids,
        from_policy=np.ones(len(completion.token_ids), dtype=np.bool_),
        sampler_logprobs=completion.sampled_logprobs,
        text=decode_text(tokenizer, completion.token_ids.tolist()),
        finish_reason=completion.finish_reason,
        first_version=completion.first_version,
        last_version=completion.last_version,
    )
