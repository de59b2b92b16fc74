"""TRL's GMPOTrainer, driven round by round; started by vs_trl.py and others."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from scripts.replay import TRL_ON_CPU, cosine_similarity
from transformers import PrinterCallback, TrainerCallback
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.trainer import grpo_trainer

from benchmarks.devices import forget_peak_memory, peak_memory_gib, wait_for
from benchmarks.exchange import (
    SampledRows,
    Scratch,
    clear_moments,
    gradient_sample,
    load_weights,
    save_weights,
)
from benchmarks.worker import serve
from benchmarks.workloads import (
    STEPS_PER_ROUND,
    Workload,
    patterned_rewards,
    prompts_of,
)
from gmpo.grading import Grader
from gmpo.policy.load import load_model, load_tokenizer
from gmpo.rewards import correct_reward

PRECISIONS = {
    "fp32": (torch.float32, False),
    "bf16_autocast": (torch.float32, True),
    "bf16_weights": (torch.bfloat16, True),
}
"""Dtype of the weights, and TRL's `bf16`, which runs the training forward under autocast."""

ROLLOUTS: dict[str, dict[str, Any]] = {
    "generate": {},
    "static_cache": {"cache_implementation": "static"},
    "continuous_batching": {"use_transformers_continuous_batching": True},
}
"""TRL's ways to roll out without vLLM, as options of its config."""


@dataclass(frozen=True, kw_only=True)
class TrlSetup:
    """How TRL is run.

    Attributes:
        precision: a key of PRECISIONS.
        rollouts: a key of ROLLOUTS.
        gradient_checkpointing: whether layers run again backwards.
        micro_batch: most rows that run at once in an update, whose gradients add up to those of a
            step; None runs a whole step's at once.
    """

    precision: str
    rollouts: str
    gradient_checkpointing: bool = False
    micro_batch: int | None = None

    @property
    def name(self) -> str:
        return f"{self.precision}/{self.rollouts}"

    @property
    def is_fp32(self) -> bool:
        return self.precision == "fp32"


class TimedTrainer(GMPOTrainer):
    """TRL's trainer with marks at the borders of its stages, and its rows kept.

    It scores completions under the old policy between drawing and rewarding them. That belongs to
    the update, so both ends of drawing and of rewarding have a mark.

    Attributes:
        given: completions in place of those it would draw, in the order of its rows, or None.
    """

    given: list[list[int]] | None = None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        wait_for(self.model.device.type)
        self.marks = {"start": time.perf_counter()}
        self.rows = super()._generate_and_score_completions(inputs)
        return self.rows

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        self._mark("generated")
        return generated

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        if self.given is not None:
            return self.given, None
        return super()._generate_single_turn(*arguments, **options)

    def _calculate_rewards(self, *arguments: Any) -> Any:
        self._mark("scored")
        rewards = super()._calculate_rewards(*arguments)
        self._mark("rewarded")
        return rewards

    def _mark(self, border: str) -> None:
        wait_for(self.model.device.type)
        self.marks[border] = time.perf_counter()


class StepClock(TrainerCallback):
    """When the last optimizer step ended; before, it may set the step size of each.

    Attributes:
        ended: by the clock of the marks, without the time that keeping a gradient took.
        first_gradient: a sample of the round's first one that is not zero; until then the weights
            are those that the round began with.
        learning_rates: of the steps; empty leaves the trainer's own.
    """

    def __init__(self) -> None:
        self.ended = 0.0
        self.first_gradient: dict[str, torch.Tensor] = {}
        self.learning_rates: Sequence[float] = ()
        self._keeping_seconds = 0.0

    def start_round(self) -> None:
        self.first_gradient, self._keeping_seconds = {}, 0.0

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        if self.learning_rates:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rates[state.global_step]

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if not self.first_gradient:
            wait_for(model.device.type)
            began = time.perf_counter()
            self.first_gradient = gradient_sample(model.named_parameters())
            self._keeping_seconds += time.perf_counter() - began

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        wait_for(model.device.type)
        self.ended = time.perf_counter() - self._keeping_seconds


class TrlSide:
    """A trainer that starts every round from the same weights.

    Args:
        workload: what is timed.
        setup: how TRL is run.
        scratch: where the starting weights lie, and its rounds are left.
        folder: TRL's own output.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        workload: Workload,
        setup: TrlSetup,
        scratch: Scratch,
        folder: str,
        *,
        device: str = "cpu",
    ) -> None:
        self._device = device
        self._workload = workload
        self._scratch = scratch
        self._dtype, _ = PRECISIONS[setup.precision]
        self._grader = Grader(time_limit_seconds=2.0, warn=print)
        self._correct = correct_reward(self._grader)
        self._prompts = prompts_of(workload, 0)
        self._live_groups: int | None = None
        self._rewards: list[float] = []
        self._clock = StepClock()
        self._took_sgd = False
        model = load_model(workload.model, device=device, dtype="fp32").to(self._dtype)
        self._trainer = TimedTrainer(
            model,
            self._reward,
            args=trl_arguments(workload, setup, folder, device=device),
            train_dataset=self._dataset(),
            processing_class=load_tokenizer(workload.model),
            callbacks=[self._clock],
        )
        self._trainer.remove_callback(PrinterCallback)

    def round(
        self, *, number: int, live_groups: int | None, sgd_learning_rate: float | None = None
    ) -> dict[str, Any]:
        """One round as TRL runs it: seconds of its stages, tokens, peak memory.

        Completions, update and first gradient are left in the scratch folder.

        Args:
            number: of the round, which decides the prompts.
            live_groups: groups that get different rewards; None asks the task.
            sgd_learning_rate: of SGD without gradient clipping, which shows the gradients; None
                takes AdamW.
        """
        self._restart(number, live_groups)
        self._choose_optimizer(sgd_learning_rate)
        figures = self._played()
        self._sampled_rows().write(self._scratch.completions)
        save_weights(self._update(), self._scratch.update)
        save_weights(self._clock.first_gradient, self._scratch.gradient)
        return figures

    def replay(
        self, *, number: int, live_groups: int | None, sgd_learning_rate: float | None = None
    ) -> dict[str, Any]:
        """The update on the completions that another setting of TRL left, in place of its own.

        Update and first gradient in the scratch folder are this side's afterwards.

        Args:
            number: of the round.
            live_groups: as that round had them.
            sgd_learning_rate: as that round had it.

        Returns:
            "cosine" between the update that lay there and this one, "gradient_cosine" between the
            first gradients.
        """
        rows = SampledRows.read(self._scratch.completions)
        update, gradient = load_weights(self._scratch.update), load_weights(self._scratch.gradient)
        self._trainer.given = rows.completion_ids
        try:
            self.round(number=number, live_groups=live_groups, sgd_learning_rate=sgd_learning_rate)
        finally:
            self._trainer.given = None
        if self._sampled_rows() != rows:
            raise ValueError(f"the rows of round {number} are not those that were left")
        own = self._clock.first_gradient
        both = bool(gradient) and bool(own)
        return {
            "cosine": cosine_similarity(update, load_weights(self._scratch.update)),
            # Where every group is dead, neither has one.
            "gradient_cosine": (
                cosine_similarity(gradient, own) if both else float(bool(gradient) == bool(own))
            ),
        }

    def learn(self, *, number: int, learning_rates: Sequence[float]) -> dict[str, Any]:
        """The next round of a run that learns: it begins with the weights of the one before.

        Args:
            number: of the round, which decides the prompts.
            learning_rates: of its steps.
        """
        self._ask(number, None)
        self._clock.learning_rates = learning_rates
        return self._played()

    def save(self) -> dict[str, Any]:
        """Leave the weights in the scratch folder."""
        weights = self._trainer.model.named_parameters()
        save_weights({name: w.detach().float() for name, w in weights}, self._scratch.learned)
        return {}

    def _played(self) -> dict[str, Any]:
        """Train one round; its figures."""
        self._clock.start_round()
        forget_peak_memory(self._device)
        self._trainer.train()
        peak = peak_memory_gib(self._device)
        rows = self._sampled_rows()
        return {
            **stage_seconds(self._trainer.marks, ended=self._clock.ended),
            "tokens": rows.num_tokens,
            "prompt_tokens": mean(map(len, rows.prompt_ids)),
            "live_share": rows.live_share(self._workload.group_size),
            "mean_reward": sum(rows.rewards) / len(rows.rewards),
            "peak_gib": peak,
        }

    def about(self) -> dict[str, Any]:
        """What has to be alike on both sides."""
        return {"end_tokens": sorted(self._trainer.eos_token_ids)}

    def _restart(self, number: int, live_groups: int | None) -> None:
        """The first weights again."""
        self._ask(number, live_groups)
        model = self._trainer.model
        model.to(self._dtype)  # continuous batching leaves a model in bf16
        with torch.no_grad():
            start = load_weights(self._scratch.start)
            for name, weight in model.named_parameters():
                weight.copy_(start[name])

    def _ask(self, number: int, live_groups: int | None) -> None:
        """The round's prompts, rewards and randomness."""
        self._prompts = prompts_of(self._workload, number)
        self._live_groups = live_groups
        self._trainer.train_dataset = self._dataset()
        torch.manual_seed(1000 * self._workload.seed + number)

    def _choose_optimizer(self, sgd_learning_rate: float | None) -> None:
        """A fresh one: the trainer makes its own AdamW where it has none."""
        trainer = self._trainer
        takes_sgd = sgd_learning_rate is not None
        if takes_sgd:
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=sgd_learning_rate)
        elif self._took_sgd:
            trainer.optimizer = None
        elif trainer.optimizer is not None:
            clear_moments(trainer.optimizer)
        self._took_sgd = takes_sgd
        trainer.args.max_grad_norm = 0.0 if takes_sgd else 1.0

    def _dataset(self) -> Dataset:
        rows = [
            {"prompt": [vars(message) for message in prompt.messages or ()], "place": place}
            for place, prompt in enumerate(self._prompts)
        ]
        return Dataset.from_list(rows)

    def _reward(
        self, *, prompts: list[Any], completions: list[Any], place: list[int], **_: Any
    ) -> list[float]:
        if self._live_groups is None:
            columns = [self._prompts[number].columns for number in place]
            values = self._correct(
                prompts=prompts,
                completions=completions,
                answer=[of_prompt["answer"] for of_prompt in columns],
            )
            self._rewards = [value for value in values if isinstance(value, float)]
            assert len(self._rewards) == len(values), "every prompt has an answer"
        else:
            self._rewards = patterned_rewards(
                len(completions),
                group_size=self._workload.group_size,
                live_groups=self._live_groups,
            )
        return self._rewards

    def _sampled_rows(self) -> SampledRows:
        kept = self._trainer.rows
        return SampledRows(
            prompt_ids=_unpadded(kept["prompt_ids"], kept["prompt_mask"]),
            completion_ids=_unpadded(kept["completion_ids"], kept["completion_mask"]),
            rewards=self._rewards,
        )

    def _update(self) -> dict[str, torch.Tensor]:
        start = load_weights(self._scratch.start)
        return {
            name: weight.detach().float().cpu() - start[name].to(weight.dtype).float()
            for name, weight in self._trainer.model.named_parameters()
        }


def stage_seconds(marks: Mapping[str, float], *, ended: float) -> dict[str, float]:
    """Seconds of a round and of its stages, by `benchmarks.ratios.STAGES`.

    Args:
        marks: times of `TimedTrainer`.
        ended: when the last optimizer step ended, by the same clock.
    """
    round_seconds = ended - marks["start"]
    rollout_seconds = marks["generated"] - marks["start"]
    reward_seconds = marks["rewarded"] - marks["scored"]
    return {
        "rollout_seconds": rollout_seconds,
        "reward_seconds": reward_seconds,
        "update_seconds": round_seconds - rollout_seconds - reward_seconds,
        "round_seconds": round_seconds,
    }


def trl_arguments(workload: Workload, setup: TrlSetup, folder: str, *, device: str) -> GMPOConfig:
    """One round of STEPS_PER_ROUND steps without vLLM."""
    rows = min(setup.micro_batch or workload.rows_per_step, workload.rows_per_step)
    pieces, left = divmod(workload.rows_per_step, rows)
    if left:
        raise ValueError(
            f"micro_batch {rows} does not divide the {workload.rows_per_step} of a step"
        )
    changes = {
        "use_cpu": device == "cpu",
        "gradient_checkpointing": setup.gradient_checkpointing,
        "gradient_accumulation_steps": pieces,
        # TRL counts these in micro-batches.
        "steps_per_generation": STEPS_PER_ROUND * pieces,
    }
    return GMPOConfig(
        **TRL_ON_CPU | changes,
        **ROLLOUTS[setup.rollouts],
        output_dir=folder,
        bf16=PRECISIONS[setup.precision][1],
        learning_rate=workload.learning_rate,
        max_completion_length=workload.max_new_tokens,
        # Keeps the end tokens from being drawn before.
        generation_kwargs=(
            {"min_new_tokens": workload.max_new_tokens} if workload.ignores_end else None
        ),
        num_generations=workload.group_size,
        per_device_train_batch_size=rows,
        max_steps=STEPS_PER_ROUND,
        shuffle_dataset=False,
        logging_strategy="no",
    )


def keep_rows_in_order() -> None:
    """Let TRL's steps take whole groups in the prompts' order, as gmpo's do.

    TRL shuffles a round's rows before it cuts them into steps, which costs it nothing. Without
    that, gmpo's own steps on TRL's completions are the same steps, and the updates comparable.
    """
    grpo_trainer.shuffle_sequence_dict = lambda rows: rows


def _unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def commands_of(side: TrlSide) -> dict[str, Callable[..., dict[str, Any]]]:
    return {
        "round": side.round,
        "replay": side.replay,
        "about": side.about,
        "learn": side.learn,
        "save": side.save,
    }


def main(settings: Mapping[str, Any]) -> None:
    torch.set_num_threads(settings["threads"])
    keep_rows_in_order()
    with tempfile.TemporaryDirectory() as folder:
        side = TrlSide(
            Workload(**settings["workload"]),
            TrlSetup(**settings["setup"]),
            Scratch(folder=Path(settings["scratch"])),
            folder,
            device=settings.get("device", "cpu"),
        )
        serve(commands_of(side))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
