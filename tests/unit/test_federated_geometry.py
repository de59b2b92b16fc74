"""Norms, angles and the geometric median, against hand-computed values and a plain minimiser."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from tests.federated_updates import update_of, updates_of

from gmpo.federated.geometry import cosines, geometric_median, inner_products, norm


def test_inner_products_are_over_all_tensors(tmp_path: Path):
    one = update_of(tmp_path, "one", {"a": [[1.0, 2.0]], "b": [3.0]})
    other = update_of(tmp_path, "other", {"a": [[4.0, -5.0]], "b": [6.0]})
    # 1 + 4 + 9 = 14, 4 - 10 + 18 = 12, 16 + 25 + 36 = 77
    assert inner_products([one, other]).tolist() == [[14.0, 12.0], [12.0, 77.0]]


def test_only_the_row_of_a_value_that_is_not_finite_is_not(tmp_path: Path):
    found = inner_products(updates_of(tmp_path, [[1.0, 0.0], [math.nan, 0.0], [0.0, math.inf]]))
    assert found[0, 0] == 1.0
    assert not np.isfinite(np.diag(found)[1:]).any()


def test_norms_and_cosines_by_hand(tmp_path: Path):
    inner = inner_products(updates_of(tmp_path, [[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
    halves = np.array([0.5, 0.5, 0.0])
    assert norm(inner, halves) == 2.5  # |(1.5, 2)|
    # (3, 0).(1.5, 2) / (3 x 2.5) = 0.6; (0, 4).(1.5, 2) / (4 x 2.5) = 0.8; no length, no angle
    assert cosines(inner, halves) == pytest.approx([0.6, 0.8, 0.0])


def test_the_median_of_three_on_a_line_is_the_middle_one(tmp_path: Path):
    inner = inner_products(updates_of(tmp_path, [[0.0, 1.0], [0.0, 2.0], [0.0, 9.0]]))
    found = geometric_median(inner, np.ones(3))
    assert found.sum() == pytest.approx(1.0)
    assert found @ [1.0, 2.0, 9.0] == pytest.approx(2.0, abs=1e-4)


def test_a_client_of_more_than_half_of_the_weight_is_the_median(tmp_path: Path):
    inner = inner_products(updates_of(tmp_path, [[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]))
    assert geometric_median(inner, np.array([3.0, 1.0, 1.0]))[0] == pytest.approx(1.0, abs=1e-4)


def test_updates_of_no_length_have_the_mean_for_a_median():
    assert geometric_median(np.zeros((2, 2)), np.array([1.0, 3.0])).tolist() == [0.25, 0.75]
    # Two of three changed nothing: they are the majority.
    inner = np.diag([0.0, 0.0, 1.0])
    assert geometric_median(inner, np.ones(3))[2] == pytest.approx(0.0, abs=1e-4)


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_the_median_is_what_a_plain_minimiser_finds(clients: int, seed: int):
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(clients, 3))
    weights = generator.uniform(0.2, 1.0, size=clients)
    found = geometric_median(points @ points.T, weights) @ points

    def total(z: np.ndarray) -> float:
        return float(weights @ np.linalg.norm(points - z, axis=1))

    starts = [*points, points.mean(axis=0)]
    least = min(
        minimize(total, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).fun
        for start in starts
    )
    assert total(found) <= least * (1 + 1e-5)


def test_two_of_ten_that_are_far_off_move_the_mean_and_not_the_median():
    generator = np.random.default_rng(0)
    honest = generator.normal(size=(10, 200)) * 0.1 + 1.0
    sent = honest.copy()
    sent[:2] *= -50
    truth = honest[2:].mean(axis=0)
    equal = np.ones(10)
    median = geometric_median(sent @ sent.T, equal) @ sent
    # Of a length of about 14, the mean is off by some ten lengths.
    assert np.linalg.norm(sent.mean(axis=0) - truth) > 100
    assert np.linalg.norm(median - truth) < 1.0
