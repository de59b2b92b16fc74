"""Rewards: components, their combination, missing ones, errors, truncation, counters."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.errors import ConfigError, DataError
from gmpo.grading import Grader
from gmpo.records import Group, Message, Prompt, Rollout
from gmpo.rewards import (
    RewardFunctions,
    RewardRule,
    correct_reward,
    floored_geometric_mean,
    format_reward,
    score_groups,
    weighted_sum,
)

unit = st.floats(0, 1)


def rollout(text, index=0, *, prompt_id="p", finish_reason="stop", error=None):
    return Rollout(
        prompt_id=prompt_id,
        index=index,
        token_ids=np.array([1]),
        from_policy=np.array([True]),
        sampler_logprobs=np.array([-1.0]),
        text=text,
        finish_reason=finish_reason,
        first_version=0,
        last_version=0,
        error=error,
    )


def group(*texts, answer="19", **columns):
    prompt = Prompt(
        id="p",
        messages=(Message(role="user", content="12 + 7?"),),
        columns={"answer": answer, **columns},
    )
    return Group(prompt=prompt, rollouts=tuple(rollout(t, n) for n, t in enumerate(texts)))


def rewards_of(scored):
    return [r.reward for g in scored.groups for r in g.rollouts]


def constant(*values):
    return lambda **kwargs: list(values)


def score(groups, functions, **rule):
    return score_groups(groups, RewardFunctions(functions), rule=RewardRule(**rule))


def test_weighted_sum_is_the_weighted_sum():
    # 2 * 1 + 0.5 * 0.4 = 2.2
    assert weighted_sum({"a": 1.0, "b": 0.4}, {"a": 2.0, "b": 0.5}) == pytest.approx(2.2)


def test_a_missing_component_is_not_a_zero():
    # the weight 1 of b goes to a: (1 + 1) * 0.5 = 1
    assert weighted_sum({"a": 0.5, "b": None}, {"a": 1.0, "b": 1.0}) == pytest.approx(1.0)
    assert weighted_sum({"a": 0.5, "b": 0.0}, {"a": 1.0, "b": 1.0}) == pytest.approx(0.5)
    assert weighted_sum({"a": None}, {"a": 1.0}) is None
    # geometric: only a is left, so R = 0.05 + 0.95 * 0.5 = 0.525
    assert floored_geometric_mean({"a": 0.5, "b": None}, {"a": 1.0, "b": 3.0}) == pytest.approx(
        0.525
    )
    assert floored_geometric_mean({"a": None, "b": 1.0}, {"a": 1.0, "b": 0.0}) is None


def test_floored_geometric_mean_by_hand():
    # f = 0.05, r = (1, 0), w = (3, 1): 1^0.75 * 0.05^0.25 = 0.47287
    value = floored_geometric_mean({"a": 1.0, "b": 0.0}, {"a": 3.0, "b": 1.0})
    assert value == pytest.approx(0.47287, abs=1e-5)
    # f = 0.2, r = (0.5, 0.25), w equal: sqrt(0.6 * 0.4) = 0.4899
    value = floored_geometric_mean({"a": 0.5, "b": 0.25}, {"a": 1, "b": 1}, 0.2)
    assert value == pytest.approx(0.4899, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(unit, st.floats(0.1, 5)), min_size=1, max_size=4), st.floats(0.01, 0.9))
def test_geometric_combination_lies_between_floor_and_arithmetic_mean(pairs, floor):
    components = {str(n): r for n, (r, _) in enumerate(pairs)}
    weights = {str(n): w for n, (_, w) in enumerate(pairs)}
    value = floored_geometric_mean(components, weights, floor)
    total = sum(weights.values())
    arithmetic = sum(weights[n] * (floor + (1 - floor) * r) for n, r in components.items()) / total
    assert floor - 1e-9 <= value <= arithmetic + 1e-9
    scaled = {name: 7 * weight for name, weight in weights.items()}
    assert floored_geometric_mean(components, scaled, floor) == pytest.approx(value)


@settings(max_examples=40, deadline=None)
@given(unit, unit, unit)
def test_a_higher_component_never_lowers_the_reward(first, second, other):
    low, high = sorted((first, second))
    weights = {"a": 1.0, "b": 2.0}
    for combine in (weighted_sum, floored_geometric_mean):
        lower = combine({"a": low, "b": other}, weights)
        assert lower <= combine({"a": high, "b": other}, weights) + 1e-12


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"a": -1.0}, "the weight of 'a' is -1.0; it must be a finite number, 0 or more"),
        ({"a": math.nan}, "the weight of 'a' is nan"),
        ({"b": 1.0}, r"weights are for \['b'\] and rewards for \['a'\]; give one weight a reward"),
        ({"a": 0.0}, "all weights are 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, text):
    for combine in (weighted_sum, floored_geometric_mean):
        with pytest.raises(ConfigError, match=text):
            combine({"a": 0.5}, weights)


def test_geometric_combination_refuses_rewards_and_floors_outside_their_range():
    with pytest.raises(DataError, match=r"component 'a' is 1.5; .* rewards from 0 to 1"):
        floored_geometric_mean({"a": 1.5}, {"a": 1.0})
    for floor in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="it must be above 0 and below 1"):
            floored_geometric_mean({"a": 0.5}, {"a": 1.0}, floor)


def test_groups_come_back_with_components_and_rewards():
    grader = Grader()
    functions = {"correct": correct_reward(grader), "format": format_reward(r"\d+")}
    before = group("19", "it is 19", "18")
    scored = score([before], functions, weights={"correct": 1.0, "format": 0.5})
    assert rewards_of(scored) == [1.5, 1.0, 0.5]
    assert scored.groups[0].rollouts[1].rewards == {"correct": 1.0, "format": 0.0}
    assert before.rollouts[0].reward is None
    assert (scored.num_rollouts, scored.num_timeouts) == (3, 0)
    assert scored.grading["exact"] == 3
    # f = 0.05, equal weights: (1, 1) -> 1; (1, 0) -> sqrt(0.05) = 0.2236
    geometric = score([before], functions, combine="geometric")
    assert rewards_of(geometric) == pytest.approx([1.0, 0.05**0.5, 0.05**0.5])


def test_any_of_the_accepted_answers_is_right():
    scored = score([group("4", "19", answers=("19", "4"))], {"correct": correct_reward(Grader())})
    assert rewards_of(scored) == [1.0, 1.0]


def test_countdown_is_graded_by_its_value_not_by_its_example():
    countdown = group("7 * 3 + 5", "26", "3 + 5 + 7", answer="5 + 3 * 7", grading="countdown",
                      numbers=(3, 5, 7), target=26)  # fmt: skip
    assert rewards_of(score([countdown], {"c": correct_reward(Grader())})) == [1.0, 0.0, 0.0]


def test_functions_get_texts_and_columns_of_usable_rollouts_only():
    seen = []

    def record(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **rest):
        seen.append((prompts, completions, completion_ids, rest))
        return [0.0] * len(completions)

    first = group("a", level=3)
    broken = rollout("b", 1, error="cut off by the server")
    plain = Group(prompt=Prompt(id="q", text="x ="), rollouts=(rollout("c", prompt_id="q"),))
    scored = score(
        [Group(prompt=first.prompt, rollouts=(*first.rollouts, broken)), plain], {"r": record}
    )
    # One call with the chats and one with the plain texts, each in its own form.
    chats, plains = seen
    assert chats[0] == [[{"role": "user", "content": "12 + 7?"}]]
    assert chats[1] == [[{"role": "assistant", "content": "a"}]]
    assert plains[:2] == (["x ="], ["c"])
    assert chats[2] == plains[2] == [[1]]
    assert chats[3] == {"answer": ["19"], "level": [3]}
    assert plains[3] == {"answer": [None], "level": [None]}
    assert rewards_of(scored) == [0.0, None, 0.0]
    assert (scored.num_rollouts, scored.num_errors) == (3, 1)
    assert scored.groups[0].rollouts[1] is broken


def test_completions_cut_by_the_limit_are_counted_and_zeroed_only_if_asked():
    cut = rollout("19", 1, finish_reason="length")
    groups = [Group(prompt=group().prompt, rollouts=(rollout("19"), cut))]
    functions = {"correct": correct_reward(Grader())}
    kept = score(groups, functions)
    assert rewards_of(kept) == [1.0, 1.0]
    assert (kept.num_truncated, kept.num_zeroed) == (1, 0)
    zeroed = score(groups, functions, truncated="zero")
    assert rewards_of(zeroed) == [1.0, 0.0]
    assert zeroed.groups[0].rollouts[1].rewards == {"correct": 1.0}
    assert (zeroed.num_truncated, zeroed.num_zeroed) == (1, 1)


def test_a_timeout_is_a_zero_that_is_counted():
    scored = score([group(r"\boxed{9^{9^9}}")], {"correct": correct_reward(Grader())})
    assert rewards_of(scored) == [0.0]
    assert scored.num_timeouts == scored.grading["refused_powers"] == 1
    assert scored.grading["exact"] == 0


def test_rollouts_about_which_nothing_is_said_stay_unrewarded_and_counted():
    scored = score([group("a", "b")], {"r": constant(None, 0.5)})
    assert rewards_of(scored) == [None, 0.5]
    assert scored.num_unrewarded == 1
    assert scored.groups[0].rollouts[0].rewards == {}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.1, math.nan), "prompt 'p', rollout 1: reward 'r' is nan; it must be a finite"),
        ((math.inf, 0.1), "prompt 'p', rollout 0: reward 'r' is inf"),
        ((0.1, "good"), "rollout 1: reward 'r' is 'good'; it must be a finite number or None"),
        ((0.1,), "reward 'r' returned 1 values for 2 completions; it must return one a completion"),
    ],
)
def test_unusable_values_are_refused_with_their_rollout(values, text):
    with pytest.raises(DataError, match=text):
        score([group("a", "b")], {"r": constant(*values)})


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="combine is 'mean'; it must be 'sum' or 'geometric'"):
        score([], {"r": constant()}, combine="mean")
    with pytest.raises(ConfigError, match="there is no reward function; give at least one"):
        score([], {})
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
        format_reward("(")


def test_prompts_that_cannot_be_graded_are_refused():
    correct = {"correct": correct_reward(Grader())}
    with pytest.raises(
        DataError,
        match=r"rollout 0: reward 'correct' cannot be given: there is no reference answer",
    ):
        score([group("a", answer=None)], correct)
    with pytest.raises(DataError, match="grading is 'judge'; the column must be"):
        score([group("a", grading="judge")], correct)
    with pytest.raises(DataError, match="a prompt has a column 'completions'"):
        score([group("a", completions="x")], correct)


def test_no_usable_rollout_calls_no_function():
    def fail(**kwargs):
        raise AssertionError("called")

    assert score([], {"r": fail}).num_rollouts == 0
