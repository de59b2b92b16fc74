"""What is told about a machine: packages against their requirements, the model, the extras."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest
from tests.commands import gmpo

from gmpo.environment import QUICK_START_GIB, extras, faults_of, findings
from gmpo.forecast import forecast
from gmpo.recipe import load_recipe

NUMPY = importlib.metadata.version("numpy")


def test_a_package_is_missing_too_old_or_as_required():
    assert faults_of(["numpy>=1.0", "numpy"]) == []
    assert faults_of(["numpy>=999,<1000"]) == [f"numpy is {NUMPY}, not <1000,>=999"]
    assert faults_of(["no-such-package>=1"]) == ["no-such-package>=1 is missing"]


def test_requirements_of_other_pythons_and_other_extras_do_not_count():
    lines = ['absent; python_version < "3"', 'absent; extra == "serve"']
    assert faults_of(lines) == []
    assert faults_of(lines, extra="serve") == ["absent is missing"]


def test_the_extras_are_those_of_the_project_that_users_install():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = set(project["optional-dependencies"]) - {"all", "dev"}
    assert set(extras()) == wanted
    assert [line.partition(";")[0].strip() for line in extras()["alerts"]] == ["apprise>=1.9"]


def test_a_cache_that_cannot_be_written_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GMPO_CACHE", str(tmp_path / "file" / "cache"))
    (cache,) = [one for one in findings() if one.what == "cache"]
    assert cache.state == "missing" and "set GMPO_CACHE" in cache.remedy
    done = gmpo("doctor")
    assert done.exit_code == 2 and done.stdout.splitlines()[-1].startswith("not ready: ")
    assert "cache" in done.stdout.splitlines()[-1]


def test_the_command_tells_all_and_ends_with_0_only_if_nothing_is_missing():
    done = gmpo("doctor", "--json")
    found = json.loads(done.stdout)
    first = ["Python", "packages", "device", "kernels", "memory"]
    assert [one["what"] for one in found[: len(first)]] == first
    is_ready = all(one["state"] != "missing" for one in found)
    assert done.exit_code == (0 if is_ready else 2)
    assert all(one["remedy"] for one in found if one["state"] != "ok")
    assert ("ready: gmpo train quickstart" in gmpo("doctor").stdout) == is_ready


def test_the_memory_told_of_the_quick_start_is_its_forecast():
    needs = forecast(load_recipe("quickstart", ["model.dtype=fp32"]))
    # This process has the tests' imports too; a dry run counts 0.45 GiB for its own.
    without_process = needs.peak_gib - needs.process_gib
    assert without_process + 0.45 == pytest.approx(QUICK_START_GIB, abs=0.1)
