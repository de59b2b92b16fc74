"""The two estimators of KL(p || q) from tokens drawn from p."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.objective import kl_k1, kl_k3

F64 = torch.float64
logprobs = st.floats(min_value=-8.0, max_value=0.0)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=F64)


def test_k1_is_log_p_minus_log_q():
    # log 0.5 - log 0.25 = log 2; log 0.25 - log 0.5 = -log 2
    k1 = kl_k1(
        p_logprobs=row(math.log(0.5), math.log(0.25)), q_logprobs=row(math.log(0.25), math.log(0.5))
    )
    torch.testing.assert_close(k1, row(math.log(2), -math.log(2)))


def test_k3_is_the_ratio_minus_one_minus_its_logarithm():
    # q/p = 1/2: 0.5 - 1 + 0.693147 = 0.193147; q/p = 2: 2 - 1 - 0.693147 = 0.306853
    k3 = kl_k3(
        p_logprobs=row(math.log(0.5), math.log(0.25)), q_logprobs=row(math.log(0.25), math.log(0.5))
    )
    torch.testing.assert_close(k3, row(math.log(2) - 0.5, 1 - math.log(2)))


def test_both_are_zero_where_the_policies_agree():
    same = row(-0.1, -3.0)
    assert kl_k1(p_logprobs=same, q_logprobs=same).tolist() == [[0.0, 0.0]]
    assert kl_k3(p_logprobs=same, q_logprobs=same).tolist() == [[0.0, 0.0]]


@given(p=logprobs, q=logprobs)
@settings(max_examples=50)
def test_k3_is_never_negative(p, q):
    assert kl_k3(p_logprobs=row(p), q_logprobs=row(q)).item() >= 0.0


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_the_mean_under_p_is_the_kl_divergence(estimator):
    p, q = row(0.5, 0.3, 0.2), row(0.2, 0.2, 0.6)
    # KL(p || q) = 0.5 log 2.5 + 0.3 log 1.5 + 0.2 log(1/3) = 0.458145 + 0.121640 - 0.219722
    #            = 0.360062, and KL(q || p) = 0.394816, so a swap shows.
    expected = (p * torch.log(p / q)).sum()
    torch.testing.assert_close(expected, torch.tensor(0.360062, dtype=F64), atol=1e-6, rtol=0)
    mean = (p * estimator(p_logprobs=p.log(), q_logprobs=q.log())).sum()
    torch.testing.assert_close(mean, expected)


def test_k3_keeps_its_digits_where_the_policies_almost_agree():
    # x^2 / 2 for x = 1e-3 is 5e-7; exp(x) - 1 - x in float32 would keep no digit of it.
    k3 = kl_k3(p_logprobs=torch.tensor([[-1e-3]]), q_logprobs=torch.tensor([[0.0]]))
    torch.testing.assert_close(k3.item(), 5.0e-7, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_mismatching_shapes_are_refused(estimator):
    with pytest.raises(jaxtyping.TypeCheckError):
        estimator(p_logprobs=torch.zeros(2, 3), q_logprobs=torch.zeros(2, 1))
