"""The live test's own requests and the champion's answers to them, kept for the watch.

A cycle may wait for a person for days, and files of requests change meanwhile. So the watch asks
what was asked, and holds each answer against the one to the same request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gmpo.continual.plan import write_rows
from gmpo.continual.traffic import Answered
from gmpo.errors import DataError
from gmpo.records import Message, Prompt

__all__ = ["keep_asked", "read_asked"]

_ASKED = "asked.jsonl"


def keep_asked(folder: Path, prompts: Sequence[Prompt], champion: Sequence[Answered]) -> None:
    """Write requests and answers into a step's folder; `read_asked` brings them back.

    Args:
        folder: of the step.
        prompts: as they were asked; users may have written them, so the file is for its owner.
        champion: its answer to each.

    Raises:
        gmpo.errors.RunFolderError: the file cannot be written.
    """
    rows = [
        {"prompt": _prompt_row(prompt), "champion": asdict(answer)}
        for prompt, answer in zip(prompts, champion, strict=True)
    ]
    write_rows(folder / _ASKED, rows)


def read_asked(folder: Path) -> tuple[list[Prompt], list[Answered]]:
    """What `keep_asked` wrote there.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / _ASKED
    try:
        # Texts may hold characters that end a line for Python, though not for the file.
        with path.open(encoding="utf-8", newline="\n") as file:
            rows = [json.loads(line) for line in file]
        if not rows:
            raise ValueError("it is empty")
        prompts = [_prompt_of(row["prompt"]) for row in rows]
        return prompts, [Answered(**row["champion"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"what the champion answered in the live test cannot be read from {path} "
            f"({type(error).__name__}: {error}), so nothing can be held against it"
        ) from None


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    turns = None if prompt.messages is None else [asdict(turn) for turn in prompt.messages]
    columns = dict(prompt.columns)
    return {"id": prompt.id, "messages": turns, "text": prompt.text, "columns": columns}


def _prompt_of(row: dict[str, Any]) -> Prompt:
    turns = row["messages"]
    messages = None if turns is None else tuple(Message(**turn) for turn in turns)
    return Prompt(id=row["id"], messages=messages, text=row["text"], columns=row["columns"])
