"""A tiny model, its recipe, and a finished run of the installed command."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from tests.commands import installed
from tests.forks import forked_starts
from tests.models import save_tiny
from tests.tiny_runs import tiny_recipe, write_recipe


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="package")
def recipe(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe whose model is named by the caller."""
    path = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    return write_recipe(path, tiny_recipe("no such model"))


@pytest.fixture(scope="package")
def piped(
    model: str, recipe: str, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """A run by the installed command, its output in pipes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return installed("train", recipe, "--run", folder, "--set", f"model.name={model}")


@pytest.fixture(scope="package")
def finished(piped: subprocess.CompletedProcess[str]) -> Path:
    assert piped.returncode == 0, piped.stderr
    return Path(piped.stdout.splitlines()[0].partition("run folder ")[2])


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    """Commands that the tested code starts are forks: for modules that do not test the start."""
    with forked_starts():
        yield


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    """What `main` asks of the environment before transformers is imported, which is too late."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
