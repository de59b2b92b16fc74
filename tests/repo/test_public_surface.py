"""`__all__` says what is public, and the names that other programs rely on stay."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmpo

SOURCE = Path(__file__).resolve().parents[2] / "src"
MODULES = sorted(path for path in (SOURCE / "gmpo").rglob("*.py") if path.name != "__init__.py")
PACKAGES = sorted((SOURCE / "gmpo").rglob("__init__.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def listed_names(tree: ast.Module) -> list[str] | None:
    """The literal `__all__` of a module; None if it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return list(ast.literal_eval(node.value))
    return None


def public_definitions(tree: ast.Module) -> Iterator[str]:
    """Functions, classes and constants without an underscore that the module itself defines."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [
                part.id
                for target in node.targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            ]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_all_lists_exactly_the_public_definitions(path: Path):
    tree = ast.parse(path.read_text())
    listed = listed_names(tree)
    assert listed is not None, f"{name_of(path)} has no __all__"
    assert set(listed) == set(public_definitions(tree))
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_every_name_a_package_lists_can_be_imported(path: Path):
    module = importlib.import_module(name_of(path))
    listed = listed_names(ast.parse(path.read_text())) or []
    missing = [name for name in listed if not _has(module, name)]
    assert not missing, f"{name_of(path)}.__all__ lists {missing}"


def _has(module: object, name: str) -> bool:
    try:
        getattr(module, name)
    except AttributeError:
        return False
    return True


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gmpo.no_such_name


CLIPPED = {
    "policy_logprobs": inspect.Parameter.empty,
    "old_logprobs": inspect.Parameter.empty,
    "advantages": inspect.Parameter.empty,
    "mask": inspect.Parameter.empty,
}


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("gmpo_loss", {**CLIPPED, "clip_low": 0.4, "clip_high": 0.4}),
        ("grpo_loss", {**CLIPPED, "clip_low": 0.2, "clip_high": 0.2}),
    ],
)
def test_a_loss_keeps_its_keywords_and_defaults(name: str, keywords: dict[str, object]):
    from gmpo import objective

    parameters = inspect.signature(getattr(objective, name)).parameters
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    kept = {key: parameters[key].default for key in keywords}
    assert kept == keywords
    # Whatever came later is optional, so old calls go on working.
    later = [p for key, p in parameters.items() if key not in keywords]
    assert all(p.default is not inspect.Parameter.empty for p in later)


def test_group_advantages_keeps_its_keywords_and_defaults():
    from gmpo.advantages import group_advantages

    parameters = inspect.signature(group_advantages).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "rewards"}
    assert defaults == {"valid": None, "scale": "std", "eps": 0.0}
    assert next(iter(parameters)) == "rewards"
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults)


def test_the_objectives_keep_their_names():
    from gmpo.objective import OBJECTIVES

    assert set(OBJECTIVES) == {
        "gmpo",
        "gmpo_no_clip",
        "gmpo_sequence_clip",
        "gmpo_no_norm",
        "grpo",
        "dr_grpo",
        "gspo",
    }


def test_a_policy_is_loaded_from_where_it_always_was():
    from gmpo.policy.load import load_policy, load_tokenizer

    assert callable(load_policy)
    assert callable(load_tokenizer)
