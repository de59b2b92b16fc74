"""The leader's side: shares go to helpers, and are put together with its own.

Weights move on the leader alone. Helpers get them before work that needs them, if they have moved;
their gradients are added to the leader's before it takes its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmpo.batch import StepBatch
from gmpo.data_parallel.exchange import Helpers, Request, broadcast, reduce_sum, values_of
from gmpo.data_parallel.processes import Engine
from gmpo.data_parallel.shares import shares_of_batches, shares_of_prompts
from gmpo.data_parallel.tensors import (
    exchanged_weights,
    gradients,
    moved,
    one_step,
    sum_of_bits,
)
from gmpo.errors import GmpoError
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

__all__ = ["Leader"]


class Leader:
    """The leader's side.

    Args:
        engine: of the leader.
        helpers: of the same recipe.
    """

    def __init__(self, engine: Engine, helpers: Helpers) -> None:
        self._engine = engine
        self._helpers = helpers
        self._sent: Tensor | None = None

    @property
    def num_processes(self) -> int:
        """The leader among them."""
        return 1 + self._helpers.count

    def sample(
        self, prompts: Sequence[Prompt], *, settings: SamplingSettings, key: tuple[int | str, ...]
    ) -> list[Group]:
        """As `GroupSampler`: each process completes its prompts, by the draws that are theirs."""
        shares = shares_of_prompts(prompts, self.num_processes)
        parts = [[prompts[place] for place in share] for share in shares]
        version = self._engine.sampler.version

        def own() -> list[Group]:
            return self._engine.sample(parts[0], settings=settings, key=key) if parts[0] else []

        self._share_weights()
        sent = [(part, settings, key, version) for part in parts[1:]]
        found = self._shared("sample", sent, own)
        placed = dict(_placed(shares, found))
        return [placed[place] for place in range(len(prompts))]

    def old_logprobs(
        self, steps: Sequence[StepBatch], *, temperature: float
    ) -> tuple[list[StepBatch], Mismatch | None]:
        """As `with_old_logprobs`."""
        policy, mismatches = self._engine.policy, []

        def own(step: StepBatch) -> StepBatch:
            (scored,), mismatch = with_old_logprobs(policy, [step], temperature=temperature)
            mismatches.append(mismatch)
            return scored

        self._share_weights()
        scored, theirs = self._rescored("old_logprobs", steps, own, temperature)
        return scored, Mismatch.over([*mismatches, *theirs])

    def reference_logprobs(
        self, steps: Sequence[StepBatch], *, temperature: float
    ) -> list[StepBatch]:
        """As `with_reference_logprobs`; adapters' reference is the base, which does not move."""
        reference = self._engine.reference
        assert reference is not None, "asked only where there is one"
        with_dead = with_reference_logprobs(
            reference,
            [replace(step, micro_batches=()) for step in steps],
            temperature=temperature,
        )

        def own(step: StepBatch) -> StepBatch:
            (scored,) = with_reference_logprobs(reference, [step], temperature=temperature)
            return scored

        scored, _ = self._rescored("reference_logprobs", steps, own, temperature)
        return [
            replace(step, dead_batches=dead.dead_batches)
            for step, dead in zip(scored, with_dead, strict=True)
        ]

    def accumulate(
        self, step: StepBatch, settings: LossSettings, *, is_old_policy: bool
    ) -> StepMeasures:
        """As `accumulate_gradients`; a step of one micro-batch is the leader's."""
        shares = shares_of_batches(step.micro_batches, self.num_processes)
        if len(step.micro_batches) < 2:
            return accumulate_gradients(
                self._engine.policy,
                step,
                settings,
                is_old_policy=is_old_policy,
                may_stay_narrow=True,
            )

        def part(place: int) -> StepBatch:
            batches = tuple(step.micro_batches[at] for at in shares[place])
            return replace(step, micro_batches=batches, dead_batches=())

        def own() -> StepMeasures:
            mine = replace(part(0), dead_batches=step.dead_batches)
            policy = self._engine.policy
            measures = accumulate_gradients(policy, mine, settings, is_old_policy=is_old_policy)
            gradients(policy)
            return measures

        self._share_weights()
        others = range(1, len(shares))
        sent = [(moved(part(at), "cpu"), settings, is_old_policy) for at in others]
        found = self._shared("accumulate", sent, own)
        self._sum_gradients()
        device = self._engine.policy.device
        return StepMeasures.over([moved(measures, device) for measures in found])

    def close(self) -> None:
        """Let the helpers go."""
        self._helpers.close()

    def _rescored(
        self,
        name: str,
        steps: Sequence[StepBatch],
        own: Callable[[StepBatch], StepBatch],
        temperature: float,
    ) -> tuple[list[StepBatch], list[Mismatch | None]]:
        """The steps with log-probabilities, each process's of its share; helpers' mismatches."""
        batches = [batch for step in steps for batch in step.micro_batches]
        shares = shares_of_batches(batches, self.num_processes)
        mine, *theirs = (tuple(batches[at] for at in share) for share in shares)
        sent = [(moved(part, "cpu"), temperature) for part in theirs]
        first, *others = self._shared(name, sent, lambda: own(one_step(mine)).micro_batches)
        device = self._engine.policy.device
        parts = [first, *(moved(scored, device) for scored, _ in others)]
        placed, places = dict(_placed(shares, parts)), iter(range(len(batches)))
        changed = [
            replace(step, micro_batches=tuple(placed[next(places)] for _ in step.micro_batches))
            for step in steps
        ]
        return changed, [mismatch for _, mismatch in others]

    def _shared(
        self, name: str, sent: Sequence[tuple[Any, ...]], own: Callable[[], Any]
    ) -> list[Any]:
        """What each process made of its part, the leader first.

        Args:
            name: of the work.
            sent: the helpers' parts.
            own: does the leader's.
        """
        self._helpers.ask([Request(name=name, arguments=part) for part in sent])
        try:
            mine = own()
        except GmpoError:
            self._helpers.answers()  # or they would be taken for those of the next question
            raise
        return [mine, *values_of(self._helpers.answers())]

    def _share_weights(self) -> None:
        """Give the helpers the weights, if they have moved since.

        Whether they have is told by the sums of their bits, so that no step is too small.
        """
        weights = exchanged_weights(self._engine.policy)
        sums = torch.stack([sum_of_bits(weight) for weight in weights])
        if self._sent is not None and torch.equal(sums, self._sent):
            return
        self._helpers.ask([Request(name="weights")] * self._helpers.count)
        broadcast(weights)
        values_of(self._helpers.answers())
        self._sent = sums

    def _sum_gradients(self) -> None:
        policy = self._engine.policy
        self._helpers.ask([Request(name="gradients")] * self._helpers.count)
        reduce_sum(gradients(policy))
        values_of(self._helpers.answers())


def _placed(shares: Sequence[list[int]], found: Sequence[Sequence[Any]]) -> list[tuple[int, Any]]:
    return [
        pair
        for share, values in zip(shares, found, strict=True)
        for pair in zip(share, values, strict=True)
    ]
