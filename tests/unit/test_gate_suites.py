"""Two models' outcomes of the same items, as the gate takes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.suite_outcomes import ASKED_WITH, completion, greedy, outcomes

from gmpo.errors import ConfigError, DataError
from gmpo.gate.suites import compared_suites
from gmpo.outcomes import ItemOutcome, SuiteOutcomes


def test_items_are_paired_by_id_and_only_shared_ones_count():
    told: list[str] = []
    old = [greedy("old", {0, 1}, 4), greedy("old", {0}, 2, suite="math500")]
    new = [greedy("new", {1, 2}, 3), greedy("new", {0}, 2, suite="aime24")]
    found = compared_suites(old, new, warn=told.append)
    (suite,) = found.suites
    assert suite.suite == "amc" and suite.items == ("amc/q0", "amc/q1", "amc/q2")
    assert suite.champion.tolist() == [1, 1, 0] and suite.candidate.tolist() == [0, 1, 1]
    assert suite.samples == 1 and found.lengths.champion.tolist() == [5, 5, 5]
    assert told == [
        "suite aime24 was asked of one model alone and does not count",
        "suite math500 was asked of one model alone and does not count",
        "1 items of amc were asked of one model alone and do not count",
    ]


def test_another_way_of_answering_is_told():
    told: list[str] = []
    other = replace(greedy("new", {0}, 2), asked_with=replace(ASKED_WITH, dtype="bf16"))
    compared_suites([greedy("old", {0}, 2)], [other], warn=told.append)
    assert told == ["AMC: precision 'fp32' for old and 'bf16' for new"]


def test_samples_become_shares_and_are_taken_before_greedy_answers():
    right = {"q0": [True, False, True, False], "q1": [True] * 4}
    old = [greedy("old", {0}, 2), outcomes("old", right)]
    new = [greedy("new", {0}, 2), outcomes("new", {**right, "q1": [False] * 4})]
    (suite,) = compared_suites(old, new).suites
    assert suite.samples == 4
    assert suite.champion.tolist() == [0.5, 1] and suite.candidate.tolist() == [0.5, 0]


def test_lengths_are_means_over_an_items_completions():
    def asked(label: str, *lengths: int) -> SuiteOutcomes:
        one = greedy(label, {0}, 2)
        items = [
            ItemOutcome(id=item.id, digest="d", completions=(completion(True, num_tokens=length),))
            for item, length in zip(one.items, lengths, strict=True)
        ]
        return SuiteOutcomes(**{**vars(one), "items": tuple(items)})

    found = compared_suites([asked("old", 3, 8)], [asked("new", 4, 6)]).lengths
    np.testing.assert_array_equal(found.champion, [3, 8])
    np.testing.assert_array_equal(found.candidate, [4, 6])


def test_what_cannot_be_paired_is_refused():
    old = greedy("old", {0}, 2)
    with pytest.raises(ConfigError, match="share no suite"):
        compared_suites([old], [greedy("new", {0}, 2, suite="aime24")])
    with pytest.raises(ConfigError, match="share no suite"):
        compared_suites([old], [outcomes("new", {"q0": [True, False]})])
    with pytest.raises(DataError, match=r"share no item of .*the same --items and --data"):
        compared_suites([old], [outcomes("new", {"x": [True]})])
    task = replace(old, suite="task")
    other = replace(outcomes("new", {"x": [True]}), suite="task")
    with pytest.raises(DataError, match=r"one recipe, the same --items and the same task\.\* keys"):
        compared_suites([task], [other])
    with pytest.raises(DataError, match="put differently"):
        compared_suites([old], [greedy("new", {0}, 2, digest="other")])
    other = replace(greedy("new", {0}, 2), asked_with=replace(ASKED_WITH, system="Be brief."))
    with pytest.raises(DataError, match=r"the system turn was none and 'Be brief\.'"):
        compared_suites([old], [other])
    with pytest.raises(ConfigError, match=r"2 samples at temperature 1 .* 3 at 1"):
        compared_suites(
            [outcomes("old", {"q0": [True] * 2})], [outcomes("new", {"q0": [True] * 3})]
        )
