"""Break the objective one edit at a time and check that a test notices each break.

Each edit is applied to a temporary copy of the package, on which the objective's tests then run.
An edit that no test notices survives: either a test is missing or the line is not needed. Exit code
1 if an edit survives, no longer applies, or leaves code that does not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from scripts.mutation_edits import EDITS, Edit

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "gmpo"
TEST_PATTERNS = (
    "unit/test_objective*.py",
    "unit/test_advantages.py",
    "equivalence/test_objective*.py",
)
LONGEST_RUN_SECONDS = 600

TESTS_PASSED, TESTS_FAILED = 0, 1
FAILED_TEST = re.compile(r"^FAILED (\S+::\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one edit did to the tests."""

    file: str
    why: str
    result: Literal["killed", "survived", "does not apply", "does not run"]
    noticed_by: str | None


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write the outcomes here too"
    )
    parser.add_argument("--only", metavar="TEXT", help="edits whose file or reason holds TEXT")
    parser.add_argument("--workers", type=int, default=2, help="edits tried at once (default 2)")
    arguments = parser.parse_args(argv)
    edits = [edit for edit in EDITS if not arguments.only or arguments.only in str(edit)]

    code, output = run_tests(None)
    if code != TESTS_PASSED:
        print(output)
        print(
            "the tests fail without any edit, so they cannot tell a broken objective from a whole"
        )
        return 1
    with ThreadPoolExecutor(arguments.workers) as pool:
        outcomes = []
        for outcome in pool.map(try_edit, edits):
            outcomes.append(outcome)
            print(row(outcome), flush=True)
    if arguments.json is not None:
        report = {"commit": commit(), "edits": [asdict(outcome) for outcome in outcomes]}
        write_results(arguments.json, report)
    num_killed = sum(outcome.result == "killed" for outcome in outcomes)
    print(f"{num_killed} of {len(outcomes)} edits killed")
    return 0 if outcomes and num_killed == len(outcomes) else 1


def commit() -> str:
    """Of the repository, marked if files were changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def try_edit(edit: Edit) -> Outcome:
    """Run the tests on a copy with one edit."""
    noticed_by = None
    result: Literal["killed", "survived", "does not apply", "does not run"]
    if (PACKAGE / edit.file).read_text().count(edit.old) != 1:
        result = "does not apply"
    else:
        code, output = run_tests(edit)
        failed = FAILED_TEST.search(output)
        if code == TESTS_PASSED:
            result = "survived"
        elif code == TESTS_FAILED and failed is not None:
            result, noticed_by = "killed", failed.group(1).partition("::")[2]
        else:
            # An import error or a hang is no proof that a test looks at the formula.
            result = "does not run"
    return Outcome(file=edit.file, why=edit.why, result=result, noticed_by=noticed_by)


def run_tests(edit: Edit | None) -> tuple[int, str]:
    """Exit code and output of the objective's tests on a fresh copy of the package."""
    tests = [
        path for pattern in TEST_PATTERNS for path in sorted((REPOSITORY / "tests").glob(pattern))
    ]
    if edit is not None:
        # The first failure ends the run, and it is most likely in the edited file's own tests.
        tests.sort(key=lambda path: not path.stem.endswith(Path(edit.file).stem))
    with tempfile.TemporaryDirectory(prefix="gmpo-mutation-") as folder:
        copy = Path(folder) / "gmpo"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "data"))
        if edit is not None:
            edited = copy / edit.file
            edited.write_text(edited.read_text().replace(edit.old, edit.new))
        # PYTHONPATH comes before the installed package.
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        options = ["-x", "-p", "no:cacheprovider", "--hypothesis-profile", "no_shrinking"]
        command = [sys.executable, "-m", "pytest", *options, *map(str, tests)]
        check_origin(folder, environment)
        try:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LONGEST_RUN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return -1, f"the tests ran longer than {LONGEST_RUN_SECONDS} s"
    return done.returncode, done.stdout + done.stderr


def check_origin(folder: str, environment: dict[str, str]) -> None:
    """Make sure that the tests will see the copy, not the package as it is."""
    program = "import gmpo; print(gmpo.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(folder), f"tests would import {done.stdout.strip()}"


def row(outcome: Outcome) -> str:
    """One line of the table: result, file, edit, and the first test that noticed."""
    return (
        f"{outcome.result:14}  {outcome.file:24}  {outcome.why:49}  {outcome.noticed_by or ''}"
    ).rstrip()


if __name__ == "__main__":
    sys.exit(main())
