"""A run's trackers: after a roll-back the tools get a new run, with the rounds that count alone."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace

from gmpo.config import RunConfig
from gmpo.recipe import recipe_values
from gmpo.trackers import TrackedRun, Trackers
from gmpo.tracking import RunFolder, read_lines

__all__ = ["TrackedAttempts"]


class TrackedAttempts:
    """Trackers of the run's newest attempt, which get every row of `metrics.jsonl`.

    A tool knows a row by its step, and an attempt repeats steps: each has a run of its own there.

    Args:
        run: the run's folder.
        config: its recipe.
        warn: told what a tool does wrong.
    """

    def __init__(self, run: RunFolder, config: RunConfig, *, warn: Callable[[str], None]) -> None:
        self._run = run
        self._names = config.tracking.to
        self._warn = warn
        identity = run.path / "tracking.json"
        if self._names and not identity.exists():
            run.write_text(identity.name, json.dumps({"id": uuid.uuid4().hex}))
        self._told = TrackedRun(
            id=json.loads(identity.read_text())["id"] if self._names else "",
            name=config.tracking.name or run.path.resolve().name,
            project=config.tracking.project,
            folder=run.path,
            parameters=recipe_values(config),
        )
        self._attempt = -1
        self._trackers = Trackers((), self._told, warn=warn)
        run.follow(self._trackers.send)

    def of(self, attempt: int, config: RunConfig) -> Trackers:
        """The trackers of this attempt, whose recipe this is; those of an earlier one are closed.

        They are sent the rows so far first.
        """
        if attempt != self._attempt:
            self.close()
            told = replace(self._told, parameters=recipe_values(config))
            if attempt:
                told = replace(
                    told,
                    id=f"{told.id}-{attempt}",
                    name=f"{told.name} attempt {attempt + 1}",
                    attempt=attempt,
                )
            self._trackers = Trackers(
                self._names,
                told,
                earlier=read_lines(self._run.path, "metrics.jsonl"),
                warn=self._warn,
            )
            self._run.follow(self._trackers.send)
            self._attempt = attempt
        return self._trackers

    def close(self) -> None:
        """Let the trackers finish."""
        self._run.unfollow(self._trackers.send)
        self._trackers.close()
