"""The exact geometric mean of policies: what it is, and when averaged weights are it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.federated_updates import update_of
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo.errors import DataError
from gmpo.federated.pool import log_linear_pool, measure_gap
from gmpo.federated.updates import ClientUpdate
from gmpo.model_files import model_tensors, weights_version
from gmpo.records import Message, Prompt


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, dim=-1)


def test_the_pool_by_hand():
    # sqrt(0.9 x 0.4) : sqrt(0.1 x 0.6) = 0.6 : 0.2449, which is 0.7101 : 0.2899
    given_ = torch.log(torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]], dtype=torch.float64))
    found = log_linear_pool(given_, torch.tensor([0.5, 0.5], dtype=torch.float64)).exp()
    assert found[0].tolist() == pytest.approx([0.7101, 0.2899], abs=1e-4)


def test_a_client_without_probability_vetoes_and_one_without_weight_has_no_say():
    given_ = torch.log(torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]], dtype=torch.float64))
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert log_linear_pool(given_, shares).exp()[0].tolist() == [1.0, 0.0]
    shares = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert log_linear_pool(given_, shares).exp()[0].tolist() == [0.5, 0.5]


@given(st.integers(0, 10_000))
def test_where_logits_are_linear_averaged_weights_are_the_pool(seed: int):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    averaged = log_softmax(features @ torch.einsum("kfv,k->fv", weights, shares))
    pool = log_linear_pool(log_softmax(features @ weights), shares)
    assert torch.allclose(averaged, pool, rtol=0, atol=1e-12)


@given(st.integers(0, 10_000))
def test_no_other_policy_has_a_smaller_sum_of_divergences(seed: int):
    generator = torch.Generator().manual_seed(seed)
    policies = log_softmax(torch.randn(3, 1, 6, generator=generator, dtype=torch.float64))
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def divergence(policy: torch.Tensor) -> float:
        each = (policy.exp() * (policy - policies)).sum(dim=-1)[:, 0]
        return float(each @ shares)

    pool = log_linear_pool(policies, shares)
    noise = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    assert divergence(pool) < divergence(log_softmax(pool + 0.1 * noise))


def prompts(answer: str | None = "12") -> list[Prompt]:
    return [
        Prompt(
            id=f"p{n}",
            messages=(Message(role="user", content=f"{n}+{n}="),),
            columns={"answer": answer},
        )
        for n in range(4)
    ]


def random_updates(folder: Path, base: Path, *, scale: float) -> list[ClientUpdate]:
    generator = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in model_tensors(base).items()}
    return [
        update_of(
            folder,
            name,
            {key: scale * generator.normal(size=shape) for key, shape in shapes.items()},
            base=weights_version(base),
        )
        for name in ("north", "south")
    ]


def test_the_gap_vanishes_with_the_step_faster_than_the_spread(tmp_path: Path):
    base = Path(save_tiny(tmp_path / "model"))
    shares = np.array([0.5, 0.5])
    found = []
    for scale in (3e-2, 3e-3):
        found.append(
            measure_gap(
                tiny_recipe(str(base)),
                base=base,
                updates=random_updates(tmp_path, base, scale=scale),
                weights=shares,
                step_size=1.0,
                items=prompts(),
            )
        )
    large, small = found
    assert large.positions == 8
    # Logits are linear in the weights to first order: the spread goes with the square of the step,
    # the gap with its fourth power.
    assert large.spread / small.spread == pytest.approx(100, rel=0.3)
    assert large.gap / small.gap > 1000
    assert small.gap < 1e-2 * small.spread


def test_one_client_alone_has_no_gap_and_a_doubled_step_has(tmp_path: Path):
    base = Path(save_tiny(tmp_path / "model"))
    updates = random_updates(tmp_path, base, scale=1e-2)

    def gap(step_size: float) -> float:
        return measure_gap(
            tiny_recipe(str(base)),
            base=base,
            updates=updates,
            weights=np.array([1.0, 0.0]),
            step_size=step_size,
            items=prompts(),
        ).gap

    assert gap(1.0) == pytest.approx(0.0, abs=1e-9)
    assert gap(2.0) > 1e-4


def test_an_item_without_an_answer_is_refused(tmp_path: Path):
    base = Path(save_tiny(tmp_path / "model"))
    with pytest.raises(DataError, match="'p0' has no answer"):
        measure_gap(
            tiny_recipe(str(base)),
            base=base,
            updates=random_updates(tmp_path, base, scale=1e-3),
            weights=np.array([0.5, 0.5]),
            step_size=1.0,
            items=prompts(None),
        )
