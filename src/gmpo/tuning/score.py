"""What a tuning study maximises: 0.7 accuracy + 0.3 stability, from a run's own files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gmpo.config import RunConfig
from gmpo.errors import StudyError
from gmpo.guard import GuardState, decide
from gmpo.schedules import judged_metrics
from gmpo.stability import run_figures
from gmpo.tracking import read_lines

__all__ = [
    "ACCURACY_WEIGHT",
    "FAILED",
    "STABILITY_WEIGHT",
    "Score",
    "StabilityKind",
    "final_score",
    "given_up_rounds",
    "held_out_outcomes",
    "scores_during",
    "stability",
]

StabilityKind = Literal["meaningful", "article"]
"""Which formula `stability` takes."""

ACCURACY_WEIGHT, STABILITY_WEIGHT = 0.7, 0.3
"""The article's."""

_CLIPPED_SHARE = 0.1
"""Share of tokens up to which the clip is at its work; docs/metrics.md calls more unhealthy."""
_SEQUENCE_CLIPS = ("gspo", "gmpo_sequence_clip")
_UPPER = 0.95

_Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of a run, or of its rounds so far; both parts lie in 0..1, and so does the objective."""

    accuracy: float
    stability: float

    @property
    def objective(self) -> float:
        """The article's 0.7 accuracy + 0.3 stability."""
        return ACCURACY_WEIGHT * self.accuracy + STABILITY_WEIGHT * self.stability


FAILED = Score(accuracy=0.0, stability=0.0)
"""Of a run that diverged or that the guard stopped: it has no policy to be measured."""


def stability(
    lines: Sequence[_Line],
    *,
    recipe: RunConfig,
    kind: StabilityKind,
    rounds: int,
    given_up: int = 0,
) -> float:
    """How steadily a run learned, in 0..1; 0 with fewer than two steps that had a gradient.

    "article" is 1 / (1 + variance of the loss). GMPO's loss is about 0 on average and small, so
    that this is nearly 1 whatever happens. "meaningful" is calm * unclipped / (1 + spread):

        calm        share of the rounds, those given up among them, that are done with no alarm of
                    the guard on and no optimizer step left out; one that was given up is not calm
        unclipped   1 - max(0, c - 0.1) / 0.9 with c the clipped share of the later steps' tokens;
                    1 for objectives that clip whole sequences
        spread      (q95 - q50) / q50 of the gradient norm before clipping: how far the largest
                    twentieth of the steps lies above the usual one

    Args:
        lines: of `metrics.jsonl`, of the rounds looked at.
        recipe: of the run.
        kind: which formula.
        rounds: that the run should have had so far.
        given_up: rounds besides, which the guard took back; `given_up_rounds` counts them.
    """
    live = [line for line in lines if line["kind"] == "step" and "ratio/max" in line]
    norms = [n for line in live if (n := line.get("update/gradient_norm")) is not None]
    figures = run_figures(
        lines,
        held_out_end=None,
        target=None,
        rounds=rounds,
        steps_per_round=recipe.training.steps_per_round,
        diverged=False,
    ).values
    variance = figures["loss_variance"]
    if len(norms) < 2 or variance is None:
        return 0.0
    if kind == "article":
        return 1 / (1 + variance)
    middle, upper = np.quantile(norms, [0.5, _UPPER])
    if not middle > 0:
        return 0.0
    spread = float((upper - middle) / middle)
    clipped = figures["clip_fraction"] or 0.0
    if recipe.objective.name in _SEQUENCE_CLIPS:
        clipped = 0.0
    unclipped = 1 - max(0.0, clipped - _CLIPPED_SHARE) / (1 - _CLIPPED_SHARE)
    return _calm_rounds(lines) / (rounds + given_up) * unclipped / (1 + spread)


def given_up_rounds(run: Path) -> int:
    """How many rounds the guard of a run took back, by its `events.jsonl`.

    Their lines are set aside, so that those that are left do not tell of them. A roll-back takes
    back the rounds behind the checkpoint that it goes to, up to that of its alarm.

    Raises:
        DataError: a line of the run's events is damaged.
    """
    return _given_up(read_lines(run, "events.jsonl"))


def scores_during(
    run: Path, recipe: RunConfig, *, kind: StabilityKind, after: int = 0
) -> dict[int, Score]:
    """Score by round, of the evaluations that a run has made during training so far.

    Args:
        run: its folder.
        recipe: of the run.
        kind: of stability.
        after: only of later rounds.

    Raises:
        DataError: a line of the run's files is damaged.
    """
    # Read first: a round that is taken back while this looks is scored as it was before.
    events = list(read_lines(run, "events.jsonl"))
    lines = list(read_lines(run, "metrics.jsonl"))
    return {
        line["round"]: Score(
            accuracy=line["evaluation/accuracy"],
            stability=stability(
                [earlier for earlier in lines if earlier["round"] <= line["round"]],
                recipe=recipe,
                kind=kind,
                rounds=line["round"],
                given_up=_given_up(events, before=line["round"]),
            ),
        )
        for line in lines
        if line["kind"] == "evaluation" and line["round"] > after
    }


def final_score(run: Path, recipe: RunConfig, *, kind: StabilityKind) -> Score:
    """Of a finished run: greedy accuracy after training, and stability of all its rounds.

    Raises:
        StudyError: the run has no evaluation after training.
        DataError: a line of the run's files is damaged.
    """
    outcomes = held_out_outcomes(run)
    steadiness = stability(
        list(read_lines(run, "metrics.jsonl")),
        recipe=recipe,
        kind=kind,
        rounds=recipe.training.rounds,
        given_up=given_up_rounds(run),
    )
    accuracy = math.fsum(outcomes.values()) / len(outcomes)
    return Score(accuracy=accuracy, stability=steadiness)


def held_out_outcomes(run: Path) -> dict[str, float]:
    """Each held-out item's greedy outcome after training, 1 or 0, by the item's id.

    Raises:
        StudyError: the run has no evaluation after training.
    """
    for record in read_lines(run, "evaluations.jsonl"):
        for result in record["results"]:
            if record["stage"] == "after" and result["name"] == "greedy":
                return {name: float(value) for name, value in result["outcomes"].items()}
    raise StudyError(
        f"run {run} is done and evaluations.jsonl has nothing after training; bring the file back, "
        "or remove the run's folder and give the same command again"
    )


def _calm_rounds(lines: Sequence[_Line]) -> int:
    """Rounds with no alarm on and no step left out; the guard is asked anew, whatever it did."""
    state, calm = GuardState(), 0
    for line in lines:
        if line["kind"] == "round":
            _, state = decide(judged_metrics(line), state, round_number=line["round"])
            # A step left out is an alarm as well, which the loop raises and not `decide`.
            calm += not state.raised and not line.get("update/skipped_steps_total")
    return calm


def _given_up(events: Iterable[_Line], *, before: int | None = None) -> int:
    """Rounds taken back in all, or before the line of this round was written that is left now."""
    ends = {
        event["attempt"]: (event["to_round"], event["round"])
        for event in events
        if event.get("taken") == "roll_back"
    }
    count = 0
    for attempt in sorted(ends, reverse=True):
        to_round, last = ends[attempt]
        # The newest roll-back that took this round's line too is older than the line that is left,
        # and so are those before it.
        if before is None or to_round < before or count:
            count += last - to_round
    return count
