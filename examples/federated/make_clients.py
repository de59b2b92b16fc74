"""Sums of numbers to 50 for three clients, each with its own first numbers; items for the server.

    python make_clients.py FOLDER

Writes FOLDER/small.jsonl (first number 0 to 16), middle.jsonl (17 to 33), large.jsonl (34 to 50)
and items.jsonl, in which no sum of theirs is: 5 + 12 and 12 + 5 count as one.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

LARGEST = 50
NUM_ITEMS = 300


def row(a: int, b: int) -> dict[str, str]:
    """A question with its answer."""
    question = f"What is {a} + {b}? Answer with just the number."
    return {"id": f"{a}+{b}", "prompt": question, "answer": str(a + b)}


def main(folder: Path) -> None:
    """Write the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    sums = sorted({tuple(sorted(pair)) for pair in pairs})
    asked = set(random.Random(0).sample(sums, NUM_ITEMS))
    files = {"small": range(17), "middle": range(17, 34), "large": range(34, LARGEST + 1)}
    rows = {
        name: [row(a, b) for a, b in pairs if a in first and tuple(sorted((a, b))) not in asked]
        for name, first in files.items()
    }
    rows["items"] = [row(a, b) for a, b in sorted(asked)]
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
