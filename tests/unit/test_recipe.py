"""Recipes found, read, overridden and written back; every mistake is named with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.recipe import bundled_recipes, dump_recipe, load_recipe, recipe_keys, settings_of
from gmpo.task_config import (
    ArithmeticTask,
    BundledTask,
    CountdownTask,
    DatasetTask,
    GivenTask,
    GymTask,
    JsonlTask,
    Table,
)

KINDS = {
    "arithmetic": (),
    "countdown": (),
    "jsonl": ("task.path=x.jsonl",),
    "dataset": ("task.name=owner/x",),
    "gym": ("task.name=gcd",),
    "svamp": (),
}

# A change here is a change of every recipe in the world: make it deliberately.
KEY_TABLE = """
model.name model.device model.dtype model.prompt_format model.system
task.held_out_items task.split_seed task.kind task.operators task.min_operand task.max_operand
task.num_terms task.train_items task.instruction task.num_numbers task.max_number task.max_target
task.prompt_column task.answer_column task.id_column task.keep_columns task.answer_marked
task.where task.held_out_where task.unusable_rows task.path task.held_out_path task.name
task.config_name task.revision task.split task.held_out_split task.options task.digest
reward.weights reward.format_pattern reward.combine reward.floor reward.truncated
reward.timeout_seconds reward.length_full_tokens reward.length_zero_tokens reward.functions
reward.models reward.on_error reward.function_timeout_seconds
sampling.group_size sampling.prompts_per_round sampling.max_new_tokens sampling.max_length
sampling.temperature sampling.top_p sampling.top_k sampling.stop_strings sampling.max_rows
sampling.rollout sampling.dynamic sampling.max_extra_prompts
objective.name objective.clip_low objective.clip_high objective.clip_negative_high
objective.kl_coefficient objective.entropy_coefficient objective.advantage_scale
objective.advantage_eps
training.rounds training.steps_per_round training.learning_rate training.schedule
training.warmup_steps training.final_learning_rate_fraction training.adam_beta1 training.adam_beta2
training.adam_eps training.weight_decay training.gradient_clip_norm
training.max_tokens_per_micro_batch training.engine training.seed training.gradient_cosine_every
training.kl_ref_every training.processes training.gradient_checkpointing
training.refuse_beyond_memory
checkpoint.every_rounds checkpoint.keep
evaluation.measure evaluation.every_rounds evaluation.items_during evaluation.items
evaluation.skip_items evaluation.few_shot evaluation.sampled evaluation.max_new_tokens
tracking.groups_per_round tracking.to tracking.project tracking.name
tracking.prometheus_port
lora.rank lora.alpha lora.targets
guard.mode
guard.skip_steps
guard.learning_rate_factor
guard.clip_factor
guard.most_rollbacks
adaptive.clip adaptive.clip_min adaptive.clip_max adaptive.clip_share_min adaptive.clip_share_max
adaptive.clip_gain adaptive.clip_average_rounds adaptive.learning_rate adaptive.learning_rate_min
adaptive.learning_rate_gain adaptive.learning_rate_tolerance adaptive.warm_up_rounds
adaptive.reward_floor_end
"""
KEYS = KEY_TABLE.split()

TABLES = {
    "arithmetic": ArithmeticTask,
    "countdown": CountdownTask,
    "jsonl": JsonlTask,
    "dataset": DatasetTask,
    "gym": GymTask,
    "given": GivenTask,
}
HOMES = {**KINDS, "given": ("task.train_items=1", "task.digest=0")}
del HOMES["svamp"]


def recipe(folder: Path, text: str = '[task]\nkind = "arithmetic"\n') -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


def test_the_keys_of_a_recipe_are_these():
    assert recipe_keys() == KEYS
    assert set(RunConfig.model_fields) - {key.split(".")[0] for key in KEYS} == {"description"}


def test_the_smallest_recipe_names_a_task_only(tmp_path: Path):
    config = load_recipe(recipe(tmp_path))
    assert config.task.kind == "arithmetic"
    assert config.objective.name == "gmpo"


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_is_written_and_read_back_unchanged(kind: str, tmp_path: Path):
    overrides = [
        f"task.kind={kind}",
        *KINDS[kind],
        "objective.clip_high=0.7",
        "sampling.stop_strings=['\\n', \"end\"]",
        'model.system=Say "only" the number.',
        "reward.weights.format=0.25",
        "evaluation.items=7",
    ]
    config = load_recipe(recipe(tmp_path), overrides)
    again = load_recipe(recipe(tmp_path, dump_recipe(config)))
    assert again == config
    assert again.sampling.stop_strings == ("\\n", "end")
    assert again.objective.clip_low is None  # left out, and so still the objective's own


def test_overrides_are_toml_values_and_else_plain_text(tmp_path: Path):
    config = load_recipe(
        recipe(tmp_path),
        [
            "training.rounds = 3",
            "training.learning_rate=2e-5",
            "evaluation.sampled=false",
            "task.operators=['+', '-']",
            "model.name=/some/folder with blanks",
            "description=a=b",
            "reward.weights={format = 1.0}",
        ],
    )
    assert config.training.rounds == 3
    assert config.training.learning_rate == 2e-5
    assert config.evaluation.sampled is False
    assert config.task.kind == "arithmetic" and config.task.operators == ("+", "-")
    assert config.model.name == "/some/folder with blanks"
    assert config.description == "a=b"
    assert config.reward.weights == {"format": 1.0}


def test_a_later_override_wins(tmp_path: Path):
    overrides = ["training.rounds=3", "training.rounds=4"]
    assert load_recipe(recipe(tmp_path), overrides).training.rounds == 4


@pytest.mark.parametrize("text", ["training.rounds", "=3", ".rounds=3", "training..rounds=3", ""])
def test_an_override_of_another_form_is_refused_with_an_example(text: str, tmp_path: Path):
    assert refusal(recipe(tmp_path), text) == (
        f"override {text!r} is not table.key=value; example: training.rounds=20"
    )


def test_an_override_inside_a_value_is_refused(tmp_path: Path):
    message = refusal(recipe(tmp_path), "description=x", "description.rounds=3")
    assert message == "override 'description.rounds=3': 'description' is a value, not a table"


@pytest.mark.parametrize("key", KEYS)
def test_an_unknown_key_is_refused_with_the_nearest_name(key: str, tmp_path: Path):
    misspelt = key + "x"
    home = next((kind for kind in HOMES if has(kind, key)), None)
    overrides = [f"task.kind={home}", *HOMES[home]] if home else []
    message = refusal(recipe(tmp_path), *overrides, f"{misspelt}=1")
    assert f"unknown key {misspelt!r}; did you mean {key!r}?" in message
    assert str(tmp_path / "mine.toml") in message


def has(kind: str, key: str) -> bool:
    """Whether a task of this kind has a key that not every kind has."""
    name = key.removeprefix("task.")
    common = set(BundledTask.model_fields) - {"instruction"}
    return key != name and name in TABLES[kind].model_fields and name not in common


def test_a_key_of_another_kind_of_task_is_not_offered(tmp_path: Path):
    message = refusal(recipe(tmp_path), "task.kind=svamp", "task.max_operand=9")
    assert "unknown key 'task.max_operand'" in message
    assert "did you mean 'task.max_operand'" not in message
    assert (
        "allowed: ['task.held_out_items', 'task.split_seed', 'task.kind', 'task.instruction']"
        in (message)
    )


def test_an_unknown_table_is_refused_with_the_nearest_name(tmp_path: Path):
    assert "unknown key 'trainig'; did you mean 'training'?" in refusal(
        recipe(tmp_path), "trainig.rounds=3"
    )


def test_an_unknown_key_like_no_other_is_refused_with_all_that_are_allowed(tmp_path: Path):
    message = refusal(recipe(tmp_path), "checkpoint.zzzzzzzzzzzzzzzz=1")
    assert message.endswith("allowed: ['checkpoint.every_rounds', 'checkpoint.keep']")


def test_several_mistakes_are_all_named(tmp_path: Path):
    message = refusal(recipe(tmp_path), "training.round=3", "sampling.group_size=1")
    assert "did you mean 'training.rounds'?" in message
    assert "group_size must be at least 2, got 1" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.rounds=many", "training.rounds = 'many': input should be a valid integer"),
        ("training.rounds=2.5", "training.rounds = 2.5: input should be a valid integer"),
        ("training.rounds=0", "training.rounds = 0: input should be greater than or equal to 1"),
        ("sampling.temperature=hot", "sampling.temperature = 'hot': input should be a valid numb"),
        ("model.name=3", "model.name = 3: input should be a valid string"),
        ("objective.name=ppo", "objective.name = 'ppo': input should be 'gmpo', 'gmpo_no_clip'"),
        ("evaluation.sampled=maybe", "evaluation.sampled = 'maybe': input should be a valid bool"),
        ("training=3", "training = 3: input should be a valid dictionary"),
        ("reward.weights.style=much", "reward.weights.style = 'much': input should be a valid"),
        ("task.held_out_items=0", "task.held_out_items = 0: input should be greater than or equal"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, said: str, tmp_path: Path):
    assert said in refusal(recipe(tmp_path), override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.group_size=1", "sampling: group_size must be at least 2, got 1"),
        ("sampling.top_p=0.9", "sampling: training needs top_p = 1 and top_k = 0, got top_p = 0.9"),
        ("sampling.top_k=5", "got top_p = 1.0, top_k = 5"),
        ("training.steps_per_round=3", "allowed steps_per_round for 8 prompts: [1, 2, 4, 8]"),
        (
            "objective={name = 'gmpo_no_clip', clip_low = 0.3}",
            "objective: gmpo_no_clip has no clip, got clip_low = 0.3",
        ),
        (
            "objective={name = 'grpo', clip_negative_high = 2.0}",
            "objective: clip_negative_high = 2.0 works with name = 'gmpo' only, got 'grpo'",
        ),
    ],
)
def test_a_refusal_of_a_table_names_the_table(override: str, said: str, tmp_path: Path):
    assert said in refusal(recipe(tmp_path), override)


def test_a_recipe_without_a_task_is_refused_with_the_key_to_add(tmp_path: Path):
    message = refusal(recipe(tmp_path, "[training]\nrounds = 3\n"))
    assert message.endswith(
        "missing key 'task.kind'; add it to the recipe or pass --set task.kind=..., one of "
        "'arithmetic', 'countdown', 'jsonl', 'dataset', 'gym', 'svamp', 'gsm8k'"
    )


def test_a_task_without_a_kind_is_refused_with_the_kinds(tmp_path: Path):
    message = refusal(recipe(tmp_path, "[task]\nmax_operand = 3\n"))
    assert message.endswith(
        "missing key 'task.kind'; add it to the recipe or pass --set task.kind=..., one of "
        "'arithmetic', 'countdown', 'jsonl', 'dataset', 'gym', 'svamp', 'gsm8k'"
    )


def test_an_unknown_kind_of_task_is_refused_with_the_kinds(tmp_path: Path):
    message = refusal(recipe(tmp_path), "task.kind=algebra")
    assert "task.kind = 'algebra'" in message
    assert "'arithmetic', 'countdown', 'jsonl', 'dataset', 'gym', 'svamp', 'gsm8k'" in message


def test_a_jsonl_task_without_a_path_is_refused_with_the_key_to_add(tmp_path: Path):
    message = refusal(recipe(tmp_path), "task.kind=jsonl")
    assert message.endswith(
        "missing key 'task.path'; add it to the recipe or pass --set task.path=..."
    )


def test_a_file_that_is_not_toml_is_refused_with_the_place(tmp_path: Path):
    path = recipe(tmp_path, "[task\nkind = 1\n")
    message = refusal(path)
    assert message.startswith(f"recipe {path} is not valid TOML: ")
    assert "line 1" in message


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b'description = "caf\xe9"\n')
    message = refusal(path)
    assert message.startswith(f"recipe {path} is not UTF-8 text: ")
    assert message.endswith("save it as UTF-8")


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are():
    message = refusal("quikstart")
    assert message.startswith("there is no recipe 'quikstart': neither a file nor one of [")
    assert message.endswith("did you mean 'quickstart'?")
    for name in bundled_recipes():
        assert repr(name) in message


def test_a_recipe_like_no_other_gets_no_guess():
    assert "did you mean" not in refusal("zzzzzz")


def test_a_folder_is_no_recipe(tmp_path: Path):
    assert refusal(tmp_path).startswith(f"there is no recipe {str(tmp_path)!r}")


def test_a_bare_name_is_the_bundled_recipe_whatever_lies_beside_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bundled = load_recipe("quickstart")
    for name in ("quickstart", "quickstart.toml", "mine"):
        (tmp_path / name).write_text(f'description = "{name}"\n[task]\nkind = "countdown"\n')
    assert load_recipe("quickstart") == bundled
    assert load_recipe("./quickstart").description == "quickstart"
    assert load_recipe("quickstart.toml").description == "quickstart.toml"
    assert load_recipe("mine").description == "mine"
    (tmp_path / "quickstart").unlink()
    (tmp_path / "quickstart").mkdir()
    assert load_recipe("quickstart") == bundled


def test_a_recipe_saved_by_a_windows_editor_is_read(tmp_path: Path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b'\xef\xbb\xbfdescription = "a"\r\n[task]\r\nkind = "countdown"\r\n')
    assert load_recipe(path).description == "a"


class _Inner(Table):
    low: int = Field(default=1, ge=1)


class _Outer(Table):
    name: str
    inner: _Inner = _Inner()
    kinds: tuple[_Inner, ...] = ()


def test_settings_by_name_or_as_json_become_a_model():
    made = _Outer(name="a", inner=_Inner(low=2))
    assert settings_of(_Outer, {"name": "a", "inner": {"low": 2}}, of="x") == made
    assert settings_of(_Outer, made.model_dump_json(), of="x") == made


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nam": "a"}, "x: missing setting 'name'; unknown setting 'nam'; did you mean 'name'?"),
        ({"name": "a", "zzz": 1}, "unknown setting 'zzz'; allowed: ['name', 'inner', 'kinds']"),
        ({"name": "a", "inner": {"lo": 1}}, "unknown setting 'inner.lo'; did you mean 'low'?"),
        (
            {"name": "a", "kinds": [{"lo": 1}]},
            "unknown setting 'kinds.0.lo'; leave it out",
        ),
        (
            {"name": "a", "inner": {"low": 0}},
            "inner.low = 0: input should be greater than or equal to 1",
        ),
        ('{"name": 3}', "name = 3: input should be a valid string"),
        ("{", "x: "),
    ],
)
def test_settings_that_are_wrong_are_named(settings, said: str):
    with pytest.raises(ConfigError, match=r"^x: ") as caught:
        settings_of(_Outer, settings, of="x")
    assert said in str(caught.value)
