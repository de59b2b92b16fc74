"""What a run did, read from its folder without writing there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gmpo.config import RunConfig
from gmpo.errors import RunFolderError
from gmpo.recipe import load_recipe
from gmpo.tracking import read_lines

__all__ = [
    "EvaluationFigures",
    "RunSummary",
    "load_groups",
    "summarize_run",
]

_WINDOW = 10
_COMPONENT = "rollout/reward/"


@dataclass(frozen=True, kw_only=True)
class EvaluationFigures:
    """One way of asking the held-out items.

    Attributes:
        name: "greedy", "greedy_3_shot" or "sampled".
        accuracy: share of items answered correctly; None if the reward was measured.
        reward: mean reward of the items; None if accuracy was measured, or no item had one.
        interval_95: its 95 % interval; None for fewer than two rewards.
        items: items asked.
        truncated: answers cut by the token limit; they are graded as they stand.
        timeouts: answers whose grading ran out of time; they count as wrong.
    """

    name: str
    accuracy: float | None
    reward: float | None
    interval_95: tuple[float, float] | None
    items: int
    truncated: int
    timeouts: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run's figures; None is a figure that was not measured.

    Attributes:
        folder: where the run lies.
        description: the recipe's one line.
        model: name of the trained model.
        objective: name of the objective.
        clip_bounds: the clip as bounds of the ratio.
        rounds_done: rounds that finished.
        rounds_total: rounds of the recipe.
        first_reward: mean sampled reward of the first round.
        last_ten_reward: mean sampled reward of the last ten rounds, of all if there are fewer.
        components: of each reward component, its mean in the first round and in the last ten.
        best_ten_reward: largest mean sampled reward of ten rounds in a row.
        before: evaluations before the first round.
        after: evaluations after the last round.
        ratio_range: smallest and largest importance ratio of any token, before the clip.
        clip_low_fraction: share of tokens that the lower clip changed, mean over measured steps.
        clip_high_fraction: the same for the upper clip.
        cosine_to_grpo: smallest and mean cosine between this objective's gradient and GRPO's.
        dead_group_fraction: share of groups whose rollouts all earned the same.
        truncated_fraction: share of completions cut by the token limit.
        mismatch_mean: mean over rounds of |log pi_trainer - log pi_sampler|, in nats.
        mismatch_max: largest such difference of any token, in nats.
        tokens_per_second: completion tokens of the run over its seconds of sampling.
        rollout_seconds: seconds of sampling.
        reward_seconds: seconds of grading.
        update_seconds: seconds of optimizer steps.
        peak_memory_gib: largest memory in GiB.
        timeouts_total: answers whose grading ran out of time, in training.
        failed_rollouts_total: rollouts that failed and were not used.
        tracker_errors_total: calls of trackers that failed.
        tracker_dropped_total: rows that trackers were not given.
        alarms: how often the guard raised each alarm, in rounds that were given up too.
        rollbacks: how often the guard took the run back to a checkpoint; the rounds that were given
            up are in no other figure.
        skipped_steps_total: optimizer steps that the guard left out; None where it judged none.
        adaptations: how often each adaptive setting moved, in rounds that were given up too.
        non_finite_total: logged figures that were NaN or infinite and are in no figure above.
    """

    folder: str
    description: str | None
    model: str | None
    objective: str | None
    clip_bounds: tuple[float, float] | None
    rounds_done: int
    rounds_total: int | None
    first_reward: float | None
    last_ten_reward: float | None
    best_ten_reward: float | None
    components: dict[str, tuple[float | None, float | None]]
    before: tuple[EvaluationFigures, ...]
    after: tuple[EvaluationFigures, ...]
    ratio_range: tuple[float, float] | None
    clip_low_fraction: float | None
    clip_high_fraction: float | None
    cosine_to_grpo: tuple[float, float] | None
    dead_group_fraction: float | None
    truncated_fraction: float | None
    mismatch_mean: float | None
    mismatch_max: float | None
    tokens_per_second: float | None
    rollout_seconds: float | None
    reward_seconds: float | None
    update_seconds: float | None
    peak_memory_gib: float | None
    timeouts_total: int | None
    failed_rollouts_total: int | None
    tracker_errors_total: int | None
    tracker_dropped_total: int | None
    alarms: dict[str, int]
    rollbacks: int
    skipped_steps_total: int | None
    adaptations: dict[str, int]
    non_finite_total: int

    def as_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        return asdict(self)


def summarize_run(path: str | Path) -> RunSummary:
    """The run's figures, of the rounds it has finished.

    Raises:
        RunFolderError: the folder is absent, holds no run, or has no finished round.
        DataError: a line of its files is damaged; file and line are named.
        ConfigError: its recipe is not one of this version.
    """
    folder = _run_folder(path)
    lines = list(read_lines(folder, "metrics.jsonl"))
    rounds = [line for line in lines if line["kind"] == "round"]
    steps = [line for line in lines if line["kind"] == "step"]
    if not rounds:
        raise RunFolderError(
            f"run folder {folder} has no finished round yet; look again when its first round is "
            "done, or start it anew if it was stopped before"
        )
    config = load_recipe(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else None
    rewards = [line.get("rollout/reward") for line in rounds]
    events = list(read_lines(folder, "events.jsonl"))
    return RunSummary(
        folder=str(folder),
        **_recipe_figures(config),
        rounds_done=len(rounds),
        first_reward=rewards[0],
        last_ten_reward=_mean(_measured(rewards[-_WINDOW:])),
        best_ten_reward=_best_ten(rewards),
        components=_components(rounds),
        before=_evaluations(folder, "before"),
        after=_evaluations(folder, "after"),
        ratio_range=_range(_values(steps, "ratio/min"), _values(steps, "ratio/max")),
        clip_low_fraction=_mean(_values(steps, "clip/low_fraction")),
        clip_high_fraction=_mean(_values(steps, "clip/high_fraction")),
        cosine_to_grpo=_lowest_and_mean(_values(steps, "update/gradient_cosine_grpo")),
        dead_group_fraction=_share(rounds, "rollout/dead_groups", of="rollout/groups"),
        truncated_fraction=_mean(_values(rounds, "rollout/truncated_fraction")),
        mismatch_mean=_mean(_values(rounds, "rollout/mismatch_mean")),
        mismatch_max=max(_values(rounds, "rollout/mismatch_max"), default=None),
        tokens_per_second=_tokens_per_second(rounds),
        rollout_seconds=_total(rounds, "time/rollout_seconds"),
        reward_seconds=_total(rounds, "time/reward_seconds"),
        update_seconds=_total(rounds, "time/update_seconds"),
        peak_memory_gib=max(_values(rounds, "memory/peak_gib"), default=None),
        timeouts_total=_count(rounds, "grading/timeouts_total"),
        failed_rollouts_total=_count(rounds, "rollout/errors_total"),
        tracker_errors_total=_count(rounds, "tracking/errors_total"),
        tracker_dropped_total=_count(rounds, "tracking/dropped_total"),
        alarms=_counts(events, "alarm"),
        rollbacks=len({e["attempt"] for e in events if e.get("taken") == "roll_back"}),
        skipped_steps_total=_count(rounds, "update/skipped_steps_total"),
        adaptations=_counts(events, "setting"),
        non_finite_total=_count_nulls(lines),
    )


def load_groups(path: str | Path) -> list[dict[str, Any]]:
    """The groups whose texts the run kept, in order; the N-th is `gmpo inspect --group N`.

    Raises:
        RunFolderError: the folder is absent, holds no run, or kept no group.
        DataError: a line of `rollouts.jsonl` is damaged.
    """
    folder = _run_folder(path)
    groups = list(read_lines(folder, "rollouts.jsonl"))
    if not groups:
        raise RunFolderError(
            f"run folder {folder} has no groups to show: either no round is finished yet, or the "
            "recipe has tracking.groups_per_round = 0"
        )
    return groups


def _run_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunFolderError(f"run folder {folder} {what}; give the folder that `gmpo train` wrote")
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "recipe.toml")):
        raise RunFolderError(
            f"{folder} is no run folder: it has neither metrics.jsonl nor recipe.toml; "
            "give the folder that `gmpo train` wrote"
        )
    return folder


def _recipe_figures(config: RunConfig | None) -> dict[str, Any]:
    return {
        "description": config.description if config else None,
        "model": config.model.name if config else None,
        "objective": config.objective.name if config else None,
        "clip_bounds": config.objective.ratio_bounds() if config else None,
        "rounds_total": config.training.rounds if config else None,
    }


def _best_ten(rewards: Sequence[float | None]) -> float | None:
    """In a row, so that it is as noisy as the last ten: picking single rounds would pick luck."""
    starts = range(max(1, len(rewards) - _WINDOW + 1))
    means = [_mean(_measured(rewards[start : start + _WINDOW])) for start in starts]
    return max(_measured(means), default=None)


def _components(
    rounds: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[float | None, float | None]]:
    """Apart, so that one component that is gamed shows while the others stand still."""
    names = dict.fromkeys(name for line in rounds for name in line if name.startswith(_COMPONENT))
    return {
        name.removeprefix(_COMPONENT): (
            rounds[0].get(name),
            _mean(_values(rounds[-_WINDOW:], name)),
        )
        for name in names
    }


def _evaluations(folder: Path, stage: str) -> tuple[EvaluationFigures, ...]:
    """Results of the stage's newest record; a run that was resumed may hold several."""
    records = [r for r in read_lines(folder, "evaluations.jsonl") if r["stage"] == stage]
    if not records:
        return ()
    return tuple(
        EvaluationFigures(
            name=result["name"],
            accuracy=result.get("accuracy"),
            reward=result.get("reward"),
            interval_95=None if None in result["interval_95"] else tuple(result["interval_95"]),
            items=result["items"],
            truncated=result["truncated"],
            timeouts=result["timeouts"],
        )
        for result in records[-1]["results"]
    )


def _measured(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return _measured([line.get(name) for line in lines])


def _count_nulls(lines: Sequence[Mapping[str, Any]]) -> int:
    """Figures logged as null; a round's line repeats its steps' figures, which count once."""
    of_steps = {name for line in lines if line["kind"] == "step" for name in line}
    return sum(
        value is None and (line["kind"] != "round" or name not in of_steps)
        for line in lines
        for name, value in line.items()
    )


def _counts(events: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    """How often each value of a field is there; events of another kind lack the field."""
    return dict(Counter(event[name] for event in events if name in event))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _range(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float] | None:
    return (min(lows), max(highs)) if lows and highs else None


def _lowest_and_mean(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), sum(values) / len(values)) if values else None


def _total(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _values(lines, name)
    return sum(values) if values else None


def _count(lines: Sequence[Mapping[str, Any]], name: str) -> int | None:
    total = _total(lines, name)
    return None if total is None else int(total)


def _share(lines: Sequence[Mapping[str, Any]], name: str, *, of: str) -> float | None:
    part, whole = _total(lines, name), _total(lines, of)
    return None if part is None or not whole else part / whole


def _tokens_per_second(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the whole run: a mean of the rounds' rates would let short rounds count too much."""
    pairs = [(r.get("time/tokens_per_second"), r.get("time/rollout_seconds")) for r in rounds]
    timed = [(rate, seconds) for rate, seconds in pairs if rate is not None and seconds is not None]
    seconds = sum(seconds for _, seconds in timed)
    return sum(rate * seconds for rate, seconds in timed) / seconds if seconds else None
