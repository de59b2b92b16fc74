"""Data sets of the `datasets` library as users have them: saved, as files, in the hub cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sums(*numbers: int) -> list[dict[str, Any]]:
    """Rows that nobody could take for another's: n + n, with a worked answer."""
    return [
        {"question": f"What is {n} + {n}?", "answer": f"{n} and {n}\n#### {2 * n}", "level": n % 3}
        for n in numbers
    ]


def data_files(folder: Path, **splits: Sequence[dict[str, Any]]) -> Path:
    """A folder with one JSON Lines file a split."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def cache_as_hub(name: str, cache: Path, **splits: Sequence[dict[str, Any]]) -> None:
    """Put splits where the library keeps a hub data set that it has loaded before."""
    owner, _, stem = name.partition("/")
    files = data_files(cache.parent / "made" / stem, **splits)
    builder = datasets.load_dataset_builder(str(files), cache_dir=str(cache))
    builder.download_and_prepare()
    place = cache / f"{owner}___{stem}" / "default" / "0.0.0" / COMMIT
    place.parent.mkdir(parents=True)
    shutil.move(builder.cache_dir, place)
