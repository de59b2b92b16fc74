"""One local step of plain descent, averaged by sequences, is the centralised GMPO step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.equivalence.test_update import (
    ADVANTAGES,
    gradients_of,
    groups,
    off_policy,
    policy_of,
    settings_of,
)
from tests.federated_updates import update_of
from tests.models import save_tiny
from tests.objective_inputs import every_objective
from tests.rollout_groups import one_step

from gmpo.federated import AggregationSettings, aggregate, write_aggregate
from gmpo.model_files import weights_version

_STEP = 0.5
_CLIENTS = {"north": slice(0, 1), "south": slice(1, 4)}
"""Groups stay whole: an advantage is relative to its group."""


@every_objective
def test_the_federated_step_is_the_centralised_one(name: str, tmp_path: Path):
    policy, settings = policy_of(), settings_of(name)
    base = Path(save_tiny(tmp_path / "base"))
    everything = groups()

    def gradients(part: slice) -> dict[str, torch.Tensor]:
        step = off_policy(policy, one_step(everything[part], ADVANTAGES[part]))
        return gradients_of(policy, step, settings)

    central = gradients(slice(0, 4))
    updates = [
        update_of(
            tmp_path,
            client,
            {key: (-_STEP * value).numpy() for key, value in gradients(part).items()},
            sequences=sum(len(group.rollouts) for group in everything[part]),
            base=weights_version(base),
        )
        for client, part in _CLIENTS.items()
    ]
    # Their directions differ, and that is no reason to leave one out here.
    made = aggregate(updates, AggregationSettings(least_cosine=-1.0, largest_norm=1e6))
    assert made.weights == pytest.approx([3 / 12, 9 / 12])
    write_aggregate(tmp_path / "next", base=base, updates=updates, aggregation=made, origin={})
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base, tmp_path / "next")
    )
    for key, gradient in central.items():
        moved = before[key].double() - _STEP * gradient
        torch.testing.assert_close(after[key].double(), moved, rtol=3e-7, atol=1e-7)
    most = max(float((_STEP * gradient).abs().max()) for gradient in central.values())
    assert most > 1e-4, "nothing moved: the comparison would prove nothing"
