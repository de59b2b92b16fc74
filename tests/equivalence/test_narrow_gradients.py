"""Steps from gradients that stay in bf16, against steps from the same ones widened to fp32."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from tests.models import tiny_model
from tests.rollout_groups import one_step, random_groups
from torch import Tensor

from gmpo.batch import StepBatch
from gmpo.errors import NonFiniteError
from gmpo.kernels.library import loaded
from gmpo.policy.score import Policy
from gmpo.records import Group
from gmpo.update import LossSettings, PolicyOptimizer, accumulate_gradients, bind_objective

pytestmark = pytest.mark.skipif(loaded() is None, reason="no compiled functions here")
PROMPTS = [[11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 15, 20, 21], [30, 31, 32], [40]]
LENGTHS = [[5, 1, 3], [2, 7, 4], [6, 6, 1], [3, 2, 2]]
ADVANTAGES = [[1.0, -1.2, 0.3], [0.7, -0.4, -0.3], [0.0, 0.0, 0.0], [1.5, 0.0, -1.5]]
SETTINGS = LossSettings(objective=bind_objective("gmpo", clips={}, max_tokens=16))


def policy_of() -> Policy:
    return Policy(tiny_model(dtype=torch.bfloat16), warn=lambda _: None)


def groups(seed: int = 0) -> list[Group]:
    return random_groups(PROMPTS, LENGTHS, seed=seed)


def gradients_of(policy: Policy, step: StepBatch) -> dict[str, Tensor]:
    accumulate_gradients(policy, step, SETTINGS)
    taken = {}
    for name, master in policy.masters.items():
        assert master.grad is not None, name
        taken[name] = master.grad.clone()
    policy.forget_gradients()
    return taken


def stepped(policy: Policy, *, may_stay_narrow: bool) -> tuple[list[float], PolicyOptimizer]:
    """Three steps of one micro-batch each, clipped in the second, and a dead one; their norms."""
    optimizer = PolicyOptimizer(policy, weight_decay=0.1)
    dead = one_step(groups(), [[0.0] * 3] * 4, skips_dead_rows=True)
    whole = [one_step(groups(seed), ADVANTAGES) for seed in range(3)]
    norms = []
    for number, step in enumerate((*whole, dead)):
        accumulate_gradients(policy, step, SETTINGS, may_stay_narrow=may_stay_narrow)
        clip_norm = 0.01 if number == 1 else 1e9
        norms.append(optimizer.apply_step(learning_rate=1e-3, clip_norm=clip_norm))
        assert all(weight.grad is None for weight in policy.masters.values())
        assert all(weight.grad is None for weight in policy.model.parameters())
    return norms, optimizer


def test_steps_from_narrow_gradients_are_those_from_wide_ones():
    left, widened = policy_of(), policy_of()
    assert left.takes_narrow_gradients
    norms, narrow = stepped(left, may_stay_narrow=True)
    expected, wide = stepped(widened, may_stay_narrow=False)
    # After the first step weights differ by rounding, and bf16 gradients with them.
    assert norms[0] == pytest.approx(expected[0], rel=1e-6)
    assert norms == pytest.approx(expected, rel=2e-2)
    assert norms[3] == 0.0
    for name, master in left.masters.items():
        torch.testing.assert_close(master, widened.masters[name], rtol=1e-3, atol=1e-3, msg=name)
        assert torch.equal(dict(left.model.named_parameters())[name], master.bfloat16())
    theirs = {k: set(v) for k, v in wide.adamw.state_dict()["state"].items()}
    assert {k: set(v) for k, v in narrow.adamw.state_dict()["state"].items()} == theirs
    assert all(float(state["step"]) == 4 for state in narrow.adamw.state.values())


def test_one_step_from_narrow_gradients_moves_every_weight_as_a_wide_one_does():
    moved = []
    for may_stay_narrow in (True, False):
        policy = policy_of()
        optimizer = PolicyOptimizer(policy, weight_decay=0.1)
        accumulate_gradients(
            policy, one_step(groups(), ADVANTAGES), SETTINGS, may_stay_narrow=may_stay_narrow
        )
        held = [weight.grad is not None for weight in policy.masters.values()]
        assert not any(held) if may_stay_narrow else all(held)
        optimizer.apply_step(learning_rate=1e-3, clip_norm=0.01)
        moved.append([weight.detach() for weight in policy.masters.values()])
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_several_micro_batches_add_up_in_fp32_also_where_one_could_stay_narrow():
    policy = policy_of()
    step = one_step(groups(), ADVANTAGES, max_tokens=1)
    expected = gradients_of(policy, step)
    accumulate_gradients(policy, step, SETTINGS, may_stay_narrow=True)
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    for name, master in policy.masters.items():
        assert master.grad is not None and torch.equal(master.grad, expected[name]), name
    policy.forget_gradients()
    # Calls add up too: what the first one left is widened before the second one's backward pass.
    single = one_step(groups(), ADVANTAGES)
    once = gradients_of(policy, single)
    for _ in range(2):
        accumulate_gradients(policy, single, SETTINGS, may_stay_narrow=True)
    policy.widen_gradients()
    for name, master in policy.masters.items():
        assert master.grad is not None
        torch.testing.assert_close(master.grad, 2 * once[name], rtol=1e-6, atol=0, msg=name)


def test_a_non_finite_narrow_gradient_stops_before_the_weights_move():
    policy = policy_of()
    optimizer = PolicyOptimizer(policy)
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    accumulate_gradients(policy, one_step(groups(), ADVANTAGES), SETTINGS, may_stay_narrow=True)
    first = next(iter(policy.model.parameters()))
    assert first.grad is not None
    first.grad.view(-1)[0] = math.inf
    with pytest.raises(NonFiniteError, match="gradient norm is inf; the weights were not"):
        optimizer.apply_step(learning_rate=1.0, clip_norm=1.0)
    for name, weight in policy.named_weights():
        assert torch.equal(weight, before[name])


def test_a_policy_of_a_model_whose_first_policy_was_not_released_has_all_gradients():
    model = tiny_model(dtype=torch.bfloat16)
    step = one_step(groups(), ADVANTAGES)
    first = Policy(model, warn=lambda _: None)
    expected = gradients_of(first, step)
    second = Policy(model, warn=lambda _: None)
    found = gradients_of(second, step)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    first.release()  # late, as by a garbage collector: the second keeps what it has
    assert gradients_of(second, step).keys() == expected.keys()
    assert all(weight.grad is None for weight in first.masters.values())


def test_room_for_widened_gradients_stays_until_it_is_given_back():
    policy = policy_of()
    step = one_step(groups(), ADVANTAGES)
    accumulate_gradients(policy, step, SETTINGS)
    first = next(iter(policy.masters.values()))
    assert first.grad is not None
    room = weakref.ref(first.grad)
    policy.forget_gradients()
    assert first.grad is None and room() is not None
    policy.forget_gradients(keeps_room=False)
    assert room() is None
    expected = gradients_of(policy, step)
    accumulate_gradients(policy, step, SETTINGS)
    assert first.grad is not None and torch.equal(first.grad, next(iter(expected.values())))
