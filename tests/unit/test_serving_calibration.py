"""The threshold of the quality score: by hand, its promised rate on fresh answers, its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gmpo.errors import ConfigError, DataError
from gmpo.serving.calibration import (
    LabelledAnswer,
    calibrate,
    labelled_answers,
    load_calibration,
    save_calibration,
)
from gmpo.serving.quality import COMPONENTS, DEFAULT_WEIGHTS
from gmpo.store import Event

PARTS = {"distinct": 1.0, "terminated": 1.0}


def labelled(score_at: float, is_right: bool | None) -> LabelledAnswer:
    return LabelledAnswer(components={**PARTS, "probability": score_at}, is_right=is_right)


ONLY_PROBABILITY = {**dict.fromkeys(COMPONENTS, 0.0), "probability": 1.0}


def test_calibration_by_hand():
    # 19 right answers at .05, .10 ... .95; wrong ones at .02 and .12. With a target of .1,
    # k = floor(.1 * 20) = 2: the threshold is the second lowest right score, and 2 / 20 = .1.
    right = [labelled(0.05 * (step + 1), True) for step in range(19)]
    wrong = [labelled(0.02, False), labelled(0.12, False)]
    found = calibrate([*wrong, *right], target=0.1, weights=ONLY_PROBABILITY, floor=0.01)
    assert found.threshold == pytest.approx(0.01 + 0.99 * 0.10)
    assert found.expected_false_fallback == pytest.approx(0.1)
    assert (found.num_answers, found.num_right, found.num_wrong) == (21, 19, 2)
    assert found.caught_share == 0.5
    # Pairs right above wrong: 19 for .02; those from .15 on, 17, for .12. 36 of 38.
    assert found.ranking == pytest.approx(36 / 38)
    scores = [0.02, 0.12, *(0.05 * (step + 1) for step in range(19))]
    truths = [0, 0, *[1] * 19]
    assert found.correlation == pytest.approx(np.corrcoef(scores, truths)[0, 1])


def test_the_bound_is_that_of_an_order_statistic():
    # Share below the lowest of n = 19: P(share > x) = (1 - x)^19 = .05.
    answers = [labelled(0.05 * (step + 1), True) for step in range(19)]
    found = calibrate(answers, target=0.05, weights=ONLY_PROBABILITY)
    assert found.false_fallback_upper == pytest.approx(1 - 0.05 ** (1 / 19))


def test_equal_scores_are_neither_above_nor_below():
    found = calibrate(
        [labelled(0.5, True)] * 9 + [labelled(0.5, False)], target=0.1, weights=ONLY_PROBABILITY
    )
    assert found.ranking == 0.5
    assert found.correlation is None
    assert found.caught_share == 0.0


def test_without_any_truth_all_answers_count_as_good():
    answers = [labelled(0.05 * (step + 1), None) for step in range(19)]
    found = calibrate(answers, target=0.05, weights=ONLY_PROBABILITY, floor=0.01)
    assert found.threshold == pytest.approx(0.01 + 0.99 * 0.05)
    assert (found.num_right, found.caught_share, found.correlation) == (0, None, None)


def test_too_few_good_answers_for_the_target_are_refused():
    answers = [labelled(0.5, True)] * 18 + [labelled(0.5, False)] * 5
    with pytest.raises(DataError, match=r"18 good answers of 23 .* give at least 19"):
        calibrate(answers, target=0.05)
    with pytest.raises(DataError, match="0 good answers"):
        calibrate([], target=0.05)
    with pytest.raises(ConfigError, match="target is 1"):
        calibrate(answers, target=1.0)


def test_the_false_fallback_rate_holds_on_fresh_answers():
    # 600 calibrations on 99 answers each, target .05: the mean share of fresh answers below the
    # threshold is k / (n + 1) = .05. Its spread is that of Beta(5, 95), .0217; over 600: .0009.
    generator = np.random.default_rng(7)
    shares = []
    for _ in range(600):
        held_out = generator.beta(2, 5, size=99)
        answers = [labelled(value, True) for value in held_out]
        found = calibrate(answers, target=0.05, weights=ONLY_PROBABILITY, floor=0.001)
        fresh = 0.001 + 0.999 * generator.beta(2, 5, size=2000)
        shares.append((fresh < found.threshold).mean())
    assert abs(np.mean(shares) - 0.05) < 4 * 0.0009
    assert np.mean(np.array(shares) <= found.false_fallback_upper) == pytest.approx(0.95, abs=0.04)


def test_a_calibration_is_saved_and_read_back(tmp_path: Path):
    found = calibrate([labelled(0.5, True)] * 30, target=0.05)
    path = tmp_path / "quality.json"
    save_calibration(found, path)
    assert load_calibration(path) == found
    assert found.weights == dict(DEFAULT_WEIGHTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["quality.json"]


def test_what_is_no_calibration_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "quality.json"
    with pytest.raises(ConfigError, match=r"quality\.json cannot be read: No such file"):
        load_calibration(path)
    path.write_text('{"treshold": 0.5}')
    with pytest.raises(ConfigError, match="unknown setting 'treshold'; did you mean 'threshold'"):
        load_calibration(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="nvalid JSON"):
        load_calibration(path)
    with pytest.raises(DataError, match="cannot be written"):
        save_calibration(calibrate([labelled(0.5, None)] * 30, target=0.05), tmp_path / "no" / "q")


def answer(request_id: str, *, status: int = 200, fell_back: bool = False, **components) -> Event:
    payload = {"status": status, "fell_back": fell_back, "quality_components": components}
    return Event(kind="answer", time=1.0, payload=payload, request_id=request_id)


def feedback(request_id: str, score: float, time: float) -> Event:
    return Event(kind="feedback", time=time, payload={"score": score}, request_id=request_id)


def test_answers_are_labelled_by_their_verdict_or_else_by_their_last_feedback():
    found, left_out = labelled_answers(
        [
            feedback("disliked", 0.2, 3.0),
            answer("verified", probability=0.5, verified=1.0),
            feedback("verified", 0.0, 2.0),
            answer("disliked", probability=0.5),
            feedback("disliked", 1.0, 2.0),
            answer("liked", probability=0.5),
            feedback("liked", 0.5, 2.0),
            answer("nobody", probability=0.5),
            answer("failed", status=502, probability=0.5),
            answer("other", fell_back=True, probability=0.5),
            answer("unscored"),
        ]
    )
    assert [one.is_right for one in found] == [True, False, True, None]
    assert left_out == {"failed": 1, "fell_back": 1, "without_score": 1}
