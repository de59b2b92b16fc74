"""How good an answer looks without knowing the right one.

The score is a floored, weighted geometric mean of components in [0, 1]. It finds answers that are
out of the ordinary: it is not the truth. A policy that learned to please its reward is *more* sure
of itself, so the score alone must not promote a model. `gmpo.serving.calibration` says what it is
worth on answers whose truth is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from gmpo.errors import DataError
from gmpo.rewards.combination import floored_geometric_mean

__all__ = [
    "COMPONENTS",
    "DEFAULT_FLOOR",
    "DEFAULT_WEIGHTS",
    "FinishedChoice",
    "QualityScore",
    "quality_components",
    "quality_score",
    "stability",
]

COMPONENTS: Mapping[str, str] = MappingProxyType(
    {
        "probability": "exp(mean log-probability), the geometric mean of the tokens' probabilities",
        "distinct": "1 - share of the answer's 4-grams that repeat an earlier one",
        "terminated": "1 if the model ended the answer itself, 0 if a limit cut it",
        "verified": "1 if the answer is right, 0 if not, where the request brings a reference",
    }
)
"""What a score is made of, each in [0, 1]."""

DEFAULT_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"probability": 1.0, "distinct": 1.0, "terminated": 1.0, "verified": 2.0}
)
"""Weights used where nothing else is said; a component that is missing takes none."""

DEFAULT_FLOOR = 0.05
_GRAM = 4
_FEWEST_FOR_STABILITY = 20


@dataclass(frozen=True, kw_only=True)
class FinishedChoice:
    """One completion as far as it is judged.

    Attributes:
        text: the whole completion, without the prompt.
        tokens: ids or texts of its tokens, in order; empty where the backend does not tell them.
        logprobs: of those tokens, in nats, 0 or less; empty where the backend does not tell.
        finish_reason: why it ended; "stop" and "tool_calls" are the model's own ends.
        verified: whether it is right; None where there is nothing to compare with.
    """

    text: str
    tokens: tuple[int | str, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None
    verified: bool | None = None


@dataclass(frozen=True, kw_only=True)
class QualityScore:
    """The score of an answer, None where no component with a weight is known, and its parts."""

    score: float | None
    components: Mapping[str, float | None]
    mean_logprob: float | None


def quality_components(choice: FinishedChoice) -> dict[str, float | None]:
    """The components of one completion, by the names of `COMPONENTS`; None where not known.

    An empty completion has probability and distinctness 0: it says nothing, however sure.

    Raises:
        DataError: a log-probability is NaN or above 0.
    """
    if not choice.text.strip():
        probability: float | None = 0.0
    else:
        mean = _mean_logprob(choice.logprobs)
        probability = None if mean is None else math.exp(mean)
    return {
        "probability": probability,
        "distinct": _distinct_share(choice) if choice.text.strip() else 0.0,
        "terminated": float(choice.finish_reason in ("stop", "tool_calls")),
        "verified": None if choice.verified is None else float(choice.verified),
    }


def quality_score(
    choices: Sequence[FinishedChoice],
    *,
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    floor: float = DEFAULT_FLOOR,
) -> QualityScore:
    """Score of an answer: that of its worst completion, so that one bad among n is not hidden.

    With w_m the weights of the components that are known and f the floor, a completion scores
    prod_m (f + (1 - f) c_m)^(w_m / sum w), which lies in [f, 1]. A right answer never scores less,
    and a wrong one never more, for being verified.

    Args:
        choices: at least one.
        weights: by the names of `COMPONENTS`, each 0 or more.
        floor: f, above 0 and below 1.

    Raises:
        DataError: there is no completion, or a log-probability is NaN or above 0.
        ConfigError: weights or floor are not as above.
    """
    if not choices:
        raise DataError("there is no completion to score; an answer has at least one")
    scored = []
    for choice in choices:
        components = quality_components(choice)
        scored.append(
            QualityScore(
                score=floored_geometric_mean(components, weights, floor),
                components=components,
                mean_logprob=_mean_logprob(choice.logprobs),
            )
        )
    return min(scored, key=lambda one: math.inf if one.score is None else one.score)


def stability(scores: Iterable[float]) -> float | None:
    """Geometric over arithmetic mean of a version's latest scores; None for fewer than 20.

    In (0, 1]: 1 when all are equal, falling as some answers become much worse than the others.
    With small relative spread s it is about 1 - s^2 / 2.

    Args:
        scores: each above 0.
    """
    values = np.asarray(list(scores), dtype=np.float64)
    if values.size < _FEWEST_FOR_STABILITY:
        return None
    # Rounding may put equal scores a last digit above their own mean.
    return min(1.0, math.exp(float(np.log(values).mean())) / float(values.mean()))


def _mean_logprob(logprobs: Sequence[float]) -> float | None:
    if not logprobs:
        return None
    for position, value in enumerate(logprobs):
        if not value <= 1e-3:  # rounding in a low precision may leave a little above 0
            raise DataError(f"log-probability {position} is {value}; it must be 0 or less")
    return min(0.0, math.fsum(logprobs) / len(logprobs))


def _distinct_share(choice: FinishedChoice) -> float:
    pieces: Sequence[int | str] = choice.tokens or choice.text.split()
    count = len(pieces) - _GRAM + 1
    if count < 1:
        return 1.0
    grams = {tuple(pieces[start : start + _GRAM]) for start in range(count)}
    return len(grams) / count
