"""Tasks from JSON Lines: one problem with its answer a line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from gmpo.errors import DataError
from gmpo.records import Message, Prompt
from gmpo.tasks.task import Task, with_instruction

__all__ = ["jsonl_task", "normalized_text", "prompts_from_jsonl", "split_by_text"]


def jsonl_task(
    *,
    path: str | Path,
    held_out_path: str | Path | None = None,
    held_out_items: int = 0,
    split_seed: int = 0,
    instruction: str = "",
) -> Task:
    """A task from a file of rows `{"problem" or "prompt", "answer", ...}`, UTF-8, maybe gzipped.

    `problem` is a text; `prompt` is a text or a chat, a list of `{"role", "content"}` that ends
    in a user turn; a row with both is shown its `prompt`. `answer` is a text or a number (142.0
    is written "142"); `answers`, a list of accepted forms, may stand beside it or instead of it.
    `id` is optional and defaults to the file's name and line. All other fields go to the
    prompt's columns. Lines end at a line feed only: U+2028 inside a text does not break a row.

    Without `held_out_path`, `held_out_items` rows are split off by a hash of the problem's text,
    case and white space ignored, so that repeated problems stay on one side. With it, a problem
    that is in both files is refused.

    Args:
        path: the rows to train on; a name ending in .gz is decompressed.
        held_out_path: the rows to evaluate on, or None.
        held_out_items: rows to hold out, 0 for none; with `held_out_path`, how many of its rows
            to use, 0 for all.
        split_seed: decides which rows are held out.
        instruction: put on a line of its own after each problem; may be empty.

    Raises:
        DataError: a file is missing, unreadable or empty, a row is not usable (file and line are
            named), or the split leaves nothing to train on.
    """
    rows = _read(Path(path))
    if held_out_path is None:
        train, held_out = split_by_text(rows, held_out_items=held_out_items, split_seed=split_seed)
    else:
        train, others = rows, _read(Path(held_out_path))
        _refuse_overlap(train, others, f"{path} and {held_out_path}")
        held_out = others
        if held_out_items:
            _, held_out = split_by_text(
                others, held_out_items=held_out_items, split_seed=split_seed, may_take_all=True
            )
    return Task(
        name=Path(path).name.split(".")[0],
        train=tuple(with_instruction(prompt, instruction) for prompt in train),
        held_out=tuple(with_instruction(prompt, instruction) for prompt in held_out),
        instruction=instruction,
    )


def prompts_from_jsonl(content: bytes, *, source: str) -> list[Prompt]:
    """The prompts of one file's bytes; see `jsonl_task` for the form of a row.

    Args:
        content: the file, decompressed.
        source: its name in error messages and default ids.

    Raises:
        DataError: a row is not usable, an id is repeated, or there is no row.
    """
    stem = Path(source).name.split(".")[0]
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        row = _row(line, where)
        prompt = _prompt(row, where, default_id=f"{stem}-{number}")
        if prompt.id in line_of_id:
            earlier = line_of_id[prompt.id]
            _refuse(where, f"id {prompt.id!r} was used on line {earlier}; make the ids differ")
        line_of_id[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{source} holds no row; it needs at least one JSON object a line")
    return prompts


def split_by_text(
    prompts: Sequence[Prompt],
    *,
    held_out_items: int,
    split_seed: int,
    text_of: Callable[[Prompt], str] | None = None,
    may_take_all: bool = False,
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts; prompts of equal text are on the same side.

    Texts are ordered by a hash of the seed and the text, so a row's place does not depend on the
    other rows, and taken in that order while they fit. Both sides keep the order of `prompts`.

    Args:
        prompts: all of them.
        held_out_items: how many prompts to hold out, exactly.
        split_seed: decides which.
        text_of: what must not be on both sides; the normalised text of the last user turn
            by default.
        may_take_all: allow an empty training side.

    Raises:
        DataError: the split leaves no training prompt, or repeated texts do not fit.
    """
    most = len(prompts) - (0 if may_take_all else 1)
    if not 0 <= held_out_items <= most:
        raise DataError(
            f"held_out_items is {held_out_items} with {len(prompts)} rows; "
            f"it must be from 0 to {most}"
        )
    texts = [(text_of or _question_text)(prompt) for prompt in prompts]
    members: dict[str, list[int]] = {}
    for position, text in enumerate(texts):
        members.setdefault(text, []).append(position)
    held: set[int] = set()
    for text in sorted(members, key=lambda text: _digest(split_seed, text)):
        if len(held) + len(members[text]) <= held_out_items:
            held.update(members[text])
    if len(held) < held_out_items:
        raise DataError(
            f"{held_out_items} rows cannot be held out without putting one text on both sides "
            f"({len(held)} can); use that number or remove repeated rows"
        )
    train = [prompt for position, prompt in enumerate(prompts) if position not in held]
    return train, [prompts[position] for position in sorted(held)]


def normalized_text(text: str) -> str:
    """The text in lower case with single blanks, for telling whether two texts are the same."""
    return " ".join(text.casefold().split())


def _digest(split_seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{split_seed} {text}".encode()).digest()


def _question_text(prompt: Prompt) -> str:
    return normalized_text(prompt.messages[-1].content if prompt.messages else prompt.text or "")


def _refuse_overlap(train: Sequence[Prompt], held_out: Sequence[Prompt], files: str) -> None:
    known = {_question_text(prompt): prompt.id for prompt in train}
    shared = [prompt for prompt in held_out if _question_text(prompt) in known]
    if shared:
        first = shared[0]
        raise DataError(
            f"{len(shared)} problems are in both {files} (first: {first.id!r}, which is "
            f"{known[_question_text(first)]!r}); remove them from one file"
        )


def _read(path: Path) -> list[Prompt]:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give the path of a JSON Lines file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return prompts_from_jsonl(content, source=str(path))


def _refuse(where: str, problem: str) -> NoReturn:
    raise DataError(f"{where}: {problem}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        _refuse(where, f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
    except ValueError as error:
        _refuse(where, f"not readable as JSON ({error}); each line must be one JSON object")
    if not isinstance(row, dict):
        _refuse(where, f"a row must be a JSON object, this is {_shown(row)}")
    return row


def _prompt(row: dict[str, Any], where: str, *, default_id: str) -> Prompt:
    columns = dict(row)
    identity = columns.pop("id", default_id)
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        _refuse(where, f"id is {_shown(identity)}; it must be a text or a whole number")
    field = "prompt" if "prompt" in columns else "problem"
    if field not in columns:
        _refuse(where, "neither 'prompt' nor 'problem' is there; one of them must hold the problem")
    messages = _messages(columns.pop(field), where, field)
    answers = _answers(columns, where)
    return Prompt(id=str(identity), messages=messages, columns={**columns, **answers})


def _messages(value: object, where: str, field: str) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns or (field == "problem" and turns is value):
        allowed = "a text or a list of chat turns" if field == "prompt" else "a text"
        _refuse(where, f"{field} is {_shown(value)}; it must be {allowed}")
    messages = tuple(_message(turn, where) for turn in turns)
    if messages[-1].role != "user":
        _refuse(where, f"the chat ends in the turn of {messages[-1].role!r}; it must end in 'user'")
    return messages


def _message(turn: object, where: str) -> Message:
    fields = cast(dict[str, object], turn) if isinstance(turn, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(content, str) or not content.strip():
        _refuse(where, f"a turn or problem is {_shown(content)}; it must be a text with characters")
    if role == "system" or role == "user" or role == "assistant":
        return Message(role=role, content=content)
    _refuse(where, f"a turn has role {role!r}; it must be 'system', 'user' or 'assistant'")


def _answers(columns: dict[str, Any], where: str) -> dict[str, Any]:
    drop = "complete the row, or drop it from the file before training"
    given = columns.get("answers")
    accepted: list[str] = []
    if given is not None:
        if not isinstance(given, list) or not given:
            _refuse(where, f"answers is {_shown(given)}; it must be a list of one or more; {drop}")
        accepted = [_answer_text(value, where, drop) for value in given]
    if "answer" in columns or not accepted:
        answer = _answer_text(columns.get("answer"), where, drop)
    else:
        answer = accepted[0]
    return {"answer": answer, **({"answers": tuple(accepted)} if accepted else {})}


def _answer_text(value: object, where: str, drop: str) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        state = "missing" if value is None else _shown(value)
        _refuse(where, f"answer is {state}; it must be a text or a number; {drop}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
