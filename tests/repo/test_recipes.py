"""Every recipe that comes with the package is read as it will be run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from gmpo.recipe import bundled_recipes, dump_recipe, load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPOSITORY / "src" / "gmpo" / "recipes").glob("*.toml"))


def test_the_recipes_that_the_documentation_names_are_there():
    assert {"quickstart", "svamp_cpu"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_says_what_it_shows(path: Path):
    assert load_recipe(path).description


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_found_by_its_name(path: Path):
    assert load_recipe(path.stem) == load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_resolved_recipe_is_read_back_as_the_same_run(path: Path, tmp_path: Path):
    config = load_recipe(path)
    saved = tmp_path / "recipe.toml"
    saved.write_text(dump_recipe(config), encoding="utf-8")
    assert load_recipe(saved) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_several_steps_a_round(path: Path):
    # With one step a round the ratio is always 1 and GMPO equals GRPO.
    assert load_recipe(path).training.steps_per_round >= 4


def test_every_bundled_recipe_is_packaged_by_its_file_name():
    assert set(bundled_recipes()) == {path.stem for path in RECIPES}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "recipes/*.toml" in project["tool"]["setuptools"]["package-data"]["gmpo"]
