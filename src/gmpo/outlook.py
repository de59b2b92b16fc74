"""What a run will need is said before it starts, and compared with what it then took."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from gmpo.assembly import TrainingParts
from gmpo.checkpoint import TrainingState
from gmpo.forecast import forecast_inputs
from gmpo.headroom import free_bytes, require_memory
from gmpo.inputs import RunInputs
from gmpo.memory import GIB
from gmpo.pace import TimeForecast, forecast_time
from gmpo.policy.load import choose_device
from gmpo.tracking import RunFolder

__all__ = ["Outlook"]


class Outlook:
    """A run's forecast in memory and time, kept in the run folder's `forecast.json`.

    Args:
        run: the folder.
        inputs: of the run, before its model is loaded.

    Raises:
        ConfigError: the run does not fit into the memory that is free.
    """

    def __init__(self, run: RunFolder, inputs: RunInputs) -> None:
        self._run = run
        self._free = free_bytes(choose_device(inputs.config.model.device))
        self._needs = forecast_inputs(inputs)
        require_memory(inputs, self._needs, free=self._free)
        self._pace: TimeForecast | None = None
        self._rounds_to_come = 0

    def announce(
        self,
        parts: TrainingParts,
        state: TrainingState,
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> str | None:
        """What the rounds to come will take, in one sentence; None if none are to come.

        Times a short trial, which changes nothing of the run; None too if `should_stop` ended it.
        """
        config = parts.config
        self._rounds_to_come = config.training.rounds - state.round
        if not self._rounds_to_come:
            return None
        prompts = parts.prompts.take(state.prompts_taken, config.sampling.prompts_per_round)
        self._pace = forecast_time(
            parts, prompts, rounds=self._rounds_to_come, should_stop=should_stop
        )
        if self._pace is None:
            return None
        self._write(self._pace, measured=None)
        free = "" if self._free is None else f" ({self._free / GIB:.2f} were free at the start)"
        if self._needs.helpers_gib:
            free = f" and {self._needs.helpers_gib:.2f} for the other processes{free}"
        beside = self._pace.not_counted
        return (
            f"forecast: up to {self._needs.peak_gib:.2f} GiB of memory{free}; about "
            f"{_span(self._pace.round_seconds)} a round and {_span(self._pace.run_seconds)} in all"
            ", by a short trial and if every completion runs to its limit"
            f"{', without ' + ' and '.join(beside) if beside else ''}"
        )

    def compare(self, metrics: Mapping[str, float], *, round_number: int) -> str | None:
        """The first round's memory and time beside the forecast, in one sentence; None later on."""
        pace, self._pace = self._pace, None
        if pace is None:
            return None
        stages = ("rollout", "reward", "update")
        seconds = sum(metrics[f"time/{stage}_seconds"] for stage in stages)
        peak = metrics["memory/peak_gib"]
        measured = {"round": round_number, "round_seconds": seconds, "peak_gib": peak}
        self._write(pace, measured=measured)
        rest = (self._rounds_to_come - 1) * seconds
        to_come = f"; {_seconds(rest)} more at this pace, without evaluations" if rest else ""
        return (
            f"measured: {peak:.2f} GiB of memory in round {round_number} (forecast up to "
            f"{self._needs.peak_gib:.2f}), {_seconds(seconds)} (forecast about "
            f"{_span(pace.round_seconds)}){to_come}"
        )

    def _write(self, pace: TimeForecast, *, measured: Mapping[str, float] | None) -> None:
        content = {
            "memory": self._needs.as_dict(),
            "wanted_gib": self._needs.wanted_gib,
            "free_gib": None if self._free is None else self._free / GIB,
            "time": pace.as_dict(),
            "measured": measured,
        }
        self._run.write_text("forecast.json", json.dumps(content, indent=1))


def _span(seconds: tuple[float, float]) -> str:
    low, high = (_seconds(value) for value in seconds)
    return low if low == high else f"{low} to {high}"


def _seconds(value: float) -> str:
    """Seconds to two digits, minutes from two of them on, hours from two of them on."""
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
