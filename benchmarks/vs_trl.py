"""gmpo against TRL's GMPOTrainer, in turns on one machine: rollouts, updates, rounds, memory.

TRL runs in its best setting without vLLM, found by a short trial. Times are compared only where
both sides move the weights alike on the same completions. An interrupted run goes on where it was.

    python -m benchmarks.vs_trl --workload short --json runs/bench/short.json

Both run a whole optimizer step's rows at once in an update, 16 of them (8 in long-prompt). TRL
needs less memory, and other times, with --trl-micro-batch 4, by which its steps add up the
gradients of four rows at a time.

With --dtype fp32 the file gets a section "fp32", so that its figures stand beside those of bf16.
With --seed 1 both sides get other prompts and draw other completions.
With --live-shares 3 it gets the update's seconds by the share of live groups, 3 times each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.comparison import (
    ALLOWED_PRECISIONS,
    VARIANTS,
    Bench,
    Sides,
    add_trl_setup,
    choose_setup,
    is_fp32,
    require_trl,
    run_pairs,
    warm_up,
    why_not_compared,
)
from benchmarks.devices import DEVICES
from benchmarks.exchange import Scratch, write_start
from benchmarks.live_shares import draw_live_shares, print_live_shares, run_live_shares
from benchmarks.options import (
    add_threads,
    ends_clearly,
    plotted_results_file,
    require_at_least_one,
    require_threads,
)
from benchmarks.ratios import ENOUGH_PAIRS, PEAKS, STAGES, UpdatesDiffer
from benchmarks.report import draw, entries, print_table
from benchmarks.results import OtherBenchmark, Results, made_with
from benchmarks.workloads import SEED, WORKLOADS, Workload
from gmpo.policy.load import choose_device

MEASURED = ("variants", "live_shares")
REFUSED = 3
"""Exit code where the updates differ."""


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    require_trl()
    choose_device(arguments.device)  # or it says which there are
    workload = workload_of(arguments)
    setting = {
        "workload": asdict(workload),
        "dtype": arguments.dtype,
        "stages": STAGES,
        "peaks": PEAKS,
        "trl_micro_batch": arguments.trl_micro_batch,
        "made_with": made_with(threads=arguments.threads, device=arguments.device),
    }
    results = Results(arguments.json, setting, section=section_of(arguments.dtype))
    results.note_load()
    try:
        compare(arguments, workload, results)
    except UpdatesDiffer as refusal:
        refuse(results, arguments, str(refusal))
        print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    print_table([results.whole])
    draw([results.whole], arguments.json.with_suffix(".png"))
    if points := results.content.get("live_shares"):
        print_live_shares(points)
        draw_live_shares(points, plot_of_shares(arguments))
    return 0


def refuse(results: Results, arguments: argparse.Namespace, reason: str) -> None:
    """Put away what was measured before, so that no ratio of unequal work lies about as a result.

    A later call on the same file goes on with it.
    """
    measured = {name: results.content.pop(name, {}) for name in MEASURED}
    results.content["before_refusal"] = measured
    results.content["refused"] = reason
    results.save()
    for plot in (arguments.json.with_suffix(".png"), plot_of_shares(arguments)):
        plot.unlink(missing_ok=True)
    if list(entries([results.whole])):  # of the file's other precision
        draw([results.whole], arguments.json.with_suffix(".png"))


def section_of(dtype: str) -> str | None:
    """Where the figures of gmpo's dtype stand in the file."""
    return "fp32" if dtype == "fp32" else None


def plot_of_shares(arguments: argparse.Namespace) -> Path:
    file: Path = arguments.json
    section = section_of(arguments.dtype)
    return file.with_name("-".join(filter(None, (file.stem, section, "live_shares"))) + ".png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    # Metavars keep the usage, which every refusal of an option prints, from listing all choices.
    parser.add_argument(
        "--workload",
        required=True,
        choices=WORKLOADS,
        metavar="NAME",
        help=f"one of {', '.join(WORKLOADS)}",
    )
    parser.add_argument("--json", required=True, type=plotted_results_file, metavar="FILE")
    parser.add_argument(
        "--pairs",
        type=int,
        default=ENOUGH_PAIRS,
        help=f"rounds of each side and variant; the table marks medians of under {ENOUGH_PAIRS}",
    )
    parser.add_argument(
        "--dtype",
        choices=ALLOWED_PRECISIONS,
        default="auto",
        metavar="DTYPE",
        help="of gmpo; auto, its default, meets TRL's best of all, fp32 and bf16 TRL's best there",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="VARIANT",
        help=f"{' or '.join(VARIANTS)}; both unless given",
    )
    parser.add_argument(
        "--live-shares",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="updates of each side at every share of live groups; none unless given",
    )
    add_threads(parser)
    parser.add_argument(
        "--full-length",
        action="store_true",
        help="no completion ends before its limit, so that both sides draw equally many tokens",
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of the prompts' order and of what is drawn"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="of both sides")
    add_trl(parser)
    parser.add_argument("--model", help="in place of the workload's: a name or a folder")
    arguments = parser.parse_args(argv)
    require_at_least_one(parser, pairs=arguments.pairs)
    require_threads(parser, arguments.threads)
    if arguments.live_shares < 0:
        parser.error(f"--live-shares is {arguments.live_shares}; 0 or more is needed")
    require_trl_options(parser, arguments)
    return arguments


def add_trl(parser: argparse.ArgumentParser) -> None:
    """How TRL is run, to be checked by `require_trl_options`."""
    add_trl_setup(parser, otherwise="a trial finds the best")
    parser.add_argument(
        "--trl-micro-batch",
        type=int,
        metavar="ROWS",
        help="rows that TRL runs at once in an update; a whole optimizer step's unless given",
    )


def require_trl_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program where TRL cannot be run so, or is not compared."""
    rows = workload_of(arguments).rows_per_step
    if arguments.trl_micro_batch is not None and (
        arguments.trl_micro_batch < 1 or rows % arguments.trl_micro_batch
    ):
        parser.error(
            f"--trl-micro-batch is {arguments.trl_micro_batch}; it must divide the {rows} rows of "
            "an optimizer step"
        )
    if arguments.trl is not None and (why := why_not_compared(arguments.trl, arguments.dtype)):
        parser.error(why)


def workload_of(arguments: argparse.Namespace) -> Workload:
    workload = replace(
        WORKLOADS[arguments.workload], ignores_end=arguments.full_length, seed=arguments.seed
    )
    return workload if arguments.model is None else replace(workload, model=arguments.model)


def compare(arguments: argparse.Namespace, workload: Workload, results: Results) -> None:
    """Trial, warm-up and pairs, as far as they are not in the file yet."""
    results.content.pop("refused", None)
    results.content |= results.content.pop("before_refusal", {})

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(folder=Path(folder))
        write_start(workload.model, scratch.start)
        bench = Bench(
            workload=workload,
            dtype=arguments.dtype,
            threads=arguments.threads,
            scratch=scratch,
            say=say,
            device=arguments.device,
            trl_micro_batch=arguments.trl_micro_batch,
        )
        setup = trl_setup(arguments, bench, results)
        with bench.trl(setup) as trl, bench.gmpo() as gmpo:
            about = gmpo.ask("about")
            keep_one(
                results,
                arguments.json,
                gmpo_setup={name: about[name] for name in ("dtype", "engine")},
            )
            say(
                f"{workload.name}: TRL without vLLM as {setup} against gmpo in {about['dtype']} "
                f"({'; '.join(about['notes']) or 'no notes'})"
            )
            both_fp32 = is_fp32(setup) and about["dtype"] == "fp32"
            sides = Sides(trl=trl, gmpo=gmpo, both_fp32=both_fp32)
            warm_up(bench, sides, results)
            for variant in arguments.variants:
                run_pairs(bench, sides, results, variant=variant, wanted=arguments.pairs)
            run_live_shares(bench, sides, results, wanted=arguments.live_shares)


def trl_setup(arguments: argparse.Namespace, bench: Bench, results: Results) -> str:
    """The setting of TRL that was named, or the trial's best, which the file then has.

    Raises:
        OtherBenchmark: the file's samples are of another one, or of one that was named.
    """
    content = results.content
    was_tried = arguments.trl is None or content.get("trl_chosen_by") == "trial"
    if was_tried and content.get("trl_chosen_by") == "--trl":
        raise OtherBenchmark(
            f"{arguments.json} has TRL as {content['trl_setup']}, which was named; name it again "
            f"(--trl {content['trl_setup']}), or a new file"
        )
    setup: str = arguments.trl or choose_setup(bench, results)
    keep_one(results, arguments.json, trl_setup=setup)
    content["trl_chosen_by"] = "trial" if was_tried else "--trl"
    return setup


def keep_one(results: Results, path: Path, **settings: Any) -> None:
    """Have the file hold how a side is run, where it does not yet.

    Raises:
        OtherBenchmark: its samples are of that side run in another way.
    """
    for name, found in settings.items():
        kept = results.content.setdefault(name, found)
        if kept != found:
            raise OtherBenchmark(
                f"{path} was made with something else: {name} was {kept}, is {found}; name a new "
                "file, or remove it"
            )


if __name__ == "__main__":
    sys.exit(main())
