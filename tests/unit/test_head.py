"""The chunked head equals full logits in value and in gradient."""

import contextlib
import math

import pytest
import torch
from tests.live_memory import LiveMemory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gmpo.config import TrainingConfig
from gmpo.kernels.library import kernels_off
from gmpo.policy import head
from gmpo.policy.head import (
    TOKENS_PER_TILE,
    chunked_token_logprobs,
    most_positions_kept,
    token_logprobs,
)

F64 = torch.float64
ROWS_PER_CHUNK = head._ROWS_PER_TILE


def case(rows: int, *, hidden_size: int = 6, vocabulary: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=F64)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, dtype=F64)
    token_ids = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), token_ids


def mixed(logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    """A scalar in which every row has another weight."""
    weights = torch.linspace(-1.0, 2.0, len(logprobs), dtype=logprobs.dtype)
    total = (weights * logprobs).sum()
    return total if entropy is None else total + (weights.flip(0) * entropy).sum()


def test_token_logprobs_by_hand():
    # Logits log(1, 2, 5) give probabilities 1/8, 2/8, 5/8.
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=F64).log()
    chosen, entropy = token_logprobs(logits, torch.tensor([2]))
    assert chosen.item() == pytest.approx(math.log(5 / 8), abs=1e-12)
    by_hand = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert entropy.item() == pytest.approx(by_hand, abs=1e-12)


def test_temperature_divides_the_logits_before_both():
    # At temperature 1/2 the weights are squared: 1, 4, 25 of 30.
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=F64).log()
    chosen, entropy = token_logprobs(logits, torch.tensor([1]), temperature=0.5)
    assert chosen.item() == pytest.approx(math.log(4 / 30), abs=1e-12)
    by_hand = -sum(p * math.log(p) for p in (1 / 30, 4 / 30, 25 / 30))
    assert entropy.item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 5, ROWS_PER_CHUNK, ROWS_PER_CHUNK + 1, 3 * ROWS_PER_CHUNK - 7])
def test_chunks_give_the_values_and_gradients_of_full_logits(
    rows: int, temperature: float, with_entropy: bool
):
    hidden, weight, token_ids = case(rows)
    expected, expected_entropy = token_logprobs(
        hidden @ weight.T, token_ids, temperature=temperature
    )
    logprobs, entropy = chunked_token_logprobs(
        hidden, weight, token_ids, temperature=temperature, with_entropy=with_entropy
    )
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad(
        mixed(expected, expected_entropy if with_entropy else None), (hidden, weight)
    )
    gradients = torch.autograd.grad(mixed(logprobs, entropy), (hidden, weight))
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-11, rtol=1e-10)
    assert (entropy is not None) == with_entropy
    if entropy is not None:
        torch.testing.assert_close(entropy, expected_entropy, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "by torch"])
@pytest.mark.parametrize("kept_tiles", [0, 1, 2])
def test_kept_logits_change_no_bit(
    kept_tiles: int,
    is_compiled: bool,
    with_entropy: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    # Two tiles of the vocabulary, and positions of which none, some or all are kept.
    count, vocabulary = ROWS_PER_CHUNK + 9, TOKENS_PER_TILE + 40
    size = ROWS_PER_CHUNK * vocabulary * dtype.itemsize
    monkeypatch.setattr(head, "_KEPT_BYTES", kept_tiles * size + size // 2)
    assert most_positions_kept(vocabulary, width=dtype.itemsize) == kept_tiles * ROWS_PER_CHUNK
    hidden, weight, token_ids = case(count, hidden_size=16, vocabulary=vocabulary)
    sides = [side.detach().to(dtype).requires_grad_() for side in (hidden, weight)]
    found = []
    with contextlib.nullcontext() if is_compiled else kernels_off():
        for keeps_logits in (True, False):
            logprobs, entropy = chunked_token_logprobs(
                *sides, token_ids, with_entropy=with_entropy, keeps_logits=keeps_logits
            )
            total = mixed(logprobs, entropy)
            once = torch.autograd.grad(total, sides, retain_graph=True)
            again = torch.autograd.grad(total, sides)
            found += [(logprobs.detach(), *once), (logprobs.detach(), *again)]
    for other in found[1:]:
        for gradient, wanted in zip(other, found[0], strict=True):
            assert torch.equal(gradient, wanted)


def test_logits_are_formed_again_only_where_they_were_not_kept(monkeypatch: pytest.MonkeyPatch):
    vocabulary, hidden_size = 50, 6
    monkeypatch.setattr(head, "_KEPT_BYTES", ROWS_PER_CHUNK * vocabulary * 8)

    def products(rows: int, *, keeps_logits: bool, frozen: str | None = None) -> float:
        """Of positions, hidden size and vocabulary, going forward and backward."""
        hidden, weight, token_ids = case(rows, hidden_size=hidden_size, vocabulary=vocabulary)
        if frozen:
            {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            chunked_token_logprobs(hidden, weight, token_ids, keeps_logits=keeps_logits)[
                0
            ].sum().backward()
        counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
        return counted["aten.mm"] / (2 * hidden_size * vocabulary)

    rows = ROWS_PER_CHUNK + 9
    # Logits and the hidden states' gradient; the head's own is added up by another operation.
    assert products(ROWS_PER_CHUNK, keeps_logits=True) == 2 * ROWS_PER_CHUNK
    assert products(rows, keeps_logits=True) == 2 * rows + 9
    assert products(rows, keeps_logits=False) == 3 * rows
    # A frozen head beside adapters; and only the head trained, whose gradient is not counted here.
    assert products(ROWS_PER_CHUNK, keeps_logits=True, frozen="weight") == 2 * ROWS_PER_CHUNK
    assert products(ROWS_PER_CHUNK, keeps_logits=True, frozen="hidden") == ROWS_PER_CHUNK


def test_512_mib_hold_all_logits_of_a_micro_batch_of_the_default_model():
    assert most_positions_kept(49152, width=4) == 2560
    assert most_positions_kept(49152, width=2) == 5120
    assert TrainingConfig.model_fields["max_tokens_per_micro_batch"].default == 2560
    # Of the largest vocabularies one tile of positions, then none.
    assert most_positions_kept(2**18, width=4) == ROWS_PER_CHUNK
    assert most_positions_kept(2**18 + 1, width=4) == 0


def test_no_logits_are_held_without_gradient():
    hidden, weight, token_ids = case(64, vocabulary=4 * TOKENS_PER_TILE)
    tile = 64 * TOKENS_PER_TILE * 8
    with LiveMemory() as memory, torch.no_grad():
        chunked_token_logprobs(hidden, weight, token_ids)
    assert memory.peak_bytes < 3 * tile
    with LiveMemory() as memory:
        chunked_token_logprobs(hidden, weight, token_ids)
    assert memory.peak_bytes > 4 * tile


def test_a_second_derivative_is_refused():
    hidden, weight, token_ids = case(4)
    logprobs, _ = chunked_token_logprobs(hidden, weight, token_ids)
    (slope,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_gradients_agree_with_finite_differences():
    hidden, weight, token_ids = case(4, hidden_size=3, vocabulary=5)

    def scores(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = chunked_token_logprobs(
            hidden, weight, token_ids, temperature=0.8, with_entropy=True
        )
        assert entropy is not None
        return logprobs, entropy

    assert torch.autograd.gradcheck(scores, (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_is_unchanged(frozen: str):
    hidden, weight, token_ids = case(7)
    both = torch.autograd.grad(
        mixed(*chunked_token_logprobs(hidden, weight, token_ids)), (hidden, weight)
    )
    sides = {"hidden": hidden, "weight": weight}
    sides[frozen].requires_grad_(False)
    mixed(*chunked_token_logprobs(hidden, weight, token_ids)).backward()
    live = "weight" if frozen == "hidden" else "hidden"
    assert sides[frozen].grad is None
    assert sides[live].grad is not None
    assert torch.equal(sides[live].grad, both[0 if live == "hidden" else 1])


def test_only_the_entropys_gradient_can_be_asked_for():
    hidden, weight, token_ids = case(9)
    _, expected = token_logprobs(hidden @ weight.T, token_ids)
    _, entropy = chunked_token_logprobs(hidden, weight, token_ids, with_entropy=True)
    assert entropy is not None
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    for gradient, other in zip(
        torch.autograd.grad(entropy.sum(), (hidden, weight)), wanted, strict=True
    ):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=1e-12)


def test_no_graph_is_kept_where_no_gradient_is_needed():
    hidden, weight, token_ids = case(6)
    with torch.no_grad():
        logprobs, _ = chunked_token_logprobs(hidden, weight, token_ids)
    assert not logprobs.requires_grad
    frozen, _ = chunked_token_logprobs(hidden.detach(), weight.detach(), token_ids)
    assert not frozen.requires_grad
    assert frozen.grad_fn is None


def test_values_with_and_without_a_graph_are_bitwise_equal():
    hidden, weight, token_ids = case(ROWS_PER_CHUNK + 9)
    with_graph, _ = chunked_token_logprobs(hidden, weight, token_ids)
    with torch.no_grad():
        without, _ = chunked_token_logprobs(hidden, weight, token_ids)
    assert torch.equal(with_graph, without)


def test_bf16_hidden_states_are_scored_from_fp32_logits():
    hidden, weight, token_ids = case(8)
    narrow_hidden = hidden.detach().bfloat16().requires_grad_()
    narrow_weight = weight.detach().bfloat16().requires_grad_()
    logprobs, _ = chunked_token_logprobs(narrow_hidden, narrow_weight, token_ids)
    assert logprobs.dtype == torch.float32
    logits = narrow_hidden.detach() @ narrow_weight.detach().T
    expected, _ = token_logprobs(logits, token_ids)
    torch.testing.assert_close(logprobs.detach(), expected)
    logprobs.sum().backward()
    assert narrow_hidden.grad is not None and narrow_hidden.grad.dtype == torch.bfloat16
    assert narrow_weight.grad is not None and narrow_weight.grad.dtype == torch.bfloat16


def test_no_positions_give_no_scores_and_zero_gradients():
    hidden, weight, _ = case(3)
    logprobs, _ = chunked_token_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
