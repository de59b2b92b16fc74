"""From a recipe's tables to the parts of a run: prompts in order, tasks, end tokens, devices."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe

from gmpo.assembly import TrainingParts, build_evaluator, build_parts
from gmpo.config import ModelConfig, RunConfig
from gmpo.errors import DataError, ModelError
from gmpo.inputs import Given, PromptStream, resolve_model
from gmpo.policy.load import load_model
from gmpo.records import Prompt
from gmpo.task_config import TaskConfig
from gmpo.task_table import build_task
from gmpo.tasks import Task

PROMPTS = [Prompt(id=str(number), text=str(number)) for number in range(10)]


def ids(stream: PromptStream, *rounds: int) -> list[str]:
    return [prompt.id for number in rounds for prompt in stream.take(4 * number, 4)]


def stream(*, seed: int = 0) -> PromptStream:
    return PromptStream(PROMPTS, seed=seed)


def task(**table: Any) -> Task:
    config: TaskConfig = TypeAdapter(TaskConfig).validate_python(table)
    return build_task(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def parts_of(config: RunConfig) -> TrainingParts:
    return build_parts(config, warn=lambda _: None)


# The order of prompts


def test_each_pass_over_the_prompts_is_a_permutation_of_its_own():
    # 5 rounds of 4 are 2 passes over 10 prompts.
    order = ids(stream(), 0, 1, 2, 3, 4)
    everything = sorted(prompt.id for prompt in PROMPTS)
    assert sorted(order[:10]) == sorted(order[10:]) == everything
    assert order[:10] != order[10:]


def test_the_order_depends_on_the_seed_only():
    assert ids(stream(), 0, 1, 2) == ids(stream(), 0, 1, 2)
    assert ids(stream(), 0, 1, 2) != ids(stream(seed=1), 0, 1, 2)
    in_pieces = [*stream().take(0, 3), *stream().take(3, 1), *stream().take(4, 4)]
    assert [prompt.id for prompt in in_pieces] == ids(stream(), 0, 1)


def test_a_round_can_be_taken_without_those_before_it():
    first = ids(stream(), 0, 1, 2, 3)
    assert ids(stream(), 3) == first[12:]
    used = stream()
    assert ids(used, 3, 0) == first[12:] + first[:4]


def test_a_round_larger_than_the_task_goes_on_into_the_next_pass():
    order = [prompt.id for prompt in stream().take(0, 15)]
    assert len(order) == 15
    assert len(set(order[:10])) == 10


# Tasks


def test_every_kind_of_task_is_built_with_its_held_out_items():
    sizes = {
        # 0 + 0 to 9 + 9: 100 writings of 55 items; 5 items are held out
        "arithmetic": task(kind="arithmetic", max_operand=9, held_out_items=5),
        "countdown": task(kind="countdown", held_out_items=5, train_items=20),
        "svamp": task(kind="svamp", held_out_items=300),
        "gsm8k": task(kind="gsm8k", held_out_items=7),
    }
    assert {name: len(each.held_out) for name, each in sizes.items()} == {
        "arithmetic": 5,
        "countdown": 5,
        "svamp": 300,
        "gsm8k": 7,
    }
    assert {name: len(each.train) for name, each in sizes.items() if name != "arithmetic"} == {
        "countdown": 20,
        "svamp": 700,
        "gsm8k": 7473,
    }
    for each in sizes.values():
        assert not {p.id for p in each.train} & {p.id for p in each.held_out}
        assert all(p.columns["answer"] for p in (*each.train, *each.held_out))


def rows(path: Path, numbers: range) -> str:
    lines = [json.dumps({"problem": f"{n} + 1 = ?", "answer": n + 1}) for n in numbers]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_rows_are_split_into_both_sides(tmp_path: Path):
    built = task(kind="jsonl", path=rows(tmp_path / "a.jsonl", range(10)), held_out_items=3)
    assert (len(built.train), len(built.held_out)) == (7, 3)


def test_rows_of_a_second_file_are_all_held_out(tmp_path: Path):
    files = {
        "path": rows(tmp_path / "a.jsonl", range(10)),
        "held_out_path": rows(tmp_path / "b.jsonl", range(20, 26)),
    }
    assert len(task(kind="jsonl", **files).held_out) == 6
    assert len(task(kind="jsonl", held_out_items=2, **files).held_out) == 2


def test_the_instruction_follows_every_problem(tmp_path: Path):
    path = rows(tmp_path / "a.jsonl", range(4))
    built = task(kind="jsonl", path=path, held_out_items=1, instruction="Just the number.")
    for prompt in (*built.train, *built.held_out):
        assert prompt.messages is not None
        assert prompt.messages[-1].content.endswith("= ?\nJust the number.")


def test_a_missing_file_of_rows_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist; give the path"):
        task(kind="jsonl", path=str(tmp_path / "none.jsonl"))


# Parts


def test_the_parts_are_what_the_recipe_says(model: str):
    parts = parts_of(tiny_recipe(model, evaluation__items=3, objective={"name": "gspo"}))
    try:
        assert parts.config.model.dtype == "fp32"
        assert parts.reference is None
        assert len(parts.held_out) == 3
        assert list(parts.rewards.functions) == ["format"]
        assert parts.sampling.num_completions == 8
        assert parts.sampling.stop_ids == (1,)
        assert [len(prompt.token_ids or ()) for prompt in parts.prompts.take(0, 8)] == [17] * 8
        settings = parts.evaluator.settings
        assert settings.max_tokens == 3
    finally:
        parts.close()


def test_evaluation_may_have_a_longer_limit_than_training(model: str):
    parts = parts_of(tiny_recipe(model, evaluation={"max_new_tokens": 20, "few_shot": 0}))
    parts.close()
    assert parts.evaluator.settings.max_tokens == 20
    assert parts.sampling.max_tokens == 3


def test_a_reference_is_loaded_for_a_kl_term_only_and_never_learns(model: str):
    parts = parts_of(tiny_recipe(model, objective={"kl_coefficient": 0.1}))
    parts.close()
    assert parts.reference is not None
    assert parts.reference.model is not parts.policy.model
    assert not any(weight.requires_grad for weight in parts.reference.model.parameters())


def test_the_first_held_out_items_are_a_fair_sample(model: str):
    few = parts_of(tiny_recipe(model, evaluation={"items": 2, "few_shot": 0}))
    every = parts_of(tiny_recipe(model))
    for parts in (few, every):
        parts.close()
    assert few.held_out == every.held_out[:2]


def endless(model: str, folder: Path) -> str:
    """The tiny model without any end token."""
    for source in Path(model).iterdir():
        content = source.read_bytes()
        if source.name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            table = json.loads(content)
            if source.name == "tokenizer_config.json":
                del table["eos_token"]
            else:
                table["eos_token_id"] = None
            content = json.dumps(table).encode()
        (folder / source.name).write_bytes(content)
    return str(folder)


def test_a_model_without_an_end_token_is_refused_with_the_remedy(model: str, tmp_path: Path):
    name = endless(model, tmp_path)
    with pytest.raises(ModelError) as caught:
        parts_of(tiny_recipe(name))
    assert str(caught.value) == (
        f"neither model {name!r} nor its tokenizer names an end token, so every completion would "
        "run to the limit; set eos_token_id in its generation config, or sampling.stop_strings in "
        "the recipe"
    )


def test_a_stop_string_stands_in_for_an_end_token(model: str, tmp_path: Path):
    parts = parts_of(tiny_recipe(endless(model, tmp_path), sampling__stop_strings=["\n"]))
    parts.close()
    assert parts.sampling.stop_ids == ()
    assert parts.sampling.stop_strings == ("\n",)


def test_a_prompt_too_long_for_the_recipe_is_named_with_its_length(model: str):
    # "What is 4 + 4?" is 14 characters, and the chat adds three tokens.
    with pytest.raises(DataError, match=r"has 17 tokens, more than the 16 that sampling\."):
        parts_of(tiny_recipe(model, sampling__max_length=19))


def test_held_out_and_few_shot_prompts_are_checked_before_a_model_is_loaded(
    model: str, tmp_path: Path
):
    rows = [{"problem": f"{n} + {'1' * n}?", "answer": str(n)} for n in range(1, 5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = [{"problem": "7" * n, "answer": "7"} for n in (20, 61, 30, 59)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    task = {
        "kind": "jsonl",
        "path": str(tmp_path / "train.jsonl"),
        "held_out_path": str(tmp_path / "held_out.jsonl"),
        "instruction": "",
    }
    tokenizer = tmp_path / "no weights"
    shutil.copytree(model, tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
    # 61 tokens are left beside 3 of the completion; the chat adds 3 to 61 and to 59 characters.
    with pytest.raises(DataError) as caught:
        parts_of(tiny_recipe(str(tokenizer), task=task))
    assert str(caught.value) == (
        "prompt 'held_out-2' has 64 tokens, more than the 61 that sampling.max_length leaves "
        "beside the completion (2 of 4 prompts are too long, this is the longest); raise "
        "sampling.max_length by 3 or take the prompt out of the held-out items"
    )
    few = tiny_recipe(
        str(tokenizer), task=task, sampling__max_length=70, evaluation={"few_shot": 2}
    )
    with pytest.raises(DataError) as caught:
        parts_of(few)
    assert re.search(
        r"prompt 'held_out-2' has \d+ tokens, more than the 67 .* \(2 of 4 prompts are too long, "
        r"this is the longest\); raise sampling.max_length by \d+ or lower evaluation.few_shot: "
        r"these begin with 2 worked examples",
        str(caught.value),
    )
    with (
        pytest.raises(DataError, match=r"or lower evaluation.few_shot"),
        build_evaluator(few, warn=print),
    ):
        raise AssertionError("the evaluator was built")


def test_a_max_length_beyond_the_models_context_is_refused(model: str):
    for build in (parts_of, lambda config: build_evaluator(config, warn=print).__enter__()):
        with pytest.raises(ModelError) as caught:
            build(tiny_recipe(model, sampling__max_length=257))
        assert str(caught.value) == (
            f"sampling.max_length is 257, and model {model!r} takes 256 tokens, prompt and "
            "completion together; lower sampling.max_length to 256 or take another model"
        )


def test_more_evaluation_items_and_examples_than_there_are_are_noted(model: str):
    said: list[str] = []
    config = tiny_recipe(model, evaluation={"items": 6, "few_shot": 0})
    build_parts(config, warn=said.append).close()
    assert said == ["evaluation.items is 6, and task 'arithmetic' holds out 5: all are used"]
    # 4 + 4 and its like: 15 sums, of which 14 are held out
    task = {"kind": "arithmetic", "max_operand": 4, "held_out_items": 14, "instruction": ""}
    few = tiny_recipe(
        model, task=task, evaluation={"items": 5, "few_shot": 3}, sampling__max_length=256
    )
    with build_evaluator(few, warn=said.append):
        pass
    assert re.fullmatch(
        r"evaluation.few_shot is 3, and task 'arithmetic' has [12] rows to show", said[-1]
    )


def test_what_is_asked_for_is_taken_without_a_word():
    said: list[str] = []
    asked = ModelConfig(device="cpu", dtype="bf16")
    assert resolve_model(asked, warn=said.append) == asked
    assert said == []


def test_auto_says_what_it_took():
    said: list[str] = []
    resolved = resolve_model(ModelConfig(device="cpu", dtype="auto"), warn=said.append)
    assert resolved.dtype in ("fp32", "bf16")
    (sentence,) = said
    assert sentence.startswith(f"auto took cpu and {resolved.dtype}: bf16 runs ")


# Precision


def test_a_bf16_run_begins_with_the_weights_as_they_are_stored(model: str):
    config = tiny_recipe(model)
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
    with closing(parts_of(config)) as wide_parts, closing(parts_of(narrow)) as parts:
        assert parts.policy.dtype == torch.bfloat16
        for name, weight in wide_parts.policy.masters.items():
            assert torch.equal(parts.policy.masters[name], weight), name


def test_a_model_from_a_callers_hand_is_taken_as_it_is(model: str):
    config = tiny_recipe(model)
    narrow = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})})
    handed = load_model(model, device="cpu", dtype="bf16")
    rounded = {name: weight.detach().float() for name, weight in handed.named_parameters()}
    with closing(build_parts(narrow, warn=lambda _: None, given=Given(model=handed))) as parts:
        for name, weight in rounded.items():
            assert torch.equal(parts.policy.masters[name], weight), name
    # Loaded by a name, it is stored in full there.
    handed = load_model(model, device="cpu", dtype="bf16")
    given = Given(model=handed, model_name=model)
    with closing(build_parts(narrow, warn=lambda _: None, given=given)) as parts:
        assert any(not torch.equal(parts.policy.masters[n], w) for n, w in rounded.items())
