"""Pictures of a run: reward, held-out items, importance ratio, entropy, clip share, groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from gmpo.config import RunConfig
from gmpo.errors import RunFolderError
from gmpo.recipe import load_recipe
from gmpo.statistics import wilson_interval
from gmpo.tracking import read_lines

__all__ = ["label_log_axis", "plot_run"]

# Okabe and Ito's palette: told apart with any common colour blindness, and by lightness in print.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
_DPI = 100
_WINDOW_ROUNDS = 10
_EVALUATION_STYLES = ((_BLUE, "s"), (_RED, "D"), (_GREEN, "^"), (_ORANGE, "v"))


@dataclass(frozen=True, kw_only=True)
class _RunData:
    """What the pictures show.

    Attributes:
        config: the resolved recipe; None if the run has none.
        steps: figures of each optimizer step.
        rounds: figures of each round.
        evaluations: of held-out items during training.
        before: results before the first round, of each way of asking.
        after: results after the last round.
    """

    config: RunConfig | None
    steps: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]

    @property
    def measure(self) -> str:
        """What was measured on held-out items."""
        return "accuracy" if self.config is None else self.config.evaluation.measure


def plot_run(run: str | Path, target: str | Path) -> list[Path]:
    """The PNG files drawn: one for each panel, and `overview.png` with all of them.

    A figure that the run did not measure is said so in its panel.

    Args:
        run: a run folder with at least one finished round.
        target: folder of the pictures; created if it is absent.

    Raises:
        RunFolderError: the run folder is absent or has no finished round, or a picture cannot be
            written.
        ConfigError: the run's recipe is not one of this version.
    """
    data = _read(run)
    folder = Path(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [_save(_single(panel, data), folder / f"{n}.png") for n, panel in _PANELS.items()]
        paths.append(_save(_overview(data), folder / "overview.png"))
    except OSError as error:
        raise RunFolderError(
            f"plots cannot be written to {folder}: {error.strerror}; free space or permissions"
        ) from None
    return paths


def _read(run: str | Path) -> _RunData:
    path = Path(run)
    if not path.is_dir():
        raise RunFolderError(f"run folder {path} does not exist, so there is nothing to plot")
    lines = list(read_lines(path, "metrics.jsonl"))
    rounds = [line for line in lines if line["kind"] == "round"]
    if not rounds:
        raise RunFolderError(f"run folder {path} has no finished round yet to plot")
    recipe = path / "recipe.toml"
    results = {
        record["stage"]: record["results"] for record in read_lines(path, "evaluations.jsonl")
    }
    return _RunData(
        config=load_recipe(recipe) if recipe.is_file() else None,
        steps=[line for line in lines if line["kind"] == "step"],
        rounds=rounds,
        evaluations=[line for line in lines if line["kind"] == "evaluation"],
        before=results.get("before", []),
        after=results.get("after", []),
    )


def _single(panel: Callable[[Axes, _RunData], None], data: _RunData) -> Figure:
    figure = Figure(figsize=(10, 5.5), dpi=_DPI, layout=_layout())
    panel(figure.add_subplot(), data)
    _add_headline(figure, data, size=10)
    return figure


def _overview(data: _RunData) -> Figure:
    figure = Figure(figsize=(14, 14), dpi=_DPI, layout=_layout())
    for ax, panel in zip(figure.subplots(3, 2).flatten(), _PANELS.values(), strict=True):
        panel(ax, data)
    _add_headline(figure, data, size=13)
    return figure


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)


def _add_headline(figure: Figure, data: _RunData, *, size: int) -> None:
    headline = f"{len(data.rounds)} rounds"
    if data.config is not None:
        config = data.config
        name = config.model.name if len(config.model.name) <= 40 else f"…{config.model.name[-39:]}"
        headline = (
            f"{name}, {config.objective.name} on {config.task.kind}, "
            f"{len(data.rounds)} of {config.training.rounds} rounds"
        )
    # A model's name may be a path with dollar signs, which would start a formula.
    figure.suptitle(headline, fontsize=size, color="#444444", parse_math=False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path


def _reward_panel(ax: Axes, data: _RunData) -> None:
    _dress(ax, title="Sampled reward", x="round", y="mean reward of the round's rollouts")
    rounds, rewards = _series(data.rounds, "round", "rollout/reward")
    if not _has_figures(ax, rewards):
        return
    ax.plot(rounds, rewards, "o", color=_BLUE, alpha=0.4, markersize=4, label="reward, one round")
    _draw_mean(ax, rounds, rewards, window=_WINDOW_ROUNDS, color=_BLUE)
    if np.nanmin(rewards) >= 0 and np.nanmax(rewards) <= 1:
        ax.set_ylim(-0.03, 1.03)
    _legend(ax)


def _held_out_panel(ax: Axes, data: _RunData) -> None:
    is_share = data.measure == "accuracy"
    _dress(
        ax,
        title=f"Held-out {data.measure} before, during and after training",
        x="round",
        y=f"{'share answered correctly' if is_share else 'mean reward'}, 95 % interval",
    )
    rounds, means = _series(data.evaluations, "round", f"evaluation/{data.measure}")
    results = _floats([result[data.measure] for result in [*data.before, *data.after]])
    if not _has_figures(ax, np.concatenate([means, results])):
        return
    _draw_during(ax, rounds, means, _items_during(data), is_share=is_share)
    last = data.rounds[-1]["round"]
    names = list(dict.fromkeys(result["name"] for result in [*data.before, *data.after]))
    for place, name in enumerate(names):
        color, marker = _EVALUATION_STYLES[place % len(_EVALUATION_STYLES)]
        # Side by side, or the intervals of one stage would hide each other.
        shift = (place - (len(names) - 1) / 2) * max(last, 1) * 0.015
        shown = [
            (at + shift, result)
            for at, stage in ((0, data.before), (last, data.after))
            for result in stage
            if result["name"] == name
        ]
        _draw_results(ax, shown, measure=data.measure, color=color, marker=marker)
    if is_share:
        ax.set_ylim(-0.03, 1.03)
    _legend(ax)


def _draw_during(
    ax: Axes, rounds: np.ndarray, means: np.ndarray, items: int | None, *, is_share: bool
) -> None:
    if not len(means):
        return
    stated = "" if items is None else f" (n = {items})"
    label = f"greedy, during{stated}"
    ax.plot(rounds, means, "o-", color=_BLUE, markersize=4, label=label)
    if items is None or not is_share:  # a mean reward alone says nothing about its spread
        return
    counts = [None if math.isnan(share) else round(share * items) for share in means]
    spans = [(math.nan, math.nan) if c is None else wilson_interval(c, items) for c in counts]
    low, high = zip(*spans, strict=True)
    ax.fill_between(rounds, low, high, color=_BLUE, alpha=0.15, linewidth=0)


def _draw_results(
    ax: Axes,
    shown: Sequence[tuple[float, dict[str, Any]]],
    *,
    measure: str,
    color: str,
    marker: str,
) -> None:
    """One way of asking, before and after, with its intervals."""
    means = _floats([result[measure] for _, result in shown])
    low, high = np.array([_floats(result["interval_95"]) for _, result in shown]).T
    items = sorted({result["items"] for _, result in shown})
    name = shown[0][1]["name"].replace("_", " ")
    ax.errorbar(
        [at for at, _ in shown],
        means,
        # At 0 and 1 rounding can put an end a hair inside.
        yerr=np.maximum([means - low, high - means], 0),
        fmt=marker,
        color=color,
        capsize=4,
        markersize=7,
        label=f"{name} (n = {' / '.join(map(str, items))})",
    )


def _items_during(data: _RunData) -> int | None:
    """Items of an evaluation during training: the recipe's number, or all if there are fewer."""
    if data.config is None:
        return None
    evaluation = data.config.evaluation
    limits = [evaluation.items_during]
    if data.config.task.held_out_items:
        limits.append(data.config.task.held_out_items - evaluation.skip_items)
    if evaluation.items is not None:
        limits.append(evaluation.items)
    limits += [result["items"] for result in data.before]
    return min(limits)


def _ratio_panel(ax: Axes, data: _RunData) -> None:
    _dress(
        ax, title="Importance ratio of tokens", x="optimizer step", y="ratio, before the clip (log)"
    )
    steps, low = _series(data.steps, "step", "ratio/min")
    _, high = _series(data.steps, "step", "ratio/max")
    low[low <= 0] = math.nan  # a ratio that underflowed has no place on a log axis
    if not _has_figures(ax, low * high):
        return
    log_q01, log_q99 = (_series(data.steps, "step", f"ratio/log_{q}")[1] for q in ("q01", "q99"))
    ax.set_yscale("log")
    # Bars, not curves: a round's first step has ratio 1, so curves would only show a sawtooth.
    width = _bar_width(steps)
    ax.vlines(steps, low, high, color=_ORANGE, linewidth=width, label="smallest to largest")
    q01, q99 = np.exp(log_q01), np.exp(log_q99)
    ax.vlines(steps, q01, q99, color=_BLUE, linewidth=width, label="1 % to 99 % quantile")
    _draw_clip_bounds(ax, data)
    label_log_axis(ax)
    _legend(ax)


def _bar_width(steps: np.ndarray) -> float:
    """In points: bars of many steps touch, bars of few stay slim."""
    return float(np.clip(500 / max(len(steps), 1), 0.8, 6))


def _draw_clip_bounds(ax: Axes, data: _RunData) -> None:
    bounds = data.config.objective.ratio_bounds() if data.config else None
    if data.config is None or bounds is None:
        return
    per_sequence = data.config.objective.name in ("gspo", "gmpo_sequence_clip")
    what = "clip of the sequence's ratio" if per_sequence else "clip"
    label = f"{what}: {bounds[0]:.5g} and {bounds[1]:.5g}"
    for bound, text in zip(bounds, (label, None), strict=True):
        ax.axhline(bound, color="black", linestyle="--", linewidth=1, label=text)


def label_log_axis(ax: Axes) -> None:
    """Plain numbers at round places; a narrow range has too few powers of ten to show."""
    bottom, top = ax.get_ylim()
    locator = MaxNLocator(6) if top / bottom < 5 else LogLocator(subs=(1.0, 2.0, 5.0), numticks=12)
    ax.yaxis.set_major_locator(locator)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))


def _entropy_panel(ax: Axes, data: _RunData) -> None:
    _dress(ax, title="Entropy of the policy", x="round", y="nats per token")
    rounds, estimates = _series(data.rounds, "round", "rollout/entropy")
    _, measured = _series(data.rounds, "round", "update/entropy")
    if not _has_figures(ax, np.concatenate([estimates, measured])):
        return
    ax.plot(rounds, estimates, ".-", color=_BLUE, linewidth=1, label="from sampled tokens")
    if np.isfinite(measured).any():
        ax.plot(rounds, measured, "--", color=_RED, label="exact, of tokens trained on")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    _legend(ax)


def _clip_panel(ax: Axes, data: _RunData) -> None:
    _dress(
        ax,
        title="Tokens that the clip changed",
        x="optimizer step",
        y="share of tokens (high clip up, low clip down)",
    )
    steps, low = _series(data.steps, "step", "clip/low_fraction")
    _, high = _series(data.steps, "step", "clip/high_fraction")
    if not _has_figures(ax, np.concatenate([low, high])):
        return
    window = _WINDOW_ROUNDS * max(1, round(len(data.steps) / len(data.rounds)))
    width = _bar_width(steps)
    for shares, sign, color, name in ((high, 1, _RED, "high clip"), (low, -1, _BLUE, "low clip")):
        whole = (
            f"mean {100 * np.nanmean(shares):.2g} %"
            if np.isfinite(shares).any()
            else "not measured"
        )
        label = f"{name} ({whole})"
        ax.vlines(steps, 0, sign * shares, color=color, alpha=0.45, linewidth=width, label=label)
        _draw_mean(ax, steps, sign * shares, window=window, color=color)
    ax.axhline(0, color="black", linewidth=0.8)
    furthest = max(float(np.nanmax([*low, *high])), 1e-4)
    ax.set_ylim(-1.1 * furthest, 1.1 * furthest)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * abs(share):.3g} %"))
    _legend(ax)


def _groups_panel(ax: Axes, data: _RunData) -> None:
    _dress(ax, title="Groups without gradient, completions cut short", x="round", y="share of each")
    rounds, dead = _series(data.rounds, "round", "rollout/dead_groups")
    dead = dead / _series(data.rounds, "round", "rollout/groups")[1]
    _, cut = _series(data.rounds, "round", "rollout/truncated_fraction")
    if not _has_figures(ax, np.concatenate([dead, cut])):
        return
    for shares, color, marker, name in (
        (dead, _BLUE, ".", "groups of equal rewards"),
        (cut, _RED, "x", "completions cut by the limit"),
    ):
        ax.plot(rounds, shares, marker, color=color, alpha=0.45, markersize=5, label=name)
        _draw_mean(ax, rounds, shares, window=_WINDOW_ROUNDS, color=color)
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    _legend(ax)


_PANELS: dict[str, Callable[[Axes, _RunData], None]] = {
    "reward": _reward_panel,
    "held_out": _held_out_panel,
    "ratio": _ratio_panel,
    "entropy": _entropy_panel,
    "clip": _clip_panel,
    "groups": _groups_panel,
}


def _series(lines: Sequence[dict[str, Any]], at: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Places and figures; NaN where a figure is null or was not logged."""
    figures = _floats([line.get(name) for line in lines])
    return np.array([line[at] for line in lines], dtype=float), figures


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """The values, NaN for None."""
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the known among the last `window` values; NaN before there are as many."""
    means = np.full(len(values), math.nan)
    for end in range(window, len(values) + 1):
        known = values[end - window : end]
        known = known[np.isfinite(known)]
        means[end - 1] = known.mean() if len(known) else math.nan
    return means


def _draw_mean(
    ax: Axes, places: np.ndarray, values: np.ndarray, *, window: int, color: str
) -> None:
    means = _trailing_mean(values, window)
    if np.isfinite(means).any():
        label = f"mean of last {_WINDOW_ROUNDS} rounds"
        ax.plot(places, means, color=color, linewidth=2, label=label)


def _dress(ax: Axes, *, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _has_figures(ax: Axes, values: np.ndarray) -> bool:
    """Whether there is anything to draw; if not, the panel says so."""
    if np.isfinite(values).any():
        return True
    ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=_GREY, size=14)
    ax.set_xticks([])
    ax.set_yticks([])
    return False


def _legend(ax: Axes) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
