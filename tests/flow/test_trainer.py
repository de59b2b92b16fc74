"""`GMPOTrainer`: a model, rows and functions held in Python go through a recipe's loop."""

from __future__ import annotations

import io
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tests.models import character_tokenizer, save_tiny, tiny_model
from tests.python_trainers import ROWS, Listener, common_start, settings, steps, trainer
from tests.tiny_runs import COMMON_START, metric_lines, same_weights, tiny_recipe
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from gmpo.errors import DataError
from gmpo.inspection import summarize_run
from gmpo.plots import plot_run
from gmpo.recipe import load_recipe
from gmpo.run_tables import render_summary
from gmpo.task_table import build_task
from gmpo.training import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "trainer" / "quickstart.py"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("llama"))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_the_callers_model_is_trained_in_place(llama: str, tmp_path: Path):
    ours = trainer(
        llama, tmp_path / "run", eval_dataset=ROWS[:2], train_dataset=ROWS[2:], reward=None
    )
    before = weights_of(ours.model)
    outcome = ours.train(num_epochs=2)
    after = weights_of(ours.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # The checkpoint is the model as the caller holds it now.
    saved = AutoModelForCausalLM.from_pretrained(outcome.checkpoint / "model")
    assert all(torch.equal(after[name], w) for name, w in saved.named_parameters())
    assert outcome.folder == tmp_path / "run"
    assert outcome.metrics["rollout/reward"] == pytest.approx(
        metric_lines(outcome.folder, "round")[-1]["rollout/reward"]
    )
    for evaluations in (outcome.before, outcome.after):
        assert [evaluation.name for evaluation in evaluations] == ["greedy", "sampled"]
    assert str(outcome).startswith(f"run {tmp_path / 'run'}; reward of the last round ")
    assert "held-out greedy accuracy before 0." in str(outcome)


def test_it_is_the_loop_of_a_recipe(llama: str, tmp_path: Path):
    # The same model, items, rewards and settings through both doors end in the same bits.
    recipe = tiny_recipe(llama, checkpoint={"every_rounds": 9}, training__learning_rate=1e-3)
    by_recipe = train(recipe, folder=tmp_path / "recipe", warn=lambda _: None)
    rows = [
        {"id": p.id, "prompt": [vars(m) for m in p.messages or ()], **p.columns}
        for p in build_task(recipe.task).train
    ]
    ours = trainer(
        llama,
        tmp_path / "trainer",
        train_dataset=rows,
        reward=None,
        config=settings(
            tmp_path / "trainer",
            max_new_tokens=3,
            recipe={"reward.weights": {"format": 1.0}, "reward.format_pattern": COMMON_START},
        ),
    )
    outcome = ours.train(num_epochs=16 / len(rows))
    assert len(metric_lines(outcome.folder, "round")) == recipe.training.rounds
    assert same_weights(outcome.checkpoint, by_recipe.checkpoint)


@pytest.mark.parametrize("kind", [list, Dataset.from_list, iter], ids=["list", "dataset", "iter"])
def test_rows_may_come_as_any_iterable(kind: Any, llama: str, tmp_path: Path):
    ours = trainer(llama, tmp_path / "run", train_dataset=kind(ROWS))
    outcome = ours.train()
    assert len(metric_lines(outcome.folder, "round")) == 2  # 16 prompts, 8 a round
    assert load_recipe(outcome.folder / "recipe.toml").task.train_items == 16  # type: ignore[union-attr]


def test_a_text_prompt_goes_to_the_model_as_it_is(llama: str, tmp_path: Path):
    seen: list[tuple[Any, Any]] = []

    def look(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(index % 2) for index in range(len(prompts))]

    rows = [{"prompt": f"{n} + 1 ="} for n in range(8)]
    ours = trainer(llama, tmp_path / "run", train_dataset=rows, reward=look)
    groups = ours.sample(rows)
    assert [g.prompt.token_ids for g in groups] == [
        tuple(ours.tokenizer(row["prompt"])["input_ids"]) for row in rows
    ]
    ours.score(groups)
    ours.close()
    assert {type(value) for pair in seen for value in pair} == {str}
    assert {prompt for prompt, _ in seen} == {row["prompt"] for row in rows}


def test_a_loop_of_ones_own_moves_the_policy(llama: str, tmp_path: Path):
    ours = trainer(llama, tmp_path / "unused")
    before = weights_of(ours.model)
    rewards = []
    for _ in range(6):
        groups = ours.score(ours.sample(ROWS[:8]))
        rewards.append(sum(r.reward or 0 for g in groups for r in g.rollouts) / 64)
        steps = ours.update_policy(groups, learning_rate=3e-3)
        assert len(steps) == 4
        # A first step without a live group has no ratio.
        assert steps[0].get("ratio/max", 1.0) == pytest.approx(1, abs=1e-4)
        assert {step["update/learning_rate"] for step in steps} == {3e-3}
    ours.close()
    assert rewards[-1] > rewards[0] + 0.1
    after = weights_of(ours.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "unused").exists()


def test_calls_of_sample_draw_anew_and_their_groups_are_trained_together(
    llama: str, tmp_path: Path
):
    ours = trainer(llama, tmp_path / "unused")
    first, second = ours.sample(ROWS[:4]), ours.sample(ROWS[:4])
    assert [g.prompt.token_ids for g in first] == [g.prompt.token_ids for g in second]
    drawn = [
        [r.token_ids.tolist() for g in groups for r in g.rollouts] for groups in (first, second)
    ]
    assert drawn[0] != drawn[1]
    # Other rows, numbered alike: each completion is trained after its own prompt, so that the
    # sampler's log-probabilities are the trainer's.
    apart = ours.score([*first, *ours.sample(ROWS[4:8])])
    assert [g.prompt.id for g in apart[:4]] == [g.prompt.id for g in apart[4:]]
    steps = ours.update_policy(apart, learning_rate=0.0)
    assert ours._own_mismatch_is_small
    assert all(step.get("ratio/max", 1.0) == pytest.approx(1, abs=1e-4) for step in steps)
    ours.close()


def test_groups_without_rewards_are_refused(llama: str, tmp_path: Path):
    ours = trainer(llama, tmp_path / "unused")
    with pytest.raises(DataError, match="none of the 8 groups has a rollout with a reward"):
        ours.update_policy(ours.sample(ROWS[:8]))
    with pytest.raises(DataError, match="3 groups do not divide into 4 steps"):
        ours.update_policy(ours.score(ours.sample(ROWS[:3])))
    ours.close()


def test_held_out_rows_without_answers_are_measured_by_the_reward_functions(
    llama: str, tmp_path: Path
):
    asked: dict[tuple[int, float], list[str]] = {}
    held_out = [{"problem": f"Name {n}", "hint": "held out"} for n in range(5)]

    def size(
        completion_ids: list[list[int]], hint: list[str], trainer_state: Any, **_: Any
    ) -> list[float | None]:
        if set(hint) == {"held out"}:
            moment = (trainer_state.global_step, trainer_state.epoch)
            asked.setdefault(moment, []).extend(hint)
        return [float(len(ids)) for ids in completion_ids]

    def first_row_only(prompts: list[Any], **_: Any) -> list[float | None]:
        return [1.0 if "Name 0" in str(prompt) else None for prompt in prompts]

    ours = trainer(
        llama,
        tmp_path / "run",
        train_dataset=[{**row, "hint": "train"} for row in ROWS],
        eval_dataset=held_out,
        reward=[size, first_row_only],
        config=settings(
            tmp_path / "run",
            recipe={
                "reward.weights": {"size": 0.5, "first_row_only": 2.0},
                "evaluation.sampled": False,
            },
        ),
    )
    outcome = ours.train(evaluation_strategy="epoch")
    # Five rows before, after the only epoch (2 rounds, 8 steps), and after training.
    assert {moment: len(rows) for moment, rows in asked.items()} == {(0, 0.0): 5, (8, 1.0): 10}
    (during,) = metric_lines(outcome.folder, "evaluation")
    (after,) = outcome.after
    assert during["evaluation/reward"] == after.mean == after.reward
    assert after.accuracy is None
    # 0.5 x length + 2 x 1 in the first row; where one says nothing its weight goes to the other.
    rewards = dict(zip(after.item_ids, after.outcomes, strict=True))
    sizes = [(rewards.pop("eval_dataset-0") - 2) / 0.5, *(r / 2.5 for r in rewards.values())]
    assert len(sizes) == 5 and set(sizes) <= {1, 2, 3, 4}
    assert after.mean == pytest.approx(sum(after.outcomes) / 5)
    before = f"held-out greedy reward before {outcome.before[0].mean:.3f}"
    assert str(outcome).endswith(f"{before}, after {after.mean:.3f}")
    assert "held-out reward (95 % interval)" in shown(outcome.folder)
    resumed = trainer(
        llama,
        tmp_path / "run",
        train_dataset=[{**row, "hint": "train"} for row in ROWS],
        eval_dataset=held_out,
        reward=[size, first_row_only],
        config=ours.config,
    ).train(evaluation_strategy="epoch", resume=True)
    assert (resumed.before, resumed.after) == (outcome.before, outcome.after)


def shown(folder: Path) -> str:
    """What `gmpo inspect` says, and that its pictures can be drawn."""
    assert (folder / "plots-of-test" / "held_out.png") in plot_run(folder, folder / "plots-of-test")
    console = Console(width=100, file=io.StringIO())
    with console.capture() as printed:
        console.print(render_summary(summarize_run(folder)))
    return printed.get()


def test_held_out_rows_that_a_reward_says_nothing_about_are_counted(llama: str, tmp_path: Path):
    def silent(prompts: list[Any], **_: Any) -> list[float | None]:
        return [None if "held out" in str(prompt) else 1.0 for prompt in prompts]

    outcome = trainer(
        llama, tmp_path / "run", eval_dataset=[{"problem": "held out"}], reward=silent
    ).train()
    (greedy, _) = outcome.before
    assert (greedy.outcomes, greedy.num_unrewarded) == ((None,), 1)
    assert math.isnan(greedy.mean)
    assert greedy.as_dict()["reward"] is None
    assert "held-out reward" in shown(outcome.folder)


def test_with_answers_and_a_reward_accuracy_can_be_asked_for(llama: str, tmp_path: Path):
    config = settings(tmp_path / "run", recipe={"evaluation.measure": "accuracy"})
    outcome = trainer(
        llama, tmp_path / "run", eval_dataset=ROWS[:2], train_dataset=ROWS[2:], config=config
    ).train()
    assert outcome.after[0].reward is None
    assert outcome.after[0].outcomes in [(a, b) for a in (0, 1) for b in (0, 1)]


def test_callbacks_of_transformers_hear_what_happens_in_its_order(llama: str, tmp_path: Path):
    listener = Listener()
    ours = trainer(
        llama,
        tmp_path / "run",
        train_dataset=ROWS,
        eval_dataset=[{"problem": "What is 9 + 9?"}],
        config=settings(tmp_path / "run", recipe={"evaluation.sampled": False}),
        callbacks=(listener,),
    )
    ours.train(num_epochs=2, evaluation_strategy="steps", eval_steps=7, logging_steps=8)
    asked = "evaluate ['eval_greedy_reward']"
    assert listener.events == [
        "begin",
        asked,
        *steps(1, 4),
        *steps(5, 8),
        "epoch",
        asked,  # 7 steps are 2 rounds
        "save",
        *steps(9, 12),
        *steps(13, 16),
        "epoch",
        asked,
        "save",
        asked,
        "end",
    ]
    logged = [logs for logs in listener.logs if "loss" in logs]
    assert len(logged) == 2
    assert {"reward", "grad_norm", "learning_rate", "ratio/max", "epoch"} <= logged[0].keys()
    assert logged[0]["reward"] == logged[0]["rollout/reward"]
    assert [logs["epoch"] for logs in logged] == [1.0, 2.0]


def test_early_stopping_of_transformers_is_told_that_it_needs_its_metric(
    llama: str, tmp_path: Path
):
    # It asserts on arguments that it reads, so what we hand over must be the real thing.
    ours = trainer(llama, tmp_path / "run", callbacks=(EarlyStoppingCallback(),))
    with pytest.raises(AssertionError, match="EarlyStoppingCallback requires"):
        ours.train()


def test_a_trl_users_functions_and_columns_run_unchanged(llama: str, tmp_path: Path):
    async def short(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if len(ids) == 4 else 1.0 for ids in completion_ids]

    def solved(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
        return [float(s in c[0]["content"]) for c, s in zip(completions, solution, strict=True)]

    rows = [
        {"prompt": [{"role": "user", "content": f"Say {n}"}], "solution": str(n)} for n in range(8)
    ]
    ours = trainer(
        llama,
        tmp_path / "run",
        train_dataset=Dataset.from_list(rows),
        reward=[short, solved, common_start],
        config=settings(
            tmp_path / "run",
            recipe={"reward.weights": {"short": 0.5, "solved": 1.0, "common_start": 1.0}},
        ),
    )
    outcome = ours.train()
    assert {f"rollout/reward/{name}" for name in ("solved", "common_start")} <= set(outcome.metrics)
    recipe = load_recipe(outcome.folder / "recipe.toml")
    assert recipe.reward.functions["common_start"] == "tests.python_trainers:common_start"


def test_a_reward_model_may_stand_among_the_functions_and_a_callback_may_be_its_class(
    llama: str, tmp_path: Path
):
    shape = tiny_model("llama").config
    shape.num_labels, shape.pad_token_id = 1, 0
    judge = tmp_path / "judge"
    LlamaForSequenceClassification(shape).save_pretrained(judge)
    character_tokenizer().save_pretrained(judge)

    class Counting(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            Counting.steps += 1

    ours = trainer(
        llama, tmp_path / "run", reward=[str(judge), common_start], callbacks=(Counting,)
    )
    outcome = ours.train(num_epochs=0.5)
    assert {"rollout/reward/judge", "rollout/reward/common_start"} <= outcome.metrics.keys()
    recipe = load_recipe(outcome.folder / "recipe.toml")
    assert recipe.reward.models == {"judge": str(judge)}
    assert Counting.steps == 4


def test_questions_that_are_held_out_are_not_trained_on_and_are_counted(llama: str, tmp_path: Path):
    said: list[str] = []
    ours = trainer(llama, tmp_path / "run", eval_dataset=ROWS[:3], warn=said.append)
    outcome = ours.train()
    assert any("3 " in sentence and "left out" in sentence for sentence in said)
    recipe = load_recipe(outcome.folder / "recipe.toml")
    assert recipe.task.train_items == 13  # type: ignore[union-attr]


def test_a_run_that_was_given_objects_says_so_to_the_command(llama: str, tmp_path: Path):
    outcome = trainer(llama, tmp_path / "run").train()
    with pytest.raises(DataError, match="16 training items were handed over in Python"):
        train(load_recipe(outcome.folder / "recipe.toml"), folder=tmp_path / "new", warn=print)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    words: list[str] = []
    monkeypatch.setattr(sys, "argv", words)
    yield words


def test_the_articles_script_runs(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # A GPT-2 without a chat template, as the article's DialoGPT is, and with room for its 512.
    shape = tiny_model("gpt2").config
    shape.n_positions = 512
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    name = str(tmp_path / "model")
    GPT2LMHeadModel(shape).save_pretrained(name)
    tokenizer.save_pretrained(name)
    monkeypatch.chdir(tmp_path)
    arguments[:] = [str(EXAMPLE), name]
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "훈련 완료: run runs/gmpo; reward of the last round" in printed
    assert (tmp_path / "runs" / "gmpo" / "checkpoints").is_dir()
