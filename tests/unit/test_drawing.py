"""Tokens drawn through the inverse CDF: by hand, against an obvious reference, and in frequency."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from gmpo.errors import NonFiniteError
from gmpo.sampler.drawing import Draw, draw_tokens, truncate_logits

F64 = torch.float64
JUST_BELOW_ONE = 1 - 2**-53  # the largest number that Generator.random can give


def draw(
    logits: Tensor,
    uniforms: list[float],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Draw:
    rows = len(logits)
    return draw_tokens(
        logits,
        uniforms=torch.tensor(uniforms, dtype=F64),
        temperature=torch.full((rows,), temperature, dtype=F64),
        top_p=torch.full((rows,), top_p, dtype=F64),
        top_k=torch.full((rows,), top_k),
    )


def log_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=F64).log()


def random_logits(rows: int, vocabulary: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, vocabulary, generator=generator, dtype=F64)


def obvious_draw(probabilities: np.ndarray, uniform: float) -> int:
    """The first token whose cumulative probability exceeds the uniform."""
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if total > uniform:
            return token
    return int(np.flatnonzero(probabilities)[-1])


def obvious_kept(probabilities: list[float], *, top_p: float, top_k: int) -> set[int]:
    """Token ids that top-k, then top-p on what is left, keep: likeliest first, lower id first."""
    ranked = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    if top_k:
        ranked = ranked[:top_k]
    total = math.fsum(probabilities[token] for token in ranked)
    kept: set[int] = set()
    likelier = 0.0
    for token in ranked:
        if top_p == 1 or likelier < top_p * total:
            kept.add(token)
        likelier += probabilities[token]
    return kept


@pytest.mark.parametrize(
    ("uniform", "token"),
    [
        # CDF of (0.2, 0.5, 0.3): 0.2, 0.7, 1.0
        (0.0, 0),
        (0.19, 0),
        (0.21, 1),
        (0.69, 1),
        (0.71, 2),
        (0.99, 2),
        (JUST_BELOW_ONE, 2),
    ],
)
def test_the_token_is_the_first_whose_cdf_exceeds_the_uniform(uniform: float, token: int):
    result = draw(log_of(0.2, 0.5, 0.3)[None], [uniform])
    assert result.token_ids.tolist() == [token]
    expected = math.log([0.2, 0.5, 0.3][token])
    assert result.logprobs.item() == pytest.approx(expected, abs=1e-12)
    assert result.sampled_logprobs.item() == pytest.approx(expected, abs=1e-12)


def test_adding_a_constant_to_the_logits_changes_nothing():
    logits = random_logits(6, 300)
    uniforms = [0.05, 0.3, 0.5, 0.7, 0.9, 0.99]
    plain, shifted = draw(logits, uniforms), draw(logits + 700.0, uniforms)
    assert torch.equal(plain.token_ids, shifted.token_ids)
    torch.testing.assert_close(plain.logprobs, shifted.logprobs, atol=1e-10, rtol=0)


def test_temperature_zero_takes_the_likeliest_token_whatever_the_uniform():
    logits = random_logits(4, 97)
    for uniform in (0.0, 0.5, JUST_BELOW_ONE):
        result = draw(logits, [uniform] * 4, temperature=0.0)
        assert torch.equal(result.token_ids, logits.argmax(dim=-1))
        assert result.sampled_logprobs.tolist() == [0.0] * 4
        expected = logits.log_softmax(dim=-1).amax(dim=-1)
        torch.testing.assert_close(result.logprobs, expected)


def test_greedy_among_equal_logits_takes_the_lowest_token():
    assert draw(torch.zeros(1, 9, dtype=F64), [0.9], temperature=0.0).token_ids.tolist() == [0]


def test_temperature_divides_the_logits():
    # p = (0.2, 0.8) at temperature 1/2 is proportional to (0.04, 0.64): 1/17 and 16/17.
    logits = log_of(0.2, 0.8)[None]
    below = draw(logits, [1 / 17 - 1e-9], temperature=0.5)
    above = draw(logits, [1 / 17 + 1e-9], temperature=0.5)
    assert (below.token_ids.item(), above.token_ids.item()) == (0, 1)
    assert above.sampled_logprobs.item() == pytest.approx(math.log(16 / 17), abs=1e-12)
    assert above.logprobs.item() == pytest.approx(math.log(0.8), abs=1e-12)


def test_rows_of_one_batch_keep_their_own_settings():
    logits = log_of(0.5, 0.3, 0.2).expand(5, 3).clone()
    result = draw_tokens(
        logits,
        uniforms=torch.tensor([0.9] * 5, dtype=F64),
        temperature=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5], dtype=F64),
        top_p=torch.tensor([1.0, 1.0, 0.6, 1.0, 1.0], dtype=F64),
        top_k=torch.tensor([0, 0, 0, 1, 0]),
    )
    # all; greedy; {0, 1} rescaled to 5/8, 3/8; {0}; squares 25 : 9 : 4 of 38, CDF 0.66, 0.89, 1
    assert result.token_ids.tolist() == [2, 0, 1, 0, 2]
    expected = [math.log(0.2), 0.0, math.log(3 / 8), 0.0, math.log(4 / 38)]
    assert result.sampled_logprobs.tolist() == pytest.approx(expected, abs=1e-12)
    plain = [math.log(p) for p in (0.2, 0.5, 0.3, 0.5, 0.2)]
    assert result.logprobs.tolist() == pytest.approx(plain, abs=1e-12)


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    top_k=st.integers(0, 40),
)
def test_truncation_keeps_the_likeliest_tokens(weights: list[int], top_p: float, top_k: int):
    probabilities = [weight / sum(weights) for weight in weights]
    expected = obvious_kept(probabilities, top_p=top_p, top_k=top_k)
    # A cumulative sum that equals top_p up to rounding may fall either way.
    wider = obvious_kept(probabilities, top_p=min(1.0, top_p * (1 + 1e-9)), top_k=top_k)
    narrower = obvious_kept(probabilities, top_p=top_p * (1 - 1e-9), top_k=top_k)
    assume(top_p == 1.0 or wider == narrower)
    logits = log_of(*probabilities)[None]
    truncated = truncate_logits(
        logits, top_p=torch.tensor([top_p], dtype=F64), top_k=torch.tensor([top_k])
    )
    kept = torch.nonzero(truncated[0].isfinite())[:, 0]
    assert set(kept.tolist()) == expected
    assert torch.equal(truncated[0, kept], logits[0, kept])


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_a_set_that_reaches_top_p_exactly_is_large_enough(top_p: float, kept: int):
    # Four equal tokens have exactly 1/4 each; the lower ids stay.
    truncated = truncate_logits(
        torch.zeros(1, 4, dtype=F64),
        top_p=torch.tensor([top_p], dtype=F64),
        top_k=torch.tensor([0]),
    )
    assert truncated[0].isfinite().tolist() == [token < kept for token in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_smallest_top_p_keeps_the_likeliest_token(dtype: torch.dtype):
    # 5e-324 is above 0, and rounds to it in fp32.
    logits = random_logits(3, 50).to(dtype)
    result = draw(logits, [0.0, 0.5, JUST_BELOW_ONE], top_p=5e-324)
    assert torch.equal(result.token_ids, logits.argmax(dim=-1))
    assert result.sampled_logprobs.tolist() == [0.0] * 3


@given(
    seed=st.integers(0, 2**20),
    vocabulary=st.sampled_from([1, 2, 255, 256, 257, 600, 1024]),
    uniform=st.floats(0, JUST_BELOW_ONE),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 5000]),
)
def test_a_draw_is_the_obvious_one_from_the_truncated_distribution(
    seed: int, vocabulary: int, uniform: float, temperature: float, top_p: float, top_k: int
):
    logits = random_logits(1, vocabulary, seed=seed)
    result = draw(logits, [uniform], temperature=temperature, top_p=top_p, top_k=top_k)
    token = int(result.token_ids)
    probabilities = (logits[0] / temperature).softmax(dim=-1).numpy()
    kept = sorted(obvious_kept(probabilities.tolist(), top_p=top_p, top_k=top_k))
    truncated = np.zeros(vocabulary)
    truncated[kept] = probabilities[kept] / probabilities[kept].sum()
    # The uniform may lie within rounding of a step of the CDF.
    near = {obvious_draw(truncated, uniform + shift) for shift in (-1e-12, 0.0, 1e-12)}
    assert token in near
    assert result.sampled_logprobs.item() == pytest.approx(math.log(truncated[token]), abs=1e-10)
    expected = logits[0].log_softmax(dim=-1)[token].item()
    assert result.logprobs.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 511, 513])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_uniforms_limits_draw_the_first_and_the_last_possible_token(
    vocabulary: int, dtype: torch.dtype
):
    # The first and last 20 tokens are impossible, so neither end of the range may be drawn.
    logits = random_logits(1, vocabulary).to(dtype)
    logits[:, :20] = logits[:, -20:] = -torch.inf
    lowest, highest = draw(logits, [0.0]), draw(logits, [JUST_BELOW_ONE])
    assert lowest.token_ids.item() == 20
    assert logits[0, highest.token_ids.item()].isfinite()
    if dtype == F64:
        assert highest.token_ids.item() == vocabulary - 21


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_impossible_token_is_never_drawn(dtype: torch.dtype):
    logits = random_logits(1, 700).to(dtype)
    logits[0, torch.arange(700) % 7 != 3] = -torch.inf
    uniforms = [*np.random.default_rng(0).random(2000).tolist(), 0.0, JUST_BELOW_ONE]
    for top_k in (0, 650):
        result = draw(logits.expand(len(uniforms), -1), uniforms, top_k=top_k)
        assert bool((result.token_ids % 7 == 3).all())
        assert bool(result.sampled_logprobs.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused_with_their_number(value: float, temperature: float):
    logits = random_logits(3, 50)
    logits[1, 7] = value
    with pytest.raises(NonFiniteError, match="logits are not finite for 1 of 3 completions"):
        draw(logits, [0.1, 0.5, 0.9], temperature=temperature)


def test_one_token_that_takes_all_weight_is_always_drawn():
    logits = torch.zeros(1, 300, dtype=torch.float32)
    logits[0, 271] = 200.0
    for uniform in (0.0, 0.5, JUST_BELOW_ONE):
        assert draw(logits, [uniform]).token_ids.item() == 271


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.8, 0), (1.3, 0.9, 12)]
)
def test_frequencies_of_many_draws_match_the_distribution(
    temperature: float, top_p: float, top_k: int
):
    num_draws = 8_000
    logits = random_logits(1, 300, seed=3, spread=1.5)
    uniforms = np.random.default_rng(5).random(num_draws).tolist()
    result = draw(
        logits.expand(num_draws, -1), uniforms, temperature=temperature, top_p=top_p, top_k=top_k
    )
    counts = np.bincount(result.token_ids.numpy(), minlength=300)
    probabilities = (logits[0] / temperature).softmax(dim=-1).numpy()
    kept = sorted(obvious_kept(probabilities.tolist(), top_p=top_p, top_k=top_k))
    assert counts.sum() == counts[kept].sum()
    expected = probabilities[kept] / probabilities[kept].sum() * num_draws
    # Cells below 5 expected draws are joined, as the test asks for.
    common = expected >= 5
    observed_cells = [*counts[kept][common], counts[kept][~common].sum()]
    expected_cells = [*expected[common], expected[~common].sum()]
    if expected_cells[-1] == 0:
        observed_cells, expected_cells = observed_cells[:-1], expected_cells[:-1]
    assert stats.chisquare(observed_cells, expected_cells).pvalue > 0.001


def test_in_fp64_a_rows_draw_does_not_depend_on_the_rows_beside_it():
    logits = random_logits(16, 777)
    uniforms = np.random.default_rng(1).random(16).tolist()
    together = draw(logits, uniforms)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    shuffled = draw(logits[order], [uniforms[row] for row in order.tolist()])
    for row in range(16):
        alone = draw(logits[row : row + 1], [uniforms[row]])
        assert alone.token_ids.item() == together.token_ids[row].item()
        assert alone.logprobs.item() == pytest.approx(together.logprobs[row].item(), abs=1e-12)
    assert torch.equal(shuffled.token_ids, together.token_ids[order])


def test_a_neighbour_with_a_truncated_distribution_does_not_change_a_plain_rows_draw():
    logits = random_logits(1, 300)
    alone = draw(logits, [0.4])
    beside = draw_tokens(
        logits.expand(2, -1),
        uniforms=torch.tensor([0.4, 0.4], dtype=F64),
        temperature=torch.tensor([1.0, 0.6], dtype=F64),
        top_p=torch.tensor([1.0, 0.5], dtype=F64),
        top_k=torch.tensor([0, 3]),
    )
    assert beside.token_ids[0] == alone.token_ids[0]
    torch.testing.assert_close(beside.sampled_logprobs[0], alone.sampled_logprobs[0])
