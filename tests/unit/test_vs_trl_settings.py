"""Which setting of each side a file of the comparison with TRL holds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from benchmarks import comparison, growth, time_to_accuracy, vs_trl
from benchmarks.comparison import Bench, setups_of
from benchmarks.exchange import Scratch
from benchmarks.results import OtherBenchmark, Results
from benchmarks.workloads import WORKLOADS, prompts_of


class StubSide:
    """gmpo, as far as a comparison without rounds asks it."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def ask(self, _: str, **__: Any) -> dict[str, Any]:
        return {"dtype": self.dtype, "engine": "fast", "notes": []}


class Comparing:
    """Calls of the comparison into one file, with what is measured left out.

    Attributes:
        best: what the trial finds.
        dtype: what gmpo takes by `auto`.
        tried: calls of the trial.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = "bf16_autocast/generate"
        self.dtype = "bf16"
        self.tried = 0

    def __call__(self, *options: str) -> dict[str, Any]:
        """What the file holds after a call with these options."""
        command = ["--workload", "short", "--json", str(self.path), "--threads", "1", *options]
        arguments = vs_trl.parse(command)
        vs_trl.compare(arguments, vs_trl.workload_of(arguments), Results(self.path, {}))
        return self.stored()

    def stored(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text())
        return content


@pytest.fixture
def comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comparing:
    calls = Comparing(tmp_path / "short.json")

    class StubBench(Bench):
        @contextmanager
        def trl(self, setup: str) -> Iterator[StubSide]:
            yield StubSide(setup)

        @contextmanager
        def gmpo(self) -> Iterator[StubSide]:
            yield StubSide(calls.dtype)

    def choose_setup(*_: Any) -> str:
        calls.tried += 1
        return calls.best

    monkeypatch.setattr(vs_trl, "Bench", StubBench)
    monkeypatch.setattr(vs_trl, "choose_setup", choose_setup)
    monkeypatch.setattr(vs_trl, "write_start", lambda *_: None)
    monkeypatch.setattr(vs_trl, "warm_up", lambda _, __, results: results.save())
    monkeypatch.setattr(vs_trl, "run_pairs", lambda *_, **__: None)
    monkeypatch.setattr(vs_trl, "run_live_shares", lambda *_, **__: None)
    return calls


def test_a_file_with_a_named_setting_of_trl_gets_no_pairs_of_a_trials(comparing: Comparing):
    first = comparing("--trl", "fp32/generate")
    with pytest.raises(OtherBenchmark, match=r"--trl fp32/generate\), or a new file"):
        comparing()
    assert comparing.tried == 0
    assert comparing.stored() == first
    assert comparing("--trl", "fp32/generate") == first
    assert (first["trl_setup"], first["trl_chosen_by"]) == ("fp32/generate", "--trl")


def test_a_file_with_a_trial_gets_no_pairs_of_another_best(comparing: Comparing):
    first = comparing()
    assert (first["trl_setup"], first["trl_chosen_by"]) == (comparing.best, "trial")
    assert comparing("--trl", comparing.best) == first
    other = r"trl_setup was bf16_autocast/generate, is fp32/generate; name a new file"
    with pytest.raises(OtherBenchmark, match=other):
        comparing("--trl", "fp32/generate")
    comparing.best = "fp32/generate"
    with pytest.raises(OtherBenchmark, match=other):
        comparing()
    assert comparing.stored() == first


def test_what_a_refusal_put_away_is_taken_up_by_the_next_call(comparing: Comparing):
    results = Results(comparing.path, {})
    pairs = {"no_dead": {"pairs": [1, 2]}}
    results.content |= {"refused": "why", "before_refusal": {"variants": pairs, "live_shares": {}}}
    results.save()
    content = comparing("--trl", "fp32/generate")
    assert content["variants"] == pairs and content["live_shares"] == {}
    assert not {"refused", "before_refusal"} & content.keys()


def test_a_file_whose_gmpo_took_bf16_gets_no_pairs_in_fp32(comparing: Comparing):
    first = comparing()
    comparing.dtype = "fp32"
    with pytest.raises(OtherBenchmark, match=r"gmpo_setup was .*'bf16'.*, is .*'fp32'"):
        comparing()
    assert comparing.stored() == first
    assert first["gmpo_setup"] == {"dtype": "bf16", "engine": "fast"}


@pytest.mark.parametrize("found", [None, "1.15.3", "1.160.0", "2.0.0"])
@pytest.mark.parametrize("main", [vs_trl.main, growth.main, time_to_accuracy.main])
def test_another_trl_is_refused_in_a_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    main: Any,
    found: str | None,
):
    def version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(comparison, "version", version)
    command = ["--json", str(tmp_path / "x.json"), "--threads", "1"]
    command += ["--workload", "short"] if main is vs_trl.main else []
    assert main(command) == 1
    wanted = f"error: TRL 1.16 is needed, found {found or 'none'}: pip install '.[trl]'\n"
    assert capsys.readouterr().err == wanted
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("rows", ["0", "3", "32", "-4"])
def test_a_micro_batch_of_trl_divides_a_step(rows: str, capsys: pytest.CaptureFixture[str]):
    command = ["--workload", "short", "--json", "x.json", "--trl-micro-batch"]
    with pytest.raises(SystemExit):
        vs_trl.parse([*command, rows])
    assert "must divide the 16 rows of an optimizer step" in capsys.readouterr().err
    assert vs_trl.parse([*command, "4"]).trl_micro_batch == 4


def test_trls_workers_are_told_the_micro_batch(monkeypatch: pytest.MonkeyPatch):
    setups: list[dict[str, Any]] = []

    @contextmanager
    def worker(_: Bench, __: str, settings: Mapping[str, Any]) -> Iterator[None]:
        setups.append(settings["setup"])
        yield None

    monkeypatch.setattr(Bench, "_worker", worker)
    bench = Bench(
        workload=WORKLOADS["short"],
        dtype="auto",
        threads=1,
        scratch=Scratch(folder=Path("unused")),
        say=print,
        trl_micro_batch=4,
    )
    with bench.trl("fp32/generate"), bench.exact_trl():
        assert [setup["micro_batch"] for setup in setups] == [4, 4]


def test_make_bench_measures_the_curve_by_live_groups_on_one_workload():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    recipe = makefile.partition("\nbench:")[2].partition("\n\n")[0]
    assert "--live-shares 3" in next(line for line in recipe.splitlines() if "= short" in line)


def test_a_refused_option_prints_a_short_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        vs_trl.parse(["--workload", "short", "--json", "x.json", "--trl", "fp64/generate"])
    usage, _, said = capsys.readouterr().err.partition("error: ")
    assert "fp32/generate" in said and "fp32/generate" not in usage and "long-prompt" not in usage
    with pytest.raises(SystemExit):
        vs_trl.parse(["--help"])
    shown = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert ",".join(setups_of("auto")) in shown and "short,words,long-prompt" in shown


def test_another_seed_gives_both_sides_other_prompts_and_the_file_says_which(tmp_path: Path):
    command = ["--workload", "short", "--json", str(tmp_path / "x.json"), "--threads", "1"]
    usual, other = (
        vs_trl.workload_of(vs_trl.parse([*command, *options])) for options in ((), ("--seed", "7"))
    )
    assert usual == WORKLOADS["short"]
    assert asdict(other) == asdict(usual) | {"seed": 7}
    assert [prompt.id for prompt in prompts_of(other, 0)] != [
        prompt.id for prompt in prompts_of(usual, 0)
    ]
