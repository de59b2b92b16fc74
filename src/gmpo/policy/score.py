"""The policy: a causal language model whose given tokens are scored and whose weights move.

Dimensions: **B** sequences, **T** completion tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from gmpo.batch import MicroBatch
from gmpo.errors import ModelError
from gmpo.kernels.optimizer import takes_narrow
from gmpo.policy.agreement import (
    LARGEST_LOGIT_DIFFERENCE,
    LARGEST_OVER_POSITIONS,
    extended_difference,
    scored_difference,
    why_not_alike,
)
from gmpo.policy.head import chunked_token_logprobs, token_logprobs, widened
from gmpo.policy.llama import LlamaBody
from gmpo.policy.lora import adapters_of, adapters_off, merged_weight
from gmpo.policy.packed import scored_hidden_states
from gmpo.policy.recompute import keep_layers, recompute_layers
from gmpo.policy.weights import copy_weights

__all__ = ["BasePolicy", "Policy", "Scorer", "TokenScores"]


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of each completion token in nats; 0 off the mask. Entropy only where asked for."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None


@runtime_checkable
class Scorer(Protocol):
    """What gives tokens their log-probabilities: a policy, or the base under its adapters."""

    def score(
        self, batch: MicroBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> TokenScores:
        """As `Policy.score`."""


class Policy:
    """pi_theta: scores tokens, holds fp32 master weights, hands out named weights.

    With `engine="fast"` a Llama-family model is scored with shared prompts and a chunked head,
    after a check against the module's own logits; every other model takes the plain path, and
    `warn` is told why.

    Args:
        model: a decoder-only causal language model, on its device and in its compute precision;
            with `add_adapters` called on it, only its adapters are trained.
        engine: "fast" or "plain".
        gradient_checkpointing: run each layer again in the backward pass instead of keeping what
            it computed; the same gradients for less memory and more time.
        warn: called with one sentence if the fast path does not cover the model, or later if the
            sampler's does not.

    Raises:
        ModelError: the model is in a precision that is not trained in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        engine: str = "fast",
        gradient_checkpointing: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        if model.dtype not in LARGEST_LOGIT_DIFFERENCE:
            raise ModelError(
                f"the model is in {model.dtype}; load it in torch.float32 or torch.bfloat16: small "
                "gradients are lost in fp16 without loss scaling, which does not exist here"
            )
        _release_earlier(model)
        self.model = model.eval()  # dropout would make scored and sampled policy differ
        self._hooks: list[RemovableHandle] = []
        _POLICIES[model] = ref(self)  # now, so that the next one also ends one that is half made
        self.warn = warn
        self.body = _checked_body(model, warn) if engine == "fast" else None
        if gradient_checkpointing and self.body is not None:
            self.body.recomputes_layers = True
        elif gradient_checkpointing:
            recompute_layers(model)
        self.adapters = adapters_of(model)
        self.masters: dict[str, nn.Parameter] = {}
        self._narrow: dict[str, _Narrow] = {}
        self._leaves_narrow = False
        for name, parameter in model.named_parameters():
            self.masters[name] = self._master_of(name, parameter)

    def release(self) -> None:
        """Let the model go; this one trains no more. Another policy of the model does it too."""
        for hook in self._hooks:
            hook.remove()
        if _last_policy_of(self.model) is self:
            keep_layers(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward and backward passes."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is run once for all its completions in `score`."""
        return self.body is not None

    def score(
        self, batch: MicroBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> TokenScores:
        """Log-probability of each counted completion token, with gradient, in nats.

        Args:
            batch: prompts and completions.
            temperature: of the distribution that was sampled; divides the logits.
            with_entropy: also return each position's entropy, with gradient.
        """
        entropy: Tensor | None
        if self.body is None:
            logprobs, entropy = self._score_plainly(batch, temperature)
        else:
            logprobs, entropy = chunked_token_logprobs(
                scored_hidden_states(self.body, batch),
                self.body.head_weight,
                batch.completion_ids[batch.mask],
                temperature=temperature,
                with_entropy=with_entropy,
                keeps_logits=not self.body.recomputes_layers,
            )
        return TokenScores(
            logprobs=_scatter(logprobs, batch),
            entropy=_scatter(entropy, batch) if with_entropy and entropy is not None else None,
        )

    @property
    def has_narrow_weights(self) -> bool:
        """Whether trained weights are computed with in less than their masters' fp32."""
        return bool(self._narrow)

    @property
    def takes_narrow_gradients(self) -> bool:
        """Whether an optimizer may step from gradients as the backward pass leaves them.

        So where every trained weight is computed with in bf16, and AdamW is compiled.
        """
        trained = {name for name, master in self.masters.items() if master.requires_grad}
        return bool(trained) and all(
            name in self._narrow and takes_narrow(self._narrow[name].parameter) for name in trained
        )

    @contextlib.contextmanager
    def gradients_left_narrow(self) -> Iterator[None]:
        """Inside, gradients stay with the compute weights where `takes_narrow_gradients`.

        For a step of one backward pass: a second one would add to them in bf16.
        """
        self._leaves_narrow = self.takes_narrow_gradients
        try:
            yield
        finally:
            self._leaves_narrow = False

    @torch.no_grad()
    def restore_masters(self, stored: Iterable[tuple[str, Tensor]]) -> int:
        """Give fp32 masters the digits that loading in the compute precision rounded away.

        A master that begins as a bf16 number stays one to the policy until it has moved by half the
        distance to the next, which a small step size takes rounds to do: most weights would be
        computed with as if nothing had been learned. Only a weight that rounds to the one that is
        computed with is taken, so a policy that has moved since keeps what it is.

        Args:
            stored: weights of the model by name, as they are stored.

        Returns:
            Masters that were given their digits.
        """
        found = [(self._narrow[name], tensor) for name, tensor in stored if name in self._narrow]
        count = 0
        for pair, tensor in found:
            exact = tensor.to(pair.master)
            if torch.equal(exact.to(pair.parameter.dtype), pair.parameter):
                pair.master.copy_(exact)
                count += 1
        return count

    def widen_gradients(self) -> None:
        """Add gradients that were left narrow to those of the fp32 masters."""
        for pair in self._narrow.values():
            pair.widen_gradient()

    def narrow_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each trained master in fp32 with the weight that is computed with, in their order."""
        return [(pair.master, pair.parameter) for pair in self._narrow.values()]

    def forget_gradients(self, *, keeps_room: bool = True) -> None:
        """None in place of zeros: the next backward pass hands its gradients over, adds nothing.

        Args:
            keeps_room: the memory of gradients that were widened to fp32 stays for the next ones.
        """
        for weight in self.masters.values():
            weight.grad = None
        for pair in self._narrow.values():
            pair.parameter.grad = None
            if not keeps_room:
                pair.room = None

    @cached_property
    def base_digest(self) -> str:
        """Of the frozen weights as they are held: 32 hexadecimal digits; the same base only."""
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in self.masters.items():
            if not weight.requires_grad:
                digest.update(name.encode())
                raw = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full fp32 tensors of a plain model by name, adapters merged; how weights leave.

        A plain model that loads them computes what this policy does, to rounding.
        """
        for name, master in self.masters.items():
            layer, _, kind = name.rpartition(".")
            if layer not in self.adapters or kind == "bias":
                yield name, widened(master.detach())
            elif kind == "weight":
                yield name, self._merged(layer)

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The module's own parameters, adapters apart, for a sampler over this very module."""
        for name, master in self.masters.items():
            yield name, master.detach()

    def trained_weights(self) -> dict[str, Tensor]:
        """The fp32 weights that training moves, by the module's own names: adapters, or all."""
        return {n: master.detach() for n, master in self.masters.items() if master.requires_grad}

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the adapters' weights by `trained_weights`, or without adapters all weights.

        Raises:
            ModelError: names or shapes are not exactly this model's.
        """
        weights = self.trained_weights() if self.adapters else dict(self.own_weights())
        copy_weights(weights, named_tensors)
        self.publish_masters()

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Round the master weights into the compute weights after they moved."""
        for name, parameter in self.model.named_parameters():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _merged(self, layer: str) -> Tensor:
        adapter = self.adapters[layer]
        return merged_weight(
            self.masters[f"{layer}.weight"],
            self.masters[f"{layer}.lora_A"],
            self.masters[f"{layer}.lora_B"],
            scale=adapter.scale,
            is_transposed=adapter.is_transposed,
        )

    def _master_of(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer moves, in fp32: the parameter itself if frozen or wide enough."""
        if parameter.dtype in (torch.float32, torch.float64) or not parameter.requires_grad:
            return parameter
        pair = _Narrow(parameter=parameter, master=nn.Parameter(parameter.detach().float()))

        def pass_on(_: Tensor) -> None:
            if not self._leaves_narrow:
                pair.widen_gradient()

        self._hooks.append(parameter.register_post_accumulate_grad_hook(pass_on))
        self._narrow[name] = pair
        return pair.master

    def _score_plainly(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """One padded forward over prompt and completion a row, with full logits."""
        lengths = batch.prompt_lengths[batch.prompt_of_row]
        width = int((lengths + batch.completion_lengths).max())
        token_ids = torch.zeros(len(lengths), width, dtype=torch.long, device=lengths.device)
        attention_mask = torch.zeros_like(token_ids)
        predictors, tokens = [], []
        for row, prompt in enumerate(batch.prompt_of_row.tolist()):
            start, count = int(lengths[row]), int(batch.completion_lengths[row])
            token_ids[row, :start] = batch.prompt_ids[prompt, :start]
            token_ids[row, start : start + count] = batch.completion_ids[row, :count]
            attention_mask[row, : start + count] = 1
            counted = torch.nonzero(batch.mask[row])[:, 0]
            predictors.append(row * width + start - 1 + counted)
            tokens.append(batch.completion_ids[row, counted])
        logits = self.model(token_ids, attention_mask=attention_mask, use_cache=False).logits
        scored = logits.flatten(0, 1)[torch.cat(predictors)]
        return token_logprobs(scored, torch.cat(tokens), temperature=temperature)


@dataclass(frozen=True)
class BasePolicy:
    """The model a policy with adapters started from: the same frozen weights, adapters off."""

    policy: Policy

    def score(
        self, batch: MicroBatch, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> TokenScores:
        """As `Policy.score`; without gradient, because nothing it uses is trained."""
        with torch.no_grad(), adapters_off(self.policy.model):
            return self.policy.score(batch, temperature=temperature, with_entropy=with_entropy)


@dataclass(kw_only=True)
class _Narrow:
    """A weight that is computed with in bf16, and the fp32 master that the optimizer moves."""

    parameter: nn.Parameter
    master: nn.Parameter
    room: Tensor | None = None

    def widen_gradient(self) -> None:
        """Micro-batches add up in fp32: bf16 would lose a small one beside a large sum."""
        narrow, self.parameter.grad = self.parameter.grad, None
        if narrow is None:
            return
        if self.master.grad is not None:
            self.master.grad += narrow
            return
        if self.room is None:
            # Kept between steps: getting so much memory anew each time costs as much as filling it.
            self.room = torch.empty_like(self.master)
        self.master.grad = self.room.copy_(narrow)


_POLICIES: WeakKeyDictionary[PreTrainedModel, ReferenceType[Policy]] = WeakKeyDictionary()
"""The policy that was made last of each model."""


def _last_policy_of(model: PreTrainedModel) -> Policy | None:
    known = _POLICIES.get(model)
    return None if known is None else known()


def _release_earlier(model: PreTrainedModel) -> None:
    """End the policy that was made of the model before, where nothing else has.

    In bf16 its hooks would take the gradients away from the next one's.
    """
    earlier = _last_policy_of(model)
    if earlier is not None:
        earlier.release()
    keep_layers(model)  # a policy that is gone left them as they were


def _scatter(values: Float[Tensor, " N"], batch: MicroBatch) -> Float[Tensor, "B T"]:
    table = torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device)
    return table.masked_scatter(batch.mask, values)


def _checked_body(model: PreTrainedModel, warn: Callable[[str], None]) -> LlamaBody | None:
    try:
        body = LlamaBody(model)
    except ModelError as error:
        warn(f"{error}; it runs on the plain path: same results, slower")
        return None
    for what, measure, allowed in (
        ("prompts", extended_difference, LARGEST_LOGIT_DIFFERENCE),
        ("training", scored_difference, LARGEST_OVER_POSITIONS),
    ):
        problem = why_not_alike(what, difference=measure(body), allowed=allowed[model.dtype])
        if problem:
            warn(f"{problem}; it runs on the plain path: same results, slower")
            return None
    return body
