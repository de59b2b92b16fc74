"""What is no fair comparison: recipes, seeds and overrides that a study refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.guard_config import GuardConfig

__all__ = [
    "CLIPS",
    "FEWEST_STEPS",
    "guard_fault",
    "refuse_overrides",
    "require_comparable",
    "require_seeds",
    "require_target",
]

CLIPS = ("clip_low", "clip_high", "clip_negative_high")
"""Keys of an objective whose unit is the objective's own."""

FEWEST_STEPS = 4
"""Optimizer steps of a round."""

_MOST_SEEDS = 40


def refuse_overrides(overrides: Sequence[str]) -> None:
    """Keep the overrides of all arms off what belongs to the study or to one arm.

    Raises:
        ConfigError: one of them sets such a key.
    """
    reasons = {
        "training.seed": "--seeds says which seeds there are",
        "objective.name": "--objectives says which objectives are compared",
        **{
            f"objective.{clip}": "its unit differs by objective; set it for one arm with "
            f"--set-for LABEL:objective.{clip}=..."
            for clip in CLIPS
        },
    }
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in reasons:
            raise ConfigError(f"--set {override!r} is not for a study: {reasons[key]}")


def require_comparable(base: RunConfig) -> None:
    """Keep out recipes whose runs are no pairs, or whose figures would hide what is counted.

    Raises:
        ConfigError: the recipe is one.
    """
    steps = base.training.steps_per_round
    if steps < FEWEST_STEPS:
        raise ConfigError(
            f"training.steps_per_round = {steps}: objectives are compared off-policy, with at "
            f"least {FEWEST_STEPS} optimizer steps a round; on a round's first step every ratio "
            "is 1 and GMPO's gradient is GRPO's"
        )
    if base.sampling.dynamic != "off":
        raise ConfigError(
            f"sampling.dynamic = {base.sampling.dynamic!r}: which prompts a round asks would "
            "depend on the arm's own rewards, and rounds would not be pairs; set it to 'off'"
        )
    fault = guard_fault(base.guard)
    if fault is not None:
        raise ConfigError(fault)


def guard_fault(guard: GuardConfig) -> str | None:
    """Why a study cannot have this guard, and the options that give it one; None if it can.

    "off" judges nothing and "warn" only notes; "stop" ends a run, which is a crash. The others
    change what is trained: a run that went back three times would count as one without a crash.
    """
    own, plain = guard.model_dump(), GuardConfig().model_dump()
    found, options = [], []
    if guard.mends:
        found.append("guard.mode = 'mend' takes a run back to before the trouble")
        options.append("guard.mode=warn")
        # These keys are refused without "mend".
        options += [
            f"guard.{key}={plain[key]:g}"
            for key in ("learning_rate_factor", "clip_factor", "most_rollbacks")
            if own[key] != plain[key]
        ]
    if guard.skip_steps:
        found.append("guard.skip_steps = true leaves steps out")
        options.append("guard.skip_steps=false")
    if not found:
        return None
    return (
        f"{' and '.join(found)}: crashes would not be counted, and figures would be of what the "
        "guard kept, which is no comparison of objectives; add "
        + " ".join(f"--set {option}" for option in options)
    )


def require_seeds(seeds: Sequence[int]) -> None:
    """Keep out seeds of which nothing could be told.

    Raises:
        ConfigError: one is named twice, or they are too few or too many.
    """
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {list(seeds)} name one twice; a repeated run is no second seed")
    if not 2 <= len(seeds) <= _MOST_SEEDS:
        raise ConfigError(
            f"a study needs 2 to {_MOST_SEEDS} seeds, got {len(seeds)}: with one nobody can tell "
            "a difference of objectives from one of luck; e.g. --seeds 0,1,2"
        )


def require_target(target_reward: float | None) -> None:
    """Keep out a target that no reward can be held against.

    Raises:
        ConfigError: it is not finite.
    """
    if target_reward is not None and not math.isfinite(target_reward):
        raise ConfigError(
            f"--target-reward {target_reward} must be a finite reward; leave it out for half-way "
            "from first to last rewards"
        )
