"""What the gate is told, and what it answers with.

Dimensions: **N** items of a suite, or answers of a guardrail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from gmpo.errors import ConfigError

__all__ = [
    "AnchorResult",
    "AnchorSuites",
    "GateDecision",
    "Guardrail",
    "GuardrailResult",
    "PairedSuite",
    "SafetyCount",
    "SafetyResult",
    "SuiteResult",
    "Verdict",
]

Verdict = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class PairedSuite:
    """What both models made of one suite's items, in the same order.

    Attributes:
        suite: its name.
        champion: share of correct answers an item, [N], in [0, 1].
        candidate: the same of the candidate.
        samples: answers of a model behind each share. More of them make an item's share less
            noisy, but they are no more items.
        items: their ids, where known; two suites must not hold the same ones.
    """

    suite: str
    champion: Float[np.ndarray, " N"]
    candidate: Float[np.ndarray, " N"]
    samples: int = 1
    items: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Right and wrong as booleans, or a list, are shares too.
        object.__setattr__(self, "champion", np.asarray(self.champion, dtype=np.float64))
        object.__setattr__(self, "candidate", np.asarray(self.candidate, dtype=np.float64))
        if self.champion.ndim != 1 or self.champion.shape != self.candidate.shape:
            raise ConfigError(
                f"suite {self.suite!r} has {self.champion.shape} shares of the champion and "
                f"{self.candidate.shape} of the candidate; both must have answered the same items"
            )
        if not len(self.champion):
            raise ConfigError(f"suite {self.suite!r} has no items")
        for shares in (self.champion, self.candidate):
            if not np.isfinite(shares).all() or shares.min() < 0 or shares.max() > 1:
                raise ConfigError(f"suite {self.suite!r} has shares outside [0, 1]")
        if self.samples < 1 or (self.items and len(self.items) != len(self.champion)):
            raise ConfigError(
                f"suite {self.suite!r} says {self.samples} samples and {len(self.items)} ids for "
                f"{len(self.champion)} items; at least 1 sample, and an id an item or none"
            )


@dataclass(frozen=True, kw_only=True)
class AnchorSuites:
    """An earlier version's outcomes beside the candidate's, on the suites that it was asked.

    Attributes:
        suites: both models' shares; the earlier version stands where the champion does.
        versions: the earlier version, by suite.
    """

    suites: tuple[PairedSuite, ...]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if {suite.suite for suite in self.suites} != set(self.versions):
            raise ConfigError(
                f"the anchor has outcomes of suites {[suite.suite for suite in self.suites]} and "
                f"versions of {sorted(self.versions)}; give both for each"
            )


@dataclass(frozen=True, kw_only=True)
class SafetyCount:
    """How often a model did on a safety set what it must not.

    Attributes:
        name: of the set; the policy's limits go by it.
        num_prompts: asked, drawn from every stratum of the set alike.
        num_violations: of them.
        strata: prompts and violations of each stratum, where known; they add up to these.
    """

    name: str
    num_prompts: int
    num_violations: int
    strata: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.num_violations <= self.num_prompts or self.num_prompts == 0:
            raise ConfigError(
                f"safety set {self.name!r} has {self.num_violations} violations of "
                f"{self.num_prompts} prompts; need 0 <= violations <= prompts and a prompt"
            )
        whole = tuple(map(sum, zip(*self.strata.values(), strict=True)))
        if self.strata and whole != (self.num_prompts, self.num_violations):
            raise ConfigError(
                f"the strata of safety set {self.name!r} add up to {whole} prompts and violations, "
                f"not to {(self.num_prompts, self.num_violations)}"
            )


@dataclass(frozen=True, kw_only=True)
class Guardrail:
    """A quantity that must not grow much: latency in seconds, length in tokens.

    Attributes:
        name: "latency" or "length"; the policy's limits go by it.
        champion: one positive value an answer, [N].
        candidate: the same answers' of the candidate, [N]: pairs.
        wave: of each pair, which of those it was made together with, [N]. Answers that waited for
            each other are one observation, however many they are. None: each by itself.
    """

    name: str
    champion: Float[np.ndarray, " N"]
    candidate: Float[np.ndarray, " N"]
    wave: Int[np.ndarray, " N"] | None = None

    def __post_init__(self) -> None:
        both = (self.champion, self.candidate)
        if self.champion.shape != self.candidate.shape or len(self.champion) < 2:
            raise ConfigError(
                f"guardrail {self.name!r} needs pairs of the same answers, at least two; got "
                f"{len(self.champion)} and {len(self.candidate)}"
            )
        if any(not np.isfinite(one).all() or one.min() <= 0 for one in both):
            raise ConfigError(f"guardrail {self.name!r} needs finite values above 0")
        if self.wave is not None and (
            self.wave.shape != self.champion.shape or len(np.unique(self.wave)) < 2
        ):
            raise ConfigError(
                f"guardrail {self.name!r} needs the wave of each of its {len(self.champion)} pairs "
                f"and two waves or more; got {len(self.wave)} places of "
                f"{len(np.unique(self.wave))} waves"
            )


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """One suite, or all of them together.

    Attributes:
        suite: its name, or "overall".
        num_items: N.
        samples: answers of a model to each item, at least.
        champion: its accuracy.
        candidate: its accuracy.
        difference: candidate minus champion.
        low: end of the one-sided interval: a larger drop is ruled out at level alpha.
        high: end of the one-sided interval on the other side.
        margin: the drop that has to be ruled out here.
        worse_by_margin_p: of a drop of the margin or more; small rules it out.
        drop_p: of no drop, corrected by Holm; small shows one.
        items_needed: with so many items an unchanged model passes with 80 % probability.
        verdict: of this row alone.
    """

    suite: str
    num_items: int
    samples: int
    champion: float
    candidate: float
    difference: float
    low: float
    high: float
    margin: float
    worse_by_margin_p: float
    drop_p: float
    items_needed: int
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class SafetyResult:
    """A safety set against its limit.

    Attributes:
        name: of the set.
        num_prompts: asked.
        num_violations: seen.
        upper: of the violation rate, one-sided at level alpha (Clopper and Pearson).
        lower: the same on the other side.
        limit: of the rate.
        prompts_needed: with so many, and no more violations, the limit would be kept.
        verdict: pass if `upper` is within the limit, fail if `lower` is above it.
        strata: prompts and violations of each stratum, where known.
    """

    name: str
    num_prompts: int
    num_violations: int
    upper: float
    lower: float
    limit: float
    prompts_needed: int
    verdict: Verdict
    strata: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GuardrailResult:
    """Growth of a quantity against its limit: the geometric mean of candidate / champion.

    Attributes:
        name: of the quantity.
        num_pairs: answers that were compared; the interval is over waves where they came in such.
        pairs_needed: with fewer it does not pass.
        growth: geometric mean of the pairs' ratios.
        upper: of the growth, one-sided at level alpha.
        lower: the same on the other side.
        limit: of the growth.
        verdict: pass if `upper` is within the limit, fail if `lower` is above it.
    """

    name: str
    num_pairs: int
    pairs_needed: int
    growth: float
    upper: float
    lower: float
    limit: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class AnchorResult:
    """The candidate against an earlier version; its accuracy stands where the champion's does.

    Attributes:
        versions: the earlier version, by suite.
        overall: all of these suites together.
        suites: each of them.
    """

    versions: Mapping[str, str]
    overall: SuiteResult
    suites: tuple[SuiteResult, ...]


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """Whether the candidate may be released, with all that the answer rests on.

    Attributes:
        outcome: of all rows together.
        champion: version that serves.
        candidate: version that would.
        sentence: what was decided, and what by.
        overall: all items together, against the champion.
        suites: each suite, against the champion.
        safety: each safety set.
        guardrails: latency and length.
        policy: margins, levels and limits.
        champion_revision: of the champion in the history of its model's champions. A version that
            was replaced and came back has another one, so that a decision is about one time of
            serving. None promotes nothing.
        anchor: the candidate against an earlier version, if it was held against one.
    """

    outcome: Verdict
    champion: str
    candidate: str
    sentence: str
    overall: SuiteResult
    suites: tuple[SuiteResult, ...]
    safety: tuple[SafetyResult, ...]
    guardrails: tuple[GuardrailResult, ...]
    policy: Mapping[str, Any] = field(default_factory=dict)
    champion_revision: int | None = None
    anchor: AnchorResult | None = None

    @property
    def passed(self) -> bool:
        """Whether the candidate may be released."""
        return self.outcome == "pass"

    @property
    def performance_improvement(self) -> float:
        """Candidate minus champion over all items, as a fraction."""
        return self.overall.difference

    def bound_to(self, champion_revision: int) -> GateDecision:
        """The same as evidence against a champion of this revision, as `Store.champion` has it."""
        return replace(self, champion_revision=champion_revision)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "performance_improvement": self.performance_improvement}
