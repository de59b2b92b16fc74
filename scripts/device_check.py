"""Whether a device computes what the CPU does: scores, gradients, sampling and a run of rounds.

The CPU plays a round in fp32 with SGD, and the device repeats its update on the same completions:
in fp32 the two updates of four steps agree to rounding. In bf16 the first step's gradients point
the same way; after four steps the policies have moved apart, and the plain path's as far. Greedy
completions are those of the model's own `generate`. What the device's sampler reports of each token
lies within the bounds under which a run trusts it, or the run recomputes it.

    python -m scripts.device_check --device cuda --json docs/results/device_cuda.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from benchmarks.devices import DEVICES, device_name
from benchmarks.exchange import Scratch, write_start
from benchmarks.gmpo_side import GmpoSide
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from benchmarks.workloads import SGD_LEARNING_RATES, WORKLOADS, Workload
from scripts.replay import Weights, cosine_similarity

from gmpo.policy.load import choose_dtype, end_token_ids
from gmpo.sampler.requests import SampleRequest, complete
from gmpo.tracking import provenance
from gmpo.update import Mismatch

GREEDY_TOKENS = 32
STEP_SIZE = SGD_LEARNING_RATES["bf16"]
LARGEST_DIFFERENCE = 1e-3
"""|d_device - d_cpu| / |d_cpu| of fp32 updates: products are summed in another order."""
SMALLEST_COSINE = 0.99
"""Between the CPU's gradient in fp32 and the device's in bf16."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure against its bound."""

    name: str
    figure: float
    bound: str
    holds: bool


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--json", required=True, type=results_file, metavar="FILE")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    arguments = parser.parse_args(argv)
    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        print(
            f"{'ok  ' if check.holds else 'FAIL'} {check.name}: {check.figure:.4g} ({check.bound})",
            flush=True,
        )

    workload = replace(WORKLOADS["short"], model=arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(folder=Path(folder))
        write_start(workload.model, scratch.start)
        expected = record_on_cpu(workload, scratch)
        for dtype in ("fp32", "bf16"):
            side = GmpoSide(workload, dtype, scratch, device=arguments.device)
            for check in checks_of(side, dtype, expected):
                note(check)
            side.close()
    report = {
        "made_with": {**provenance(), "device": device_name(arguments.device)},
        "auto_takes": choose_dtype("auto", device=torch.device(arguments.device)),
        "checks": [vars(check) for check in checks],
    }
    write_results(arguments.json, report)
    return 0 if all(check.holds for check in checks) else 1


def record_on_cpu(workload: Workload, scratch: Scratch) -> Weights:
    """The reference: a round in fp32 on the CPU, and the gradient of its first step."""
    side = GmpoSide(workload, "fp32", scratch)
    side.record(number=0, live_groups=workload.prompts_per_round, sgd_learning_rate=STEP_SIZE)
    gradient = side.first_gradient(number=0)
    side.close()
    return gradient


def checks_of(side: GmpoSide, dtype: str, expected: Weights) -> Iterator[Check]:
    """Everything that is asked of the device in one precision."""
    body = side.parts.policy.body
    yield yes_or_no(f"{dtype}: the fast path is taken", body is not None, "; ".join(side.notes))
    cosine = cosine_similarity(side.first_gradient(number=0), expected)
    yield Check(
        name=f"{dtype}: cosine of the gradient with the CPU's in fp32",
        figure=cosine,
        bound=f">= {SMALLEST_COSINE}",
        holds=cosine >= SMALLEST_COSINE,
    )
    if dtype == "fp32":
        moved = side.replay(number=0, sgd_learning_rate=STEP_SIZE)["difference"]
        yield at_most("fp32: update against the CPU's", moved, LARGEST_DIFFERENCE)
        same = same_greedy_tokens(side)
        yield yes_or_no("fp32: greedy completions are generate's", same == 1.0, f"{same:.0%}")
    gaps = side.mismatch(number=1)["gaps"]
    mismatch = Mismatch(mean=fmean(gaps), max=max(gaps), num_tokens=len(gaps))
    played = side.round(number=1, live_groups=WORKLOADS["short"].prompts_per_round)
    yield Check(
        name=f"{dtype}: mean mismatch, nats",
        figure=mismatch.mean,
        bound=f"within {Mismatch.MEAN_BOUND:g}, or recomputed",
        holds=mismatch.is_small or not played["used_sampler_logprobs"],
    )


def same_greedy_tokens(side: GmpoSide) -> float:
    """Share of prompts whose greedy completion is the one of transformers' `generate`."""
    parts = side.parts
    model = parts.policy.model
    stop_ids = end_token_ids(model, parts.tokenizer)
    prompts = parts.prompts.take(0, 8)
    requests = [
        SampleRequest(
            id=prompt.id,
            token_ids=prompt.token_ids or (),
            max_tokens=GREEDY_TOKENS,
            temperature=0.0,
            stop_ids=stop_ids,
        )
        for prompt in prompts
    ]
    ours = complete(parts.sampler, requests)
    same = 0
    for prompt in prompts:
        given = torch.tensor([list(prompt.token_ids or ())], device=parts.policy.device)
        theirs = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=GREEDY_TOKENS,
            eos_token_id=list(stop_ids),
        )[0, given.shape[1] :]
        same += ours[prompt.id][0].token_ids.tolist() == theirs.tolist()
    return same / len(prompts)


def at_most(name: str, figure: float, bound: float) -> Check:
    return Check(name=name, figure=figure, bound=f"<= {bound:g}", holds=figure <= bound)


def yes_or_no(name: str, holds: bool, told: str) -> Check:
    return Check(name=name, figure=float(holds), bound=told or "1", holds=holds)


if __name__ == "__main__":
    sys.exit(main())
