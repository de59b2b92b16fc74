"""`GMPOTrainer`: the training loop for a model, data and reward functions held in Python."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from gmpo.adaptation import constant_recipe
from gmpo.assembly import TrainingParts, build_parts
from gmpo.callbacks import CallbackEvents, PrintProgress
from gmpo.checkpoint import latest_checkpoint
from gmpo.config import RunConfig
from gmpo.errors import ConfigError, DataError, ModelError, RunStopped
from gmpo.evaluation import Evaluation
from gmpo.inputs import Given
from gmpo.policy.load import given_model, load_model, load_tokenizer
from gmpo.records import Group
from gmpo.rewards import RewardFunction
from gmpo.rollout_functions import RolloutFunction
from gmpo.spikes import NormHistory
from gmpo.steps import update_policy
from gmpo.tracking import fresh_folder, read_lines
from gmpo.trainer_config import GMPOConfig
from gmpo.trainer_rows import Rows, prompts_of_rows, task_of_rows, task_record
from gmpo.training import Report, train

__all__ = ["GMPOTrainer", "Reward", "Rewards", "Strategy", "TrainingOutcome"]

Strategy = Literal["no", "steps", "epoch"]
"""When something is done between rounds: never, every so many steps, after each epoch."""
Reward = RewardFunction | str
"""A function, or the hub name or folder of a reward model."""
Rewards = Reward | Sequence[Reward] | Mapping[str, Reward]
"""One, several under their own names, or several by name."""

_MEASURE = "evaluation.measure"


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What `GMPOTrainer.train` did.

    Attributes:
        folder: of the run.
        checkpoint: the last one; its `model/` loads with `transformers`, or, with adapters, its
            `adapter/` with PEFT.
        metrics: the run's last figures by name; empty if a callback ended it before a round.
        before: evaluations of the untrained model; empty without `eval_dataset`. Each has
            `accuracy`, or `reward` where reward functions were given, and the items' outcomes.
        after: evaluations of the trained one; empty too if a callback ended the run early.
    """

    folder: Path
    checkpoint: Path
    metrics: dict[str, float]
    before: tuple[Evaluation, ...]
    after: tuple[Evaluation, ...]

    def __str__(self) -> str:
        words = [f"run {self.folder}"]
        if self.metrics:
            words.append(f"reward of the last round {self.metrics['rollout/reward']:.3f}")
        if self.before and self.after:
            first, last = self.before[0], self.after[0]
            words.append(
                f"held-out greedy {first.measure} before {first.mean:.3f}, after {last.mean:.3f}"
            )
        return "; ".join(words)


class GMPOTrainer:
    """Trains a model in place by GMPO; the same loop as `gmpo train`, the same run folder.

    Args:
        model: a causal language model in fp32 or bf16, on the device it is to be trained on, or
            what `gmpo.policy.load.load_model` takes: "smollm2-135m", a hub name, a folder.
        train_dataset: rows with the columns "prompt" (a text, given to the model as it is, or a
            chat that ends in a user turn) or "problem" (a text, given as a user turn), and, unless
            `reward` is given, "answer". Other columns go to the reward functions. Read once, to
            its end.
        tokenizer: None takes the one of the model's name.
        config: settings; None takes the defaults.
        eval_dataset: rows of the same form, whose greedy completions are measured: their mean
            reward by the functions of `reward`, or, without these, accuracy by "answer". None
            measures nothing.
        reward: a function by TRL's convention or the hub name or folder of a sequence classifier,
            a list of these or a mapping by name, each of weight 1 unless
            `recipe={"reward.weights": ...}` says otherwise. None verifies "answer".
        rollout: a function that makes the rollouts; None lets the policy complete the prompts.
        callbacks: of the `transformers` kind, or their classes; None prints the forecast and a
            line a log, () nothing.
        warn: told in one sentence what is not as expected.

    Raises:
        gmpo.errors.GmpoError: model, rows or settings are not usable; what and where is named.
    """

    def __init__(  # noqa: PLR0913 - all by keyword, and each is its own concern
        self,
        *,
        model: PreTrainedModel | str | Path,
        train_dataset: Rows,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: GMPOConfig | None = None,
        eval_dataset: Rows | None = None,
        reward: Rewards | None = None,
        rollout: RolloutFunction | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.config = config or GMPOConfig()
        self.config.warn_of_oddities(warn)
        self.model = load_model(str(model)) if isinstance(model, str | Path) else given_model(model)
        name = str(model) if isinstance(model, str | Path) else self.model.name_or_path or ""
        if tokenizer is None and not name:
            raise ConfigError("the model has no name to find its tokenizer by; give tokenizer=...")
        self.tokenizer = tokenizer or load_tokenizer(name)
        rewards = _by_name(reward)
        reward_keys = _reward_keys(rewards, self.config.recipe)
        measure = {**reward_keys, **self.config.recipe}.get(_MEASURE, "accuracy")
        task = task_of_rows(
            train_dataset,
            eval_dataset,
            needs_answer=not rewards,
            needs_eval_answer=not rewards or measure == "accuracy",
        )
        self._num_prompts = len(task.train)
        self._given = Given(
            model=self.model,
            model_name=str(model) if isinstance(model, str | Path) else None,
            tokenizer=self.tokenizer,
            task=task,
            rewards={name: each for name, each in rewards.items() if not isinstance(each, str)},
            rollout=rollout,
        )
        self._keys = {
            "model.name": name or "given",
            "model.device": self.model.device.type,
            "model.dtype": _precision(self.model),
            "task": task_record(task),
            **reward_keys,
            **({} if rollout is None else {"sampling.rollout": _reference(rollout)}),
        }
        self._prints = callbacks is None
        self._callbacks = tuple(
            each() if isinstance(each, type) else each
            for each in ((PrintProgress(),) if callbacks is None else callbacks)
        )
        self._warn = warn
        self._reference: PreTrainedModel | None = None
        self._begun: Path | None = None
        self._own_loop: TrainingParts | None = None
        self._own_steps = 0
        self._own_samples = 0
        self._own_mismatch_is_small = True
        self._own_norms = NormHistory()
        self._recipe(rounds=1)  # refuses settings that do not fit together now, not in train()

    def train(  # noqa: PLR0913 - all by keyword, and each is its own concern
        self,
        *,
        num_epochs: float = 1,
        save_strategy: Strategy = "epoch",
        save_steps: int = 500,
        evaluation_strategy: Strategy = "no",
        eval_steps: int = 500,
        logging_steps: int = 10,
        resume: bool = False,
    ) -> TrainingOutcome:
        """Train, and evaluate before and after where there is an `eval_dataset`.

        Saving and evaluating happen between rounds: a number of steps is rounded up to whole ones.

        Args:
            num_epochs: passes over the prompts, rounded up to whole rounds.
            save_strategy: "epoch", "steps" (every `save_steps` optimizer steps) or "no": the last
                round always writes a checkpoint.
            save_steps: for `save_strategy="steps"`.
            evaluation_strategy: "no" evaluates before and after only; "epoch" and "steps" (every
                `eval_steps`) on up to `evaluation.items_during` rows in between.
            eval_steps: for `evaluation_strategy="steps"`.
            logging_steps: optimizer steps between two logs to the callbacks; the run folder's
                `metrics.jsonl` has every step.
            resume: go on with the run in `config.output_dir`, which was stopped or killed; without
                an `output_dir`, with the one that this trainer began last.

        Raises:
            gmpo.errors.GmpoError: anything that stops a run; what is lost is nothing.
        """
        prompts_per_round = self.config.prompts_per_round
        epoch = math.ceil(self._num_prompts / prompts_per_round)
        rounds = math.ceil(num_epochs * self._num_prompts / prompts_per_round)
        if rounds < 1 or logging_steps < 1:
            raise ConfigError(
                f"num_epochs is {num_epochs} and logging_steps {logging_steps}; both must be "
                "above 0"
            )
        recipe = self._recipe(
            rounds=rounds,
            save_every=self._rounds_between(save_strategy, save_steps, epoch, never=rounds),
            evaluate_every=self._rounds_between(evaluation_strategy, eval_steps, epoch, never=0),
        )
        folder = self._folder(resume=resume)
        self.close()  # a loop of the caller's own ends here
        events = CallbackEvents(
            self._callbacks,
            config=recipe,
            folder=folder,
            logging_steps=logging_steps,
            model=self.model,
            tokenizer=self.tokenizer,
        )
        before, after = self._run(recipe, folder, events, resume=resume)
        events.end()
        checkpoint = latest_checkpoint(folder / "checkpoints")
        assert checkpoint is not None, "the last round writes a checkpoint"
        return TrainingOutcome(
            folder=folder,
            checkpoint=checkpoint,
            metrics=_last_metrics(folder),
            before=before,
            after=after,
        )

    def sample(self, rows: Rows) -> list[Group]:
        """For a loop of your own: a group for each row by the current weights, drawn anew.

        Args:
            rows: of the form of `train_dataset`, but none needs an answer.
        """
        parts = self._own_loop_parts()
        asked = prompts_of_rows(rows, "rows", needs_answer=False).prompts
        prompts = [parts.evaluator.renderer.render(prompt) for prompt in asked]
        key = (parts.config.training.seed, "own loop", self._own_samples)
        self._own_samples += 1
        return parts.sample(prompts, settings=parts.sampling, key=key)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """For a loop of your own: the groups with rewards."""
        parts = self._own_loop_parts()
        return list(parts.score(groups, step=self._own_steps, prompts_taken=0).groups)

    def update_policy(
        self, groups: Sequence[Group], *, learning_rate: float | None = None
    ) -> list[dict[str, float]]:
        """For a loop of your own: a round's optimizer steps; the figures of each, by metric name.

        The policy as it is now is taken for the old one, so sample anew after each call. AdamW's
        moments live on between calls, apart from those of `train`.

        Args:
            groups: with rewards, a multiple of `steps_per_round` of them.
            learning_rate: of these steps; None takes the config's. There is no schedule here but
                the config's warm-up.

        Raises:
            DataError: the groups do not divide into steps, or none has a reward.
            NonFiniteError: the policy has diverged; the step that shows it did not move the
                weights, those before it in this call did.
        """
        if not any(r.reward is not None for group in groups for r in group.rollouts):
            raise DataError(
                f"none of the {len(groups)} groups has a rollout with a reward; call score first, "
                "or fill in Rollout.reward"
            )
        parts = self._own_loop_parts()
        if learning_rate is not None:
            training = parts.config.training.model_copy(update={"learning_rate": learning_rate})
            config = parts.config.model_copy(update={"training": training})
            parts = replace(parts, config=config)
        update = update_policy(
            parts,
            groups,
            first_step=self._own_steps,
            may_trust_sampler=self._own_mismatch_is_small,
            measures_cosine=False,
            norms=self._own_norms,
        )
        self._own_norms = update.norms
        self._own_steps += len(update.steps)
        if update.mismatch is not None:
            self._own_mismatch_is_small = update.mismatch.is_small
        parts.publish_weights(self._own_steps)
        return [step.metrics for step in update.steps]

    def close(self) -> None:
        """End a loop of your own: its grading process and AdamW's moments; `train` does it too."""
        if self._own_loop is not None:
            self._own_loop.close()
            self._own_loop = None

    def _own_loop_parts(self) -> TrainingParts:
        if self._own_loop is None:
            recipe = constant_recipe(self._recipe(rounds=1))
            self._own_loop = build_parts(recipe, warn=self._warn, given=self._given)
        return self._own_loop

    def _recipe(self, *, rounds: int, save_every: int = 1, evaluate_every: int = 0) -> RunConfig:
        return self.config.to_recipe(
            {
                **self._keys,
                "training.rounds": rounds,
                "checkpoint.every_rounds": save_every,
                "evaluation.every_rounds": evaluate_every,
                "evaluation.few_shot": 0,
            }
        )

    def _rounds_between(self, strategy: Strategy, steps: int, epoch: int, *, never: int) -> int:
        if strategy == "no":
            return never
        if strategy == "epoch":
            return epoch
        if strategy != "steps" or steps < 1:
            raise ConfigError(
                f"the strategy is {strategy!r} with {steps} steps; allowed: 'no', 'epoch', or "
                "'steps' with 1 or more"
            )
        return math.ceil(steps / self.config.steps_per_round)

    def _folder(self, *, resume: bool) -> Path:
        if self.config.output_dir is not None:
            return Path(self.config.output_dir)
        if resume and self._begun is not None:
            return self._begun
        if resume:
            raise ConfigError("resume=True needs the run to go on with: GMPOConfig(output_dir=...)")
        return fresh_folder("gmpo")

    def _starting_model(self, recipe: RunConfig, *, resume: bool) -> PreTrainedModel | None:
        """A copy of the starting model, where KL to it is trained or measured.

        The model is trained in place, so a run that is resumed in the process that began it needs
        the copy of then.
        """
        if not recipe.needs_reference() or recipe.lora.rank:  # adapters go off instead
            return None
        if resume and self._reference is not None:
            return self._reference
        return copy.deepcopy(self.model)

    def _run(
        self, recipe: RunConfig, folder: Path, events: CallbackEvents, *, resume: bool
    ) -> tuple[tuple[Evaluation, ...], tuple[Evaluation, ...]]:
        """Evaluations before and after; none after a run that a callback ended."""
        before: list[Evaluation] = []
        reference = self._starting_model(recipe, resume=resume)

        def hear(report: Report) -> None:
            if report.stage == "start":  # the folder is this run's: another one's copy may go
                self._reference, self._begun = reference, folder
            if report.stage == "before":
                before.extend(report.evaluations)
            if report.stage == "forecast" and self._prints:
                print(report.sentence)
            events.report(report)

        try:
            result = train(
                recipe,
                folder=folder,
                resume=resume,
                report=hear,
                warn=self._warn,
                should_stop=events.should_stop,
                given=replace(self._given, reference=reference),
            )
        except RunStopped:
            self._warn(f"a callback ended the run; {self._way_on(folder)}")
            return tuple(before), ()
        except KeyboardInterrupt:
            self._warn(f"interrupted; {self._way_on(folder)}")
            raise
        return result.before, result.after

    def _way_on(self, folder: Path) -> str:
        elsewhere = f"; in another process with GMPOConfig(output_dir={str(folder)!r}) too"
        named = "" if self.config.output_dir else elsewhere
        return f"{folder} goes on with train(resume=True){named}"


def _by_name(reward: Rewards | None) -> dict[str, Reward]:
    if reward is None:
        return {}
    if isinstance(reward, Mapping):
        return dict(reward)
    functions = [reward] if callable(reward) or isinstance(reward, str) else list(reward)
    named = {_name(function): function for function in functions}
    if len(named) < len(functions):
        names = [_name(function) for function in functions]
        raise ConfigError(
            f"the rewards are called {names}, and each needs a name of its own; give them "
            "as a mapping by name"
        )
    return named


def _name(function: Reward) -> str:
    if isinstance(function, str):
        return Path(function).name
    return function.__name__ if inspect.isroutine(function) else type(function).__name__


def _reference(function: Callable[..., Any]) -> str:
    """Where a function came from, for the record."""
    holder = function if inspect.isroutine(function) else type(function)
    return f"{holder.__module__}:{holder.__qualname__}"


def _reward_keys(rewards: Mapping[str, Reward], recipe: Mapping[str, Any]) -> dict[str, Any]:
    if not rewards:
        return {}
    models = {name: each for name, each in rewards.items() if isinstance(each, str)}
    keys: dict[str, Any] = {
        "reward.functions": {
            name: _reference(each) for name, each in rewards.items() if not isinstance(each, str)
        }
    }
    if models:
        keys["reward.models"] = models
    if "reward.weights" not in recipe:
        keys["reward.weights"] = dict.fromkeys(rewards, 1.0)
    if _MEASURE not in recipe:
        keys[_MEASURE] = "reward"
    return keys


def _precision(model: PreTrainedModel) -> str:
    precisions = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if model.dtype not in precisions:
        raise ModelError(
            f"the model is in {model.dtype}; load it in torch.float32 or torch.bfloat16 "
            "(weights are updated in fp32 either way)"
        )
    return precisions[model.dtype]


def _last_metrics(folder: Path) -> dict[str, float]:
    """The figures of the last round; NaN where one does not exist; none before the first."""
    rounds = [line for line in read_lines(folder, "metrics.jsonl") if line["kind"] == "round"]
    return {
        name: math.nan if value is None else value
        for name, value in (rounds[-1] if rounds else {}).items()
        if name not in ("kind", "round", "step")
    }
