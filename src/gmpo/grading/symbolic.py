"""math-verify, as a worker process serves it."""

from __future__ import annotations

from typing import Any

from gmpo.grading.worker import serve

__all__ = ["main"]


def main() -> None:
    """Serve `{"answer", "references"}` with `{"is_equal"}`: whether any reference is the answer."""
    import math_verify

    def is_equal(request: dict[str, Any]) -> dict[str, Any]:
        answer = math_verify.parse(_as_math(request["answer"]), parsing_timeout=None)
        return {
            "is_equal": any(
                math_verify.verify(
                    math_verify.parse(_as_math(reference), parsing_timeout=None),
                    answer,
                    timeout_seconds=None,
                )
                for reference in request["references"]
            )
        }

    serve(is_equal)


def _as_math(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"
