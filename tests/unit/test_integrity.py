"""Weights that something other than the trainer has changed are told by name."""

from __future__ import annotations

import math

import pytest
import torch
from tests.models import tiny_model

from gmpo.policy.integrity import WeightsWatch
from gmpo.policy.lora import add_adapters
from gmpo.policy.score import Policy


def watched(dtype: torch.dtype = torch.float32) -> tuple[Policy, WeightsWatch]:
    policy = Policy(tiny_model("llama", dtype=dtype), engine="plain")
    return policy, WeightsWatch(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_any_tensor_is_told_until_it_is_noted(dtype: torch.dtype):
    policy, watch = watched(dtype)
    watch.note()
    assert watch.disturbed() == ()
    for name, weight in policy.trained_weights().items():
        place = (0,) * weight.ndim
        weight[place] += 0.1
        assert watch.disturbed() == (name,)
        watch.note()
        assert watch.disturbed() == ()


def test_before_the_first_note_nothing_is_disturbed():
    policy, watch = watched()
    next(iter(policy.trained_weights().values())).zero_()
    assert watch.disturbed() == ()


def test_weights_that_become_nan_are_disturbed_and_those_that_stay_nan_are_not():
    policy, watch = watched()
    watch.note()
    name, weight = next(iter(policy.trained_weights().items()))
    weight.fill_(math.nan)
    assert watch.disturbed() == (name,)
    watch.note()
    assert watch.disturbed() == ()


def test_of_an_adapted_model_the_adapters_are_watched():
    model = tiny_model("llama")
    add_adapters(model, rank=2, alpha=4.0)
    policy = Policy(model, engine="plain")
    watch = WeightsWatch(policy)
    watch.note()
    names = set(policy.trained_weights())
    with torch.no_grad():
        for weight in policy.masters.values():
            weight += 1.0
    assert names and set(watch.disturbed()) == names
