"""How near decoding and the update come to what this machine can do, and what each part takes.

The bound of a piece of work is max(operations / peak products, bytes / peak copying), by the least
operations and bytes that it needs (`flops.py` has the formulas). An update has two pieces, gradient
and optimizer step; the second cannot begin before the first is done, so their bounds add up. The
pass over old log-probabilities, which a round in bf16 has besides, is neither.
Every cycle measures the peaks, a block of decoding steps and an update of each workload, so that
what disturbs the machine disturbs them alike; a share is that of one cycle.

The counted operations of whole rounds, gmpo's beside TRL's, need no clock.

    python -m benchmarks.roofline --dtype bf16 --json docs/results/roofline.json
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks import flops
from benchmarks.circumstances import busy_warning, circumstances
from benchmarks.options import add_threads, ends_clearly, require_threads, results_file
from benchmarks.parts import panels_named, profiled, shares
from benchmarks.peaks import DTYPES, bound_seconds, copy_rates, product_rates, products
from benchmarks.results import write_results
from benchmarks.roofline_report import (
    BY_TORCH,
    DECODE_BY_TORCH,
    counted_table,
    timing_tables,
)
from benchmarks.shapes import (
    STEPS_PER_ROUND,
    WORKLOADS,
    Round,
    Workload,
    common,
    counts,
    prompts_of,
    steps_of,
)
from benchmarks.spread import spread
from gmpo.batch import StepBatch
from gmpo.engine import build_sampler
from gmpo.kernels.library import kernels_off
from gmpo.policy.load import end_token_ids, load_policy, load_tokenizer
from gmpo.policy.score import Policy
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import SampleRequest, complete
from gmpo.update import LossSettings, PolicyOptimizer, accumulate_gradients, bind_objective

DECODED_ROWS = 64
GROUP_SIZE = 8
FIRST_POSITION, LAST_POSITION = 85, 115
"""Positions that the timed decoding steps write, one after another; 100 in the mean."""
MEAN_POSITION = (FIRST_POSITION + LAST_POSITION) // 2
LIVE_SHARE = 3 / 8
LOSS = LossSettings(objective=bind_objective("gmpo", clips={}, max_tokens=1))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is measured: a model, its sampler and optimizer, and the workloads' updates."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    sampler: LocalSampler
    optimizer: PolicyOptimizer
    shape: flops.Model
    updates: dict[str, tuple[StepBatch, Round]]

    @property
    def element(self) -> int:
        """Bytes of a weight as it is multiplied."""
        return self.policy.dtype.itemsize

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.policy.masters.values())


@ends_clearly
def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    made_with = circumstances("torch", "transformers", "numpy")
    if warning := busy_warning(made_with["load_before"]):
        print(warning)
    workloads = [WORKLOADS[name] for name in options.workload or WORKLOADS]
    measured = prepared(options.model, options.dtype, workloads)
    report = {
        "made_with": made_with,
        "model": options.model,
        "dtype": options.dtype,
        "threads": options.threads,
    }
    if not options.only_count:
        report |= timings(measured, options)
        print(timing_tables(report), end="\n\n", flush=True)
    report["counted"] = counted(measured, workloads, options.model)
    print(counted_table(report["counted"]))
    if options.json:
        write_results(options.json, report)
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the model")
    parser.add_argument("--cycles", type=int, default=7, help="of peaks, decoding and updates")
    parser.add_argument(
        "--workload",
        action="append",
        choices=sorted(WORKLOADS),
        help="only this one; may be repeated",
    )
    add_threads(parser)
    parser.add_argument("--only-count", action="store_true", help="count operations, time nothing")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write every figure here too"
    )
    options = parser.parse_args(arguments)
    if options.cycles < 1:
        parser.error(f"--cycles {options.cycles} must be at least 1")
    require_threads(parser, options.threads)
    return options


def prepared(model: str, dtype: str, workloads: Sequence[Workload]) -> Measured:
    """Load the model and build the first optimizer step of each workload, all groups alive.

    Raises:
        SystemExit: the model is not one that gmpo's fast path covers.
    """
    policy = load_policy(model, device="cpu", dtype=dtype)
    if policy.body is None:
        raise SystemExit(
            f"{model!r} runs on the plain path (the reason stands above), whose work is not "
            "counted here; give a Llama-family model"
        )
    tokenizer = load_tokenizer(model)
    shape = flops.model_of(policy.model.config)
    updates = {}
    for workload in workloads:
        one = full_round(workload, prompts_of(workload, model))
        live = [True] * len(one.prompts)
        steps = steps_of(one, vocabulary=shape.vocabulary, shares_prompts=True, live=live)
        updates[workload.name] = (steps[0], one)
    return Measured(
        policy=policy,
        tokenizer=tokenizer,
        sampler=build_sampler(policy, tokenizer, max_rows=DECODED_ROWS),
        optimizer=PolicyOptimizer(policy),
        shape=shape,
        updates=updates,
    )


def full_round(workload: Workload, prompts: Sequence[tuple[int, ...]]) -> Round:
    """Every completion as long as it may be."""
    lengths = (workload.max_tokens,) * workload.group_size
    return Round(prompts=tuple(prompts), completions=(lengths,) * len(prompts))


def timings(measured: Measured, options: argparse.Namespace) -> dict[str, Any]:
    """Peaks, decoding and updates, by cycle; then one profile of each."""
    cycle(measured)  # so that memory is allocated and kernels are chosen
    cycles = []
    for number in range(options.cycles):
        cycles.append(cycle(measured))
        shown = ", ".join(f"{k} {v:.3g} s" for k, v in seconds_of(cycles[-1]).items())
        print(f"cycle {number + 1} of {options.cycles}: {shown}", flush=True)
    peaks = {
        kind: {
            name: spread([one["peaks"][kind][name] for one in cycles]).as_dict()
            for name in cycles[0]["peaks"][kind]
        }
        for kind in cycles[0]["peaks"]
    }
    return {
        "peaks": peaks,
        "decode": decode_report(measured, cycles, options.dtype),
        "updates": {
            name: update_report(measured, name, cycles, options.dtype) for name in measured.updates
        },
        "cycles": cycles,
    }


def cycle(measured: Measured) -> dict[str, Any]:
    """Each peak, a block of decoding steps and an update of every workload, once."""
    wanted = products(measured.shape, decoded_rows=DECODED_ROWS, scored_rows=1024)
    peaks = {name: product_rates(wanted, dtype) for name, dtype in DTYPES.items()}
    peaks["copy"] = copy_rates()
    decode = spread(decode_block(measured)).median
    with kernels_off():
        decode_by_torch = spread(decode_block(measured)).median
    updates = {}
    for name, (step, _) in measured.updates.items():
        start = time.perf_counter()
        accumulate_gradients(measured.policy, step, LOSS, may_stay_narrow=True)
        middle = time.perf_counter()
        # A step of size 0 does all the work and leaves the weights as they are.
        measured.optimizer.apply_step(learning_rate=0.0, clip_norm=1.0)
        updates[name] = {
            "gradient": middle - start,
            "optimizer": time.perf_counter() - middle,
        }
        is_one = len(step.micro_batches) == 1
        # As above, and asked before the compiled functions are off, without which none would stay.
        left = measured.policy.gradients_left_narrow if is_one else nullcontext
        start = time.perf_counter()
        with left(), kernels_off():
            accumulate_gradients(measured.policy, step, LOSS)
        updates[name][BY_TORCH] = time.perf_counter() - start
        measured.optimizer.zero_gradients()
    decodes = {"decode": decode, DECODE_BY_TORCH: decode_by_torch}
    return {"peaks": peaks, **decodes, "updates": updates}


def seconds_of(one: dict[str, Any]) -> dict[str, float]:
    updates = {f"update {n}": of["gradient"] + of["optimizer"] for n, of in one["updates"].items()}
    return {"decode": one["decode"], **updates}


def decode_block(measured: Measured) -> list[float]:
    """Seconds of each sampler step, prefill and last step left out."""
    start_decoding(measured)
    taken = []
    for _ in range(LAST_POSITION - FIRST_POSITION + 1):
        start = time.perf_counter()
        measured.sampler.step()
        taken.append(time.perf_counter() - start)
    measured.sampler.step()
    assert measured.sampler.is_idle, "rows must end with the block"
    return taken


def start_decoding(measured: Measured) -> None:
    """Prefill 8 prompts of 8 rows each and draw their first token."""
    generator = torch.Generator().manual_seed(0)
    for number in range(DECODED_ROWS // GROUP_SIZE):
        prompt = torch.randint(
            5, measured.shape.vocabulary, (FIRST_POSITION - 1,), generator=generator
        )
        measured.sampler.submit(
            SampleRequest(
                id=str(number),
                token_ids=prompt.tolist(),
                num_completions=GROUP_SIZE,
                # The first token comes with the prefill, the last one after the timed steps.
                max_tokens=LAST_POSITION - FIRST_POSITION + 3,
                key=(number,),
            )
        )
    measured.sampler.step()


def peak_of(one: dict[str, Any], kind: str) -> float:
    """The cycle's highest rate of any size."""
    return max(one["peaks"][kind].values())


def bound_in(one: dict[str, Any], dtype: str, *, operations: float, traffic: float) -> float:
    """Least seconds of that work by the cycle's peaks."""
    return bound_seconds(
        operations=operations,
        traffic=traffic,
        peak_operations=peak_of(one, dtype),
        peak_traffic=peak_of(one, "copy"),
    )


def against_bound(seconds: Sequence[float], bounds: Sequence[float]) -> dict[str, Any]:
    """Seconds, bound, and bound over seconds, cycle by cycle."""
    share = [bound / taken for bound, taken in zip(bounds, seconds, strict=True)]
    return {
        "seconds": spread(seconds).as_dict(),
        "bound_seconds": spread(bounds).as_dict(),
        "share": spread(share).as_dict(),
    }


def decode_report(
    measured: Measured, cycles: Sequence[dict[str, Any]], dtype: str
) -> dict[str, Any]:
    """A decoding step against its bound, and its parts."""
    shape, rows = measured.shape, DECODED_ROWS
    operations = flops.needed_decode(shape, rows=rows, length=MEAN_POSITION)
    traffic = flops.decode_bytes(shape, rows=rows, length=MEAN_POSITION, element=measured.element)
    bounds = [bound_in(one, dtype, operations=operations, traffic=traffic) for one in cycles]
    seconds = [one["decode"] for one in cycles]
    steps = 8
    with panels_named(shape.vocabulary):
        start_decoding(measured)
        measured.sampler.step()  # which orders the weights anew, once after each publication
        profile = profiled(lambda: [measured.sampler.step() for _ in range(steps)])
    while not measured.sampler.is_idle:
        measured.sampler.step()
    typical = spread(seconds).median * steps
    parts = shares(profile, seconds=typical, vocabulary=shape.vocabulary, draws=True)
    layers = shape.layers * shape.layer_weights
    keys = traffic - shape.product_weights * measured.element
    by_part = {
        "projections": (flops.body(shape, rows), layers * measured.element),
        "attention": (flops.attention(shape, rows * (MEAN_POSITION + 1)), keys),
        "head": (flops.head(shape, rows), shape.head_weights * measured.element),
    }
    return {
        "rows": rows,
        "position": MEAN_POSITION,
        "operations": operations,
        "bytes": traffic,
        **against_bound(seconds, bounds),
        DECODE_BY_TORCH: against_bound([one[DECODE_BY_TORCH] for one in cycles], bounds),
        "parts": per_step(parts, steps),
        "part_bounds": {
            name: spread([bound_in(one, dtype, operations=o, traffic=b) for one in cycles]).median
            for name, (o, b) in by_part.items()
        },
    }


def per_step(parts: dict[str, dict[str, float]], steps: int) -> dict[str, dict[str, float]]:
    return {name: {**of, "seconds": of["seconds"] / steps} for name, of in parts.items()}


def update_report(
    measured: Measured, name: str, cycles: Sequence[dict[str, Any]], dtype: str
) -> dict[str, Any]:
    """One optimizer step of the workload against its bound, and the parts of each piece."""
    step, one = measured.updates[name]
    num_groups = len(one.prompts) // STEPS_PER_ROUND
    prompts, drawn = one.prompts[:num_groups], one.completions[:num_groups]
    operations = flops.needed_gradient(
        measured.shape,
        groups=[(len(p), lengths) for p, lengths in zip(prompts, drawn, strict=True)],
        shared=common(prompts),
    )
    count, element = measured.parameters, measured.element
    needs = {
        "gradient": (operations, flops.gradient_bytes(count, element=element)),
        "optimizer": (0, flops.optimizer_bytes(count, element=element)),
    }
    runs = {
        "gradient": lambda: accumulate_gradients(measured.policy, step, LOSS, may_stay_narrow=True),
        "optimizer": lambda: measured.optimizer.apply_step(learning_rate=0.0, clip_norm=1.0),
    }
    pieces, all_seconds, all_bounds = {}, [0.0] * len(cycles), [0.0] * len(cycles)
    least, traffic = needs["gradient"]
    by_torch = against_bound(
        [c["updates"][name][BY_TORCH] for c in cycles],
        [bound_in(c, dtype, operations=least, traffic=traffic) for c in cycles],
    )
    for piece, (least, traffic) in needs.items():
        bounds = [bound_in(c, dtype, operations=least, traffic=traffic) for c in cycles]
        seconds = [c["updates"][name][piece] for c in cycles]
        all_bounds = [a + b for a, b in zip(all_bounds, bounds, strict=True)]
        all_seconds = [a + b for a, b in zip(all_seconds, seconds, strict=True)]
        pieces[piece] = {
            "operations": least,
            "bytes": traffic,
            **against_bound(seconds, bounds),
            "parts": shares(
                profiled(runs[piece]),
                seconds=spread(seconds).median,
                vocabulary=measured.shape.vocabulary,
                draws=False,
            ),
        }
    return {**against_bound(all_seconds, all_bounds), "pieces": pieces, BY_TORCH: by_torch}


def counted(measured: Measured, workloads: Sequence[Workload], model: str) -> dict[str, Any]:
    """Operations of a round of each workload, gmpo's and TRL's, full length and as sampled.

    Lengths "as sampled" are those of one round that the model draws here. `live` is how many of the
    groups have a gradient: all, or 3 in 8.
    """
    result: dict[str, Any] = {}
    for workload in workloads:
        prompts = prompts_of(workload, model)
        rounds = {
            "full length": full_round(workload, prompts),
            "as sampled": sampled_round(measured, workload, prompts),
        }
        num_live = max(1, math.floor(LIVE_SHARE * len(prompts)))
        result[workload.name] = {
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "common_tokens": common(prompts),
            "rounds": [
                {
                    "lengths": lengths,
                    "completion_tokens": sum(map(sum, one.completions)),
                    "live_groups": live,
                    "groups": len(prompts),
                    **counts(
                        measured.shape,
                        one,
                        live=[number < live for number in range(len(prompts))],
                    ),
                }
                for lengths, one in rounds.items()
                for live in (len(prompts), num_live)
            ],
        }
    return result


def sampled_round(
    measured: Measured, workload: Workload, prompts: Sequence[tuple[int, ...]]
) -> Round:
    """Lengths of completions that the model draws, by its own end tokens."""
    requests = [
        SampleRequest(
            id=str(number),
            token_ids=prompt,
            num_completions=workload.group_size,
            max_tokens=workload.max_tokens,
            stop_ids=end_token_ids(measured.policy.model, measured.tokenizer),
            key=(number,),
        )
        for number, prompt in enumerate(prompts)
    ]
    finished = complete(measured.sampler, requests)
    return Round(
        prompts=tuple(prompts),
        completions=tuple(
            tuple(len(one.token_ids) for one in drawn) for drawn in finished.values()
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
