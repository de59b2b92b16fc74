"""The policy: a causal language model whose given tokens are scored and whose weights move.

Dimensions: **B** sequences, **T** completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmpo.batch import MicroBatch
from gmpo.errors import ModelError
from gmpo.policy.head import chunked_token_logprobs, token_logprobs
from gmpo.policy.llama import LlamaBody
from gmpo.policy.prefix import largest_logit_difference, scored_hidden_states
from gmpo.policy.weights import copy_weights

__all__ = ["Policy", "TokenScores"]

_LARGEST_LOGIT_DIFFERENCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Start-up check of the fast path, as a fraction of the logits' spread."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of each completion token in nats; 0 off the mask. Entropy only where asked for."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None


class Policy:
    """pi_theta: scores tokens, holds fp32 master weights, hands out named weights.

    With `engine="fast"` a Llama-family model is scored with shared prompts and a chunked head,
    after a check against the module's own logits; every other model takes the plain path, and
    `warn` is told why.

    Args:
        model: a decoder-only causal language model, on its device and in its compute precision.
        engine: "fast" or "plain".
        warn: called with one sentence if the fast path does not cover the model.
    """

    def __init__(
        self, model: PreTrainedModel, *, engine: str = "fast", warn: Callable[[str], None] = print
    ) -> None:
        self.model = model.eval()  # dropout would make scored and sampled policy differ
        self.body = _checked_body(model, warn) if engine == "fast" else None
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            self.masters[name] = _master_of(parameter)

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
            )
        return TokenScores(
            logprobs=_scatter(logprobs, batch),
            entropy=_scatter(entropy, batch) if with_entropy and entropy is not None else None,
        )

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full fp32 tensors by name; the only way weights reach a sampler or a checkpoint."""
        for name, master in self.masters.items():
            yield name, master.detach()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights.

        Raises:
            ModelError: names or shapes are not exactly this model's.
        """
        copy_weights(self.masters, named_tensors)
        self.publish_masters()

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Round the master weights into the compute weights after they moved."""
        for name, parameter in self.model.named_parameters():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

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
        logits = self.model(token_ids, attention_mask=attention_mask).logits
        scored = logits.flatten(0, 1)[torch.cat(predictors)]
        return token_logprobs(scored, torch.cat(tokens), temperature=temperature)


def _scatter(values: Float[Tensor, " N"], batch: MicroBatch) -> Float[Tensor, "B T"]:
    table = torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device)
    return table.masked_scatter(batch.mask, values)


def _master_of(parameter: nn.Parameter) -> nn.Parameter:
    """The fp32 weight the optimizer moves: the parameter itself unless it is narrower."""
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    master = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)

    def widen_gradient(narrow: Tensor) -> None:
        # Micro-batches add up in fp32: bf16 would lose a small one beside a large sum.
        assert narrow.grad is not None
        if master.grad is None:
            master.grad = narrow.grad.float()
        else:
            master.grad += narrow.grad
        narrow.grad = None

    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(widen_gradient)
    return master


def _checked_body(model: PreTrainedModel, warn: Callable[[str], None]) -> LlamaBody | None:
    try:
        body = LlamaBody(model)
    except ModelError as error:
        warn(f"{error}; it runs on the plain path: same results, slower")
        return None
    difference = largest_logit_difference(body)
    allowed = _LARGEST_LOGIT_DIFFERENCE[model.dtype]
    if not difference <= allowed:
        warn(
            f"the fast path's logits differ from the model's own by {difference:.2g} of their "
            f"spread (allowed {allowed:g}); it runs on the plain path: same results, slower"
        )
        return None
    return body
