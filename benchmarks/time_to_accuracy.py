"""Seconds of training until a given held-out accuracy on the quick start's task, gmpo against TRL.

Both sides get the same model, prompts in the same order, rewards, group size, completion limit,
temperature, optimizer steps a round and step size of every step; TRL runs without gradient
checkpointing, as `--trl` says: unless given, in the setting that trials find best (see vs_trl.py),
and with a round's rows in the order of its prompts, not shuffled, as in vs_trl.py. Each side
and seed is a process of its own. Every few rounds its weights answer the same held-out items at
temperature 0, through one and the same evaluator, whose time does not count. A run ends when it
reaches the target, or after the recipe's rounds: then its whole time stands for a longer one. An
interrupted study goes on with the seeds and sides that are missing.

    python -m benchmarks.time_to_accuracy --json docs/results/time_to_accuracy.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy_report import SIDES, draw, print_table, summary
from benchmarks.comparison import add_trl_setup, require_trl, trl_setup_of
from benchmarks.devices import add_precision, resolve_precision
from benchmarks.exchange import Scratch, write_start
from benchmarks.gmpo_side import context_length
from benchmarks.held_out import HeldOut
from benchmarks.options import (
    add_threads,
    ends_clearly,
    plotted_results_file,
    require_at_least_one,
    require_threads,
)
from benchmarks.results import Results, made_with
from benchmarks.worker import Worker
from benchmarks.workloads import Workload
from gmpo.config import RunConfig
from gmpo.recipe import load_recipe
from gmpo.schedules import learning_rate_factor

RECIPE = "quickstart"


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if "trl" in arguments.sides:
        require_trl()
    torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments)
    setting = {
        "recipe": RECIPE,
        "model": arguments.model,
        "dtype": arguments.dtype,
        "trl_setup": trl_setup_of(arguments),
        "target": arguments.target,
        "items": arguments.items,
        "every_rounds": arguments.every_rounds,
        "rounds": arguments.rounds,
        "workload": asdict(workload_of(recipe, seed=0)),
        "made_with": made_with(threads=arguments.threads),
    }
    results = Results(arguments.json, setting)
    results.note_load()
    run_study(arguments, recipe, results)
    print_table(results.content)
    draw(results.content, arguments.json.with_suffix(".png"))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", required=True, type=plotted_results_file, metavar="FILE")
    parser.add_argument("--target", type=float, default=0.5, help="held-out accuracy, in (0, 1]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--items", type=int, default=128, help="held-out items")
    parser.add_argument("--every-rounds", type=int, default=1, help="rounds between evaluations")
    parser.add_argument("--rounds", type=int, default=24, help="most, and the schedule's length")
    add_precision(parser, what="on both sides")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    add_trl_setup(parser)
    add_threads(parser)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.target <= 1:
        parser.error(f"--target is {arguments.target}; an accuracy above 0 and up to 1 is needed")
    counts = {name: vars(arguments)[name] for name in ("items", "every_rounds", "rounds")}
    require_at_least_one(parser, **counts)
    require_threads(parser, arguments.threads)
    resolve_precision(arguments)
    return arguments


def recipe_of(arguments: argparse.Namespace) -> RunConfig:
    """The quick start with this study's model, precision, length and evaluation."""
    changes = {
        "model.name": arguments.model,
        "model.device": "cpu",
        "model.dtype": arguments.dtype,
        "sampling.max_length": min(4096, context_length(arguments.model)),
        "training.rounds": arguments.rounds,
        "evaluation.few_shot": 0,
        "evaluation.every_rounds": 0,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return load_recipe(RECIPE, [*overrides, "evaluation.sampled=false"])


def workload_of(recipe: RunConfig, *, seed: int) -> Workload:
    """The recipe's rounds; its task is that of the `sums` prompts."""
    return Workload(
        name=RECIPE,
        prompts="sums",
        group_size=recipe.sampling.group_size,
        prompts_per_round=recipe.sampling.prompts_per_round,
        max_new_tokens=recipe.sampling.max_new_tokens,
        model=recipe.model.name,
        learning_rate=recipe.training.learning_rate,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class Study:
    """What every run of the study is made with."""

    recipe: RunConfig
    trl_setup: str
    target: float
    every_rounds: int
    threads: int
    scratch: Scratch
    held_out: HeldOut
    accuracy_before: float


def run_study(arguments: argparse.Namespace, recipe: RunConfig, results: Results) -> None:
    """Every seed and side that the file lacks."""
    runs: dict[str, Any] = results.content.setdefault("runs", {})
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(HeldOut(recipe, num_items=arguments.items)) as held_out,
    ):
        scratch = Scratch(folder=Path(folder))
        write_start(recipe.model.name, scratch.start)
        study = Study(
            recipe=recipe,
            trl_setup=trl_setup_of(arguments),
            target=arguments.target,
            every_rounds=arguments.every_rounds,
            threads=arguments.threads,
            scratch=scratch,
            held_out=held_out,
            accuracy_before=held_out.accuracy(scratch.start),
        )
        for place, seed in enumerate(arguments.seeds):
            # In turns, so that no side always runs on the warmer machine.
            for side in arguments.sides if place % 2 == 0 else arguments.sides[::-1]:
                if f"{side}/{seed}" not in runs:
                    runs[f"{side}/{seed}"] = run(study, side, seed)
                    results.content["summary"] = summary(runs)
                    results.save()


def run(study: Study, side: str, seed: int) -> dict[str, Any]:
    """One side's training with one seed, until the target or the recipe's last round."""
    curve = [{"rounds": 0, "seconds": 0.0, "accuracy": study.accuracy_before}]
    rounds: list[dict[str, Any]] = []
    last = study.recipe.training.rounds
    with learner(study, side, seed) as worker:
        while len(rounds) < last and curve[-1]["accuracy"] < study.target:
            rounds.append(worker.ask("learn", **request(study, side, number=len(rounds))))
            if len(rounds) % study.every_rounds and len(rounds) < last:
                continue
            worker.ask("save")
            point = {
                "rounds": len(rounds),
                "seconds": sum(each["round_seconds"] for each in rounds),
                "accuracy": study.held_out.accuracy(study.scratch.learned),
            }
            curve.append(point)
            print(
                f"{side}, seed {seed}: accuracy {point['accuracy']:.3f} after {point['rounds']} "
                f"rounds, {point['seconds']:.0f} s of training, reward "
                f"{rounds[-1]['mean_reward']:.2f}",
                flush=True,
            )
    return {
        "side": side,
        "seed": seed,
        "is_reached": curve[-1]["accuracy"] >= study.target,
        "seconds": curve[-1]["seconds"],
        "num_rounds": len(rounds),
        "curve": curve,
        "rounds": rounds,
    }


def request(study: Study, side: str, *, number: int) -> dict[str, Any]:
    """What a side is told of a round: gmpo's recipe has the step sizes, TRL is handed them."""
    if side == "gmpo":
        return {"number": number}
    training = study.recipe.training
    steps = range(number * training.steps_per_round, (number + 1) * training.steps_per_round)
    factors = [
        learning_rate_factor(
            step,
            total_steps=training.rounds * training.steps_per_round,
            warmup_steps=training.warmup_steps,
            schedule=training.schedule,
            final_fraction=training.final_learning_rate_fraction,
        )
        for step in steps
    ]
    return {"number": number, "learning_rates": [training.learning_rate * f for f in factors]}


def learner(study: Study, side: str, seed: int) -> Worker:
    """A side's process, with the seed's prompts and randomness."""
    recipe = study.recipe
    settings: dict[str, Any] = {
        "workload": asdict(workload_of(recipe, seed=seed)),
        "threads": study.threads,
        "scratch": str(study.scratch.folder),
    }
    if side == "gmpo":
        names = {"rounds", "schedule", "warmup_steps", "final_learning_rate_fraction"}
        settings["dtype"] = recipe.model.dtype
        settings["changes"] = {
            "training": recipe.training.model_dump(include=names),
            "sampling": {"max_rows": recipe.sampling.max_rows},
        }
    else:
        precision, _, rollouts = study.trl_setup.partition("/")
        settings["setup"] = {"precision": precision, "rollouts": rollouts}
    return Worker(f"benchmarks.{side}_side", settings)


if __name__ == "__main__":
    sys.exit(main())
