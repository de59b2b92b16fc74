"""The built wheel holds everything that the package reads, and works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src" / "gmpo"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing an earlier build left can slip in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(PACKAGE, source / "src" / "gmpo", ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(source), "-w", str(target), "--no-deps"]
    if int(version("setuptools").split(".")[0]) >= 77:
        command.append("--no-build-isolation")
    built = subprocess.run([*command, "-q"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_file_of_the_package_is_in_the_wheel(names: set[str]):
    expected = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names
    for name in ("gmpo/py.typed", "gmpo/recipes/quickstart.toml", "gmpo/data/svamp.jsonl.gz"):
        assert name in names


def test_nothing_else_is_in_the_wheel(names: set[str]):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    information = f"gmpo-{project['version']}.dist-info/"
    assert not [name for name in names if not name.startswith(("gmpo/", information))]
    assert f"{information}licenses/LICENSE" in names


def test_it_is_the_same_on_every_machine(wheel: Path):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_its_recipes_and_data_are_found_from_any_folder(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import gmpo; from gmpo.recipe import load_recipe; from gmpo.tasks import bundled_task; "
        "print(gmpo.__file__); print(load_recipe('quickstart').task.kind); "
        "print(len(bundled_task(name='svamp').train), len(bundled_task(name='gsm8k').train))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # SVAMP: 1,000 problems, of which 300 are held out
    assert done.stdout.splitlines() == [
        str(site / "gmpo" / "__init__.py"),
        "arithmetic",
        "700 7473",
    ]
