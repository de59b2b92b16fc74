"""Streams of uniforms belong to their key alone."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gmpo.sampler.randomness import uniforms

key_parts = st.lists(
    st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=8)), min_size=1, max_size=5
)


@given(key=key_parts, short=st.integers(0, 50), more=st.integers(0, 50))
def test_a_longer_stream_starts_with_the_shorter_one(key, short, more):
    longer = uniforms(tuple(key), count=short + more)
    assert np.array_equal(uniforms(tuple(key), count=short), longer[:short])


@given(key=key_parts)
def test_numbers_lie_in_the_half_open_unit_interval(key):
    numbers = uniforms(tuple(key), count=64)
    assert numbers.dtype == np.float64
    assert ((numbers >= 0) & (numbers < 1)).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), (2, 1)),
        ((1, "2"), (1, 2)),
        (("1", 2), (1, 2)),
        ((12,), (1, 2)),
        (("a", "b"), ("ab",)),
        (("a', 'b",), ("a", "b")),
        ((0,), (0, 0)),
        ((1,), (-1,)),
    ],
)
def test_order_type_and_length_of_the_key_matter(one, other):
    assert not np.isclose(uniforms(one, count=4), uniforms(other, count=4)).any()


def test_a_stream_is_the_same_on_every_machine():
    # A changed stream changes every run in the world: only a new major version may do it.
    numbers = uniforms((0, 3, "sum-17", 2), count=3)
    assert numbers.tolist() == [0.5908347457206239, 0.6200885751736751, 0.6039828804579123]


def test_numbers_are_uniform_along_a_stream_and_across_keys():
    along = uniforms(("along",), count=20_000)
    across = np.array([uniforms((7, "across", index), count=2) for index in range(5000)])
    for numbers in (along, across[:, 0], across[:, 1]):
        assert stats.kstest(numbers, "uniform").pvalue > 0.001


def test_streams_of_neighbouring_keys_are_not_correlated():
    streams = [uniforms((seed, index), count=2000) for seed in (0, 1) for index in (0, 1)]
    for one, other in itertools.pairwise(streams):
        # The standard error of a correlation of 2,000 pairs is 0.022.
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
