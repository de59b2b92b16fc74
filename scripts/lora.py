"""Measures adapters and gradient checkpointing on the bundled model; writes docs/results/lora.json.

    .venv/bin/python scripts/lora.py

Each case of the memory table runs in a process of its own, because a process's peak never falls.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gmpo.assembly import build_sampler
from gmpo.batch import StepBatch, build_step
from gmpo.policy.load import load_model, load_tokenizer
from gmpo.policy.lora import add_adapters
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt, Rollout
from gmpo.reporting import peak_memory_gib
from gmpo.sampler.requests import SampleRequest, complete
from gmpo.update import LossSettings, PolicyOptimizer, accumulate_gradients, bind_objective

MODEL = "smollm2-135m"
RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "lora.json"
RANK, PROMPT_TOKENS, COMPLETIONS = 16, 64, 2
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
    """Peak memory and time of optimizer steps on completions of this length."""
    policy = policy_of(rank=rank, gradient_checkpointing=gradient_checkpointing)
    optimizer = PolicyOptimizer(policy)
    step = step_of(tokens)
    settings = LossSettings(objective=bind_objective("gmpo_no_clip", clips={}, max_tokens=tokens))
    started = time.perf_counter()
    for _ in range(2):
        accumulate_gradients(policy, step, settings)
        optimizer.apply_step(learning_rate=1e-6, clip_norm=1.0)
    return {
        "peak_gib": peak_memory_gib(policy.device),
        "step_seconds": (time.perf_counter() - started) / 2,
        "trained_parameters": sum(w.numel() for w in policy.trained_weights().values()),
    }


def sampled(policy: Policy, rows: int, tokens: int) -> float:
    """Tokens a second of one prompt's completions, without its prefill's share of the weights."""
    sampler = build_sampler(policy, load_tokenizer(MODEL), max_rows=rows)
    request = SampleRequest(
        id="r", token_ids=tuple(range(1000, 1064)), num_completions=rows, max_tokens=tokens
    )
    started = time.perf_counter()
    complete(sampler, [request])
    return rows * tokens / (time.perf_counter() - started)


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
    """Tokens a second through adapters and without them, best of three in turns."""
    policies = {"adapters": moved(policy_of(rank=RANK)), "plain": policy_of()}
    best: dict[str, float] = {}
    for rows in (8, 64):
        for _ in range(3):
            for name, policy in policies.items():
                key = f"{name}_{rows}_rows"
                best[key] = max(best.get(key, 0.0), sampled(policy, rows, 24))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="of each completion")
    parser.add_argument("--case", type=int, help="run one case of the memory table and print it")
    arguments = parser.parse_args()
    if arguments.case is not None:
        rank, on = CASES[arguments.case]
        print(json.dumps(update_case(rank, on, arguments.tokens)))
        return
    memory = []
    for number, (rank, on) in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(number)]
        command += ["--tokens", str(arguments.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = {"rank": rank, "gradient_checkpointing": on, **json.loads(done.stdout)}
        print(json.dumps(found), flush=True)
        memory.append(found)
    result = {
        "model": MODEL,
        "rank": RANK,
        "completions": COMPLETIONS,
        "completion_tokens": arguments.tokens,
        "threads": torch.get_num_threads(),
        "update": memory,
        "agreement_nats": merged_against_adapters(),
        "sampling_tokens_per_second": sampling(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
