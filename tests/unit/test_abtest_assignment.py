"""A unit's variant is a function of its name, of the salt and of the weights."""

from __future__ import annotations

import subprocess
import sys
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmpo.abtest.assignment import assign, check_weights, position
from gmpo.errors import ConfigError

HALVES = {"control": 0.5, "candidate": 0.5}
names = st.text(max_size=20)
shares = st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(any)


def weights_of(parts: list[int]) -> dict[str, float]:
    return {f"v{number}": part / sum(parts) for number, part in enumerate(parts)}


def test_a_position_is_the_first_53_bits_of_the_hash_of_the_named_parts():
    digest = blake2b(b"4:salt3:exp6:user-1", digest_size=8).digest()
    assert position("exp", "salt", "user-1") == (int.from_bytes(digest, "big") >> 11) / 2**53


def test_parts_that_read_alike_when_joined_are_told_apart():
    assert position("b", "a", "c") != position("bc", "a", "")
    assert position("exp", "1:a", "u") != position("exp", "a", "1:u")


@given(names, names, names)
def test_positions_lie_in_the_half_open_unit_interval(experiment: str, salt: str, unit: str):
    assert 0 <= position(experiment, salt, unit) < 1


@given(names, shares)
def test_a_variant_without_weight_is_never_assigned(unit: str, parts: list[int]):
    weights = weights_of(parts)
    assert weights[assign("exp", "salt", unit, weights)] > 0


@given(names, shares)
def test_the_order_of_the_weights_does_not_matter(unit: str, parts: list[int]):
    weights = weights_of(parts)
    backwards = dict(reversed(weights.items()))
    assert assign("exp", "salt", unit, weights) == assign("exp", "salt", unit, backwards)


@given(names, st.floats(0, 1), st.floats(0, 1))
def test_changed_weights_move_only_units_between_the_old_and_the_new_border(
    unit: str, before: float, after: float
):
    place = position("exp", "salt", unit)
    old = assign("exp", "salt", unit, {"candidate": before, "control": 1 - before})
    new = assign("exp", "salt", unit, {"candidate": after, "control": 1 - after})
    between = min(before, after) <= place < max(before, after)
    assert (old != new) == between


def test_shares_are_those_of_the_weights_and_salts_are_independent():
    units = [f"user-{number}" for number in range(20_000)]
    first = np.array([position("exp", "one", unit) for unit in units])
    second = np.array([position("exp", "two", unit) for unit in units])
    # A mean of n uniform draws has standard deviation sqrt(1 / 12 n) = 0.00204: 4 of them.
    assert abs(first.mean() - 0.5) < 0.0082
    # Cells of a 4 by 4 table hold 1250 each, standard deviation 34.2.
    table = np.histogram2d(first, second, bins=4, range=[[0, 1], [0, 1]])[0]
    assert abs(table - 1250).max() < 4.5 * 34.2
    candidate = {"candidate": 0.1, "control": 0.9}
    share = np.mean([assign("exp", "one", unit, candidate) == "candidate" for unit in units])
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / 20_000)


def test_another_process_assigns_the_same():
    units = [f"user-{number}" for number in range(50)]
    program = (
        "from gmpo.abtest.assignment import assign\n"
        f"print([assign('exp', 'salt', unit, {HALVES!r}) for unit in {units!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str([assign("exp", "salt", unit, HALVES) for unit in units])


@pytest.mark.parametrize(
    "weights",
    [{}, {"a": 0.4, "b": 0.5}, {"a": -0.5, "b": 1.5}, {"a": float("nan"), "b": 1.0}, {"a": 0.0}],
)
def test_weights_that_are_no_shares_are_refused(weights: dict[str, float]):
    with pytest.raises(ConfigError, match="each must be at least 0 and their sum 1"):
        check_weights(weights)


def test_shares_that_miss_one_by_rounding_are_taken():
    check_weights(dict.fromkeys("abcdefghij", 0.1))
