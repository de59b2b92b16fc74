"""A team of several processes: shares go to helpers, and are put together with the leader's own.

Weights move on the leader alone. Helpers get them before work that needs them, if they have moved;
their gradients are added to the leader's before it takes its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmpo.batch import MicroBatch, StepBatch
from gmpo.errors import GmpoError
from gmpo.objective import ObjectiveTerms
from gmpo.policy.score import Policy
from gmpo.records import Group, Prompt
from gmpo.rollouts import SamplingSettings
from gmpo.team.alone import Engine
from gmpo.team.exchange import Helpers, Request, broadcast, raise_errors, reduce_sum
from gmpo.team.shares import shares_of_batches, shares_of_prompts
from gmpo.update import (
    LossSettings,
    Mismatch,
    StepMeasures,
    accumulate_gradients,
    with_old_logprobs,
    with_reference_logprobs,
)

__all__ = ["HelperWork", "Several"]


class Several:
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

        version = self._engine.sampler.version

        def parts_of(share: list[int]) -> tuple[Any, ...]:
            return [prompts[place] for place in share], settings, key, version

        def own(of_share: list[Prompt], *_: object) -> list[Group]:
            return self._engine.sample(of_share, settings=settings, key=key) if of_share else []

        self._share_weights()
        found = self._shared("sample", [parts_of(share) for share in shares], own)
        placed = dict(_placed(shares, found))
        return [placed[place] for place in range(len(prompts))]

    def old_logprobs(
        self, steps: Sequence[StepBatch], *, temperature: float
    ) -> tuple[list[StepBatch], Mismatch | None]:
        """As `with_old_logprobs`."""
        self._share_weights()
        scored, mismatches = self._rescored("old_logprobs", steps, temperature)
        return scored, Mismatch.over(mismatches)

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
        scored, _ = self._rescored("reference_logprobs", steps, temperature)
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

        def own(*_: object) -> StepMeasures:
            mine = replace(part(0), dead_batches=step.dead_batches)
            policy = self._engine.policy
            measures = accumulate_gradients(policy, mine, settings, is_old_policy=is_old_policy)
            _gradients(policy)
            return measures

        self._share_weights()
        sent = [(_moved(part(at), "cpu"), settings, is_old_policy) for at in range(len(shares))]
        found = self._shared("accumulate", sent, own)
        self._sum_gradients()
        device = self._engine.policy.device
        return StepMeasures.over([_moved(measures, device) for measures in found])

    def close(self) -> None:
        """Let the helpers go."""
        self._helpers.close()

    def _rescored(
        self, name: str, steps: Sequence[StepBatch], temperature: float
    ) -> tuple[list[StepBatch], list[Mismatch | None]]:
        """The steps with log-probabilities that the processes have computed, each of its share."""
        batches = [batch for step in steps for batch in step.micro_batches]
        shares = shares_of_batches(batches, self.num_processes)
        work = HelperWork(self._engine).rescoring[name]

        def own(of_share: tuple[MicroBatch, ...], *_: object) -> Any:
            return work(of_share, temperature)

        mine = tuple(batches[at] for at in shares[0])
        sent = [_moved(tuple(batches[at] for at in share), "cpu") for share in shares[1:]]
        found = self._shared(name, [(mine, temperature), *((s, temperature) for s in sent)], own)
        device = self._engine.policy.device
        scored = dict(_placed(shares, [_moved(batches, device) for batches, _ in found]))
        places = iter(range(len(batches)))
        changed = [
            replace(step, micro_batches=tuple(scored[next(places)] for _ in step.micro_batches))
            for step in steps
        ]
        return changed, [mismatch for _, mismatch in found]

    def _shared(
        self, name: str, parts: Sequence[tuple[Any, ...]], own: Callable[..., Any]
    ) -> list[Any]:
        """What each process made of its part, the leader first."""
        self._helpers.ask([Request(name=name, arguments=part) for part in parts[1:]])
        try:
            mine = own(*parts[0])
        except GmpoError:
            self._helpers.answers()  # or they would be taken for those of the next question
            raise
        return [mine, *raise_errors(self._helpers.answers())]

    def _share_weights(self) -> None:
        """Give the helpers the weights, if they have moved since.

        Whether they have is told by the sums of their bits, so that no step is too small.
        """
        weights = _exchanged_weights(self._engine.policy)
        sums = torch.stack([_sum_of_bits(weight) for weight in weights])
        if self._sent is not None and torch.equal(sums, self._sent):
            return
        self._helpers.ask([Request(name="weights")] * self._helpers.count)
        broadcast(weights)
        raise_errors(self._helpers.answers())
        self._sent = sums

    def _sum_gradients(self) -> None:
        policy = self._engine.policy
        self._helpers.ask([Request(name="gradients")] * self._helpers.count)
        reduce_sum(_gradients(policy))
        raise_errors(self._helpers.answers())


class HelperWork:
    """What a helper does when it is asked.

    Args:
        engine: of its process.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rescoring: dict[str, Callable[..., Any]] = {
            "old_logprobs": self._old_logprobs,
            "reference_logprobs": self._reference_logprobs,
        }

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Each piece of work."""
        return {
            "weights": self._take_weights,
            "sample": self._sample,
            "accumulate": self._accumulate,
            "gradients": self._give_gradients,
            **self.rescoring,
        }

    def _take_weights(self) -> None:
        policy = self._engine.policy
        broadcast(_exchanged_weights(policy))
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
            policy, [_one_step(_moved(batches, policy.device))], temperature=temperature
        )
        return _moved(step.micro_batches, "cpu"), mismatch

    def _reference_logprobs(
        self, batches: tuple[MicroBatch, ...], temperature: float
    ) -> tuple[tuple[MicroBatch, ...], None]:
        reference, device = self._engine.reference, self._engine.policy.device
        assert reference is not None, "the recipe has one"
        (step,) = with_reference_logprobs(
            reference, [_one_step(_moved(batches, device))], temperature=temperature
        )
        return _moved(step.micro_batches, "cpu"), None

    def _accumulate(
        self, step: StepBatch, settings: LossSettings, is_old_policy: bool
    ) -> StepMeasures:
        policy = self._engine.policy
        policy.forget_gradients()  # of a step that an error ended on another process
        moved = _moved(step, policy.device)
        measures = accumulate_gradients(policy, moved, settings, is_old_policy=is_old_policy)
        _gradients(policy)  # what it may lack memory for is told before they are exchanged
        told: StepMeasures = _moved(measures, "cpu")
        return told

    def _give_gradients(self) -> None:
        policy = self._engine.policy
        reduce_sum(_gradients(policy))
        policy.forget_gradients()


def _one_step(batches: tuple[MicroBatch, ...]) -> StepBatch:
    return StepBatch(micro_batches=batches, num_rollouts=0, num_skipped_rows=0)


def _exchanged_weights(policy: Policy) -> list[Tensor]:
    """What of the weights moves, in one order: the adapters', or all, as masters hold them."""
    return list(policy.trained_weights().values())


def _sum_of_bits(weight: Tensor) -> Tensor:
    kind = torch.int32 if weight.element_size() == 4 else torch.int64
    return weight.view(kind).sum(dtype=torch.int64)


def _gradients(policy: Policy) -> list[Tensor]:
    """Gradients of all trained weights, in one order; zeros where there was nothing to do."""
    policy.widen_gradients()
    found = []
    for weight in policy.masters.values():
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            found.append(weight.grad)
    return found


def _placed(shares: Sequence[list[int]], found: Sequence[Sequence[Any]]) -> list[tuple[int, Any]]:
    return [
        pair
        for share, values in zip(shares, found, strict=True)
        for pair in zip(share, values, strict=True)
    ]


def _moved(value: Any, device: torch.device | str) -> Any:
    """The same record, its tensors on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    if isinstance(value, MicroBatch | StepBatch | StepMeasures | ObjectiveTerms):
        parts = {name: _moved(part, device) for name, part in vars(value).items()}
        return replace(value, **parts)
    return value
