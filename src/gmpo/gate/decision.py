"""The gate before a release: is the candidate no worse than the champion, and can that be said?

Both models answer the same items, so the test is paired. With d the candidate's success minus the
champion's on an item, and the margin m a drop that would still be borne, the question is whether

    mean d > -m                                       non-inferiority, one-sided at level alpha

Three answers. *pass*: a drop as large as the margin is ruled out over all items together, and a
drop of `suite_factor` margins on every single suite. *fail*: some drop is shown, by a test of mean
d < 0 corrected by Holm over the suites and the whole, and the margin is not ruled out there; or a
safety limit or guardrail is shown to be broken. *inconclusive*: neither, which is never a pass; the
decision says how many items would decide it.

Many updates may each lose less than the margin and so lose much together. `with_anchor` holds the
candidate against an earlier version too, by the same margins.

A pass asks all its questions at once, so none of them needs a correction (any one of them alone
keeps a bad model out at level alpha); a fail may come from any, so they are corrected.

Dimensions: **N** items of a suite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import bdtr, betaincinv, ndtri, stdtr, stdtrit

from gmpo.errors import ConfigError
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import (
    AnchorResult,
    AnchorSuites,
    GateDecision,
    Guardrail,
    GuardrailResult,
    PairedSuite,
    SafetyCount,
    SafetyResult,
    SuiteResult,
    Verdict,
)
from gmpo.statistics import MOST_PAIRS, holm, sign_flip_p_value

__all__ = ["decide_gate", "drop_p_value", "with_anchor"]

_POWER = 0.8
"""Chance of a pass at which the needed number of items is stated, if nothing has changed."""
_OVERALL = "overall"

_Row = SuiteResult | SafetyResult | GuardrailResult


def decide_gate(
    suites: Sequence[PairedSuite],
    *,
    policy: GatePolicy,
    champion: str,
    candidate: str,
    safety: Sequence[SafetyCount] = (),
    guardrails: Sequence[Guardrail] = (),
) -> GateDecision:
    """Whether a candidate may take the champion's place.

    Args:
        suites: both models' outcomes, item by item.
        policy: margins, levels and limits.
        champion: version that serves.
        candidate: version that would.
        safety: counts of the candidate on the safety sets. Sets that the policy limits and that
            were not asked leave the gate inconclusive.
        guardrails: latency and length of both models.

    Raises:
        ConfigError: there are no suites, two have one name or share items, or a safety set or
            guardrail has no limit in the policy.
    """
    _require_sound(suites)
    rows = _suite_results(suites, policy)
    kept = [_safety_result(count, policy) for count in safety]
    kept += [_not_asked(name, policy) for name in policy.safety_limits if name not in _names(kept)]
    grown = [_guardrail_result(guardrail, policy) for guardrail in guardrails]
    decided = GateDecision(
        outcome="inconclusive",
        champion=champion,
        candidate=candidate,
        sentence="",
        overall=rows[0],
        suites=tuple(rows[1:]),
        safety=tuple(kept),
        guardrails=tuple(grown),
        policy=policy.model_dump(mode="json"),
    )
    return _concluded(decided)


def with_anchor(decision: GateDecision, anchor: AnchorSuites) -> GateDecision:
    """The decision, with the candidate held against an earlier version too.

    The margins are those of the decision. Drops are corrected by Holm among the anchor's rows.

    Args:
        decision: about the candidate and the champion.
        anchor: outcomes of the earlier version and of the candidate on the same items.

    Raises:
        ConfigError: there are no suites, or two have one name or share items.
    """
    _require_sound(anchor.suites)
    overall, *rows = _suite_results(anchor.suites, GatePolicy.model_validate(decision.policy))
    result = AnchorResult(versions=dict(anchor.versions), overall=overall, suites=tuple(rows))
    return _concluded(replace(decision, anchor=result))


def _concluded(decided: GateDecision) -> GateDecision:
    """The decision with the outcome that all its rows make, and its sentence."""
    verdicts = {row.verdict for _, row in _rows(decided)}
    outcome: Verdict = "pass"
    if "fail" in verdicts:
        outcome = "fail"
    elif "inconclusive" in verdicts:
        outcome = "inconclusive"
    decided = replace(decided, outcome=outcome)
    return replace(decided, sentence=_sentence(decided))


def _rows(decided: GateDecision) -> Iterator[tuple[str, _Row]]:
    """Every row with what it is held against, where that is not the champion or a limit.

    A suite that is the only one is not told twice.
    """
    for row in _suite_rows(decided.overall, decided.suites):
        yield "", row
    if decided.anchor is not None:
        against = f"against anchor {', '.join(sorted(set(decided.anchor.versions.values())))}, "
        for row in _suite_rows(decided.anchor.overall, decided.anchor.suites):
            yield against, row
    limited: list[_Row] = [*decided.safety, *decided.guardrails]
    yield from (("", other) for other in limited)


def _suite_rows(overall: SuiteResult, suites: Sequence[SuiteResult]) -> list[SuiteResult]:
    return [overall, *(suites if len(suites) > 1 else ())]


def _names(results: Sequence[SafetyResult]) -> set[str]:
    return {result.name for result in results}


def _require_sound(suites: Sequence[PairedSuite]) -> None:
    if not suites:
        raise ConfigError("the gate has no suite to judge by; give at least one")
    names = [suite.suite for suite in suites]
    if len(set(names)) < len(names) or _OVERALL in names:
        raise ConfigError(f"suites {names} must have names of their own, none of them 'overall'")
    ids = [item for suite in suites for item in set(suite.items)]
    if len(set(ids)) < len(ids):
        twice = sorted({item for item in ids if ids.count(item) > 1})[:3]
        raise ConfigError(f"items {twice} stand in two suites; each counts once")


def _suite_results(suites: Sequence[PairedSuite], policy: GatePolicy) -> list[SuiteResult]:
    """All items together, then each suite; with one suite these are one question."""
    whole = PairedSuite(
        suite=_OVERALL,
        champion=np.concatenate([suite.champion for suite in suites]),
        candidate=np.concatenate([suite.candidate for suite in suites]),
        samples=min(suite.samples for suite in suites),
    )
    asked = [(whole, policy.degradation_limit)]
    if len(suites) == 1:
        asked.append((suites[0], policy.degradation_limit))
    else:
        asked += [(suite, policy.degradation_limit * policy.suite_factor) for suite in suites]
    drops = [drop_p_value(suite) for suite, _ in asked]
    corrected = [drops[0]] * 2 if len(suites) == 1 else holm(drops)
    return [
        _suite_result(suite, margin, drop_p, policy)
        for (suite, margin), drop_p in zip(asked, corrected, strict=True)
    ]


def _suite_result(
    suite: PairedSuite, margin: float, drop_p: float, policy: GatePolicy
) -> SuiteResult:
    difference = float((suite.candidate - suite.champion).mean())
    count = len(suite.champion)
    half = float(stdtrit(max(count - 1, 1), 1 - policy.alpha)) * _error(suite, margin)
    worse_p = _worse_by_margin_p(suite, margin)
    verdict: Verdict = "inconclusive"
    if worse_p < policy.alpha and count >= policy.min_items:
        verdict = "pass"
    elif drop_p < policy.alpha:
        verdict = "fail"
    return SuiteResult(
        suite=suite.suite,
        num_items=count,
        samples=suite.samples,
        champion=float(suite.champion.mean()),
        candidate=float(suite.candidate.mean()),
        difference=difference,
        low=difference - half,
        high=difference + half,
        margin=margin,
        worse_by_margin_p=worse_p,
        drop_p=drop_p,
        items_needed=max(_items_needed(suite, margin, policy.alpha), policy.min_items),
        verdict=verdict,
    )


def _variance(suite: PairedSuite, margin: float) -> float:
    """Variance of an item's difference, not below what a drop of the margin implies.

    Were a share m of the items lost, the variance would be m - m^2, however often each item is
    asked. Without that floor a few items that all came out alike would prove anything.
    """
    differences = suite.candidate - suite.champion
    seen = float(differences.var(ddof=1)) if len(differences) > 1 else 1.0
    return max(seen, margin - margin**2)


def _error(suite: PairedSuite, margin: float) -> float:
    return math.sqrt(_variance(suite, margin) / len(suite.champion))


def _worse_by_margin_p(suite: PairedSuite, margin: float) -> float:
    """p of mean d = -margin against a larger one: a t test, and never below (1 - m)^N.

    That is how often N items show nothing at all of a share m of all items that was lost.
    """
    count = len(suite.champion)
    distance = float((suite.candidate - suite.champion).mean()) + margin
    p = float(stdtr(max(count - 1, 1), -distance / _error(suite, margin)))
    return max(p, (1 - margin) ** count)


def drop_p_value(suite: PairedSuite) -> float:
    """p of mean d = 0 against a smaller one, by the items that came out differently.

    Where all moved alike far, each wholly won or lost, that is McNemar's exact test: P(X <= won)
    of X ~ Binomial(won + lost, 1/2). Of shares all choices of signs are counted out (at most 40
    items), or a t test is made: it would call 3 lost and none won of 40 items a drop at level 0.05,
    where the exact p is 0.125.
    """
    differences = suite.candidate - suite.champion
    moved = differences[differences != 0]
    if len(np.unique(np.abs(moved))) <= 1:
        return float(bdtr((moved > 0).sum(), len(moved), 0.5))
    if len(moved) <= MOST_PAIRS:
        both_sides = sign_flip_p_value(moved.tolist())
        return both_sides / 2 if moved.sum() < 0 else 1.0
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return float(stdtr(len(differences) - 1, float(differences.mean()) / error))


def _items_needed(suite: PairedSuite, margin: float, alpha: float) -> int:
    """N at which an unchanged model passes with probability 0.8: (z_a + z_b)^2 var / m^2."""
    reach = float(ndtri(1 - alpha) + ndtri(_POWER))
    return math.ceil(reach**2 * _variance(suite, margin) / margin**2)


def _safety_result(count: SafetyCount, policy: GatePolicy) -> SafetyResult:
    limit = policy.safety_limits.get(count.name)
    if limit is None:
        raise ConfigError(
            f"safety set {count.name!r} has no limit; the policy limits "
            f"{', '.join(policy.safety_limits) or 'none'}: add safety_limits.{count.name}"
        )
    bad, all_asked = count.num_violations, count.num_prompts
    upper = (
        1.0 if bad == all_asked else float(betaincinv(bad + 1, all_asked - bad, 1 - policy.alpha))
    )
    lower = 0.0 if bad == 0 else float(betaincinv(bad, all_asked - bad + 1, policy.alpha))
    verdict: Verdict = "inconclusive"
    if lower > limit:
        verdict = "fail"
    elif upper <= limit and count.num_prompts >= policy.min_safety_prompts:
        verdict = "pass"
    return SafetyResult(
        name=count.name,
        num_prompts=count.num_prompts,
        num_violations=bad,
        upper=upper,
        lower=lower,
        limit=limit,
        prompts_needed=_prompts_needed(limit, policy, num_violations=bad),
        verdict=verdict,
        strata=dict(count.strata),
    )


def _not_asked(name: str, policy: GatePolicy) -> SafetyResult:
    return SafetyResult(
        name=name,
        num_prompts=0,
        num_violations=0,
        upper=1.0,
        lower=0.0,
        limit=policy.safety_limits[name],
        prompts_needed=_prompts_needed(policy.safety_limits[name], policy, num_violations=0),
        verdict="inconclusive",
    )


def _prompts_needed(limit: float, policy: GatePolicy, *, num_violations: int) -> int:
    """Smallest n at which so many violations keep the upper bound within the limit.

    They do if P(X <= violations) <= alpha for X ~ Binomial(n, limit), which falls with n.
    """
    low, high = num_violations, num_violations + 1
    while bdtr(num_violations, high, limit) > policy.alpha:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = bdtr(num_violations, middle, limit) <= policy.alpha
        low, high = (low, middle) if enough else (middle, high)
    return max(high, policy.min_safety_prompts)


def _guardrail_result(guardrail: Guardrail, policy: GatePolicy) -> GuardrailResult:
    limit = policy.growth_limits.get(guardrail.name)
    if limit is None:
        raise ConfigError(
            f"guardrail {guardrail.name!r} has no limit; the policy limits "
            f"{', '.join(policy.growth_limits) or 'none'}: add growth_limits.{guardrail.name}"
        )
    logs = np.log(guardrail.candidate) - np.log(guardrail.champion)
    num_pairs = len(logs)
    if guardrail.wave is not None:
        logs = np.array([logs[guardrail.wave == one].mean() for one in np.unique(guardrail.wave)])
    half = float(stdtrit(len(logs) - 1, 1 - policy.alpha)) * float(logs.std(ddof=1))
    half /= math.sqrt(len(logs))
    center = float(logs.mean())
    upper, lower = math.exp(center + half), math.exp(center - half)
    verdict: Verdict = "inconclusive"
    # A few pairs that came out alike have no spread, and prove nothing: of fewer than these, all
    # would be beyond the limit by chance more often than alpha.
    if lower > limit and 0.5 ** len(logs) < policy.alpha:
        verdict = "fail"
    elif upper <= limit and num_pairs >= policy.min_items:
        verdict = "pass"
    return GuardrailResult(
        name=guardrail.name,
        num_pairs=num_pairs,
        pairs_needed=policy.min_items,
        growth=math.exp(center),
        upper=upper,
        lower=lower,
        limit=limit,
        verdict=verdict,
    )


def _sentence(decided: GateDecision) -> str:
    """What was decided, and what by."""
    overall = decided.overall
    seen = (
        f"{overall.difference * 100:+.1f} points ({overall.low * 100:+.1f} to "
        f"{overall.high * 100:+.1f}) on {overall.num_items} items"
    )
    if decided.outcome == "pass":
        anchored = ", against the anchor too," if decided.anchor is not None else ","
        return (
            f"pass: {seen}; a drop of {overall.margin * 100:g} points is ruled out{anchored} "
            "and every other limit is kept"
        )
    told = [f"{of}{_told(row)}" for of, row in _rows(decided) if row.verdict == decided.outcome]
    return f"{decided.outcome}: {seen}; " + "; ".join(told)


def _told(row: _Row) -> str:
    if isinstance(row, SuiteResult):
        if row.verdict == "fail":
            return f"{row.suite}: a drop is shown (p {row.drop_p:.2g})"
        return (
            f"{row.suite}: a drop of {row.margin * 100:g} points is not ruled out by "
            f"{row.num_items} items; about {row.items_needed} would do"
        )
    if isinstance(row, SafetyResult):
        if not row.num_prompts:
            return f"{row.name}: not asked; at least {row.prompts_needed} prompts are needed"
        wanted = f"the limit is {row.limit:.1%}"
        if row.verdict == "inconclusive":
            wanted += f", and at least {row.prompts_needed} prompts are needed"
            wanted += ", without another violation" if row.num_violations else ""
        bound = f"at least {row.lower:.1%}" if row.verdict == "fail" else f"up to {row.upper:.1%}"
        return f"{row.name}: {row.num_violations} of {row.num_prompts}, so {bound}; {wanted}"
    told = f"{row.name}: grown {row.growth:.2f} times (up to {row.upper:.2f}); limit {row.limit:g}"
    if row.verdict == "inconclusive" and row.num_pairs < row.pairs_needed:
        told += f", and at least {row.pairs_needed} answers are needed, not {row.num_pairs}"
    return told
