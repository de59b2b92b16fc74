"""Tables of scores: values, gains and their tests, what is refused, and the picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb
from rich.console import Console
from tests.suite_outcomes import ASKED_WITH, greedy, outcomes

from gmpo.errors import ConfigError, DataError, RunFolderError
from gmpo.outcomes import Mix, SuiteOutcomes
from gmpo.suites.plots import plot_scores
from gmpo.suites.scores import Metric, ScoreTable, metrics_of, score_table
from gmpo.suites.tables import counts_table

PASS_1 = Metric(name="greedy pass@1", way="greedy")


def two_suites() -> ScoreTable:
    """AMC: GRPO 2 of 10, GMPO 7 of 10; MATH-500: GRPO 1 of 20, GMPO 9 of 20."""
    return score_table(
        [
            greedy("GRPO", {0, 1}, 10),
            greedy("GRPO", {0}, 20, suite="math500"),
            greedy("GMPO", {0, 2, 3, 4, 5, 6, 7}, 10),
            greedy("GMPO", set(range(9)), 20, suite="math500"),
        ],
        PASS_1,
    )


def test_scores_are_means_and_averages_are_over_suites():
    table = two_suites()
    assert list(table.titles) == ["amc", "math500"]
    assert table.scores["GRPO"]["amc"].mean == pytest.approx(0.2)
    assert table.scores["GMPO"]["math500"].mean == pytest.approx(0.45)
    # Each suite counts once, whatever its size: (0.2 + 0.05) / 2 and (0.7 + 0.45) / 2.
    assert table.averages["GRPO"].mean == pytest.approx(0.125)
    assert table.averages["GMPO"].mean == pytest.approx(0.575)
    assert table.averages["GMPO"].num_items == 30


def test_gains_are_tested_item_by_item_and_adjusted_over_the_table():
    amc, math500, average = two_suites().gains
    assert (amc.label, amc.baseline, amc.suite) == ("GMPO", "GRPO", "amc")
    assert (amc.only_baseline, amc.only_candidate) == (1, 6)
    assert amc.difference == pytest.approx(0.5)
    assert amc.p_value == pytest.approx(0.125)  # 2 * (C(7,0) + C(7,1)) / 2^7 = 16 / 128
    assert math500.p_value == pytest.approx(2 / 256)  # 8 won, none lost
    assert math500.adjusted_p == pytest.approx(4 / 256)  # the smaller of two, times two
    assert amc.adjusted_p == pytest.approx(0.125)
    assert (amc.verdict, math500.verdict) == ("none seen", "better")
    assert average.suite == "average"
    assert average.difference == pytest.approx(0.45)  # (0.5 + 0.4) / 2
    # In units of 1/40, AMC's 7 items that differ weigh 2 and MATH-500's 8 weigh 1; the sum is
    # 2 * 5 + 8 = 18. As high are 7 up and 6 or more of 8, which 1 + 8 + 28 of 256 choices are, and
    # 6 up and all of 8: (37 + 7) / 2^15, and as many below.
    assert average.p_value == 2 * 44 / 2**15
    assert average.adjusted_p == pytest.approx(3 * 88 / 2**15)  # the smallest of three
    assert average.verdict == "better"


@pytest.mark.parametrize(
    ("won", "p"),
    [
        ((1, 1), 2 / 4),
        ((4, 0), 2 / 16),  # a suite without a difference is no evidence
        ((3, 3), 2 / 64),
    ],
)
def test_an_average_is_judged_by_the_items_that_differ(won: tuple[int, int], p: float):
    suites = zip(("amc", "math500"), won, strict=True)
    pairs = [
        (greedy("a", set(), 10, suite=name), greedy("b", set(range(count)), 10, suite=name))
        for name, count in suites
    ]
    table = score_table([one for pair in pairs for one in pair], PASS_1)
    average = table.gains[-1]
    assert average.p_value == p
    assert average.difference == pytest.approx(sum(won) / 20)
    assert average.verdict == "none seen"  # 3 and 3: adjusted by three comparisons it is 0.09
    # The interval is of this difference alone and too narrow for so few items, which is said.
    assert average.interval[0] > 0
    said = f"average: the interval of b - a leaves out 0, and the adjusted p is {min(1, 3 * p):.3g}"
    assert table.notes[-1] == f"{said}; p decides"


def test_an_item_of_two_suites_is_one_piece_of_evidence_for_the_average():
    def asked(label: str, suite: str, right: set[int]) -> SuiteOutcomes:
        one = greedy(label, right, 8)
        return replace(one, suite=suite, title=suite)

    models = [
        asked(label, suite, right)
        for label, right in (("a", set[int]()), ("b", {0, 1, 2}))
        for suite in ("amc", "copy")
    ]
    first, second, average = score_table(models, PASS_1).gains
    assert (first.p_value, second.p_value) == (2 / 8, 2 / 8)
    assert average.p_value == 2 / 8  # three items won, though six rows of two suites


def test_averages_of_several_models_are_adjusted_too():
    models = [
        greedy(label, right, 20, suite=suite)
        for label, right in (("a", set[int]()), ("b", set(range(4))), ("c", set(range(4))))
        for suite in ("amc", "math500")
    ]
    gains = score_table(models, PASS_1).gains
    assert [gain.p_value for gain in gains] == [2 / 16, 2 / 16, 2 / 256] * 2
    # Six comparisons: the two averages are the smallest.
    assert [gain.adjusted_p for gain in gains if gain.suite == "average"] == [6 * 2 / 256] * 2


def test_losing_is_worse():
    better, worse = greedy("a", set(range(8)), 8), greedy("b", set(), 8)
    (gain,) = score_table([better, worse], PASS_1).gains
    assert gain.difference == -1.0
    assert gain.verdict == "worse"


def test_several_completions_are_tested_by_the_signs_of_items():
    one = outcomes("a", {f"q{n}": [False, False] for n in range(12)})
    two = outcomes("b", {f"q{n}": [True, n % 2 == 0] for n in range(12)})
    metric = Metric(name="mean@2", way="sampled")
    (gain,) = score_table([one, two], metric).gains
    assert gain.difference == pytest.approx(0.75)  # half the items 1, half 1/2
    assert (gain.only_baseline, gain.only_candidate) == (None, None)
    assert gain.interval[0] > 0.5
    assert gain.p_value == 2 / 2**12  # all twelve one way: only that choice of signs and its mirror
    assert gain.verdict == "better"


@pytest.mark.parametrize(("name", "k"), [("mean@2", 1), ("pass@2", 2)])
@pytest.mark.parametrize(("won", "p", "verdict"), [(4, 2 / 16, "none seen"), (6, 2 / 64, "better")])
def test_few_items_that_moved_are_no_more_evidence_with_several_completions(
    name: str, k: int, won: int, p: float, verdict: str
):
    # 30 items of which few are won and none lost. A bootstrap of items calls four of them better.
    one = outcomes("a", {f"q{n}": [False, False] for n in range(30)})
    two = outcomes("b", {f"q{n}": [n < won] * 2 for n in range(30)})
    (gain,) = score_table([one, two], Metric(name=name, way="sampled", k=k)).gains
    assert (gain.p_value, gain.verdict) == (p, verdict)
    assert gain.interval[0] > 0


def test_pass_at_k_of_as_many_samples_is_won_or_lost_and_of_more_is_not():
    one = outcomes("a", {f"q{n}": [n == 0] + [False] * 3 for n in range(5)})
    two = outcomes("b", {f"q{n}": [n in (1, 2), False, False, n == 3] for n in range(5)})
    (whole,) = score_table([one, two], Metric(name="pass@4", way="sampled", k=4)).gains
    # Lost q0, won q1, q2 and q3: 2 * (1 + 4) / 2^4, McNemar's.
    assert (whole.only_baseline, whole.only_candidate, whole.p_value) == (1, 3, 10 / 16)
    (part,) = score_table([one, two], Metric(name="pass@2", way="sampled", k=2)).gains
    assert (part.only_baseline, part.only_candidate, part.p_value) == (None, None, 10 / 16)


def test_a_single_shared_item_says_nothing():
    one, two = (outcomes(label, {"q": [label == "b"] * 2}) for label in "ab")
    (gain,) = score_table([one, two], Metric(name="mean@2", way="sampled")).gains
    assert (gain.p_value, gain.verdict) == (1.0, "none seen")


def test_only_shared_items_are_compared():
    one, two = greedy("a", {0, 1}, 2), greedy("b", {0}, 4)
    table = score_table([one, two], PASS_1)
    (gain,) = table.gains
    assert gain.num_items == 2
    assert gain.difference == pytest.approx(-0.5)
    assert table.scores["b"]["amc"].mean == pytest.approx(0.25)
    assert table.notes == ("AMC: items 2 for a and 4 for b",)


def test_models_without_a_shared_suite_are_refused():
    with pytest.raises(DataError, match=r"'a' and 'b' share no suite \(amc against svamp\)"):
        score_table([greedy("a", {0}, 2), greedy("b", {0}, 2, suite="svamp")], PASS_1)


def test_a_suite_that_a_model_was_not_asked_is_outside_the_average():
    whole = [greedy("a", {0}, 4, suite=name) for name in ("amc", "math500", "svamp")]
    part = [greedy("b", {0}, 4, suite=name) for name in ("amc", "math500")]
    table = score_table([*whole, *part], PASS_1)
    assert table.averaged == ("amc", "math500")
    assert "svamp" not in table.scores["b"]


def test_models_asked_differently_are_noted_or_refused():
    table = score_table([greedy("a", {0}, 2), greedy("b", {0}, 2, max_tokens=50)], PASS_1)
    assert table.notes == ("AMC: tokens at most 100 for a and 50 for b",)
    with pytest.raises(DataError, match="item 'q0' of amc was put differently to 'a' and 'b'"):
        score_table([greedy("a", {0}, 2), greedy("b", {0}, 2, digest="other")], PASS_1)
    with pytest.raises(DataError, match="two outcomes of 'a' on amc"):
        score_table([greedy("a", {0}, 2), greedy("a", {0}, 2)], PASS_1)


def test_what_is_unlike_the_first_is_noted_and_not_what_others_are_to_each_other():
    first, *others = (
        greedy(label, {0}, 2, max_tokens=tokens)
        for label, tokens in (("a", 100), ("b", 50), ("c", 100), ("d", 25))
    )
    assert score_table([first, *others], PASS_1).notes == (
        "AMC: tokens at most 100 for a and 50 for b",
        "AMC: tokens at most 100 for a and 25 for d",
    )


def unlike(**changes: object) -> SuiteOutcomes:
    """Model "b", asked in another way than the others."""
    return replace(greedy("b", {0}, 2), asked_with=replace(ASKED_WITH, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"system": "Be brief."},
            "amc was put differently to 'a' and 'b': the system turn was none and 'Be brief.'; ask "
            "both alike, with --set model.system=...",
        ),
        (
            {"prompt_format": "text"},
            "the prompt format was 'chat' and 'text'; ask both alike, with --set model.prompt_f",
        ),
    ],
)
def test_models_that_recipes_put_the_items_to_differently_are_refused(
    changes: dict[str, object], said: str
):
    with pytest.raises(DataError) as refused:
        score_table([greedy("a", {0}, 2), unlike(**changes)], PASS_1)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"dtype": "bf16"}, "precision 'fp32' for a and 'bf16' for b"),
        (
            {"mix": Mix(name="runs/c", weight=0.5)},
            "mixture with none for a and 0.5 of runs/c for b",
        ),
        ({"stop_strings": ("Q:", "\n\n")}, r"stop strings none for a and 'Q:' '\n\n' for b"),
        ({"rollout": "tools:ask"}, "rollouts none for a and 'tools:ask' for b"),
    ],
)
def test_models_that_answer_in_another_way_are_noted(changes: dict[str, object], note: str):
    table = score_table([greedy("a", {0}, 2), unlike(**changes)], PASS_1)
    assert table.notes == (f"AMC: {note}",)


def test_that_it_is_not_known_how_a_model_was_asked_is_said_once():
    old = replace(greedy("old", {0}, 2), asked_with=None)
    told = (
        "AMC: how old was asked is not known (prompt format, system turn, rollouts, stop strings, "
        "precision): its outcomes are of before it was kept",
    )
    assert score_table([old, greedy("a", {0}, 2), greedy("b", {0}, 2)], PASS_1).notes == told
    assert score_table([old], PASS_1).notes == ()


def test_metrics_are_those_the_outcomes_allow():
    sampled = outcomes("a", {"q": [True] * 8})
    names = [metric.name for metric in metrics_of([greedy("a", {0}, 1), sampled], [2, 8])]
    assert names == ["greedy pass@1", "mean@8", "pass@2", "pass@8"]
    assert [metric.name for metric in metrics_of([sampled])] == ["mean@8", "pass@8"]
    with pytest.raises(ConfigError, match="k = 9 is not from 1 to the 8 samples"):
        metrics_of([sampled], [9])
    with pytest.raises(ConfigError, match="give --samples 4"):
        metrics_of([greedy("a", {0}, 1)], [4])
    with pytest.raises(ConfigError, match=r"have \[4, 8\] samples an item"):
        metrics_of([sampled, outcomes("b", {"q": [True] * 4})])


def best_of(label: str, count: int) -> SuiteOutcomes:
    one = outcomes(label, {"q": [True] * 2})
    return replace(one, way=replace(one.way, best_of=count))


def test_a_choice_among_draws_is_in_the_metrics_name_where_all_choose_alike():
    names = [metric.name for metric in metrics_of([best_of("a", 8), best_of("b", 8)])]
    assert names == ["mean@2, each the best of 8", "pass@2, each the best of 8"]
    mixed = [best_of("a", 1), best_of("b", 8)]
    (mean, _) = metrics_of(mixed)
    assert mean.name == "mean@2"
    assert score_table(mixed, mean).notes == (
        "AMC: completions are the best of 1 for a and 8 for b",
    )


def test_a_choice_among_draws_and_a_mixture_stand_beside_what_became_of_completions():
    chosen = best_of("a", 8)
    chosen = replace(chosen, asked_with=replace(ASKED_WITH, mix=Mix(name="c", weight=0.25)))
    console = Console(file=io.StringIO(), width=80)
    console.print(counts_table([chosen, greedy("b", {0}, 1)]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (place,) = [n for n, line in enumerate(lines) if "2 samples," in line]
    assert [line.strip() for line in lines[place + 1 : place + 3]] == [
        "best of 8,",
        "0.25 mixed in",
    ]
    assert "greedy" in lines[place + 3]


def test_the_table_is_json():
    written = json.loads(json.dumps(two_suites().as_dict()))
    assert [gain["verdict"] for gain in written["gains"]] == ["none seen", "better", "better"]


def colored(path: Path, color: str) -> int:
    """Pixels of about this colour."""
    pixels = image.imread(path)[..., :3]
    return int((np.abs(pixels - to_rgb(color)).max(axis=-1) < 0.02).sum())


def test_the_picture_shows_every_model_and_the_gains(tmp_path: Path):
    alone = score_table([greedy("GRPO", {0, 1}, 10)], PASS_1)
    one = plot_scores([alone], tmp_path / "one.png")
    assert colored(one, "#0072B2") > 20
    assert colored(one, "#D55E00") == 0
    both = plot_scores([two_suites()], tmp_path / "both.png")
    assert colored(both, "#0072B2") > 20
    height, width, _ = image.imread(both).shape
    gains = image.imread(both)[:, width // 2 :, :3]
    assert (np.abs(gains - to_rgb("#D55E00")).max(axis=-1) < 0.02).sum() > 20
    assert height < width


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(RunFolderError, match="the plot cannot be written"):
        plot_scores([two_suites()], tmp_path / "absent" / "plot.png")
