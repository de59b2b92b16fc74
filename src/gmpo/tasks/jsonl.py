"""Tasks from JSON Lines: one problem with its answer a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

from gmpo.errors import DataError
from gmpo.records import Prompt
from gmpo.tasks.rows import ReadRows, Row, RowForm, read_rows
from gmpo.tasks.splits import sides_of_rows
from gmpo.tasks.task import Task, task_of_sides

__all__ = ["jsonl_rows", "jsonl_rows_and_faults", "jsonl_task", "prompts_from_jsonl"]

_Paths = str | Path | Sequence[str | Path]


def jsonl_task(  # noqa: PLR0913  (plain keywords, so that a recipe table maps onto them)
    *,
    path: _Paths,
    held_out_path: _Paths | None = None,
    held_out_items: int = 0,
    split_seed: int = 0,
    instruction: str = "",
    form: RowForm | None = None,
    held_out_where: Mapping[str, Sequence[Any]] | None = None,
) -> Task:
    """A task from files of rows `{"problem" or "prompt", "answer", ...}`, UTF-8, maybe gzipped.

    `RowForm` says what the columns mean. An id is optional and defaults to the file's name and
    line. Lines end at a line feed only: U+2028 inside a text does not break a row.

    Without `held_out_path`, `held_out_items` rows are split off by a hash of the problem's text,
    case and white space ignored, so that repeated problems stay on one side. With it, a problem
    that is on both sides is refused, or left out of training where the form drops what is not
    usable.

    Args:
        path: the rows to train on: a file, a folder (its files *.jsonl and *.jsonl.gz, by name),
            or several of these; a name ending in .gz is decompressed.
        held_out_path: the rows to evaluate on, likewise, or None.
        held_out_items: rows to hold out, 0 for none; with `held_out_path`, how many of its rows
            to use, 0 for all.
        split_seed: decides which rows are held out.
        instruction: put on a line of its own after each problem; may be empty.
        form: of the rows of both sides.
        held_out_where: takes the place of the form's `where` for `held_out_path`.

    Raises:
        DataError: a file is missing, unreadable or empty, a row is not usable (file and line are
            named), or the split leaves nothing to train on.
    """
    form = form or RowForm()
    files = _files(path)
    sides = sides_of_rows(
        _read(files, form),
        None
        if held_out_path is None
        else _read(_files(held_out_path), replace(form, where=held_out_where or {})),
        held_out_items=held_out_items,
        split_seed=split_seed,
        names=(_named(path), _named(held_out_path or path)),
        drops_shared=form.unusable == "drop",
    )
    name = _stem(path if isinstance(path, str | Path) else files[0])
    return task_of_sides(name, sides, instruction=instruction)


def jsonl_rows(path: _Paths) -> Iterator[Row]:
    """The rows of files, one in memory at a time, whatever their columns are.

    Args:
        path: as for `jsonl_task`.

    Raises:
        DataError: a file is missing or unreadable, or a line is no JSON object.
    """
    for file in _files(path):
        yield from _rows(_lines(file), str(file))


def jsonl_rows_and_faults(path: _Paths) -> Iterator[Row | tuple[str, DataError]]:
    """As `jsonl_rows`, but a line that is no JSON object comes as its text and what is wrong.

    Bytes that are not UTF-8 are escaped in that text.

    Args:
        path: as for `jsonl_task`.

    Raises:
        DataError: a file is missing or unreadable.
    """
    for file in _files(path):
        for number, line in enumerate(_lines(file), start=1):
            try:
                yield from _rows([line], str(file), first=number)
            except DataError as error:
                yield line.decode("utf-8", errors="backslashreplace").rstrip("\n"), error


def prompts_from_jsonl(lines: Iterable[bytes], *, source: str) -> list[Prompt]:
    """The prompts of one file's lines, in the usual form of rows.

    Args:
        lines: of the file, decompressed, split at line feeds.
        source: its name in error messages and default ids.

    Raises:
        DataError: a row is not usable, an id is repeated, or there is no row.
    """
    return read_rows(_rows(lines, source), RowForm(), source=source).prompts


def _read(files: Sequence[Path], form: RowForm) -> ReadRows:
    return read_rows(jsonl_rows(files), form, source=", ".join(map(str, files)))


def _files(path: _Paths) -> list[Path]:
    """The files that a path, a folder or several of them name."""
    given = [path] if isinstance(path, str | Path) else list(path)
    files: list[Path] = []
    for place in map(Path, given):
        if not place.is_dir():
            files.append(place)
            continue
        inside = sorted([*place.glob("*.jsonl"), *place.glob("*.jsonl.gz")])
        if not inside:
            raise DataError(f"folder {place} holds no *.jsonl or *.jsonl.gz; give one that does")
        files += inside
    if not files:
        raise DataError("no path is given; name a JSON Lines file, a folder of them, or several")
    return files


def _named(path: _Paths) -> str:
    return str(path) if isinstance(path, str | Path) else ", ".join(map(str, path))


def _stem(file: str | Path) -> str:
    return Path(file).name.split(".")[0]


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, one in memory at a time."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give the path of a JSON Lines file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _rows(lines: Iterable[bytes], source: str, *, first: int = 1) -> Iterator[Row]:
    stem = _stem(source)
    for number, line in enumerate(lines, start=first):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            place = f"{source}:{number}"
            yield Row(place, f"{stem}-{number}", _columns(text, place))


def _columns(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{place}: not readable as JSON ({error}); each line must be one JSON object"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be a JSON object, this is {str(row)[:60]}")
    return cast(dict[str, Any], row)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
