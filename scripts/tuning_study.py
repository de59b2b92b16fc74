"""Does `gmpo tune` find a better recipe for a small policy that half knows sums?

The recipe of `scripts/tiny_policy.py` is tuned as a user would tune it, by the command; a study
that was ended goes on where it was. The report goes into one JSON file:

    python -m scripts.tuning_study --trials 20 --json docs/results/tuning.json

The recipe's step size is one at which this policy forgets. From a sound one there is less to find:

    python -m scripts.tuning_study --trials 20 --learning-rate 5e-5 --runs runs/tuning_sound \
        --json docs/results/tuning_sound.json
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.options import ends_clearly, results_file
from scripts.tiny_policy import sums_recipe, warm_policy

from gmpo.recipe import dump_recipe


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=results_file, required=True, help="the report goes here")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning_study"))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the tuned recipe")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # another number would round sums otherwise
    arguments.runs.mkdir(parents=True, exist_ok=True)
    recipe = arguments.runs / "sums.toml"
    policy = warm_policy(arguments.runs / "policy")
    # 169 sums: 89 to train on, 40 to choose by and 40 to judge by.
    tuned = sums_recipe(
        policy,
        task__held_out_items=80,
        training__rounds=40,
        training__learning_rate=arguments.learning_rate,
        evaluation__every_rounds=10,
    )
    recipe.write_text(dump_recipe(tuned), encoding="utf-8")
    study = arguments.runs / "study"
    options = ["--study", study, "--trials", arguments.trials, "--processes", arguments.processes]
    command = [sys.executable, "-m", "gmpo.cli", "tune", recipe, *options]
    code = subprocess.run([str(part) for part in command], check=False).returncode
    if code == 0:
        shutil.copyfile(study / "report.json", arguments.json)
    return code


if __name__ == "__main__":
    sys.exit(main())
