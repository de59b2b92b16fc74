"""A run's figures, computed by hand, and what the terminal shows of them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from gmpo.errors import ConfigError, DataError, RunFolderError
from gmpo.inspection import load_groups, summarize_run
from gmpo.recipe import dump_recipe, load_recipe
from gmpo.run_tables import render_group, render_summary
from gmpo.tracking import RunFolder


def evaluation(name: str, accuracy: float, **others: int) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "interval_95": [accuracy - 0.1, accuracy + 0.1], "items": 50}
    return {"name": name, **figures, "truncated": 0, "timeouts": 0, **others}


def rollout(text: str, **others: Any) -> dict[str, Any]:
    figures = {"tokens": 3, "finish_reason": "stop", "reward": 1.0, "rewards": {"correct": 1.0}}
    ratio = {"sequence": 1.0234, "min": 0.73, "max": 1.41}
    return {"text": text, **figures, "error": None, "advantage": 1.5, "ratio": ratio} | others


def group(*rollouts: dict[str, Any], **others: Any) -> dict[str, Any]:
    where = {"round": 3, "group": 0, "prompt_id": "12+7"}
    return {**where, "prompt": "user: What is 12 + 7?", "answer": "19", "rollouts": rollouts} | {
        **others
    }


def shown(renderable: RenderableType, *, width: int = 80) -> str:
    """As it arrives in a pipe: no colour, no terminal."""
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def figures_of(text: str) -> dict[str, str]:
    """Name and value of each two-column row."""
    pairs = (line.strip().split("  ", 1) for line in text.splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Twelve rounds of two steps; the reward is 0.1 more each round up to 1.1, then 0.5."""
    run = RunFolder(tmp_path / "run")
    recipe = load_recipe("quickstart", ["training.rounds=20", "description=adds"])
    run.write_text("recipe.toml", dump_recipe(recipe))
    run.log_record(
        "evaluations.jsonl",
        {"stage": "before", "round": 0, "results": [evaluation("greedy", 0.2, truncated=4)]},
    )
    for number in range(1, 13):
        first = {
            "ratio/min": 1.0,
            "ratio/max": 1.0,
            "clip/low_fraction": 0.0,
            "clip/high_fraction": 0.0,
        }
        second = {
            "ratio/min": 1 / (1 + number),
            "ratio/max": 1.0 + number,
            "clip/low_fraction": 0.02,
            "clip/high_fraction": 0.04,
        }
        if number in (4, 8):
            second["update/gradient_cosine_grpo"] = 1 - number / 100
        run.log_metrics("step", first, round=number, step=2 * number - 1)
        run.log_metrics("step", second, round=number, step=2 * number)
        run.log_metrics(
            "round",
            {
                "rollout/reward": number / 10 if number < 12 else 0.5,
                "rollout/groups": 8.0,
                "rollout/dead_groups": float(number % 2),
                "rollout/truncated_fraction": 0.25 if number <= 6 else 0.75,
                "grading/timeouts_total": 2.0,
                "rollout/errors_total": 1.0 if number == 5 else 0.0,
                "memory/peak_gib": number / 4,
                "rollout/mismatch_mean": 0.001 * number,
                "rollout/mismatch_max": 0.01 * number,
                "time/rollout_seconds": 3.0 if number == 1 else 1.0,
                "time/reward_seconds": 0.5,
                "time/update_seconds": 2.0,
                "time/tokens_per_second": 100.0 if number == 1 else 200.0,
                **second,
            },
            round=number,
            step=2 * number,
        )
    run.log_record(
        "evaluations.jsonl",
        {
            "stage": "after",
            "round": 12,
            "results": [evaluation("greedy", 0.8), evaluation("sampled", 0.6)],
        },
    )
    return run


def test_the_summary_has_the_figures_of_the_run(run: RunFolder):
    summary = summarize_run(run.path)
    assert (summary.description, summary.model) == ("adds", "smollm2-135m")
    assert (summary.objective, summary.rounds_done, summary.rounds_total) == ("gmpo", 12, 20)
    assert summary.clip_bounds == pytest.approx((math.exp(-0.4), math.exp(0.4)))
    assert summary.first_reward == 0.1
    # Rounds 3 to 11 are 0.3 ... 1.1, which sum to 6.3; with 0.5 that is 6.8 over ten.
    assert summary.last_ten_reward == pytest.approx(0.68)
    # In a row: rounds 1-10 mean 0.55, 2-11 mean (0.2 + ... + 1.1) / 10 = 0.65, 3-12 mean 0.68.
    assert summary.best_ten_reward == pytest.approx(0.68)
    assert summary.ratio_range == (1 / 13, 13.0)
    assert summary.clip_low_fraction == pytest.approx(0.01)  # half the steps 0, half 0.02
    assert summary.clip_high_fraction == pytest.approx(0.02)
    assert summary.cosine_to_grpo == pytest.approx((0.92, 0.94))  # 0.96 and 0.92
    assert summary.dead_group_fraction == 6 / 96  # one of eight in every odd round
    assert summary.truncated_fraction == pytest.approx(0.5)
    assert summary.mismatch_mean == pytest.approx(0.0065)  # mean of 1 ... 12 thousandths
    assert summary.mismatch_max == pytest.approx(0.12)
    # 300 tokens in 3 s, then eleven times 200 in 1 s: 2500 / 14.
    assert summary.tokens_per_second == pytest.approx(2500 / 14)
    assert summary.rollout_seconds == 14.0
    assert (summary.reward_seconds, summary.update_seconds) == (6.0, 24.0)
    assert summary.peak_memory_gib == 3.0
    assert (summary.timeouts_total, summary.failed_rollouts_total) == (24, 1)
    assert summary.non_finite_total == 0


def test_the_best_ten_rounds_may_lie_before_the_last_ten(run: RunFolder):
    for number in (13, 14):
        run.log_metrics("round", {"rollout/reward": 0.0}, round=number, step=2 * number)
    summary = summarize_run(run.path)
    # Rounds 5 to 11 are 0.5 ... 1.1, which sum to 5.6; with 0.5, 0 and 0 that is 6.1 over ten.
    assert summary.last_ten_reward == pytest.approx(0.61)
    assert summary.best_ten_reward == pytest.approx(0.68)


def test_evaluations_keep_every_figure(run: RunFolder):
    summary = summarize_run(run.path)
    (before,) = summary.before
    assert (before.name, before.accuracy, before.items) == ("greedy", 0.2, 50)
    assert before.interval_95 == pytest.approx((0.1, 0.3))
    assert (before.truncated, before.timeouts) == (4, 0)
    assert [figures.name for figures in summary.after] == ["greedy", "sampled"]


def test_a_stage_evaluated_again_after_a_resume_shows_the_newest(run: RunFolder):
    record = {"stage": "after", "round": 12, "results": [evaluation("greedy", 0.9)]}
    run.log_record("evaluations.jsonl", record)
    (after,) = summarize_run(run.path).after
    assert after.accuracy == 0.9


def test_what_was_not_measured_is_none_and_what_is_not_finite_is_counted(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.log_metrics("step", {"ratio/max": math.inf, "update/loss": 0.1}, round=1, step=1)
    # The round repeats the step's infinite ratio, which is one figure, and has one of its own.
    values = {"rollout/reward": math.nan, "ratio/max": math.inf}
    run.log_metrics("round", values, round=1, step=1)
    summary = summarize_run(tmp_path)
    assert summary.non_finite_total == 2
    measured = {name for name, value in summary.as_dict().items() if value not in (None, (), {})}
    assert measured == {"folder", "rounds_done", "rollbacks", "non_finite_total"}
    text = figures_of(shown(render_summary(summary)))
    assert text["model"] == "not known"
    assert text["sampled reward, first round"] == "not measured"
    assert text["gradient cosine to GRPO"] == "not measured"
    assert text["figures not finite, left out"] == "2"


def test_the_summary_is_json(run: RunFolder):
    table = json.loads(json.dumps(summarize_run(run.path).as_dict(), allow_nan=False))
    assert table["ratio_range"] == [1 / 13, 13.0]
    assert table["after"][1]["name"] == "sampled"


def test_a_half_written_last_line_is_left_out(run: RunFolder):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "round", "rou')
    assert summarize_run(run.path).rounds_done == 12


def test_reading_a_run_writes_nothing(run: RunFolder):
    def times() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in [run.path, *run.path.iterdir()]}

    before = times()
    summarize_run(run.path)
    assert times() == before


def test_the_terminal_shows_the_summary_in_80_columns(run: RunFolder):
    text = shown(render_summary(summarize_run(run.path)))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    figures = figures_of(text)
    assert figures["rounds done"] == "12 of 20"
    assert figures["sampled reward, last ten rounds"] == "0.680"
    assert figures["importance ratio, smallest to largest"] == "0.076923 to 13"
    assert figures["importance ratio, bounds of the clip"] == "0.67032 to 1.4918"
    assert figures["tokens clipped high"] == "2.000%"
    assert figures["gradient cosine to GRPO"] == "0.9400 mean, 0.9200 smallest"
    assert figures["mismatch of trainer and sampler"] == "0.0065 nats mean, 0.12 largest"
    assert figures["completion tokens per second"] == "179"
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "greedy 0.200 (0.100-0.300) 0.800 (0.700-0.900) 50 4/0 0" in lines
    assert "sampled - 0.600 (0.500-0.700) 50 0 0" in lines


def test_an_objective_without_a_clip_has_no_bounds(run: RunFolder):
    recipe = load_recipe("quickstart", ["objective.name=gmpo_no_clip"])
    run.write_text("recipe.toml", dump_recipe(recipe))
    text = figures_of(shown(render_summary(summarize_run(run.path))))
    assert text["importance ratio, bounds of the clip"] == "none"


def test_a_folder_that_does_not_exist_is_named_and_not_created(tmp_path: Path):
    with pytest.raises(RunFolderError, match=r"absent does not exist; give the folder"):
        summarize_run(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_file_is_no_run_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="file is a file"):
        summarize_run(tmp_path / "file")


def test_a_folder_of_something_else_is_no_run_folder(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("")
    for reader in (summarize_run, load_groups):
        with pytest.raises(RunFolderError, match=r"neither metrics\.jsonl nor recipe\.toml"):
            reader(tmp_path)


def test_a_run_without_a_finished_round_says_so(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.log_metrics("step", {"update/loss": 0.1}, round=1, step=1)
    with pytest.raises(RunFolderError, match="no finished round yet"):
        summarize_run(tmp_path)


def test_a_damaged_line_is_named(run: RunFolder):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("{oops\n")
    with pytest.raises(DataError, match=r"line 37 of .*metrics\.jsonl is damaged.*'\{oops'"):
        summarize_run(run.path)


def test_a_recipe_of_another_version_is_refused_by_its_key(run: RunFolder):
    run.write_text("recipe.toml", '[task]\nkind = "svamp"\ncolour = 1\n')
    with pytest.raises(ConfigError, match=r"task\.colour"):
        summarize_run(run.path)


def test_groups_come_in_the_order_they_were_kept(run: RunFolder):
    for place in range(3):
        run.log_record("rollouts.jsonl", group(rollout("19"), group=place))
    assert [record["group"] for record in load_groups(run.path)] == [0, 1, 2]


def test_a_run_that_kept_no_groups_says_so(run: RunFolder):
    with pytest.raises(RunFolderError, match=r"no groups to show.*groups_per_round = 0"):
        load_groups(run.path)


def test_a_group_shows_its_prompt_answer_and_figures():
    losing = rollout("20", reward=0.25, rewards={"correct": 0.0, "format": 1.0}, advantage=-0.5)
    text = shown(render_group(group(rollout("19"), losing)))
    assert "round 3, group 1, prompt 12+7" in text
    assert "user: What is 12 + 7?" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "# reward correct format advantage ratio token ratios tokens end" in lines
    assert "1 1 1 - +1.500 1.023 0.73..1.41 3 stop" in lines
    assert "2 0.25 0 1 -0.500 1.023 0.73..1.41 3 stop" in lines
    assert lines[lines.index("answer") + 1] == "19"
    assert "2 20" in lines


def test_long_texts_are_wrapped_and_never_cut():
    words = [f"word{number}" for number in range(400)]
    text = shown(render_group(group(rollout("y" * 300), prompt=" ".join(words))))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert [word for word in text.split() if word.startswith("word")] == words
    assert sum(len(part) for part in text.split() if set(part) == {"y"}) == 300


def test_a_completion_cannot_steer_the_terminal():
    text = shown(render_group(group(rollout("[red]\x1b[31m\ud83d[/blue]"), answer=None)))
    assert "\x1b" not in text
    assert "[red]\\x1b[31m\\ud83d[/blue]" in text


def test_failed_and_empty_completions_are_told_apart():
    failed = rollout("", reward=None, rewards={}, error="grader died", ratio=None, advantage=0.0)
    text = shown(render_group(group(failed, rollout("", finish_reason="length"))))
    assert "failed: grader died" in text
    assert text.count("(empty)") == 1
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "1 - - +0.000 - - 3 stop" in lines


def test_a_group_of_equal_rewards_says_why_it_has_no_ratio():
    text = shown(render_group(group(rollout("19", ratio=None, advantage=0.0))))
    assert "equal rewards give advantage 0" in text
