"""A run's figures and texts as tables for a terminal: no colour needed, and 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gmpo.inspection import EvaluationFigures, RunSummary
from gmpo.text_tables import open_table

__all__ = ["render_group", "render_summary", "visible"]


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
        *_tracker_rows(summary),
        ("alarms of the guard", _tally(summary.alarms)),
        *_mending_rows(summary),
        *_adaptation_rows(summary),
        ("figures not finite, left out", str(summary.non_finite_total)),
    ]


def _adaptation_rows(summary: RunSummary) -> list[tuple[str, str]]:
    if not summary.adaptations:
        return []
    named = {name.removeprefix("adaptive/"): n for name, n in summary.adaptations.items()}
    return [("changes of adaptive settings", _tally(named))]


def _tally(counts: Mapping[str, int]) -> str:
    shown = (f"{visible(name)} {count}" for name, count in counts.items())
    return f"{sum(counts.values())} ({', '.join(shown)})" if counts else "none"


def _mending_rows(summary: RunSummary) -> list[tuple[str, str]]:
    rows = []
    if summary.rollbacks:
        rows.append(("roll-backs by the guard", str(summary.rollbacks)))
    if summary.skipped_steps_total is not None:
        rows.append(("steps left out by the guard", str(summary.skipped_steps_total)))
    return rows


def _tracker_rows(summary: RunSummary) -> list[tuple[str, str]]:
    if summary.tracker_errors_total is None:
        return []
    return [
        ("calls of trackers that failed", str(summary.tracker_errors_total)),
        ("rows trackers were not given", str(summary.tracker_dropped_total)),
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
    heads = ("asked", "before", "after", "items", "cut", "timeouts")
    table = open_table(heads, title=f"held-out {measure} (95 % interval)")
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
    components = list(dict.fromkeys(name for rollout in rollouts for name in rollout["rewards"]))
    heads = ("#", "reward", *components, "advantage", "ratio", "token ratios", "tokens")
    table = open_table([visible(head) for head in heads], left=0)
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
    table = open_table(["#"], left=0)
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
