"""The stability study's cells as comparisons, a table and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from benchmarks.results import write_figure
from matplotlib.axes import Axes

from gmpo.statistics import holm, paired_t_interval, sign_flip_p_value

__all__ = ["markdown", "plot", "results"]

LEVEL = 0.05
PRIMARY = {
    "rounds_survived": "difference",
    "reward_end": "difference",
    "gradient_norm_deviation": "log ratio",
}
"""Figures that GMPO and GRPO are tested by, all three together at the level, and how compared."""
TESTED = ("gmpo", "grpo")
EXPLORED = (("gmpo", "grpo-wide"), ("gmpo", "gspo"), ("grpo-wide", "grpo"))
COLORS = {"grpo": "tab:red", "grpo-wide": "tab:orange", "gmpo": "tab:blue", "gspo": "tab:green"}
CURVE_TITLES = {
    "reward": "mean reward of the round",
    "entropy": "entropy, nats a token",
    "gradient_norm": "gradient norm before clipping",
    "ratio_max": "largest importance ratio of the round",
}
SMOOTHED_ROUNDS = 10


def results(
    records: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """Everything the results file holds.

    A seed counts once all its objectives are finished. The test is made when every planned seed
    is complete, and not before.

    Args:
        records: finished cells.
        settings: of the study.
        seeds: that were planned.
    """
    arms = list(COLORS)
    found = {(record["arm"], record["seed"]): record for record in records}
    complete = [seed for seed in seeds if all((arm, seed) in found for arm in arms)]
    is_whole = complete == list(seeds)
    comparisons = [
        _comparison(found, pair, complete, with_p=is_whole) for pair in (TESTED, *EXPLORED)
    ]
    if is_whole:
        tested = comparisons[0]["figures"]
        adjusted = holm([tested[name]["p"] for name in PRIMARY])
        for name, value in zip(PRIMARY, adjusted, strict=True):
            tested[name] |= {"p_holm": value, "is_significant": value < LEVEL}
    return {
        "settings": dict(settings),
        "seeds_planned": list(seeds),
        "seeds_complete": complete,
        "test": "made" if is_whole else "not made: not every planned seed is complete",
        "comparisons": comparisons,
        "cells": list(records),
    }


def _comparison(
    found: Mapping[tuple[str, int], Mapping[str, Any]],
    pair: tuple[str, str],
    seeds: Sequence[int],
    *,
    with_p: bool,
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, how in PRIMARY.items():
        pairs = [[found[arm, seed]["figures"][name] for arm in pair] for seed in seeds]
        known = [(left, right) for left, right in pairs if None not in (left, right)]
        differences = [
            left - right if how == "difference" else math.log(left / right) for left, right in known
        ]
        figures[name] = {
            "how": how,
            "differences": differences,
            "pairs_without": len(pairs) - len(known),
        }
        if len(differences) > 1:
            low, high = paired_t_interval(differences)
            figures[name] |= {
                "mean": statistics.fmean(differences),
                "interval_95": [low, high],
            }
        if with_p:
            figures[name]["p"] = sign_flip_p_value(differences)
    return {"left": pair[0], "right": pair[1], "figures": figures}


def markdown(report: Mapping[str, Any]) -> str:
    """Tables for docs/experiments.md."""
    complete = report["seeds_complete"]
    lines = [
        f"{len(complete)} of {len(report['seeds_planned'])} planned seeds are complete: "
        f"{complete}; test {report['test']}.",
        "",
        "| arm | seeds | collapsed (round) | rounds survived | reward, last 30 | held-out greedy "
        "| gradient norm sd | ratio range | log-ratio 1 % to 99 % | AM-GM gap | clipped | entropy "
        "end |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in report["settings"]["arms"]:
        cells = [c for c in report["cells"] if c["arm"] == arm]
        if cells:
            lines.append(_arm_row(arm, cells))
    lines += [
        "",
        "| left minus right | figure | mean difference (95 %) | p | p, Holm |",
        "|---|---|---|---|---|",
    ]
    for comparison in report["comparisons"]:
        pair = f"{comparison['left']} - {comparison['right']}"
        for name, of in comparison["figures"].items():
            if "mean" in of:
                low, high = of["interval_95"]
                p, p_holm = (f"{of[key]:.4f}" if key in of else "-" for key in ("p", "p_holm"))
                lines.append(
                    f"| {pair} | {name} ({of['how']}) | {of['mean']:+.3g} ({low:+.3g} to "
                    f"{high:+.3g}) | {p} | {p_holm} |"
                )
    return "\n".join(lines)


def _arm_row(arm: str, cells: Sequence[Mapping[str, Any]]) -> str:
    def mean(name: str, form: str) -> str:
        values = [c["figures"][name] for c in cells if c["figures"].get(name) is not None]
        return format(statistics.fmean(values), form) if values else "-"

    ended = [c for c in cells if c["ended"] != "finished"]
    rounds = ", ".join(f"{c['figures']['rounds_survived']:.0f}" for c in ended)
    lows, highs = (
        [c["figures"][name] for c in cells if c["figures"][name] is not None]
        for name in ("log_ratio_min", "log_ratio_max")
    )
    ratios = f"{math.exp(min(lows)):.2g} to {math.exp(max(highs)):.2g}" if lows else "-"
    return (
        f"| {arm} | {len(cells)} | {len(ended)}{f' ({rounds})' if ended else ''} "
        f"| {mean('rounds_survived', '.0f')} | {mean('reward_end', '.3f')} "
        f"| {mean('held_out_greedy_after', '.3f')} | {mean('gradient_norm_deviation', '.3g')} "
        f"| {ratios} | {mean('log_ratio_spread', '.3f')} "
        f"| {mean('am_gm_gap', '.4f')} | {mean('clip_fraction', '.2%')} "
        f"| {mean('entropy_end', '.3f')} |"
    )


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Curves of every cell, thin, and each objective's mean over the runs still going, thick."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for ax, (name, title) in zip(axes.flat, CURVE_TITLES.items(), strict=True):
        _draw(ax, report, name)
        ax.set(title=title, xlabel="round")
        if name in ("gradient_norm", "ratio_max"):
            ax.set_yscale("log")
    axes.flat[0].legend(fontsize="small")
    figure.suptitle(
        f"Mixture of experts on countdown, {len(report['seeds_complete'])} of "
        f"{len(report['seeds_planned'])} seeds complete"
    )
    write_figure(path, figure, dpi=100)
    plt.close(figure)


def _draw(ax: Axes, report: Mapping[str, Any], name: str) -> None:
    for arm, color in COLORS.items():
        curves = [
            np.array(cell["curves"][name], dtype=float)
            for cell in report["cells"]
            if cell["arm"] == arm
        ]
        if not curves:
            continue
        for curve in curves:
            ax.plot(np.arange(1, len(curve) + 1), _smoothed(curve), color=color, lw=0.5, alpha=0.4)
        table = np.full((len(curves), max(map(len, curves))), np.nan)
        for row, curve in enumerate(curves):
            table[row, : len(curve)] = curve
        known = np.ma.masked_invalid(table).mean(axis=0).filled(np.nan)
        ax.plot(np.arange(1, len(known) + 1), _smoothed(known), color=color, lw=2, label=arm)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over the rounds up to each one; those without a figure are left out."""
    smooth = np.full(len(values), np.nan)
    for end in range(len(values)):
        window = values[max(0, end + 1 - SMOOTHED_ROUNDS) : end + 1]
        window = window[np.isfinite(window)]
        if len(window):
            smooth[end] = window.mean()
    return smooth
