"""The alarms that there are, what is done about each, and the event that tells one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["RESPONSES", "Action", "GuardEvent", "Response", "Severity"]

Action = Literal["warn", "skip_step", "roll_back"]
Severity = Literal["warning", "critical"]


@dataclass(frozen=True, kw_only=True)
class Response:
    """What an alarm leads to, and what a person should do about its cause."""

    action: Action
    recommended_action: str


RESPONSES: Mapping[str, Response] = {
    "ratio_explosion": Response(
        action="roll_back",
        recommended_action="lower training.learning_rate, take fewer training.steps_per_round, or "
        "narrow objective.clip_low and clip_high",
    ),
    "gradient_growth": Response(
        action="roll_back", recommended_action="lower training.learning_rate or let it decay"
    ),
    "reward_drop": Response(
        action="roll_back",
        recommended_action="look at the texts before and after; lower training.learning_rate, or "
        "find out whether the reward function changed",
    ),
    "held_out_drop": Response(
        action="roll_back",
        recommended_action="find out what the reward pays for: read rollouts.jsonl since then; or "
        "lower training.learning_rate",
    ),
    "entropy_surge": Response(
        action="roll_back",
        recommended_action="lower training.learning_rate or add objective.kl_coefficient",
    ),
    "entropy_collapse": Response(
        action="warn",
        recommended_action="lower training.learning_rate or add a small "
        "objective.entropy_coefficient",
    ),
    "length_runaway": Response(
        action="warn",
        recommended_action="set reward.truncated = 'zero', or look for a reward that pays length",
    ),
    "dead_groups": Response(
        action="warn",
        recommended_action="take easier or harder items, raise sampling.group_size, or set "
        "sampling.dynamic = 'refill'",
    ),
    "sampler_mismatch": Response(
        action="roll_back",
        recommended_action="sampler and trainer do not run the same weights; report it",
    ),
    "weights_disturbed": Response(
        action="roll_back",
        recommended_action="find what writes into the policy's weights between rounds (a callback, "
        "a reward or rollout function); if nothing does, check the machine's memory",
    ),
    "reward_missing": Response(
        action="warn",
        recommended_action="read `error` in rollouts.jsonl: a reward function fails or returns NaN",
    ),
    "non_finite": Response(
        action="roll_back",
        recommended_action="lower training.learning_rate; go on from a checkpoint before it",
    ),
    "gradient_spike": Response(
        action="warn",
        recommended_action="a single one needs nothing; if they come again, look at the texts of "
        "these rounds, leave such steps out (guard.skip_steps = true), or lower "
        "training.learning_rate",
    ),
}
"""Every alarm there is; an optimizer step that was left out has the action `skip_step`."""


@dataclass(frozen=True, kw_only=True)
class GuardEvent:
    """One alarm with its evidence.

    Attributes:
        alarm: a key of `RESPONSES`.
        action: what is to be done now.
        round: in which it was raised.
        onset: round with which the trouble most likely began; a healthy checkpoint is older.
        metric: that shows it.
        value: of the metric, recent rounds together; None if there is no number.
        baseline: where it lay while healthy; None for a bound that needs none.
        threshold: that was passed.
        test: "bound", "Page-Hinkley" or "ADWIN"; "cumulative sum" only after a roll-back.
        recommended_action: for a person.
        step: optimizer step that it is about; None where it is about a round.
    """

    alarm: str
    action: Action
    round: int
    onset: int
    metric: str
    value: float | None
    baseline: float | None
    threshold: float | None
    test: str
    recommended_action: str
    step: int | None = None

    @property
    def severity(self) -> Severity:
        """Critical where going on from these weights is likely to waste the rest of the run."""
        return "critical" if self.action == "roll_back" else "warning"
