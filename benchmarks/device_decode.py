"""How fast a GPU decodes, draws and updates: captured steps, steps taken anew, and `generate`.

Weights are random, which speeds do not depend on; prompts are random tokens, eight completions
each, and no completion ends early. Rates are of whole requests through the sampler, prefill and
drawing included, after a first run, which captures and is given beside them. `generate` has
transformers' static cache, and runs compiled too where that is asked for.

    python -m benchmarks.device_decode --config FOLDER --json docs/results/device_decode.json

FOLDER holds a model's config.json. `--parts update` times updates alone, e.g. of an earlier commit.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.devices import DEVICES, device_name, wait_for
from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from benchmarks.shapes import MICRO_BATCH_TOKENS
from gmpo.batch import StepBatch, build_step
from gmpo.policy.llama import LlamaBody
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt, Rollout
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.drawing import draw_tokens
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import Completion, SampleRequest, complete
from gmpo.tracking import provenance
from gmpo.update import LossSettings, PolicyOptimizer, accumulate_gradients, bind_objective

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP = 8
PARTS = ("decode", "drawing", "update", "compiled")
STEPS = 4
"""Optimizer steps of an update, as a round has."""
PROMPTS_PER_STEP = 2
MICRO_BATCHES = (MICRO_BATCH_TOKENS, 16384)
"""Tokens of a micro-batch: `training.max_tokens_per_micro_batch` by default, and a whole step."""


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--json", required=True, type=results_file, metavar="FILE")
    parser.add_argument("--config", required=True, metavar="FOLDER")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args(argv)
    device = arguments.device
    entries: list[dict[str, Any]] = []
    report = {"made_with": {**provenance(), "device": device_name(device)}, "entries": entries}
    for entry in measured(arguments):
        entries.append(entry)
        print(json.dumps(entry), flush=True)
        # Each time, so that what was measured stays if a later part fails.
        write_results(arguments.json, report)
    return 0


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is asked for, one line of figures after another."""
    device = arguments.device
    sizes = {"prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens}
    for dtype in arguments.dtypes:
        model = random_model(arguments.config, DTYPES[dtype], device)
        for rows in arguments.rows if "decode" in arguments.parts else ():
            yield from decoding(model, dtype, rows, device=device, **sizes)
        for rows in arguments.rows if "drawing" in arguments.parts else ():
            yield {"what": "drawing", "dtype": dtype, "rows": rows, **drawing(model, rows, device)}
        for max_tokens in MICRO_BATCHES if "update" in arguments.parts else ():
            yield {"dtype": dtype, **update(model, max_tokens, device=device, **sizes)}
        for rows in arguments.rows if "compiled" in arguments.parts else ():
            figures = generated(model, rows, device=device, is_compiled=True, **sizes)
            yield {"what": "generate, compiled", "dtype": dtype, "rows": rows, **sizes, **figures}
        del model


def random_model(folder: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of that configuration with random weights."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=dtype
    )
    return model.to(device).eval()  # type: ignore[arg-type]


def decoding(
    model: PreTrainedModel,
    dtype: str,
    rows: int,
    *,
    device: str,
    prompt_tokens: int,
    new_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Steps and rates of both ways to take a step, what they drew, and `generate`."""
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    asked = requests(model, rows, **sizes)
    drawn = {}
    for name, decoder in decoders(model, rows, device).items():
        figures, drawn[name] = sampled(decoder, asked, rows, device)
        yield {"what": name, "dtype": dtype, "rows": rows, **sizes, **figures}
    if len(drawn) == 2:
        yield {"what": "equality", "dtype": dtype, "rows": rows, **compared(*drawn.values())}
    figures = generated(model, rows, device=device, is_compiled=False, **sizes)
    yield {"what": "generate", "dtype": dtype, "rows": rows, **sizes, **figures}


def decoders(model: PreTrainedModel, rows: int, device: str) -> dict[str, LlamaDecoder]:
    """Steps taken anew and, where this commit has them, captured ones."""
    body = LlamaBody(model)
    found = {"eager": LlamaDecoder(body, max_rows=rows)}
    try:
        from gmpo.sampler.graphed import capture_for
    except ImportError:
        return found
    capture = capture_for(torch.device(device))
    if capture is not None:
        found["graphed"] = LlamaDecoder(body, max_rows=rows, capture=capture)
    return found


def requests(
    model: PreTrainedModel, rows: int, *, prompt_tokens: int, new_tokens: int
) -> list[SampleRequest]:
    ids = np.random.default_rng(0).integers(10, model.config.vocab_size, (rows, prompt_tokens))
    group = min(GROUP, rows)
    return [
        SampleRequest(
            id=str(number),
            token_ids=ids[number].tolist(),
            num_completions=group,
            max_tokens=new_tokens,
            key=(number,),
        )
        for number in range(rows // group)
    ]


def sampled(
    decoder: LlamaDecoder, asked: list[SampleRequest], rows: int, device: str
) -> tuple[dict[str, float], list[Completion]]:
    """Rates of a first and a second run, and a step's forward pass alone."""
    seconds, found = [], {}
    for _ in range(2):
        sampler = LocalSampler(decoder, context_length=8192, max_rows=rows)
        wait_for(device)
        started = time.perf_counter()
        found = complete(sampler, asked)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    completions = [one for ones in found.values() for one in ones]
    tokens = sum(len(one.token_ids) for one in completions)
    figures = {
        "first_run_seconds": seconds[0],
        "seconds": seconds[1],
        "tokens_per_second": tokens / seconds[1],
        "forward_ms": forward_ms(decoder, asked, device),
    }
    return figures, completions


def forward_ms(decoder: LlamaDecoder, asked: list[SampleRequest], device: str) -> float:
    """Median of one step's forward pass, the wait for it included, halfway through an answer."""
    half = asked[0].max_tokens // 2
    prefills = decoder.prefill([request.token_ids for request in asked], all_logits=False)
    for request, prefill in zip(asked, prefills, strict=True):
        decoder.add_rows(prefill, request.num_completions)
    count = sum(request.num_completions for request in asked)
    token_ids = torch.full((count,), 7, device=decoder.device)
    times = []
    for _ in range(half + 20):
        wait_for(device)
        started = time.perf_counter()
        decoder.advance(token_ids)
        wait_for(device)
        times.append(time.perf_counter() - started)
    decoder.drop(list(range(count)))
    return 1e3 * median(times[half - 20 :])


def compared(ours: list[Completion], others: list[Completion]) -> dict[str, float]:
    """Share of completions with equal tokens, and the largest difference of their log-probs."""
    same = [
        a for a in zip(ours, others, strict=True) if np.array_equal(a[0].token_ids, a[1].token_ids)
    ]
    gaps = [float(np.abs(one.logprobs - other.logprobs).max()) for one, other in same]
    return {"equal_completions": len(same) / len(ours), "largest_gap_nats": max(gaps, default=0.0)}


def drawing(model: PreTrainedModel, rows: int, device: str) -> dict[str, float]:
    """Milliseconds to draw a token a row and read it: plain, and with the settings."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, model.config.vocab_size, generator=generator)
    logits = logits.to(device, model.dtype)
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)

    def draw(temperature: float, top_p: float) -> None:
        drawn = draw_tokens(
            logits,
            uniforms=uniforms,
            temperature=torch.full((rows,), temperature).to(settings_device),
            top_p=torch.full((rows,), top_p).to(settings_device),
            top_k=torch.zeros(rows, dtype=torch.long).to(settings_device),
        )
        drawn.token_ids.tolist()

    settings_device = "cpu"
    try:
        draw(0.7, 1.0)
    except RuntimeError:  # of an earlier commit, which wants all tensors on one device
        settings_device = device
    cases = {"plain_ms": (1.0, 1.0), "temperature_ms": (0.7, 1.0), "top_p_ms": (0.7, 0.9)}
    return {name: 1e3 * seconds_of(lambda c=case: draw(*c), device) for name, case in cases.items()}


def generated(
    model: PreTrainedModel,
    rows: int,
    *,
    device: str,
    prompt_tokens: int,
    new_tokens: int,
    is_compiled: bool,
) -> dict[str, float]:
    """transformers' sampling of as many tokens after the same prompts, at its second run."""
    asked = requests(model, rows, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    given = torch.tensor([r.token_ids for r in asked for _ in range(r.num_completions)])
    given = given.to(device)
    seconds = []
    for _ in range(2):
        wait_for(device)
        started = time.perf_counter()
        model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=True,
            top_k=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            cache_implementation="static",
            disable_compile=not is_compiled,
            pad_token_id=0,
        )
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return {
        "first_run_seconds": seconds[0],
        "seconds": seconds[1],
        "tokens_per_second": rows * new_tokens / seconds[1],
    }


def update(
    model: PreTrainedModel, max_tokens: int, *, device: str, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Seconds of a round's steps on 16 completions each, forward, backward and AdamW."""
    policy = Policy(model)
    for weight in model.parameters():
        weight.requires_grad_(True)
    optimizer = PolicyOptimizer(policy)
    settings = LossSettings(
        objective=bind_objective("gmpo", clips={}, max_tokens=new_tokens), temperature=1.0
    )
    step = training_step(model, max_tokens, device, prompt_tokens, new_tokens)

    def steps() -> None:
        for _ in range(STEPS):
            accumulate_gradients(policy, step, settings)
            optimizer.apply_step(learning_rate=0.0, clip_norm=1.0)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(steps, device, repetitions=4)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    policy.release()
    return {
        "what": "update",
        "micro_batch_tokens": max_tokens,
        "micro_batches": len(step.micro_batches),
        "seconds": seconds,
        "peak_gib": peak,
    }


def training_step(
    model: PreTrainedModel, max_tokens: int, device: str, prompt_tokens: int, new_tokens: int
) -> StepBatch:
    """Two prompts of eight random completions."""
    generator = np.random.default_rng(1)
    draw = functools.partial(generator.integers, 10, model.config.vocab_size)
    groups = [
        Group(
            prompt=Prompt(id=str(number), text="x", token_ids=tuple(draw(prompt_tokens).tolist())),
            rollouts=tuple(rollout(str(number), index, draw(new_tokens)) for index in range(GROUP)),
        )
        for number in range(PROMPTS_PER_STEP)
    ]
    return build_step(
        groups,
        torch.linspace(-1, 1, PROMPTS_PER_STEP * GROUP).view(PROMPTS_PER_STEP, GROUP),
        max_tokens=max_tokens,
        shares_prompts=True,
        skips_dead_rows=True,
        device=torch.device(device),
    )


def rollout(prompt_id: str, index: int, token_ids: np.ndarray) -> Rollout:
    return Rollout(
        prompt_id=prompt_id,
        index=index,
        token_ids=token_ids,
        from_policy=np.ones(len(token_ids), dtype=np.bool_),
        sampler_logprobs=np.full(len(token_ids), -10.8, dtype=np.float32),
        text="",
        finish_reason="length",
        first_version=0,
        last_version=0,
        reward=0.0,
    )


def seconds_of(run: Callable[[], None], device: str, *, repetitions: int = 20) -> float:
    """Median, after a run that is not counted."""
    times = []
    for _ in range(repetitions + 1):
        wait_for(device)
        started = time.perf_counter()
        run()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
