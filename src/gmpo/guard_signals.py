"""How each alarm of the guard about a drift, or about one round, reads its metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gmpo.detectors import Direction

__all__ = ["SIGNALS", "TINY", "TRIAL_SIGNALS", "Signal"]

TINY = 1e-12
"""In place of anything smaller where a logarithm is taken."""
_TRIAL_SUM = 10.0
"""Threshold of Page's cumulative sum, which a stream that lies as before is above at any one time
with probability exp(-10) at most. The other drift tests follow the mean, and a shift of two
deviations after 20 rounds is lost on them.
"""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """How one alarm reads its metric.

    Attributes:
        metric: its name.
        direction: of a deviation that is bad.
        smallest_scale: of a baseline, in the transform's unit.
        effect: smallest recent deviation that matters, in the transform's unit.
        effect_scales: likewise, in baseline scales; the larger of the two counts.
        is_log: whether the transform is the logarithm, or nothing.
        beyond: bound on the metric itself that a drift has to pass besides.
        at_once: bound on the metric itself that a single round may not pass.
        summed: threshold of Page's cumulative sum, a third drift test; None for no such test.
        in_one_round: whether it takes no drift: each round is held against the baseline by itself,
            during warm-up against the rounds before it.
        follows_improvement: whether the baseline moves with a metric that gets better.
        unless_improved: whether it raises nothing where the reward has risen.
    """

    metric: str
    direction: Direction
    smallest_scale: float
    effect: float = 0.0
    effect_scales: float = 0.0
    is_log: bool = True
    beyond: float | None = None
    at_once: float | None = None
    summed: float | None = None
    in_one_round: bool = False
    follows_improvement: bool = False
    unless_improved: bool = False

    def read(self, metrics: Mapping[str, float | None]) -> float | None:
        """The metric's value in the transform's unit; None if it is not there or not finite."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return math.log(max(value, TINY)) if self.is_log else value

    def shown(self, value: float) -> float:
        """A value in the transform's unit as one of the metric."""
        return math.exp(value) if self.is_log else value


SIGNALS: Mapping[str, Signal] = {
    # Rewards of 0 and 1 are meant; the baseline moves up with the reward, never down.
    "reward_drop": Signal(
        metric="rollout/reward",
        direction="down",
        smallest_scale=0.02,
        effect_scales=3.0,
        is_log=False,
        follows_improvement=True,
    ),
    "entropy_surge": Signal(
        metric="rollout/entropy", direction="up", smallest_scale=0.15, effect=math.log(2)
    ),
    "entropy_collapse": Signal(
        metric="rollout/entropy",
        direction="down",
        smallest_scale=0.15,
        effect=math.log(10),
        unless_improved=True,
    ),
    "gradient_growth": Signal(
        metric="update/gradient_norm", direction="up", smallest_scale=0.3, effect=math.log(10)
    ),
    # Six deviations as for a step left out. The largest of 3,000 healthy rounds lay 3.4 above their
    # baseline, 2.7 times as high; ten times leaves room for tails heavier than theirs.
    "gradient_spike": Signal(
        metric="update/gradient_norm",
        direction="up",
        smallest_scale=0.3,
        effect=math.log(10),
        effect_scales=6.0,
        in_one_round=True,
    ),
    "ratio_explosion": Signal(
        metric="ratio/am_gm_gap",
        direction="up",
        smallest_scale=0.7,
        effect=math.log(10),
        beyond=0.1,
        at_once=1.0,
    ),
    "length_runaway": Signal(
        metric="rollout/completion_tokens",
        direction="up",
        smallest_scale=0.05,
        effect=math.log(1.5),
        unless_improved=True,
    ),
    # 0.005 nats is the largest mismatch at which the sampler's own log-probabilities are used.
    "sampler_mismatch": Signal(
        metric="rollout/mismatch_mean",
        direction="up",
        smallest_scale=1.0,
        effect=math.log(5),
        beyond=0.005,
        at_once=0.25,
    ),
}


TRIAL_SIGNALS: Mapping[str, Signal] = {
    **SIGNALS,
    "reward_drop": replace(SIGNALS["reward_drop"], effect_scales=1.5, summed=_TRIAL_SUM),
    # It grows with the square of the step size, which has been lowered.
    "ratio_explosion": replace(
        SIGNALS["ratio_explosion"], effect=math.log(3), beyond=None, summed=_TRIAL_SUM
    ),
}
"""After a roll-back: the trouble may go on in less, and a smaller step size moves ratios less."""
