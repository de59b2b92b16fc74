"""Batches against earlier ones: shift and disputed answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gmpo.data_checks.profile import (
    DataProfile,
    dispute_test,
    main_script,
    measure_shift,
    merged_profile,
)
from gmpo.errors import DataError


def profile(**figures: object) -> DataProfile:
    plain = {"lengths": (), "scripts": (), "categories": ()}
    return DataProfile(**{**plain, **figures})


def of_scripts(latin: int, hangul: int) -> DataProfile:
    count = latin + hangul
    return profile(
        lengths=(5,) * count,
        scripts=("LATIN",) * latin + ("HANGUL",) * hangul,
        categories=(None,) * count,
    )


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("What is 3 + 4?", "LATIN"),
        ("사과가 5개", "HANGUL"),
        ("3 + 4 = ?", "none"),
        ("Сколько?", "CYRILLIC"),
        ("ab 가나", "HANGUL"),  # as many of each: the first in the alphabet
    ],
)
def test_the_main_script_is_that_of_most_letters(text: str, script: str):
    assert main_script(text) == script


def test_index_and_p_value_by_hand():
    length, script = measure_shift(of_scripts(6, 2), of_scripts(2, 6), alpha=0.05, least_psi=0.1)
    # Half a row more in each bin: 6.5/9 and 2.5/9 against 2.5/9 and 6.5/9.
    assert script.psi == pytest.approx(2 * (4 / 9) * math.log(6.5 / 2.5))
    # Of all ways to choose 8 of 16 rows, those with 6 or more of one script:
    # 2 (28 * 28 + 8 * 8 + 1) / 12870 = 0.1319; Holm doubles it.
    assert script.p_value == pytest.approx(2 * 0.1319, abs=0.03)
    assert not script.is_alarm
    assert "HANGUL: 25 % of the new rows, 75 % of the earlier" in script.sentence
    # All lengths are one: nothing differs, and all divisions are as extreme.
    assert (length.psi, length.p_value, length.is_alarm) == (0.0, 1.0, False)


def test_a_shift_has_to_be_large_as_well_as_certain():
    new, earlier = of_scripts(1100, 900), of_scripts(1000, 1000)
    _, script = measure_shift(new, earlier, alpha=0.05, least_psi=0.1)
    assert script.p_value < 0.05
    assert script.psi < 0.1
    assert not script.is_alarm
    _, script = measure_shift(of_scripts(60, 20), of_scripts(20, 60), alpha=0.01, least_psi=0.1)
    assert script.is_alarm


def test_only_figures_that_both_sides_have_are_compared():
    new = profile(lengths=(1, 2), scripts=("LATIN",) * 2, categories=("a", None), pass_rates=(0.5,))
    earlier = profile(lengths=(1,), scripts=("LATIN",), categories=(None,))
    names = [figure.name for figure in measure_shift(new, earlier, alpha=0.01, least_psi=0)]
    assert names == ["length", "script"]
    assert measure_shift(profile(), earlier, alpha=0.01, least_psi=0) == ()
    names = [figure.name for figure in measure_shift(new, new, alpha=0.01, least_psi=0)]
    assert names == ["length", "script", "category", "difficulty"]


def drawn(generator: np.random.Generator, count: int, *, more: float = 0.0) -> DataProfile:
    return profile(
        lengths=tuple(generator.poisson(30 + more, count).tolist()),
        scripts=tuple(generator.choice(["LATIN", "HANGUL"], count, p=[0.9, 0.1]).tolist()),
        categories=tuple(generator.choice(list("abcdef"), count).tolist()),
        pass_rates=tuple((generator.binomial(8, 0.5, count) / 8).tolist()),
    )


@pytest.mark.parametrize(
    "repeats", [60, pytest.param(2000, marks=pytest.mark.verify)], ids=["few", "many"]
)
def test_batches_like_the_earlier_data_alarm_as_rarely_as_stated(repeats: int):
    generator = np.random.default_rng(1)
    alarms = usual_rule = 0
    for _ in range(repeats):
        new, earlier = drawn(generator, 60), drawn(generator, 300)
        figures = measure_shift(new, earlier, alpha=0.05, least_psi=0.0)
        alarms += any(figure.is_alarm for figure in figures)
        usual_rule += any(figure.psi > 0.1 for figure in figures)
    # 0.05 and three standard errors of the share; the index alone is wrong most of the time.
    assert alarms / repeats <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert usual_rule / repeats > 0.5


def test_a_batch_of_longer_problems_is_noticed():
    generator = np.random.default_rng(2)
    new, earlier = drawn(generator, 200, more=8), drawn(generator, 1000)
    alarms = {
        figure.name: figure.is_alarm
        for figure in measure_shift(new, earlier, alpha=0.01, least_psi=0.1)
    }
    assert alarms == {"length": True, "script": False, "category": False, "difficulty": False}


def test_more_disputes_are_judged_by_fishers_test():
    new = profile(num_agreed=3, num_disputed=3)
    earlier = profile(num_agreed=3, num_disputed=0)
    found = dispute_test(new, earlier, alpha=0.051)
    assert found is not None
    # All three disputes on one side: 1 of C(6, 3) = 20 ways.
    assert found.p_value == pytest.approx(1 / 20)
    assert found.is_alarm
    fewer = dispute_test(earlier, new, alpha=0.05)
    assert fewer is not None and fewer.p_value == pytest.approx(1.0)
    assert dispute_test(profile(), earlier, alpha=0.05) is None
    assert dispute_test(new, profile(), alpha=0.05) is None


def test_profiles_merge_and_come_back_from_json():
    one, two = of_scripts(2, 1), profile(pass_rates=(0.5,), num_agreed=3, num_disputed=1)
    both = merged_profile([one, two])
    assert (len(both.lengths), both.pass_rates, both.num_agreed) == (3, (0.5,), 3)
    assert DataProfile.from_dict(both.as_dict()) == both
    with pytest.raises(DataError, match="no profile of a batch"):
        DataProfile.from_dict({"lengths": [1]})
    with pytest.raises(DataError, match="no profile to merge"):
        merged_profile([])
