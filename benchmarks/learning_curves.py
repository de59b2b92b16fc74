"""Do `engine = "fast"` and `"plain"` learn alike? Rewards by round on the quick start, by seed.

Every seed is trained with either engine, with the same prompts and random numbers; both learn in
the recipe's own loop. The difference of rewards (fast minus plain) is taken round by round and
seed by seed. The engines are said to agree if the 95 % interval of the mean difference over seeds,
each seed's averaged over its rounds, contains 0 and is no wider than `--widest`. Intervals of
single rounds are shown and decide nothing: one in twenty misses 0 by chance.

`--control TOKENS` trains the fast engine a second time, with micro-batches of so many tokens: the
same sums in another order. What that changes shows how far rounding alone leads curves apart.

Resumable: a finished run is read, of whichever commit, which is stored and told; an unfinished one
goes on from its newest checkpoint, at the commit that began it.

    python -m benchmarks.learning_curves --rounds 6 --set training.schedule=constant \\
        --seeds 0 1 2 3 4 5 --json docs/results/learning_curves.json
"""

from __future__ import annotations

import argparse
import hashlib
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from scripts.seeds import is_finished

from benchmarks.options import (
    BenchmarkError,
    ends_clearly,
    plotted_results_file,
    require_at_least_one,
)
from benchmarks.results import Results, made_here, write_figure
from gmpo.leash import leashed
from gmpo.tracking import builds_of, provenance, read_lines

ENGINES = ("fast", "plain")
CONTROL = "control"
"""The fast engine with other micro-batches."""
LEAST_SEEDS = 2
"""Below, there is no interval over seeds."""


class RunFailed(BenchmarkError):
    """A training run ended with an error, which stands above."""


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    setting = {
        "recipe": arguments.recipe,
        "overrides": overrides_of(arguments),
        "rounds": arguments.rounds,
        "widest": arguments.widest,
        **({} if arguments.control is None else {"control": arguments.control}),
        "made_with": made_here(),
    }
    results = Results(arguments.json, setting)
    results.note_load()
    curves: dict[str, Any] = results.content.setdefault("rewards", {})
    # Not the report's: a finished run may be older.
    commits: dict[str, str | None] = results.content.setdefault("commits", {})
    for seed in arguments.seeds:
        for name in (*ENGINES, *([CONTROL] if arguments.control else [])):
            if f"{name}/{seed}" not in commits:
                curves[f"{name}/{seed}"] = trained(name, seed, arguments)
                commits[f"{name}/{seed}"] = commit_of(run_folder(name, seed, arguments))
                results.save()
    results.content["comparison"] = compared(curves, widest=arguments.widest)
    print_tables(results.content["comparison"])
    if told := other_commits(commits, setting["made_with"]["commit"]):
        print(told)
    if arguments.control:
        results.content["control"] = compared(curves, other=CONTROL, widest=arguments.widest)
        print_differences(results.content["control"], other=CONTROL)
    results.save()
    draw(curves, arguments.json.with_suffix(".png"))
    return 0 if results.content["comparison"]["agree"] else 3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", required=True, type=plotted_results_file, metavar="FILE")
    parser.add_argument("--recipe", default="quickstart", help="bundled name or path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--widest", type=float, default=0.1, help="interval that still says agree")
    parser.add_argument(
        "--control",
        type=int,
        metavar="TOKENS",
        help="the fast engine again, with micro-batches of at most so many tokens",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"), help="folder of the runs")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)
    if len(set(arguments.seeds)) < LEAST_SEEDS:
        parser.error(
            f"--seeds has {len(set(arguments.seeds))} seed; an interval over seeds needs "
            f"{LEAST_SEEDS} or more"
        )
    require_at_least_one(parser, rounds=arguments.rounds)
    if arguments.control is not None:
        require_at_least_one(parser, control=arguments.control)
    if not 0 < arguments.widest <= 1:
        parser.error(f"--widest is {arguments.widest}; a reward above 0 and up to 1 is needed")
    return arguments


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """What both engines' runs change of the recipe: no evaluation but the smallest."""
    return [
        f"training.rounds={arguments.rounds}",
        f"model.dtype={arguments.dtype}",
        "training.gradient_cosine_every=0",
        "evaluation.items=1",
        "evaluation.few_shot=0",
        "evaluation.sampled=false",
        "evaluation.every_rounds=0",
        *arguments.overrides,
    ]


def own_overrides(name: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """What a curve's runs change besides."""
    own = [f"training.engine={'plain' if name == 'plain' else 'fast'}", f"training.seed={seed}"]
    if name == CONTROL:
        own.append(f"training.max_tokens_per_micro_batch={arguments.control}")
    return own


def trained(name: str, seed: int, arguments: argparse.Namespace) -> list[float]:
    """Mean reward of each round of the run, which is made, or gone on with, where it must be.

    Args:
        name: of the curve: an engine, or the control.
        seed: of the run.
        arguments: of the command.

    Raises:
        RunFailed: the run ended with an error, or another commit began it and did not end it.
    """
    folder = run_folder(name, seed, arguments)
    command: list[str | Path] = ["train"]
    if any(folder.glob("checkpoints/round-*")):
        require_same_commit(folder)
        command += ["--run", folder, "--resume"]
    else:
        command += [arguments.recipe, "--run", folder]
        for override in [*overrides_of(arguments), *own_overrides(name, seed, arguments)]:
            command += ["--set", override]
    # SIGTERM would finish a round first, which takes minutes; resuming is exact.
    leash = leashed(command, ended_by=signal.SIGKILL)
    code = 0 if is_finished(folder) else subprocess.run(leash, check=False).returncode
    if code:
        raise RunFailed(
            f"{name}, seed {seed}, ended with exit code {code}; run this again to go on, or "
            f"remove {folder} to begin it anew"
        )
    rewards = [
        line["rollout/reward"]
        for line in read_lines(folder, "metrics.jsonl")
        if line["kind"] == "round"
    ]
    if len(rewards) != arguments.rounds:
        raise RunFailed(
            f"{folder} has {len(rewards)} rounds and {arguments.rounds} were asked for; remove it "
            "or name another folder with --runs"
        )
    return rewards


def run_folder(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Where a curve's run lies."""
    label = f"{name}{arguments.control}" if name == CONTROL else name
    folder: Path = arguments.runs / f"{study_name(arguments)}-{label}-seed{seed}"
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit that began a run; None if it was not noted.

    Raises:
        RunFolderError: the note cannot be read.
    """
    return next((build["commit"] for build in builds_of([folder])), None)


def require_same_commit(folder: Path) -> None:
    """An unfinished run goes on at its own commit alone, so that it is of one.

    Raises:
        RunFailed: another commit began it.
    """
    begun, now = commit_of(folder), provenance()["commit"]
    if begun != now and not is_finished(folder):
        raise RunFailed(
            f"{folder} was begun at commit {begun} and is not finished, and this is {now}; check "
            "that commit out, or remove the folder to begin the run anew"
        )


def other_commits(commits: dict[str, str | None], now: str | None) -> str | None:
    """Which runs are of which commits; None if all are of the one that makes the report."""
    if set(commits.values()) <= {now}:
        return None
    runs: dict[str | None, list[str]] = {}
    for name, commit in commits.items():
        runs.setdefault(commit, []).append(name)
    told = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in runs.items())
    return f"not all runs are of this commit, {now}, but by their folders of\n{told}"


def study_name(arguments: argparse.Namespace) -> str:
    """The recipe's name and a digest of its changes: no run is taken for one of another study."""
    changes = hashlib.blake2b("\n".join(overrides_of(arguments)).encode(), digest_size=4)
    return f"{Path(arguments.recipe).stem}-{changes.hexdigest()}"


def compared(
    curves: dict[str, list[float]], *, other: str = "plain", widest: float
) -> dict[str, Any]:
    """Differences fast minus other by round and over all rounds, with 95 % intervals over seeds."""
    seeds = sorted({int(name.partition("/")[2]) for name in curves})
    by_seed = [
        [a - b for a, b in zip(curves[f"fast/{s}"], curves[f"{other}/{s}"], strict=True)]
        for s in seeds
    ]
    by_round = [list(values) for values in zip(*by_seed, strict=True)]
    overall = interval([fmean(values) for values in by_seed])
    low, high = overall["low"], overall["high"]
    return {
        "seeds": seeds,
        "by_round": [interval(values) for values in by_round],
        "overall": overall,
        "widest": widest,
        "agree": low <= 0 <= high and high - low <= widest,
    }


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and its 95 % interval by Student's t, of at least two values."""
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    middle = fmean(values)
    return {"mean": middle, "low": middle - half, "high": middle + half}


def print_differences(
    comparison: dict[str, Any], console: Console | None = None, *, other: str = "plain"
) -> None:
    """By round and over all."""
    console = console or Console(width=100)
    table = Table(title=f"reward, fast minus {other}: mean over seeds and its 95 % interval")
    for name in ("round", "difference", "interval"):
        table.add_column(name)
    names = [*map(str, range(1, len(comparison["by_round"]) + 1)), "all"]
    for name, figures in zip(names, [*comparison["by_round"], comparison["overall"]], strict=True):
        interval_text = f"{figures['low']:+.4f} to {figures['high']:+.4f}"
        table.add_row(name, f"{figures['mean']:+.4f}", interval_text)
    console.print(table)


def print_tables(comparison: dict[str, Any], console: Console | None = None) -> None:
    """Fast minus plain, and whether they agree."""
    console = console or Console(width=100)
    print_differences(comparison, console)
    overall = comparison["overall"]
    verdict = "agree" if comparison["agree"] else "are not shown to agree"
    console.print(
        f"fast and plain {verdict} over {len(comparison['seeds'])} seeds: the interval over all "
        f"rounds {'contains' if overall['low'] <= 0 <= overall['high'] else 'misses'} 0 and is "
        f"{overall['high'] - overall['low']:.4f} wide, at most {comparison['widest']:g} is allowed"
    )


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Reward by round, a line a run, a colour an engine and the control."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    styles = {
        "fast": ("tab:blue", "-"),
        "plain": ("tab:orange", "--"),
        CONTROL: ("tab:gray", ":"),
    }
    labelled: set[str] = set()
    for name, rewards in curves.items():
        engine = name.partition("/")[0]
        color, style = styles[engine]
        label = None if engine in labelled else engine
        labelled.add(engine)
        axis.plot(range(1, len(rewards) + 1), rewards, style, color=color, label=label)
    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_ylabel("reward of the round's rollouts")
    axis.set_ylim(0, 1)
    axis.legend()
    write_figure(path, figure)


if __name__ == "__main__":
    sys.exit(main())
