"""Answers gathered and judged: their quality score, and how steady each version's scores are."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from gmpo.errors import ConfigError
from gmpo.serving.backend import AnswerReport, Chunk, GenerationRequest
from gmpo.serving.calibration import load_calibration
from gmpo.serving.quality import (
    COMPONENTS,
    DEFAULT_FLOOR,
    DEFAULT_WEIGHTS,
    FinishedChoice,
    QualityScore,
    quality_score,
    stability,
)
from gmpo.serving.verifying import AnswerVerifier, GradedTask, graded_task
from gmpo.task_config import Table

__all__ = ["AnswerJudge", "QualityRules", "QualitySettings", "Tally"]

_LATEST = 200
_MOST_VERSIONS = 32


class QualitySettings(Table):
    """How answers are scored, and what follows from a low score."""

    mode: Literal["observe", "buffered"] = "observe"
    """`observe` scores answers once they are over; `buffered` holds each back until it is scored,
    and asks the next backend for another one if the score is below the threshold. A stream then
    begins when the whole answer is there."""
    calibration: str | None = None
    """File that `gmpo quality` wrote: threshold, weights and floor."""
    threshold: float | None = Field(default=None, gt=0, le=1)
    """Scores below it are low; in place of `calibration`."""
    weights: dict[str, float] | None = None
    """By component (`probability`, `distinct`, `terminated`, `verified`), 0 or more; one left out
    has 0. None takes those of the calibration, or else 1, 1, 1 and 2."""
    floor: float | None = Field(default=None, gt=0, lt=1)
    """Floor f of the geometric mean, which maps a component c to f + (1 - f) c; None takes the
    calibration's, or else 0.05."""
    verify: bool = False
    """Whether an answer to a request with `metadata.reference` is graded against it."""
    task: str | None = None
    """Recipe, or run folder, whose task's own scorer grades answers instead, to requests whose
    `metadata` names an `item` of it or has what the scorer needs."""

    @model_validator(mode="after")
    def _one_threshold(self) -> QualitySettings:
        own = {"threshold": self.threshold, "weights": self.weights, "floor": self.floor}
        beside = [name for name, value in own.items() if value is not None]
        beside = [] if self.calibration is None else beside
        if beside:
            raise ValueError(f"{beside[0]} comes with the calibration already; leave one of them")
        if self.mode == "buffered" and self.calibration is None and self.threshold is None:
            raise ValueError(
                "mode 'buffered' needs to know which scores are low; give calibration (of gmpo "
                "quality) or threshold"
            )
        unknown = sorted(set(self.weights or {}) - set(COMPONENTS))
        if unknown:
            raise ValueError(f"weights.{unknown[0]} is no component; there are {list(COMPONENTS)}")
        if self.weights is not None and not (
            min(self.weights.values(), default=0) >= 0 and sum(self.weights.values()) > 0
        ):
            raise ValueError(
                f"weights are {self.weights}; none may be below 0, and one must be above"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class QualityRules:
    """`QualitySettings` with the calibration and the task read.

    Attributes:
        is_buffered: whether answers are held back until they are scored.
        threshold: scores below it are low; None where none is.
        weights: of each component.
        floor: of the geometric mean.
        verifies: whether answers are graded where the request brings what that needs.
        task: whose scorer grades them; None compares with the request's reference.
    """

    is_buffered: bool = False
    threshold: float | None = None
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    floor: float = DEFAULT_FLOOR
    verifies: bool = False
    task: GradedTask | None = None

    @classmethod
    def of(cls, settings: QualitySettings) -> QualityRules:
        """What the settings say.

        Raises:
            ConfigError: the calibration or the task's recipe cannot be read, or no single answer to
                the task can be graded.
            DataError: the task's items cannot be made or read.
        """
        threshold, weights, floor = settings.threshold, settings.weights, settings.floor
        if settings.calibration is not None:
            found = load_calibration(Path(settings.calibration))
            threshold, weights, floor = found.threshold, found.weights, found.floor
        if weights is not None:
            if set(weights) - set(COMPONENTS):
                raise ConfigError(
                    f"calibration {settings.calibration} weighs {sorted(weights)}, and components "
                    f"are {list(COMPONENTS)}; calibrate again with gmpo quality"
                )
            weights = {name: weights.get(name, 0.0) for name in COMPONENTS}
        return cls(
            is_buffered=settings.mode == "buffered",
            threshold=threshold,
            weights=weights or dict(DEFAULT_WEIGHTS),
            floor=DEFAULT_FLOOR if floor is None else floor,
            verifies=settings.verify or settings.task is not None,
            task=None if settings.task is None else graded_task(settings.task),
        )


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    tokens: list[int | str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class Tally:
    """What of an answer is scored, gathered while it is read; the echoed prompt is no part of it.

    Args:
        request: what was asked.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._choices = [_Choice() for _ in range(request.n)]
        self._sum, self._count = 0.0, 0
        self.model_version: str | None = None
        """Of the weights that answered, where the chunks tell it."""

    def add(self, chunk: Chunk) -> None:
        """Take in the next chunk."""
        self.model_version = chunk.model_version or self.model_version
        if chunk.is_echo:
            return
        choice = self._choices[chunk.index]
        choice.texts.append(chunk.text)
        choice.tokens += chunk.token_ids or [one.token for one in chunk.logprobs]
        known = [one.logprob for one in chunk.logprobs if one.logprob is not None]
        choice.logprobs += known
        self._sum, self._count = self._sum + sum(known), self._count + len(known)
        choice.finish_reason = chunk.finish_reason or choice.finish_reason

    @property
    def is_whole(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def mean_logprob(self) -> float | None:
        """Over the tokens of all choices, in nats."""
        return self._sum / self._count if self._count else None

    def choices(self) -> list[FinishedChoice]:
        """Each completion as far as it came."""
        return [
            FinishedChoice(
                text="".join(one.texts),
                tokens=tuple(one.tokens),
                logprobs=tuple(one.logprobs),
                finish_reason=one.finish_reason,
            )
            for one in self._choices
        ]


class AnswerJudge:
    """Scores answers, and remembers each version's latest scores.

    Args:
        rules: weights, threshold, and whether answers are verified.
    """

    def __init__(self, rules: QualityRules) -> None:
        self.rules = rules
        self._latest: OrderedDict[str, deque[float]] = OrderedDict()
        self.counts: Counter[str] = Counter()
        """`verified` answers, and those `not_verified`; see `AnswerVerifier`."""
        self._verifier = AnswerVerifier(rules.task, self.counts) if rules.verifies else None

    async def judge(self, request: GenerationRequest, tally: Tally) -> QualityScore | None:
        """Score a whole answer; None where nothing was to be said."""
        if request.max_tokens == 0:
            return None
        choices = tally.choices()
        if self._verifier is not None:
            choices = await self._verifier.verified(request, choices)
        return quality_score(choices, weights=self.rules.weights, floor=self.rules.floor)

    def is_low(self, score: QualityScore | None) -> bool:
        """Whether a score is below the threshold."""
        threshold = self.rules.threshold
        return (
            threshold is not None
            and score is not None
            and score.score is not None
            and score.score < threshold
        )

    def enter(self, report: AnswerReport, tally: Tally, score: QualityScore | None) -> None:
        """Put a served answer's score into its report, and remember it for its version."""
        if score is None:
            return
        report.quality = score.score
        report.is_low_quality = self.is_low(score)
        report.quality_components = {
            name: value for name, value in score.components.items() if value is not None
        }
        report.mean_logprob = tally.mean_logprob
        latest = self._of_version(report.model_version or "")
        if score.score is not None:
            latest.append(score.score)
        report.stability = stability(latest)

    def close(self) -> None:
        """End what grades."""
        if self._verifier is not None:
            self._verifier.close()

    def _of_version(self, version: str) -> deque[float]:
        latest = self._latest.setdefault(version, deque(maxlen=_LATEST))
        self._latest.move_to_end(version)
        if len(self._latest) > _MOST_VERSIONS:
            self._latest.popitem(last=False)
        return latest
