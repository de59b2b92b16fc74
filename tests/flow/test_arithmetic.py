"""Portable arithmetic: the same bits whatever else of the processor is hidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import arithmetic
from scripts.arithmetic import VARIABLES, circumstances, enter, of_this_process

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = """
import json, sys
from pathlib import Path
from scripts.arithmetic import enter
enter("portable", module="")
from scripts.stability_study import run_cell
from tests.small_study import CUT, numbers
record = run_cell(CUT, "gmpo-seed0", runs=Path(sys.argv[1]))
print(json.dumps([numbers(record), record["made_with"]]))
"""
ROOTS = """
import math, torch
from scripts.arithmetic import enter
enter("portable", module="")
for dtype in (torch.float32, torch.float64):
    values = torch.linspace(1, 4, 30000, dtype=dtype)
    roots = torch.tensor([math.sqrt(value) for value in values.tolist()], dtype=dtype)
    assert values.sqrt().equal(roots)
    logarithms = torch.tensor([math.log(value) for value in values.tolist()])
    torch.testing.assert_close(values.log().float(), logarithms)
odd = torch.tensor([-1.0, 0.0, torch.inf, torch.nan], requires_grad=True)
assert str(odd.detach().sqrt().tolist()) == "[nan, 0.0, inf, nan]"
assert str(odd.detach().log().tolist()) == "[nan, -inf, inf, nan]"
root = odd[2:].sqrt().sum() + torch.tensor(4.0, requires_grad=True).sqrt()
assert root.requires_grad
table = torch.tensor([[1.0, 4.0], [9.0, 16.0]]).T
assert table.sqrt().tolist() == [[1, 3], [2, 4]]
assert torch.tensor(16.0, dtype=torch.bfloat16).sqrt().dtype == torch.bfloat16
assert torch.tensor(16).sqrt().equal(torch.tensor(4.0))
"""
NARROWER = {
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD",
}
"""Hides what processors with AVX2 may or may not have."""
TORCH = "2.13.0+cpu"
WEIGHTS = "091f5d300a2c636c"
"""Digest of what the cut study's warming up gives with this release of torch, on an AMD EPYC."""


def portably(code: str, *words: str, **more: str) -> str:
    """What code prints in a process that begins in portable arithmetic."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **VARIABLES, **more},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def cut_cell(folder: Path, **more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its numbers and what it was made with."""
    numbers, made_with = json.loads(portably(RUN, str(folder), **more).splitlines()[-1])
    return numbers, made_with


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return cut_cell(tmp_path_factory.mktemp("portable"))


def test_hiding_more_of_the_processor_changes_no_number(
    portable: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
):
    numbers, made_with = portable
    assert (made_with["arithmetic"], made_with["threads"]) == ("portable", 1)
    assert numbers["figures"]["gradient_norm_deviation"] > 0
    assert cut_cell(tmp_path, **NARROWER)[0] == numbers


# A claim about processors that were not at hand: one that refutes it is no broken build.
@pytest.mark.verify
@pytest.mark.skipif(torch.__version__ != TORCH, reason=f"these are the weights of torch {TORCH}")
def test_any_processor_warms_up_to_the_same_weights(
    portable: tuple[dict[str, Any], dict[str, Any]],
):
    assert portable[0]["policy"] == WEIGHTS


def test_roots_are_the_nearest_numbers_and_logarithms_are_the_c_librarys():
    portably(ROOTS)


def told(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Set these of the variables alone."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_is_portable_if_it_was_told_all_of_it(monkeypatch: pytest.MonkeyPatch):
    told(monkeypatch, **VARIABLES)
    assert of_this_process() == circumstances()["arithmetic"] == "portable"
    for name in VARIABLES:
        with monkeypatch.context() as without:
            without.delenv(name)
            assert of_this_process() == "native"


def test_a_process_begins_anew_with_what_libraries_are_told(monkeypatch: pytest.MonkeyPatch):
    begun: list[tuple[str, list[str], dict[str, str]]] = []

    def begin(*given: Any) -> None:
        begun.append(given)
        raise SystemExit

    monkeypatch.setattr(arithmetic.os, "execve", begin)
    monkeypatch.setattr(sys, "argv", ["study.py", "--json", "x.json"])
    monkeypatch.setenv("KEPT", "1")
    told(monkeypatch)
    enter("native", module="scripts.stability_study")  # as it is
    with pytest.raises(SystemExit):
        enter("portable", module="scripts.stability_study")
    told(monkeypatch, **VARIABLES)
    with pytest.raises(SystemExit):
        enter("native", module="scripts.stability_study")
    (program, words, portable), (_, _, native) = begun
    assert [program, *words] == [sys.executable] * 2 + [
        "-m", "scripts.stability_study", "--json", "x.json"
    ]  # fmt: skip
    assert portable.items() >= {**VARIABLES, "KEPT": "1"}.items()
    assert native["KEPT"] == "1" and not native.keys() & VARIABLES.keys()


def test_a_processor_without_avx2_has_no_portable_arithmetic(monkeypatch: pytest.MonkeyPatch):
    told(monkeypatch, **VARIABLES)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(SystemExit, match="torch computes with DEFAULT here"):
        enter("portable", module="scripts.stability_study")
