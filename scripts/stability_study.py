"""Is GMPO steadier than GRPO on a small mixture of experts? Objectives times seeds on countdown.

Every cell (an objective and a seed) is an ordinary gmpo run from the same warmed-up policy, with
the data order of its seed; it ends after its last round or when its reward has collapsed. What is
finished is not run again, a cell that was killed goes on, and the results file holds every cell
that is finished:

    python -m scripts.stability_study --jobs 2 --json docs/results/moe_stability.json

One stored cell run again, every number compared, in the arithmetic that it was computed in:

    python -m scripts.stability_study --check gmpo-seed0 --json docs/results/moe_stability.json

A results file that is there already keeps its arithmetic; a new one is computed in portable
arithmetic unless --arithmetic says otherwise (scripts/arithmetic.py tells them apart).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.options import ends_clearly, plotted_results_file
from scripts.arithmetic import KINDS, Kind, circumstances, enter, of_this_process
from scripts.moe_policy import WarmUp, warmed_up_policy
from scripts.stability_figures import collapse_round, log_digest, run_figures
from scripts.stability_report import markdown, plot, results

from gmpo.config import RunConfig
from gmpo.errors import NonFiniteError, RunStopped
from gmpo.policy.load import load_model, model_version
from gmpo.recipe import put_key, recipe_of_table
from gmpo.task_config import CountdownTask
from gmpo.tracking import provenance, read_lines
from gmpo.training import Report, train

LEARNING_RATE = 3e-4
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "grpo": {"objective.name": "grpo"},
    # The bounds of GMPO's clip, e^-0.4 and e^0.4, as half-widths of the ratio.
    "grpo-wide": {
        "objective.name": "grpo",
        "objective.clip_low": 0.33,
        "objective.clip_high": 0.49,
    },
    "gmpo": {"objective.name": "gmpo"},
    "gspo": {"objective.name": "gspo"},
}
CONTROLS: Mapping[str, Mapping[str, Any]] = {
    "grpo-lr-x30": {"objective.name": "grpo", "training.learning_rate": 30 * LEARNING_RATE},
    "grpo-lr-x0.001": {"objective.name": "grpo", "training.learning_rate": LEARNING_RATE / 1000},
}
"""What the definition of a collapse is held against: it must find one always, and never."""
CONTROL_SEEDS = (0, 1, 2)
SEEDS = tuple(range(10))
RUNS: Mapping[Kind, str] = {
    "native": "runs/moe_stability",
    "portable": "runs/moe_stability_portable",
}
CURVES = {
    "reward": "rollout/reward",
    "entropy": "rollout/entropy",
    "gradient_norm": "update/gradient_norm",
    "ratio_max": "ratio/max",
    "ratio_min": "ratio/min",
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all cells share."""

    warm_up: WarmUp = field(default_factory=WarmUp)
    task: CountdownTask = field(
        default_factory=lambda: CountdownTask(
            kind="countdown", train_items=3000, held_out_items=300, instruction=""
        )
    )
    rounds: int = 300
    steps_per_round: int = 8
    prompts_per_round: int = 16
    group_size: int = 8


def recipe_of(study: Study, cell: str, *, policy: Path) -> RunConfig:
    """The recipe of a cell that is named by its arm and seed, e.g. gmpo-seed0."""
    arm, _, seed = cell.rpartition("-seed")
    overrides = {**OBJECTIVES, **CONTROLS}[arm]
    table: dict[str, Any] = {
        "model": {"name": str(policy), "device": "cpu", "dtype": "fp32"},
        "task": study.task.model_dump(),
        "sampling": {
            "group_size": study.group_size,
            "prompts_per_round": study.prompts_per_round,
            "max_new_tokens": 12,
            "max_length": 64,
            "max_rows": study.prompts_per_round * study.group_size,
        },
        "training": {
            "rounds": study.rounds,
            "steps_per_round": study.steps_per_round,
            "learning_rate": LEARNING_RATE,
            "seed": int(seed),
        },
        "checkpoint": {"every_rounds": 50, "keep": 1},
        "evaluation": {"every_rounds": 0, "few_shot": 0, "sampled": True},
        "tracking": {"groups_per_round": 1},
    }
    for key, value in overrides.items():
        put_key(table, key, value)
    return recipe_of_table(table, source=cell)


def run_cell(study: Study, cell: str, *, runs: Path) -> dict[str, Any]:
    """The record of a cell, from its folder if it is finished there, else by running it to its end.

    A run that was killed goes on from its newest checkpoint.
    """
    folder = runs / cell
    record_file = folder / "cell.json"
    if record_file.is_file():
        stored: dict[str, Any] = json.loads(record_file.read_text())
        return stored
    torch.set_num_threads(1)  # another number would round sums otherwise
    policy = warmed_up_policy(study.task, study.warm_up, cache=runs)
    watch = _CollapseWatch(folder)
    ended = "finished"
    try:
        train(
            recipe_of(study, cell, policy=policy),
            folder=folder,
            resume=(folder / "recipe.toml").is_file(),
            report=watch.note,
            should_stop=watch.has_collapsed,
            warn=lambda sentence: print(f"{cell}: {sentence}", flush=True),
        )
    except RunStopped:
        ended = "collapsed"
    except NonFiniteError as error:
        ended = f"not finite: {error}"
    record = _record(study, cell, folder, ended=ended)
    record["policy"] = version_of(policy)
    record_file.write_text(json.dumps(record))
    for name in ("checkpoints", "rounds"):
        shutil.rmtree(folder / name, ignore_errors=True)  # 30 MB a cell that nothing reads again
    return record


class _CollapseWatch:
    """Whether the run's reward has collapsed by the round that it has come to."""

    def __init__(self, folder: Path) -> None:
        lines = [line for line in read_lines(folder, "metrics.jsonl") if line["kind"] == "round"]
        # A run that is resumed repeats the rounds since its checkpoint, number for number.
        self._rewards = {line["round"]: line["rollout/reward"] for line in lines}
        self._folder = folder
        self._round = 0

    def note(self, told: Report) -> None:
        self._round = told.round
        if told.stage == "round":
            self._rewards[told.round] = told.metrics["rollout/reward"]

    def has_collapsed(self) -> bool:
        rewards = [self._rewards[number] for number in range(1, self._round + 1)]
        start = evaluated(self._folder, "before", "sampled")
        return start is not None and collapse_round(rewards, start=start) is not None


def evaluated(folder: Path, stage: str, way: str) -> float | None:
    """Share of the held-out items that were right; None where that was not measured."""
    for line in read_lines(folder, "evaluations.jsonl"):
        for result in line["results"]:
            if line["stage"] == stage and result["name"] == way:
                outcomes = result["outcomes"].values()
                return sum(outcomes) / len(outcomes)
    return None


def _record(study: Study, cell: str, folder: Path, *, ended: str) -> dict[str, Any]:
    arm, _, seed = cell.rpartition("-seed")
    lines = list(read_lines(folder, "metrics.jsonl"))
    of_rounds = [line for line in lines if line["kind"] == "round"]
    survived = len(of_rounds) if ended != "finished" else study.rounds
    figures = run_figures(
        lines, steps_per_round=study.steps_per_round, collapsed=ended != "finished"
    )
    for stage in ("before", "after"):
        for way in ("greedy", "sampled"):
            figures[f"held_out_{way}_{stage}"] = evaluated(folder, stage, way)
    seconds = sum(
        line[f"time/{part}_seconds"]
        for line in of_rounds
        for part in ("rollout", "reward", "update")
    )
    return {
        "cell": cell,
        "arm": arm,
        "seed": int(seed),
        "ended": ended,
        "figures": {"rounds_survived": float(survived), **figures},
        "curves": {
            name: [_short(line.get(metric)) for line in of_rounds]
            for name, metric in CURVES.items()
        },
        "log_digest": log_digest(lines),
        "seconds_a_round": seconds / max(1, len(of_rounds)),
        "made_with": {**json.loads((folder / "run.json").read_text()), **circumstances()},
    }


def _short(value: float | None) -> float | None:
    """Four digits are enough for a plot; the digest is of all of them."""
    return None if value is None else float(f"{value:.4g}")


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    enter(arguments.arithmetic, module=__spec__.name)
    torch.set_num_threads(1)  # the warm-up's sums too
    study = Study()
    if arguments.check:
        return check(study, arguments.check, stored=arguments.json, runs=arguments.runs)
    claim(arguments.runs)
    if arguments.cell:
        run_cell(study, arguments.cell, runs=arguments.runs)
        return 0
    warmed_up_policy(study.task, study.warm_up, cache=arguments.runs)
    failed = run_missing(arguments)
    report = results(finished(arguments.runs), settings=settings_of(study), seeds=SEEDS)
    arguments.json.write_text(dump(report))
    plot(report, arguments.json.with_suffix(".png"))
    print(markdown(report))
    for cell in failed:
        print(f"{cell} stopped before its end, see {arguments.runs / cell}.log; run this again")
    return 1 if failed else 0


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=plotted_results_file, required=True, help="results file; a plot beside it"
    )
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="of runs in one arithmetic")
    parser.add_argument(
        "--arithmetic", choices=KINDS, help="that of the results file if there is one, or portable"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="*",
        default=list(SEEDS),
        metavar="SEED",
        help="run these; none writes the results of what is finished",
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one thread each")
    parser.add_argument(
        "--launcher", default="", metavar="COMMAND", help='put before each cell, e.g. "nice -n 19"'
    )
    parser.add_argument("--cell", help="run this one only, here, and write no results")
    parser.add_argument("--check", metavar="CELL", help="run a stored one again and compare")
    arguments = parser.parse_args(words)
    unknown = sorted(set(arguments.seeds) - set(SEEDS))
    if unknown:
        parser.error(f"--seeds {unknown} are not of the study, whose seeds are {list(SEEDS)}")
    for name in filter(None, (arguments.cell, arguments.check)):
        if name not in cells(SEEDS):
            parser.error(f"there is no cell {name!r}; there are {', '.join(cells(SEEDS))}")
    stored = arithmetic_of(arguments.json)
    if arguments.arithmetic and stored not in (None, arguments.arithmetic):
        parser.error(f"{arguments.json} was computed in {stored} arithmetic; choose another file")
    arguments.arithmetic = arguments.arithmetic or stored or "portable"
    arguments.runs = arguments.runs or Path(RUNS[arguments.arithmetic])
    return arguments


def arithmetic_of(file: Path) -> Kind | None:
    """What the cells of a results file were computed in; None without such a file."""
    if not file.is_file():
        return None
    kinds = {kind_of(record) for record in json.loads(file.read_text())["cells"]}
    return kinds.pop() if len(kinds) == 1 else None


def kind_of(record: Mapping[str, Any]) -> Kind:
    """A cell's arithmetic; there was one kind before it was written down."""
    kind: Kind = record["made_with"].get("arithmetic", "native")
    return kind


def claim(runs: Path) -> None:
    """Note the arithmetic of a folder's runs; a folder that was begun in another is refused."""
    note = runs / "arithmetic.txt"
    here = of_this_process()
    if not note.is_file():
        begun = "native" if any(runs.glob("*-seed*")) else here
        runs.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{begun}\n")
    begun = note.read_text().strip()
    if begun != here:
        raise SystemExit(
            f"{runs} holds runs in {begun} arithmetic; use --arithmetic {begun}, or other --runs"
        )


def cells(seeds: Sequence[int]) -> list[str]:
    """In the order they run: all objectives of a seed, its controls, then the next seed."""
    names = []
    for seed in seeds:
        arms = [*OBJECTIVES, *(CONTROLS if seed in CONTROL_SEEDS else ())]
        names += [f"{arm}-seed{seed}" for arm in arms]
    return names


def run_missing(arguments: argparse.Namespace) -> list[str]:
    """Each cell that is not finished, in a process of its own; those that stopped early."""
    missing = [
        cell
        for cell in cells(arguments.seeds)
        if not (arguments.runs / cell / "cell.json").is_file()
    ]

    def run(cell: str) -> bool:
        command = [*shlex.split(arguments.launcher), sys.executable, "-m", __spec__.name]
        command += ["--cell", cell, "--runs", str(arguments.runs), "--json", str(arguments.json)]
        command += ["--arithmetic", arguments.arithmetic]
        with (arguments.runs / f"{cell}.log").open("a") as log:
            done = subprocess.run(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        print(f"{cell}: {'finished' if done.returncode == 0 else 'stopped'}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(max_workers=arguments.jobs) as pool:
        succeeded = list(pool.map(run, missing))
    return [cell for cell, is_done in zip(missing, succeeded, strict=True) if not is_done]


def finished(runs: Path) -> list[dict[str, Any]]:
    files = [runs / cell / "cell.json" for cell in cells(SEEDS)]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def settings_of(study: Study) -> dict[str, Any]:
    return {
        "warm_up": asdict(study.warm_up),
        "task": study.task.model_dump(),
        "rounds": study.rounds,
        "steps_per_round": study.steps_per_round,
        "prompts_per_round": study.prompts_per_round,
        "group_size": study.group_size,
        "learning_rate": LEARNING_RATE,
        "arms": {**OBJECTIVES, **CONTROLS},
    }


def check(study: Study, cell: str, *, stored: Path, runs: Path) -> int:
    """Run a stored cell again in a folder of its own, in this process's arithmetic.

    Returns:
        0 if every number is the same; 1 if one differs; 2 if the run was not made, because the
        weights that it would begin with are others already.
    """
    records = {record["cell"]: record for record in json.loads(stored.read_text())["cells"]}
    if cell not in records:
        raise SystemExit(f"{stored} has no cell {cell!r}; it has {', '.join(records)}")
    record = records[cell]
    policy = warmed_up_policy(study.task, study.warm_up, cache=runs)
    if version_of(policy) != record["policy"]:
        print(other_weights(cell, record))
        return 2
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(policy, Path(folder) / policy.name)
        again = run_cell(study, cell, runs=Path(folder))
    different = [
        key
        for key in ("ended", "figures", "curves", "log_digest")
        if again[key] != records[cell][key]
    ]
    if different:
        print(f"{cell}: {', '.join(different)} differ; {since_then(record, again['made_with'])}")
        return 1
    print(
        f"{cell}: every number of {len(again['curves']['reward'])} rounds is the same, "
        f"in {kind_of(record)} arithmetic"
    )
    return 0


def other_weights(cell: str, record: Mapping[str, Any]) -> str:
    """Why a cell cannot be repeated here, where warming up gives other weights."""
    changed = since_then(record, {**provenance(), **circumstances()})
    if kind_of(record) == "native":
        return (
            f"{cell} cannot be repeated here: the weights that all runs begin with differ already. "
            "It was computed in native arithmetic, which another kind of processor or version of "
            f"torch rounds differently ({changed}). Only what made it repeats it; results in "
            "portable arithmetic repeat on other processors too"
        )
    return (
        f"{cell} cannot be repeated here: the weights that all runs begin with differ already, in "
        f"portable arithmetic too, which other versions of torch or the C library change: {changed}"
    )


def since_then(record: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What made a cell and is not the same any more."""
    then = record["made_with"]
    changed = [
        f"{name} was {then.get(name, 'not written down')}, is {value}"
        for name, value in here.items()
        if then.get(name) != value
    ]
    return "; ".join(changed) or "made with the same versions on the same kind of processor"


def version_of(policy: Path) -> str:
    return model_version(load_model(str(policy), device="cpu", dtype="fp32"))


def dump(report: Mapping[str, Any]) -> str:
    """A line a cell, so that a change of one is a change of one line."""
    head = json.dumps({key: value for key, value in report.items() if key != "cells"}, indent=1)
    body = ",\n".join(json.dumps(cell) for cell in report["cells"])
    return f'{head[:-2]},\n "cells": [\n{body}\n]}}\n'


if __name__ == "__main__":
    sys.exit(main())
