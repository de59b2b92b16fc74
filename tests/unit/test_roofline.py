"""The roofline's arguments, rounds, counts and tables; a whole run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import flops, peaks, roofline, shapes, workloads
from benchmarks.roofline_report import BY_TORCH, DECODE_BY_TORCH, count_ratios, counted_table
from benchmarks.shapes import Round, Workload, counts, layout_of, prefills_of, steps_of
from tests.models import save_tiny, tiny_model

TINY = Workload(name="short", num_prompts=4, group_size=2, max_tokens=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cycles", "0"], "--cycles 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must lie in 1 to"),
        (["--dtype", "fp16"], "choose from"),
        (["--workload", "long"], "choose from"),
    ],
)
def test_a_wrong_argument_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        roofline.parsed(arguments)
    assert message in capsys.readouterr().err


def test_a_model_without_the_fast_path_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="give a Llama-family model"):
        roofline.prepared(save_tiny(tmp_path, "gpt2"), "fp32", [])


def test_dead_groups_are_left_out_of_gmpos_count_and_not_of_trls():
    model = flops.model_of(tiny_model().config)
    one = Round(prompts=((5, 6, 7, 8, 9, 10),) * 4, completions=((3, 3),) * 4)
    alive = counts(model, one, live=[True] * 4)
    half = counts(model, one, live=[True, True, False, False])
    assert half["gmpo"]["gradients"] * 2 == alive["gmpo"]["gradients"]
    assert half["gmpo"]["rollouts"] == alive["gmpo"]["rollouts"]
    assert half["trl"] == alive["trl"]
    # Six rows wide and padded alike: 8 rows of 6 + 3 tokens.
    assert alive["trl"]["gradients"] == flops.trl_gradient(model, rows=8, width=9)


def test_a_round_is_cut_into_the_steps_that_gmpo_takes():
    one = Round(prompts=((5, 6, 7), (8, 9)), completions=((3, 1), (2, 2)))
    first, second = steps_of(
        one, vocabulary=101, shares_prompts=True, live=[True, True], steps_per_round=2
    )
    (batch,) = first.micro_batches
    # 3 prompt tokens, and all but the last of 3 and 1
    assert layout_of(batch) == flops.Layout(
        tokens=5, prompts=1, prompt_width=3, shared=0, rows=2, completion_width=3, counted=4
    )
    assert second.num_rollouts == 2


def test_prompts_are_prefilled_together_up_to_the_budget():
    long = [tuple(range(5, 905)), tuple(range(5, 805)), tuple(range(5, 705))]
    assert prefills_of(long) == [([900, 800], 799), ([700], 0)]


def test_ratios_are_trls_operations_over_gmpos():
    gmpo = {"rollouts": 10, "old_logprobs": 5, "gradients": 15, "round": 30}
    trl = {"rollouts": 20, "old_logprobs": 30, "gradients": 50, "round": 100}
    assert count_ratios(gmpo, trl) == {"rollouts": 2, "update": 4, "round": 100 / 30}


def test_the_table_has_both_ratios_with_and_without_gmpos_pass_over_old_log_probabilities():
    one = {
        "lengths": "as sampled",
        "live_groups": 2,
        "groups": 8,
        "gmpo": {"rollouts": 10, "old_logprobs": 5, "gradients": 15, "round": 30},
        "gmpo_trusting_sampler": {"round": 25},
        "trl": {"rollouts": 20, "old_logprobs": 30, "gradients": 45, "round": 95},
    }
    _, _, row = counted_table({"short": {"rounds": [one]}}).splitlines()[-3:]
    # Rollouts 20/10, update 75/20 and round 95/30; in fp32 75/15 and 95/25.
    assert row.endswith("| 2.00 | 3.75 | 3.17 | 5.00 | 3.80 |")


def test_a_run_reports_peaks_bounds_parts_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(peaks, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(peaks, "SQUARES", (32,))
    monkeypatch.setattr(peaks, "COPY_BYTES", (2**20,))
    monkeypatch.setattr(roofline, "WORKLOADS", {"short": TINY})
    threads = torch.get_num_threads()
    file = tmp_path / "roofline.json"
    model = save_tiny(tmp_path / "model")
    arguments = ["--model", model, "--dtype", "fp32", "--cycles", "2", "--threads", "1"]
    try:
        assert roofline.main([*arguments, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(file.read_text())
    decode, update = report["decode"], report["updates"]["short"]
    shares = [cycle["decode"] for cycle in report["cycles"]]
    assert decode["seconds"]["min"] == min(shares) and len(shares) == 2
    assert 0 < decode["share"]["median"] < 1
    assert sum(part["share"] for part in decode["parts"].values()) == pytest.approx(1)
    # Attention is a compiled function, where there are any, and those are no part of their own.
    assert {"projections", "head", "drawing"} <= decode["parts"].keys()
    assert decode[DECODE_BY_TORCH]["seconds"]["min"] > 0
    pieces = update["pieces"]
    assert "optimizer" in pieces["optimizer"]["parts"]
    assert pieces["gradient"]["operations"] > 0 == pieces["optimizer"]["operations"]
    rounds = report["counted"]["short"]["rounds"]
    assert [(one["lengths"], one["live_groups"]) for one in rounds] == [
        ("full length", 4),
        ("full length", 1),
        ("as sampled", 4),
        ("as sampled", 1),
    ]
    assert update[BY_TORCH]["seconds"]["min"] > 0
    shown = capsys.readouterr().out
    assert f"| {DECODE_BY_TORCH} |" in shown
    assert "| share of the bound |" in shown and f"| update, short: {BY_TORCH} |" in shown


def test_the_counted_rounds_are_those_that_are_timed_against_trl():
    assert shapes.WORKLOADS.keys() == workloads.WORKLOADS.keys()
    for name, counted in shapes.WORKLOADS.items():
        timed = workloads.WORKLOADS[name]
        sizes = (timed.prompts_per_round, timed.group_size, timed.max_new_tokens)
        assert (counted.num_prompts, counted.group_size, counted.max_tokens) == sizes
