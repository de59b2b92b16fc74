"""The mutation check's edits still fit the code, so that a rewrite cannot quietly switch it off."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def load_edits():
    path = REPOSITORY / "scripts" / "mutation_edits.py"
    spec = importlib.util.spec_from_file_location("mutation_edits", path)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.EDITS


EDITS = load_edits()


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.file}: {edit.why}")
def test_an_edit_applies_to_exactly_one_place(edit):
    text = (REPOSITORY / "src" / "gmpo" / edit.file).read_text()
    assert text.count(edit.old) == 1, f"{edit.file}: bring the edit {edit.why!r} up to date"
    assert edit.new != edit.old
    compile(text.replace(edit.old, edit.new), edit.file, "exec")


def test_every_file_of_the_objective_is_edited():
    files = {path.name for path in (REPOSITORY / "src" / "gmpo" / "objective").glob("*.py")}
    edited = {Path(edit.file).name for edit in EDITS}
    assert files - {"__init__.py"} <= edited
    assert "advantages.py" in edited
