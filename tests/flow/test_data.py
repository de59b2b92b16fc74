"""`gmpo data check` on files, and its accepted rows as a task."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from tests.commands import gmpo, jsonl, refusal
from tests.data_batches import sums
from tests.models import save_tiny

from gmpo.tasks import jsonl_task


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = jsonl(tmp_path / "batch.jsonl", [*sums(6), {"prompt": "a@b.kr", "answer": "1"}])
    with path.open("a") as file:
        file.write('{"prompt": "cut off\n')
    return path


def test_a_batch_is_split_and_the_accepted_rows_are_a_task(batch: Path):
    out = batch.parent / "out"
    done = gmpo("data", "check", batch, "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert report["counts"] == {"rows": 8, "accepted": 6, "rejected": 2, "pii": 1, "schema": 1}
    assert lines(out / "accepted.jsonl") == sums(6)
    rejected = lines(out / "rejected.jsonl")
    assert rejected[0]["row"] == {"prompt": "a@b.kr", "answer": "1"}
    assert rejected[1]["row"] == {"text": '{"prompt": "cut off'}
    assert "batch.jsonl:8: not readable as JSON" in rejected[1]["reasons"][0]["detail"]
    assert stat.S_IMODE((out / "rejected.jsonl").stat().st_mode) == 0o600
    task = jsonl_task(path=out / "accepted.jsonl", held_out_items=2)
    assert len(task.train) == 4
    # The second batch repeats the first, and so nothing is left of it.
    again = gmpo("data", "check", batch, "--earlier", out, "--out", batch.parent / "again")
    assert again.exit_code == 3, again.stderr
    assert "is refused: 0 accepted" in again.stdout
    assert "6 duplicate" in again.stdout
    assert "was refused; leave it out" in refusal(
        "data", "check", batch, "--earlier", batch.parent / "again", "--out", batch.parent / "new"
    )


def test_a_model_is_asked_and_suites_are_kept_out(batch: Path):
    folder = batch.parent
    copied = sums(6)[2]["prompt"]
    jsonl(folder / "amc.jsonl", [{"id": "copied", "problem": copied, "answer": "5"}])
    model = save_tiny(folder / "tiny")
    asked = (
        *("--model", model, "--samples", "2", "--max-tokens", "3", "--set", "model.dtype=fp32"),
        *("--suite", "amc", "--data", folder),
    )
    done = gmpo("data", "check", batch, *asked, "--out", folder / "one", "--json")
    assert done.exit_code == 3, done.stderr  # random weights solve nothing
    counts = json.loads(done.stdout)["counts"]
    assert (counts["never_solved"], counts["contamination"], counts["accepted"]) == (5, 1, 0)
    kept = ("--set", "reject_never_solved=false", "--earlier", jsonl(folder / "e.jsonl", sums(9)))
    done = gmpo("data", "check", batch, *asked, *kept, "--out", folder / "two", "--json")
    report = json.loads(done.stdout)
    assert report["counts"]["duplicate"] == 6
    fresh = jsonl(folder / "fresh.jsonl", sums(5, seed=7))
    done = gmpo("data", "check", fresh, *asked, *kept, "--out", folder / "three", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert [figure["name"] for figure in report["shift"]] == ["length", "script", "difficulty"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{folder}/none.jsonl", "--out", "{folder}/new/o"), "none.jsonl does not exist"),
        (("{folder}/empty.jsonl", "--out", "{folder}/o"), "the batch holds no row"),
        (("{batch}", "--out", "{folder}"), "is there already and not empty"),
        (("{batch}", "--out", "{folder}/o", "--suite", "gsm9k"), "did you mean 'gsm8k'"),
        (("{batch}", "--out", "{folder}/o", "--set", "alhpa=0.1"), "did you mean 'alpha'"),
        (("{batch}", "--out", "{folder}/o", "--set", "model.dtype=fp32"), "name one with --model"),
        (("{batch}", "--out", "{folder}/o", "--model", "x", "--samples", "0"), "--samples is 0"),
        (("{batch}", "--out", "{folder}/o", "--earlier", "{folder}/no"), "no does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    batch: Path, arguments: tuple[str, ...], said: str
):
    (batch.parent / "empty.jsonl").write_text("\n")
    words = [word.format(batch=batch, folder=batch.parent) for word in arguments]
    there = sorted(batch.parent.iterdir())
    assert said in refusal("data", "check", *words)
    assert sorted(batch.parent.iterdir()) == there


def test_an_empty_folder_that_was_there_before_a_failure_stays(batch: Path):
    out = batch.parent / "out"
    out.mkdir()
    refusal("data", "check", batch, "--out", out, "--earlier", batch.parent / "none")
    assert list(out.iterdir()) == []
