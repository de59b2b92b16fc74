"""What a run reads before its model is loaded: task, tokenizer, prompts in the order of rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmpo.config import ModelConfig, RunConfig
from gmpo.errors import DataError
from gmpo.evaluation import require_fit
from gmpo.policy.load import choose_device, choose_dtype, load_tokenizer
from gmpo.records import Prompt
from gmpo.rewards import RewardFunction
from gmpo.rollout_functions import RolloutFunction
from gmpo.rollouts import PromptRenderer
from gmpo.task_table import build_task
from gmpo.tasks import Task

__all__ = [
    "Given",
    "PromptStream",
    "RunInputs",
    "held_out_items",
    "notes_of_evaluation",
    "prompt_renderer",
    "read_inputs",
    "resolve_model",
]


class PromptStream:
    """Training prompts in a fixed endless order: a fresh permutation each epoch, keyed by the seed.

    The order depends on nothing but its arguments, so a resumed run goes on where it stood.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, first: int, count: int) -> list[Prompt]:
        """`count` prompts from position `first` on, counted from 0 and never ending."""
        return [self._at(position) for position in range(first, first + count)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        if epoch not in self._orders:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
            self._orders = {epoch: order}  # a round looks at one epoch, seldom at two
        return self._prompts[int(self._orders[epoch][place])]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Objects that a Python caller hands over instead of having them loaded or imported.

    Attributes:
        model: trained in place of the one that the recipe names, and really in place.
        model_name: that it was loaded by, if it was, where its weights are stored in full.
        reference: a copy of the model as the run began, for KL to it; None copies the model as it
            is. Where the recipe names the model, it is loaded anew.
        tokenizer: of that model.
        task: whose items are asked in place of those of `[task]`, which has `kind = "given"`.
        rewards: by a name of the recipe's `[reward.functions]`, whose reference is then a record
            of where the function came from and is not imported.
        rollout: in place of the recipe's `sampling.rollout`, which names it likewise.
    """

    model: PreTrainedModel | None = None
    model_name: str | None = None
    reference: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    task: Task | None = None
    rewards: Mapping[str, RewardFunction] = field(default_factory=dict)
    rollout: RolloutFunction | None = None


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run reads before its model is loaded.

    Attributes:
        config: the recipe, device and precision resolved.
        given: objects that stand in for those that the recipe names.
        task: whose items are asked.
        tokenizer: of the model.
        renderer: turns prompts into token ids.
        prompts: the training prompts, rendered, in the order in which rounds take them.
    """

    config: RunConfig
    given: Given
    task: Task
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    prompts: PromptStream

    @property
    def held_out(self) -> tuple[Prompt, ...]:
        """Items of the evaluations, in an order of no meaning: the first n are a fair sample."""
        return held_out_items(self.config, self.task)

    @property
    def examples(self) -> tuple[Prompt, ...]:
        """Worked examples of the few-shot evaluation."""
        return self.task.train[: self.config.evaluation.few_shot]


def read_inputs(
    config: RunConfig,
    *,
    warn: Callable[[str], None] = lambda _: None,
    given: Given | None = None,
) -> RunInputs:
    """What a recipe's prompts are, for its model's tokenizer; the model itself is not loaded.

    Raises:
        gmpo.errors.GmpoError: the task, the tokenizer or a prompt is not usable.
    """
    config = config.model_copy(update={"model": resolve_model(config.model, warn=warn)})
    given = given or Given()
    task = given.task or build_task(config.task)
    for note in (*task.notes(), *notes_of_evaluation(config, task)):
        warn(note)
    tokenizer = given.tokenizer or load_tokenizer(config.model.name)
    renderer = prompt_renderer(config, tokenizer)
    train_prompts = renderer.render_all(task.train)
    inputs = RunInputs(
        config=config,
        given=given,
        task=task,
        tokenizer=tokenizer,
        renderer=renderer,
        prompts=PromptStream(train_prompts, seed=config.training.seed),
    )
    require_fit(inputs.held_out, examples=inputs.examples, renderer=renderer)
    return inputs


def notes_of_evaluation(config: RunConfig, task: Task) -> Iterator[str]:
    """What the recipe asks of its evaluation beyond what the task has."""
    asked, skipped = config.evaluation.items, config.evaluation.skip_items
    there = len(task.held_out) - skipped
    if asked is not None and asked > there:
        after = f" after the {skipped} that are skipped" if skipped else ""
        yield (
            f"evaluation.items is {asked}, and task {task.name!r} holds out {there}{after}: all "
            "are used"
        )
    examples, rows = config.evaluation.few_shot, len(task.train)
    if examples > rows:
        yield f"evaluation.few_shot is {examples}, and task {task.name!r} has {rows} rows to show"


def resolve_model(
    config: ModelConfig, *, warn: Callable[[str], None] = lambda _: None
) -> ModelConfig:
    """The model table with "auto" replaced by what this machine takes, which `warn` is told."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device=device, warn=warn)
    return config.model_copy(update={"device": device.type, "dtype": dtype})


def prompt_renderer(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    """What turns a recipe's prompts into token ids."""
    return PromptRenderer(
        tokenizer,
        prompt_format=config.model.prompt_format,
        system=config.model.system,
        max_prompt_tokens=config.max_prompt_tokens(),
    )


def held_out_items(config: RunConfig, task: Task) -> tuple[Prompt, ...]:
    """The held-out items used, in an order of no meaning, so that the first n are a fair sample.

    Raises:
        DataError: the recipe skips all that there are.
    """
    skipped, there = config.evaluation.skip_items, len(task.held_out)
    if skipped and skipped >= there:
        raise DataError(
            f"evaluation.skip_items is {skipped}, and task {task.name!r} holds out {there} items, "
            "so none is left to ask; lower it"
        )
    order = np.random.default_rng(config.task.split_seed).permutation(there)[skipped:]
    return tuple(task.held_out[int(place)] for place in order[: config.evaluation.items])
