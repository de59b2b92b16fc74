"""The `[guard]` table of a recipe: what is done about a run that goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from gmpo.task_config import Table

__all__ = ["BASELINE_ROUNDS", "GuardConfig"]

BASELINE_ROUNDS = 20
"""Rounds that a drift is measured from; 80 optimizer steps with 4 a round."""
_DRIFT_ROUNDS = 10
"""Rounds that the largest change takes to be told as a drift, about."""


class GuardConfig(Table):
    """What is done about a run that goes wrong."""

    mode: Literal["off", "warn", "stop", "mend"] = "warn"
    """off judges nothing; warn notes each alarm and writes it to events.jsonl; stop does that too,
    and ends the run after a checkpoint when an alarm is critical; mend goes back to a checkpoint
    from before the trouble instead, and on from there with a smaller step size or a narrower
    clip."""
    skip_steps: bool = False
    """Whether an optimizer step is left out whose loss or gradient norm is not finite, or whose
    norm is far above those of the steps before it. Each is counted, and an event."""
    learning_rate_factor: float = Field(default=0.5, gt=0, le=1)
    """With mode = "mend": the first roll-back multiplies `training.learning_rate` by this, the
    second besides by its square, the third by its cube, and so on: 1/2, 1/8, 1/64; 1 leaves it."""
    clip_factor: float = Field(default=1.0, gt=0, le=1)
    """With mode = "mend": every roll-back multiplies the clip's half-widths by this; 1 leaves
    them."""
    most_rollbacks: int = Field(default=3, ge=1)
    """With mode = "mend": roll-backs after which a critical alarm ends the run, as stop does."""

    @model_validator(mode="after")
    def _skips_are_events(self) -> GuardConfig:
        if self.skip_steps and self.mode == "off":
            raise ValueError(
                "skip_steps = true writes an event for each step left out, and mode = 'off' writes "
                "none; take mode = 'warn' or skip_steps = false"
            )
        return self

    @model_validator(mode="after")
    def _factors_of_mending(self) -> GuardConfig:
        of_mending = {
            "learning_rate_factor": self.learning_rate_factor,
            "clip_factor": self.clip_factor,
            "most_rollbacks": self.most_rollbacks,
        }
        for key, value in of_mending.items():
            if not self.mends and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} = {value} works with mode = 'mend' only, got mode = {self.mode!r}; set "
                    "that or remove it"
                )
        return self

    @property
    def mends(self) -> bool:
        """Whether a critical alarm sends the run back to a checkpoint."""
        return self.mode == "mend"

    def notes(self, *, rounds: int) -> Iterator[str]:
        """What a run of so many rounds hardly means by this table, a sentence each."""
        enough = BASELINE_ROUNDS + _DRIFT_ROUNDS
        if self.mode != "off" and rounds <= enough:
            yield (
                f"guard.mode is {self.mode!r} and the run has {rounds} rounds: an alarm about a "
                f"drift needs a baseline of {BASELINE_ROUNDS} and a change that lasts about "
                f"{_DRIFT_ROUNDS} more, so hardly one can come; bounds of single rounds and of "
                f"evaluations hold; train for more than {enough} if that is not meant"
            )

    def deciding(self) -> GuardConfig:
        """This table with all at its default that cannot change the weights of a run."""
        return self if self.mends else GuardConfig(skip_steps=self.skip_steps)
