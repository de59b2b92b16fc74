"""Counted operations equal those that torch counts while gmpo's and TRL's own code runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.flops import (
    Layout,
    attention,
    body,
    causal_pairs,
    decode_bytes,
    gmpo_gradient,
    gmpo_rollouts,
    gmpo_scores,
    gradient_bytes,
    head,
    model_of,
    needed_decode,
    needed_gradient,
    optimizer_bytes,
    trl_gradient,
    trl_rollouts,
    trl_scores,
)
from benchmarks.shapes import layout_of
from tests.models import tiny_model
from tests.rollout_groups import one_step, random_groups
from tests.trl_trainers import tolerated, trainer_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trl.experimental.gmpo import GMPOTrainer

from gmpo.kernels.library import kernels_off
from gmpo.policy.head import most_positions_kept
from gmpo.policy.score import Policy
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import SampleRequest, complete
from gmpo.update import LossSettings, accumulate_gradients, bind_objective

ALIKE = [[7, 8, 9, 10, 11, 12], [7, 8, 9, 10, 11, 20, 21, 22]]
"""Prompts whose first five tokens are the same."""
UNLIKE = [[7, 8, 9], [20, 21, 22, 23, 24]]
PREFILL_PROMPTS = {"alike": ALIKE, "unlike": UNLIKE}


def counted(run: Callable[[], Any]) -> int:
    """What torch counts while `run` runs.

    Its counter knows neither the CPU's fused attention nor products added up in place, and sees no
    compiled functions: theirs are the same operations.
    """

    def in_place(_: Any, left: torch.Size, right: torch.Size, **options: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with kernels_off(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("prompts", PREFILL_PROMPTS.values(), ids=PREFILL_PROMPTS)
@pytest.mark.parametrize("longest", [1, 9])
def test_gmpos_gradient_is_counted_exactly(prompts: list[list[int]], longest: int):
    policy = Policy(tiny_model())
    groups = random_groups(prompts, [[1, longest], [min(3, longest), 1]])
    step = one_step(groups, [[1.0, -1.0], [0.5, -0.5]])
    (batch,) = step.micro_batches
    settings = LossSettings(objective=bind_objective("gmpo", clips={}, max_tokens=1))
    found = counted(lambda: accumulate_gradients(policy, step, settings))
    shape, layout = model_of(policy.model.config), layout_of(batch)
    assert found == gmpo_gradient(
        shape, layout, kept=most_positions_kept(shape.vocabulary, width=4)
    )


@pytest.mark.parametrize("prompts", PREFILL_PROMPTS.values(), ids=PREFILL_PROMPTS)
def test_gmpos_scores_are_counted_exactly(prompts: list[list[int]]):
    policy = Policy(tiny_model())
    (batch,) = one_step(random_groups(prompts, [[2, 9], [3, 1]]), [[1.0, -1.0]] * 2).micro_batches
    with torch.no_grad():
        found = counted(lambda: policy.score(batch))
    assert found == gmpo_scores(model_of(policy.model.config), layout_of(batch))


@pytest.mark.parametrize("prompts", PREFILL_PROMPTS.values(), ids=PREFILL_PROMPTS)
def test_gmpos_rollouts_are_counted_exactly(prompts: list[list[int]]):
    policy = Policy(tiny_model())
    assert policy.body is not None
    sampler = LocalSampler(LlamaDecoder(policy.body, max_rows=8), context_length=64, max_rows=8)
    limits = [3, 7]
    requests = [
        SampleRequest(id=str(number), token_ids=prompt, num_completions=2, max_tokens=limit)
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    found = counted(lambda: complete(sampler, requests))
    shared = 5 if prompts is ALIKE else 0
    expected = gmpo_rollouts(
        model_of(policy.model.config),
        prefills=[([len(prompt) for prompt in prompts], shared)],
        completions=[[limit] * 2 for limit in limits],
    )
    assert found == expected


@tolerated
def test_trls_scores_and_gradient_are_counted_exactly():
    trainer = trainer_of(GMPOTrainer)
    model = model_of(trainer.model.config)
    ids = torch.randint(5, 100, (4, 12))
    inputs = (trainer.model, ids, torch.ones_like(ids), 7)

    def scores() -> torch.Tensor:
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(*inputs, compute_entropy=True)
        return logprobs

    with torch.no_grad():
        found = counted(scores)
    assert found == trl_scores(model, rows=4, width=12)
    found = counted(lambda: scores().sum().backward())
    assert found == trl_gradient(model, rows=4, width=12)


def test_generate_is_counted_exactly():
    model = tiny_model()
    ids = torch.randint(5, 100, (4, 6))
    found = counted(
        lambda: model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=True,
        )
    )
    assert found == trl_rollouts(model_of(model.config), rows=4, prompt_width=6, steps=5)


def test_parts_by_hand():
    model = replace(
        model_of(tiny_model().config),
        layers=2,
        hidden=4,
        feed_forward=6,
        query_heads=2,
        key_heads=1,
        head_size=2,
        vocabulary=10,
    )
    # A layer: queries 4*4, output 4*4, keys and values 2 * 4*2, feed-forward 3 * 4*6.
    assert model.layer_weights == 16 + 16 + 16 + 72
    assert body(model, 3) == 2 * 2 * 120 * 3
    assert head(model, 3) == 2 * 4 * 10 * 3
    # 2 layers, 2 heads of 2, two products of two operations.
    assert attention(model, 5) == 2 * 2 * 2 * 2 * 2 * 5


def test_causal_pairs_by_hand():
    # Tokens see 3, 4 and 5 positions, themselves included, after two earlier ones.
    assert causal_pairs(3, 2) == 3 + 4 + 5


def test_the_least_gradient_by_hand():
    model = model_of(tiny_model().config)
    # Shared 2, rests 1 and 3, completions of 2 and 1: of which 1 and 0 tokens are run.
    found = needed_gradient(model, groups=[(3, [2]), (5, [1])], shared=2)
    pairs = (1 + 2) + 3 + (3 + 4 + 5) + 4
    assert found == 3 * (body(model, 2 + 1 + 3 + 1) + attention(model, pairs) + head(model, 3))
    assert needed_gradient(model, groups=[], shared=0) == 0


def test_no_implementation_counts_less_than_the_least():
    model = model_of(tiny_model().config)
    layout = Layout(
        tokens=5 + 2 * 3 + 4 * 8,
        prompts=2,
        prompt_width=8,
        shared=5,
        rows=4,
        completion_width=9,
        counted=4 * 9,
    )
    least = needed_gradient(model, groups=[(8, [9, 9]), (8, [9, 9])], shared=5)
    counts = [gmpo_gradient(model, layout, kept=kept) for kept in (36, 30, 0)]
    assert least < counts[0] < counts[1] < counts[2] < trl_gradient(model, rows=4, width=17)
    assert [counts[1] - counts[0], counts[2] - counts[0]] == [head(model, 6), head(model, 36)]
    # The causal half of the attention is not needed, nor are logits formed again.
    assert least > 0.6 * counts[2]


def test_decode_traffic_and_work_by_hand():
    model = model_of(tiny_model().config)
    # 2 layers of (2 * 32*32 + 2 * 32*16 + 3 * 32*48) weights and a head of 32 * 101, in bf16;
    # keys and values of a position: 2 * 2 layers * 2 heads * 8, for 3 rows of 10 + 1 positions.
    weights = 2 * (2048 + 1024 + 4608) + 32 * 101
    assert decode_bytes(model, rows=3, length=10, element=2) == 2 * weights + 3 * 11 * 64 * 2
    layers = 2 * 2 * (2048 + 1024 + 4608) * 3
    assert needed_decode(model, rows=3, length=10) == layers + 2 * 32 * 101 * 3 + 4 * 2 * 32 * 33


def test_the_traffic_counts_a_narrow_gradient_and_a_narrow_copy_only_where_there_are_some():
    assert gradient_bytes(10, element=4) == 10 * (4 + 4 + 4)
    assert gradient_bytes(10, element=2) == 10 * (2 + 2 + 2)
    assert optimizer_bytes(10, element=4) == 10 * (24 + 4)
    assert optimizer_bytes(10, element=2) == 10 * (24 + 2 + 2)
