"""What a run did, read from its folder without writing there, and shown in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gmpo.config import RunConfig
from gmpo.errors import RunFolderError
from gmpo.recipe import load_recipe
from gmpo.tracking import read_lines

__all__ = [
    "EvaluationFigures",
    "RunSummary",
    "load_groups",
    "render_group",
    "render_summary",
    "summarize_run",
    "visible",
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
    timeouts = _total(rounds, "grading/timeouts_total")
    failed = _total(rounds, "rollout/errors_total")
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
        timeouts_total=None if timeouts is None else int(timeouts),
        failed_rollouts_total=None if failed is None else int(failed),
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


def render_summary(summary: RunSummary) -> RenderableType:
    """The summary as tables that need no colour and 80 columns."""
    head = Text(f"run {summary.folder}", overflow="fold")
    if summary.description:
        head.append(f"\n{visible(summary.description)}")
    parts: list[RenderableType] = [
        head,
        Text(),
        _figures_table(_training_rows(summary), title="training"),
    ]
    if summary.before or summary.after:
        parts += [Text(), _evaluation_table(summary)]
    parts += [Text(), _figures_table(_cost_rows(summary), title="cost and failures")]
    return Group(*parts)


def render_group(record: Mapping[str, Any]) -> RenderableType:
    """A group's prompt, answer, figures of each completion, and the completions' whole texts.

    Args:
        record: one of `load_groups`.
    """
    rollouts = record["rollouts"]
    prompt_id = visible(str(record["prompt_id"]))
    answer = "none" if record["answer"] is None else visible(str(record["answer"]))
    if any(rollout["ratio"] is not None for rollout in rollouts):
        note = "ratio: of the sequence; token ratios: smallest..largest, before the clip"
    else:
        note = "ratio: none, because equal rewards give advantage 0 and no update"
    return Group(
        Text(f"round {record['round']}, group {record['group'] + 1}, prompt {prompt_id}\n"),
        Text("prompt"),
        Padding(Text(visible(record["prompt"]), overflow="fold"), (0, 0, 1, 2)),
        Text("answer"),
        Padding(Text(answer, overflow="fold"), (0, 0, 1, 2)),
        _rollout_table(rollouts),
        Text(note),
        _completion_table(rollouts),
    )


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


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _range(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float] | None:
    return (min(lows), max(highs)) if lows and highs else None


def _lowest_and_mean(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), sum(values) / len(values)) if values else None


def _total(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _values(lines, name)
    return sum(values) if values else None


def _share(lines: Sequence[Mapping[str, Any]], name: str, *, of: str) -> float | None:
    part, whole = _total(lines, name), _total(lines, of)
    return None if part is None or not whole else part / whole


def _tokens_per_second(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the whole run: a mean of the rounds' rates would let short rounds count too much."""
    pairs = [(r.get("time/tokens_per_second"), r.get("time/rollout_seconds")) for r in rounds]
    timed = [(rate, seconds) for rate, seconds in pairs if rate is not None and seconds is not None]
    seconds = sum(seconds for _, seconds in timed)
    return sum(rate * seconds for rate, seconds in timed) / seconds if seconds else None


def _training_rows(summary: RunSummary) -> list[tuple[str, str]]:
    of_total = "" if summary.rounds_total is None else f" of {summary.rounds_total}"
    mismatch = _figure(summary.mismatch_mean, "{:.2g} nats mean")
    if summary.mismatch_max is not None:
        mismatch += f", {summary.mismatch_max:.2g} largest"
    cosine = "not measured"
    if summary.cosine_to_grpo is not None:
        cosine = "{1:.4f} mean, {0:.4f} smallest".format(*summary.cosine_to_grpo)
    return [
        ("model", "not known" if summary.model is None else visible(summary.model)),
        ("objective", summary.objective or "not known"),
        ("rounds done", f"{summary.rounds_done}{of_total}"),
        ("sampled reward, first round", _figure(summary.first_reward, "{:.3f}")),
        ("sampled reward, last ten rounds", _figure(summary.last_ten_reward, "{:.3f}")),
        ("sampled reward, best ten in a row", _figure(summary.best_ten_reward, "{:.3f}")),
        *(
            (
                f"reward component {name}, first to last ten",
                f"{_figure(first, '{:.3f}')} to {_figure(last, '{:.3f}')}",
            )
            for name, (first, last) in summary.components.items()
        ),
        ("importance ratio, smallest to largest", _span(summary.ratio_range, "not measured")),
        ("importance ratio, bounds of the clip", _span(summary.clip_bounds, "none")),
        ("tokens clipped low", _figure(summary.clip_low_fraction, "{:.3%}")),
        ("tokens clipped high", _figure(summary.clip_high_fraction, "{:.3%}")),
        ("gradient cosine to GRPO", cosine),
        ("groups of equal rewards, no gradient", _figure(summary.dead_group_fraction, "{:.1%}")),
        ("completions cut by the token limit", _figure(summary.truncated_fraction, "{:.1%}")),
        ("mismatch of trainer and sampler", mismatch),
    ]


def _cost_rows(summary: RunSummary) -> list[tuple[str, str]]:
    return [
        ("completion tokens per second", _figure(summary.tokens_per_second, "{:.0f}")),
        ("time sampling", _figure(summary.rollout_seconds, "{:.1f} s")),
        ("time grading", _figure(summary.reward_seconds, "{:.1f} s")),
        ("time updating", _figure(summary.update_seconds, "{:.1f} s")),
        ("peak memory", _figure(summary.peak_memory_gib, "{:.2f} GiB")),
        ("answers whose grading timed out", _figure(summary.timeouts_total, "{}")),
        ("rollouts that failed", _figure(summary.failed_rollouts_total, "{}")),
        ("figures not finite, left out", str(summary.non_finite_total)),
    ]


def _figures_table(rows: Sequence[tuple[str, str]], *, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _evaluation_table(summary: RunSummary) -> Table:
    """One row for each way of asking, before and after side by side."""
    shown = (*summary.before, *summary.after)
    measure = "reward" if any(f.accuracy is None for f in shown) else "accuracy"
    table = Table(
        title=f"held-out {measure} (95 % interval)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("asked")
    for heading in ("before", "after", "items", "cut", "timeouts"):
        table.add_column(heading, justify="right")
    before = {figures.name: figures for figures in summary.before}
    after = {figures.name: figures for figures in summary.after}
    for name in {**before, **after}:
        pair = (before.get(name), after.get(name))
        table.add_row(
            Text(visible(name.replace("_", " "))),
            *(_outcome(figures) for figures in pair),
            _before_and_after([None if f is None else f.items for f in pair]),
            _before_and_after([None if f is None else f.truncated for f in pair]),
            _before_and_after([None if f is None else f.timeouts for f in pair]),
        )
    return table


def _rollout_table(rollouts: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    components = list(dict.fromkeys(name for rollout in rollouts for name in rollout["rewards"]))
    for heading in ("#", "reward", *components, "advantage", "ratio", "token ratios", "tokens"):
        table.add_column(Text(visible(heading)), justify="right", overflow="fold")
    table.add_column("end")
    for number, rollout in enumerate(rollouts, start=1):
        table.add_row(
            str(number),
            _figure(rollout["reward"], "{:.3g}", absent="-"),
            *(_figure(rollout["rewards"].get(name), "{:.3g}", absent="-") for name in components),
            _figure(rollout["advantage"], "{:+.3f}", absent="-"),
            *_ratios(rollout["ratio"]),
            str(rollout["tokens"]),
            rollout["finish_reason"],
        )
    return table


def _completion_table(rollouts: Sequence[Mapping[str, Any]]) -> Table:
    """Whole texts, wrapped: a completion may be far longer than a line."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("completion", overflow="fold")
    for number, rollout in enumerate(rollouts, start=1):
        failed = f"failed: {visible(rollout['error'])}\n" if rollout["error"] else ""
        text = visible(rollout["text"]) or ("" if failed else "(empty)")
        table.add_row(str(number), Text(failed + text))
    return table


def visible(text: str) -> str:
    """The text with control characters written out: a completion must not steer the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _figure(value: float | None, form: str, *, absent: str = "not measured") -> str:
    return absent if value is None else form.format(value)


def _span(bounds: tuple[float, float] | None, absent: str) -> str:
    return absent if bounds is None else f"{bounds[0]:.5g} to {bounds[1]:.5g}"


def _outcome(figures: EvaluationFigures | None) -> str:
    if figures is None:
        return "-"
    value = _figure(figures.reward if figures.accuracy is None else figures.accuracy, "{:.3f}")
    if figures.interval_95 is None:
        return value
    low, high = figures.interval_95
    return f"{value} ({low:.3f}{'-' if low >= 0 else ' to '}{high:.3f})"


def _before_and_after(counts: Sequence[int | None]) -> str:
    """One number where both agree, else `before/after`."""
    shown = ["-" if count is None else str(count) for count in counts]
    known = set(shown) - {"-"}
    return known.pop() if len(known) == 1 else "/".join(shown)


def _ratios(ratio: Mapping[str, float] | None) -> tuple[str, str]:
    """The sequence's, and the range of its tokens'."""
    if ratio is None:
        return "-", "-"
    return f"{ratio['sequence']:.3f}", f"{ratio['min']:.3g}..{ratio['max']:.3g}"
