"""From a recipe to a trained tiny model, once for each source of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.commands import gmpo, jsonl, refusal
from tests.saved_datasets import cache_as_hub, sums
from tests.tiny_runs import COMMON_START, metric_lines

from gmpo.tracking import read_lines

SIZES = {"group_size": 4, "prompts_per_round": 4, "max_new_tokens": 3, "max_length": 200}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    yield folder


def train(model: str, folder: Path, task: str) -> tuple[Path, str]:
    """A run of one round on the `[task]` table given, and what the command wrote to stderr."""
    recipe = folder / "recipe.toml"
    sizes = "\n".join(f"{name} = {value}" for name, value in SIZES.items())
    recipe.write_text(
        f"[task]\n{task}\n[sampling]\n{sizes}\n"
        f"[model]\nname = '{model}'\ndevice = 'cpu'\ndtype = 'fp32'\n"
        f"[reward]\nformat_pattern = '{COMMON_START}'\nweights = {{correct = 1.0, format = 1.0}}\n"
        "[training]\nrounds = 1\nsteps_per_round = 2\nlearning_rate = 1e-3\n"
        "[evaluation]\nevery_rounds = 0\nfew_shot = 1\nsampled = false\n"
    )
    result = gmpo("train", recipe, "--run", folder / "run")
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return folder / "run", result.stderr


def outcomes(run: Path) -> list[dict[str, Any]]:
    """Each evaluation's outcomes by item, before and after training."""
    stages = list(read_lines(run, "evaluations.jsonl"))
    assert [stage["stage"] for stage in stages] == ["before", "after"]
    return [result["outcomes"] for stage in stages for result in stage["results"]]


def test_a_data_set_in_the_hubs_cache_trains_a_model(model: str, tmp_path: Path, cache: Path):
    rows = [*sums(*range(9)), {"question": "unanswered", "answer": None, "level": 0}]
    cache_as_hub("owner/tiny_sums", cache, train=rows, test=sums(20, 21, 22))
    run, notes = train(
        model,
        tmp_path,
        'kind = "dataset"\nname = "owner/tiny_sums"\nheld_out_split = "test"\n'
        'prompt_column = "question"\nanswer_marked = true\nunusable_rows = "drop"\n'
        "where = {level = [0, 1]}\nheld_out_where = {level = [0, 2]}",
    )
    # 20 and 21 leave 2 and 0 when divided by 3, 22 leaves 1.
    assert all(set(items) == {"test-0", "test-1"} for items in outcomes(run))
    assert "task tiny_sums: 1 rows without a usable problem or answer left out" in notes
    # Of 0 to 8, three numbers leave 2; of the test rows, one leaves 1.
    assert "task tiny_sums: 4 rows that `where` does not want left out" in notes
    (line,) = metric_lines(run, "round")
    assert line["rollout/errors_total"] == 0
    assert "rollout/reward/correct" in line


def test_a_folder_of_problem_files_trains_a_model(model: str, tmp_path: Path):
    train_files, test_files = tmp_path / "train", tmp_path / "test"
    for folder, offset in ((train_files, 0), (test_files, 50)):
        folder.mkdir()
        for name in ("a", "b"):
            offset += 10
            rows = [
                {"problem": f"{n} or {n}?", "answer": str(n), "answers": [str(n), f"{n}.0"]}
                for n in range(offset, offset + 6)
            ]
            jsonl(folder / f"{name}{offset}.jsonl", rows)
    run, _ = train(
        model, tmp_path, f"kind = 'jsonl'\npath = ['{train_files}']\nheld_out_path = '{test_files}'"
    )
    expected = {f"{stem}-{line}" for stem in ("a60", "b70") for line in range(1, 7)}
    assert all(set(items) == expected for items in outcomes(run))


def test_a_task_of_reasoning_gym_trains_a_model(model: str, tmp_path: Path):
    run, _ = train(
        model,
        tmp_path,
        'kind = "gym"\nname = "chain_sum"\ntrain_items = 12\nheld_out_items = 4\n'
        "options = {min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1}",
    )
    (line,) = metric_lines(run, "round")
    assert line["grading/scorer_errors_total"] == line["grading/timeouts_total"] == 0
    for items in outcomes(run):
        assert len(items) == 4
        assert all(name.startswith("chain_sum-") for name in items)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            'kind = "dataset"\nname = "owner/x"\npromt_column = "q"',
            "unknown key 'task.promt_column'; did you mean 'task.prompt_column'?",
        ),
        (
            'kind = "gym"\nname = "chain_sum"\nunusable_rows = "skip"',
            "unknown key 'task.unusable_rows'; ",
        ),
        (
            'kind = "jsonl"\npath = "x.jsonl"\nunusable_rows = "skip"',
            "task.unusable_rows = 'skip': input should be 'refuse' or 'drop'",
        ),
        ('kind = "gym"', "missing key 'task.name'"),
    ],
)
def test_a_wrong_task_table_is_refused_by_key(tmp_path: Path, table: str, message: str):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[task]\n{table}\n")
    assert message in refusal("train", recipe)


def test_a_wrong_column_is_refused_by_the_command_before_anything_is_trained(
    model: str, tmp_path: Path
):
    path = jsonl(tmp_path / "x.jsonl", [{"question": "1?", "answer": "1"}] * 3)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[task]\nkind = 'jsonl'\npath = '{path}'\n[model]\nname = '{model}'\n")
    assert refusal("train", recipe, "--run", tmp_path / "run") == (
        f"{path}:1: neither 'prompt' nor 'problem' is there, only ['answer', 'question']; say with "
        "prompt_column which one holds the problem"
    )
