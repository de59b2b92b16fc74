"""Linear layers over panels: torch's own results, row by row, whatever runs beside."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmpo.kernels import library
from gmpo.kernels.library import kernels_off
from gmpo.kernels.linear import has_panels, panel_linear

pytestmark = pytest.mark.skipif(
    not has_panels(torch.empty(0)), reason="there are no compiled functions"
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(rows: int, outputs: int, size: int, *, with_bias: bool) -> None:
    inputs, weight = torch.randn(rows, size), torch.randn(outputs, size)
    bias = torch.randn(outputs) if with_bias else None
    expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    results = panel_linear(weight, bias)(inputs)
    assert results.shape == (rows, outputs) and results.dtype == torch.float32
    # A sum of n products of normal numbers is about sqrt(n); n additions round it to 24 bits each.
    close = max(2e-6 * size**0.5, 1e-7 * size)
    torch.testing.assert_close(results.double(), expected, rtol=close, atol=close)


def test_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    linear = panel_linear(weight, torch.tensor([0.5, 0.0, -1.0]))
    results = linear(torch.tensor([[1.0, 0.0], [10.0, 1.0]]))
    assert results.tolist() == [[1.5, 3.0, 4.0], [12.5, 34.0, 55.0]]


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 11, 12, 13, 64, 65])
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 31, 32, 33, 96, 101])
def test_every_row_and_output_is_the_products(rows: int, outputs: int):
    torch.manual_seed(rows * outputs)
    check(rows, outputs, 40, with_bias=True)


@pytest.mark.parametrize("size", [2047, 2048, 2049, 4097])
def test_more_inputs_than_pass_at_once(size: int):
    torch.manual_seed(size)
    check(13, 33, size, with_bias=True)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80), st.integers(1, 200), st.integers(1, 300), st.booleans(), st.integers(0, 99)
)
def test_any_shape(rows: int, outputs: int, size: int, with_bias: bool, seed: int):
    torch.manual_seed(seed)
    check(rows, outputs, size, with_bias=with_bias)


def test_a_row_depends_neither_on_others_nor_on_threads():
    torch.manual_seed(0)
    # Large enough that several threads take part, and more inputs than pass at once.
    linear, inputs = panel_linear(torch.randn(101, 2500), None), torch.randn(64, 2500)
    together = linear(inputs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(linear(inputs), together)
    for first, last in ((0, 1), (3, 10), (20, 64)):
        assert torch.equal(linear(inputs[first:last]), together[first:last])


def test_what_is_no_number_stays_in_its_row_and_output():
    torch.manual_seed(2)
    weight, inputs = torch.randn(40, 24), torch.randn(9, 24)
    weight[7], inputs[2] = torch.nan, torch.inf
    results = panel_linear(weight, None)(inputs)
    broken = ~results.isfinite()
    expected = torch.zeros(9, 40, dtype=torch.bool)
    expected[2], expected[:, 7] = True, True
    assert torch.equal(broken, expected)


def test_what_lies_turned_or_apart_is_read_as_it_is():
    torch.manual_seed(1)
    weight, inputs = torch.randn(24, 40).t(), torch.randn(24, 18).t()[::2]
    expected = inputs @ weight.T
    torch.testing.assert_close(panel_linear(weight, None)(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "inputs",
    [torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 3), torch.ones(2, 2, 4), torch.ones(4)],
)
def test_what_are_not_its_inputs_is_refused(inputs: torch.Tensor):
    with pytest.raises(AssertionError, match="not its inputs"):
        panel_linear(torch.ones(3, 4), None)(inputs)


def test_without_inputs_the_bias_is_left():
    linear = panel_linear(torch.empty(3, 0), torch.tensor([1.0, 2.0, 3.0]))
    assert linear(torch.empty(2, 0)).tolist() == [[1.0, 2.0, 3.0]] * 2


@pytest.mark.parametrize("flags", [library._ATTEMPTS[2], library._ATTEMPTS[3]])
def test_functions_for_one_thread_or_without_avx2_have_no_panels(flags: tuple[str, ...]):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler is not None
    number = ctypes.c_int64(-1)
    made = ctypes.CDLL(str(library._object_for(compiler, flags)))
    made.panel_outputs_float(ctypes.byref(number))
    assert number.value == 0


def test_no_rows():
    assert panel_linear(torch.randn(33, 8), None)(torch.empty(0, 8)).shape == (0, 33)


def test_the_weight_is_copied():
    weight, inputs = torch.ones(3, 2), torch.ones(1, 2)
    linear = panel_linear(weight, None)
    weight.fill_(7.0)
    assert linear(inputs).tolist() == [[2.0, 2.0, 2.0]]


def test_other_precisions_and_runs_without_a_compiler_are_not_covered():
    assert not has_panels(torch.empty(0, dtype=torch.float64))
    assert not has_panels(torch.empty(0, dtype=torch.bfloat16))
    with kernels_off():
        assert not has_panels(torch.empty(0))
