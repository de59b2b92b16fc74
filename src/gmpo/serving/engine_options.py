"""Fields of a request that the embedded engine follows, and what becomes of all others."""

from __future__ import annotations

import difflib
from typing import Any

from gmpo.serving.backend import BackendError, GenerationRequest

__all__ = ["refuse_what_is_not_done"]

_FOLLOWED = frozenset(
    {
        "echo",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "n",
        "prompt",
        "seed",
        "stop",
        "stream",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_options",
        "user",
    }
)
"""Accounting and the like: they change no answer, wherever they are followed."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (None, True),
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""What the engine cannot do, with the values that ask for nothing."""


def refuse_what_is_not_done(request: GenerationRequest) -> None:
    """Refuse an option that would be ignored, so that nobody believes it was followed.

    Raises:
        BackendError: the body has such a field; it is named.
    """
    neutral = {**_NEUTRAL, "best_of": (None, request.n)}
    for name, value in request.body.items():
        if name in _FOLLOWED or name in _WITHOUT_EFFECT:
            continue
        if name not in neutral:
            near = difflib.get_close_matches(name, [*_FOLLOWED, *neutral], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise BackendError(
                f"the embedded engine knows no field {name!r}; {hint}",
                fault="bad_request",
                param=name,
                code="unknown_parameter",
            )
        if value not in neutral[name]:
            raise BackendError(
                f"the embedded engine does not follow {name!r}; leave it out, or serve the model "
                "by an upstream that does",
                fault="bad_request",
                param=name,
                code="unsupported_parameter",
            )
