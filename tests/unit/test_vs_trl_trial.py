"""The trial that finds TRL's best setting: the fastest that does the update, whatever gmpo does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from benchmarks.comparison import Bench, choose_setup, setups_of, usable_of
from benchmarks.exchange import Scratch
from benchmarks.options import BenchmarkError
from benchmarks.results import Results
from benchmarks.worker import TookTooLong, WorkerFailed
from benchmarks.workloads import WORKLOADS

ALIKE = {"difference": 1e-3, "cosine": 0.98, "gradient_cosine": 0.998}
APART = ALIKE | {"cosine": 0.9}


@dataclass
class Trial:
    """What stands for TRL's settings and gmpo.

    Attributes:
        seconds: of a setting's round; a setting without any fails.
        again: of its second round, where that is another.
        compared: of gmpo's replay with that round.
        to_fp32: cosines of the setting to TRL in fp32.
        rounds: setting and number of prompts of each round that was asked for.
        asked_fp32: settings that TRL in fp32 was asked about.
    """

    seconds: dict[str, float]
    again: dict[str, float] = field(default_factory=dict)
    compared: dict[str, dict[str, float]] = field(default_factory=dict)
    to_fp32: dict[str, dict[str, float]] = field(default_factory=dict)
    rounds: list[tuple[str, int]] = field(default_factory=list)
    asked_fp32: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StubSide:
    trial: Trial
    what: str

    def ask(self, command: str, *, within: float | None = None, **arguments: Any) -> dict[str, Any]:
        trial = self.trial
        if command == "about":
            return {"dtype": "bf16"}
        if command == "round":
            asked = (self.what, arguments["live_groups"])
            seconds_of = trial.seconds | (trial.again if asked in trial.rounds else {})
            trial.rounds.append(asked)
            if self.what not in seconds_of:
                raise WorkerFailed("its log ends:\nRuntimeError: no such cache")
            seconds = seconds_of[self.what]
            if within is not None and seconds > within:
                raise TookTooLong("it had not answered")
            return {"round_seconds": seconds, "rollout_seconds": 1.0, "update_seconds": 1.0}
        last = trial.rounds[-1][0]
        if self.what == "gmpo":
            return {"update_seconds": 1.0, **trial.compared.get(last, ALIKE)}
        trial.asked_fp32.append(last)
        return trial.to_fp32[last]


@dataclass(frozen=True, kw_only=True)
class StubBench(Bench):
    trial: Trial

    @contextmanager
    def trl(self, setup: str) -> Iterator[StubSide]:
        yield StubSide(self.trial, setup)

    @contextmanager
    def exact_trl(self) -> Iterator[StubSide]:
        yield StubSide(self.trial, "exact")

    @contextmanager
    def gmpo(self) -> Iterator[StubSide]:
        yield StubSide(self.trial, "gmpo")


def choose(trial: Trial, path: Path, said: list[str] | None = None) -> str:
    bench = StubBench(
        workload=WORKLOADS["short"],
        dtype="auto",
        threads=1,
        scratch=Scratch(folder=path.parent),
        say=(said if said is not None else []).append,
        trial=trial,
    )
    results = Results(path, {})
    best = choose_setup(bench, results)
    # Which setting a file holds is decided where it is compared with the stored one.
    assert "trl_setup" not in results.content
    return best


def seconds_of_all() -> dict[str, float]:
    """Each setting is a second faster than the one before."""
    names = setups_of("auto")
    return {name: 20.0 - place for place, name in enumerate(names)}


def test_the_fastest_setting_is_taken_from_rounds_of_fewer_prompts(tmp_path: Path):
    trial = Trial(seconds_of_all() | {"fp32/static_cache": 3.0})
    assert choose(trial, tmp_path / "x.json") == "fp32/static_cache"
    assert trial.rounds == [(name, 4) for name in setups_of("auto")]
    assert trial.asked_fp32 == []


def test_a_setting_that_fails_is_left_out_and_the_others_are_tried(tmp_path: Path):
    seconds = seconds_of_all()
    del seconds["bf16_weights/continuous_batching"]
    said: list[str] = []
    assert choose(Trial(seconds), tmp_path / "x.json", said) == "bf16_weights/static_cache"
    failed = [line for line in said if "bf16_weights/continuous_batching" in line]
    assert failed[0].endswith("excluded: it failed: RuntimeError: no such cache")


def test_settings_close_to_the_fastest_do_another_round_and_the_faster_one_counts(tmp_path: Path):
    seconds = {"fp32/generate": 10.0, "fp32/static_cache": 20.0, "bf16_autocast/generate": 20.1}
    trial = Trial(seconds, again={"fp32/generate": 11.0, "fp32/static_cache": 9.0})
    path = tmp_path / "x.json"
    assert choose(trial, path) == "fp32/static_cache"
    assert trial.rounds[len(setups_of("auto")) :] == [
        ("fp32/generate", 4),
        ("fp32/static_cache", 4),
    ]
    # Both rounds are in the file, so that nothing but what failed is asked again.
    later = Trial({})
    assert choose(later, path) == "fp32/static_cache"
    assert {name for name, _ in later.rounds} == set(setups_of("auto")) - set(seconds)


def test_a_round_far_slower_than_the_fastest_is_ended_and_not_tried_again(tmp_path: Path):
    path, said = tmp_path / "x.json", list[str]()
    # The first has no bound; twice 40 s is more than a minute.
    seconds = {"fp32/generate": 900.0, "fp32/static_cache": 40.0, "bf16_autocast/generate": 80.0}
    trial = Trial(seconds | {"bf16_weights/generate": 80.1})
    assert choose(trial, path, said) == "fp32/static_cache"
    (ended,) = [line for line in said if "bf16_weights/generate" in line]
    assert ended.endswith("excluded: its round was ended after 80 s, far more than another took")
    later = Trial({})
    assert choose(later, path) == "fp32/static_cache"
    assert "bf16_weights/generate" not in {name for name, _ in later.rounds}


def test_no_round_is_ended_within_a_minute(tmp_path: Path):
    trial = Trial({"fp32/generate": 1.0, "fp32/static_cache": 60.0})
    choose(trial, tmp_path / "x.json")
    assert (
        usable_of(Results(tmp_path / "x.json", {}).content["trial"]).keys() == trial.seconds.keys()
    )


def test_a_setting_that_failed_is_tried_again_when_the_trial_goes_on(tmp_path: Path):
    path = tmp_path / "x.json"
    assert choose(Trial({"fp32/generate": 10.0}), path) == "fp32/generate"
    assert choose(Trial({"fp32/static_cache": 4.0}), path) == "fp32/static_cache"


@pytest.mark.parametrize(
    ("to_fp32", "best"),
    [
        # Rounding led the faster one away, but it does the update: gmpo is compared with it.
        ({"cosine": 0.83, "gradient_cosine": 0.998}, "bf16_autocast/generate"),
        ({"cosine": 0.71, "gradient_cosine": 0.99}, "bf16_autocast/generate"),
        # Its steps vanish.
        ({"cosine": 0.70, "gradient_cosine": 0.998}, "fp32/generate"),
        ({"cosine": 0.98, "gradient_cosine": 0.98}, "fp32/generate"),
        ({"cosine": float("nan"), "gradient_cosine": 0.998}, "fp32/generate"),
    ],
)
@pytest.mark.parametrize("compared", [APART, ALIKE | {"gradient_cosine": 0.98}])
def test_a_setting_whose_update_is_not_gmpos_is_judged_by_trl_in_fp32(
    tmp_path: Path, to_fp32: dict[str, float], best: str, compared: dict[str, float]
):
    trial = Trial(
        {"fp32/generate": 20.0, "bf16_autocast/generate": 10.0},
        compared={"bf16_autocast/generate": compared},
        to_fp32={"bf16_autocast/generate": to_fp32},
    )
    said: list[str] = []
    assert choose(trial, tmp_path / "x.json", said) == best
    assert trial.asked_fp32 == ["bf16_autocast/generate"]
    line = next(line for line in said if "bf16_autocast/generate" in line)
    assert f"its own to TRL in fp32 {to_fp32['cosine']:.4f}" in line
    assert ("excluded" in line) == (best == "fp32/generate")


def test_where_no_setting_is_left_each_ones_reason_is_said(tmp_path: Path):
    wrong = {"cosine": 0.18, "gradient_cosine": 0.998}
    trial = Trial(
        {"bf16_weights/generate": 5.0},
        compared={"bf16_weights/generate": APART},
        to_fp32={"bf16_weights/generate": wrong},
    )
    with pytest.raises(BenchmarkError) as refusal:
        choose(trial, tmp_path / "x.json")
    said = str(refusal.value)
    assert said.startswith("no setting of TRL can be compared with: fp32/generate: it failed: ")
    assert "bf16_weights/generate: the cosine between its update" in said and "0.1800" in said
    assert "{" not in said


def test_a_trial_that_was_interrupted_goes_on_with_the_settings_that_are_left(tmp_path: Path):
    path = tmp_path / "x.json"
    first = Trial(seconds_of_all())
    choose(first, path)
    results = Results(path, {})
    del results.content["trial"]["fp32/generate"]
    results.save()
    again = Trial({"fp32/generate": 1.0})
    assert choose(again, path) == "fp32/generate"
    assert again.rounds == [("fp32/generate", 4)]
