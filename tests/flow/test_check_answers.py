"""The check of reference answers against themselves: its counts, its failures, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import check_answers

from gmpo.tracking import provenance

ROWS = [
    {"problem": "one and one?", "answer": "2"},
    {"problem": "a half?", "answer": r"\frac{1}{2}"},
    {"problem": "a loss of fifty cents?", "answer": r"-\$0.50"},
]


def test_what_fails_is_counted_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "report.json"
    assert check_answers.main([str(tmp_path), "--failures", "1", "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2] == "| sums | 3 | 2 (66.67%) | 3 (100.00%) | 0 | 0 |"
    assert "sums sums-3 as it stands" in shown.err
    assert "was read as '0.50', graded" in shown.err
    report = json.loads(file.read_text())
    assert report["made_with"] == provenance()
    [sums] = report["files"]
    assert sums["right"] == {"as it stands": 2, "boxed": 3}
    [failure] = sums["failures"]
    assert (failure["item"], failure["form"]) == ("sums-3", "as it stands")
    assert (failure["answer"], failure["read_as"]) == (r"-\$0.50", "0.50")


@pytest.mark.parametrize(("name", "told"), [(".", "holds no"), ("none.jsonl", "does not exist")])
def test_no_file_is_an_error(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert check_answers.main([str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.out == ""
