"""The share of reference answers that the grader accepts as equal to themselves, file by file.

A reference that is not even equal to itself can be earned by no completion: training on it is
noise, and an evaluation on it understates. Each is put as a completion in two forms, as it stands
and in a box, and every accepted form of an answer counts.

    python scripts/check_answers.py FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from gmpo.errors import GmpoError
from gmpo.grading import Grader, Verdict
from gmpo.tasks import jsonl_task

FORMS: dict[str, Callable[[str], str]] = {
    "as it stands": lambda answer: answer,
    "boxed": lambda answer: rf"The answer is \boxed{{{answer}}}.",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds *.jsonl, or is one such file")
    parser.add_argument(
        "--failures", type=int, default=0, help="show so many of each file and form"
    )
    parser.add_argument("--time-limit", type=float, default=2.0, help="seconds for one comparison")
    arguments = parser.parse_args()
    files = [arguments.folder]
    if arguments.folder.is_dir():
        files = sorted(arguments.folder.glob("*.jsonl"))
    print(f"| file | answers | {' | '.join(FORMS)} | by math-verify | timed out |")
    print("|---" * (len(FORMS) + 4) + "|")
    try:
        with Grader(time_limit_seconds=arguments.time_limit) as grader:
            for file in files:
                print(row_of(file, grader, arguments.failures), flush=True)
    except GmpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def row_of(file: Path, grader: Grader, num_shown: int) -> str:
    """A file's line of the table; failures go to standard error."""
    before = grader.counts
    references = [
        (prompt.id, form, prompt.columns)
        for prompt in jsonl_task(path=file).train
        for form in prompt.columns.get("answers", (prompt.columns["answer"],))
    ]
    shares = []
    for name, write in FORMS.items():
        verdicts = [grader.grade_item(write(form), columns) for _, form, columns in references]
        right = sum(verdict.is_correct for verdict in verdicts)
        shares.append(f"{right} ({right / len(references):.2%})")
        failed = [
            f"{file.name} {identity} {name}: {told(form, verdict)}"
            for (identity, form, _), verdict in zip(references, verdicts, strict=True)
            if not verdict.is_correct
        ]
        for line in failed[:num_shown]:
            print(line, file=sys.stderr)
    after = grader.counts
    symbolic, late = (after[key] - before[key] for key in ("math_verify", "timeouts"))
    return f"| {file.stem} | {len(references)} | {' | '.join(shares)} | {symbolic} | {late} |"


def told(form: str, verdict: Verdict) -> str:
    return f"{form!r} was read as {verdict.answer!r}, {verdict.status}"


if __name__ == "__main__":
    sys.exit(main())
