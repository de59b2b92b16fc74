"""Train a recipe over several seeds and put the outcomes in one table.

Resumable: a seed whose run is finished is read, not run again, and an unfinished one goes on from
its newest checkpoint. Seeds that the JSON file has already, and that are not asked for, stay in it,
so that a study may be made in parts. The table and the file are what docs/experiments.md quotes.

    python -m scripts.seeds quickstart --seeds 0 1 2 --json docs/results/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results

from gmpo.inspection import RunSummary, summarize_run
from gmpo.tracking import read_lines

TARGET_GAIN = 0.30
LARGEST_FALL = 0.10


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="bundled name or path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every figure here too"
    )
    arguments = parser.parse_args(argv)

    rows = []
    for seed in arguments.seeds:
        folder = arguments.runs / f"{Path(arguments.recipe).stem}-seed{seed}"
        if not is_finished(folder):
            code = run_seed(arguments.recipe, seed, folder, arguments.overrides)
            if code:
                print(f"seed {seed} stopped with exit code {code}; run this again to go on")
                return code
        rows.append(outcome(seed, folder))
    rows = sorted([*earlier(arguments), *rows], key=lambda row: int(row["seed"]))
    print(markdown(rows))
    if arguments.json:
        report = {"recipe": arguments.recipe, "overrides": arguments.overrides, "runs": rows}
        write_results(arguments.json, report)
    return 0


def earlier(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of other seeds in the JSON file, if they are of the same recipe and overrides."""
    if arguments.json is None or not arguments.json.is_file():
        return []
    report = json.loads(arguments.json.read_text())
    asked = {"recipe": arguments.recipe, "overrides": arguments.overrides}
    if {key: report[key] for key in asked} != asked:
        raise SystemExit(
            f"{arguments.json} is of another study: {report['recipe']}; name a new file"
        )
    return [row for row in report["runs"] if row["seed"] not in arguments.seeds]


def is_finished(folder: Path) -> bool:
    return any(line["stage"] == "after" for line in read_lines(folder, "evaluations.jsonl"))


def run_seed(recipe: str, seed: int, folder: Path, overrides: list[str]) -> int:
    command = [str(Path(sys.executable).with_name("gmpo")), "train"]
    if any(folder.glob("checkpoints/round-*")):
        command += ["--run", str(folder), "--resume"]
    else:
        command += [recipe, "--run", str(folder), "--set", f"training.seed={seed}"]
        for override in overrides:
            command += ["--set", override]
    return subprocess.run(command, check=False).returncode


def outcome(seed: int, folder: Path) -> dict[str, Any]:
    summary = summarize_run(folder)
    best_before = max(figures.accuracy for figures in summary.before)
    after = {figures.name: figures for figures in summary.after}["greedy"]
    return {
        "seed": seed,
        "made_with": json.loads((folder / "run.json").read_text())
        if (folder / "run.json").is_file()
        else None,
        "best_before": best_before,
        "greedy_after": after.accuracy,
        "gain": after.accuracy - best_before,
        "training_seconds": training_seconds(summary),
        # Where a run lay is of no use to a reader, and differs on every machine.
        "summary": {key: value for key, value in summary.as_dict().items() if key != "folder"},
    }


def training_seconds(summary: RunSummary) -> float:
    """Seconds of all rounds: sampling, grading and updates, evaluations left out."""
    parts = (summary.rollout_seconds, summary.reward_seconds, summary.update_seconds)
    return sum(part for part in parts if part is not None)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | best before | greedy after (95 %) | gain | sampled after | reward, best ten "
        "| last ten | ratio range | clipped low / high | cosine to GRPO | training |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        summary = row["summary"]
        after = {figures["name"]: figures for figures in summary["after"]}
        low, high = after["greedy"]["interval_95"]
        ratio_low, ratio_high = summary["ratio_range"]
        cosine = summary["cosine_to_grpo"]
        lines.append(
            f"| {row['seed']} | {row['best_before']:.3f} "
            f"| {row['greedy_after']:.3f} ({low:.3f}-{high:.3f}) | {row['gain']:+.3f} "
            f"| {after['sampled']['accuracy']:.3f} | {summary['best_ten_reward']:.3f} "
            f"| {summary['last_ten_reward']:.3f} | {ratio_low:.3g} to {ratio_high:.3g} "
            f"| {summary['clip_low_fraction']:.2%} / {summary['clip_high_fraction']:.2%} "
            f"| {'not measured' if cosine is None else f'{cosine[1]:.3f}'} "
            f"| {row['training_seconds'] / 60:.1f} min |"
        )
    gains = [row["gain"] for row in rows]
    falls = [row["summary"]["best_ten_reward"] - row["summary"]["last_ten_reward"] for row in rows]
    lines += [
        "",
        f"Smallest gain {min(gains):+.3f} (aim: {TARGET_GAIN:+.2f}); largest fall of the last ten "
        f"rounds below the best ten {max(falls):.3f} (aim: at most {LARGEST_FALL:.2f}).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
