"""Figures of one run of the stability study, when it collapsed."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "DIGESTED",
    "collapse_round",
    "log_digest",
    "run_figures",
]

WINDOW = 10
"""Rounds over which rewards are averaged, and for which a fall must last to be a collapse."""
STANDARD_ERRORS = 3.0
END_ROUNDS = 30
"""Last rounds whose mean reward is the final one."""
_OF_BOTH = (
    *("kind", "round", "step", "kl_old/k1"),
    *("clip/high_fraction", "clip/low_fraction"),
    *("ratio/am_gm_gap", "ratio/effective_sample_fraction", "ratio/max", "ratio/min"),
    *("ratio/log_q01", "ratio/log_q50", "ratio/log_q99"),
    *("update/gradient_norm", "update/learning_rate", "update/live_rollouts", "update/loss"),
)
_OF_ROUNDS = (
    *("grading/scorer_errors_total", "grading/timeouts_total"),
    *("rollout/completion_tokens", "rollout/tokens", "rollout/given_tokens_fraction"),
    *("rollout/groups", "rollout/dead_groups", "rollout/trained_groups"),
    *("rollout/entropy", "rollout/errors_total", "rollout/truncated_fraction"),
    *("rollout/mismatch_max", "rollout/mismatch_mean", "rollout/old_from_sampler"),
    *("rollout/reward", "rollout/reward/correct", "rollout/reward_deviation/correct"),
    *("rollout/reward_absent_fraction/correct", "rollout/reward_errors_total/correct"),
)
DIGESTED = frozenset((*_OF_BOTH, *_OF_ROUNDS))
"""What a stored digest is of. A metric that gmpo logs since is not among it: it would make every
stored cell another one, though each number of it came out the same."""


def collapse_round(rewards: Sequence[float], *, start: float) -> int | None:
    """The first round, from 1, at which the reward has collapsed; None if it has not.

    At round t, B is the best mean of ten rounds in a row so far and E the mean of the last ten. The
    reward is down at t if B - E > B / 2 and B - E > 3 standard errors of that difference. It has
    collapsed once it was down at ten rounds in a row: no single bad batch of prompts counts.

    Args:
        rewards: of every round so far.
        start: the untrained policy's; ten rounds of it are put before the first, so that a run
            that collapses in its first rounds has something to have fallen from.
    """
    known = [*[start] * WINDOW, *rewards]
    means = [statistics.fmean(window) for window in _windows(known)]
    variances = [statistics.variance(window) for window in _windows(known)]
    best, down = 0, 0
    for last in range(WINDOW, len(means)):  # the two windows do not overlap
        best = max(best, last - WINDOW, key=lambda place: means[place])
        fall = means[best] - means[last]
        error = math.sqrt((variances[best] + variances[last]) / WINDOW)
        is_down = fall > means[best] / 2 and fall > STANDARD_ERRORS * error
        down = down + 1 if is_down else 0
        if down == WINDOW:
            return last
    return None


def run_figures(
    lines: Sequence[Mapping[str, Any]], *, steps_per_round: int, collapsed: bool
) -> dict[str, float | None]:
    """Figures of a run's `metrics.jsonl`.

    Steps count where they had a live row; ratio and clip figures are means over the *later* steps
    of each round, because the first one is on-policy whatever the objective.

    Args:
        lines: of the run, up to its collapse if it has one.
        steps_per_round: optimizer steps of each round.
        collapsed: whether the run ended so, and its final reward is that of its last ten rounds.
    """
    of_rounds = [line for line in lines if line["kind"] == "round"]
    live = [line for line in lines if line["kind"] == "step" and "ratio/max" in line]
    later = [line for line in live if (line["step"] - 1) % steps_per_round]
    rewards = column(of_rounds, "rollout/reward")
    norms = column(live, "update/gradient_norm")
    return {
        "reward_end": _mean(rewards[-(WINDOW if collapsed else END_ROUNDS) :]),
        "reward_best": max((statistics.fmean(w) for w in _windows(rewards)), default=None),
        "gradient_norm_deviation": _deviation(norms),
        "gradient_norm_mean": _mean(norms),
        "loss_variance": None if (s := _deviation(column(live, "update/loss"))) is None else s * s,
        "log_ratio_min": _log(min(column(live, "ratio/min"), default=None)),
        "log_ratio_max": _log(max(column(live, "ratio/max"), default=None)),
        "log_ratio_spread": _mean(
            [line["ratio/log_q99"] - line["ratio/log_q01"] for line in later]
        ),
        "am_gm_gap": _mean(column(later, "ratio/am_gm_gap")),
        "clip_fraction": _mean(
            [line["clip/low_fraction"] + line["clip/high_fraction"] for line in later]
        ),
        "kl_old_k1": _mean(column(later, "kl_old/k1")),
        "entropy_start": _mean(column(of_rounds, "rollout/entropy")[:WINDOW]),
        "entropy_end": _mean(column(of_rounds, "rollout/entropy")[-WINDOW:]),
    }


def log_digest(lines: Iterable[Mapping[str, Any]]) -> str:
    """Of all that `DIGESTED` names in each line, to the last digit."""
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        kept = {name: value for name, value in line.items() if name in DIGESTED}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def column(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Figures of the lines that have one; a null was not finite."""
    return [line[name] for line in lines if line.get(name) is not None]


def _windows(values: Sequence[float]) -> list[Sequence[float]]:
    return [values[start : start + WINDOW] for start in range(len(values) - WINDOW + 1)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _log(value: float | None) -> float | None:
    return math.log(value) if value else None
