"""Nothing in the package hides a failure, guesses at an attribute, or promises for later."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

BROAD = {"Exception", "BaseException"}
PROBES = {"getattr", "hasattr"}
UNKEPT_PROMISE = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
EMPTY_NAMES = {"utils", "common", "helpers", "manager", "base", "core", "misc", "util", "helper"}

# (file, what is found there): why it may stay.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("src/gmpo/__init__.py", "getattr"): "the lazy package looks a public name up in its home",
    (
        "src/gmpo/checkpoint.py",
        "except Exception",
    ): "tokenizers says nothing narrower of a full disk",
    (
        "src/gmpo/named_functions.py",
        "except Exception",
    ): "a user's module may raise anything as it is imported",
    (
        "src/gmpo/data_parallel/exchange.py",
        "except Exception",
    ): "whatever a helper's work raises is the leader's error; the helper waits for more",
    (
        "src/gmpo/rewards/calls.py",
        "except Exception",
    ): "a user's reward function may raise anything, and the rule for it says what happens",
    (
        "src/gmpo/rollout_functions.py",
        "except Exception",
    ): "a user's rollout function may raise anything; it goes on as an error that names it",
    (
        "src/gmpo/grading/gym.py",
        "except Exception",
    ): "a scorer of reasoning-gym raises anything on bad text; it is named and counted",
    (
        "src/gmpo/policy/load.py",
        "getattr",
    ): "some transformers configurations name no limit of positions, others by another name",
    ("src/gmpo/callbacks.py", "**more passed along"): "transformers hands callbacks such keywords",
    ("src/gmpo/trainer_config.py", "**settings passed along"): "pydantic refuses unknown ones",
    (
        "src/gmpo/trackers/feed.py",
        "except Exception",
    ): "whatever third-party code raises is counted and said, and never stops training",
    (
        "src/gmpo/serving/sampling_thread.py",
        "except Exception",
    ): "a model's own code may raise anything; each request is told, and it is counted",
    (
        "src/gmpo/serving/supervision.py",
        "except Exception",
    ): "work beside the gateway begins anew after whatever ended it, which is told and counted",
    (
        "src/gmpo/serving/recording.py",
        "except Exception",
    ): "an event or a sample that fails in any way is counted, and the others are written",
    (
        "src/gmpo/serving/engine.py",
        "except Exception",
    ): "a model's own code may raise anything as it is loaded; it goes on as an error that says so",
    (
        "src/gmpo/monitoring/delivery.py",
        "except Exception",
    ): "a sink, apprise's services among them, may raise anything; it is counted, said, and the "
    "thread delivers what comes next",
    (
        "src/gmpo/cli/conventions.py",
        "**kwargs passed along",
    ): "a decorator typed by ParamSpec drops nothing",
    (
        "src/gmpo/policy/recompute.py",
        "**named passed along",
    ): "a transformers layer gets back exactly the arguments that its model called it with",
    ("src/gmpo/adapters/trl.py", "**kwargs passed along"): "TRL's constructor refuses unknown ones",
}


def faults(text: str) -> Iterator[tuple[str, int]]:
    """What is found, and in which line."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            yield from ((name, node.lineno) for name in broad_catches(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in PROBES:
                yield node.func.id, node.lineno
        elif isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield "NotImplementedError", node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from passed_along(node)
    for number, line in enumerate(text.splitlines(), start=1):
        found = UNKEPT_PROMISE.search(line)
        if found:
            yield found.group(1), number


def broad_catches(handler: ast.ExceptHandler) -> Iterator[str]:
    if handler.type is None:
        yield "bare except"
        return
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    for kind in caught:
        if isinstance(kind, ast.Name) and kind.id in BROAD:
            yield f"except {kind.id}"


def passed_along(
    function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda,
) -> Iterator[tuple[str, int]]:
    """Calls that hand a function's own `**kwargs` on, so that a misspelt name goes unnoticed."""
    if function.args.kwarg is None:
        return
    name = function.args.kwarg.arg
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg is None and isinstance(value, ast.Name) and value.id == name:
                    yield f"**{name} passed along", node.lineno


def test_the_package_has_no_dishonest_construct():
    found = []
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        name = str(path.relative_to(REPOSITORY))
        found += [
            f"{name}:{line}: {what}"
            for what, line in faults(path.read_text())
            if (name, what) not in EXCEPTIONS
        ]
    assert not found, "\n".join(found)


def test_every_named_exception_is_still_used():
    for (name, what), reason in EXCEPTIONS.items():
        text = (REPOSITORY / name).read_text()
        assert what in {kind for kind, _ in faults(text)}, f"{name}: no {what} left ({reason})"


def test_no_module_or_folder_has_an_empty_name():
    empty = sorted(
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "src").rglob("*")
        if path.stem in EMPTY_NAMES and (path.is_dir() or path.suffix == ".py")
    )
    assert not empty, f"name the noun they hold: {empty}"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("try:\n    f()\nexcept Exception:\n    pass", "except Exception"),
        ("try:\n    f()\nexcept (ValueError, BaseException):\n    pass", "except BaseException"),
        ("def f(**kwargs):\n    return g(**kwargs)", "**kwargs passed along"),
        ("def f(**options):\n    return lambda: g(1, **options)", "**options passed along"),
        ("size = getattr(model, 'size', 0)", "getattr"),
        ("if hasattr(model, 'size'): pass", "hasattr"),
        ("def f():\n    raise NotImplementedError", "NotImplementedError"),
        ("def f():\n    raise NotImplementedError('later')", "NotImplementedError"),
        ("x = 1  # TODO: later", "TODO"),
        ('"""FIXME."""', "FIXME"),
    ],
)
def test_a_dishonest_construct_is_found(text: str, what: str):
    assert what in [kind for kind, _ in faults(text)]


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    f()\nexcept (ValueError, OSError):\n    raise",
        "def reward(prompts, **columns):\n    return columns['answer']",
        "f(**settings)",
        "def __getattr__(name):\n    raise AttributeError(name)",
        "METHODOLOGY = 1",
    ],
)
def test_an_honest_construct_passes(text: str):
    assert not list(faults(text))
