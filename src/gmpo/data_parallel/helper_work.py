"""A helper's side: what it does when the leader asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gmpo.batch import MicroBatch, StepBatch
from gmpo.data_parallel.exchange import broadcast, reduce_sum
from gmpo.data_parallel.processes import Engine
from gmpo.data_parallel.tensors import exchanged_weights, gradients, moved, one_step
from gmpo.records import Group, Prompt
from gmpo.rollouts import SamplingSettings
from gmpo.update import (
    LossSettings,
    Mismatch,
    StepMeasures,
    accumulate_gradients,
    with_old_logprobs,
    with_reference_logprobs,
)

__all__ = ["HelperWork"]


class HelperWork:
    """What a helper does when it is asked.

    Args:
        engine: of its process.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Each piece of work."""
        return {
            "weights": self._take_weights,
            "sample": self._sample,
            "accumulate": self._accumulate,
            "gradients": self._give_gradients,
            "old_logprobs": self._old_logprobs,
            "reference_logprobs": self._reference_logprobs,
        }

    def _take_weights(self) -> None:
        policy = self._engine.policy
        broadcast(exchanged_weights(policy))
        policy.publish_masters()

    def _sample(
        self,
        prompts: list[Prompt],
        settings: SamplingSettings,
        key: tuple[int | str, ...],
        version: int,
    ) -> list[Group]:
        if not prompts:
            return []
        sampler = self._engine.sampler
        sampler.load_weights(version, self._engine.policy.own_weights())
        try:
            return self._engine.sample(prompts, settings=settings, key=key)
        finally:
            if not sampler.is_idle:
                sampler.forget()

    def _old_logprobs(
        self, batches: tuple[MicroBatch, ...], temperature: float
    ) -> tuple[tuple[MicroBatch, ...], Mismatch | None]:
        policy = self._engine.policy
        (step,), mismatch = with_old_logprobs(
            policy, [one_step(moved(batches, policy.device))], temperature=temperature
        )
        return moved(step.micro_batches, "cpu"), mismatch

    def _reference_logprobs(
        self, batches: tuple[MicroBatch, ...], temperature: float
    ) -> tuple[tuple[MicroBatch, ...], None]:
        reference, device = self._engine.reference, self._engine.policy.device
        assert reference is not None, "the recipe has one"
        (step,) = with_reference_logprobs(
            reference, [one_step(moved(batches, device))], temperature=temperature
        )
        return moved(step.micro_batches, "cpu"), None

    def _accumulate(
        self, step: StepBatch, settings: LossSettings, is_old_policy: bool
    ) -> StepMeasures:
        policy = self._engine.policy
        policy.forget_gradients()  # of a step that an error ended on another process
        own = moved(step, policy.device)
        measures = accumulate_gradients(policy, own, settings, is_old_policy=is_old_policy)
        gradients(policy)  # what it may lack memory for is told before they are exchanged
        told: StepMeasures = moved(measures, "cpu")
        return told

    def _give_gradients(self) -> None:
        policy = self._engine.policy
        reduce_sum(gradients(policy))
        policy.forget_gradients()
