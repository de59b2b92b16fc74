"""The policy loss for verl gives a mini-batch one gradient, however it is cut and spread.

verl itself needs an older transformers: scripts/verl_check.py runs it in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from gmpo.adapters.verl import gmpo_policy_loss, register
from gmpo.errors import ConfigError, DataError, DependencyError
from gmpo.objective import gmpo_terms, step_diagnostics

F64 = torch.float64
EXACT = 1e-12
LENGTHS = torch.tensor([6, 2, 5, 1, 4, 3, 6, 2])
ADVANTAGES = torch.tensor([1.2, -0.7, 0.0, -1.4, 0.3, 2.0, -0.2, -1.2], dtype=F64)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The part of verl's actor config that is read, as verl fills it on one process."""

    clip_ratio_low: float = 0.4
    clip_ratio_high: float = 0.4
    global_batch_info: dict[str, Any] = field(
        default_factory=lambda: {"dp_size": 1, "global_batch_size": 8, "batch_num_tokens": 29}
    )


def batch_of(**changes: Tensor) -> dict[str, Tensor]:
    """8 rows in verl's form: advantages repeated over tokens, a mask of ones and zeros."""
    generator = torch.Generator().manual_seed(0)
    shift = 0.6 * torch.randn(8, 6, generator=generator, dtype=F64)
    old = -2 * torch.rand(8, 6, generator=generator, dtype=F64)
    return {
        "old_log_prob": old,
        "log_prob": (old + shift).requires_grad_(),
        "advantages": ADVANTAGES[:, None].expand(8, 6),
        "response_mask": (torch.arange(6) < LENGTHS[:, None]).long(),
        **changes,
    }


def summed(
    batch: dict[str, Tensor], split: Sequence[int], config: Options | None = None
) -> tuple[float, Tensor]:
    """What verl's engine accumulates over micro-batches: their losses and gradients added up."""
    parts = {name: tensor.split(list(split)) for name, tensor in batch.items()}
    losses = [
        gmpo_policy_loss(
            **{name: pieces[number] for name, pieces in parts.items()}, config=config or Options()
        )[0]
        for number in range(len(split))
    ]
    total = torch.stack(losses).sum()
    return total.item(), torch.autograd.grad(total, batch["log_prob"])[0]


def expected(batch: dict[str, Tensor], weights: Tensor | float = 1.0) -> tuple[float, Tensor]:
    """The mean of gmpo's loss over the mini-batch's rows."""
    terms = gmpo_terms(
        policy_logprobs=batch["log_prob"],
        old_logprobs=batch["old_log_prob"],
        advantages=ADVANTAGES,
        mask=batch["response_mask"].bool(),
    )
    loss = (terms.loss * weights).mean()
    return loss.item(), torch.autograd.grad(loss, batch["log_prob"])[0]


def assert_same(actual: tuple[float, Tensor], wanted: tuple[float, Tensor]) -> None:
    assert wanted[1].any()
    assert actual[0] == pytest.approx(wanted[0], rel=EXACT)
    torch.testing.assert_close(actual[1], wanted[1], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("split", [(8,), (4, 4), (2, 2, 2, 2), (5, 2, 1), (1, 7), (1,) * 8])
def test_every_cut_into_micro_batches_gives_the_mean_over_the_mini_batch(split: tuple[int, ...]):
    batch = batch_of()
    assert_same(summed(batch, split), expected(batch))


@pytest.mark.parametrize("split", [(4, 4), (5, 3)])
def test_every_spread_over_processes_gives_the_mean_over_the_mini_batch(split: tuple[int, int]):
    # Processes average gradients; each one accumulates its own rows with dp_size = 2.
    batch = batch_of()
    info = {"dp_size": 2, "global_batch_size": 8}
    value, gradient = summed(batch, split, Options(global_batch_info=info))
    assert_same((value / 2, gradient / 2), expected(batch))


def test_how_verl_aggregates_its_other_terms_does_not_change_the_loss():
    batch = batch_of()
    losses = [
        gmpo_policy_loss(**batch, loss_agg_mode=mode, config=Options())[0].item()
        for mode in ("token-mean", "seq-mean-token-sum")
    ]
    assert losses[0] == losses[1]


def test_the_clip_is_the_configs_low_and_high_in_log_space():
    batch = batch_of()
    terms = gmpo_terms(
        policy_logprobs=batch["log_prob"],
        old_logprobs=batch["old_log_prob"],
        advantages=ADVANTAGES,
        mask=batch["response_mask"].bool(),
        clip_low=0.1,
        clip_high=0.3,
    )
    value, _ = summed(batch, (8,), Options(clip_ratio_low=0.1, clip_ratio_high=0.3))
    assert value == pytest.approx(terms.loss.mean().item(), rel=EXACT)
    assert value != pytest.approx(expected(batch)[0], rel=1e-3)


@pytest.mark.parametrize("split", [(8,), (5, 2, 1)])
def test_a_row_without_tokens_gives_nothing_and_stays_in_the_denominator(split: tuple[int, ...]):
    mask = batch_of()["response_mask"].clone()
    mask[6] = 0
    value, gradient = summed(batch_of(response_mask=mask), split)
    whole, wanted = expected(batch_of())
    seventh, _ = expected(batch_of(), torch.eye(8, dtype=F64)[6])
    wanted[6] = 0.0
    assert_same((value, gradient), (whole - seventh, wanted))


def test_a_micro_batch_without_tokens_gives_zero_a_zero_gradient_and_every_figure():
    batch = batch_of(response_mask=torch.zeros(8, 6, dtype=torch.long))
    value, gradient = summed(batch, (8,))
    assert value == 0 and not gradient.any()
    _, figures = gmpo_policy_loss(**batch, config=Options())
    assert figures == {
        "actor/pg_clipfrac": 0.0,
        "actor/pg_clipfrac_lower": 0.0,
        "actor/ppo_kl": 0.0,
        "actor/ratio_min": 1.0,
        "actor/ratio_max": 1.0,
        "actor/rows_without_tokens": 8.0,
    }


def test_a_zero_advantage_gives_nothing_where_the_ratio_overflows():
    far = batch_of()["old_log_prob"].clone()
    far[2] -= 2000.0
    assert_same(summed(batch_of(old_log_prob=far), (8,)), expected(batch_of()))


def test_rollout_weights_multiply_a_rows_loss_by_their_geometric_mean():
    weights = 0.5 + torch.rand(8, 6, generator=torch.Generator().manual_seed(1), dtype=F64)
    by_hand = torch.stack(
        [
            row[:length].prod() ** (1 / length)
            for row, length in zip(weights, LENGTHS.tolist(), strict=True)
        ]
    )
    # Weights of padding are zero in verl, and must not count.
    weights = weights * batch_of()["response_mask"]
    batch = batch_of(rollout_is_weights=weights)
    assert_same(summed(batch, (5, 2, 1)), expected(batch, by_hand))


def test_a_weight_of_zero_takes_the_row_out_even_where_its_ratio_overflows():
    weights = torch.ones(8, 6, dtype=F64)
    weights[0] = 0.0
    far = batch_of()["old_log_prob"].clone()
    far[0] -= 2000.0
    kept = torch.ones(8, dtype=F64)
    kept[0] = 0.0
    batch = batch_of(rollout_is_weights=weights, old_log_prob=far)
    assert_same(summed(batch, (8,)), expected(batch_of(), kept))


def test_the_figures_are_those_of_step_diagnostics_by_verls_names():
    batch = batch_of()
    mask = batch["response_mask"].bool()
    terms = gmpo_terms(
        policy_logprobs=batch["log_prob"],
        old_logprobs=batch["old_log_prob"],
        advantages=ADVANTAGES,
        mask=mask,
    )
    own = step_diagnostics([terms], [mask])
    _, figures = gmpo_policy_loss(**batch, config=Options())
    assert figures == {
        "actor/pg_clipfrac": own["clip/high_fraction"],
        "actor/pg_clipfrac_lower": own["clip/low_fraction"],
        "actor/ppo_kl": own["kl_old/k1"],
        "actor/ratio_min": own["ratio/min"],
        "actor/ratio_max": own["ratio/max"],
        "actor/rows_without_tokens": 0.0,
    }
    assert figures["actor/pg_clipfrac"] > 0 and figures["actor/pg_clipfrac_lower"] > 0


def test_an_advantage_per_token_is_refused_with_the_rows():
    advantages = batch_of()["advantages"].clone()
    advantages[4, 1] += 1.0
    with pytest.raises(DataError, match=r"rows \[4\] of the micro-batch have different advantages"):
        gmpo_policy_loss(**batch_of(advantages=advantages), config=Options())
    # Off the mask anything may stand.
    advantages = batch_of()["advantages"].clone()
    advantages[3, 1:] = float("nan")
    assert_same(summed(batch_of(advantages=advantages), (8,)), expected(batch_of()))


def test_a_mini_batch_of_unknown_size_is_refused():
    for info in ({}, {"dp_size": 1, "global_batch_size": None}):
        with pytest.raises(ConfigError, match="without a global_batch_size: the rows of the whole"):
            gmpo_policy_loss(**batch_of(), config=Options(global_batch_info=info))
    with pytest.raises(ConfigError, match="loss_mode='gmpo' needs verl's actor config, got config"):
        gmpo_policy_loss(**batch_of())


@pytest.mark.skipif(find_spec("verl") is not None, reason="verl is installed here")
def test_registering_without_verl_says_what_to_install():
    with pytest.raises(DependencyError, match=r"needs verl to register .*pip install verl"):
        register()
