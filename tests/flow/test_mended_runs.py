"""Runs that the guard mends: steps left out, roll-backs, and neither lost by a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripts.tiny_policy import sums_recipe, warm_policy
from tests import guard_rewards
from tests.commands import process
from tests.killed_runs import Death, digest, run_in_process
from tests.tiny_runs import metric_lines, tiny_recipe, write_recipe

from gmpo.checkpoint import checkpoint_round, checkpoints_newest_first, latest_checkpoint
from gmpo.config import RunConfig
from gmpo.errors import GuardStopped, NonFiniteLossError
from gmpo.inspection import summarize_run
from gmpo.tracking import read_lines
from gmpo.training import train
from gmpo.tuning.score import given_up_rounds


def mending(model: str, **changes: Any) -> RunConfig:
    """Token ratios explode in round 1 at this step size, and not at a hundredth of it."""
    table = {
        "training__rounds": 3,
        "training__learning_rate": 0.3,
        "checkpoint": {"every_rounds": 1, "keep": 2},
        "guard": {"mode": "mend", "learning_rate_factor": 0.01},
    }
    return tiny_recipe(model, **{**table, **changes})


def events(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder, "events.jsonl"))


@pytest.fixture(scope="module")
def mended(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mended") / "run"
    whole = run_in_process(mending(model), folder)
    assert whole.exit_code == 0
    (folder.parent / "touches").write_text(str(whole.touches))
    return folder


def test_a_critical_alarm_takes_the_run_back_and_it_ends_healthy(mended: Path):
    (alarm,) = [event for event in events(mended) if event["taken"] == "roll_back"]
    assert (alarm["alarm"], alarm["round"], alarm["to_round"]) == ("ratio_explosion", 1, 0)
    assert (alarm["attempt"], alarm["severity"]) == (0, "critical")
    assert alarm["recommended_action"].startswith("lower training.learning_rate")
    assert not [event for event in events(mended) if event["attempt"] == 1]
    rounds = metric_lines(mended, "round")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert all(line["ratio/am_gm_gap"] < 1 for line in rounds)
    steps = metric_lines(mended, "step")
    assert [line["update/learning_rate"] for line in steps] == pytest.approx([0.003] * 12)
    summary = summarize_run(mended)
    assert summary.rollbacks == 1
    assert summary.alarms == {"ratio_explosion": 1}
    assert given_up_rounds(mended) == 1


def test_what_was_given_up_is_kept_apart(mended: Path):
    aside = mended / "abandoned" / "attempt-0"
    (given_up,) = metric_lines(aside, "round")
    assert given_up["round"] == 1
    assert given_up["ratio/am_gm_gap"] > 1
    # The second attempt draws anew: the same prompts are answered otherwise.
    old, new = (
        {
            line["prompt_id"]: line
            for line in read_lines(folder, "rollouts.jsonl")
            if line["round"] == 1
        }
        for folder in (aside, mended)
    )
    assert old.keys() == new.keys()
    assert old != new


def test_a_run_that_mends_keeps_the_checkpoint_from_before_its_first_round(mended: Path):
    kept = [checkpoint_round(path) for path in checkpoints_newest_first(mended / "checkpoints")]
    assert kept == [3, 2, 0]


def some_moments(total: int) -> list[int]:
    """Touches spread over the run, the roll-back's neighbourhood among them."""
    return sorted({max(1, total * share // 20) for share in range(1, 20, 3)})


def test_a_run_killed_anywhere_is_mended_like_one_that_was_not(
    model: str, mended: Path, tmp_path: Path
):
    total = int((mended.parent / "touches").read_text())
    check_kills(model, mended, tmp_path, some_moments(total))


@pytest.mark.verify
def test_a_run_killed_at_every_touch_is_mended_like_one_that_was_not(
    model: str, mended: Path, tmp_path: Path
):
    total = int((mended.parent / "touches").read_text())
    check_kills(model, mended, tmp_path, list(range(1, total + 1)))


def check_kills(model: str, mended: Path, tmp_path: Path, moments: list[int]) -> None:
    expected = digest(latest_checkpoint(mended / "checkpoints"))
    for touches in moments:
        folder = tmp_path / f"killed-{touches}"
        killed = run_in_process(mending(model), folder, Death(touches=touches))
        assert killed.exit_code != 0
        assert run_in_process(mending(model), folder).exit_code == 0
        assert digest(latest_checkpoint(folder / "checkpoints")) == expected, touches
        assert events(folder) == events(mended), touches
        assert summarize_run(folder).rollbacks == 1, touches


def test_after_the_last_roll_back_a_critical_alarm_ends_the_run(model: str, tmp_path: Path):
    config = mending(
        model, guard={"mode": "mend", "learning_rate_factor": 1.0, "most_rollbacks": 1}
    )
    with pytest.raises(GuardStopped, match="stopped the run after 1 roll-backs after round"):
        train(config, folder=tmp_path, warn=lambda _: None)
    assert [event["taken"] for event in events(tmp_path)][:2] == ["roll_back", "stop"]


@pytest.mark.parametrize(
    ("learning_rate", "steps_per_round", "every_rounds", "found_in"),
    [
        pytest.param(1e20, 4, 0, 1, id="gradient"),
        pytest.param(1e38, 4, 0, 1, id="log-probabilities"),
        pytest.param(1e38, 1, 0, 2, id="sampling"),
        pytest.param(1e38, 1, 1, 2, id="evaluation"),
    ],
)
def test_a_value_that_is_not_finite_takes_the_run_back_wherever_it_shows(
    model: str,
    tmp_path: Path,
    learning_rate: float,
    steps_per_round: int,
    every_rounds: int,
    found_in: int,
):
    """The next attempt begins with no gradient and no request of the one before."""
    config = mending(
        model,
        training__learning_rate=learning_rate,
        training__steps_per_round=steps_per_round,
        evaluation__every_rounds=every_rounds,
        guard={"mode": "mend", "learning_rate_factor": 1e-3 / learning_rate},
    )
    broken = tmp_path / "broken"
    train(config, folder=broken, warn=lambda _: None)
    (alarm,) = events(broken)
    assert (alarm["alarm"], alarm["round"]) == ("non_finite", found_in)
    assert (alarm["taken"], alarm["to_round"]) == ("roll_back", 0)
    rounds = metric_lines(broken, "round")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    # A process that is killed once the second attempt has begun has nothing of the first in memory.
    whole = run_in_process(config, tmp_path / "whole")
    assert whole.exit_code == 0
    killed = tmp_path / "killed"
    assert run_in_process(config, killed, Death(touches=whole.touches * 3 // 4)).exit_code != 0
    assert run_in_process(config, killed).exit_code == 0
    left, right = (digest(latest_checkpoint(f / "checkpoints")) for f in (broken, killed))
    assert left == right


def test_the_command_tells_the_roll_back(model: str, tmp_path: Path):
    recipe = write_recipe(tmp_path / "recipe.toml", mending(model))
    done = process("train", recipe, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "guard: back to round 0, roll-back 1 of at most 3; on with step size 0.003" in (
        done.stdout + done.stderr
    )
    shown = process("inspect", tmp_path / "run", "--no-plots")
    assert "roll-backs by the guard" in shown.stdout


def spiking(model: str, reward: str = "huge_once", **guard: Any) -> RunConfig:
    """Rewards of the seventh round are far too large, and nothing divides by them."""
    return tiny_recipe(
        model,
        training__rounds=8,
        objective={"advantage_scale": "none"},
        reward={
            "weights": {"mine": 1.0},
            "functions": {"mine": f"tests.guard_rewards:{reward}"},
        },
        guard=guard,
    )


def test_steps_with_a_spike_are_left_out_and_counted(model: str, tmp_path: Path):
    guard_rewards.forget_calls()
    train(spiking(model, skip_steps=True), folder=tmp_path, warn=lambda _: None)
    skipped = [event for event in events(tmp_path) if event["alarm"] == "gradient_spike"]
    assert skipped
    assert {event["round"] for event in skipped} == {7}
    for event in skipped:
        assert event["value"] > event["threshold"] > event["baseline"]
        assert event["taken"] == event["action"] == "skip_step"
        assert 25 <= event["step"] <= 28
    counts = [line["update/skipped_steps_total"] for line in metric_lines(tmp_path, "round")]
    assert counts == [0] * 6 + [len(skipped), 0]
    assert summarize_run(tmp_path).skipped_steps_total == len(skipped)


def test_a_spike_whose_steps_are_taken_is_a_warning(model: str, tmp_path: Path):
    guard_rewards.forget_calls()
    train(spiking(model), folder=tmp_path, warn=lambda _: None)
    (spike,) = [event for event in events(tmp_path) if event["alarm"] == "gradient_spike"]
    assert (spike["round"], spike["step"], spike["severity"]) == (7, None, "warning")
    assert spike["taken"] == spike["action"] == "warn"
    assert spike["value"] > spike["threshold"] > spike["baseline"]


def test_steps_whose_loss_is_not_finite_are_left_out_and_counted(model: str, tmp_path: Path):
    guard_rewards.forget_calls()
    config = spiking(model, "endless_once", skip_steps=True)
    train(config, folder=tmp_path, warn=lambda _: None)
    skipped = events(tmp_path)
    assert {event["alarm"] for event in skipped} == {"gradient_spike"}
    assert {event["round"] for event in skipped} == {7}
    for event in skipped:
        assert (event["metric"], event["value"], event["taken"]) == (
            "update/loss",
            None,
            "skip_step",
        )
    left_out = [line for line in metric_lines(tmp_path, "step") if line["update/loss"] is None]
    assert [line["step"] for line in left_out] == [event["step"] for event in skipped]
    assert summarize_run(tmp_path).skipped_steps_total == len(skipped)
    last = metric_lines(tmp_path, "round")[-1]
    assert last["round"] == 8
    assert last["update/gradient_norm"] > 0


def test_without_leaving_steps_out_a_loss_that_is_not_finite_ends_the_run(
    model: str, tmp_path: Path
):
    guard_rewards.forget_calls()
    with pytest.raises(NonFiniteLossError, match="the loss is not finite for rollouts"):
        train(spiking(model, "endless_once"), folder=tmp_path, warn=lambda _: None)
    (event,) = events(tmp_path)
    assert (event["alarm"], event["round"], event["taken"]) == ("non_finite", 7, "stop")


def test_without_a_spike_nothing_is_left_out_and_the_weights_are_the_same(
    model: str, tmp_path: Path
):
    with_rule, without = tmp_path / "with", tmp_path / "without"
    calm = tiny_recipe(model, training__rounds=6)
    watched = calm.model_copy(update={"guard": calm.guard.model_copy(update={"skip_steps": True})})
    for config, folder in ((watched, with_rule), (calm, without)):
        train(config, folder=folder, warn=lambda _: None)
    assert summarize_run(with_rule).skipped_steps_total == 0
    assert summarize_run(without).skipped_steps_total is None
    left, right = (digest(latest_checkpoint(f / "checkpoints")) for f in (with_rule, without))
    assert left == right


def test_a_policy_that_unlearns_what_was_meant_is_taken_back(model: str, tmp_path: Path):
    """The reward pays for another thing than the held-out answers: it rises and they fall."""
    policy = warm_policy(tmp_path / "policy", steps=250)
    config = sums_recipe(
        policy,
        task__held_out_items=60,
        reward={"weights": {"format": 1.0}, "format_pattern": r"0.*"},
        # With 1e-3 the ratios come near their own limit: on one kind of processor they passed it.
        training={"rounds": 12, "steps_per_round": 4, "learning_rate": 6e-4, "seed": 0},
        # A checkpoint of every evaluation: which of them tells the drop depends on the processor.
        checkpoint={"every_rounds": 2, "keep": 6},
        evaluation={"every_rounds": 4, "items_during": 60, "few_shot": 0, "sampled": False},
        guard={"mode": "mend", "learning_rate_factor": 0.001, "most_rollbacks": 2},
    )
    train(config, folder=tmp_path / "run", warn=lambda _: None)
    (event,) = [e for e in events(tmp_path / "run") if e["alarm"] == "held_out_drop"]
    assert event["taken"] == "roll_back"
    assert event["to_round"] == event["onset"] - 2  # whose weights were evaluated as healthy
    assert event["value"] < event["threshold"] < event["baseline"]
    evaluations = metric_lines(tmp_path / "run", "evaluation")
    assert [line["round"] for line in evaluations] == [4, 8, 12]
    assert all(line["evaluation/accuracy"] > event["threshold"] for line in evaluations)
