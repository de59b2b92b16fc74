"""Fields of a request that the embedded engine follows, and what becomes of all others."""

from __future__ import annotations

import difflib
from typing import Any

from gmpo.serving.backend import BackendError, GenerationRequest

__all__ = ["refuse_what_is_not_done"]

_FOLLOWED_BY_BOTH = frozenset(
    {
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "model",
        "n",
        "seed",
        "stop",
        "stream",
        "temperature",
        "top_k",
        "top_p",
    }
)
_FOLLOWED = {
    "chat": _FOLLOWED_BY_BOTH | {"messages", "top_logprobs"},
    "completions": _FOLLOWED_BY_BOTH | {"echo", "prompt"},
}
"""By route: a field of the other one would be taken and change nothing."""
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
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
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "messages": (None,),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt": (None,),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""What the engine, or a route, does not do, with the values that ask for nothing."""


def refuse_what_is_not_done(request: GenerationRequest) -> None:
    """Refuse an option that would be ignored, so that nobody believes it was followed.

    Raises:
        BackendError: the body has such a field; it is named.
    """
    followed = _FOLLOWED[request.route]
    neutral = {**_NEUTRAL, "best_of": (None, request.n)}
    for name, value in request.body.items():
        if name in followed or name in _WITHOUT_EFFECT or value in neutral.get(name, ()):
            continue
        if name not in neutral:
            near = difflib.get_close_matches(name, [*followed, *neutral], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            said, code = f"the embedded engine knows no field {name!r}; {hint}", "unknown_parameter"
        elif others := [route for route in _FOLLOWED if name in _FOLLOWED[route]]:
            said, code = (
                f"{_PATHS[request.route]} has no field {name!r}, which is one of "
                f"{_PATHS[others[0]]}; leave it out",
                "unknown_parameter",
            )
        else:
            said, code = (
                f"the embedded engine does not follow {name!r}; leave it out, or serve the model "
                "by an upstream that does",
                "unsupported_parameter",
            )
        raise BackendError(said, fault="bad_request", param=name, code=code)
