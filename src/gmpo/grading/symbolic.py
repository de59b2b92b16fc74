"""math-verify, as a worker process serves it."""

from __future__ import annotations

from typing import Any

from gmpo.grading.worker import serve

__all__ = ["main"]

_DECIMAL_PLACES = 15
"""To which math-verify compares values. Alone, 8e-19 would equal its double and its negative."""
_SIGNIFICANT_DIGITS = 12
"""Of a small reference, to which values are compared; floats are exact to 15 or 16."""


def main() -> None:
    """Serve `{"answer", "references"}` with `{"is_equal"}`: whether any reference is the answer."""
    import math_verify

    def parsed(text: str) -> list[Any]:
        found: list[Any] = math_verify.parse(_as_math(text), parsing_timeout=None)
        return found

    def is_equal(request: dict[str, Any]) -> dict[str, Any]:
        answer = parsed(request["answer"])
        return {
            "is_equal": any(
                math_verify.verify(
                    gold, answer, numeric_precision=_places(gold), timeout_seconds=None
                )
                for gold in map(parsed, request["references"])
            )
        }

    serve(is_equal)


def _places(gold: list[Any]) -> int:
    """Decimal places to which a parsed reference is compared."""
    import sympy

    value = gold[0] if gold else None
    if not isinstance(value, sympy.Expr) or not value.is_number:
        return _DECIMAL_PLACES
    size = abs(value.evalf(2))
    if not size.is_finite or size.is_zero or not size.is_Float:
        return _DECIMAL_PLACES
    exponent = int(sympy.floor(sympy.log(size, 10).evalf()))
    return max(_DECIMAL_PLACES, _SIGNIFICANT_DIGITS - exponent)


def _as_math(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"
