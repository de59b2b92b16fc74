"""The `[tracking]` table of a recipe: what a run writes beside its metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gmpo.task_config import Table

__all__ = ["TrackingConfig"]


class TrackingConfig(Table):
    """What a run writes beside its metrics."""

    groups_per_round: int = Field(default=4, ge=0)
    """Groups of each round, spread over it up to the last, whose texts, rewards, advantages and
    ratios go to rollouts.jsonl."""
    to: tuple[Literal["trackio", "mlflow", "tensorboard", "wandb", "prometheus"], ...] = ()
    """Tools that get every row of metrics.jsonl besides; each needs the extra of its name (trackio:
    `track`, prometheus: `serve`). They write to this machine unless their own environment variables
    say otherwise."""
    project: str = Field(default="gmpo", min_length=1)
    """What trackers file the run under."""
    name: str | None = None
    """Name that trackers show; None takes the run folder's."""
    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """With "prometheus" in `to`: port on 127.0.0.1 at which the newest figures can be scraped while
    the run trains. None writes them to metrics.prom in the run folder only."""

    @model_validator(mode="after")
    def _port_of_prometheus(self) -> TrackingConfig:
        if self.prometheus_port is not None and "prometheus" not in self.to:
            raise ValueError(
                f"prometheus_port = {self.prometheus_port} works with to = ['prometheus'] only, "
                f"got to = {list(self.to)}; add it or remove the port"
            )
        return self

    @model_validator(mode="after")
    def _each_tracker_once(self) -> TrackingConfig:
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"to = {list(self.to)} names a tracker twice; name each once")
        return self
