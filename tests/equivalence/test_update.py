"""The update must agree: cut or whole, dead rows run or not, and with torch's own AdamW."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models import tiny_model
from tests.objective_inputs import every_objective
from tests.rollout_groups import one_step, random_groups
from torch import Tensor

from gmpo.batch import StepBatch
from gmpo.errors import NonFiniteError
from gmpo.objective import OBJECTIVES, gmpo_loss
from gmpo.policy.score import Policy
from gmpo.records import Group
from gmpo.update import (
    LossSettings,
    PolicyOptimizer,
    accumulate_gradients,
    bind_objective,
    gradient_cosine,
    with_old_logprobs,
    with_reference_logprobs,
)

F64 = torch.float64
EXACT = 1e-12
PROMPTS = [[11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 15, 20, 21], [30, 31, 32], [40]]
LENGTHS = [[5, 1, 3], [2, 7, 4], [6, 6, 1], [3, 2, 2]]
ADVANTAGES = [[1.0, -1.2, 0.3], [0.7, -0.4, -0.3], [0.0, 0.0, 0.0], [1.5, 0.0, -1.5]]


def ignore(_: str) -> None:
    """Warnings are tested where they belong."""


def policy_of(
    family: str = "llama", *, dtype: torch.dtype = F64, seed: int = 0, engine: str = "fast"
) -> Policy:
    return Policy(tiny_model(family, dtype=dtype, seed=seed), engine=engine, warn=ignore)


@functools.cache
def shared_policy(family: str = "llama") -> Policy:
    """Shared by tests that only read its scores and gradients."""
    return policy_of(family)


def groups() -> list[Group]:
    return random_groups(PROMPTS, LENGTHS)


def settings_of(name: str = "gmpo", **changes: Any) -> LossSettings:
    return LossSettings(objective=bind_objective(name, clips={}, max_tokens=16), **changes)


def off_policy(policy: Policy, step: StepBatch) -> StepBatch:
    """Old log-probabilities around the policy's own, in and out of the clips, by row and place."""
    (scored,), _ = with_old_logprobs(policy, [step], temperature=1.0)
    moved = []
    for batch in scored.micro_batches:
        rows = torch.tensor([sum(name.encode()) % 13 for name in batch.row_names])
        shift = 0.6 * torch.sin(1.0 + rows[:, None] + torch.arange(batch.mask.shape[1])[None])
        moved.append(
            replace(batch, old_logprobs=batch.old_logprobs + shift.to(batch.old_logprobs.dtype))
        )
    return replace(scored, micro_batches=tuple(moved))


def taken_gradients(policy: Policy) -> dict[str, Tensor]:
    """The accumulated gradients, which are forgotten."""
    gradients = {}
    for name, weight in policy.masters.items():
        gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        weight.grad = None
    return gradients


def gradients_of(policy: Policy, step: StepBatch, settings: LossSettings) -> dict[str, Tensor]:
    accumulate_gradients(policy, step, settings)
    return taken_gradients(policy)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding, relative to each weight's largest gradient."""
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, f"{name} has no gradient: the comparison would prove nothing"
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=EXACT * max(scale, 1e-3))


@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [*((name, 45) for name in sorted(OBJECTIVES)), ("gmpo", 1), ("gmpo", 24), ("gmpo", 70)],
)
def test_the_cut_into_micro_batches_does_not_change_the_gradient(name: str, max_tokens: int):
    policy, settings = shared_policy(), settings_of(name)
    whole = off_policy(policy, one_step(groups(), ADVANTAGES))
    cut = off_policy(policy, one_step(groups(), ADVANTAGES, max_tokens=max_tokens))
    assert len(whole.micro_batches) == 1 < len(cut.micro_batches)
    assert_same_gradients(
        gradients_of(policy, cut, settings), gradients_of(policy, whole, settings)
    )
    losses = [accumulate_gradients(policy, step, settings).loss for step in (whole, cut)]
    taken_gradients(policy)
    assert losses[0] == pytest.approx(losses[1], rel=EXACT)


@every_objective
@pytest.mark.parametrize("max_tokens", [30, 10_000])
def test_leaving_dead_rows_out_does_not_change_the_gradient(name: str, max_tokens: int):
    policy, settings = shared_policy(), settings_of(name)
    kept = off_policy(policy, one_step(groups(), ADVANTAGES, max_tokens=max_tokens))
    left_out = off_policy(
        policy, one_step(groups(), ADVANTAGES, max_tokens=max_tokens, skips_dead_rows=True)
    )
    assert (left_out.num_rollouts, left_out.num_skipped_rows) == (12, 4)
    assert_same_gradients(
        gradients_of(policy, left_out, settings), gradients_of(policy, kept, settings)
    )


def test_the_order_of_groups_and_rollouts_does_not_change_the_gradient():
    policy, settings = shared_policy(), settings_of(entropy_coefficient=0.1)
    backwards = [replace(each, rollouts=each.rollouts[::-1]) for each in reversed(groups())]
    one = off_policy(policy, one_step(groups(), ADVANTAGES, max_tokens=45))
    other = off_policy(
        policy, one_step(backwards, [row[::-1] for row in ADVANTAGES[::-1]], max_tokens=45)
    )
    assert_same_gradients(
        gradients_of(policy, other, settings), gradients_of(policy, one, settings)
    )


def obvious_loss(
    policy: Policy,
    step: StepBatch,
    reference: Policy,
    *,
    kl_coefficient: float,
    entropy_coefficient: float,
    temperature: float,
) -> tuple[Tensor, float, float]:
    """Row by row through the model's own forward: mean loss, mean KL and mean entropy."""
    total, total_kl, total_entropy = torch.zeros((), dtype=F64), 0.0, 0.0
    for batch in step.micro_batches:
        for row, prompt in enumerate(batch.prompt_of_row.tolist()):
            start = int(batch.prompt_lengths[prompt])
            drawn = batch.completion_ids[row, : int(batch.completion_lengths[row])]
            token_ids = torch.cat((batch.prompt_ids[prompt, :start], drawn))[None]

            def scored(model: Any, ids: Tensor = token_ids, first: int = start) -> Tensor:
                logits: Tensor = model(ids).logits[0, first - 1 : -1]
                return (logits / temperature).log_softmax(dim=-1)

            everything = scored(policy.model)
            own = everything.gather(-1, drawn[:, None])[:, 0]
            with torch.no_grad():
                theirs = scored(reference.model).gather(-1, drawn[:, None])[:, 0]
            gap = theirs - own
            kl = (gap.exp() - 1 - gap).mean()
            entropy = -(everything.exp() * everything).sum(dim=-1).mean()
            loss = gmpo_loss(
                policy_logprobs=own[None],
                old_logprobs=batch.old_logprobs[row : row + 1, : len(drawn)],
                advantages=batch.advantages[row : row + 1],
                mask=torch.ones(1, len(drawn), dtype=torch.bool),
            )[0]
            total = total + loss + kl_coefficient * kl - entropy_coefficient * entropy
            total_kl += kl.item()
            total_entropy += entropy.item()
    count = step.num_rollouts
    return total / count, total_kl / count, total_entropy / count


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_kl_and_entropy_terms_are_those_of_the_obvious_loss(temperature: float):
    # gpt2 has no fp32 norms inside, so the reference through its own forward is exact.
    policy, reference = shared_policy("gpt2"), policy_of("gpt2", seed=0)
    with torch.no_grad():
        for weight in reference.model.parameters():
            weight.mul_(0.97)
    step = off_policy(policy, one_step(groups(), ADVANTAGES, max_tokens=45))
    (step,) = with_reference_logprobs(reference, [step], temperature=temperature)
    coefficients = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2}
    settings = settings_of(temperature=temperature, **coefficients)
    measures = accumulate_gradients(policy, step, settings)
    actual = taken_gradients(policy)
    loss, kl, entropy = obvious_loss(
        policy, step, reference, temperature=temperature, **coefficients
    )
    loss.backward()
    assert_same_gradients(actual, taken_gradients(policy))
    assert measures.loss == pytest.approx(loss.item(), rel=1e-10)
    assert measures.kl_ref_k3 == pytest.approx(kl, rel=1e-10)
    assert measures.entropy == pytest.approx(entropy, rel=1e-10)


def test_without_the_terms_neither_kl_nor_entropy_is_measured():
    measures = accumulate_gradients(policy_of(), one_step(groups(), ADVANTAGES), settings_of())
    assert (measures.kl_ref_k3, measures.entropy) == (None, None)


def test_a_reference_equal_to_the_policy_has_no_kl_and_no_kl_gradient():
    policy = shared_policy()
    step = off_policy(policy, one_step(groups(), ADVANTAGES))
    (with_kl,) = with_reference_logprobs(policy_of(), [step], temperature=1.0)
    settings = settings_of(kl_coefficient=5.0)
    expected = gradients_of(policy, step, settings)
    measures = accumulate_gradients(policy, with_kl, settings)
    assert measures.kl_ref_k3 == pytest.approx(0.0, abs=1e-15)
    assert_same_gradients(taken_gradients(policy), expected)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "engine"), [("llama", "fast"), ("qwen3", "plain"), ("gpt2", "plain")]
)
@pytest.mark.parametrize("max_tokens", [45, 10_000])
def test_with_own_old_logprobs_the_first_ratio_is_bitwise_one(
    family: str, engine: str, dtype: torch.dtype, max_tokens: int
):
    policy = policy_of(family, dtype=dtype, engine=engine)
    step = one_step(groups(), ADVANTAGES, max_tokens=max_tokens)
    (step,), _ = with_old_logprobs(policy, [step], temperature=0.9)
    assert not any(batch.old_logprobs.requires_grad for batch in step.micro_batches)
    measures = accumulate_gradients(policy, step, settings_of(temperature=0.9))
    for terms in measures.terms:
        assert not terms.log_ratio.any()
        assert bool((terms.sequence_ratio == 1).all())


def test_the_mismatch_is_the_mean_and_largest_gap_over_counted_tokens():
    policy = shared_policy()
    step = one_step(groups(), ADVANTAGES, max_tokens=45)
    (own,), mismatch = with_old_logprobs(policy, [step], temperature=1.0)
    gaps: list[float] = []
    for batch, scored in zip(step.micro_batches, own.micro_batches, strict=True):
        for row, count in enumerate(batch.completion_lengths.tolist()):
            difference = scored.old_logprobs[row, :count] - batch.sampler_logprobs[row, :count]
            gaps += difference.abs().tolist()
    assert mismatch is not None
    assert mismatch.num_tokens == len(gaps) == sum(map(sum, LENGTHS))
    assert mismatch.mean == pytest.approx(sum(gaps) / len(gaps), rel=1e-12)
    assert mismatch.max == max(gaps)
    assert not mismatch.is_small
    measures = accumulate_gradients(policy, step, settings_of())
    taken_gradients(policy)
    assert measures.mismatch == mismatch


@pytest.mark.parametrize(
    ("shift", "is_small"), [(0.0, True), (0.004, True), (0.006, False), (0.2, False)]
)
def test_a_mismatch_is_small_up_to_its_bounds(shift: float, is_small: bool):
    policy = shared_policy()
    (own,), _ = with_old_logprobs(policy, [one_step(groups(), ADVANTAGES)], temperature=1.0)
    (batch,) = own.micro_batches
    moved = replace(batch, sampler_logprobs=batch.old_logprobs - shift)
    _, mismatch = with_old_logprobs(policy, [replace(own, micro_batches=(moved,))], temperature=1.0)
    assert mismatch is not None and mismatch.is_small == is_small


def test_a_step_without_live_rows_has_no_mismatch_and_zero_loss():
    policy = shared_policy()
    step = one_step(groups(), [[0.0] * 3] * 4, skips_dead_rows=True)
    assert with_old_logprobs(policy, [step], temperature=1.0) == ([step], None)
    measures = accumulate_gradients(policy, step, settings_of())
    assert (measures.loss, measures.terms, measures.mismatch) == (0.0, (), None)


def test_step_measures_describe_every_row_and_carry_no_graph():
    policy = shared_policy()
    step = off_policy(policy, one_step(groups(), ADVANTAGES, max_tokens=45))
    measures = accumulate_gradients(policy, step, settings_of())
    taken_gradients(policy)
    assert sorted(measures.row_names) == sorted(f"p{p}#{i}" for p in range(4) for i in range(3))
    total = sum(float(terms.loss.sum()) for terms in measures.terms)
    assert measures.loss == pytest.approx(total / 12, rel=1e-12)
    for terms, mask, batch in zip(measures.terms, measures.masks, step.micro_batches, strict=True):
        assert torch.equal(mask, batch.mask)
        expected = -batch.advantages * terms.sequence_ratio
        torch.testing.assert_close(terms.loss, expected)
        assert not any(t.requires_grad for t in (terms.loss, terms.log_ratio, terms.sequence_ratio))


def test_the_objective_gets_its_clips_and_dr_grpo_its_length():
    mask = torch.ones(1, 2, dtype=torch.bool)
    fields = {
        "policy_logprobs": torch.tensor([[0.5, 0.5]], dtype=F64),
        "old_logprobs": torch.zeros(1, 2, dtype=F64),
        "advantages": torch.tensor([1.0], dtype=F64),
        "mask": mask,
    }
    narrow = bind_objective("gmpo", clips={"clip_low": 0.1, "clip_high": 0.1}, max_tokens=4)
    assert narrow(**fields).loss.item() == pytest.approx(-math.exp(0.1))
    # Both ratios are clipped at 1.2; their sum is divided by the limit of 4 tokens.
    dr_grpo = bind_objective("dr_grpo", clips={}, max_tokens=4)
    assert dr_grpo(**fields).loss.item() == pytest.approx(-2 * 1.2 / 4)


def broken(policy: Policy, change: Callable[[Any], Any]) -> StepBatch:
    step = off_policy(policy, one_step(groups(), ADVANTAGES, max_tokens=45))
    return replace(step, micro_batches=tuple(change(batch) for batch in step.micro_batches))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_with_the_rows_name_before_any_gradient_of_it(value: float):
    policy = policy_of()

    def change(batch: Any) -> Any:
        advantages = batch.advantages.clone()
        for row, name in enumerate(batch.row_names):
            if name == "p1#2":
                advantages[row] = value
        return replace(batch, advantages=advantages)

    with pytest.raises(NonFiniteError, match=r"loss is not finite for rollouts \['p1#2'\] \(1 in"):
        accumulate_gradients(policy, broken(policy, change), settings_of())
    for gradient in taken_gradients(policy).values():
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("score", [accumulate_gradients, with_old_logprobs])
def test_a_non_finite_logprob_stops_with_the_rows_name(score: Callable[..., Any]):
    policy = policy_of("gpt2")
    step = one_step(groups(), ADVANTAGES, max_tokens=45)
    with torch.no_grad():
        # A token that only one completion holds gets a NaN embedding; the head is tied to it, so
        # logits are untied first.
        policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.clone())
        unique = next(
            token
            for token in groups()[2].rollouts[1].token_ids.tolist()[:-1]
            if sum(token in r.token_ids for g in groups() for r in g.rollouts) == 1
        )
        policy.model.transformer.wte.weight[unique] = math.nan
    with pytest.raises(NonFiniteError, match=r"log-probability .* \['p2#1'\] \(1 in all"):
        if score is accumulate_gradients:
            accumulate_gradients(policy, step, settings_of())
        else:
            with_old_logprobs(policy, [step], temperature=1.0)


# --- the optimizer ---


def three_steps(policy: Policy) -> list[StepBatch]:
    return [
        one_step(random_groups(PROMPTS, LENGTHS, seed=seed), ADVANTAGES, max_tokens=45)
        for seed in range(3)
    ]


def test_the_optimizer_is_torchs_adamw_with_clipping_on_the_same_gradients():
    policy, plain = policy_of(), tiny_model(dtype=F64)
    optimizer = PolicyOptimizer(policy, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    expected = torch.optim.AdamW(
        plain.parameters(), lr=1e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, foreach=False
    )
    for number, step in enumerate(three_steps(policy)):
        accumulate_gradients(policy, step, settings_of())
        squares = 0.0
        for (name, master), weight in zip(policy.masters.items(), plain.parameters(), strict=True):
            assert master.grad is not None, name
            weight.grad = master.grad.clone()
            squares += float(weight.grad.square().sum())
        norm, clip_norm = math.sqrt(squares), [1e9, 0.01, 0.5][number]
        for weight in plain.parameters():
            assert weight.grad is not None
            weight.grad *= min(1.0, clip_norm / (norm + 1e-6))  # torch's clip_grad_norm_
        for setting in expected.param_groups:
            setting["lr"] = 1e-3 / (number + 1)
        expected.step()
        reported = optimizer.apply_step(learning_rate=1e-3 / (number + 1), clip_norm=clip_norm)
        assert reported == pytest.approx(norm, rel=1e-12)
        for (name, master), weight in zip(policy.masters.items(), plain.parameters(), strict=True):
            torch.testing.assert_close(master, weight, rtol=0, atol=1e-14, msg=name)
            assert master.grad is None


def test_a_step_without_live_rows_still_steps_by_its_momentum():
    policy = policy_of()
    optimizer = PolicyOptimizer(policy)
    settings = settings_of()
    dead = one_step(groups(), [[0.0] * 3] * 4, skips_dead_rows=True)
    accumulate_gradients(policy, dead, settings)
    untouched = {name: weight.clone() for name, weight in policy.named_weights()}
    assert optimizer.apply_step(learning_rate=1e-3, clip_norm=1.0) == 0.0
    for name, weight in policy.named_weights():  # no momentum yet
        assert torch.equal(weight, untouched[name])
    accumulate_gradients(policy, one_step(groups(), ADVANTAGES), settings)
    optimizer.apply_step(learning_rate=1e-3, clip_norm=1.0)
    moved = {name: weight.clone() for name, weight in policy.named_weights()}
    accumulate_gradients(policy, dead, settings)
    optimizer.apply_step(learning_rate=1e-3, clip_norm=1.0)
    for name, weight in policy.named_weights():
        assert not torch.equal(weight, moved[name]), name


def test_a_non_finite_gradient_stops_before_the_weights_move():
    policy = policy_of()
    optimizer = PolicyOptimizer(policy)
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    weight = next(iter(policy.masters.values()))
    weight.grad = torch.full_like(weight, math.inf)
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan); the weights were not"):
        optimizer.apply_step(learning_rate=1.0, clip_norm=1.0)
    for name, weight in policy.named_weights():
        assert torch.equal(weight, before[name])


# --- bf16 with fp32 masters ---


def test_bf16_micro_batches_add_up_in_fp32_masters():
    policy, settings = policy_of(dtype=torch.bfloat16), settings_of()
    step = one_step(groups(), ADVANTAGES, max_tokens=1)
    assert len(step.micro_batches) == 12
    together = gradients_of(policy, step, settings)
    total = {name: torch.zeros_like(weight) for name, weight in policy.masters.items()}
    for batch in step.micro_batches:
        one = gradients_of(policy, replace(step, micro_batches=(batch,)), settings)
        for name, gradient in one.items():
            assert gradient.dtype == torch.float32
            # One micro-batch's gradient is a bf16 number; their sum need not be.
            assert torch.equal(gradient, gradient.bfloat16().float())
            total[name] += gradient
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(g, g.bfloat16().float()) for g in together.values())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_bf16_weights_are_the_rounded_masters_which_keep_small_moves():
    policy = policy_of(dtype=torch.bfloat16)
    optimizer = PolicyOptimizer(policy)
    start = {name: weight.clone() for name, weight in policy.named_weights()}
    for step in three_steps(policy):
        accumulate_gradients(policy, step, settings_of())
        optimizer.apply_step(learning_rate=1e-6, clip_norm=1.0)
    compute = dict(policy.model.named_parameters())
    for name, master in policy.named_weights():
        assert master.dtype == torch.float32
        assert not torch.equal(master, start[name]), f"{name}: moves of 1e-6 were lost"
        assert torch.equal(compute[name], master.bfloat16())
    assert any(torch.equal(compute[name], start[name].bfloat16()) for name in compute)


# --- two losses on one step ---


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_on_policy_gmpo_and_grpo_point_the_same_way():
    policy = policy_of()
    (step,), _ = with_old_logprobs(
        policy, [one_step(groups(), ADVANTAGES, max_tokens=45)], temperature=1.0
    )
    gmpo, grpo = settings_of("gmpo"), settings_of("grpo")
    cosine = gradient_cosine(policy, step, settings=gmpo, other=grpo)
    assert cosine == pytest.approx(1.0, abs=1e-12)
    assert_same_gradients(gradients_of(policy, step, gmpo), gradients_of(policy, step, grpo))


def test_off_policy_the_cosine_is_that_of_the_two_gradients_and_none_is_left():
    policy = policy_of()
    optimizer = PolicyOptimizer(policy)
    step = off_policy(policy, one_step(groups(), ADVANTAGES, max_tokens=45))
    gmpo, grpo = settings_of("gmpo"), settings_of("grpo")
    one, other = flat(gradients_of(policy, step, gmpo)), flat(gradients_of(policy, step, grpo))
    expected = float(one @ other / (one.norm() * other.norm()))
    assert expected < 0.999
    optimizer.zero_gradients()
    assert gradient_cosine(policy, step, settings=gmpo, other=grpo) == pytest.approx(expected)
    assert all(weight.grad is None for weight in policy.masters.values())
    # and the order of the two does not matter
    assert gradient_cosine(policy, step, settings=grpo, other=gmpo) == pytest.approx(expected)


def test_the_cosine_of_a_step_without_gradient_is_not_a_number():
    policy = policy_of()
    dead = one_step(groups(), [[0.0] * 3] * 4, skips_dead_rows=True)
    cosine = gradient_cosine(policy, dead, settings=settings_of(), other=settings_of("grpo"))
    assert math.isnan(cosine)
