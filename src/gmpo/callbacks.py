"""The loop's reports as events of `transformers` callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gmpo.config import RunConfig
from gmpo.evaluation import Evaluation
from gmpo.training import Report

__all__ = ["CallbackEvents", "PrintProgress"]

_USUAL_NAMES = {
    "update/loss": "loss",
    "update/gradient_norm": "grad_norm",
    "update/learning_rate": "learning_rate",
    "rollout/reward": "reward",
    "rollout/completion_tokens": "completion_length",
}
"""Metrics that trainers of the field log under another name; both names are logged."""


_SHOWN = ("reward", "loss", "learning_rate", "ratio/min", "ratio/max")


class PrintProgress(TrainerCallback):
    """Prints a line of a few figures for each log; what else was logged is in `metrics.jsonl`."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Called with what is logged."""
        figures = logs or {}
        shown = [name for name in figures if name in _SHOWN or name.startswith("eval_")]
        line = "  ".join(f"{name} {figures[name]:.4g}" for name in shown)
        print(f"step {state.global_step}/{state.max_steps}  {line}")


class CallbackEvents:
    """Calls `transformers` callbacks with a real state, control and arguments.

    A round's steps are taken together, so their events come together when the round is done, and
    a callback that sets `control.should_training_stop` ends the run there. Events of saving and
    evaluating tell what happened; `should_save` and `should_evaluate` are not read.

    Args:
        callbacks: called in their order.
        config: the run's recipe.
        folder: of the run; `args.output_dir`.
        logging_steps: optimizer steps between two `on_log` events.
        model: handed to the callbacks, as is the tokenizer.
        tokenizer: `processing_class` of the callbacks.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        *,
        config: RunConfig,
        folder: Path,
        logging_steps: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        training, sampling = config.training, config.sampling
        self._callbacks = callbacks
        self._model = model
        self._tokenizer = tokenizer
        self._arguments = TrainingArguments(
            output_dir=str(folder),
            learning_rate=training.learning_rate,
            per_device_train_batch_size=(
                sampling.group_size * sampling.prompts_per_round // training.steps_per_round
            ),
            max_steps=training.rounds * training.steps_per_round,
            logging_steps=logging_steps,
            seed=training.seed,
            report_to=[],
            use_cpu=model.device.type == "cpu",
        )
        self._control = TrainerControl()
        self._state = TrainerState(
            max_steps=self._arguments.max_steps,
            logging_steps=logging_steps,
            train_batch_size=self._arguments.per_device_train_batch_size,
        )

    def should_stop(self) -> bool:
        """Whether a callback asked for the end of training."""
        return bool(self._control.should_training_stop)

    def report(self, report: Report) -> None:
        """What the loop reports, as events; transformers knows none for a forecast."""
        if report.stage in ("start", "rolled_back"):
            # Not 0 where a run is resumed, and fewer than before after a roll-back.
            self._state.global_step, self._state.epoch = report.step, report.epoch
            if report.stage == "start":
                self._call(lambda each: each.on_train_begin)
        elif report.stage == "round":
            self._steps(report)
        elif report.stage == "checkpoint":
            self._call(lambda each: each.on_save)
        elif report.stage != "forecast":
            self._evaluated(report.evaluations)

    def end(self) -> None:
        """Training is over."""
        self._call(lambda each: each.on_train_end)

    def _steps(self, report: Report) -> None:
        epoch_before = self._state.epoch or 0.0
        for number, metrics in enumerate(report.steps, start=1):
            done = number / len(report.steps)
            self._call(lambda each: each.on_step_begin)
            self._state.global_step += 1
            self._state.epoch = epoch_before + done * (report.epoch - epoch_before)
            self._call(lambda each: each.on_step_end)
            if self._state.global_step % self._arguments.logging_steps == 0:
                self._log(_with_usual_names({**report.metrics, **metrics}))
        for _ in range(int(epoch_before), int(report.epoch)):
            self._call(lambda each: each.on_epoch_end)

    def _evaluated(self, evaluations: Sequence[Evaluation]) -> None:
        metrics = {f"eval_{each.name}_{each.measure}": each.mean for each in evaluations}
        self._log(metrics)
        self._call(lambda each: each.on_evaluate, metrics=metrics)

    def _log(self, figures: dict[str, float]) -> None:
        logs = {**figures, "epoch": round(self._state.epoch or 0.0, 4)}
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._call(lambda each: each.on_log, logs=logs)

    def _call(
        self, event: Callable[[TrainerCallback], Callable[..., Any]], **more: dict[str, float]
    ) -> None:
        for callback in self._callbacks:
            event(callback)(
                self._arguments,
                self._state,
                self._control,
                model=self._model,
                processing_class=self._tokenizer,
                **more,
            )


def _with_usual_names(metrics: dict[str, float]) -> dict[str, float]:
    usual = {usual: metrics[ours] for ours, usual in _USUAL_NAMES.items() if ours in metrics}
    return {**usual, **metrics}
