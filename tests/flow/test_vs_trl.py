"""The benchmark against TRL over a tiny model: equal work is compared, unequal work refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import vs_trl
from benchmarks.comparison import Bench, Sides, hold_to_trl, run_pairs, setups_of, warm_up
from benchmarks.exchange import SampledRows
from benchmarks.gmpo_side import GmpoSide
from benchmarks.live_shares import run_live_shares
from benchmarks.ratios import PEAKS, RATIOS, STAGES, UpdatesDiffer
from benchmarks.results import Results
from benchmarks.trl_side import TrlSetup, TrlSide
from benchmarks.worker import give_back
from tests.models import save_tiny
from tests.trl_trainers import tolerated, trl_side_of_sums
from trl.experimental.gmpo import GMPOTrainer

from gmpo.objective import ObjectiveTerms, gmpo_terms

pytestmark = tolerated


@dataclass(frozen=True, kw_only=True)
class Here:
    """A side in this process, and how often it was asked for what."""

    side: TrlSide | GmpoSide
    asked: list[str]

    def ask(self, command: str, *, within: float | None = None, **arguments: Any) -> dict[str, Any]:
        assert within is None  # nothing ends what runs in this process
        self.asked.append(command)
        side = self.side
        commands = {"round": side.round, "about": side.about, "replay": side.replay}
        commands["give_back"] = give_back
        return commands[command](**arguments)


@dataclass(frozen=True, kw_only=True)
class BenchHere(Bench):
    """A bench whose TRL in fp32 is in this process too."""

    exact: Here

    @contextmanager
    def exact_trl(self) -> Iterator[Here]:
        yield self.exact


@dataclass(frozen=True, kw_only=True)
class Tiny:
    bench: BenchHere
    sides: Sides
    trl: Here
    gmpo: Here
    gmpo_side: GmpoSide


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    trl_side, workload, scratch = trl_side_of_sums(tmp_path, monkeypatch, max_new_tokens=6)
    gmpo_side = GmpoSide(workload, "fp32", scratch)
    trl = Here(side=trl_side, asked=[])
    gmpo = Here(side=gmpo_side, asked=[])
    yield Tiny(
        bench=BenchHere(
            workload=workload, dtype="fp32", threads=1, scratch=scratch, say=print, exact=trl
        ),
        sides=Sides(trl=trl, gmpo=gmpo, both_fp32=True),
        trl=trl,
        gmpo=gmpo,
        gmpo_side=gmpo_side,
    )
    gmpo_side.close()


def with_wrong_sign(side: GmpoSide) -> None:
    def sign_flipped(**tensors: Any) -> ObjectiveTerms:
        terms = gmpo_terms(**tensors)
        return replace(terms, loss=-terms.loss)

    side.parts = replace(side.parts, loss=replace(side.parts.loss, objective=sign_flipped))


def test_gmpo_does_on_trls_completions_what_trl_did(tiny: Tiny, tmp_path: Path):
    results = Results(tmp_path / "out.json", {})
    warm_up(tiny.bench, tiny.sides, results)
    assert results.content["sgd_check"]["difference"] <= 1e-4
    run_pairs(tiny.bench, tiny.sides, results, variant="no_dead", wanted=2)
    entry = results.content["variants"]["no_dead"]
    assert 0 < entry["largest_difference"] <= 1e-2
    assert 0.9999 < entry["smallest_gradient_cosine"] <= 1.0
    assert entry["live_share"] == {"trl": 1.0, "gmpo": 1.0}
    for pair in entry["pairs"]:
        assert pair["replay"]["used_sampler_logprobs"]
        for side in ("trl", "gmpo"):
            figures = pair[side]
            stages = ("rollout_seconds", "reward_seconds", "update_seconds")
            # What lies between the stages belongs to the round alone.
            assert sum(figures[stage] for stage in stages) <= figures["round_seconds"] + 1e-6
            assert min(figures[name] for name in ("tokens", "peak_gib", "rollout_seconds")) > 0


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("_generate_single_turn", "rollout_seconds"),
        ("_calculate_rewards", "reward_seconds"),
        # Its first call is the pass over old log-probabilities, before rewards are asked for.
        ("_get_per_token_logps_and_entropies", "update_seconds"),
    ],
)
def test_old_logprobs_of_trl_are_part_of_its_update(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str, stage: str
):
    called = getattr(GMPOTrainer, method)
    slowed: list[bool] = []

    def slow(trainer: Any, *arguments: Any, **options: Any) -> Any:
        if not slowed:
            slowed.append("rewarded" not in trainer.marks)
            time.sleep(2.0)
        return called(trainer, *arguments, **options)

    monkeypatch.setattr(GMPOTrainer, method, slow)
    figures = tiny.trl.ask("round", number=1, live_groups=4)
    assert slowed == [True]
    assert figures[stage] >= 2.0
    stages = ("rollout_seconds", "reward_seconds", "update_seconds")
    assert sum(figures[name] for name in stages) == pytest.approx(figures["round_seconds"])


def test_every_round_starts_from_the_same_weights(tiny: Tiny):
    asked = {"number": 3, "live_groups": 4}
    rounds = []
    for _ in range(2):
        tiny.trl.ask("round", **asked)
        rows = SampledRows.read(tiny.bench.scratch.completions)
        rounds.append((rows, tiny.gmpo.ask("replay", number=3)["difference"]))
    assert rounds[0] == rounds[1]


def test_rounds_that_the_task_rewards_are_dead_alike(tiny: Tiny):
    # A random model adds no numbers, so nothing may move, on either side.
    figures = tiny.trl.ask("round", number=1, live_groups=None)
    replayed = tiny.gmpo.ask("replay", number=1)
    assert figures["live_share"] == 0.0
    compared = [replayed[name] for name in ("difference", "cosine", "gradient_cosine")]
    assert compared == [0.0, 1.0, 1.0]


def test_the_first_gradient_is_of_the_first_step_that_has_one(tiny: Tiny):
    # One live group of four lies in the last step; before it no weight has moved on either side.
    tiny.trl.ask("round", number=2, live_groups=1)
    assert tiny.gmpo.ask("replay", number=2)["gradient_cosine"] > 0.9999
    with_wrong_sign(tiny.gmpo_side)
    assert tiny.gmpo.ask("replay", number=2)["gradient_cosine"] < -0.9999


def test_a_wrong_gradient_is_refused_before_anything_is_timed(tiny: Tiny, tmp_path: Path):
    with_wrong_sign(tiny.gmpo_side)
    with pytest.raises(UpdatesDiffer, match=r"sgd: .* first gradient is -[.0-9]+"):
        warm_up(tiny.bench, tiny.sides, Results(tmp_path / "out.json", {}))


def test_a_pair_with_another_update_is_refused_and_leaves_no_ratio(tiny: Tiny, tmp_path: Path):
    with_wrong_sign(tiny.gmpo_side)
    results = Results(tmp_path / "out.json", {})
    with pytest.raises(UpdatesDiffer, match="adamw"):
        run_pairs(tiny.bench, tiny.sides, results, variant="no_dead", wanted=1)
    assert results.content["variants"]["no_dead"] == {"pairs": []}


ROUNDED_APART = {"difference": 0.6, "cosine": 0.83, "gradient_cosine": 0.998}
"""What a replay in bf16 may say where one token crossed the clip's border by rounding."""


def rounded(tiny: Tiny) -> Sides:
    """Sides that are held to the bounds of bf16, after a round of TRL."""
    tiny.trl.ask("round", number=1, live_groups=4)
    tiny.trl.asked.clear()
    return replace(tiny.sides, both_fp32=False)


def test_an_update_that_rounding_led_away_from_trls_is_held_to_trl_in_fp32(tiny: Tiny):
    sides = rounded(tiny)
    rows = SampledRows.read(tiny.bench.scratch.completions)
    found = hold_to_trl(tiny.bench, sides, ROUNDED_APART, number=1, live_groups=4)
    assert found is not None
    assert found["cosine"] > 0.9999 and found["gradient_cosine"] > 0.9999
    # Here TRL was in fp32 already, so its update is the one that it is held to.
    assert found["trl_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert tiny.trl.asked == ["give_back", "replay"]
    assert tiny.gmpo.asked == ["give_back", "replay"]
    assert SampledRows.read(tiny.bench.scratch.completions) == rows


def test_steps_of_sgd_that_rounding_led_away_are_held_to_trl_in_fp32_too(
    tiny: Tiny, tmp_path: Path
):
    tiny.trl.ask("round", number=1, live_groups=4, sgd_learning_rate=0.01)
    tiny.trl.asked.clear()
    held = partial(
        hold_to_trl,
        tiny.bench,
        replace(tiny.sides, both_fp32=False),
        number=1,
        live_groups=4,
        sgd_learning_rate=0.01,
    )
    # Enough for AdamW, whose first steps are signs, but not for SGD.
    found = held(ROUNDED_APART | {"cosine": 0.98})
    assert found is not None and found["difference"] < 1e-3 and found["trl_cosine"] > 0.999999
    with_wrong_sign(tiny.gmpo_side)
    with pytest.raises(UpdatesDiffer, match=r"sgd: .* gradient is -[.0-9]+.*; --dtype fp32"):
        held(ROUNDED_APART)
    assert tiny.trl.asked == ["give_back", "replay"] * 2


def test_an_update_that_is_not_trls_in_fp32_either_is_refused(tiny: Tiny):
    sides = rounded(tiny)
    with_wrong_sign(tiny.gmpo_side)
    with pytest.raises(UpdatesDiffer, match=r"first gradient is -[.0-9]+"):
        hold_to_trl(tiny.bench, sides, ROUNDED_APART, number=1, live_groups=4)
    assert tiny.trl.asked == ["give_back", "replay"]


def test_a_first_gradient_that_differs_is_refused_whatever_fp32_says(tiny: Tiny):
    sides = rounded(tiny)
    wrong = ROUNDED_APART | {"gradient_cosine": 0.98}
    with pytest.raises(UpdatesDiffer, match=r"first gradient is 0\.98"):
        hold_to_trl(tiny.bench, sides, wrong, number=1, live_groups=4)
    assert tiny.trl.asked == []


def test_trl_takes_the_completions_that_another_setting_of_it_left(tiny: Tiny):
    scratch = tiny.bench.scratch
    tiny.trl.ask("round", number=1, live_groups=4)
    rows = SampledRows.read(scratch.completions)
    # Nothing that it would draw itself: each completion from its second token on.
    shorter = replace(rows, completion_ids=[ids[1:] or ids for ids in rows.completion_ids])
    shorter.write(scratch.completions)
    replayed = tiny.trl.ask("replay", number=1, live_groups=4)
    assert replayed["cosine"] < 0.99 and replayed["gradient_cosine"] < 0.99
    again = tiny.trl.ask("replay", number=1, live_groups=4)
    assert again == pytest.approx({"cosine": 1.0, "gradient_cosine": 1.0}, abs=1e-6)
    assert tiny.gmpo.ask("replay", number=1)["difference"] <= 1e-2
    with pytest.raises(ValueError, match="not those that were left"):
        tiny.trl.ask("replay", number=1, live_groups=3)


def test_trl_takes_the_same_steps_with_fewer_rows_at_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert tiny.bench.workload.rows_per_step == 4
    tiny.trl.ask("round", number=1, live_groups=4)
    batches: list[int] = []
    loss_of = GMPOTrainer._compute_loss

    def counted(trainer: Any, model: Any, inputs: Any) -> Any:
        batches.append(len(inputs["completion_ids"]))
        return loss_of(trainer, model, inputs)

    monkeypatch.setattr(GMPOTrainer, "_compute_loss", counted)
    setup = TrlSetup(precision="fp32", rollouts="generate", micro_batch=2)
    smaller = TrlSide(tiny.bench.workload, setup, tiny.bench.scratch, str(tmp_path / "smaller"))
    replayed = smaller.replay(number=1, live_groups=4)
    assert replayed == pytest.approx({"cosine": 1.0, "gradient_cosine": 1.0}, abs=1e-6)
    assert batches == [2] * 8
    with pytest.raises(ValueError, match="micro_batch 3 does not divide the 4 of a step"):
        TrlSide(
            tiny.bench.workload, replace(setup, micro_batch=3), tiny.bench.scratch, str(tmp_path)
        )


def test_updates_by_live_groups_are_of_the_same_completions_and_go_on(tiny: Tiny, tmp_path: Path):
    path = tmp_path / "out.json"
    run_live_shares(tiny.bench, tiny.sides, Results(path, {}), wanted=1)
    first = json.loads(path.read_text())["live_shares"]
    # 4 groups: an eighth of them is none.
    assert list(first) == ["1/4", "2/4", "4/4"]
    samples = [point["samples"][0] for point in first.values()]
    assert len({sample["tokens"] for sample in samples}) == 1
    assert all(sample["difference"] <= 1e-2 for sample in samples)
    assert all(sample["trl_seconds"] > 0 and sample["gmpo_seconds"] > 0 for sample in samples)
    tiny.trl.asked.clear()
    run_live_shares(tiny.bench, tiny.sides, Results(path, {}), wanted=1)
    assert tiny.trl.asked == []


def test_an_interrupted_run_goes_on_with_the_pairs_it_has(tiny: Tiny, tmp_path: Path):
    path = tmp_path / "out.json"
    run_pairs(tiny.bench, tiny.sides, Results(path, {}), variant="no_dead", wanted=1)
    first = json.loads(path.read_text())["variants"]["no_dead"]["pairs"]
    assert (tiny.trl.asked, tiny.gmpo.asked) == (["round"], ["round", "replay"])
    run_pairs(tiny.bench, tiny.sides, Results(path, {}), variant="no_dead", wanted=2)
    assert (tiny.trl.asked, tiny.gmpo.asked) == (["round"] * 2, ["round", "replay"] * 2)
    entry = json.loads(path.read_text())["variants"]["no_dead"]
    assert entry["pairs"][:1] == first
    assert entry["num_pairs"] == 2


def test_each_precision_of_gmpo_meets_trls_settings_of_it():
    assert len(setups_of("auto")) == 9
    assert setups_of("fp32") == ["fp32/generate", "fp32/static_cache", "fp32/continuous_batching"]
    assert all(setup.startswith("bf16_") for setup in setups_of("bf16"))


@pytest.mark.usefixtures("forked")
def test_the_command_prints_a_table_and_writes_ratios_raw_samples_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "short.json"
    model = save_tiny(tmp_path / "model")
    command = ["--workload", "short", "--model", model, "--json", str(path), "--pairs", "1"]
    command += ["--dtype", "fp32", "--threads", "1", "--variants", "no_dead"]
    command += ["--live-shares", "1"]
    assert vs_trl.main([*command, "--trl", "fp32/generate"]) == 0
    printed = capsys.readouterr().out
    assert "TRL without vLLM" in printed and "update seconds by live groups" in printed
    content = json.loads(path.read_text())["fp32"]
    assert list(content["live_shares"]) == ["1/8", "2/8", "4/8", "8/8"]
    assert path.with_name("short-fp32-live_shares.png").is_file()
    entry = content["variants"]["no_dead"]
    assert all(entry[f"{ratio}_median"] > 0 for ratio in RATIOS)
    assert entry["memory_ratio"] > 0 and len(entry["pairs"]) == 1
    assert content["setting"]["made_with"]["trl"] == "1.16.0"
    assert content["setting"]["stages"] == STAGES
    assert content["setting"]["peaks"] == PEAKS
    assert path.with_suffix(".png").is_file()
    # Another setting of TRL does not go into the same file.
    assert vs_trl.main([*command, "--trl", "fp32/static_cache"]) == 1
    assert "name a new file" in capsys.readouterr().err
    assert vs_trl.main([*command, "--trl", "fp32/generate", "--trl-micro-batch", "4"]) == 1
    assert "trl_micro_batch was None, is 4; name a new file" in capsys.readouterr().err
    # Nor do pairs beside those of a file from before stages had a rule.
    del content["setting"]["stages"]
    path.write_text(json.dumps({"fp32": content}))
    assert vs_trl.main([*command, "--trl", "fp32/generate"]) == 1
    assert f"stages was None, is {STAGES}; name a new file" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"fp32": content}


def test_no_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        vs_trl.main(["--workload", "short", "--json", str(tmp_path / "x.json"), "--pairs", "0"])
    assert "at least 1 is needed" in capsys.readouterr().err


def test_a_refused_comparison_ends_with_3_and_keeps_no_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "short.json"
    measured = {"no_dead": {"pairs": [{"trl": {}, "gmpo": {}}]}}

    def differs(_: object, __: object, results: Results) -> None:
        results.content["variants"] = measured
        raise UpdatesDiffer("the updates differ by 0.5")

    monkeypatch.setattr(vs_trl, "compare", differs)
    command = ["--workload", "short", "--json", str(path), "--threads", "1"]
    plots = [path.with_suffix(".png"), tmp_path / "short-live_shares.png"]
    for plot in plots:
        plot.touch()  # of pairs that were accepted before
    assert vs_trl.main(command) == vs_trl.REFUSED == 3
    assert "refused: the updates differ by 0.5" in capsys.readouterr().err
    content = json.loads(path.read_text())
    assert content["refused"] == "the updates differ by 0.5" and "variants" not in content
    assert not any(plot.exists() for plot in plots)
    # What hours of pairs gave is put away, and taken up by the next call.
    assert content["before_refusal"] == {"variants": measured, "live_shares": {}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "error: cannot load model '/nowhere'"),
        (["--json", "FILE"], "error: FILE cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    arguments = [word.replace("FILE", str(broken)) for word in arguments]
    command = ["--workload", "short", "--json", str(tmp_path / "x.json"), "--threads", "1"]
    assert vs_trl.main([*command, "--trl", "fp32/generate", "--dtype", "fp32", *arguments]) == 1
    assert said.replace("FILE", str(broken)) in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--workload", "short", "--json", str(tmp_path / "x.json"), "--device", "cuda"]
    assert vs_trl.main(command) == 1
    assert "error: device 'cuda' is not available here" in capsys.readouterr().err


def test_more_threads_than_cores_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--workload", "short", "--json", str(tmp_path / "x.json"), "--threads", "4096"]
    with pytest.raises(SystemExit):
        vs_trl.main(command)
    assert "--threads 4096 must lie in 1 to" in capsys.readouterr().err


def test_full_length_asks_both_sides_for_every_token(tmp_path: Path):
    command = ["--workload", "short", "--json", str(tmp_path / "x.json"), "--threads", "1"]
    assert not vs_trl.workload_of(vs_trl.parse(command)).ignores_end
    assert vs_trl.workload_of(vs_trl.parse([*command, "--full-length"])).ignores_end
