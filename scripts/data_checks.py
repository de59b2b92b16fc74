"""What the checks of new rows find of faults put in on purpose, and what they say of sound rows.

Rows are GSM8K's training side, as it comes with the package; the suite to be kept out is its test
side. Poisoned answers are put into sums told in words, which a simulated model solves at a rate of
each row's own; its mistakes repeat themselves half of the time.

    python -m scripts.data_checks --json docs/results/data_checks.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.options import ends_clearly, results_file
from benchmarks.results import write_results
from tests.data_batches import poisoned, simulated_sampler, sums

from gmpo.data_checks.profile import dispute_test
from gmpo.data_checks.quality import DataChecks, profile_of, validate_batch
from gmpo.data_checks.rows import check_form
from gmpo.records import Prompt
from gmpo.suites import SUITES, suite_items
from gmpo.tasks import bundled_task
from gmpo.tracking import provenance

EACH = 60
"""Faults of each kind."""
SOUND = 2000
BATCHES = 100
BATCH, EARLIER = 200, 200
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)

Row = dict[str, Any]


def sound_rows() -> list[Row]:
    """GSM8K's training side."""
    train = bundled_task(name="gsm8k", instruction="").train
    return [
        {
            "id": prompt.id,
            "prompt": prompt.messages[-1].content if prompt.messages else "",
            "answer": prompt.columns["answer"],
        }
        for prompt in train
    ]


def edited(text: str, generator: random.Random) -> str:
    """One to three words without a digit replaced, left out or put in, and a sentence before."""
    words = text.split()
    for _ in range(generator.randint(1, 3)):
        place = generator.choice(
            [n for n, word in enumerate(words) if not any(map(str.isdigit, word))]
        )
        words[place : place + 1] = generator.choice(([], ["really"], [words[place], "indeed"]))
    start = generator.choice(("", "Here is a problem. ", "Solve this: "))
    return start + " ".join(words)


def resident_number(generator: random.Random) -> str:
    digits = (
        f"{generator.randint(50, 99)}{generator.randint(1, 12):02}{generator.randint(1, 28):02}"
    )
    digits += f"{generator.randint(1, 2)}{generator.randint(0, 99999):05}"
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    weighted = sum(int(d) * w for d, w in zip(digits, weights, strict=True))
    return f"{digits[:6]}-{digits[6:]}{(11 - weighted % 11) % 10}"


def card(generator: random.Random) -> str:
    digits = "4" + "".join(str(generator.randint(0, 9)) for _ in range(14))
    doubled = [int(d) * (1 if n % 2 else 2) for n, d in enumerate(digits)]
    total = sum(value - 9 if value > 9 else value for value in doubled)
    digits += str(-total % 10)
    gap = generator.choice(("", " ", "-"))
    return gap.join(digits[n : n + 4] for n in range(0, 16, 4))


def iban(generator: random.Random) -> str:
    account = "".join(str(generator.randint(0, 9)) for _ in range(18))
    check = 98 - int(account + "131400") % 97  # D is 13, E is 14
    return f"DE{check:02}{account}"


def personal(generator: random.Random) -> str:
    digits = lambda count: "".join(str(generator.randint(0, 9)) for _ in range(count))  # noqa: E731
    kinds: tuple[Callable[[], str], ...] = (
        lambda: f"{generator.choice(('kim', 'lee.j', 'a+b'))}{digits(3)}@mail{digits(2)}.co.kr",
        lambda: f"010{generator.choice(('-', '', ' '))}{digits(4)}-{digits(4)}",
        lambda: f"(2{digits(2)}) {generator.randint(200, 554)}-{digits(4)}",
        lambda: f"+44 20 {digits(4)} {digits(4)}",
        lambda: card(generator),
        lambda: iban(generator),
        lambda: resident_number(generator),
        lambda: "sk-" + "proj-" + "".join(generator.choices("abcdefXYZ0123456789", k=32)),
        lambda: "ghp_" + "".join(generator.choices("abcdefXYZ0123456789", k=36)),
    )
    return generator.choice(kinds)()


def planted(rows: list[Row], items: list[Prompt], generator: random.Random) -> list[Row]:
    """Rows with one fault each, named in `fault`."""
    chosen = iter(generator.sample(rows, 7 * EACH))
    faults: list[Row] = []

    def add(fault: str, row: Row) -> None:
        faults.append({**row, "id": f"planted {len(faults)}", "fault": fault})

    for _ in range(EACH):
        row = next(chosen)
        add("duplicate", {**row, "prompt": row["prompt"].upper().replace(" ", "  ")})
        row = next(chosen)
        add("near_duplicate", {**row, "prompt": edited(row["prompt"], generator)})
        row = next(chosen)
        add("contradiction", {**row, "answer": f"{row['answer']}1", "id_of_other": row["id"]})
        item = generator.choice(items)
        text = item.messages[-1].content if item.messages else ""
        words = text.split()
        kept = " ".join(words[: max(20, int(generator.uniform(0.4, 1) * len(words)))])
        add("contamination", {"prompt": f"My teacher asks: {kept} Help me.", "answer": "1"})
        row = next(chosen)
        add("pii", {**row, "prompt": f"{personal(generator)} {other(row)}"})
        row = next(chosen)
        wrong = generator.choice(("}", "It depends on " + "how one counts them, " * 5, "}{ 5"))
        add("unverifiable", {"prompt": other(row), "answer": wrong})
        row = next(chosen)
        broken: Row = generator.choice(
            ({"prompt": ""}, {"answer": None}, {"prompt": 5}, {"grading": "sums"}, {"answers": []})
        )
        add("schema", {"prompt": other(row), "answer": row["answer"], **broken})
    return faults


def other(row: Row) -> str:
    """A problem of a row that repeats none: its words backwards."""
    return " ".join(reversed(row["prompt"].split()))


def planted_faults(rows: list[Row]) -> list[dict[str, Any]]:
    """By check: faults put in, found by it, and rows without that fault that it rejects."""
    generator = random.Random(0)
    suite = suite_items(SUITES["gsm8k"], instruction="")
    clean = list(validate_batch(rows, suites=[suite]).accepted)
    sound = [dict(row) for row in generator.sample(clean, SOUND)]
    batch = sound + planted(sound, list(suite.prompts), generator)
    report = validate_batch(batch, suites=[suite])
    table = []
    # Of two rows that contradict each other both are rejected; the sound one is no mistake.
    partners = {row["id_of_other"] for row in batch if "id_of_other" in row}
    for fault in dict.fromkeys(row["fault"] for row in batch if "fault" in row):
        by_check = [
            one.row.get("fault")
            for one in report.rejected
            if fault in {reason.check for reason in one.reasons}
            and not (fault == "contradiction" and one.row.get("id") in partners)
        ]
        table.append(
            {
                "check": fault,
                "planted": EACH,
                "found": by_check.count(fault),
                "rejected_without_it": len(by_check) - by_check.count(fault),
            }
        )
    return table


def sound_data(rows: list[Row]) -> dict[str, int]:
    """What is rejected of GSM8K's training side as it is."""
    suite = suite_items(SUITES["gsm8k"], instruction="")
    report = validate_batch(rows, suites=[suite])
    for one in report.rejected[:40]:
        print(one.place, [(reason.check, reason.detail) for reason in one.reasons])
    return dict(report.counts)


def poisoning() -> list[dict[str, Any]]:
    """By share of wrong answers: batches refused, and disputed rows against wrong ones."""
    table = []
    for share in SHARES:
        refused = disputed = right = wrong = 0
        for number in range(BATCHES):
            sampler = simulated_sampler(seed=number)
            trusted = prompts_of(sums(EARLIER, seed=10_000 + number))
            batch = poisoned(sums(BATCH, seed=20_000 + number), round(share * BATCH), seed=number)
            profile = profile_of(trusted, sampler=sampler)
            report = validate_batch(batch, sampler=sampler, checks=DataChecks())
            test = dispute_test(report.profile, profile, alpha=0.01)
            refused += test is not None and test.is_alarm
            named = [one for one in report.rejected if "disputed" in {r.check for r in one.reasons}]
            disputed += len(named)
            right += sum("is_poisoned" in one.row for one in named)
            wrong += round(share * BATCH)
        table.append(
            {
                "share": share,
                "batches": BATCHES,
                "refused": refused,
                "wrong_answers": wrong,
                "disputed": disputed,
                "disputed_and_wrong": right,
            }
        )
        print(table[-1])
    return table


def prompts_of(rows: list[Row]) -> list[Prompt]:
    checked = check_form(rows, longest_problem=10_000)
    return [one.prompt for one in checked if one.prompt is not None]


@ends_clearly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=results_file, help="file for all figures")
    arguments = parser.parse_args(argv)
    rows = sound_rows()
    figures = {
        "sound": sound_data(rows),
        "planted": planted_faults(rows),
        "poisoned": poisoning(),
        "provenance": provenance(),
    }
    print(json.dumps(figures, indent=1))
    if arguments.json is not None:
        write_results(arguments.json, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
