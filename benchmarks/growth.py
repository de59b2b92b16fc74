"""How time and peak memory of a round grow with group size, prompt length and completion length.

Every point is a process of its own, because peak resident memory is a process's; one round warms it
up, and the medians of the next ones count. Every completion is as long as it may be, and every
group is alive. One quantity is varied; the others are those of the short workload, with 4 prompts a
round. Group size is varied behind short prompts and behind long ones: where a prompt is run once a
group, a further completion costs about the same behind either. Where it is run once a completion,
that costs as many times more as prompt and completion together are longer. The updates of the two
sides are of rounds of their own and are not held against each other, as `vs_trl.py` does. An
interrupted run goes on where it was.

    python -m benchmarks.growth --json docs/results/growth.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.comparison import add_trl_setup, require_trl, trl_setup_of
from benchmarks.devices import add_precision, resolve_precision
from benchmarks.exchange import Scratch, write_start
from benchmarks.growth_report import FIGURES, draw, print_tables
from benchmarks.options import (
    add_threads,
    ends_clearly,
    plotted_results_file,
    require_at_least_one,
    require_threads,
)
from benchmarks.ratios import STAGES
from benchmarks.results import Results, made_with
from benchmarks.spread import spread
from benchmarks.worker import Worker, WorkerFailed
from benchmarks.workloads import WORKLOADS, Workload

NUM_PROMPTS = 4
TRL_REPEATS = 1
"""TRL's rounds take minutes behind long prompts, and the question is only whether they do."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of one curve; `value` is what is varied."""

    curve: str
    value: int
    workload: Workload

    @property
    def name(self) -> str:
        return f"{self.curve} {self.value}"


def curves(model: str, *, is_quick: bool = False) -> list[Point]:
    """Every point of gmpo's; a quick run has the smallest sizes of each curve."""
    base = replace(
        WORKLOADS["short"],
        name="growth",
        prompts_per_round=NUM_PROMPTS,
        ignores_end=True,
        model=model,
    )
    long = "filler-8" if is_quick else "filler-480"
    groups = (2, 4, 8) if is_quick else (2, 4, 8, 16, 32)
    behind_long = (2, 4) if is_quick else (2, 4, 8, 16)
    prompts = (8, 32) if is_quick else (32, 96, 224, 480, 992)
    completions = (32, 64) if is_quick else (32, 64, 128, 256, 512)
    points = [
        *(Point(curve="group", value=n, workload=replace(base, group_size=n)) for n in groups),
        *(
            Point(
                curve="group, long prompts",
                value=n,
                workload=replace(base, group_size=n, prompts=long),
            )
            for n in behind_long
        ),
        *(
            Point(
                curve="prompt",
                value=n + 32,
                workload=replace(base, prompts=f"filler-{n}"),
            )
            for n in prompts
        ),
        *(
            Point(curve="completion", value=n, workload=replace(base, max_new_tokens=n))
            for n in completions
        ),
    ]
    return points


def trl_points(points: Sequence[Point], *, is_quick: bool = False) -> list[Point]:
    """Those that TRL does too: group size behind short and behind long prompts."""
    sizes = (2, 4) if is_quick else (4, 8, 16)
    return [p for p in points if p.curve.startswith("group") and p.value in sizes]


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    require_trl()  # the release is part of the setting
    points = curves(arguments.model, is_quick=arguments.quick)
    setting = {
        "base": asdict(points[0].workload) | {"group_size": None},
        "quick": arguments.quick,
        "dtype": arguments.dtype,
        "trl_setup": trl_setup_of(arguments),
        "stages": STAGES,
        "made_with": made_with(threads=arguments.threads),
    }
    results = Results(arguments.json, setting)
    results.note_load()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(folder=Path(folder))
        write_start(arguments.model, scratch.start)
        for point in points:
            measure(point, "gmpo", arguments, results, scratch)
        if arguments.with_trl:
            for point in trl_points(points, is_quick=arguments.quick):
                measure(point, "trl", arguments, results, scratch)
    print_tables(results.content)
    draw(results.content, arguments.json.with_suffix(".png"))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", required=True, type=plotted_results_file, metavar="FILE")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    add_precision(parser, what="of gmpo")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of gmpo a point")
    parser.add_argument(
        "--with-trl",
        action="store_true",
        help=f"TRL too at group sizes 4, 8 and 16, {TRL_REPEATS} round a point: some 20 minutes",
    )
    parser.add_argument("--quick", action="store_true", help="only the smallest sizes")
    add_trl_setup(parser)
    add_threads(parser)
    arguments = parser.parse_args(argv)
    require_at_least_one(parser, repeats=arguments.repeats)
    require_threads(parser, arguments.threads)
    resolve_precision(arguments)
    return arguments


def measure(
    point: Point, side: str, arguments: argparse.Namespace, results: Results, scratch: Scratch
) -> None:
    """Rounds of the point in a process of its own, unless the file has them."""
    of_side: dict[str, Any] = results.content.setdefault(side, {})
    repeats = arguments.repeats if side == "gmpo" else TRL_REPEATS
    if len(of_side.get(point.name, {}).get("rounds", ())) >= repeats:
        return
    settings = {
        "workload": asdict(point.workload),
        "threads": arguments.threads,
        "scratch": str(scratch.folder),
    }
    if side == "gmpo":
        settings["dtype"] = arguments.dtype
    else:
        precision, _, rollouts = trl_setup_of(arguments).partition("/")
        settings["setup"] = {"precision": precision, "rollouts": rollouts}
    with Worker(f"benchmarks.{side}_side", settings) as worker:
        rounds = [
            worker.ask("round", number=number, live_groups=NUM_PROMPTS)
            for number in range(repeats + 1)
        ][1:]
    of_side[point.name] = entry(point, rounds)
    results.save()
    print(line(point, side, of_side[point.name]), flush=True)


def entry(point: Point, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the tables and the plot need of a point.

    Raises:
        WorkerFailed: a completion ended early, so that sizes are not those that were asked for.
    """
    wanted = NUM_PROMPTS * point.workload.group_size * point.workload.max_new_tokens
    tokens = {each["tokens"] for each in rounds}
    if tokens != {wanted}:
        raise WorkerFailed(
            f"{point.name} gave rounds of {sorted(tokens)} completion tokens, and {wanted} were "
            "asked for; choose a size within the model's context"
        )
    return {
        "curve": point.curve,
        "value": point.value,
        "completion_length": point.workload.max_new_tokens,
        "completion_tokens": wanted,
        "prompt_tokens": rounds[0]["prompt_tokens"],
        **{figure: spread([each[figure] for each in rounds]).as_dict() for figure in FIGURES},
        "rounds": list(rounds),
    }


def line(point: Point, side: str, of_point: dict[str, Any]) -> str:
    rollout, update, memory = (of_point[figure]["median"] for figure in FIGURES)
    return (
        f"{side}, {point.name}: prompts of {of_point['prompt_tokens']:.0f} tokens, rollout "
        f"{rollout:.2f} s, update {update:.2f} s, peak {memory:.2f} GiB"
    )


if __name__ == "__main__":
    sys.exit(main())
