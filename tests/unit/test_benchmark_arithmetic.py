"""What a comparison with TRL makes of its samples, and when it refuses to."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import circumstances, live_shares
from benchmarks.circumstances import processor
from benchmarks.exchange import GRADIENT_STRIDE, SampledRows, gradient_sample
from benchmarks.ratios import (
    BF16_BOUNDS,
    FP32_BOUNDS,
    PEAKS,
    STAGES,
    UpdatesDiffer,
    bounds_of,
    complaint,
    is_left_to_fp32,
    ratios_of,
    require_same_update,
    summary,
)
from benchmarks.report import draw, print_table
from benchmarks.results import OtherBenchmark, Results, differences
from benchmarks.workloads import WORKLOADS, patterned_rewards, prompts_of
from rich.console import Console


def pair(*, trl_round: float, gmpo_round: float, replay: float = 2.0) -> dict[str, Any]:
    """TRL draws 100 tokens in 4 s and updates in 30 s, gmpo draws 120 in 2 s."""
    return {
        "trl": {
            "round_seconds": trl_round,
            "rollout_seconds": 4.0,
            "update_seconds": 30.0,
            "tokens": 100,
            "peak_gib": 4.0,
            "live_share": 0.5,
        },
        "gmpo": {
            "round_seconds": gmpo_round,
            "rollout_seconds": 2.0,
            "update_seconds": 99.0,
            "tokens": 120,
            "peak_gib": 3.0,
            "live_share": 0.25,
        },
        "replay": {
            "update_seconds": replay,
            "difference": 1e-3,
            "cosine": 0.99,
            "gradient_cosine": 0.995,
        },
    }


def test_a_round_is_compared_with_a_round_a_token_with_a_token_an_update_with_its_replay():
    assert ratios_of(pair(trl_round=40.0, gmpo_round=8.0)) == {
        "round_ratio": 5.0,  # 40 / 8
        "rollout_ratio": 2.4,  # (120 / 2) / (100 / 4)
        "update_ratio": 15.0,  # 30 / 2: TRL's rows, not gmpo's own round of 99 s
    }


def test_the_summary_says_which_pairs_were_left_to_fp32():
    exact = {"difference": 0.2, "gradient_cosine": 0.999}
    near = exact | {"cosine": 0.98, "trl_cosine": 0.85}
    far = exact | {"cosine": 0.96, "trl_cosine": 0.93}
    plain = pair(trl_round=40.0, gmpo_round=8.0)
    figures = summary([plain, plain | {"exact": near}, plain | {"exact": far}])
    assert figures["left_to_fp32"] == {
        "num_pairs": 2,
        "pairs": [2, 3],
        "smallest_cosine": 0.96,
        "trl_smallest_cosine": 0.85,
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_rounded_updates_whose_first_gradients_agree_are_left_to_fp32(optimizer: str):
    agreeing = {"difference": 0.6, "cosine": 0.83, "gradient_cosine": 0.99}
    assert is_left_to_fp32(agreeing, optimizer, BF16_BOUNDS)
    assert not is_left_to_fp32(agreeing | {"gradient_cosine": 0.989}, optimizer, BF16_BOUNDS)
    assert not is_left_to_fp32(agreeing | {"gradient_cosine": math.nan}, optimizer, BF16_BOUNDS)
    assert not is_left_to_fp32(agreeing | {"gradient_cosine": 1.0}, optimizer, FP32_BOUNDS)


def test_the_summary_has_medians_and_ranges_over_pairs():
    pairs = [
        pair(trl_round=40.0, gmpo_round=8.0, replay=2.0),  # 5, 15
        pair(trl_round=40.0, gmpo_round=4.0, replay=3.0),  # 10, 10
        pair(trl_round=60.0, gmpo_round=10.0, replay=6.0),  # 6, 5
    ]
    figures = summary(pairs)
    names = ("round_ratio_median", "round_ratio_min", "round_ratio_max")
    assert [figures[name] for name in names] == [6.0, 5.0, 10.0]
    assert [figures[f"update_ratio_{which}"] for which in ("median", "min", "max")] == [10, 5, 15]
    assert figures["memory_ratio"] == 0.75  # 3 / 4
    assert figures["live_share"] == {"trl": 0.5, "gmpo": 0.25}
    assert figures["num_pairs"] == 3
    assert "left_to_fp32" not in figures
    # Updates are of the same rows on both sides.
    assert figures["gmpo"] == {
        "round_seconds": 8.0,
        "round_seconds_min": 4.0,
        "round_seconds_max": 10.0,
        "rollout_tokens_per_second": 60.0,  # 120 / 2
        "rollout_tokens_per_second_min": 60.0,
        "rollout_tokens_per_second_max": 60.0,
        "update_seconds": 3.0,
        "update_seconds_min": 2.0,
        "update_seconds_max": 6.0,
        "peak_gib": 3.0,
        "peak_gib_min": 3.0,
        "peak_gib_max": 3.0,
    }
    assert figures["trl"]["update_seconds_max"] == 30.0
    assert figures["trl"]["rollout_tokens_per_second_min"] == 25.0  # 100 / 4


@pytest.mark.parametrize(
    ("both_fp32", "optimizer", "compared", "is_refused"),
    [
        (True, "sgd", {"difference": 2e-4, "cosine": 1.0}, False),
        (True, "sgd", {"difference": 3e-4, "cosine": 1.0}, True),
        (True, "adamw", {"difference": 1e-2, "cosine": 1.0}, False),
        (True, "adamw", {"difference": 2e-2, "cosine": 1.0}, True),
        (False, "sgd", {"difference": 0.1, "cosine": 0.99}, False),
        (False, "sgd", {"difference": 0.1, "cosine": 0.989}, True),
        (False, "adamw", {"difference": 0.3, "cosine": 0.95}, False),
        (False, "adamw", {"difference": 0.3, "cosine": 0.94}, True),
        # In one direction, and too long: gradients summed where they are averaged, say.
        (False, "sgd", {"difference": 0.2, "cosine": 1.0}, False),
        (False, "sgd", {"difference": 0.21, "cosine": 1.0}, True),
        (False, "adamw", {"difference": 0.5, "cosine": 1.0}, False),
        (False, "adamw", {"difference": 0.51, "cosine": 1.0}, True),
        (False, "adamw", {"gradient_cosine": 0.99, "difference": 0.1, "cosine": 1.0}, False),
        (False, "adamw", {"gradient_cosine": 0.98, "difference": 0.1, "cosine": 1.0}, True),
        (False, "sgd", {"gradient_cosine": 0.98, "difference": 0.1, "cosine": 1.0}, True),
        (True, "adamw", {"gradient_cosine": 0.9998, "difference": 1e-3, "cosine": 1.0}, True),
        (True, "adamw", {"gradient_cosine": math.nan, "difference": 1e-3, "cosine": 1.0}, True),
        (False, "adamw", {"difference": 2.0, "cosine": -1.0}, True),
        (True, "adamw", {"difference": math.nan, "cosine": math.nan}, True),
        (False, "sgd", {"difference": math.nan, "cosine": math.nan}, True),
    ],
)
def test_bounds_hold_by_precision_and_optimizer(
    both_fp32: bool, optimizer: str, compared: dict[str, float], is_refused: bool
):
    bounds = bounds_of(both_fp32=both_fp32)
    compared = {"gradient_cosine": 1.0} | compared
    assert (complaint(compared, optimizer, bounds) is not None) == is_refused
    if is_refused:
        with pytest.raises(UpdatesDiffer, match="times are not compared"):
            require_same_update(compared, optimizer, bounds)
    else:
        require_same_update(compared, optimizer, bounds)


def test_a_refusal_names_figure_and_bound():
    wide = {"difference": 0.5, "cosine": 0.6, "gradient_cosine": 1.0}
    assert complaint(wide, "adamw", FP32_BOUNDS) == (
        "adamw: |d_gmpo - d_trl| / |d_trl| is 0.5, at most 0.01 is allowed"
    )
    assert complaint(wide, "sgd", BF16_BOUNDS) == (
        "sgd: the cosine between gmpo's and TRL's update is 0.6000, at least 0.99 is needed"
    )
    assert complaint(wide | {"gradient_cosine": 0.5}, "adamw", BF16_BOUNDS) == (
        "adamw: the cosine between gmpo's and TRL's first gradient is 0.5000, at least 0.99 is "
        "needed"
    )


def test_patterned_rewards_set_how_many_groups_are_alive():
    # 3 groups of 4, of which 2 live: those at 1 * 3 // 2 - 1 = 0 and at 2 * 3 // 2 - 1 = 2.
    rewards = patterned_rewards(12, group_size=4, live_groups=2)
    assert rewards == [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0]
    rows = SampledRows(prompt_ids=[], completion_ids=[], rewards=rewards)
    assert rows.live_share(4) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("live", "places"), [(1, [7]), (2, [3, 7]), (4, [1, 3, 5, 7]), (0, [])])
def test_live_groups_are_spread_over_the_steps(live: int, places: list[int]):
    # 8 groups of 2 in 4 steps of 2 groups.
    rewards = patterned_rewards(16, group_size=2, live_groups=live)
    assert [place for place in range(8) if rewards[2 * place]] == places


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_rounds_have_prompts_of_their_own_and_divide_into_steps(name: str):
    workload = WORKLOADS[name]
    rounds = [[prompt.id for prompt in prompts_of(workload, number)] for number in range(6)]
    assert all(len(ids) == workload.prompts_per_round for ids in rounds)
    assert len({prompt for ids in rounds for prompt in ids}) == 6 * workload.prompts_per_round
    assert workload.prompts_per_round % 4 == 0
    assert workload.rows_per_step * 4 == workload.prompts_per_round * workload.group_size


def test_long_prompts_share_no_example():
    seen = [
        message.content
        for number in range(6)
        for prompt in prompts_of(WORKLOADS["long-prompt"], number)
        for message in prompt.messages or ()
        if message.role == "user"
    ]
    assert len(set(seen)) == len(seen)


def test_results_go_on_where_they_were(tmp_path: Path):
    path = tmp_path / "deep" / "short.json"
    setting = {"workload": {"name": "short"}, "sizes": (1, 2)}
    first = Results(path, setting)
    first.content["variants"] = {"no_dead": {"pairs": [1]}}
    first.save()
    assert Results(path, setting).content == json.loads(path.read_text())
    assert Results(path, setting).content["variants"] == {"no_dead": {"pairs": [1]}}


def test_results_of_another_setting_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "short.json"
    Results(path, {"made_with": {"commit": "a", "torch": "2"}, "dtype": "auto"}).save()
    with pytest.raises(OtherBenchmark, match=r"made_with\.commit was a, is b; name a new file"):
        Results(path, {"made_with": {"commit": "b", "torch": "2"}, "dtype": "auto"})


def test_a_section_has_a_setting_of_its_own_and_leaves_the_rest_of_the_file(tmp_path: Path):
    path = tmp_path / "short.json"
    whole = Results(path, {"dtype": "auto"})
    whole.content["variants"] = {}
    whole.save()
    part = Results(path, {"dtype": "fp32"}, section="fp32")
    part.content["trl_setup"] = "fp32/generate"
    part.save()
    assert json.loads(path.read_text()) == {
        "setting": {"dtype": "auto"},
        "variants": {},
        "fp32": {"setting": {"dtype": "fp32"}, "trl_setup": "fp32/generate"},
    }
    with pytest.raises(OtherBenchmark, match="dtype was fp32, is bf16"):
        Results(path, {"dtype": "bf16"}, section="fp32")
    assert Results(path, {"dtype": "auto"}).content["fp32"]["trl_setup"] == "fp32/generate"


def test_differences_name_what_is_only_on_one_side():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        "a.b was 1, is 3",
        "c was 2, is None",
        "d was None, is 4",
    ]


def test_the_processor_is_read_from_the_kernels_list():
    text = (
        "cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Some CPU @ 2GHz\n"
        "flags\t\t: fpu avx2 avx512_bf16 amx_tile amx_bf16\n"
    )
    assert processor(text).as_dict() == {
        "processor": "Some CPU @ 2GHz",
        "processor_family": "6/143",
        "avx2": True,
        "avx512f": False,
        "avx512_bf16": True,
        "amx_bf16": True,
    }
    assert str(processor(text)) == "Some CPU @ 2GHz (avx512_bf16, amx_bf16)"
    assert str(processor("")) == f"{platform.machine()} (no bf16 units)"


def test_uncommitted_changes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(circumstances, "REPOSITORY", tmp_path)
    assert circumstances.changes() is None  # no repository
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / "file"
    file.write_text("one\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    assert circumstances.changes() is None
    digests = []
    for text in ("two\n", "three\n", "two\n"):
        file.write_text(text)
        digests.append(circumstances.changes())
    assert digests[0] == digests[2] and None not in digests and digests[0] != digests[1]


def test_what_ran_before_each_call_is_stored_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "x.json"
    for load in (0.25, 3.0):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        results = Results(path, {})
        results.note_load()
        results.save()
    assert json.loads(path.read_text())["loads_before"] == [0.25, 3.0]
    assert capsys.readouterr().out.count("warning: 3.0 processes were running") == 1


def content(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "setting": {"workload": {"name": "short"}, "stages": STAGES, "peaks": PEAKS},
        "trl_setup": "fp32/generate",
        "gmpo_setup": {"dtype": "fp32", "engine": "fast"},
        "variants": {"no_dead": {**summary(pairs), "pairs": pairs}},
    }


def test_table_and_plot_show_every_variant_that_has_pairs(tmp_path: Path):
    contents = [content([pair(trl_round=40.0, gmpo_round=8.0)])]
    contents[0]["variants"]["as_sampled"] = {"pairs": []}
    text = StringIO()
    print_table(contents, Console(file=text, width=200))
    assert "short, no_dead" in text.getvalue() and "5.00 (5.00-5.00)" in text.getvalue()
    assert "as_sampled" not in text.getvalue()
    draw(contents, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_tables_show_seconds_tokens_and_memory_of_either_side_and_how_alike_updates_are():
    pairs = [
        pair(trl_round=40.0, gmpo_round=8.0),
        pair(trl_round=60.0, gmpo_round=9.0, replay=4.0),
    ]
    pairs[1]["replay"] |= {"cosine": 0.83, "gradient_cosine": 0.9912, "difference": 0.5968}
    pairs[1]["exact"] = {"cosine": 0.9766, "trl_cosine": 0.8312}
    of_bf16 = content(pairs) | {
        "sgd_check": {"cosine": 0.9943, "difference": 0.107, "gradient_cosine": 0.998}
    }
    # As files were written before either side's figures had a range.
    stored = of_bf16["variants"]["no_dead"]
    stored["trl"] = stored["gmpo"] = {"round_seconds": 1.0}
    text = StringIO()
    print_table([of_bf16], Console(file=text, width=200))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")][1:]
        for line in text.getvalue().splitlines()
        if line.startswith("│ short, no_dead")
    ]
    ranges = ["50.0 (40.0 to 60.0)", "25.0 (25.0 to 25.0)", "30.0 (30.0 to 30.0)"]
    assert rows[1] == ["TRL", *ranges, "4.00 (4.00 to 4.00)"]
    ranges = ["8.50 (8.00 to 9.00)", "60.0 (60.0 to 60.0)", "3.00 (2.00 to 4.00)"]
    assert rows[2] == ["gmpo", *ranges, "3.00 (3.00 to 3.00)"]
    cosines = ["0.8300", "0.9912", "0.6", "0.9943", "0.11"]
    assert rows[3] == [*cosines, "pair 2: gmpo 0.9766, TRL 0.8312"]


def test_what_an_older_rule_timed_is_marked_in_table_and_plot(tmp_path: Path):
    now, older = (content([pair(trl_round=40.0, gmpo_round=8.0)]) for _ in range(2))
    del older["setting"]["stages"]
    older["setting"]["workload"]["name"] = "words"
    text, plain = StringIO(), StringIO()
    print_table([now, older], Console(file=text, width=200))
    assert "words, no_dead *" in text.getvalue() and "short, no_dead *" not in text.getvalue()
    assert "* timed by an older rule" in text.getvalue()
    draw([now, older], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "words, no_dead *" in drawn and "timed by an older rule" in drawn
    print_table([now], Console(file=plain, width=200))
    assert "*" not in plain.getvalue()


def test_peaks_by_an_older_rule_are_marked():
    now, older = (content([pair(trl_round=40.0, gmpo_round=8.0)]) for _ in range(2))
    del older["setting"]["peaks"]
    text, plain = StringIO(), StringIO()
    print_table([now, older], Console(file=text, width=200))
    assert text.getvalue().count(") †") == 1 and "† peaks by an older rule" in text.getvalue()
    older["setting"]["made_with"] = {"device": "cuda"}
    print_table([now, older], Console(file=plain, width=200))
    assert "†" not in plain.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_of_a_gradient_does_not_keep_the_gradient(dtype: torch.dtype):
    weight = torch.nn.Parameter(torch.zeros(40, 10, dtype=dtype))
    weight.grad = torch.arange(400.0).view(40, 10).to(dtype)
    (sample,) = gradient_sample([("w", weight)]).values()
    assert sample.tolist() == [float(n) for n in weight.grad.flatten().tolist()[::GRADIENT_STRIDE]]
    assert sample.dtype == torch.float32
    assert sample.untyped_storage().nbytes() == 4 * 25


def test_the_table_says_how_many_rows_trl_ran_at_once():
    smaller = content([pair(trl_round=40.0, gmpo_round=8.0)])
    smaller["setting"]["trl_micro_batch"] = 4
    text = StringIO()
    print_table([smaller], Console(file=text, width=250))
    assert "fp32/generate, 4 rows at once" in text.getvalue()


def test_figures_of_fp32_stand_beside_those_of_the_same_file(tmp_path: Path):
    both = content([pair(trl_round=40.0, gmpo_round=8.0)])
    only = {"fp32": content([pair(trl_round=60.0, gmpo_round=20.0)])}
    both["fp32"] = only["fp32"]
    text = StringIO()
    print_table([both, only], Console(file=text, width=200))
    found = [text.getvalue().count(ratio) for ratio in ("5.00 (5.00-5.00)", "3.00 (3.00-3.00)")]
    assert found == [1, 2]
    draw([both, only], tmp_path / "plot.png")


def test_a_point_of_live_groups_has_seconds_and_ratios_of_its_samples(tmp_path: Path):
    samples = [
        {"trl_seconds": 20.0, "gmpo_seconds": 2.0},  # 10
        {"trl_seconds": 18.0, "gmpo_seconds": 3.0},  # 6
    ]
    figures = live_shares.summary(samples)
    assert figures["update_ratio"] == {"median": 8.0, "min": 6.0, "max": 10.0}
    assert figures["trl_update_seconds"] == {"median": 19.0, "min": 18.0, "max": 20.0}
    points = {"1/8": {"samples": samples, **figures}, "8/8": {"samples": []}}
    text = StringIO()
    live_shares.print_live_shares(points, Console(file=text, width=120))
    assert "8.00 (6.00-10.00)" in text.getvalue() and "8/8" not in text.getvalue()
    live_shares.draw_live_shares(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prompts", "counts"), [(8, [1, 2, 4, 8]), (4, [1, 2, 4]), (16, [2, 4, 8, 16])]
)
def test_only_shares_that_are_whole_groups_are_measured(prompts: int, counts: list[int]):
    assert live_shares.live_counts(prompts) == counts


def test_a_refused_workload_is_said_so():
    text = StringIO()
    refused = {"setting": {"workload": {"name": "words"}}, "refused": "sgd: too far"}
    print_table([refused], Console(file=text, width=200))
    assert "words refused: sgd: too far" in text.getvalue()
