"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60

# file: function: the limit it has instead, and why.
LONGER_FUNCTIONS: dict[tuple[str, str], tuple[int, str]] = {
    ("src/gmpo/training.py", "train"): (100, "the loop reads like the flow, a line a stage"),
}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for name in folders for path in (REPOSITORY / name).rglob("*.py"))


def function_lengths(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines, docstring and decorators aside, of each function."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            length -= first.end_lineno - first.lineno + 1
        yield node.name, length


def test_no_file_is_longer_than_500_lines():
    long = {
        str(path.relative_to(REPOSITORY)): count
        for path in python_files("src", "tests", "scripts", "benchmarks")
        if (count := len(path.read_text().splitlines())) > MOST_FILE_LINES
    }
    assert not long, f"split by what the parts are for: {long}"


def test_no_function_is_longer_than_60_lines():
    long = []
    for path in python_files("src", "scripts", "benchmarks"):
        name = str(path.relative_to(REPOSITORY))
        for function, length in function_lengths(path.read_text()):
            most, _ = LONGER_FUNCTIONS.get((name, function), (MOST_FUNCTION_LINES, ""))
            if length > most:
                long.append(f"{name}: {function} has {length} lines, at most {most}")
    assert not long, "\n".join(long)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("def f():\n    return 1\n", 2),
        ('def f():\n    """Doc.\n\n    More.\n    """\n    return 1\n', 2),
        ("@decorated\ndef f(\n    a,\n):\n    return a\n", 4),
    ],
)
def test_a_functions_length_leaves_out_its_docstring_and_decorators(text: str, length: int):
    assert list(function_lengths(text)) == [("f", length)]
