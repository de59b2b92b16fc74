"""The quality score: by hand, then what must hold for any answer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.errors import DataError
from gmpo.serving.quality import (
    COMPONENTS,
    FinishedChoice,
    quality_components,
    quality_score,
    stability,
)

EQUAL = dict.fromkeys(COMPONENTS, 1.0)


def choice(
    text: str = "four",
    *,
    logprobs: tuple[float, ...] = (math.log(0.5),),
    finish_reason: str | None = "stop",
    verified: bool | None = None,
    tokens: tuple[int | str, ...] = (),
) -> FinishedChoice:
    return FinishedChoice(
        text=text,
        tokens=tokens,
        logprobs=logprobs,
        finish_reason=finish_reason,
        verified=verified,
    )


def test_components_by_hand():
    # Probabilities 1/2 and 1/8: their geometric mean is 1/4.
    # Tokens 1 2 3 4 1 2 3 4: five 4-grams, of which the last repeats the first.
    components = quality_components(
        choice(
            "1 2 3 4 1 2 3 4",
            logprobs=(math.log(1 / 2), math.log(1 / 8)),
            tokens=(1, 2, 3, 4, 1, 2, 3, 4),
            finish_reason="length",
        )
    )
    assert components == {
        "probability": pytest.approx(0.25),
        "distinct": 0.8,
        "terminated": 0.0,
        "verified": None,
    }


def test_words_stand_in_for_tokens_that_are_not_told():
    # "a b c d a b c d": five 4-grams of words, four of them different.
    assert quality_components(choice("a b c d a b c d"))["distinct"] == 0.8
    assert quality_components(choice("three short words"))["distinct"] == 1.0


def test_an_endless_repetition_is_hardly_distinct():
    # 97 grams, all the same one.
    components = quality_components(choice("x " * 100, tokens=("x",) * 100))
    assert components["distinct"] == pytest.approx(1 / 97)


def test_an_empty_answer_says_nothing_however_sure():
    components = quality_components(choice(" \n", logprobs=(0.0,)))
    assert (components["probability"], components["distinct"]) == (0.0, 0.0)


def test_score_by_hand():
    # probability .25, distinct 1, terminated 1, none verified; floor .1 maps .25 to .325.
    scored = quality_score([choice(logprobs=(math.log(0.25),))], weights=EQUAL, floor=0.1)
    assert scored.score == pytest.approx(0.325 ** (1 / 3))
    assert scored.mean_logprob == pytest.approx(math.log(0.25))
    # Verified wrong with weight 2 of 5: (.325 * 1 * 1 * .1^2)^(1/5).
    wrong = choice(logprobs=(math.log(0.25),), verified=False)
    weights = {**EQUAL, "verified": 2.0}
    assert quality_score([wrong], weights=weights, floor=0.1).score == pytest.approx(
        (0.325 * 0.01) ** (1 / 5)
    )


def test_what_is_not_known_is_left_out_and_nothing_known_is_no_score():
    scored = quality_score([choice(logprobs=(), finish_reason="length")], weights=EQUAL, floor=0.1)
    assert scored.components["probability"] is None
    assert scored.mean_logprob is None
    assert scored.score == pytest.approx(0.1**0.5)  # distinct 1, terminated 0 -> .1
    only = {**dict.fromkeys(COMPONENTS, 0.0), "probability": 1.0}
    assert quality_score([choice(logprobs=())], weights=only).score is None


def test_the_worst_of_several_completions_counts():
    good, bad = choice(), choice(finish_reason="length")
    assert quality_score([good, bad, good]) == quality_score([bad])


@pytest.mark.parametrize("value", [math.nan, 0.5, math.inf])
def test_a_log_probability_above_zero_is_refused(value: float):
    with pytest.raises(DataError, match="log-probability 1 is"):
        quality_components(choice(logprobs=(-1.0, value)))


def test_certain_and_impossible_tokens_are_scored():
    assert quality_components(choice(logprobs=(0.0, 1e-4)))["probability"] == 1.0
    assert quality_components(choice(logprobs=(-1.0, -math.inf)))["probability"] == 0.0


choices = st.builds(
    choice,
    st.text(alphabet="ab ", max_size=30),
    logprobs=st.lists(st.floats(-50, 0), max_size=6).map(tuple),
    finish_reason=st.sampled_from(["stop", "length"]),
    verified=st.sampled_from([None, True, False]),
)


@settings(max_examples=80, deadline=None)
@given(one=choices, floor=st.floats(0.01, 0.9))
def test_scores_lie_between_floor_and_one_and_a_verdict_moves_them_its_way(
    one: FinishedChoice, floor: float
):
    def scored(verified: bool | None) -> float:
        judged = choice(
            one.text, logprobs=one.logprobs, finish_reason=one.finish_reason, verified=verified
        )
        score = quality_score([judged], floor=floor).score
        assert score is not None
        return score

    tiny = 1e-12
    assert floor - tiny <= scored(one.verified) <= 1 + tiny
    assert scored(False) - tiny <= scored(None) <= scored(True) + tiny


def test_stability_by_hand():
    # Half .4, half .9: sqrt(.36) / .65.
    assert stability([0.4, 0.9] * 10) == pytest.approx(0.6 / 0.65)
    assert stability([0.7] * 20) == 1.0
    assert stability([0.7] * 19) is None
