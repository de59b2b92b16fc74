"""Suites: their names, where their items come from, and in which order they are asked."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from tests.commands import jsonl

from gmpo.errors import ConfigError, DataError
from gmpo.suites import (
    DATA_FOLDER_VARIABLE,
    SUITES,
    check_folder_is_read,
    known_suites,
    suite_items,
)

ROWS = [{"id": f"q{n}", "problem": f"{n}+1", "answer": str(n + 1)} for n in range(6)]


def asked(items: tuple) -> list[str]:
    return [prompt.id for prompt in items]


def test_names_are_kept_in_order_and_unknown_or_doubled_ones_are_refused():
    assert [suite.name for suite in known_suites(["svamp", "amc"])] == ["svamp", "amc"]
    with pytest.raises(ConfigError, match="no suite 'math50'; did you mean 'math500'"):
        known_suites(["math50"])
    with pytest.raises(ConfigError, match="no suite 'sat'; there are aime24, amc"):
        known_suites(["sat"])
    with pytest.raises(ConfigError, match="'amc' is named twice"):
        known_suites(["amc", "amc"])


def test_fewer_items_are_the_first_of_all_in_one_order(tmp_path: Path):
    jsonl(tmp_path / "amc.jsonl", ROWS)
    every = suite_items(SUITES["amc"], folder=tmp_path).prompts
    assert sorted(asked(every)) == [row["id"] for row in ROWS]
    some = suite_items(SUITES["amc"], folder=tmp_path, items=3).prompts
    assert asked(some) == asked(every)[:3]
    with pytest.raises(DataError, match="9 items were asked for, and suite amc has 6"):
        suite_items(SUITES["amc"], folder=tmp_path, items=9)


def test_the_instruction_follows_each_problem(tmp_path: Path):
    jsonl(tmp_path / "amc.jsonl", ROWS[:1])
    for instruction, said in ((None, "final answer within \\boxed{}."), ("Be brief.", "Be brief.")):
        suite = suite_items(SUITES["amc"], folder=tmp_path, instruction=instruction)
        (message,) = suite.prompts[0].messages or ()
        assert message.content.startswith("0+1")
        assert message.content.endswith(said)


def test_the_variable_names_the_folder_unless_an_argument_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, rows in (("set", ROWS[:2]), ("given", ROWS[:3])):
        (tmp_path / name).mkdir()
        text = jsonl(tmp_path / "rows", rows).read_bytes()
        (tmp_path / name / "amc.jsonl.gz").write_bytes(gzip.compress(text))
    monkeypatch.setenv(DATA_FOLDER_VARIABLE, str(tmp_path / "set"))
    assert len(suite_items(SUITES["amc"]).prompts) == 2
    assert len(suite_items(SUITES["amc"], folder=tmp_path / "given").prompts) == 3


def test_a_suite_that_is_not_there_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no aime24.jsonl; download HuggingFaceH4/aime_2024"):
        suite_items(SUITES["aime24"], folder=tmp_path)
    with pytest.raises(DataError, match=r"none does not exist; download Hothan/OlympiadBench"):
        suite_items(SUITES["olympiadbench"], folder=tmp_path / "none")


def test_gsm8k_is_its_test_file_and_svamp_the_part_held_out():
    sizes = {name: len(suite_items(SUITES[name]).prompts) for name in ("gsm8k", "svamp")}
    assert sizes == {"gsm8k": 1319, "svamp": 300}


def test_a_folder_that_is_not_read_is_refused_or_noted():
    notes: list[str] = []
    check_folder_is_read(known_suites(["amc", "math500"]), warn=notes.append)
    assert notes == []
    check_folder_is_read(known_suites(["amc", "gsm8k"]), warn=notes.append)
    assert notes == ["--data does not replace what comes with the package: gsm8k"]
    with pytest.raises(ConfigError, match="--data would do nothing for svamp; leave it out"):
        check_folder_is_read(known_suites(["svamp"]), warn=notes.append)
    with pytest.raises(ConfigError, match="would do nothing for a task"):
        check_folder_is_read([], warn=notes.append)
