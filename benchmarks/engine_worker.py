"""One engine that completes prompts, driven by lines of JSON: gmpo's local sampler or vLLM.

`vs_vllm.py` starts one process an engine and lets one work at a time. This file runs in either
environment, so it imports an engine only when that is asked for. A job is a line on standard input;
its answer is a line on what was standard output, which is moved first, because vLLM writes there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
"""prompts (token ids), completions (of each prompt), max_tokens, ignores_end, seed."""

LONGEST = 1024
"""Tokens of prompt and completion that vLLM reserves room for."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("--model", required=True, help="a folder with weights and config.json")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--max-rows", type=int, required=True, help="sequences decoded together")
    parser.add_argument("--block-size", type=int, help="positions in a block of vLLM's cache")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    complete, facts = ENGINES[arguments.engine](arguments)
    facts["start_seconds"] = time.perf_counter() - started
    reply(answers, facts)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        lengths = complete(job)
        reply(answers, {"seconds": time.perf_counter() - start, "lengths": lengths})
    return 0


def reply(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def gmpo_engine(settings: argparse.Namespace) -> tuple[Callable[[Job], list[int]], Any]:
    """gmpo's sampler as training uses it: log-probabilities come with the tokens."""
    import torch
    import transformers

    from gmpo.engine import build_sampler
    from gmpo.policy.load import end_token_ids, load_policy, load_tokenizer
    from gmpo.sampler.requests import SampleRequest, complete

    policy = load_policy(settings.model, device="cpu", dtype=settings.dtype)
    tokenizer = load_tokenizer(settings.model)
    sampler = build_sampler(policy, tokenizer, max_rows=settings.max_rows)
    end_ids = end_token_ids(policy.model, tokenizer)

    def run(job: Job) -> list[int]:
        requests = [
            SampleRequest(
                id=str(number),
                token_ids=prompt,
                num_completions=job["completions"],
                max_tokens=job["max_tokens"],
                stop_ids=() if job["ignores_end"] else end_ids,
                key=(job["seed"], number),
            )
            for number, prompt in enumerate(job["prompts"])
        ]
        finished = complete(sampler, requests)
        return [len(one.token_ids) for drawn in finished.values() for one in drawn]

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return run, {"versions": versions, "threads": torch.get_num_threads()}


def vllm_engine(settings: argparse.Namespace) -> tuple[Callable[[Job], list[int]], Any]:
    """vLLM with its prefix cache, its compiler and no log-probabilities: the faster setting."""
    import torch
    import transformers
    import vllm

    engine = vllm.LLM(
        model=settings.model,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[settings.dtype],
        max_model_len=LONGEST,
        max_num_seqs=settings.max_rows,
        enable_prefix_caching=True,
        block_size=settings.block_size,
        disable_log_stats=True,
        seed=0,
    )

    def run(job: Job) -> list[int]:
        parameters = vllm.SamplingParams(
            n=job["completions"],
            temperature=1.0,
            top_p=1.0,
            max_tokens=job["max_tokens"],
            ignore_eos=job["ignores_end"],
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
        return [len(one.token_ids) for output in outputs for one in output.outputs]

    versions = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    cache = engine.llm_engine.vllm_config.cache_config
    return run, {
        "versions": versions,
        "block_size": cache.block_size,
        "prefix_cache": cache.enable_prefix_caching,
    }


ENGINES = {"gmpo": gmpo_engine, "vllm": vllm_engine}


if __name__ == "__main__":
    sys.exit(main())
