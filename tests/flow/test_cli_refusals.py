"""What the command refuses, in one line, with exit code 2, and without losing anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tests.commands import LAST_LINE, gmpo, jsonl, refusal
from tests.disks import as_another_user, fill, resize, small_disk
from tests.models import character_tokenizer, tiny_model
from tests.tiny_runs import write_recipe

from gmpo.recipe import load_recipe

# What is refused


def edited(name: str, change: Callable[[Path], None], model: str, folder: Path) -> Path:
    copy = folder / name
    shutil.copytree(model, copy)
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainig.rounds=3", "unknown key 'trainig'; did you mean 'training'?"),
        ("training.round=3", "unknown key 'training.round'; did you mean 'training.rounds'?"),
        ("sampling.group_size=1", "group_size must be at least 2, got 1: an advantage compares"),
        (
            "training.steps_per_round=3",
            "sampling.prompts_per_round = 8 is not divisible by training.steps_per_round = 3, and "
            "a step takes whole groups; allowed steps_per_round for 8 prompts: [1, 2, 4, 8]",
        ),
        ("sampling.top_p=0.9", "training needs top_p = 1 and top_k = 0, got top_p = 0.9"),
        ("training.rounds", "override 'training.rounds' is not table.key=value"),
        ("model.device=cuda", "device 'cuda' is not available here; usable: ['cpu'], or 'auto'"),
        ("task.held_out_items=15", "the space has 15 different items, so held_out_items=15"),
        ("task.min_operand=5", "operands run from 5 to 4"),
        ("reward.format_pattern='('", "'(' is not a regular expression"),
        ("reward.weights.format=0.0", "not all 0"),
        ("sampling.max_length=19", "has 17 tokens, more than the 16 that sampling.max_length"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_in_one_line(
    override: str, said: str, model: str, recipe: str, tmp_path: Path
):
    if "cuda" in override and pytest.importorskip("torch").cuda.is_available():
        pytest.skip("this machine has the device")
    arguments = ("--run", tmp_path / "r", "--set", f"model.name={model}", "--set", override)
    message = refusal("train", recipe, *arguments)
    assert said in message
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "a refused run left files"


def test_a_missing_recipe_is_refused(tmp_path: Path):
    assert "did you mean 'quickstart'?" in refusal("train", "quickstrat")
    assert refusal("train") == "name a recipe: a path, or one of quickstart, svamp_cpu"


@pytest.mark.parametrize(
    "command",
    [
        ("train", "RECIPE", "--set", "model.name=NONE", "--run", "RUN"),
        ("train", "RECIPE", "--set", "model.name=NONE", "--dry-run"),
        ("evaluate", "NONE", "--recipe", "RECIPE"),
        ("evaluate", "NONE"),
        ("gate", "NONE", "RUN"),
        ("gate", "NONE", "RUN", "--suite", "svamp"),
        ("sample", "NONE", "hi"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_missing_model_is_refused_with_what_can_be_given(
    command: tuple[str, ...], recipe: str, tmp_path: Path
):
    names = {"RECIPE": recipe, "RUN": str(tmp_path / "r")}
    none = str(tmp_path / "none")
    message = refusal(*(names.get(word, word).replace("NONE", none) for word in command))
    assert none in message
    assert "cannot" in message and "folder" in message and "--recipe" not in message


def test_chat_for_a_model_without_a_template_is_refused(recipe: str, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    character_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    message = refusal(
        *("train", recipe, "--run", tmp_path / "r"),
        *("--set", f"model.name={tmp_path / 'model'}", "--set", "model.prompt_format=chat"),
    )
    assert message == (
        "prompt_format is 'chat' and the tokenizer has no chat template; use prompt_format = "
        "'text', or set tokenizer.chat_template and save it"
    )


def test_a_model_without_an_end_token_is_refused(model: str, recipe: str, tmp_path: Path):
    def forget_the_end(folder: Path) -> None:
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            content = json.loads((folder / name).read_text())
            content = {k: v for k, v in content.items() if k not in ("eos_token_id", "eos_token")}
            (folder / name).write_text(json.dumps(content | endless(name)))

    def endless(name: str) -> dict[str, None]:
        return {} if name == "tokenizer_config.json" else {"eos_token_id": None}

    copy = edited("endless", forget_the_end, model, tmp_path)
    message = refusal("train", recipe, "--run", tmp_path / "r", "--set", f"model.name={copy}")
    assert "names an end token, so every completion would run to the limit" in message
    assert "sampling.stop_strings" in message


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "rows.jsonl holds no row; it needs at least one"),
        (
            [{"problem": "1 + 1?", "answer": "2"}, {"problem": "2 + 2?"}],
            "rows.jsonl:2: answer is missing; it must be a text or a number; complete the row, or "
            "leave such rows out, counted, with unusable_rows = 'drop'",
        ),
        ([{"problem": "1 + 1?", "answer": ""}], "rows.jsonl:1: answer is ''"),
        ([{"question": "1 + 1?", "answer": "2"}], "rows.jsonl:1: neither 'prompt' nor 'problem'"),
        (
            [{"problem": "a" * 70, "answer": "2", "id": "long"}] * 1
            + [{"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(9)],
            "prompt 'long' has 73 tokens, more than the 61 that sampling.max_length leaves beside "
            "the completion (1 of 9 prompts are too long, this is the longest); raise "
            "sampling.max_length by 12 or remove the prompt",
        ),
        (
            [{"problem": "1 + 1?", "answer": "2"}],
            "held_out_items is 1 with 1 rows",
        ),
    ],
    ids=["empty", "no answer", "empty answer", "no problem", "long prompt", "one row"],
)
def test_rows_that_cannot_be_used_are_named(
    rows: list[dict[str, Any]], said: str, model: str, recipe: str, tmp_path: Path
):
    path = jsonl(tmp_path / "rows.jsonl", rows)
    before = path.read_bytes()
    task = f'task={{kind = "jsonl", path = "{path}", held_out_items = 1, split_seed = 1}}'
    message = refusal(
        "train", recipe, "--run", tmp_path / "r", "--set", f"model.name={model}", "--set", task
    )
    assert said in message
    assert path.read_bytes() == before


def test_a_folder_that_holds_a_run_is_refused(finished: Path, model: str, recipe: str):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert refusal("train", recipe, "--run", finished, "--set", f"model.name={model}") == (
        f"run folder {finished} already holds a run; continue it with --resume or choose another "
        "with --run"
    )
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_resuming_what_is_no_run_is_refused(model: str, recipe: str, tmp_path: Path):
    arguments = ("--resume", "--set", f"model.name={model}")
    assert refusal("train", recipe, *arguments) == (
        "--resume needs the run to go on with: --run FOLDER"
    )
    assert "holds no run to resume; start it without --resume" in refusal(
        "train", recipe, "--run", tmp_path / "r", *arguments
    )
    assert "so there is no run to resume there" in refusal(
        "train", "--run", tmp_path / "r2", "--resume"
    )


def test_a_run_folder_of_another_user_is_refused(model: str, recipe: str, tmp_path: Path):
    (tmp_path / "theirs").mkdir(mode=0o555)
    folder = tmp_path / "theirs" / "run"
    config = load_recipe(recipe, [f"model.name={model}"])
    with TemporaryDirectory() as readable:
        Path(readable).chmod(0o755)
        path = write_recipe(Path(readable) / "tiny.toml", config)
        # Imports what the command needs while the sources can be read.
        assert gmpo("train", path, "--run", tmp_path / "ours").exit_code == 0
        with as_another_user():
            message = refusal("train", path, "--run", folder)
    assert message == (
        f"run folder {folder} cannot be written: Permission denied; choose another with --run, or "
        "free space and permissions"
    )


def test_a_full_disk_is_refused_before_training(model: str, recipe: str, tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        fill(disk)
        message = refusal("train", recipe, "--run", disk / "r", "--set", f"model.name={model}")
    assert message == (
        f"run folder {tmp_path / 'disk' / 'r'} cannot be written: No space left on device; choose "
        "another with --run, or free space and permissions"
    )


def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(
    model: str, recipe: str, tmp_path: Path
):
    # A checkpoint of the tiny model takes 240 kB: there is room for the first two only.
    arguments = ("--set", f"model.name={model}", "--set", "training.rounds=3")
    arguments += ("--set", "checkpoint={every_rounds = 1, keep = 9}")
    with small_disk(tmp_path / "disk", kilobytes=640) as disk:
        message = refusal("train", recipe, "--run", disk / "r", *arguments)
        assert "round-000003 could not be written: " in message
        assert "No space left on device" in message
        assert "continue with --resume: what was saved before is untouched" in message
        resize(disk, kilobytes=8_000)
        result = gmpo("train", "--run", disk / "r", "--resume")
        assert result.exit_code == 0, result.stderr
        assert LAST_LINE.fullmatch(result.stdout.splitlines()[-1])
        straight = gmpo("train", recipe, "--run", tmp_path / "straight", *arguments)
        assert straight.exit_code == 0
        weights = [
            folder / "checkpoints" / "round-000003" / "model" / "model.safetensors"
            for folder in (disk / "r", tmp_path / "straight")
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()
