"""Calibrate the quality score on real answers of a real gateway, and say what it is worth there.

A client asks a server of `gmpo serve` for sums of numbers up to 12, at temperature 0.7, and tells
it of every answer whether it is right, as users do with a thumb. The server's store then goes
through `gmpo quality`. docs/routing.md quotes what it prints.

    python -m scripts.quality_study --json docs/results/quality.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results

from gmpo.cli import app
from gmpo.continual.serving import served_process
from gmpo.grading import extract_answer
from gmpo.tracking import provenance

NAME = "sums"
AT_ONCE = 8
LARGEST = 12
_START_SECONDS = 300.0


@ends_clearly
def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--answers", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.05, help="as for gmpo quality")
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--seed", type=int, default=0, help="of questions and draws")
    parser.add_argument("--json", required=True, type=results_file, metavar="FILE")
    options = parser.parse_args(words)
    if options.answers < 1:
        parser.error(f"--answers is {options.answers}; at least 1 is needed")
    with tempfile.TemporaryDirectory() as folder:
        store, threshold = str(Path(folder) / "store.db"), Path(folder) / "quality.json"
        arguments = ("--store", store, "--name", NAME, "--dtype", options.dtype)
        with served_process(
            options.model, arguments=arguments, threads=options.threads, seconds=_START_SECONDS
        ) as url:
            num_right = ask_and_judge(url, options.answers, options.seed)
        command = ["quality", str(threshold), "--store", store, "--target", str(options.target)]
        if refused := app(command, standalone_mode=False):
            return int(refused)
        calibration = json.loads(threshold.read_text())
    told = (calibration["num_answers"], calibration["num_right"])
    if told != (options.answers, num_right):
        raise SystemExit(f"{(options.answers, num_right)} answers and right ones, stored {told}")
    report = {
        "made_with": provenance(),
        "model": options.model,
        "dtype": options.dtype,
        "seed": options.seed,
        "calibration": calibration,
    }
    write_results(options.json, report)
    return 0


def ask_and_judge(url: str, answers: int, seed: int) -> int:
    """Ask for sums, give each answer its thumb; how many were right."""
    chance = random.Random(seed)
    sums = [(chance.randint(1, LARGEST), chance.randint(1, LARGEST)) for _ in range(answers)]
    with httpx2.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(lambda at: _is_right(client, *sums[at], seed + at), range(answers)))


def _is_right(client: httpx2.Client, left: int, right: int, seed: int) -> bool:
    question = f"What is {left} + {right}? Answer with just the number."
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 32,
        "temperature": 0.7,
        "seed": seed,
    }
    answer = client.post("/chat/completions", json=asked).raise_for_status().json()
    said = answer["choices"][0]["message"]["content"]
    is_right = extract_answer(said, wants_number=True) == str(left + right)
    thumb = {"request_id": answer["id"], "thumbs": "up" if is_right else "down"}
    client.post("/feedback", json=thumb).raise_for_status()
    return is_right


if __name__ == "__main__":
    sys.exit(main())
