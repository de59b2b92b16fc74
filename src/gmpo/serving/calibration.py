"""Below which quality score to fall back: set by the share of good answers one is ready to lose."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gmpo.errors import ConfigError, DataError
from gmpo.recipe import settings_of
from gmpo.rewards.combination import floored_geometric_mean
from gmpo.serving.quality import COMPONENTS, DEFAULT_FLOOR, DEFAULT_WEIGHTS
from gmpo.store import Event
from gmpo.task_config import Table

__all__ = [
    "Calibration",
    "LabelledAnswer",
    "calibrate",
    "labelled_answers",
    "load_calibration",
    "save_calibration",
]

_LIKED = 0.5
"""Feedback from here up calls an answer right."""


@dataclass(frozen=True, kw_only=True)
class LabelledAnswer:
    """A held-out answer's components, and whether it was right; None where that is not known."""

    components: Mapping[str, float | None]
    is_right: bool | None


class Calibration(Table):
    """A threshold, how it was found, and what the score was worth on the held-out answers."""

    threshold: float
    """Scores below it fall back."""
    target_false_fallback: float
    """Share of good answers that may fall back, as asked for."""
    expected_false_fallback: float
    """Share of good answers like these that is expected below the threshold, at most the target."""
    false_fallback_upper: float
    """With 95 % confidence the share is not above this."""
    caught_share: float | None
    """Share of the wrong held-out answers below the threshold; None if none was known to be
    wrong."""
    correlation: float | None
    """Pearson correlation of score and truth; None unless right and wrong answers, with different
    scores, were there."""
    ranking: float | None
    """Probability that a right answer scores above a wrong one (ROC area); 0.5 is chance."""
    num_answers: int
    """Held-out answers."""
    num_right: int
    """Those known to be right."""
    num_wrong: int
    """Those known to be wrong."""
    weights: dict[str, float]
    """Weights of the score."""
    floor: float
    """Floor of the score."""


def calibrate(
    answers: Sequence[LabelledAnswer],
    *,
    target: float,
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    floor: float = DEFAULT_FLOOR,
) -> Calibration:
    """The threshold below which at most `target` of the good answers are expected to fall.

    Good answers are those known to be right; where no truth is known, all. Of their n scores the
    threshold is number k = floor(target (n + 1)) from below: a further good answer from the same
    traffic lies below it with probability at most k / (n + 1), whatever the scores' distribution.
    Its share among many has the distribution Beta(k, n + 1 - k), which gives the upper bound.

    The score is taken without "verified", which is the truth it is compared with. The threshold
    holds for requests with a reference too: a right answer only gains by being verified.

    Args:
        answers: held out, from the traffic and the model that the threshold is for.
        target: false-fallback rate, above 0 and below 1.
        weights: as for `quality_score`.
        floor: as for `quality_score`.

    Raises:
        ConfigError: the target, weights or floor are not allowed.
        DataError: too few good answers for the target, or an answer cannot be scored.
    """
    if not 0 < target < 1:
        raise ConfigError(f"target is {target}; a false-fallback rate lies between 0 and 1")
    scores = np.array([_blind_score(answer, weights, floor) for answer in answers])
    truths = [answer.is_right for answer in answers]
    right = scores[[truth is True for truth in truths]] if len(scores) else scores
    wrong = scores[[truth is False for truth in truths]] if len(scores) else scores
    is_known = len(right) + len(wrong) > 0
    good = np.sort(right if is_known else scores)
    rank = math.floor(target * (len(good) + 1) + 1e-9)  # 0.05 * 20 must not round below 1
    if rank < 1:
        needed = math.ceil(1 / target - 1 - 1e-9)
        raise DataError(
            f"{len(good)} good answers of {len(answers)} are too few for a false-fallback rate of "
            f"{target:g}; give at least {needed}, or allow a higher rate"
        )
    from scipy.stats import beta

    threshold = float(good[rank - 1])
    return Calibration(
        threshold=threshold,
        target_false_fallback=target,
        expected_false_fallback=rank / (len(good) + 1),
        false_fallback_upper=float(beta.ppf(0.95, rank, len(good) + 1 - rank)),
        caught_share=float((wrong < threshold).mean()) if len(wrong) else None,
        correlation=_correlation(right, wrong),
        ranking=_ranking(right, wrong),
        num_answers=len(answers),
        num_right=len(right),
        num_wrong=len(wrong),
        weights=dict(weights),
        floor=floor,
    )


def labelled_answers(events: Iterable[Event]) -> tuple[list[LabelledAnswer], dict[str, int]]:
    """Served answers out of a store's "answer" and "feedback" events, and what was left out.

    An answer is right or wrong as it was verified, or else as its last feedback says.

    Args:
        events: in any order.

    Returns:
        The answers, and counts of those that failed, fell back, or have no score.
    """
    liked: dict[str, tuple[float, bool]] = {}
    answers: list[Event] = []
    for event in events:
        if event.kind == "answer":
            answers.append(event)
        elif event.kind == "feedback" and event.request_id is not None:
            before = liked.get(event.request_id)
            if before is None or before[0] <= event.time:
                liked[event.request_id] = event.time, event.payload["score"] >= _LIKED
    found: list[LabelledAnswer] = []
    left_out: Counter[str] = Counter()
    for event in answers:
        components = event.payload.get("quality_components") or {}
        if event.payload.get("status") != 200:
            left_out["failed"] += 1
        elif event.payload.get("fell_back"):
            left_out["fell_back"] += 1
        elif not components:
            left_out["without_score"] += 1
        else:
            verified = components.get("verified")
            told = liked.get(event.request_id or "", (0.0, None))[1]
            found.append(
                LabelledAnswer(
                    components=components,
                    is_right=told if verified is None else verified == 1,
                )
            )
    return found, dict(left_out)


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it as JSON, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(calibration.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"calibration {path} cannot be written: {error.strerror}") from None


def load_calibration(path: Path) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        ConfigError: there is no such file, or it is not a calibration.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"calibration {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"calibration {path} is not UTF-8 text: {error}") from None
    return settings_of(Calibration, text, of=f"calibration {path}")


def _blind_score(answer: LabelledAnswer, weights: Mapping[str, float], floor: float) -> float:
    known = {name: answer.components.get(name) for name in COMPONENTS}
    components = {**known, "verified": None}
    score = floored_geometric_mean(components, weights, floor)
    if score is None:
        raise DataError(
            "an answer has no component with a weight, so it has no score; known are "
            f"{[name for name, value in components.items() if value is not None]}, weights are "
            f"{dict(weights)}"
        )
    return score


def _correlation(right: np.ndarray, wrong: np.ndarray) -> float | None:
    scores = np.concatenate([right, wrong])
    if not len(right) or not len(wrong) or np.ptp(scores) == 0:
        return None
    truths = np.concatenate([np.ones(len(right)), np.zeros(len(wrong))])
    return float(np.corrcoef(scores, truths)[0, 1])


def _ranking(right: np.ndarray, wrong: np.ndarray) -> float | None:
    if not len(right) or not len(wrong):
        return None
    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, side="left")
    not_above = np.searchsorted(ordered, right, side="right")
    return float(((below + not_above) / 2).mean() / len(wrong))
