"""Tasks from the real `datasets` library, offline: saved folders, data files, the hub's cache."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from tests.saved_datasets import COMMIT, cache_as_hub, data_files, sums

from gmpo.errors import DataError
from gmpo.tasks import RowForm, Task, dataset_task
from gmpo.tasks import dataset as dataset_module
from gmpo.tasks.splits import question_text

WORKED = RowForm(prompt_column="question", answer_is_marked=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of our own; the library reads its setting when it is imported."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    yield folder


def refusal(**arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        dataset_task(**{"form": WORKED, **arguments})
    return str(caught.value)


def ids(task: Task) -> tuple[list[str], list[str]]:
    return [p.id for p in task.train], [p.id for p in task.held_out]


# Where a data set may lie


def test_a_saved_data_set_of_several_splits_gives_both_sides(tmp_path: Path):
    splits = {"train": sums(1, 2, 3), "test": sums(4)}
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    )
    saved.save_to_disk(tmp_path / "two")
    task = dataset_task(
        name=str(tmp_path / "two"), held_out_split="test", instruction="Be brief.", form=WORKED
    )
    assert task.name == "two"
    assert ids(task) == (["train-0", "train-1", "train-2"], ["test-0"])
    assert task.train[1].messages is not None
    assert task.train[1].messages[0].content == "What is 2 + 2?\nBe brief."
    assert task.train[1].columns == {"answer": "4", "level": 2}


def test_one_saved_data_set_is_split_by_question(tmp_path: Path):
    rows = [*sums(*range(10)), *sums(*range(10))]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    task = dataset_task(name=str(tmp_path / "one"), held_out_items=6, form=WORKED)
    train, held_out = (
        {question_text(prompt) for prompt in side} for side in (task.train, task.held_out)
    )
    assert (len(task.train), len(task.held_out)) == (14, 6)
    assert train.isdisjoint(held_out)


def test_a_saved_data_set_keeps_the_name_of_the_split_it_came_from(tmp_path: Path):
    rows = datasets.Dataset.from_list(sums(1, 2), split=datasets.Split.TEST)
    rows.save_to_disk(tmp_path / "one")
    task = dataset_task(name=str(tmp_path / "one"), split="test", form=WORKED)
    assert ids(task)[0] == ["test-0", "test-1"]


def test_a_format_that_was_saved_with_the_data_set_makes_no_tensors(tmp_path: Path):
    rows = datasets.Dataset.from_list([{"problem": "p", "answer": 3, "level": 1}])
    rows.with_format("numpy").save_to_disk(tmp_path / "formatted")
    (prompt,) = dataset_task(name=str(tmp_path / "formatted")).train
    assert prompt.columns == {"answer": "3", "level": 1}
    assert type(prompt.columns["level"]) is int


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_folder_of_data_files_is_a_data_set(tmp_path: Path, kind: str):
    folder = data_files(tmp_path / "files", train=sums(1, 2), test=sums(3))
    if kind != "jsonl":
        for path in list(folder.iterdir()):
            rows = datasets.Dataset.from_list(
                [json.loads(line) for line in path.read_text().splitlines()]
            )
            new = str(path.with_suffix(f".{kind}"))
            rows.to_parquet(new) if kind == "parquet" else rows.to_csv(new)
            path.unlink()
    task = dataset_task(name=str(folder), held_out_split="test", form=WORKED)
    assert ids(task) == (["train-0", "train-1"], ["test-0"])
    assert [p.columns["answer"] for p in task.train] == ["2", "4"]


def test_a_hub_data_set_is_loaded_from_the_cache_when_the_hub_is_out_of_reach(cache: Path):
    cache_as_hub("owner/tiny_sums", cache, train=sums(1, 2), test=sums(3))
    task = dataset_task(name="owner/tiny_sums", held_out_split="test", form=WORKED)
    assert task.name == "tiny_sums"
    assert ids(task) == (["train-0", "train-1"], ["test-0"])
    pinned = dataset_task(name="owner/tiny_sums", revision=COMMIT, form=WORKED)
    assert pinned.train == task.train


def test_a_cached_copy_of_another_revision_is_refused(cache: Path):
    cache_as_hub("owner/tiny_sums", cache, train=sums(1, 2))
    start = (
        f"the hub cannot be reached, and the cached copy of owner/tiny_sums is of commit {COMMIT}; "
    )
    end = "; name that commit, or go online"
    other = "f" * 40
    assert refusal(name="owner/tiny_sums", revision=other) == (
        f"{start}revision '{other}' is another{end}"
    )
    assert refusal(name="owner/tiny_sums", revision="v1.0") == (
        f"{start}revision 'v1.0' is not comparable with it{end}"
    )


# The shapes of the field


def test_texts_and_chats_with_extra_columns_are_prompts(tmp_path: Path):
    chats = [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"{n}?"}],
            "solution": str(n),
            "difficulty": n,
        }
        for n in (1, 2)
    ]
    texts = [{**row, "prompt": f"{row['difficulty']}?"} for row in chats]
    datasets.Dataset.from_list(chats).save_to_disk(tmp_path / "chats")
    datasets.Dataset.from_list(texts).save_to_disk(tmp_path / "texts")
    form = RowForm(answer_column="solution")
    chat, text = (
        dataset_task(name=str(tmp_path / name), form=form).train[0] for name in ("chats", "texts")
    )
    assert chat.messages is not None and text.messages is not None
    assert [(m.role, m.content) for m in chat.messages] == [("system", "s"), ("user", "1?")]
    assert [(m.role, m.content) for m in text.messages] == [("user", "1?")]
    assert chat.columns == text.columns == {"solution": "1", "difficulty": 1, "answer": "1"}


def test_rows_are_filtered_on_each_side_by_its_own_rule(tmp_path: Path):
    folder = data_files(tmp_path / "files", train=sums(*range(9)), test=sums(10, 11, 12))
    form = RowForm(prompt_column="question", answer_is_marked=True, where={"level": (0, 1)})
    task = dataset_task(
        name=str(folder), held_out_split="test", form=form, held_out_where={"level": (2,)}
    )
    assert {p.columns["level"] for p in task.train} == {0, 1}
    assert [p.columns["level"] for p in task.held_out] == [2]
    assert task.notes() == ["task files: 5 rows that `where` does not want left out"]


# Memory


def test_a_long_data_set_is_in_memory_once(tmp_path: Path):
    words = "word " * 400
    rows = [{"problem": f"{n} {words}", "answer": str(n)} for n in range(2000)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "long")
    del rows
    dataset_task(name=str(tmp_path / "long"), held_out_items=10)  # imports are not the question
    gc.collect()
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    task = dataset_task(name=str(tmp_path / "long"), held_out_items=10, instruction="Answer.")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    texts = sum(len(p.messages[0].content) for p in (*task.train, *task.held_out) if p.messages)
    assert kept >= texts == 2000 * (2000 + 8) + sum(len(f"{n} ") for n in range(2000))
    assert peak < 1.3 * kept
    assert pa.total_allocated_bytes() - arrow_before < 0.5 * texts


# What is refused


def test_a_missing_split_is_named_with_those_that_exist(tmp_path: Path):
    folder = data_files(tmp_path / "files", train=sums(1), test=sums(2))
    message = f"data set {folder} has no split 'validation'; it has ['train', 'test']"
    assert refusal(name=str(folder), held_out_split="validation") == message
    datasets.Dataset.from_list(sums(1)).save_to_disk(tmp_path / "one")
    assert refusal(name=str(tmp_path / "one"), split="test").endswith(
        "has no split 'test'; it has ['train']"
    )
    assert refusal(name=str(folder), held_out_split="train") == (
        "split and held_out_split are both 'train'; leave held_out_split out to split "
        "held_out_items rows off"
    )


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path):
    folder = data_files(tmp_path / "files", train=sums(1))
    assert refusal(name=str(folder), form=RowForm(prompt_column="questions")) == (
        f"{folder}[train]: there is no column 'questions'; did you mean 'question'? there are "
        "['answer', 'level', 'question']"
    )


def test_a_row_without_an_answer_is_named_or_left_out(tmp_path: Path):
    rows = [*sums(1, 2), {"question": "What is 3 + 3?", "answer": None, "level": 0}]
    folder = data_files(tmp_path / "files", train=rows)
    assert refusal(name=str(folder)).startswith(f"{folder}[train] row 2: answer is missing; ")
    form = RowForm(prompt_column="question", answer_is_marked=True, unusable="drop")
    task = dataset_task(name=str(folder), form=form)
    assert ids(task)[0] == ["train-0", "train-1"]
    assert task.notes() == ["task files: 1 rows without a usable problem or answer left out"]


def test_repeated_ids_and_chats_beside_texts_are_refused_by_row(tmp_path: Path):
    repeated = [{"problem": f"{n}?", "answer": "1", "id": "same"} for n in (1, 2)]
    folder = data_files(tmp_path / "repeated", train=repeated)
    assert refusal(name=str(folder), form=RowForm()) == (
        f"{folder}[train] row 1: id 'train-same' was used by {folder}[train] row 0; "
        "make the ids differ"
    )
    mixed = [
        {"prompt": "a", "answer": "1"},
        {"prompt": [{"role": "user", "content": "b"}], "answer": "1"},
    ]
    folder = data_files(tmp_path / "mixed", train=mixed)
    assert refusal(name=str(folder), form=RowForm()) == (
        f"{folder}[train] row 1: the prompt is a chat, but at {folder}[train] row 0 it is a text; "
        "make all prompts of a data set texts, or all chats"
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train.jsonl", b'{"problem": "\xff", "answer": "1"}\n'),
        ("train.csv", b"problem,answer\n\xff,1\n"),
    ],
)
def test_files_that_are_not_utf8_are_refused(tmp_path: Path, file: str, content: bytes):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / file).write_bytes(content)
    message = refusal(name=str(folder), form=RowForm())
    assert str(folder) in message
    assert "'utf-8' codec can't decode byte 0xff" in message


def test_an_empty_folder_an_empty_data_set_and_a_damaged_one_are_refused(tmp_path: Path):
    (tmp_path / "nothing").mkdir()
    assert "doesn't contain any data files" in refusal(name=str(tmp_path / "nothing"))
    empty = datasets.Dataset.from_dict({"problem": [], "answer": []})
    empty.save_to_disk(tmp_path / "empty")
    assert refusal(name=str(tmp_path / "empty")) == (
        f"the data set saved in {tmp_path}/empty cannot be read (list index out of range); is one "
        "without rows in it?"
    )
    folder = data_files(tmp_path / "headless", train=[])
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text("problem,answer\n")
    assert refusal(name=str(folder), form=RowForm()) == (
        f"{folder}[train] holds no row; it needs at least one"
    )
    datasets.Dataset.from_list(sums(1)).save_to_disk(tmp_path / "damaged")
    for file in (tmp_path / "damaged").glob("*.arrow"):
        file.write_bytes(b"not arrow")
    assert "the data set saved in" in refusal(name=str(tmp_path / "damaged"))


def test_a_name_that_leads_nowhere_is_refused(tmp_path: Path):
    message = refusal(name="owner/unknown")
    assert message.startswith("data set owner/unknown cannot be loaded (")
    assert message.endswith(
        "; give a hub name that can be reached or is in the cache (HF_HUB_OFFLINE forbids "
        "reaching it), or a folder"
    )
    assert refusal(name="./no/such") == (
        "folder ./no/such does not exist; give a folder with a data set, or a hub name such as "
        "'openai/gsm8k'"
    )
    folder = data_files(tmp_path / "files", train=sums(1))
    assert refusal(name=str(folder), revision="main") == (
        f"revision is 'main', but {folder} is a folder and has none; remove it"
    )
    assert "'other' not found" in refusal(name=str(folder), config_name="other")
    datasets.Dataset.from_list(sums(1)).save_to_disk(tmp_path / "one")
    assert refusal(name=str(tmp_path / "one"), config_name="main") == (
        f"config_name is 'main', but the saved data set {tmp_path}/one has none; remove it"
    )


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    def find_spec(name: str) -> ModuleSpec | None:
        assert name == "datasets"
        return None

    monkeypatch.setattr(dataset_module, "find_spec", find_spec)
    assert refusal(name="owner/x") == (
        "task.kind = 'dataset' needs datasets; pip install 'gmpo[data]'"
    )


def test_the_librarys_progress_bars_are_as_they_were(tmp_path: Path):
    folder = data_files(tmp_path / "files", train=sums(1, 2))
    datasets.enable_progress_bars()
    dataset_task(name=str(folder), form=WORKED)
    assert datasets.is_progress_bar_enabled()
