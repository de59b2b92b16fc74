"""Adapters must agree: with PEFT, merged and apart, on both paths, and with a frozen base."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.adapters import adapted_policy, in_peft, obvious_logprobs, peft_factors
from tests.live_memory import LiveMemory
from tests.models import FAMILIES, character_tokenizer, tiny_model
from tests.rollout_groups import one_step, random_groups
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gmpo.batch import MicroBatch, StepBatch
from gmpo.engine import build_sampler
from gmpo.errors import ModelError
from gmpo.objective import gmpo_loss
from gmpo.policy import fused
from gmpo.policy.lora import add_adapters
from gmpo.policy.score import BasePolicy, Policy
from gmpo.sampler.requests import SampleRequest, complete
from gmpo.update import (
    LossSettings,
    PolicyOptimizer,
    accumulate_gradients,
    bind_objective,
    with_old_logprobs,
    with_reference_logprobs,
)

F64 = torch.float64
ACROSS_PATHS = 1e-5
"""transformers' Llama modules take norm statistics in fp32, whatever the model's precision."""
PROMPTS = [[11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 15, 20, 21], [40]]
LENGTHS = [[5, 1, 3], [2, 7, 4], [3, 2, 2]]
ADVANTAGES = [[1.0, -1.2, 0.3], [0.7, -0.4, -0.3], [1.5, 0.0, -1.5]]
PATHS = [*((family, engine) for family in FAMILIES for engine in ("fast", "plain"))]
PATHS.remove(("gpt2", "fast"))
every_path = pytest.mark.parametrize(("family", "engine"), PATHS)
every_family = pytest.mark.parametrize("family", FAMILIES)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks for it
)


def one_batch() -> MicroBatch:
    (batch,) = step_of().micro_batches
    return batch


def step_of() -> StepBatch:
    return one_step(random_groups(PROMPTS, LENGTHS), ADVANTAGES)


@functools.cache
def settings() -> LossSettings:
    return LossSettings(objective=bind_objective("gmpo", clips={}, max_tokens=16))


def off_policy(policy: Policy) -> StepBatch:
    """Old log-probabilities around the policy's own, in and out of the clips."""
    (step,), _ = with_old_logprobs(policy, [step_of()], temperature=1.0)
    (batch,) = step.micro_batches
    shift = 0.6 * torch.sin(1.0 + torch.arange(batch.mask.numel(), dtype=F64)).view_as(batch.mask)
    moved = replace(batch, old_logprobs=batch.old_logprobs + shift)
    return replace(step, micro_batches=(moved,))


def gradients(policy: Policy, step: StepBatch) -> dict[str, Tensor]:
    for master in policy.masters.values():
        master.grad = None
    accumulate_gradients(policy, step, settings())
    return {
        name: master.grad.clone()
        for name, master in policy.masters.items()
        if master.grad is not None
    }


# Against PEFT


@every_path
def test_scores_are_those_of_pefts_model(family: str, engine: str):
    policy = adapted_policy(family, engine=engine, alpha=5.0)
    batch = one_batch()
    with torch.no_grad():
        ours, theirs = (
            policy.score(batch).logprobs,
            obvious_logprobs(in_peft(policy, family), batch),
        )
    tolerance = 1e-10 if family == "gpt2" else ACROSS_PATHS
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("targets", [None, ["q_proj", "c_attn", "down_proj", "c_fc"]])
@every_family
def test_gradients_of_the_factors_are_those_of_peft(family: str, targets: list[str] | None):
    if targets:
        targets = [t for t in targets if (t.startswith("c_")) == (family == "gpt2")]
    policy = adapted_policy(family, engine="plain", targets=targets, alpha=5.0)
    theirs = in_peft(policy, family)
    # Padded alike, so that norm statistics, which Llama modules take in fp32, are the same.
    wrapped = Policy(theirs.base_model.model, engine="plain")
    step = off_policy(policy)
    (batch,) = step.micro_batches
    losses = gmpo_loss(
        policy_logprobs=wrapped.score(batch).logprobs,
        old_logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        mask=batch.mask,
    )
    (losses.sum() / step.num_rollouts).backward()
    ours = gradients(policy, step)
    expected = peft_factors(theirs)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, expected[name].grad, rtol=0, atol=1e-10, msg=name)


def test_steps_of_adamw_move_the_factors_as_in_peft():
    policy = adapted_policy("gpt2", engine="plain", alpha=5.0, is_moved=False)
    theirs = in_peft(policy, "gpt2")
    # A large epsilon: AdamW divides gradients that are rounding alone by themselves.
    optimizer = PolicyOptimizer(policy, eps=1e-3)
    factors = peft_factors(theirs)
    adamw = torch.optim.AdamW(factors.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3)
    adamw.param_groups[0]["weight_decay"] = 0.0
    start = policy.trained_weights()
    start = {name: weight.clone() for name, weight in start.items()}
    for _ in range(4):
        step = off_policy(policy)
        (batch,) = step.micro_batches
        accumulate_gradients(policy, step, settings())
        optimizer.apply_step(learning_rate=1e-2, clip_norm=1e9)
        losses = gmpo_loss(
            policy_logprobs=obvious_logprobs(theirs, batch),
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            mask=batch.mask,
        )
        adamw.zero_grad()
        (losses.sum() / step.num_rollouts).backward()
        adamw.step()
    for name, weight in policy.trained_weights().items():
        assert (weight - start[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(weight, factors[name].detach(), rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@every_family
def test_merged_weights_are_those_of_pefts_merge_and_unload(family: str, dtype: torch.dtype):
    policy = adapted_policy(family, dtype=dtype, alpha=5.0)
    merged = dict(in_peft(policy, family).merge_and_unload().named_parameters())
    ours = dict(policy.named_weights())
    assert ours.keys() == merged.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, merged[name].detach(), msg=name)


# Merged and apart, on both paths


@every_path
def test_a_plain_policy_with_the_merged_weights_scores_alike(family: str, engine: str):
    adapted = adapted_policy(family, engine=engine)
    merged = Policy(tiny_model(family, dtype=F64, seed=5), engine=engine, warn=lambda _: None)
    merged.load_weights(adapted.named_weights())
    base = Policy(tiny_model(family, dtype=F64), engine=engine, warn=lambda _: None)
    batch = one_batch()
    with torch.no_grad():
        ours, theirs, start = (p.score(batch).logprobs for p in (adapted, merged, base))
    # ours - start is what the adapters do; without it the comparison would show nothing.
    assert (ours - start).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ACROSS_PATHS)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_fast_and_plain_give_the_adapters_the_same_gradients(family: str):
    fast, plain = adapted_policy(family, engine="fast"), adapted_policy(family, engine="plain")
    assert fast.shares_prompts and not plain.shares_prompts
    step = off_policy(plain)
    ours, theirs = gradients(fast, step), gradients(plain, step)
    assert ours.keys() == theirs.keys() == fast.trained_weights().keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=10 * ACROSS_PATHS, msg=name)


@every_path
def test_the_sampler_draws_from_the_adapted_model(family: str, engine: str):
    policy = adapted_policy(family, engine=engine, dtype=torch.float32)
    sampler = build_sampler(policy, character_tokenizer(), max_rows=4)
    sampler.load_weights(1, policy.own_weights())
    request = SampleRequest(id="r", token_ids=[11, 12, 13], num_completions=4, max_tokens=6)
    completions = complete(sampler, [request])["r"]
    merged = tiny_model(family, seed=5)
    merged.load_state_dict(dict(policy.named_weights()), strict=False)
    for completion in completions:
        token_ids = torch.tensor([[11, 12, 13, *completion.token_ids.tolist()]])
        with torch.no_grad():
            logprobs = merged(token_ids).logits[0, 2:-1].log_softmax(dim=-1)
        expected = logprobs.gather(-1, token_ids[0, 3:, None])[:, 0]
        # fp32; the bound on trusting a sampler is 5e-3.
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5, check_dtype=False
        )


@every_path
def test_the_base_under_the_adapters_is_the_reference(family: str, engine: str):
    policy = adapted_policy(family, engine=engine)
    apart = Policy(tiny_model(family, dtype=F64), engine=engine, warn=lambda _: None)
    (ours,) = with_reference_logprobs(BasePolicy(policy), [step_of()], temperature=0.9)
    (theirs,) = with_reference_logprobs(apart, [step_of()], temperature=0.9)
    for batch, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
        assert batch.reference_logprobs is not None
        # Both run the same parts, so not even rounding differs.
        assert torch.equal(batch.reference_logprobs, other.reference_logprobs)
    assert all(layer.is_on for layer in policy.adapters.values())


# The frozen base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_path
def test_a_step_moves_every_factor_and_nothing_else(family: str, engine: str, dtype: torch.dtype):
    policy = adapted_policy(family, engine=engine, dtype=dtype)
    before = {name: weight.clone() for name, weight in policy.own_weights()}
    optimizer = PolicyOptimizer(policy)
    accumulate_gradients(policy, step_of(), settings())
    optimizer.apply_step(learning_rate=1e-2, clip_norm=1.0)
    trained = policy.trained_weights()
    for name, weight in policy.own_weights():
        assert torch.equal(weight, before[name]) == (name not in trained), name
    # What the model computes with are the moved factors, rounded where it is narrower.
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, policy.masters[name].to(dtype)), name


def test_masters_gradients_and_moments_exist_for_the_factors_alone():
    policy = adapted_policy(dtype=torch.bfloat16)
    optimizer = PolicyOptimizer(policy)
    accumulate_gradients(policy, step_of(), settings())
    optimizer.apply_step(learning_rate=1e-2, clip_norm=1.0)
    accumulate_gradients(policy, step_of(), settings())
    factors = {id(policy.masters[name]) for name in policy.trained_weights()}
    assert {id(weight) for weight in optimizer.adamw.state} == factors
    for name, master in policy.masters.items():
        is_factor = id(master) in factors
        assert master.dtype == (torch.float32 if is_factor else torch.bfloat16), name
        assert (master.grad is not None) == is_factor, name
        # No second copy of a frozen weight.
        assert is_factor or master is policy.model.get_parameter(name)


@every_path
def test_no_gradient_of_a_frozen_weight_is_computed(family: str, engine: str):
    def backward_flops(policy: Policy) -> int:
        scores = policy.score(one_batch())
        with FlopCounterMode(display=False) as counter:
            scores.logprobs.sum().backward()
        return counter.get_total_flops()

    adapted = adapted_policy(family, engine=engine, rank=1)
    whole = Policy(tiny_model(family, dtype=F64), engine=engine, warn=lambda _: None)
    # Half of a linear layer's backward pass is its weight's gradient; attention has none.
    assert backward_flops(adapted) < 0.7 * backward_flops(whole)


def test_a_weight_that_its_owner_froze_is_carried_over_with_the_others():
    source, target = (Policy(tiny_model(seed=seed), engine="plain") for seed in (1, 2))
    model = tiny_model(seed=3)
    model.get_input_embeddings().weight.requires_grad_(False)
    frozen = Policy(model, engine="plain")
    frozen.load_weights(source.named_weights())
    target.load_weights(frozen.named_weights())
    for name, weight in target.named_weights():
        assert torch.equal(weight, source.masters[name].detach()), name


def test_the_base_digest_is_that_of_the_frozen_weights():
    policy, other = adapted_policy(), adapted_policy(is_moved=False)
    assert policy.base_digest == other.base_digest  # the factors do not count
    changed = adapted_policy()
    with torch.no_grad():
        changed.model.model.norm.weight[3] += 1e-9
    assert changed.base_digest != policy.base_digest


# Running layers again in the backward pass


@pytest.mark.parametrize("has_adapters", [True, False])
@every_path
def test_gradient_checkpointing_does_not_change_gradients(
    family: str, engine: str, has_adapters: bool
):
    def policy_of(gradient_checkpointing: bool) -> Policy:
        if has_adapters:
            return adapted_policy(
                family, engine=engine, gradient_checkpointing=gradient_checkpointing
            )
        return Policy(
            tiny_model(family, dtype=F64),
            engine=engine,
            gradient_checkpointing=gradient_checkpointing,
            warn=lambda _: None,
        )

    kept, again = policy_of(False), policy_of(True)
    step = off_policy(kept)
    ours, theirs = gradients(again, step), gradients(kept, step)
    assert ours.keys() == theirs.keys() == kept.trained_weights().keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-12, msg=name)


@every_path
def test_gradient_checkpointing_runs_each_layer_twice_and_only_for_a_gradient(
    family: str, engine: str, monkeypatch: pytest.MonkeyPatch
):
    policy = adapted_policy(family, engine=engine, gradient_checkpointing=True)
    calls: list[object] = []
    project = fused.project

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[1])
        return project(*arguments)

    monkeypatch.setattr(fused, "project", counted)
    if engine == "plain":  # which runs the layers' own modules
        for name, layer in policy.adapters.items():
            if name.endswith(("q_proj", "c_attn")):  # the first to run in each layer
                layer.register_forward_hook(lambda module, *_: calls.append(module))
    scores = policy.score(one_batch())
    forward = len(calls)
    assert forward == len(set(map(id, calls))) == policy.model.config.num_hidden_layers
    scores.logprobs.sum().backward()
    assert len(calls) == 2 * forward
    with torch.no_grad():
        policy.score(one_batch())
    assert len(calls) == 3 * forward


def test_layers_run_again_once_however_many_policies_there_were_and_not_without_being_asked():
    model = tiny_model("gpt2")
    first = Policy(model, engine="plain", gradient_checkpointing=True)
    second = Policy(model, engine="plain", gradient_checkpointing=True)
    first.release()  # late: the second's layers still run again
    calls: list[object] = []
    for layer in model.transformer.h:
        layer.attn.register_forward_hook(lambda module, *_: calls.append(module))

    def runs_of(policy: Policy) -> int:
        calls.clear()
        policy.score(one_batch()).logprobs.sum().backward()
        return len(calls) // len(model.transformer.h)

    assert runs_of(second) == 2
    assert runs_of(Policy(model, engine="plain")) == 1
    third = Policy(model, engine="plain", gradient_checkpointing=True)
    assert runs_of(third) == 2
    third.release()
    calls.clear()
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    assert len(calls) == len(model.transformer.h)  # the model is as it was handed over


def test_a_model_whose_layers_cannot_run_again_is_refused():
    model = tiny_model("gpt2")
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(ModelError) as caught:
        Policy(model, engine="plain", gradient_checkpointing=True)
    assert str(caught.value) == (
        "model type 'gpt2' has no layer that transformers can run again in the backward pass; set "
        "training.gradient_checkpointing = false and lower training.max_tokens_per_micro_batch "
        "instead"
    )
    # `caught` keeps the half-made policy alive, and what is advised works on the same model.
    assert Policy(model, engine="plain").masters


@pytest.mark.parametrize("has_adapters", [True, False])
@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_gradient_checkpointing_lowers_the_peak_of_a_long_completion(
    engine: str, has_adapters: bool
):
    (groups,) = random_groups([[11, 12, 13]], [[200, 200]])
    step = one_step([groups], [[1.0, -1.0]])
    peaks = []
    for gradient_checkpointing in (False, True):
        model = tiny_model("llama", layers=8)
        if has_adapters:
            add_adapters(model, rank=2, alpha=4.0)
        policy = Policy(model, engine=engine, gradient_checkpointing=gradient_checkpointing)
        with LiveMemory() as memory:
            accumulate_gradients(policy, step, settings())
        peaks.append(memory.peak_bytes)
    # Eight layers' tensors against eight layers' inputs and one layer's tensors.
    assert peaks[1] < 0.45 * peaks[0], peaks
