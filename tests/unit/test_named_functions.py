"""Functions named in a recipe: found here or on the path, refused with what is there instead."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from gmpo.errors import ConfigError
from gmpo.named_functions import load_function, reference_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(reference: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_function(reference, key="reward.functions.mine")
    return str(caught.value).removeprefix(f"reward.functions.mine = {reference!r}: ")


def test_a_function_is_found_in_the_current_folder_with_its_neighbours(here: Path):
    (here / "judge_scale.py").write_text("SCALE = 3\n")
    (here / "judge_a.py").write_text(
        "from judge_scale import SCALE\n"
        "class Judge:\n"
        "    @staticmethod\n"
        "    def reward(**kwargs):\n"
        "        return SCALE\n"
    )
    assert load_function("judge_a:Judge.reward", key="k")() == 3


def test_a_function_is_found_on_pythons_path():
    assert load_function("os.path:join", key="k")("a", "b") == str(Path("a") / "b")


@pytest.mark.parametrize("reference", ["judge", "judge:", ":reward", ""])
def test_a_reference_of_another_form_is_refused(reference: str):
    assert refusal(reference) == "it must be 'module:function'"


def test_a_missing_module_is_named_with_where_it_was_looked_for(here: Path):
    assert refusal("judge_b:reward") == (
        "importing 'judge_b' raised ModuleNotFoundError: No module named 'judge_b'; modules are "
        f"looked for in {here} and on Python's path"
    )


def test_a_module_that_breaks_is_named_with_its_error(here: Path):
    (here / "judge_c.py").write_text("1 / 0\n")
    assert refusal("judge_c:reward").startswith(
        "importing 'judge_c' raised ZeroDivisionError: division by zero"
    )


def test_a_module_that_exits_is_named_and_the_process_lives(here: Path):
    (here / "judge_f.py").write_text("raise SystemExit(3)\n")
    assert refusal("judge_f:reward").startswith("importing 'judge_f' raised SystemExit: 3")


def test_a_misspelt_function_gets_the_nearest_name(here: Path):
    (here / "judge_d.py").write_text("def reward(**kwargs): return []\nLIMIT = 3\n")
    assert refusal("judge_d:rewards") == "'judge_d' has no 'rewards'; did you mean 'reward'?"
    assert refusal("judge_d:zzz") == "'judge_d' has no 'zzz'"
    assert refusal("judge_d:LIMIT") == "it is int; it must be a function"


class Judge:
    def __call__(self) -> None: ...


def test_an_object_is_recorded_by_where_it_was_defined():
    assert reference_of(reference_of) == "gmpo.named_functions:reference_of"
    assert reference_of(Judge()).endswith("test_named_functions:Judge")
    assert reference_of(partial(print, "a")) == "functools:partial"
