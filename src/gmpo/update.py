"""The update: gradients of a step's mean loss, accumulated over micro-batches, then one AdamW step.

Dimensions: **B** sequences, **T** completion tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from gmpo.batch import MicroBatch, StepBatch
from gmpo.errors import AFTER_DIVERGING, NonFiniteError, NonFiniteLossError
from gmpo.host_memory import keep_freed_memory
from gmpo.kernels.optimizer import AdamWStep, adamw, gradient_norm
from gmpo.objective import OBJECTIVES, ObjectiveTerms, kl_k3, token_mean
from gmpo.policy.score import Policy, Scorer, TokenScores

__all__ = [
    "LossSettings",
    "Mismatch",
    "PolicyOptimizer",
    "StepMeasures",
    "accumulate_gradients",
    "bind_objective",
    "gradient_cosine",
    "with_old_logprobs",
    "with_reference_logprobs",
]

_CLIP_EPS = 1e-6
"""As in torch's clip_grad_norm_."""

_Objective = Callable[..., ObjectiveTerms]
"""An objective with its clips bound: (policy_logprobs, old_logprobs, advantages, mask) -> terms."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised: the objective plus optional terms, at the sampling temperature."""

    objective: _Objective
    temperature: float = 1.0
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """|log pi_trainer - log pi_sampler| on unchanged weights, in nats."""

    mean: float
    max: float
    num_tokens: int

    MEAN_BOUND = 0.005
    MAX_BOUND = 0.1

    @classmethod
    def over(cls, parts: Iterable[Mismatch | None]) -> Mismatch | None:
        """Of all tokens of the parts together; None without any."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        num_tokens = sum(part.num_tokens for part in known)
        return cls(
            mean=sum(part.mean * part.num_tokens for part in known) / num_tokens,
            max=max(part.max for part in known),
            num_tokens=num_tokens,
        )

    @property
    def is_small(self) -> bool:
        """Whether sampler log-probabilities may stand for the old policy's."""
        return self.mean <= self.MEAN_BOUND and self.max <= self.MAX_BOUND


@dataclass(frozen=True, kw_only=True)
class StepMeasures:
    """What one step's gradient was made of.

    `loss` and `entropy` are means over the step's rollouts, `kl_ref_k3` over the `num_compared`
    rows that have a reference, dead ones too; in nats where they have a unit. `mismatch` is None
    on a step without live rows.
    """

    loss: float
    terms: tuple[ObjectiveTerms, ...]
    masks: tuple[Tensor, ...]
    row_names: tuple[str, ...]
    kl_ref_k3: float | None
    entropy: float | None
    mismatch: Mismatch | None
    num_compared: int = 0

    @classmethod
    def over(cls, parts: Sequence[StepMeasures]) -> StepMeasures:
        """Of a step whose rows were divided among these, each over the whole step's mean."""
        compared = sum(part.num_compared for part in parts)
        kl_ref = sum((part.kl_ref_k3 or 0.0) * part.num_compared for part in parts)
        entropies = [part.entropy for part in parts if part.entropy is not None]
        return cls(
            loss=sum(part.loss for part in parts),
            terms=tuple(terms for part in parts for terms in part.terms),
            masks=tuple(mask for part in parts for mask in part.masks),
            row_names=tuple(name for part in parts for name in part.row_names),
            kl_ref_k3=kl_ref / compared if compared else None,
            entropy=sum(entropies) if entropies else None,
            mismatch=Mismatch.over(part.mismatch for part in parts),
            num_compared=compared,
        )


def bind_objective(name: str, *, clips: dict[str, float], max_tokens: int) -> _Objective:
    """The named objective with its own arguments filled in.

    Args:
        name: a key of `OBJECTIVES`.
        clips: half-widths in the objective's unit; empty for an objective without a clip.
        max_tokens: the completion limit, Dr. GRPO's constant normaliser.
    """
    extra = {"max_tokens": max_tokens} if name == "dr_grpo" else {}
    return partial(OBJECTIVES[name], **clips, **extra)


def accumulate_gradients(
    policy: Policy,
    step: StepBatch,
    settings: LossSettings,
    *,
    is_old_policy: bool = False,
    may_stay_narrow: bool = False,
) -> StepMeasures:
    """Add the gradient of the step's mean loss to the policy's weights.

    The mean is the sum of per-sequence losses over `step.num_rollouts`, so it does not depend on
    how the step is cut into micro-batches or padded. Dead rows, if the step has them, are measured.

    Args:
        policy: whose weights get the gradient.
        step: rows with their old log-probabilities.
        settings: the loss.
        is_old_policy: the policy has not moved since it became the old one, so that its own scores
            are the old log-probabilities and those of the step are not used.
        may_stay_narrow: gradients of a step of one micro-batch may stay with the compute weights,
            in their precision, until `PolicyOptimizer` or `Policy.widen_gradients` takes them.

    Raises:
        NonFiniteError: a log-probability that counts is NaN or infinite; rows are named.
        NonFiniteLossError: a loss is, though no log-probability is. Micro-batches before it have
            left their gradients.
    """
    wants_entropy = settings.entropy_coefficient > 0
    tally = _Tally()
    for batch in step.dead_batches:
        _measure_dead_rows(policy, batch, settings, tally)
    policy.widen_gradients()  # an earlier call's, to which this one's are added
    is_one = len(step.micro_batches) == 1
    left = policy.gradients_left_narrow if may_stay_narrow and is_one else contextlib.nullcontext
    for batch in step.micro_batches:
        scores = policy.score(batch, temperature=settings.temperature, with_entropy=wants_entropy)
        _require_finite_logprobs(scores.logprobs, batch)
        terms = settings.objective(
            policy_logprobs=scores.logprobs,
            old_logprobs=scores.logprobs.detach() if is_old_policy else batch.old_logprobs,
            advantages=batch.advantages,
            mask=batch.mask,
        )
        losses = _with_regularisers(terms.loss, scores, batch, settings, tally)
        _require_finite_losses(losses, batch)
        with left():
            (losses.sum() / step.num_rollouts).backward()
        tally.add(losses, terms, scores, batch)
    return tally.measures(step.num_rollouts)


class PolicyOptimizer:
    """AdamW over the policy's fp32 master weights.

    Gradients that were left in the compute precision are stepped from as they are, by a compiled
    function; all others by torch's. Moments and their names are torch's either way.

    Args:
        policy: whose weights move.
        betas: decay of the first and second moment.
        eps: AdamW's epsilon.
        weight_decay: decoupled, per unit of step size.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if policy.device.type == "cpu":
            keep_freed_memory()
        self._policy = policy
        self._weights = [w for w in policy.masters.values() if w.requires_grad]
        has_fused = policy.device.type in ("cpu", "cuda")
        self.adamw = torch.optim.AdamW(
            self._weights, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=has_fused
        )
        self.zero_gradients()

    def zero_gradients(self) -> None:
        """Forget accumulated gradients."""
        self._policy.forget_gradients()

    def apply_step(
        self,
        *,
        learning_rate: float,
        clip_norm: float,
        is_wanted: Callable[[float], bool] = lambda _: True,
    ) -> float:
        """Clip the gradient, step, publish the weights; returns the norm before clipping.

        A weight without a gradient has a gradient of zero: a step whose groups are all dead still
        steps, by AdamW's moments and decay.

        Args:
            learning_rate: of this step.
            clip_norm: longer gradients are scaled down to it.
            is_wanted: asked with the norm before anything moves; on False the gradient is
                forgotten, and weights and moments stay as they are.

        Raises:
            NonFiniteError: the gradient of a step that is wanted is NaN or infinite; the weights
                have not moved.
        """
        stays_narrow = self._policy.takes_narrow_gradients and all(
            weight.grad is None for weight in self._weights
        )
        norm_tensor = self._narrow_norm() if stays_narrow else self._wide_norm()
        norm = float(norm_tensor)
        if not is_wanted(norm):
            self.zero_gradients()
            return norm
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm is {norm}; the weights were not moved. {AFTER_DIVERGING}"
            )
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if stays_narrow:
            self._step_narrow(scale=clip_norm / (norm + _CLIP_EPS) if norm > clip_norm else 1.0)
        else:
            if norm > clip_norm:  # else it would multiply every gradient by 1
                nn.utils.clip_grads_with_norm_(self._weights, clip_norm, norm_tensor)
            self.adamw.step()
            self._policy.publish_masters()
        self.zero_gradients()
        return norm

    def _wide_norm(self) -> Tensor:
        self._policy.widen_gradients()
        for weight in self._weights:
            weight.grad = _gradient(weight)
        return nn.utils.get_total_norm([_gradient(weight) for weight in self._weights])

    def _narrow_norm(self) -> Tensor:
        pairs = self._policy.narrow_pairs()
        return gradient_norm(p.grad for _, p in pairs if p.grad is not None)

    @torch.no_grad()
    def _step_narrow(self, *, scale: float) -> None:
        (group,) = self.adamw.param_groups
        for master, parameter in self._policy.narrow_pairs():
            state = self.adamw.state[master]
            if not state:  # as torch's AdamW begins
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(master)
                state["exp_avg_sq"] = torch.zeros_like(master)
            state["step"] += 1
            adamw(
                master,
                parameter.grad,
                (state["exp_avg"], state["exp_avg_sq"]),
                parameter,
                AdamWStep(
                    learning_rate=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    number=int(state["step"]),
                    scale=scale,
                ),
            )


@torch.no_grad()
def with_old_logprobs(
    policy: Policy, steps: Sequence[StepBatch], *, temperature: float
) -> tuple[list[StepBatch], Mismatch | None]:
    """Steps whose old log-probabilities are the policy's own, so that the first ratio is exactly 1.

    Call it before the round's first update. The mismatch is None if there are no live rows.
    """
    tally = _Tally()

    def rescored(batch: MicroBatch) -> MicroBatch:
        scores = policy.score(batch, temperature=temperature)
        _require_finite_logprobs(scores.logprobs, batch)
        tally.add_mismatch(scores.logprobs, batch)
        return replace(batch, old_logprobs=scores.logprobs)

    return _map_batches(rescored, steps), tally.mismatch()


@torch.no_grad()
def with_reference_logprobs(
    reference: Scorer, steps: Sequence[StepBatch], *, temperature: float
) -> list[StepBatch]:
    """Steps with the reference policy's log-probabilities, for the KL term; dead rows have them."""

    def rescored(batch: MicroBatch) -> MicroBatch:
        scores = reference.score(batch, temperature=temperature)
        return replace(batch, reference_logprobs=scores.logprobs)

    return [
        replace(step, dead_batches=tuple(rescored(batch) for batch in step.dead_batches))
        for step in _map_batches(rescored, steps)
    ]


def gradient_cosine(
    policy: Policy,
    step: StepBatch,
    *,
    settings: LossSettings,
    other: LossSettings,
    is_old_policy: bool = False,
) -> float:
    """Cosine between the gradients of two losses on the same step; leaves no gradients.

    Costs two backward passes and, for the moment, one more copy of the gradients.
    """
    step = replace(step, dead_batches=())  # which have no gradient
    weights = [w for w in policy.masters.values() if w.requires_grad]
    assert all(w.grad is None or not w.grad.any() for w in weights), "gradients must be zero"
    accumulate_gradients(policy, step, settings, is_old_policy=is_old_policy)
    first = [_gradient(weight).clone() for weight in weights]
    policy.forget_gradients()
    accumulate_gradients(policy, step, other, is_old_policy=is_old_policy)
    pairs = [(a, _gradient(weight)) for a, weight in zip(first, weights, strict=True)]
    product = sum(float((a * b).sum()) for a, b in pairs)
    squares = [sum(float(pair[side].square().sum()) for pair in pairs) for side in (0, 1)]
    policy.forget_gradients()
    return product / math.sqrt(squares[0] * squares[1]) if all(squares) else math.nan


@dataclass
class _Tally:
    """Sums over a step's micro-batches."""

    loss: float = 0.0
    kl_ref_k3: float = 0.0
    num_compared: int = 0
    entropy: float = 0.0
    terms: list[ObjectiveTerms] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    row_names: list[str] = field(default_factory=list)
    has_entropy: bool = False
    differences: list[Tensor] = field(default_factory=list)

    def add(
        self, losses: Tensor, terms: ObjectiveTerms, scores: TokenScores, batch: MicroBatch
    ) -> None:
        self.loss += float(losses.detach().sum())
        self.terms.append(
            replace(
                terms,
                loss=terms.loss.detach(),
                log_ratio=terms.log_ratio.detach(),
                sequence_ratio=terms.sequence_ratio.detach(),
            )
        )
        self.masks.append(batch.mask)
        self.row_names += batch.row_names
        self.add_mismatch(scores.logprobs.detach(), batch)

    def add_divergence(self, logprobs: Tensor, batch: MicroBatch) -> Tensor:
        """KL of each row to the reference, which is added to the sum."""
        assert batch.reference_logprobs is not None
        # The tokens came from the old policy; within a round its distance from pi_theta is small.
        divergence = kl_k3(p_logprobs=logprobs, q_logprobs=batch.reference_logprobs)
        kl_ref = token_mean(divergence, mask=batch.mask)
        self.kl_ref_k3 += float(kl_ref.detach().sum())
        self.num_compared += len(kl_ref)
        return kl_ref

    def add_mismatch(self, logprobs: Tensor, batch: MicroBatch) -> None:
        self.differences.append((logprobs - batch.sampler_logprobs)[batch.mask].abs())

    def mismatch(self) -> Mismatch | None:
        if not self.differences:
            return None
        joined = torch.cat(self.differences)
        return Mismatch(mean=float(joined.mean()), max=float(joined.max()), num_tokens=len(joined))

    def measures(self, num_rollouts: int) -> StepMeasures:
        return StepMeasures(
            loss=self.loss / max(1, num_rollouts),
            terms=tuple(self.terms),
            masks=tuple(self.masks),
            row_names=tuple(self.row_names),
            kl_ref_k3=self.kl_ref_k3 / self.num_compared if self.num_compared else None,
            entropy=self.entropy / num_rollouts if self.has_entropy else None,
            mismatch=self.mismatch(),
            num_compared=self.num_compared,
        )


@torch.no_grad()
def _measure_dead_rows(
    policy: Policy, batch: MicroBatch, settings: LossSettings, tally: _Tally
) -> None:
    scores = policy.score(batch, temperature=settings.temperature)
    _require_finite_logprobs(scores.logprobs, batch)
    if batch.reference_logprobs is not None:
        tally.add_divergence(scores.logprobs, batch)


def _with_regularisers(
    losses: Tensor, scores: TokenScores, batch: MicroBatch, settings: LossSettings, tally: _Tally
) -> Tensor:
    """Add the KL and entropy terms, each a mean over a sequence's own tokens."""
    if batch.reference_logprobs is not None:
        kl_ref = tally.add_divergence(scores.logprobs, batch)
        if settings.kl_coefficient:  # without, it is only measured
            losses = losses + settings.kl_coefficient * kl_ref
    if scores.entropy is not None:
        entropy = token_mean(scores.entropy, mask=batch.mask)
        tally.has_entropy = True
        tally.entropy += float(entropy.detach().sum())
        losses = losses - settings.entropy_coefficient * entropy
    return losses


def _require_finite_logprobs(logprobs: Tensor, batch: MicroBatch) -> None:
    broken = (batch.mask & ~logprobs.isfinite()).any(dim=-1)
    if broken.any():
        what = "log-probability of a sampled token"
        raise NonFiniteError(_non_finite_rows(what, broken, batch))


def _require_finite_losses(losses: Tensor, batch: MicroBatch) -> None:
    broken = ~losses.isfinite()
    if broken.any():
        raise NonFiniteLossError(_non_finite_rows("loss", broken, batch))


def _non_finite_rows(what: str, broken: Tensor, batch: MicroBatch) -> str:
    names = [name for name, is_bad in zip(batch.row_names, broken.tolist(), strict=True) if is_bad]
    return (
        f"the {what} is not finite for rollouts {names[:5]} ({len(names)} in all; prompt#index). "
        f"The policy has diverged. {AFTER_DIVERGING}"
    )


def _map_batches(
    change: Callable[[MicroBatch], MicroBatch], steps: Iterable[StepBatch]
) -> list[StepBatch]:
    return [
        replace(step, micro_batches=tuple(change(batch) for batch in step.micro_batches))
        for step in steps
    ]


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
