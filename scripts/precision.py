"""Speed against mismatch for every precision that `model.dtype` knows, and what `auto` takes here.

Each precision is a process of its own with the same model, prompts and sizes (the short workload,
completions of full length, every group alive). Mismatch is |log pi_trainer - log pi_sampler| of
each sampled token on unchanged weights. Where it is beyond the bounds, the sampler's
log-probabilities may not stand for the old policy's, and the trainer has to recompute them: a
precision keeps the bounds if it is within them or recomputes. A precision that is in the file
already is not run again.

    python -m scripts.precision --json docs/results/precision.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
import torch
from benchmarks.exchange import Scratch, write_start
from benchmarks.options import (
    add_threads,
    ends_clearly,
    plotted_results_file,
    require_at_least_one,
    require_threads,
)
from benchmarks.results import Results, made_with, write_figure
from benchmarks.spread import Spread, spread
from benchmarks.worker import Worker
from benchmarks.workloads import WORKLOADS, Workload
from matplotlib.figure import Figure

from gmpo.config import ModelConfig
from gmpo.policy.load import choose_dtype
from gmpo.update import Mismatch

PRECISIONS = tuple(
    name for name in get_args(ModelConfig.model_fields["dtype"].annotation) if name != "auto"
)
MISMATCH_ROUNDS = 2


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    workload = replace(WORKLOADS["short"], model=arguments.model, ignores_end=True)
    setting = {
        "workload": asdict(workload),
        "repeats": arguments.repeats,
        "made_with": made_with(threads=arguments.threads),
    }
    results = Results(arguments.json, setting)
    results.note_load()
    measure_all(workload, arguments, results)
    print(table(results.content))
    draw(results.content["precisions"], arguments.json.with_suffix(".png"))
    return 1 if default_keeps_bounds(results.content) is False else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", required=True, type=plotted_results_file, metavar="FILE")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each precision")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        metavar="PRECISION",
        help=f"{' or '.join(PRECISIONS)}; all unless given",
    )
    add_threads(parser)
    arguments = parser.parse_args(argv)
    require_at_least_one(parser, repeats=arguments.repeats)
    require_threads(parser, arguments.threads)
    return arguments


def measure_all(workload: Workload, arguments: argparse.Namespace, results: Results) -> None:
    """Every precision that the file lacks, and which of them `auto` takes."""
    torch.set_num_threads(arguments.threads)
    results.content.setdefault("default", choose_dtype("auto", device=torch.device("cpu")))
    found: dict[str, Any] = results.content.setdefault("precisions", {})
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(folder=Path(folder))
        write_start(workload.model, scratch.start)
        for precision in arguments.precisions:
            if precision not in found:
                found[precision] = measured(workload, precision, arguments, scratch)
                results.save()
                print(f"{precision}: done", flush=True)


def measured(
    workload: Workload, precision: str, arguments: argparse.Namespace, scratch: Scratch
) -> dict[str, Any]:
    """Rounds after one that warms up, then the mismatch of further ones."""
    settings = {
        "workload": asdict(workload),
        "threads": arguments.threads,
        "scratch": str(scratch.folder),
        "dtype": precision,
    }
    all_groups = workload.prompts_per_round
    with Worker("benchmarks.gmpo_side", settings) as worker:
        rounds = [
            worker.ask("round", number=number, live_groups=all_groups)
            for number in range(arguments.repeats + 1)
        ][1:]
        gaps: list[float] = []
        for number in range(MISMATCH_ROUNDS):
            gaps += worker.ask("mismatch", number=number)["gaps"]
    rates = [each["tokens"] / each["rollout_seconds"] for each in rounds]
    return {
        "rollout_tokens_per_second": spread(rates).as_dict(),
        "update_seconds": spread([each["update_seconds"] for each in rounds]).as_dict(),
        "peak_gib": max(each["peak_gib"] for each in rounds),
        "mismatch": mismatch_of(gaps),
        "recomputes_old_logprobs": not all(each["used_sampler_logprobs"] for each in rounds),
        "rounds": rounds,
    }


def mismatch_of(gaps: Sequence[float]) -> dict[str, float]:
    return {
        "mean": fmean(gaps),
        "p99": float(np.quantile(gaps, 0.99)),
        "max": max(gaps),
        "num_tokens": len(gaps),
    }


def is_within_bounds(figures: dict[str, Any]) -> bool:
    """Whether the sampler's log-probabilities may stand for the old policy's."""
    mismatch = figures["mismatch"]
    return Mismatch(
        mean=mismatch["mean"], max=mismatch["max"], num_tokens=mismatch["num_tokens"]
    ).is_small


def keeps_bounds(figures: dict[str, Any]) -> bool:
    return is_within_bounds(figures) or bool(figures["recomputes_old_logprobs"])


def default_keeps_bounds(content: dict[str, Any]) -> bool | None:
    """None where the default was not measured."""
    figures = content["precisions"].get(content["default"])
    return None if figures is None else keeps_bounds(figures)


def table(content: dict[str, Any]) -> str:
    """Markdown: a row a precision, and what is said of the default."""
    bounds = f"{Mismatch.MEAN_BOUND:g} / {Mismatch.MAX_BOUND:g}"
    lines = [
        "| precision | rollout, tokens/s | update, s | peak, GiB | mismatch, nats: mean | 99 % "
        f"| max | within {bounds} | old log-probabilities |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in content["precisions"].items():
        mismatch = figures["mismatch"]
        lines.append(
            f"| {name} | {Spread(**figures['rollout_tokens_per_second']).text()} "
            f"| {Spread(**figures['update_seconds']).text()} | {figures['peak_gib']:.2f} "
            f"| {mismatch['mean']:.2g} | {mismatch['p99']:.2g} | {mismatch['max']:.2g} "
            f"| {'yes' if is_within_bounds(figures) else 'no'} "
            f"| {'recomputed' if figures['recomputes_old_logprobs'] else 'of the sampler'} |"
        )
    keeps = default_keeps_bounds(content)
    kept = f"and {'keeps' if keeps else 'BREAKS'} the bounds"
    if keeps is None:
        kept = "which was not measured"
    lines += ["", f"The default, auto, takes {content['default']} here, {kept}."]
    return "\n".join(lines)


def draw(precisions: dict[str, Any], path: Path) -> None:
    """Speed over mismatch, a point a precision, and the bound on the mean."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    for name, figures in precisions.items():
        speed = figures["rollout_tokens_per_second"]["median"]
        axis.plot(figures["mismatch"]["mean"], speed, "o", label=name)
    axis.axvline(Mismatch.MEAN_BOUND, color="black", linestyle=":", label="bound on the mean")
    axis.set_xscale("log")
    axis.set_xlabel("mean mismatch, nats")
    axis.set_ylabel("rollout, tokens/s")
    axis.update_datalim([(0, 0)], updatex=False)  # the margin above is a share of the whole axis
    axis.set_ylim(bottom=0)
    axis.legend()
    write_figure(path, figure)


if __name__ == "__main__":
    sys.exit(main())
