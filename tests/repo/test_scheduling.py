"""Tests that share fixtures run on one worker, and the real model is never loaded twice at once."""

from __future__ import annotations

import pytest
from tests.scheduling import REAL_MODEL, scope_of_file


def test_a_file_is_a_scope_and_all_files_with_the_real_model_are_one():
    assert scope_of_file("tests/flow/test_tune.py") == "tests/flow/test_tune.py"
    for name in ("flow/test_cli.py", "unit/test_load.py", "unit/test_continual_batch.py"):
        assert scope_of_file(f"tests/{name}") == REAL_MODEL


@pytest.mark.parametrize("number", range(4))
def test_all_tests_of_this_file_run_in_one_process(
    number: int, worker_id: str, tmp_path_factory: pytest.TempPathFactory
):
    own = tmp_path_factory.getbasetemp()
    marks = (own if worker_id == "master" else own.parent) / "scheduling"
    marks.mkdir(exist_ok=True)
    (marks / worker_id).touch()
    assert len(list(marks.iterdir())) == 1, f"a test before {number} ran in another process"
