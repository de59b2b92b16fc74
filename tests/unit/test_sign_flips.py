"""The test of paired differences by the choices of their signs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from gmpo.statistics import mcnemar, sign_flip_p_value


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # All of one sign: only that choice and its mirror are as far out, 2 of 2^n.
        ([1, 2], 0.5),
        ([1, 2, 3], 0.25),
        ([0.1, 5, 2, 1, 4], 2 / 32),
        # Sum 2 of +-1 +-1 +-2: |sum| >= 2 for 4, 2, 2, and their mirrors: 6 of 8.
        ([1, -1, 2], 0.75),
        ([0, 0], 1.0),
        ([1, -1], 1.0),
        # A pair without a difference takes no part: as [1, 2].
        ([1, 0, 2], 0.5),
    ],
)
def test_the_sign_flip_p_is_the_share_of_sign_choices_as_far_out(differences, p):
    assert sign_flip_p_value(differences) == p


@given(
    st.lists(st.sampled_from([-2.5, -1.1, -0.3, 0.0, 0.3, 0.7, 1.1, 4.0]), min_size=2, max_size=9)
)
def test_the_sign_flip_p_is_that_of_trying_every_choice(differences):
    seen = abs(math.fsum(differences)) - 1e-9
    sums = [
        abs(math.fsum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_p_value(differences) == sum(s >= seen for s in sums) / len(sums)


def test_forty_pairs_are_counted_out():
    p = sign_flip_p_value([1.0] * 22 + [-1.0] * 18)
    # Sums of +-1: twice the binomial tail of 22 or more heads in 40.
    assert p == pytest.approx(2 * binomtest(22, 40, alternative="greater").pvalue)
    # Those without a difference take no part, so that any number of them does not matter.
    assert sign_flip_p_value([1.0, 2.0, 3.0] + [0.0] * 500) == 0.25


def test_pairs_of_one_size_are_mcnemars_test_however_many():
    before, after = [False] * 70 + [True] * 40, [True] * 70 + [False] * 40
    p = sign_flip_p_value([0.1 + 0.2] * 70 + [-0.3] * 40 + [0.0] * 900)
    assert p == mcnemar(baseline=before, candidate=after).p_value
    # 2,000 won and none lost: 2 / 2^2000 is below the smallest number, and no error.
    assert sign_flip_p_value([1.0] * 2000) == 0.0


def test_choices_of_more_signs_are_drawn_and_agree_with_counting():
    # 30 of size 1 (20 up), 31 of size 2 (20 up): the sum is 10 + 18.
    differences = [1.0] * 20 + [-1.0] * 10 + [2.0] * 20 + [-2.0] * 11
    ones, twos = (binom(count, 0.5).pmf(range(count + 1)) for count in (30, 31))
    exact = sum(
        ones[one] * twos[two]
        for one in range(31)
        for two in range(32)
        if abs(2 * one - 30 + 2 * (2 * two - 31)) >= 28
    )
    p = sign_flip_p_value(differences)
    # Of 99,999 draws the standard error is 0.0007; four of them either way.
    assert 0.02 < exact < 0.05 and p == pytest.approx(exact, abs=0.0028)
    assert sign_flip_p_value(differences) == p
    assert sign_flip_p_value(differences, seed=1) != p
    # All one way no draw is as far out, and p is not 0: 1 of 100,000.
    assert sign_flip_p_value([1.0] * 30 + [2.0] * 31) == 1e-5


@pytest.mark.parametrize(
    ("differences", "clusters", "p"),
    [
        # Three clusters of sums 2, 1, 1, all up: 2 of 8, where five pairs alone had 2 of 32.
        ([1, 1, 0.5, 0.5, 1], "aabbc", 0.25),
        # Sums 2 and -1: both signs of both are as far out as 1, all 4 of 4.
        ([1, 1, -1], "aab", 1.0),
        # One cluster says nothing, nor one whose own differences cancel.
        ([1, 1, 1], "aaa", 1.0),
        ([0.1, 0.2, -0.3, 1, 1], "aaabc", 0.5),
    ],
)
def test_signs_of_a_cluster_change_together(differences, clusters, p):
    assert sign_flip_p_value(differences, clusters=list(clusters)) == p


def test_the_sign_flip_p_rejects_no_oftener_than_it_says():
    generator = np.random.default_rng(7)
    rejected = 0
    for _ in range(400):
        one, other = generator.binomial(4, 0.3, size=(2, 20)) / 4
        rejected += sign_flip_p_value((other - one).tolist()) < 0.05
    # 5 % of 400 is 20, with standard error 4.4; four of them upwards, ties make it fewer.
    assert 3 <= rejected <= 37
