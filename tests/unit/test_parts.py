"""The parts of a profile, the bound, and spreads of repeated measurements."""

from __future__ import annotations

import pytest
import torch
from benchmarks.flops import model_of
from benchmarks.parts import (
    OVERHEAD,
    Operator,
    Profile,
    panels_named,
    part_of,
    profiled,
    shares,
)
from benchmarks.peaks import bound_seconds, copy_rates, fastest, product_rates, products
from benchmarks.spread import Spread, paired_ratios, spread
from tests.models import tiny_model

from gmpo.kernels.linear import has_panels
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.prepared import PreparedBody, prepare_body

VOCABULARY = 49152


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("mm", [(64, 576), (576, 1536)], "projections"),
        ("addmm_", [(VOCABULARY, 576), (VOCABULARY, 256), (256, 576)], "head"),
        ("mm", [(64, 576), (576, VOCABULARY)], "head"),
        ("_scaled_dot_product_flash_attention_for_cpu", [(64, 3, 3, 64)], "attention"),
        ("index_put_", [(64, 3, 128, 64)], "attention"),
        ("_fused_adamw_", [], "optimizer"),
        ("_foreach_norm", [], "optimizer"),
        ("exp", [(64, VOCABULARY)], "drawing"),
        ("cumsum", [(64, 192)], "drawing"),
        ("embedding", [(VOCABULARY, 576), (64, 1)], "norms and elementwise"),
        ("mul", [(64, 1, 576)], "norms and elementwise"),
    ],
)
def test_an_operator_belongs_to_a_part(name: str, shapes: list[tuple[int, ...]], part: str):
    operator = Operator(name=name, shapes=tuple(shapes), seconds=1.0)
    assert part_of(operator, vocabulary=VOCABULARY, draws=True) == part


def test_passes_over_the_vocabulary_are_drawing_only_where_tokens_are_drawn():
    operator = Operator(name="exp", shapes=((64, VOCABULARY),), seconds=1.0)
    assert part_of(operator, vocabulary=VOCABULARY, draws=False) == "softmax over the vocabulary"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_Attend", "attention"),
        ("_AttendBackward", "attention"),
        ("_ChunkedTokenLogprobsBackward", "softmax over the vocabulary"),
        ("_FeedForwardBackward", "norms and elementwise"),
    ],
)
def test_a_pass_of_our_own_belongs_to_what_its_compiled_functions_do(name: str, part: str):
    operator = Operator(name=name, shapes=((16, 32),), seconds=1.0)
    assert part_of(operator, vocabulary=VOCABULARY, draws=False) == part


@pytest.mark.skipif(not has_panels(torch.empty(0)), reason="there are no compiled functions")
def test_products_over_panels_are_told_by_name():
    body = LlamaBody(tiny_model(dtype=torch.float32))
    vocabulary = body.head_weight.shape[0]
    with panels_named(vocabulary):
        named = prepare_body(body)
    unnamed = prepare_body(body)
    inputs = torch.randn(3, body.head_weight.shape[1])

    def parts(of: PreparedBody) -> list[str]:
        profile = profiled(lambda: [of.head(inputs), of.layers[0].output(inputs)])
        found = [part_of(one, vocabulary=vocabulary, draws=True) for one in profile.operators]
        return sorted({"head", "projections"} & set(found))

    assert parts(named) == ["head", "projections"]
    assert parts(unnamed) == []


def test_what_operators_do_not_account_for_is_overhead():
    operators = (
        Operator(name="mm", shapes=((2, 3), (3, 4)), seconds=1.0),
        Operator(name="mm", shapes=((2, 3), (3, 7)), seconds=0.5),
        Operator(name="mul", shapes=((2, 3),), seconds=2.0),
    )
    # The profiled run was half as fast as those that were timed: its own time decides the shares.
    profile = Profile(operators=operators, seconds=4.0)
    parts = shares(profile, seconds=2.0, vocabulary=7, draws=True)
    assert parts == {
        "projections": {"seconds": 0.5, "share": 0.25},
        "head": {"seconds": 0.25, "share": 0.125},
        "norms and elementwise": {"seconds": 1.0, "share": 0.5},
        OVERHEAD: {"seconds": 0.25, "share": 0.125},
    }


def test_a_profile_names_the_operators_with_their_sizes():
    left, right = torch.ones(3, 5), torch.ones(5, 11)
    profile = profiled(lambda: left @ right)
    (product,) = [one for one in profile.operators if one.name == "mm"]
    assert product.shapes == ((3, 5), (5, 11))
    assert 0 < product.seconds < profile.seconds


def test_the_bound_is_the_slower_of_products_and_copying():
    # 100 operations at 50 a second take 2 s, 30 bytes at 10 a second 3 s.
    assert bound_seconds(operations=100, traffic=30, peak_operations=50, peak_traffic=10) == 3
    assert bound_seconds(operations=200, traffic=30, peak_operations=50, peak_traffic=10) == 4


def test_the_fastest_of_at_least_three_calls_counts():
    calls = []
    assert fastest(lambda: calls.append(1), for_seconds=0.0) >= 0
    assert len(calls) == 1 + 3


def test_peaks_are_measured_for_the_models_own_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.peaks.SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.peaks.COPY_BYTES", (2**20,))
    wanted = products(model_of(tiny_model().config), decoded_rows=4, scored_rows=8)
    by_name = {one.name: one for one in wanted}
    assert by_name["up 4 rows"].operations == 2 * 4 * 32 * 48
    assert by_name["head 4 rows"].operations == 2 * 4 * 32 * 101
    small = [one for one in wanted if "rows" in one.name]
    rates = product_rates(small, torch.float32)
    assert rates.keys() == {one.name for one in small}
    assert all(rate > 0 for rate in (*rates.values(), *copy_rates().values()))


def test_a_spread_by_hand():
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, min=1.0, max=3.0)
    assert spread([3.0, 1.0, 2.0]).as_dict() == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert Spread(median=1234.6, min=0.01234, max=0.0).text() == "1235 (0.0123 to 0.00)"


def test_ratios_are_taken_pair_by_pair():
    # The machine was half as fast during the second pair; the ratio does not see it.
    assert paired_ratios([10.0, 5.0], [4.0, 2.0]) == [2.5, 2.5]
    with pytest.raises(ValueError, match="longer"):
        paired_ratios([1.0], [1.0, 2.0])
