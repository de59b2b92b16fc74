"""Whole training runs of tiny models: what they write, repeat, resume, refuse, and learn."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models import save_tiny
from tests.tiny_runs import kept_in, metric_lines, same_weights, tiny_recipe, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from gmpo.checkpoint import latest_checkpoint
from gmpo.errors import CheckpointError, NonFiniteError, RunFolderError
from gmpo.objective import OBJECTIVES
from gmpo.recipe import dump_recipe, load_recipe
from gmpo.tracking import METRIC_FAMILIES, METRICS, read_lines
from gmpo.training import Report, TrainingResult, train

MEASURED_TIMES = ("time/", "memory/")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2")


def run(
    model: str,
    folder: Path,
    *,
    resume: bool = False,
    warn: Callable[[str], None] = lambda _: None,
    **changes: Any,
) -> TrainingResult:
    return train(tiny_recipe(model, **changes), folder=folder, resume=resume, warn=warn)


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in left))


def untimed(folder: Path) -> list[dict[str, Any]]:
    """Metric lines without what the clock and the machine decide."""
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED_TIMES)}
        for line in metric_lines(folder)
    ]


def first_steps(folder: Path) -> list[dict[str, Any]]:
    """The first optimizer step of each round."""
    return [line for line in metric_lines(folder, "step") if line["step"] % 4 == 1]


@pytest.fixture(scope="module")
def finished(llama: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """Four rounds of four steps with all evaluations."""
    return run(
        llama,
        tmp_path_factory.mktemp("runs") / "run",
        training__rounds=4,
        evaluation={"every_rounds": 2, "few_shot": 1, "sampled": True, "items_during": 3},
        checkpoint={"every_rounds": 2, "keep": 1},
    )


def test_a_run_writes_what_it_did(finished: TrainingResult):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "recipe.toml",
        "run.json",
        "forecast.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "evaluations.jsonl",
        "checkpoints",
        "rounds",
        ".lock",
    }
    assert not list((finished.folder / "rounds").iterdir())  # the last checkpoint covers all
    assert finished.checkpoint == finished.folder / "checkpoints" / "round-000004"
    assert [path.name for path in finished.checkpoint.parent.iterdir()] == ["round-000004"]


def test_the_recipe_beside_a_run_is_the_resolved_one(finished: TrainingResult, llama: str):
    config = load_recipe(finished.folder / "recipe.toml")
    assert config.model.name == llama
    assert config.training.rounds == 4
    assert dump_recipe(config) == (finished.folder / "recipe.toml").read_text()
    made_with = json.loads((finished.folder / "run.json").read_text())
    assert made_with["torch"] == torch.__version__
    assert made_with["threads"] == torch.get_num_threads()


def test_every_metric_is_documented_and_every_line_has_its_place(finished: TrainingResult):
    lines = metric_lines(finished.folder)
    known = {*METRICS, "kind", "round", "step"}
    unknown = {name for line in lines for name in line} - known
    assert unknown == {f"{family}format" for family in METRIC_FAMILIES if "rollout" in family}
    assert Counter(line["kind"] for line in lines) == {"step": 16, "round": 4, "evaluation": 2}
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert [line["round"] for line in steps] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4


def test_every_round_tells_its_reward_its_groups_and_its_costs(finished: TrainingResult):
    expected = {name for name in METRICS if name.startswith(("rollout/", "time/", "memory/"))}
    for line in metric_lines(finished.folder, "round"):
        assert expected <= set(line)
        assert line["rollout/groups"] == 8
        assert line["rollout/errors_total"] == 0
        assert line["time/tokens_per_second"] > 0


def test_the_ratio_is_1_on_a_rounds_first_step_and_moves_after_it(finished: TrainingResult):
    steps = metric_lines(finished.folder, "step")
    for line in first_steps(finished.folder):
        # Where the sampler's own log-probabilities serve as the old ones, up to fp32 rounding.
        assert line["ratio/min"] == pytest.approx(1, abs=1e-5)
        assert line["ratio/max"] == pytest.approx(1, abs=1e-5)
    for line in steps:
        if line["step"] % 4 != 1 and "ratio/min" in line:
            assert line["ratio/min"] < 0.99 and line["ratio/max"] > 1.01


def test_the_sampler_is_trusted_only_where_it_agrees(finished: TrainingResult):
    for line in metric_lines(finished.folder, "round"):
        assert line["rollout/old_from_sampler"] == 1
        assert line["rollout/mismatch_mean"] <= 0.005 and line["rollout/mismatch_max"] <= 0.1


def test_the_weights_moved_and_load_with_plain_transformers(finished: TrainingResult, llama: str):
    trained = AutoModelForCausalLM.from_pretrained(finished.checkpoint / "model")
    start = AutoModelForCausalLM.from_pretrained(llama)
    for (name, after), before in zip(trained.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(after, before), name


def test_held_out_items_are_asked_before_during_and_after(finished: TrainingResult):
    records = list(read_lines(finished.folder, "evaluations.jsonl"))
    assert [(r["stage"], r["round"]) for r in records] == [("before", 0), ("after", 4)]
    kinds = ["greedy", "greedy_1_shot", "sampled"]
    for record, results in zip(records, (finished.before, finished.after), strict=True):
        assert [result["name"] for result in record["results"]] == kinds
        assert [result.name for result in results] == kinds
        assert {result.num_items for result in results} == {5}
    assert [line["round"] for line in metric_lines(finished.folder, "evaluation")] == [2, 4]


def test_training_never_sees_a_held_out_item(finished: TrainingResult):
    held_out = set(finished.before[0].item_ids)
    trained = {line["prompt_id"] for line in read_lines(finished.folder, "rollouts.jsonl")}
    assert trained and not held_out & trained


def test_the_rounds_figures_are_those_of_its_rollouts(finished: TrainingResult):
    groups = list(read_lines(finished.folder, "rollouts.jsonl"))
    for line in metric_lines(finished.folder, "round"):
        shown = [group for group in groups if group["round"] == line["round"]]
        assert len(shown) == 8
        rollouts = [rollout for group in shown for rollout in group["rollouts"]]
        rewards = [rollout["reward"] for rollout in rollouts]
        assert line["rollout/reward"] == pytest.approx(sum(rewards) / 64)
        assert line["rollout/reward/format"] == line["rollout/reward"]
        cut = sum(rollout["finish_reason"] == "length" for rollout in rollouts)
        assert line["rollout/truncated_fraction"] == pytest.approx(cut / 64)
        assert cut > 0
        tokens = sum(rollout["tokens"] for rollout in rollouts)
        assert line["rollout/completion_tokens"] == pytest.approx(tokens / 64)
        dead = sum(len({r["reward"] for r in group["rollouts"]}) == 1 for group in shown)
        assert line["rollout/dead_groups"] == dead


def test_advantages_compare_rollouts_of_one_prompt(finished: TrainingResult):
    for group in read_lines(finished.folder, "rollouts.jsonl"):
        advantages = [rollout["advantage"] for rollout in group["rollouts"]]
        assert sum(advantages) == pytest.approx(0, abs=1e-5)
        for rollout in group["rollouts"]:
            is_best = rollout["reward"] == max(r["reward"] for r in group["rollouts"])
            assert (rollout["advantage"] >= 0) == is_best
            assert (rollout["ratio"] is None) == (not any(advantages))


def test_the_caller_is_told_of_every_stage(llama: str, tmp_path: Path):
    reports: list[Report] = []
    train(
        tiny_recipe(llama, evaluation__every_rounds=2),
        folder=tmp_path / "run",
        report=reports.append,
        warn=lambda _: None,
    )
    stages = ["forecast 0", "start 0", "before 0", "round 1", "forecast 1", "round 2"]
    stages += ["evaluation 2", "checkpoint 2", "after 2"]
    assert [f"{report.stage} {report.round}" for report in reports] == stages


def test_a_round_whose_groups_are_all_dead_is_counted_and_moves_nothing(llama: str, tmp_path: Path):
    result = run(llama, tmp_path / "run", reward__format_pattern="(?s).*", training__rounds=1)
    (line,) = metric_lines(result.folder, "round")
    assert line["rollout/dead_groups"] == line["rollout/groups"] == 8
    assert line["update/live_rollouts"] == 0
    assert line["update/gradient_norm"] == 0
    assert "ratio/min" not in line
    start = AutoModelForCausalLM.from_pretrained(llama)
    for name, after in AutoModelForCausalLM.from_pretrained(
        result.checkpoint / "model"
    ).named_parameters():
        assert torch.equal(after, start.get_parameter(name)), name


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(engine: str, llama: str, tmp_path: Path):
    first = run(llama, tmp_path / "1", training__engine=engine)
    second = run(llama, tmp_path / "2", training__engine=engine)
    assert same_weights(first.checkpoint, second.checkpoint)
    assert untimed(first.folder) == untimed(second.folder)


def test_another_seed_gives_another_run(llama: str, tmp_path: Path):
    first = run(llama, tmp_path / "1")
    second = run(llama, tmp_path / "2", training__seed=1)
    assert not same_weights(first.checkpoint, second.checkpoint)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_resumed_run_is_the_uninterrupted_run(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
):
    model = request.getfixturevalue(family)
    changes = {
        "training__rounds": 4,
        "training__schedule": "cosine",
        "training__warmup_steps": 3,
        "checkpoint": {"every_rounds": 1, "keep": 9},
        "evaluation__every_rounds": 1,
    }
    straight = run(model, tmp_path / "straight", **changes)
    killed = tmp_path / "killed"
    shutil.copytree(straight.folder, killed)
    for number in (3, 4):
        shutil.rmtree(killed / "checkpoints" / f"round-{number:06d}")
    (killed / "checkpoints" / ".round-000003.partial" / "model").mkdir(parents=True)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "rou')
    resumed = run(model, killed, resume=True, **changes)
    assert same_weights(resumed.checkpoint, straight.checkpoint)
    moments = [load_file(r.checkpoint / "optimizer.safetensors") for r in (straight, resumed)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert untimed(resumed.folder) == untimed(straight.folder)
    assert [e.outcomes for e in resumed.after] == [e.outcomes for e in straight.after]
    assert [e.outcomes for e in resumed.before] == [e.outcomes for e in straight.before]
    lines = [list(read_lines(r.folder, "rollouts.jsonl")) for r in (straight, resumed)]
    assert lines[0] == lines[1]


def test_a_folder_that_holds_a_run_is_not_trained_over(finished: TrainingResult, llama: str):
    before = (finished.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=r"already holds a run; continue it with --resume"):
        run(llama, finished.folder)
    assert (finished.folder / "metrics.jsonl").read_bytes() == before


def test_a_run_is_not_resumed_with_another_recipe_and_keeps_its_own(
    finished: TrainingResult, llama: str
):
    before = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="was made with another recipe"):
        run(llama, finished.folder, resume=True, training__rounds=9)
    after = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_run_that_died_before_its_first_checkpoint_starts_again(llama: str, tmp_path: Path):
    whole = run(llama, tmp_path / "whole")
    died = run(llama, tmp_path / "died")
    shutil.rmtree(died.folder / "checkpoints")
    again = run(llama, died.folder, resume=True)
    assert same_weights(again.checkpoint, whole.checkpoint)
    assert untimed(again.folder) == untimed(whole.folder)


def test_resuming_without_a_checkpoint_is_refused(llama: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no run to resume; start it without"):
        run(llama, tmp_path / "run", resume=True)


def test_a_finished_run_that_is_resumed_has_its_answer(llama: str, tmp_path: Path):
    first = run(llama, tmp_path / "run")
    lines = untimed(first.folder)
    again = run(llama, tmp_path / "run", resume=True)
    assert again.checkpoint == first.checkpoint
    assert untimed(again.folder) == lines
    assert [e.outcomes for e in again.after] == [e.outcomes for e in first.after]
    stages = [line["stage"] for line in read_lines(first.folder, "evaluations.jsonl")]
    assert stages == ["before", "after"]


def test_a_run_resumed_with_other_means_says_so(llama: str, tmp_path: Path):
    often: dict[str, Any] = {"checkpoint": {"every_rounds": 1, "keep": 9}}
    first = run(llama, tmp_path / "run", **often)
    path = first.folder / "run.json"
    made_with = json.loads(path.read_text())
    path.write_text(json.dumps({**made_with, "threads": 99}))
    said: list[str] = []
    run(llama, first.folder, resume=True, warn=kept_in(said), **often)
    changed = f"this is not what made {first.folder}: threads was 99, is {torch.get_num_threads()}"
    assert said == [f"{changed}; its rounds are done, and stay as they were"]
    shutil.rmtree(first.checkpoint)  # as if it had been killed before its last checkpoint
    said.clear()
    run(llama, first.folder, resume=True, warn=kept_in(said), **often)
    assert said == [f"{changed}; the run goes on, but not bit for bit as it would have there"]


def test_both_engines_draw_the_same_and_learn_the_same(llama: str, tmp_path: Path):
    # One round, so that both draw from the same weights: uniforms are keyed by the work, and fp32
    # kernels differ by about 1e-6 nats, far less than the gaps a uniform would have to fall into.
    # AdamW divides by the gradient's size, so rounding shows most where a gradient is nearly 0;
    # a large epsilon keeps that apart from what is compared. The two then agree to fp32 rounding:
    # 1e-3 of the way the weights went.
    changes = {"training__rounds": 1, "training__adam_eps": 1e-3}
    fast = run(llama, tmp_path / "fast", **changes)
    plain = run(llama, tmp_path / "plain", training__engine="plain", **changes)
    texts = [
        [[r["text"] for r in group["rollouts"]] for group in read_lines(folder, "rollouts.jsonl")]
        for folder in (fast.folder, plain.folder)
    ]
    assert texts[0] == texts[1]
    start = {
        name: tensor.detach()
        for name, tensor in AutoModelForCausalLM.from_pretrained(llama).named_parameters()
    }
    moved = distance(weights(plain.checkpoint), start)
    assert moved > 0.01
    assert distance(weights(fast.checkpoint), weights(plain.checkpoint)) < 1e-3 * moved
    for ours, theirs in zip(
        metric_lines(fast.folder, "step"), metric_lines(plain.folder, "step"), strict=True
    ):
        # The plain engine also runs rows of dead groups, so figures over tokens differ; these are
        # of the whole step.
        assert ours["update/gradient_norm"] == pytest.approx(
            theirs["update/gradient_norm"], rel=1e-3
        )
        assert ours["update/loss"] == pytest.approx(theirs["update/loss"], abs=1e-4)


def test_the_plain_engine_starts_every_round_at_ratio_exactly_1(gpt2: str, tmp_path: Path):
    result = run(gpt2, tmp_path / "run", training__engine="plain")
    assert {line["rollout/old_from_sampler"] for line in metric_lines(result.folder, "round")} == {
        0
    }
    for line in first_steps(result.folder):
        assert line["ratio/min"] == line["ratio/max"] == 1


def test_a_model_of_another_family_trains_on_the_plain_path_and_says_so(gpt2: str, tmp_path: Path):
    said: list[str] = []
    result = train(tiny_recipe(gpt2), folder=tmp_path / "run", warn=kept_in(said))
    assert len(metric_lines(result.folder, "round")) == 2
    (warning,) = said
    assert "it runs on the plain path: same results, slower" in warning


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str, llama: str, tmp_path: Path):
    result = run(llama, tmp_path / "run", objective={"name": name}, training__rounds=1)
    (line,) = metric_lines(result.folder, "round")
    assert line["update/gradient_norm"] > 0
    assert math.isfinite(line["update/loss"])
    assert line["ratio/min"] < 1 < line["ratio/max"]
    clipped = line["clip/low_fraction"] + line["clip/high_fraction"]
    assert (clipped == 0) == (name == "gmpo_no_clip")


def test_on_policy_gmpo_equals_grpo(llama: str, tmp_path: Path):
    # With one step a round the ratio is exactly 1 and both gradients are A grad log pi, averaged
    # over the tokens. The plain engine makes the ratio exact; only the order of sums differs.
    changes = {
        "training__steps_per_round": 1,
        "training__engine": "plain",
        "training__adam_eps": 1e-3,
        "training__rounds": 3,
    }
    gmpo = run(llama, tmp_path / "gmpo", **changes)
    grpo = run(llama, tmp_path / "grpo", objective={"name": "grpo"}, **changes)
    start = {
        name: tensor.detach()
        for name, tensor in AutoModelForCausalLM.from_pretrained(llama).named_parameters()
    }
    moved = distance(weights(gmpo.checkpoint), start)
    assert moved > 0.01
    assert distance(weights(gmpo.checkpoint), weights(grpo.checkpoint)) < 1e-3 * moved


def test_off_policy_gmpo_differs_from_grpo(llama: str, tmp_path: Path):
    gmpo = run(llama, tmp_path / "gmpo", training__gradient_cosine_every=1)
    grpo = run(llama, tmp_path / "grpo", objective={"name": "grpo"})
    assert not same_weights(gmpo.checkpoint, grpo.checkpoint)
    for line in metric_lines(gmpo.folder, "round"):
        assert 0 < line["update/gradient_cosine_grpo"] < 0.9999


def test_a_kl_term_is_measured_against_the_starting_model(llama: str, tmp_path: Path):
    result = run(llama, tmp_path / "run", objective={"kl_coefficient": 0.1})
    divergences = [line["kl_ref/k3"] for line in metric_lines(result.folder, "step")]
    assert divergences[0] == pytest.approx(0, abs=1e-9)
    assert min(divergences[1:]) > 1e-6
    assert divergences[-1] > divergences[1]


def test_a_strong_kl_term_keeps_the_policy_near_the_starting_model(llama: str, tmp_path: Path):
    changes = {"training__rounds": 4, "training__learning_rate": 3e-3}
    weak = run(llama, tmp_path / "weak", objective={"kl_coefficient": 1e-6}, **changes)
    strong = run(llama, tmp_path / "strong", objective={"kl_coefficient": 10.0}, **changes)
    last = [metric_lines(r.folder, "round")[-1]["kl_ref/k3"] for r in (weak, strong)]
    assert last[1] < 0.5 * last[0]


def test_an_entropy_bonus_is_measured_and_keeps_entropy(llama: str, tmp_path: Path):
    changes = {"training__rounds": 4, "training__learning_rate": 3e-3}
    none = run(llama, tmp_path / "none", objective={"entropy_coefficient": 1e-9}, **changes)
    bonus = run(llama, tmp_path / "bonus", objective={"entropy_coefficient": 1.0}, **changes)
    last = [metric_lines(r.folder, "round")[-1]["update/entropy"] for r in (none, bonus)]
    assert last[1] > last[0] + 0.1
    assert "update/entropy" not in metric_lines(run(llama, tmp_path / "off").folder)[0]


def test_a_completion_cut_by_the_limit_can_be_given_no_reward(llama: str, tmp_path: Path):
    result = run(llama, tmp_path / "run", reward__truncated="zero", training__rounds=1)
    rollouts = [
        rollout
        for group in read_lines(result.folder, "rollouts.jsonl")
        for rollout in group["rollouts"]
    ]
    cut = [rollout for rollout in rollouts if rollout["finish_reason"] == "length"]
    assert cut and {rollout["reward"] for rollout in cut} == {0.0}
    assert {rollout["rewards"]["format"] for rollout in cut} == {0.0, 1.0}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_rises(seed: int, llama: str, tmp_path: Path):
    # One completion in ten or twenty of a random model starts with a digit; all can learn to.
    result = run(
        llama,
        tmp_path / "run",
        reward__format_pattern=r"(?s)\d.*",
        training={
            "rounds": 12,
            "steps_per_round": 4,
            "learning_rate": 6e-3,
            "schedule": "cosine",
            "seed": seed,
        },
    )
    rewards = [line["rollout/reward"] for line in metric_lines(result.folder, "round")]
    assert rewards[0] < 0.25
    assert sum(rewards[-3:]) / 3 > 0.8


def test_a_run_that_diverges_stops_and_says_what_to_do(llama: str, tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"begin a new run with a lower learning rate"):
        run(llama, tmp_path / "run", training__learning_rate=1e12, training__rounds=3)
    # What it did until then can still be read.
    assert all(line["round"] <= 3 for line in metric_lines(tmp_path / "run"))
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_a_model_with_nan_weights_stops_and_says_what_to_do(llama: str, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = math.nan
    model.save_pretrained(broken)
    with pytest.raises(NonFiniteError, match=r"logits are not finite .* use other weights"):
        run(str(broken), tmp_path / "run")


def test_a_task_smaller_than_a_round_repeats_prompts_with_fresh_draws(llama: str, tmp_path: Path):
    task = {"kind": "arithmetic", "max_operand": 1, "held_out_items": 1, "instruction": ""}
    result = run(llama, tmp_path / "run", task=task, training__rounds=1)
    groups = list(read_lines(result.folder, "rollouts.jsonl"))
    texts: dict[str, list[list[str]]] = {}
    for group in groups:
        texts.setdefault(group["prompt_id"], []).append([r["text"] for r in group["rollouts"]])
    repeated = [drawn for drawn in texts.values() if len(drawn) > 1]
    assert repeated and all(drawn[0] != drawn[1] for drawn in repeated)
