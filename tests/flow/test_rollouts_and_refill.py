"""Runs with functions of the user's and with refilled rounds, as a user would start them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import gmpo
from tests.killed_runs import Death, digest, run_in_process
from tests.models import save_tiny
from tests.tiny_runs import kept_in, metric_lines, tiny_recipe, write_recipe

from gmpo.assembly import build_parts
from gmpo.checkpoint import latest_checkpoint
from gmpo.errors import ConfigError, DataError
from gmpo.inputs import Given
from gmpo.recipe import load_recipe
from gmpo.rounds import live_groups
from gmpo.steps import build_steps
from gmpo.tracking import read_lines
from gmpo.training import train

CALCULATOR = Path(__file__).resolve().parents[2] / "examples" / "calculator"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a user, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "site-packages" not in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# Rewards


REWARDS = """
def digits(completions, log_extra, log_metric, trainer_state, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    counts = [sum(c.isdigit() for c in text) for text in texts]
    log_extra("digits", counts)
    log_metric("step", trainer_state.global_step)
    return [count / 3 if count else None for count in counts]

async def letters(completions, **kwargs):
    return [float(completion[0]["content"][:1].isalpha()) for completion in completions]

def broken(completions, **kwargs):
    return [float("nan") if n % 8 == 0 else 0.0 for n in range(len(completions))]
"""


def own_rewards(tiny: str, **changes: Any) -> Any:
    reward = {
        "weights": {"digits": 1.0, "letters": 0.5, "length": 0.0},
        "functions": {"digits": "own_rewards:digits", "letters": "own_rewards:letters"},
        "length_full_tokens": 1,
        "length_zero_tokens": 3,
    }
    return tiny_recipe(tiny, reward=reward, **changes)


def test_functions_named_in_a_recipe_are_logged_apart_and_shown(tiny: str, here: Path):
    (here / "own_rewards.py").write_text(REWARDS)
    recipe = write_recipe(here / "mine.toml", own_rewards(tiny))
    done = gmpo("train", recipe, "--run", "run")
    assert done.exit_code == 0, done.stderr
    first, second = metric_lines(here / "run", "round")
    assert first["rollout/reward_errors_total/digits"] == 0
    # digits says nothing about completions without one
    assert 0 < first["rollout/reward_absent_fraction/digits"] < 1
    assert first["rollout/reward_absent_fraction/letters"] == 0
    assert 0 < first["rollout/reward/letters"] < 1
    assert first["rollout/reward_deviation/letters"] > 0
    assert "rollout/reward/length" in first
    assert (first["reward_metric/step"], second["reward_metric/step"]) == (0, 4)
    shown = next(read_lines(here / "run", "rollouts.jsonl"))["rollouts"][0]
    assert shown["notes"]["digits"] == sum(c.isdigit() for c in shown["text"])
    summary = gmpo("inspect", "run", "--no-plots")
    assert summary.exit_code == 0, summary.stderr
    for name in ("digits", "letters", "length"):
        assert f"reward component {name}" in summary.stdout


def test_a_fault_stops_the_run_or_drops_its_rows_loudly(tiny: str, here: Path):
    (here / "own_rewards.py").write_text(REWARDS)
    table = {"weights": {"r": 1.0, "format": 1.0}, "functions": {"r": "own_rewards:broken"}}
    table["format_pattern"] = "(?s)[0-9a-z].*"
    with pytest.raises(DataError, match=r"rollout 0: reward 'r' is nan; it must be a finite"):
        train(tiny_recipe(tiny, reward=table), folder="stops")
    said: list[str] = []
    config = tiny_recipe(tiny, reward={**table, "on_error": "drop"})
    train(config, folder="drops", warn=kept_in(said))
    first, _ = metric_lines(here / "drops", "round")
    # one of eight rollouts of each of the eight groups
    assert first["rollout/errors_total"] == first["rollout/reward_errors_total/r"] == 8
    assert first["rollout/reward_errors_total/format"] == 0
    assert said[0] == (
        "round 1: reward 'r' failed on 8 of 64 rollouts, which are left out of training; their "
        "error is in rollouts.jsonl"
    )
    shown = next(read_lines(here / "drops", "rollouts.jsonl"))["rollouts"]
    assert shown[0]["error"] == "reward 'r' is nan; it must be a finite number or None"
    assert shown[0]["advantage"] == 0 and shown[0]["reward"] is None


def test_functions_may_be_given_as_objects(tiny: str, tmp_path: Path):
    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    table = {"weights": {"long": 1.0}, "functions": {"long": "notebook:reward"}}
    config = tiny_recipe(tiny, reward=table)
    train(config, folder=tmp_path / "run", given=Given(rewards={"long": reward}))
    assert "rollout/reward/long" in metric_lines(tmp_path / "run", "round")[0]
    with pytest.raises(ConfigError, match="reward function 'short' was given, and the recipe"):
        build_parts(config, warn=print, given=Given(rewards={"short": reward}))


# Rollouts


def calculator(tiny: str, here: Path, **changes: Any) -> Any:
    (here / "calculator.py").write_text((CALCULATOR / "calculator.py").read_text())
    # A random model writes "=" now and then; the example's own prompts and rewards stay.
    example = load_recipe(CALCULATOR / "calculator.toml")
    return tiny_recipe(
        tiny,
        sampling={**example.sampling.model_dump(), "max_length": 64, "max_new_tokens": 12},
        **changes,
    )


def test_the_calculator_answers_within_completions_that_are_trained(
    tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch
):
    config = calculator(tiny, here)
    import calculator as module

    monkeypatch.setattr(module, "value_of", lambda text: "42")
    train(config, folder="run")
    rounds = metric_lines(here / "run", "round")
    assert all(line["rollout/given_tokens_fraction"] > 0 for line in rounds)
    assert all(line["rollout/mismatch_max"] < 1e-3 for line in rounds)
    texts = [
        rollout["text"]
        for line in read_lines(here / "run", "rollouts.jsonl")
        for rollout in line["rollouts"]
    ]
    assert any("= 42" in text for text in texts)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("37 * 48 =", "1776"),
        ("37 \u00d7 48=", "1776"),
        ("The product is (2 + 3) * -4 = ", "-20"),
        ("1 / 3 =", "0.333333"),
        ("1 / 0 =", None),
        ("2 ** 9 =", None),
        ("x =", None),
        ("2 = 3 =", "3"),
        ("__import__('os') =", None),
        ("1 + " * 20 + "1 =", None),
        ("", None),
    ],
)
def test_the_calculator_computes_four_operations_and_nothing_else(
    text: str, value: str | None, here: Path
):
    (here / "calculator.py").write_text((CALCULATOR / "calculator.py").read_text())
    import calculator

    assert calculator.value_of(text) == value


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_given_tokens_get_no_gradient_in_either_engine(tiny: str, here: Path, engine: str):
    """The gradient is that of the policy's tokens alone, computed the slow and obvious way."""
    config = calculator(tiny, here, training__engine=engine)
    import calculator as module

    module.value_of = lambda text: "42"
    with closing(build_parts(config, warn=lambda _: None)) as parts:
        groups = parts.sample(parts.prompts.take(0, 16), settings=parts.sampling, key=(0, 0))
        scored = parts.score(groups, step=0, prompts_taken=0)
        mixed = [
            (g.prompt, r) for g in scored.groups for r in g.rollouts if not r.from_policy.all()
        ]
        assert mixed
        batches = [b for step in build_steps(parts, scored.groups) for b in step.micro_batches]
        model = parts.policy.model
        for batch in batches:
            logprobs = parts.policy.score(batch).logprobs
            assert not logprobs[~batch.mask].any()
            named = dict(zip(batch.row_names, range(len(batch.row_names)), strict=True))
            for prompt, rollout in mixed:
                row = named.get(f"{prompt.id}#{rollout.index}")
                if row is None:
                    continue
                ids = torch.tensor([[*prompt.token_ids, *rollout.token_ids.tolist()]])
                start = len(prompt.token_ids)
                full = model(ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
                chosen = full.gather(-1, ids[0, start:, None])[:, 0]
                counted = torch.from_numpy(rollout.from_policy)
                weights = [p for p in model.parameters() if p.requires_grad]
                ours = torch.autograd.grad(logprobs[row].sum(), weights, retain_graph=True)
                slow = torch.autograd.grad(chosen[counted].sum(), weights)
                for a, b in zip(ours, slow, strict=True):
                    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_a_rollout_function_needs_its_name_in_the_recipe(tiny: str):
    with pytest.raises(ConfigError, match=r"the recipe's sampling.rollout is not set; name the"):
        build_parts(tiny_recipe(tiny), warn=print, given=Given(rollout=lambda p, c: []))


# Refill


def refilled(tiny: str, **changes: Any) -> Any:
    """A reward that half of the groups agree on, so that rounds differ in the prompts they take."""
    return tiny_recipe(
        tiny,
        reward={"weights": {"format": 1.0}, "format_pattern": "[0-9].*"},
        sampling={
            "group_size": 4,
            "prompts_per_round": 8,
            "max_new_tokens": 3,
            "max_length": 64,
            "dynamic": "refill",
            "max_extra_prompts": 24,
        },
        training={"rounds": 4, "steps_per_round": 4, "learning_rate": 1e-3},
        checkpoint={"every_rounds": 2, "keep": 1},
        **changes,
    )


def test_a_round_is_refilled_until_it_has_enough_live_groups(tiny: str, tmp_path: Path):
    train(refilled(tiny), folder=tmp_path / "run")
    lines = metric_lines(tmp_path / "run", "round")
    for line in lines:
        assert line["rollout/trained_groups"] == 8
        assert 8 <= line["rollout/groups"] <= 32
        # Only the live groups were waited for: the others are counted and nothing is lost.
        assert line["rollout/groups"] - line["rollout/dead_groups"] <= 8
        assert line["rollout/tokens"] == pytest.approx(
            line["rollout/completion_tokens"] * line["rollout/groups"] * 4
        )
    assert any(line["rollout/groups"] > 8 for line in lines)


def test_the_prompts_go_on_where_the_last_round_stopped(tiny: str, tmp_path: Path):
    config = refilled(tiny, tracking={"groups_per_round": 99})
    train(config, folder=tmp_path / "run")
    taken = [line["prompt_id"] for line in read_lines(tmp_path / "run", "rollouts.jsonl")]
    with closing(build_parts(config, warn=print)) as parts:
        assert taken == [prompt.id for prompt in parts.prompts.take(0, len(taken))]


def test_a_refilled_run_that_is_killed_ends_like_one_that_was_not(tiny: str, tmp_path: Path):
    config = refilled(tiny)
    whole = run_in_process(config, tmp_path / "whole")
    assert whole.exit_code == 0
    for number, share in enumerate((0.4, 0.7)):
        folder = tmp_path / f"killed{number}"
        death = Death(touches=int(share * whole.touches))
        assert run_in_process(config, folder, death).exit_code != 0
        assert run_in_process(config, folder).exit_code == 0
        ends = [latest_checkpoint(each / "checkpoints") for each in (tmp_path / "whole", folder)]
        assert None not in ends
        assert digest(ends[0]) == digest(ends[1])


def test_a_round_whose_prompts_run_out_goes_on_and_says_so(tiny: str, tmp_path: Path):
    said: list[str] = []
    config = refilled(tiny, reward__format_pattern="never")
    train(config, folder=tmp_path / "run", warn=kept_in(said))
    assert said[0] == (
        "round 1: 32 prompts gave 0 live groups of the 8 wanted; the round goes on with these. "
        "Make the task easier or harder, or raise sampling.group_size or "
        "sampling.max_extra_prompts"
    )
    line = metric_lines(tmp_path / "run", "round")[0]
    assert (line["rollout/groups"], line["rollout/trained_groups"]) == (32, 8)
    assert line["rollout/dead_groups"] == 32


def test_a_live_group_has_rewards_that_differ():
    from tests.rollout_groups import group, rollout

    same = group([1], [rollout([5], reward=1.0), rollout([5], index=1, reward=1.0)])
    differ = group([1], [rollout([5], reward=1.0), rollout([5], index=1, reward=0.0)])
    failed = group([1], [rollout([5], reward=1.0), rollout([5], index=1, reward=None, error="x")])
    assert live_groups([same, differ, failed, differ]) == [1, 3]
