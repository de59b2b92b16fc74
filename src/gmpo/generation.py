"""Completions of one prompt by a named model, for people who want to look."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from gmpo.config import ModelConfig
from gmpo.decoding import mixed_sampler
from gmpo.engine import build_sampler
from gmpo.errors import ConfigError
from gmpo.inputs import resolve_model
from gmpo.outcomes import Mix
from gmpo.policy.load import end_token_ids, load_policy, load_tokenizer
from gmpo.records import FinishReason, Message, Prompt
from gmpo.rollouts import PromptRenderer, decode_text
from gmpo.sampler.requests import SampleRequest, complete

__all__ = ["Generated", "GenerationSettings", "generate"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How completions are drawn; meanings as in `SampleRequest`.

    Each of the `num_completions` is the one of `best_of` draws whose tokens have the largest
    geometric mean probability.
    """

    num_completions: int = 1
    best_of: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    stop_strings: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One completion's text, with its mean log-probability in nats a token.

    The log-probability is the model's, or the mixture's, at temperature 1.
    """

    text: str
    num_tokens: int
    mean_logprob: float
    finish_reason: FinishReason

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return asdict(self)


def generate(
    model: ModelConfig,
    prompt: str,
    *,
    settings: GenerationSettings,
    mix: Mix | None = None,
    warn: Callable[[str], None] = print,
) -> list[Generated]:
    """Load a model, or two for their mixture, and complete one user turn.

    Raises:
        gmpo.errors.GmpoError: the model or a setting is not usable; it is named.
    """
    _require_choice(settings)
    model = resolve_model(model)
    policy = load_policy(model.name, device=model.device, dtype=model.dtype, warn=warn)
    tokenizer = load_tokenizer(model.name)
    renderer = PromptRenderer(
        tokenizer,
        prompt_format=model.prompt_format,
        system=model.system,
        max_prompt_tokens=sys.maxsize,  # the sampler knows the model's own limit and names it
    )
    turn = Message(role="user", content=prompt)
    rendered = renderer.render(Prompt(id="prompt", messages=(turn,)))
    num_draws = settings.num_completions * settings.best_of
    rows = max(1, num_draws)
    sampler = (
        build_sampler(policy, tokenizer, max_rows=rows)
        if mix is None
        else mixed_sampler(policy, tokenizer, mix=mix, model=model, max_rows=rows, warn=warn)
    )
    request = SampleRequest(
        id="prompt",
        token_ids=rendered.token_ids or (),
        num_completions=num_draws,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_ids=end_token_ids(policy.model, tokenizer),
        stop_strings=settings.stop_strings,
        key=(settings.seed,),
    )
    drawn = [
        Generated(
            text=decode_text(tokenizer, completion.token_ids.tolist()),
            num_tokens=len(completion.token_ids),
            mean_logprob=float(completion.logprobs.mean()),
            finish_reason=completion.finish_reason,
        )
        for completion in complete(sampler, [request])["prompt"]
    ]
    blocks = range(0, num_draws, settings.best_of)
    return [
        max(drawn[first : first + settings.best_of], key=lambda one: one.mean_logprob)
        for first in blocks
    ]


def _require_choice(settings: GenerationSettings) -> None:
    """Refuse a choice among nothing, or among draws that are all alike."""
    if settings.best_of < 1:
        raise ConfigError(
            f"best_of is {settings.best_of}; it must be at least 1, which is no choice"
        )
    if settings.best_of > 1 and settings.temperature == 0:
        raise ConfigError(
            f"best_of is {settings.best_of} and temperature 0: greedy draws are all alike; set a "
            "temperature above 0, or best_of to 1"
        )
