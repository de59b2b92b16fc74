"""gmpo's sampler beside vLLM's CPU build: rollouts and 8-way decoding on the same prompts.

Two processes hold the same weights in the same precision and take turns; a pair is one job for
each, and which goes first alternates. No prompt comes twice, so vLLM's prefix cache finds what
prompts have in common and a group's own prompt, never an answer it gave before. vLLM runs without
log-probabilities, which gmpo's sampler always computes. vLLM gets an environment of its own (2 GB),
which the first run builds.

    python -m benchmarks.vs_vllm --json docs/results/vs_vllm.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.circumstances import REPOSITORY, busy_warning, circumstances
from benchmarks.options import (
    BenchmarkError,
    add_threads,
    ends_clearly,
    require_threads,
    results_file,
)
from benchmarks.results import write_results
from benchmarks.spread import Spread, paired_ratios, spread
from benchmarks.vllm_environment import VLLM, is_finished, make_environment, python_of
from gmpo.policy.load import load_tokenizer, model_folder
from gmpo.rollouts import PromptRenderer
from gmpo.tasks import arithmetic_task

ENGINES = ("gmpo", "vllm")
LEAST_PAIRS = 5
MAX_ROWS = 64
OPENMP = "libiomp5.so"
"""Intel's, which vLLM asks for by a warning and whose package it installs."""
NEEDED_PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A kind of job; `ignores_end` makes every completion `max_tokens` long."""

    name: str
    num_prompts: int
    completions: int
    max_tokens: int
    ignores_end: bool


SCENARIOS = (
    Scenario(name="rollouts", num_prompts=8, completions=8, max_tokens=32, ignores_end=True),
    Scenario(
        name="rollouts, natural ends",
        num_prompts=8,
        completions=8,
        max_tokens=32,
        ignores_end=False,
    ),
    Scenario(name="8-way decoding", num_prompts=8, completions=1, max_tokens=128, ignores_end=True),
)


class Worker:
    """One engine in a process of its own.

    Args:
        name: the engine.
        command: starts `engine_worker.py` for it.
        environment: of the process, over this one's.
        log: takes what the engine prints.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log = name, log
        self._output = log.open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            env={**os.environ, **environment},
        )
        self.facts = self._answer()

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job's seconds and the lengths of its completions."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and the missing answer says so
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and what it was sent is of no use
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._output.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            code = self._process.returncode
            end = "\n".join(self.log.read_text().splitlines()[-15:])
            raise SystemExit(
                f"the {self.name} process ended with code {code} before it answered; its log "
                f"ends:\n{end}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@ends_clearly
def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    model = model_folder(options.model)  # before anything is downloaded for it
    require_vllm(options)
    made_with = circumstances(*NEEDED_PACKAGES)
    if warning := busy_warning(made_with["load_before"]):
        print(warning)
    scenarios = [s for s in SCENARIOS if s.name in (options.scenario or [s.name])]
    prompts = prompt_supply(model, seed=options.seed)
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        workers = {}
        for name in ENGINES:
            worker = start(name, options, model, Path(logs) / f"{name}.log")
            stack.callback(worker.close)
            workers[name] = worker
        report: dict[str, Any] = {
            "made_with": made_with,
            "model": options.model,
            "dtype": options.dtype,
            "threads": options.threads,
            "vllm_openmp": OPENMP,
            "engines": {name: worker.facts for name, worker in workers.items()},
            "scenarios": {},
        }
        for scenario in scenarios:
            rows = measure(workers, scenario, prompts, pairs=options.pairs)
            report["scenarios"][scenario.name] = summary(rows)
            if options.json:  # what the file holds of an earlier run stays until this one is whole
                write_results(unfinished(options.json), report)
    print(table(report))
    if options.json:
        os.replace(unfinished(options.json), options.json)
    return 0


def unfinished(path: Path) -> Path:
    """Where scenarios are kept until all are done."""
    return path.with_name(f"{path.name}.unfinished")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="on both sides")
    parser.add_argument("--pairs", type=int, default=7, help=f"at least {LEAST_PAIRS}")
    parser.add_argument(
        "--scenario",
        action="append",
        choices=[scenario.name for scenario in SCENARIOS],
        help="only this one; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of prompts")
    add_threads(parser, what="on both sides; all cores unless given")
    add_vllm(parser)
    parser.add_argument(
        "--json",
        type=results_file,
        metavar="FILE",
        help="write every figure here too, and into FILE.unfinished until all scenarios are done",
    )
    options = parser.parse_args(arguments)
    if options.pairs < LEAST_PAIRS:
        parser.error(f"--pairs {options.pairs} must be at least {LEAST_PAIRS}")
    require_threads(parser, options.threads)
    return options


def add_vllm(parser: argparse.ArgumentParser) -> None:
    """The options about vLLM's environment and cache."""
    parser.add_argument(
        "--block-size",
        type=int,
        default=32,
        help="positions of a block of vLLM's cache; only full blocks are shared",
    )
    parser.add_argument(
        "--venv",
        type=Path,
        default=Path(os.environ.get("GMPO_VLLM_VENV", REPOSITORY / ".venv-vllm")),
        help="environment of vLLM; GMPO_VLLM_VENV if that is set, else .venv-vllm",
    )
    parser.add_argument(
        "--no-build", dest="build", action="store_false", help="fail where vLLM is not installed"
    )


def require_vllm(options: argparse.Namespace) -> None:
    """Build vLLM's environment if it is not there.

    Raises:
        BenchmarkError: it is not, and is not to be built.
    """
    if not options.build and not is_finished(options.venv):
        raise BenchmarkError(
            f"{options.venv} holds no finished environment with {VLLM}; leave --no-build out to "
            "build it there (2 GB, some minutes), or name another one with --venv"
        )
    make_environment(options.venv)


def start(name: str, options: argparse.Namespace, model: str, log: Path) -> Worker:
    """Start an engine's process and wait until its model is loaded."""
    file = Path(__file__).with_name("engine_worker.py")
    python = python_of(options.venv) if name == "vllm" else Path(sys.executable)
    command = [str(python), str(file), name, "--model", model, "--dtype", options.dtype]
    command += ["--max-rows", str(MAX_ROWS)]
    if name == "vllm":
        command += ["--block-size", str(options.block_size)]
    print(f"starting {name}", flush=True)
    return Worker(name, command, environment_of(name, options), log)


def environment_of(name: str, options: argparse.Namespace) -> dict[str, str]:
    """What each engine is told through its environment: threads, and vLLM's cache and cores."""
    if name == "gmpo":
        return {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(REPOSITORY / "src")}
    return vllm_environment(options)


def vllm_environment(options: argparse.Namespace) -> dict[str, str]:
    """What vLLM is told: its OpenMP, its cores, its cache, and not to look for anything.

    Raises:
        BenchmarkError: its OpenMP is not there; it would run on another one, and only warn.
    """
    openmp = options.venv.resolve() / "lib" / OPENMP
    if not openmp.is_file():
        raise BenchmarkError(
            f"{openmp} is not there, and without it vLLM is slower; remove {options.venv} and run "
            "this again, which builds it anew"
        )
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    return {
        "LD_PRELOAD": str(openmp),
        # Left to itself vLLM may keep a core free for its front end.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def prompt_supply(model: str, *, seed: int) -> Iterator[list[int]]:
    """Sums of two numbers up to 50 as chats, in random order, each once; about 45 tokens each."""
    renderer = PromptRenderer(
        load_tokenizer(model), prompt_format="auto", system=None, max_prompt_tokens=512
    )
    items = list(arithmetic_task(held_out_items=1).train)
    random.Random(seed).shuffle(items)
    for prompt in items:
        yield list(renderer.render(prompt).token_ids or ())


def measure(
    workers: Mapping[str, Worker], scenario: Scenario, prompts: Iterator[list[int]], *, pairs: int
) -> list[dict[str, Any]]:
    """One warm-up, then `pairs` jobs that every engine does, in alternating order."""
    rows = []
    for number in range(pairs + 1):
        job = {
            "prompts": [next(prompts) for _ in range(scenario.num_prompts)],
            "completions": scenario.completions,
            "max_tokens": scenario.max_tokens,
            "ignores_end": scenario.ignores_end,
            "seed": number,
        }
        order = ENGINES if number % 2 else ENGINES[::-1]
        answers = {name: workers[name].run(job) for name in order}
        for name, answer in answers.items():
            check_lengths(name, answer["lengths"], scenario)
        if number:
            rows.append({"first": order[0], **answers})
            shown = ", ".join(f"{name} {answers[name]['seconds']:.2f} s" for name in ENGINES)
            print(f"{scenario.name}, pair {number} of {pairs}: {shown}", flush=True)
    return rows


def check_lengths(name: str, lengths: Sequence[int], scenario: Scenario) -> None:
    """Refuse an answer that is not the work that was asked for."""
    wanted = scenario.num_prompts * scenario.completions
    shortest = scenario.max_tokens if scenario.ignores_end else 1
    if len(lengths) == wanted and all(shortest <= n <= scenario.max_tokens for n in lengths):
        return
    raise SystemExit(
        f"{name} gave {len(lengths)} completions of {min(lengths, default=0)} to "
        f"{max(lengths, default=0)} tokens for {scenario.name!r}; {wanted} of {shortest} to "
        f"{scenario.max_tokens} were asked for, so its times cannot be compared"
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds and tokens/s of each engine, and gmpo's tokens/s over vLLM's, pair by pair."""
    rates = {
        name: [sum(row[name]["lengths"]) / row[name]["seconds"] for row in rows] for name in ENGINES
    }
    ratios = paired_ratios(rates["gmpo"], rates["vllm"])
    return {
        "pairs": len(rows),
        **{
            name: {
                "seconds": spread([row[name]["seconds"] for row in rows]).as_dict(),
                "tokens": spread([sum(row[name]["lengths"]) for row in rows]).as_dict(),
                "tokens_per_second": spread(rates[name]).as_dict(),
            }
            for name in ENGINES
        },
        "ratio": spread(ratios).as_dict(),
        "ratio_median": spread(ratios).median,
        "samples": [
            {
                "first": row["first"],
                **{f"{name}_seconds": row[name]["seconds"] for name in ENGINES},
                **{f"{name}_tokens": sum(row[name]["lengths"]) for name in ENGINES},
            }
            for row in rows
        ],
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table: medians, with smallest and largest in brackets."""
    lines = [
        f"{report['model']}, {report['dtype']}, {report['made_with']['processor']}, "
        f"{report['made_with']['cores']} cores",
        "",
        "| work | gmpo, tokens/s | vLLM, tokens/s | gmpo / vLLM | gmpo, s | vLLM, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, of_scenario in report["scenarios"].items():
        cells = [name]
        cells += [Spread(**of_scenario[engine]["tokens_per_second"]).text() for engine in ENGINES]
        cells.append(Spread(**of_scenario["ratio"]).text())
        cells += [Spread(**of_scenario[engine]["seconds"]).text() for engine in ENGINES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
