"""What is shared out among processes, and the form that one process alone has of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from gmpo.batch import StepBatch
from gmpo.policy.score import Policy, Scorer
from gmpo.records import Group, Prompt
from gmpo.rollouts import GroupSampler, SamplingSettings
from gmpo.sampler.local import LocalSampler
from gmpo.update import (
    LossSettings,
    Mismatch,
    StepMeasures,
    accumulate_gradients,
    with_old_logprobs,
    with_reference_logprobs,
)

__all__ = ["Engine", "OneProcess", "Processes"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What one process samples and computes gradients with.

    Attributes:
        policy: that is trained.
        reference: that it is compared with; None if it is not.
        tokenizer: of both.
        sampler: over the policy's own weights.
        sample: groups of completions by that sampler, or by the recipe's rollout function.
        sampling: how completions are drawn.
    """

    policy: Policy
    reference: Scorer | None
    tokenizer: PreTrainedTokenizerBase
    sampler: LocalSampler
    sample: GroupSampler
    sampling: SamplingSettings


class Processes(Protocol):
    """The processes of a run, as the loop sees them: results do not depend on how many there are.

    They are those of one process up to the rounding of sums.
    """

    @property
    def num_processes(self) -> int:
        """The leader among them."""

    def sample(
        self, prompts: Sequence[Prompt], *, settings: SamplingSettings, key: tuple[int | str, ...]
    ) -> list[Group]:
        """As `GroupSampler`."""

    def old_logprobs(
        self, steps: Sequence[StepBatch], *, temperature: float
    ) -> tuple[list[StepBatch], Mismatch | None]:
        """As `with_old_logprobs`."""

    def reference_logprobs(
        self, steps: Sequence[StepBatch], *, temperature: float
    ) -> list[StepBatch]:
        """As `with_reference_logprobs`; only where there is a reference."""

    def accumulate(
        self, step: StepBatch, settings: LossSettings, *, is_old_policy: bool
    ) -> StepMeasures:
        """As `accumulate_gradients`: the leader's policy has the gradient of the whole step."""

    def close(self) -> None:
        """Let the helpers go."""


@dataclass(frozen=True, kw_only=True)
class OneProcess:
    """A run of one process."""

    engine: Engine

    @property
    def num_processes(self) -> int:
        """One."""
        return 1

    def sample(
        self, prompts: Sequence[Prompt], *, settings: SamplingSettings, key: tuple[int | str, ...]
    ) -> list[Group]:
        """As `GroupSampler`."""
        return self.engine.sample(prompts, settings=settings, key=key)

    def old_logprobs(
        self, steps: Sequence[StepBatch], *, temperature: float
    ) -> tuple[list[StepBatch], Mismatch | None]:
        """As `with_old_logprobs`."""
        return with_old_logprobs(self.engine.policy, steps, temperature=temperature)

    def reference_logprobs(
        self, steps: Sequence[StepBatch], *, temperature: float
    ) -> list[StepBatch]:
        """As `with_reference_logprobs`."""
        assert self.engine.reference is not None, "asked only where there is one"
        return with_reference_logprobs(self.engine.reference, steps, temperature=temperature)

    def accumulate(
        self, step: StepBatch, settings: LossSettings, *, is_old_policy: bool
    ) -> StepMeasures:
        """As `accumulate_gradients`; a gradient may stay with the compute weights."""
        return accumulate_gradients(
            self.engine.policy,
            step,
            settings,
            is_old_policy=is_old_policy,
            may_stay_narrow=True,
        )

    def close(self) -> None:
        """There is no helper."""
