"""A recipe's tables: the paper's defaults, clips in each objective's unit, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gmpo.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from gmpo.errors import ConfigError
from gmpo.task_config import ArithmeticTask, BundledTask, CountdownTask, JsonlTask
from gmpo.tracking_config import TrackingConfig
from gmpo.trainer_config import GMPOConfig

GMPO_FAMILY = ("gmpo", "gmpo_no_clip", "gmpo_sequence_clip", "gmpo_no_norm")
TABLES = (
    ModelConfig,
    ArithmeticTask,
    CountdownTask,
    JsonlTask,
    BundledTask,
    RewardConfig,
    SamplingConfig,
    ObjectiveConfig,
    TrainingConfig,
    CheckpointConfig,
    EvaluationConfig,
    TrackingConfig,
    LoraConfig,
)


def refusal(table: type[BaseModel], **values: Any) -> str:
    """The message of the only thing that is wrong."""
    with pytest.raises(ValidationError) as caught:
        table.model_validate(values)
    (problem,) = caught.value.errors()
    return problem["msg"]


def test_the_defaults_are_the_papers():
    run = RunConfig(task=ArithmeticTask(kind="arithmetic"))
    assert run.objective.name == "gmpo"
    assert run.objective.clips() == {"clip_low": 0.4, "clip_high": 0.4}
    assert run.objective.scale() == "std"
    assert run.objective.advantage_eps == 0
    assert run.objective.kl_coefficient == 0
    assert run.objective.entropy_coefficient == 0
    assert run.sampling.group_size == 8
    assert run.sampling.temperature == 1
    assert (run.sampling.top_p, run.sampling.top_k) == (1, 0)
    assert run.reward.truncated == "score"
    assert run.training.learning_rate == 1e-6


def test_a_round_has_several_optimizer_steps_by_default():
    # With one step the ratio is always 1 and GMPO equals GRPO.
    assert TrainingConfig().steps_per_round >= 4


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("gmpo", 0.4, 0.4),
        ("gmpo_sequence_clip", 0.4, 0.4),
        ("gmpo_no_norm", 0.4, 0.4),
        ("grpo", 0.2, 0.2),
        ("dr_grpo", 0.2, 0.2),
        ("gspo", 3e-4, 4e-4),
    ],
)
def test_each_objective_has_its_own_clip(name: str, low: float, high: float):
    assert ObjectiveConfig(name=name).clips() == {"clip_low": low, "clip_high": high}


def test_the_objective_without_a_clip_has_none():
    assert ObjectiveConfig(name="gmpo_no_clip").clips() == {}
    assert ObjectiveConfig(name="gmpo_no_clip").ratio_bounds() is None


def test_a_given_half_width_replaces_only_its_own_side():
    assert ObjectiveConfig(clip_high=0.7).clips() == {"clip_low": 0.4, "clip_high": 0.7}
    assert ObjectiveConfig(name="gspo", clip_low=0.1).clips() == {
        "clip_low": 0.1,
        "clip_high": 4e-4,
    }


def test_the_second_clip_is_passed_on_only_where_it_is_set():
    assert "clip_negative_high" not in ObjectiveConfig().clips()
    assert ObjectiveConfig(clip_negative_high=2.0).clips()["clip_negative_high"] == 2.0


def test_a_log_space_clip_of_0_4_bounds_the_ratio_to_0_67_and_1_49():
    # exp(-0.4) = 0.670320, exp(0.4) = 1.491825
    bounds = ObjectiveConfig().ratio_bounds()
    assert bounds == pytest.approx((0.670320046, 1.491824698))
    assert ObjectiveConfig(clip_low=1.0, clip_high=2.0).ratio_bounds() == pytest.approx(
        (math.exp(-1), math.exp(2))
    )


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_a_ratio_space_clip_of_0_2_bounds_the_ratio_to_0_8_and_1_2(name: str):
    assert ObjectiveConfig(name=name).ratio_bounds() == pytest.approx((0.8, 1.2))


def test_gspo_bounds_the_ratio_in_ratio_space():
    assert ObjectiveConfig(name="gspo").ratio_bounds() == pytest.approx((0.9997, 1.0004))


def test_only_dr_grpo_does_not_divide_by_the_standard_deviation():
    assert ObjectiveConfig(name="dr_grpo").scale() == "none"
    assert {ObjectiveConfig(name=name).scale() for name in (*GMPO_FAMILY, "grpo", "gspo")} == {
        "std"
    }
    assert ObjectiveConfig(name="dr_grpo", advantage_scale="std").scale() == "std"


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_group_of_less_than_two_is_refused(size: int):
    assert refusal(SamplingConfig, group_size=size) == (
        f"Value error, group_size must be at least 2, got {size}: an advantage compares rollouts "
        "of one prompt; the paper uses 8"
    )


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 50}])
def test_cutting_the_distribution_in_training_is_refused(cut: dict[str, float]):
    message = refusal(SamplingConfig, **cut)
    assert message.startswith("Value error, training needs top_p = 1 and top_k = 0, got top_p = ")
    assert "lower temperature instead" in message
    assert str(next(iter(cut.values()))) in message


def test_a_seed_below_0_is_refused():
    assert refusal(TrainingConfig, seed=-1) == "Input should be greater than or equal to 0"


def test_a_length_limit_without_room_for_a_prompt_is_refused():
    assert refusal(SamplingConfig, max_length=32, max_new_tokens=32) == (
        "Value error, max_length 32 must exceed max_new_tokens 32: it counts prompt plus completion"
    )


def test_rounds_not_divisible_into_steps_are_refused_with_the_allowed_steps():
    task = {"kind": "arithmetic"}
    # 12 = 1 * 12 = 2 * 6 = 3 * 4
    assert refusal(
        RunConfig,
        task=task,
        sampling={"prompts_per_round": 12},
        training={"steps_per_round": 5},
    ) == (
        "Value error, sampling.prompts_per_round = 12 is not divisible by "
        "training.steps_per_round = 5, and a step takes whole groups; allowed steps_per_round for "
        "12 prompts: [1, 2, 3, 4, 6, 12]"
    )


@pytest.mark.parametrize("side", ["clip_low", "clip_high"])
def test_a_clip_for_the_objective_without_one_is_refused(side: str):
    message = refusal(ObjectiveConfig, name="gmpo_no_clip", **{side: 0.3})
    assert message.startswith("Value error, gmpo_no_clip has no clip, got clip_low = ")
    assert "0.3" in message
    assert message.endswith("remove them or use name = 'gmpo'")


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo", "gmpo_no_norm", "gmpo_no_clip"])
def test_the_second_clip_is_refused_for_any_other_objective(name: str):
    assert refusal(ObjectiveConfig, name=name, clip_negative_high=2.0) == (
        f"Value error, clip_negative_high = 2.0 works with name = 'gmpo' only, got {name!r}; "
        "remove it"
    )


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo"])
def test_a_lower_clip_that_reaches_ratio_0_is_refused(name: str):
    assert refusal(ObjectiveConfig, name=name, clip_low=1.0) == (
        f"Value error, clip_low must be below 1 in ratio space for {name}, got 1.0"
    )


def test_a_log_space_clip_above_1_is_allowed():
    assert ObjectiveConfig(clip_low=1.5).clips()["clip_low"] == 1.5


@pytest.mark.parametrize(
    ("table", "values"),
    [
        (ObjectiveConfig, {"clip_low": 0.0}),
        (ObjectiveConfig, {"clip_high": -0.4}),
        (ObjectiveConfig, {"clip_low": math.nan}),
        (ObjectiveConfig, {"kl_coefficient": -0.1}),
        (ObjectiveConfig, {"name": "ppo"}),
        (SamplingConfig, {"temperature": 0.0}),
        (SamplingConfig, {"prompts_per_round": 0}),
        (SamplingConfig, {"max_new_tokens": 0}),
        (TrainingConfig, {"rounds": 0}),
        (TrainingConfig, {"steps_per_round": 0}),
        (TrainingConfig, {"learning_rate": 0.0}),
        (TrainingConfig, {"learning_rate": math.nan}),
        (TrainingConfig, {"adam_beta2": 1.0}),
        (TrainingConfig, {"engine": "turbo"}),
        (TrainingConfig, {"schedule": "step"}),
        (RewardConfig, {"floor": 0.0}),
        (RewardConfig, {"timeout_seconds": 0.0}),
        (RewardConfig, {"weights": {"style": 1.0}}),
        (CheckpointConfig, {"keep": 0}),
        (EvaluationConfig, {"items": 0}),
        (TrackingConfig, {"groups_per_round": -1}),
        (ModelConfig, {"device": "tpu"}),
        (ModelConfig, {"dtype": "fp16"}),
        (ArithmeticTask, {"kind": "arithmetic", "operators": ()}),
        (ArithmeticTask, {"kind": "arithmetic", "operators": ("/",)}),
        (ArithmeticTask, {"kind": "arithmetic", "held_out_items": 0}),
    ],
)
def test_a_value_outside_its_range_is_refused(table: type[BaseModel], values: dict[str, Any]):
    with pytest.raises(ValidationError):
        table.model_validate(values)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_every_key_says_what_it_means(table: type[BaseModel]):
    silent = [name for name, field in table.model_fields.items() if not field.description]
    assert not silent


def test_a_resolved_recipe_cannot_be_changed():
    run = RunConfig(task=ArithmeticTask(kind="arithmetic"))
    with pytest.raises(ValidationError, match="frozen"):
        run.training.rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            {"weights": {"correc": 1.0}},
            "reward.weights.correc has no component of that name; did you mean 'correct'?; your "
            "own go into [reward.functions] or [reward.models]",
        ),
        (
            {"weights": {"brevty": 1.0}, "functions": {"brevity": "mine:brevity"}},
            "reward.weights.brevty has no component of that name; did you mean 'brevity'?",
        ),
        (
            {"weights": {"correct": 1.0}, "functions": {"brevity": "mine:brevity"}},
            "component 'brevity' has no weight; add reward.weights.brevity, 0 to log it only",
        ),
        (
            {"weights": {"correct": 1.0}, "models": {"judge": "folder"}},
            "component 'judge' has no weight",
        ),
        (
            {"weights": {"format": 1.0}, "functions": {"format": "mine:format"}},
            "'format' names more than one component; correct, format and length are built in",
        ),
        (
            {"weights": {"a": 1.0}, "functions": {"a": "mine:a"}, "models": {"a": "folder"}},
            "'a' names more than one component",
        ),
        (
            {"weights": {"length": 1.0}, "length_full_tokens": 8},
            "component 'length' needs length_full_tokens below length_zero_tokens, got 8 and None",
        ),
        (
            {"weights": {"correct": -1.0}},
            "reward.weights must name at least one component, none below 0 and not all 0",
        ),
    ],
)
def test_every_component_has_one_weight_and_every_weight_a_component(
    table: dict[str, Any], said: str
):
    assert said in refusal(RewardConfig, **table)


def test_a_weight_of_0_only_logs_its_component():
    weights = {"correct": 1.0, "brevity": 0.0}
    assert RewardConfig(weights=weights, functions={"brevity": "mine:brevity"}).weights == weights


def test_extra_prompts_are_for_refilled_rounds_only():
    assert SamplingConfig().most_prompts() == 8
    assert SamplingConfig(dynamic="refill").most_prompts() == 32
    assert SamplingConfig(dynamic="refill", max_extra_prompts=5).most_prompts() == 13
    said = refusal(SamplingConfig, max_extra_prompts=5)
    assert "max_extra_prompts = 5 works with dynamic = 'refill' only; set that or remove it" in said


def test_without_a_rank_there_are_no_adapters_and_none_of_their_keys():
    assert RunConfig(task=ArithmeticTask(kind="arithmetic")).lora == LoraConfig(rank=0)
    assert refusal(LoraConfig, targets=["q_proj"]) == (
        "Value error, lora.targets = ('q_proj',) needs adapters, and lora.rank is 0; set "
        "lora.rank, e.g. to 16, or remove lora.targets"
    )
    assert refusal(LoraConfig, alpha=8, rank=0) == (
        "Value error, lora.alpha = 8.0 needs adapters, and lora.rank is 0; set lora.rank, e.g. to "
        "16, or remove lora.alpha"
    )
    assert "at least 1 item" in refusal(LoraConfig, rank=4, targets=[])


def test_alpha_is_twice_the_rank_by_default():
    assert LoraConfig(rank=8).scale_numerator() == 16.0
    assert LoraConfig(rank=8, alpha=1.5).scale_numerator() == 1.5


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_settings_are_finite(value: float):
    with pytest.raises(ValidationError, match="finite number"):
        RunConfig(task={"kind": "countdown"}, training={"learning_rate": value})
    with pytest.raises(ValidationError, match="finite number"):
        RunConfig(task={"kind": "countdown"}, reward={"weights": {"correct": value}})
    with pytest.raises(ConfigError, match=r"learning_rate = (inf|nan): .*finite number"):
        GMPOConfig(learning_rate=value)


def test_a_warm_up_longer_than_the_run_is_noted():
    def notes(warmup: int) -> list[str]:
        training = {"rounds": 2, "steps_per_round": 4, "warmup_steps": warmup}
        table = {"training": training, "guard": {"mode": "off"}}
        return list(RunConfig(task={"kind": "countdown"}, **table).notes())

    assert notes(8) == []
    assert notes(32) == [
        "training.warmup_steps is 32 and the run has 8 optimizer steps: the step size ends at 25% "
        "of training.learning_rate; lower warmup_steps if that is not meant"
    ]


def test_a_run_too_short_for_alarms_about_drifts_is_noted_unless_nothing_is_judged():
    def notes(rounds: int, mode: str) -> list[str]:
        table = {"training": {"rounds": rounds}, "guard": {"mode": mode}}
        return list(RunConfig(task={"kind": "countdown"}, **table).notes())

    assert notes(24, "warn") == [
        "guard.mode is 'warn' and the run has 24 rounds: an alarm about a drift needs a baseline "
        "of 20 and a change that lasts about 10 more, so hardly one can come; bounds of single "
        "rounds and of evaluations hold; train for more than 30 if that is not meant"
    ]
    assert len(notes(30, "mend")) == 1
    assert notes(31, "warn") == notes(24, "off") == []
