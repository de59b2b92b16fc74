"""Measure adapters and gradient checkpointing on the bundled model; into docs/results/lora.json.

Every part replaces its own figures in that file; without an argument all parts run.

    python scripts/lora.py [memory] [agreement] [sampling]

Each case of the memory table runs in a process of its own, because a process's peak never falls.
Sampling is timed in seconds of one thread's CPU, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.results import write_results
from torch import Tensor

from gmpo.batch import StepBatch, build_step
from gmpo.engine import build_sampler
from gmpo.policy.load import load_model, load_tokenizer
from gmpo.policy.lora import add_adapters
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt, Rollout
from gmpo.reporting import peak_memory_gib
from gmpo.sampler.requests import SampleRequest, complete
from gmpo.update import LossSettings, PolicyOptimizer, accumulate_gradients, bind_objective

MODEL = "smollm2-135m"
RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "lora.json"
RANK, PROMPT_TOKENS, COMPLETIONS, COMPLETION_TOKENS = 16, 64, 2, 1024
CASES = [(rank, on) for rank in (0, RANK) for on in (False, True)]


def policy_of(*, rank: int = 0, gradient_checkpointing: bool = False) -> Policy:
    model = load_model(MODEL, device="cpu", dtype="fp32")
    if rank:
        add_adapters(model, rank=rank, alpha=2.0 * rank)
    return Policy(model, gradient_checkpointing=gradient_checkpointing)


def moved(policy: Policy) -> Policy:
    """Adapters as training leaves them: B of the size that a few hundred steps give it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in policy.adapters.values():
            layer.lora_B.copy_(2e-3 * torch.randn(layer.lora_B.shape, generator=generator))
    return policy


def step_of(tokens: int) -> StepBatch:
    """One group whose completions all have so many random tokens."""
    generator = np.random.default_rng(0)
    rollouts = tuple(
        Rollout(
            prompt_id="p",
            index=index,
            token_ids=generator.integers(1000, 40_000, size=tokens),
            from_policy=np.ones(tokens, dtype=np.bool_),
            sampler_logprobs=np.full(tokens, -10.0, dtype=np.float32),
            text="",
            finish_reason="length",
            first_version=0,
            last_version=0,
            reward=float(index),
        )
        for index in range(COMPLETIONS)
    )
    prompt_ids = tuple(generator.integers(1000, 40_000, size=PROMPT_TOKENS).tolist())
    group = Group(prompt=Prompt(id="p", text="", token_ids=prompt_ids), rollouts=rollouts)
    return build_step(
        [group],
        torch.tensor([[-1.0, 1.0]]),
        max_tokens=10**9,
        shares_prompts=True,
        skips_dead_rows=True,
        device=torch.device("cpu"),
    )


def update_case(rank: int, gradient_checkpointing: bool, tokens: int) -> dict[str, float]:
    """Peak memory of optimizer steps on completions of this length."""
    policy = policy_of(rank=rank, gradient_checkpointing=gradient_checkpointing)
    optimizer = PolicyOptimizer(policy)
    step = step_of(tokens)
    settings = LossSettings(objective=bind_objective("gmpo_no_clip", clips={}, max_tokens=tokens))
    for _ in range(2):  # the second holds AdamW's moments beside the activations
        accumulate_gradients(policy, step, settings)
        optimizer.apply_step(learning_rate=1e-6, clip_norm=1.0)
    return {
        "peak_gib": peak_memory_gib(policy.device),
        "trained_parameters": sum(w.numel() for w in policy.trained_weights().values()),
    }


def sampled(policy: Policy, rows: int, tokens: int) -> float:
    """Tokens a CPU second of one prompt's completions."""
    sampler = build_sampler(policy, load_tokenizer(MODEL), max_rows=rows)
    request = SampleRequest(
        id="r", token_ids=tuple(range(1000, 1064)), num_completions=rows, max_tokens=tokens
    )
    started = time.process_time()
    complete(sampler, [request])
    return rows * tokens / (time.process_time() - started)


def merged_against_adapters() -> dict[str, float]:
    """|difference| of the two forwards' log-probabilities on the same tokens, in nats."""
    adapted = moved(policy_of(rank=RANK))
    base, merged = policy_of(), policy_of()
    merged.load_weights(adapted.named_weights())
    (batch,) = step_of(256).micro_batches
    with torch.no_grad():
        ours, theirs, start = (p.score(batch).logprobs for p in (adapted, merged, base))
    return {
        "tokens": batch.mask.sum().item(),
        **spread("merged", ours - theirs),
        **spread("moved_from_base", ours - start),
    }


def spread(name: str, difference: Tensor) -> dict[str, float]:
    absolute = difference.abs()
    return {f"{name}_mean": float(absolute.mean()), f"{name}_max": float(absolute.max())}


def sampling() -> dict[str, float]:
    """Tokens a CPU second through adapters and without them, the best of turns about."""
    torch.set_num_threads(1)
    policies = {"adapters": moved(policy_of(rank=RANK)), "plain": policy_of()}
    best: dict[str, float] = {}
    for rows in (8, 64):
        for _ in range(3):
            for name, policy in policies.items():
                key = f"{name}_{rows}_rows"
                best[key] = max(best.get(key, 0.0), sampled(policy, rows, 12))
    return best


def memory() -> dict[str, Any]:
    """Peak memory of updates with all weights or adapters, layers kept or run again."""
    rows = []
    for number, (rank, on) in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"rank": rank, "gradient_checkpointing": on, **json.loads(done.stdout)})
    return {"completions": COMPLETIONS, "completion_tokens": COMPLETION_TOKENS, "cases": rows}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "memory": memory,
    "agreement": merged_against_adapters,
    "sampling": sampling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure")
    parser.add_argument("--case", type=int, help="print one case of the memory table")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(update_case(*CASES[arguments.case], COMPLETION_TOKENS)))
        return
    for part in arguments.parts or PARTS:
        found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        found |= {"model": MODEL, "rank": RANK, part: PARTS[part]()}
        write_results(RESULT, found)
        print(part, json.dumps(found[part]), flush=True)


if __name__ == "__main__":
    main()
