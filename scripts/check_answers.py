"""The share of reference answers that the grader accepts as equal to themselves, file by file.

A reference that is not even equal to itself can be earned by no completion: training on it is
noise, and an evaluation on it understates. Each is put as a completion in two forms, as it stands
and in a box, and every accepted form of an answer counts.

    python -m scripts.check_answers FOLDER --json FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import BenchmarkError, results_file
from benchmarks.results import write_results

from gmpo.errors import ConfigError, GmpoError
from gmpo.grading import Grader, Verdict
from gmpo.tasks import jsonl_task
from gmpo.tracking import provenance

FORMS: dict[str, Callable[[str], str]] = {
    "as it stands": lambda answer: answer,
    "boxed": lambda answer: rf"The answer is \boxed{{{answer}}}.",
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds *.jsonl, or is one such file")
    parser.add_argument(
        "--failures", type=int, default=0, help="show so many of each file and form"
    )
    parser.add_argument("--time-limit", type=float, default=2.0, help="seconds for one comparison")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="write counts and failures here"
    )
    arguments = parser.parse_args(words)
    checked: list[dict[str, Any]] = []
    try:
        files = files_at(arguments.folder)
        print(f"| file | answers | {' | '.join(FORMS)} | by math-verify | timed out |")
        print("|---" * (len(FORMS) + 4) + "|")
        with Grader(time_limit_seconds=arguments.time_limit) as grader:
            for file in files:
                checked.append(check(file, grader))
                print(table_row(checked[-1]), flush=True)
                show_failures(checked[-1], arguments.failures)
        if arguments.json:
            write_results(arguments.json, {"made_with": provenance(), "files": checked})
    except (BenchmarkError, GmpoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def files_at(path: Path) -> list[Path]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no *.jsonl; give a folder of JSON Lines files, or one")
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a folder of JSON Lines files, or one")
    return files


def check(file: Path, grader: Grader) -> dict[str, Any]:
    """A file's counts, and each form of an answer that was not accepted."""
    before = grader.counts
    references = [
        (prompt.id, form, prompt.columns)
        for prompt in jsonl_task(path=file).train
        for form in prompt.columns.get("answers", (prompt.columns["answer"],))
    ]
    right, failures = {}, []
    for name, write in FORMS.items():
        verdicts = [grader.grade_item(write(form), columns) for _, form, columns in references]
        right[name] = sum(verdict.is_correct for verdict in verdicts)
        failures += [
            {"item": identity, "form": name, "answer": form, **told(verdict)}
            for (identity, form, _), verdict in zip(references, verdicts, strict=True)
            if not verdict.is_correct
        ]
    after = grader.counts
    return {
        "file": file.stem,
        "answers": len(references),
        "right": right,
        **{name: after[name] - before[name] for name in ("math_verify", "timeouts")},
        "failures": failures,
    }


def told(verdict: Verdict) -> dict[str, str | None]:
    return {"read_as": verdict.answer, "status": verdict.status}


def table_row(checked: dict[str, Any]) -> str:
    answers = checked["answers"]
    shares = [f"{right} ({right / answers:.2%})" for right in checked["right"].values()]
    cells = [checked["file"], answers, *shares, checked["math_verify"], checked["timeouts"]]
    return f"| {' | '.join(map(str, cells))} |"


def show_failures(checked: dict[str, Any], num_shown: int) -> None:
    """On standard error, up to so many of each form."""
    for name in FORMS:
        failed = [failure for failure in checked["failures"] if failure["form"] == name]
        for failure in failed[:num_shown]:
            print(
                f"{checked['file']} {failure['item']} {name}: {failure['answer']!r} was read as "
                f"{failure['read_as']!r}, {failure['status']}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
