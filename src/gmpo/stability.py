"""How steady one training run was: the article's stability figures, from the run's own log.

A round's first step is on-policy: every ratio is 1 and the loss is near 0, whatever the objective.
Figures of ratios and clips are therefore means over the *later* steps of each round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "FIGURES",
    "Figure",
    "RunFigures",
    "common_target",
    "has_collapsed",
    "run_figures",
    "window_rounds",
]

_Line = Mapping[str, Any]

_COLLAPSE_WINDOW = 10
_COLLAPSE_STANDARD_ERRORS = 3.0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a run, and how objectives are compared by it.

    Attributes:
        title: in words.
        unit: of its value.
        better: which side is the steadier or the more successful one, if there is one.
        compared: by difference, or by ratio where the figure is positive and its scale arbitrary.
        formula: how it comes from the log.
    """

    title: str
    unit: str
    better: Literal["lower", "higher", "neither"]
    compared: Literal["difference", "ratio"]
    formula: str


FIGURES: Mapping[str, Figure] = {
    "loss_variance": Figure(
        title="loss variance",
        unit="loss²",
        better="lower",
        compared="ratio",
        formula="sample variance of update/loss over the steps that had a live row",
    ),
    "gradient_norm_deviation": Figure(
        title="gradient-norm std",
        unit="",
        better="lower",
        compared="ratio",
        formula="sample standard deviation of update/gradient_norm, before clipping, over the same "
        "steps",
    ),
    "log_ratio_range": Figure(
        title="log-ratio range",
        unit="nats",
        better="lower",
        compared="ratio",
        formula="log of the run's largest over its smallest importance ratio of any token",
    ),
    "rounds_to_target": Figure(
        title="rounds to target",
        unit="rounds",
        better="lower",
        compared="ratio",
        formula="first round at which the mean reward of the window that ends there reaches the "
        "target",
    ),
    "log_ratio_spread": Figure(
        title="log-ratio q01 to q99",
        unit="nats",
        better="lower",
        compared="difference",
        formula="mean over later steps of ratio/log_q99 - ratio/log_q01",
    ),
    "log_ratio_q01": Figure(
        title="log-ratio q01",
        unit="nats",
        better="neither",
        compared="difference",
        formula="mean over later steps of ratio/log_q01",
    ),
    "log_ratio_q99": Figure(
        title="log-ratio q99",
        unit="nats",
        better="neither",
        compared="difference",
        formula="mean over later steps of ratio/log_q99",
    ),
    "am_gm_gap": Figure(
        title="AM-GM gap",
        unit="nats",
        better="lower",
        compared="difference",
        formula="mean over later steps of ratio/am_gm_gap",
    ),
    "clip_fraction": Figure(
        title="clipped tokens",
        unit="fraction",
        better="neither",
        compared="difference",
        formula="mean over later steps of clip/low_fraction + clip/high_fraction",
    ),
    "gradient_norm_variation": Figure(
        title="gradient norm, std / mean",
        unit="",
        better="lower",
        compared="difference",
        formula="gradient_norm_deviation over the mean norm of the same steps",
    ),
    "entropy_end": Figure(
        title="entropy at the end",
        unit="nats",
        better="neither",
        compared="difference",
        formula="mean of rollout/entropy over the last window",
    ),
    "kl_to_start": Figure(
        title="KL to the start",
        unit="nats",
        better="neither",
        compared="difference",
        formula="the last kl_ref/k3 measured (training.kl_ref_every), over all rollouts of the "
        "last step of its round",
    ),
    "reward_end": Figure(
        title="reward at the end",
        unit="",
        better="higher",
        compared="difference",
        formula="mean of rollout/reward over the last window",
    ),
    "held_out_end": Figure(
        title="held-out after training",
        unit="",
        better="higher",
        compared="difference",
        formula="greedy evaluation after training",
    ),
}
"""By name; the first four are the article's."""

_Crash = Literal["diverged", "collapsed"]


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """A run's figures by name of `FIGURES`; None is one that was not measured or does not exist.

    Attributes:
        values: by figure.
        ratio_min: smallest importance ratio of any token in any step, before the clip.
        ratio_max: the largest.
        rounds_done: rounds that finished.
        crash: "diverged" if a value that counts became non-finite and training ended, "collapsed"
            if the reward did (`has_collapsed`), None for neither.
        could_collapse: whether the run was long enough for a collapse to be told.
    """

    values: Mapping[str, float | None]
    ratio_min: float | None
    ratio_max: float | None
    rounds_done: int
    crash: _Crash | None
    could_collapse: bool


def run_figures(  # noqa: PLR0913 - all by keyword, and each is its own concern
    lines: Sequence[_Line],
    *,
    start: float | None = None,
    held_out_end: float | None,
    target: float | None,
    rounds: int,
    steps_per_round: int,
    diverged: bool,
) -> RunFigures:
    """The figures of a run.

    Args:
        lines: of its `metrics.jsonl`.
        start: a reward that the untrained policy earns at least, for `has_collapsed`; None where
            it is not known.
        held_out_end: greedy accuracy or reward after training.
        target: reward that `rounds_to_target` waits for; None for no target.
        rounds: that the recipe asks for.
        steps_per_round: optimizer steps of each.
        diverged: training ended because a value was not finite, or because the guard gave up.
    """
    of_rounds = [line for line in lines if line["kind"] == "round"]
    live = [line for line in lines if line["kind"] == "step" and "ratio/max" in line]
    later = [line for line in live if (line["step"] - 1) % steps_per_round]
    window = window_rounds(rounds)
    rewards = _column(of_rounds, "rollout/reward")
    norms = _column(live, "update/gradient_norm")
    deviation = _deviation(norms)
    low, high = _extreme(live, "ratio/min", min), _extreme(live, "ratio/max", max)
    quantile_01, quantile_99 = _mean_of(later, "ratio/log_q01"), _mean_of(later, "ratio/log_q99")
    clipped = [line["clip/low_fraction"] + line["clip/high_fraction"] for line in later]
    divergences = _column(of_rounds, "kl_ref/k3")
    collapse = has_collapsed(rewards, start=start)
    values = {
        "loss_variance": _square(_deviation(_column(live, "update/loss"))),
        "gradient_norm_deviation": deviation,
        "log_ratio_range": _log_range(low, high),
        "rounds_to_target": _first_reach(rewards, target=target, window=window),
        "log_ratio_spread": _subtract(quantile_99, quantile_01),
        "log_ratio_q01": quantile_01,
        "log_ratio_q99": quantile_99,
        "am_gm_gap": _mean_of(later, "ratio/am_gm_gap"),
        "clip_fraction": _mean(clipped),
        "gradient_norm_variation": _divide(deviation, _mean(norms)),
        "entropy_end": _mean(_column(of_rounds, "rollout/entropy")[-window:]),
        "kl_to_start": divergences[-1] if divergences else None,
        "reward_end": _mean(rewards[-window:]),
        "held_out_end": held_out_end,
    }
    return RunFigures(
        values=values,
        ratio_min=low,
        ratio_max=high,
        rounds_done=len(of_rounds),
        crash="diverged" if diverged else "collapsed" if collapse else None,
        could_collapse=collapse is not None,
    )


def window_rounds(rounds: int) -> int:
    """Rounds over which a run's rewards are averaged: a quarter of the run, between 1 and 10."""
    return max(1, min(10, rounds // 4))


def common_target(runs: Sequence[Sequence[float]], *, rounds: int) -> float | None:
    """Half of the way from the first rewards to the last, over all runs of a study alike.

    It favours no objective, because every run has the same part in it. None if the rewards did not
    rise, so that there is no way to be half of.

    Args:
        runs: each run's reward of every round.
        rounds: that the recipe asks for.
    """
    window = window_rounds(rounds)
    first = _mean([reward for rewards in runs for reward in rewards[:window]])
    last = _mean([reward for rewards in runs for reward in rewards[-window:]])
    if first is None or last is None or last <= first:
        return None
    return (first + last) / 2


def has_collapsed(rewards: Sequence[float], *, start: float | None = None) -> bool | None:
    """Whether the reward fell and stayed down; None for a run too short to tell, under 20 rounds.

    B is the best mean of ten rounds in a row, E the mean of the last ten. Collapsed is
    B - E > |B| / 2 and B - E > 3 standard errors of that difference. For rewards from 0 up the
    first means: less than half of the best is left.

    Args:
        rewards: of every round.
        start: a reward that the untrained policy earns at least. Ten rounds of it are put before
            the first, so that a run that collapses in its first rounds has something to have fallen
            from, and ten rounds are enough to tell. None where it is not known: then a collapse
            within the first five rounds or so looks like a task that was never learned.
    """
    size = _COLLAPSE_WINDOW
    known = [*([] if start is None else [start] * size), *rewards]
    if len(known) < 2 * size:
        return None
    firsts = range(len(known) - size + 1)
    best = max((known[first : first + size] for first in firsts), key=statistics.fmean)
    end = known[-size:]
    top = statistics.fmean(best)
    fall = top - statistics.fmean(end)
    error = math.sqrt((statistics.variance(best) + statistics.variance(end)) / size)
    return fall > abs(top) / 2 and fall > _COLLAPSE_STANDARD_ERRORS * error


def _first_reach(rewards: Sequence[float], *, target: float | None, window: int) -> float | None:
    if target is None:
        return None
    for end in range(window, len(rewards) + 1):
        if statistics.fmean(rewards[end - window : end]) >= target:
            return float(end)
    return None


def _column(lines: Sequence[_Line], name: str) -> list[float]:
    """Figures of the lines that have one; a null was not finite."""
    return [line[name] for line in lines if line.get(name) is not None]


def _extreme(
    lines: Sequence[_Line], name: str, choose: Callable[[Sequence[float]], float]
) -> float | None:
    """None where a step's was not finite: the run's is then not known."""
    found = [line[name] for line in lines]
    return choose(found) if found and None not in found else None


def _log_range(low: float | None, high: float | None) -> float | None:
    if low is None or high is None or low <= 0:
        return None
    return math.log(high) - math.log(low)


def _mean_of(lines: Sequence[_Line], name: str) -> float | None:
    return _mean(_column(lines, name))


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _square(value: float | None) -> float | None:
    return None if value is None else value * value


def _subtract(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _divide(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by
