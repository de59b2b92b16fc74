"""Result files of vs_trl.py as tables and one plot.

python -m benchmarks.report docs/results/vs_trl/*.json --plot docs/results/vs_trl.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.options import ends_clearly
from benchmarks.ratios import ENOUGH_PAIRS, PEAKS, RATIOS, STAGES, summary
from benchmarks.results import read_results, write_figure
from benchmarks.spread import Spread

COLUMNS = {
    "round_ratio": "round",
    "rollout_ratio": "rollout",
    "update_ratio": "update",
    "memory_ratio": "peak memory",
}
SIDE_NAMES = {"trl": "TRL", "gmpo": "gmpo"}
SIDE_COLUMNS = {
    "round_seconds": "round, s",
    "rollout_tokens_per_second": "rollout, tokens/s",
    "update_seconds": "update of TRL's rows, s",
    "peak_gib": "peak memory, GiB",
}
Content = Mapping[str, Any]
OLDER_MARK = " *"
OLDER_RULE = (
    "* timed by an older rule: TRL's pass over old log-probabilities counted as rollout, so that "
    "rollout ratios are too high and update ratios too low; rounds and memory are not concerned"
)
FEW_MARK = " ‡"
FEW_PAIRS = (
    f"‡ medians of fewer than {ENOUGH_PAIRS} pairs of rounds, among which another pair may well "
    "lie beyond the extremes given here"
)
OLDER_PEAK_MARK = " †"
OLDER_PEAKS = (
    "† peaks by an older rule: the comparison kept four bytes a weight of TRL's gradients, and as "
    "much of gmpo's in bf16, which its own updates need only in steps of several micro-batches"
)


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="written by benchmarks.vs_trl")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args(argv)
    contents = [read_results(path) for path in arguments.files]
    print_table(contents)
    if arguments.plot is not None:
        draw(contents, arguments.plot)
    return 0


def sections(contents: Sequence[Content]) -> Iterator[Content]:
    """Each file's own figures, then those of its section of fp32, where there are any."""
    for content in contents:
        if "setting" in content:
            yield content
        if "fp32" in content:
            yield content["fp32"]


def entries(contents: Sequence[Content]) -> Iterator[tuple[str, Content, Content]]:
    """Name, section and figures of every variant that has pairs.

    The name of what was timed by an older rule ends with a mark, and that of few pairs.
    """
    for content in sections(contents):
        for variant, stored in content.get("variants", {}).items():
            if stored["pairs"]:
                # Anew, because files hold the figures that there were when they were written.
                figures = stored | summary(stored["pairs"])
                workload = content["setting"]["workload"]["name"]
                mark = "" if is_timed_by_this_rule(content) else OLDER_MARK
                mark += FEW_MARK if figures["num_pairs"] < ENOUGH_PAIRS else ""
                yield f"{workload}, {variant}{mark}", content, figures


def trl_setup(content: Content) -> str:
    """TRL's setting, with the rows that it runs at once where they are not a whole step's."""
    setup: str = content["trl_setup"]
    rows = content["setting"].get("trl_micro_batch")
    return setup if rows is None else f"{setup}, {rows} rows at once"


def is_timed_by_this_rule(content: Content) -> bool:
    """Whether its rounds were cut into stages as they are now."""
    return bool(content["setting"].get("stages") == STAGES)


def peak_mark(content: Content) -> str:
    """Of peaks that hold what the comparison kept; a GPU's do not."""
    setting = content["setting"]
    is_of_gpu = setting.get("made_with", {}).get("device") == "cuda"
    return "" if is_of_gpu or setting.get("peaks") == PEAKS else OLDER_PEAK_MARK


def print_table(contents: Sequence[Content], console: Console | None = None) -> None:
    """TRL's time over gmpo's, what either side took, and how alike their updates are."""
    console = console or Console(width=150)
    console.print(table_of_ratios(contents))
    console.print("peak memory is gmpo / TRL; updates are of the same completions")
    if not all(is_timed_by_this_rule(content) for _, content, _ in entries(contents)):
        console.print(OLDER_RULE)
    if any(peak_mark(content) for _, content, _ in entries(contents)):
        console.print(OLDER_PEAKS)
    if any(figures["num_pairs"] < ENOUGH_PAIRS for _, _, figures in entries(contents)):
        console.print(FEW_PAIRS)
    console.print(table_of_sides(contents))
    console.print(table_of_agreement(contents))
    for content in sections(contents):
        if "refused" in content:
            console.print(f"{content['setting']['workload']['name']} refused: {content['refused']}")


def table_of_ratios(contents: Sequence[Content]) -> Table:
    table = Table(title="TRL without vLLM / gmpo: median (min to max) over pairs of rounds")
    names = ("workload", "TRL", "gmpo", *COLUMNS.values(), "live TRL / gmpo", "pairs")
    for name in names:
        table.add_column(name, overflow="fold")
    for name, content, figures in entries(contents):
        live = figures["live_share"]
        table.add_row(
            name,
            trl_setup(content),
            content["gmpo_setup"]["dtype"],
            *(spread(figures, ratio) for ratio in RATIOS),
            spread(figures, "memory_ratio", median="memory_ratio") + peak_mark(content),
            f"{live['trl']:.2f} / {live['gmpo']:.2f}",
            str(figures["num_pairs"]),
        )
    return table


def table_of_sides(contents: Sequence[Content]) -> Table:
    """Rows of TRL and of gmpo."""
    table = Table(title="what either side took: median (min to max) over pairs of rounds")
    for name in ("workload", "side", *SIDE_COLUMNS.values()):
        table.add_column(name)
    for name, _, figures in entries(contents):
        for side, label in SIDE_NAMES.items():
            of_side = figures[side]
            spreads = [
                Spread(median=of_side[key], min=of_side[f"{key}_min"], max=of_side[f"{key}_max"])
                for key in SIDE_COLUMNS
            ]
            table.add_row(name, label, *(each.text() for each in spreads))
    return table


def table_of_agreement(contents: Sequence[Content]) -> Table:
    """gmpo's updates of TRL's rows against TRL's own, in the worst pair, and before the pairs."""
    table = Table(title="how alike the updates are")
    for name in (
        "workload",
        "smallest cosine: update",
        "first gradient",
        "largest difference",
        "SGD: cosine",
        "difference",
        "left to TRL in fp32",
    ):
        table.add_column(name)
    for name, content, figures in entries(contents):
        check = content.get("sgd_check")
        table.add_row(
            name,
            f"{figures['smallest_cosine']:.4f}",
            f"{figures['smallest_gradient_cosine']:.4f}",
            f"{figures['largest_difference']:.2g}",
            *((f"{check['cosine']:.4f}", f"{check['difference']:.2g}") if check else ("", "")),
            left_to_fp32(check or {}, figures["pairs"]),
        )
    return table


def left_to_fp32(check: Content, pairs: Sequence[Content]) -> str:
    """Which updates passed only because they are TRL's in fp32."""
    asked = {"SGD": check, **{f"pair {number}": pair for number, pair in enumerate(pairs, 1)}}
    found = [
        f"{name}: gmpo {each['exact']['cosine']:.4f}, TRL {each['exact']['trl_cosine']:.4f}"
        for name, each in asked.items()
        if "exact" in each
    ]
    return "; ".join(found) or "none"


def spread(figures: Content, name: str, *, median: str | None = None) -> str:
    middle = figures[median or f"{name}_median"]
    return f"{middle:.2f} ({figures[f'{name}_min']:.2f}-{figures[f'{name}_max']:.2f})"


def draw(contents: Sequence[Content], path: Path) -> None:
    """Bars of the ratios with their range, a group a workload and variant."""
    shown = list(entries(contents))
    figure = Figure(figsize=(3 + 2 * len(shown), 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(RATIOS)
    for place, ratio in enumerate(RATIOS):
        middles = [figures[f"{ratio}_median"] for _, _, figures in shown]
        below = [figures[f"{ratio}_median"] - figures[f"{ratio}_min"] for _, _, figures in shown]
        above = [figures[f"{ratio}_max"] - figures[f"{ratio}_median"] for _, _, figures in shown]
        positions = [number + (place - 1) * width for number in range(len(shown))]
        bars = axis.bar(positions, middles, width, yerr=[below, above], label=COLUMNS[ratio])
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    # Updates of no live group at all are hundreds of times as fast, beside rounds of three. The
    # limits leave room for the line at 1 and for the numbers above the bars.
    axis.set_yscale("log")
    least, most = (
        [figures[f"{ratio}_{end}"] for *_, figures in shown for ratio in RATIOS]
        for end in ("min", "max")
    )
    axis.set_ylim(0.8 * min([0.6, *least]), 1.4 * max([1.0, *most]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.axhline(1.0, color="black", linewidth=0.8)
    labels = [
        f"{name}\n{trl_setup(content)}\ngmpo {content['gmpo_setup']['dtype']}\n"
        f"{figures['num_pairs']} pair{'s' * (figures['num_pairs'] > 1)}"
        for name, content, figures in shown
    ]
    axis.set_xticks(range(len(shown)), labels, fontsize=8)
    axis.set_ylabel("times as fast as TRL without vLLM")
    figure.legend(loc="outside upper center", ncols=len(RATIOS), fontsize=8)
    notes = []
    if not all(is_timed_by_this_rule(content) for _, content, _ in shown):
        notes.append(OLDER_RULE)
    if any(figures["num_pairs"] < ENOUGH_PAIRS for _, _, figures in shown):
        notes.append(FEW_PAIRS)
    figure.supxlabel("\n".join(notes), fontsize=7, wrap=True)
    write_figure(path, figure)


if __name__ == "__main__":
    sys.exit(main())
