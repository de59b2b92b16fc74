"""Scripts and benchmarks say in one line what they cannot do, after however long a run."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# What ends a call before any work, as the type of an option, and so what main goes on to write.
OPTIONS = {"results_file", "plotted_results_file", "plot_file"}
# Tells itself, with exit code 2, as bad input ends elsewhere: what it reads is its user's.
TELLS_ITSELF = {"scripts/check_answers.py"}


def programs_that_write() -> dict[str, ast.FunctionDef]:
    """`main` of every script and benchmark that takes a file to write, by path."""
    found = {}
    for folder in ("scripts", "benchmarks"):
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            body = ast.parse(path.read_text()).body
            imported = {
                alias.name
                for node in body
                if isinstance(node, ast.ImportFrom) and node.module == "benchmarks.options"
                for alias in node.names
            }
            main = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == "main"]
            if imported & OPTIONS and main:
                found[str(path.relative_to(REPOSITORY))] = main[0]
    return found


def test_a_program_that_writes_results_ends_with_a_line_where_they_cannot_be_written():
    programs = programs_that_write()
    assert {"scripts/stability_study.py", "benchmarks/vs_trl.py"} <= set(programs)
    undecorated = {
        path
        for path, main in programs.items()
        if not any(isinstance(d, ast.Name) and d.id == "ends_clearly" for d in main.decorator_list)
    }
    assert undecorated == TELLS_ITSELF
