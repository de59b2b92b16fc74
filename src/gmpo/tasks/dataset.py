"""Tasks from data sets of the `datasets` library: by hub name, saved folder, or data files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmpo.errors import DataError
from gmpo.tasks.rows import ReadRows, Row, RowForm, read_rows
from gmpo.tasks.splits import sides_of_rows
from gmpo.tasks.task import Task, task_of_sides

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

__all__ = ["dataset_task"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def dataset_task(  # noqa: PLR0913  (plain keywords, so that a recipe table maps onto them)
    *,
    name: str,
    config_name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    held_out_split: str | None = None,
    held_out_items: int = 0,
    split_seed: int = 0,
    instruction: str = "",
    form: RowForm | None = None,
    held_out_where: Mapping[str, Sequence[Any]] | None = None,
) -> Task:
    """A task from a data set's splits; `RowForm` says what the columns mean.

    Rows are read from the memory-mapped file one at a time, so the prompts are in memory once and
    the data set is not. An id is the split's name and the row's id, or its number from 0.

    Args:
        name: a hub name; a folder that `save_to_disk` wrote, of one data set or of several
            splits; or a folder of data files (parquet, JSON Lines, CSV).
        config_name: which configuration of a data set that has several.
        revision: branch, tag or commit of a hub data set. Where the hub cannot be reached, only a
            commit can be compared with what is in the cache, and anything else is refused.
        split: the rows to train on. One saved data set without splits has its own split's name,
            or "train".
        held_out_split: the rows to evaluate on, or None.
        held_out_items: rows to hold out, 0 for none; with `held_out_split`, how many of its rows
            to use, 0 for all.
        split_seed: decides which rows are held out.
        instruction: put on a line of its own after each problem; may be empty.
        form: of the rows of both sides.
        held_out_where: takes the place of the form's `where` for `held_out_split`.

    Raises:
        DataError: the library is not installed, the data set cannot be had, a split or column is
            not there, a row is not usable (split and row are named), or nothing is left to train
            on.
    """
    form = form or RowForm()
    if find_spec("datasets") is None:
        raise DataError("task.kind = 'dataset' needs datasets; pip install 'gmpo[data]'")
    if held_out_split == split:
        raise DataError(
            f"split and held_out_split are both {split!r}; leave held_out_split out to split "
            "held_out_items rows off"
        )
    wanted = [split] if held_out_split is None else [split, held_out_split]
    with _without_progress_bars():
        rows = _splits(name, config_name, revision, wanted)
    sides = sides_of_rows(
        _read(rows[split], form, name, split),
        None
        if held_out_split is None
        else _read(
            rows[held_out_split], replace(form, where=held_out_where or {}), name, held_out_split
        ),
        held_out_items=held_out_items,
        split_seed=split_seed,
        names=(f"{name}[{split}]", f"{name}[{held_out_split}]"),
        drops_shared=form.unusable == "drop",
    )
    return task_of_sides(Path(name).name, sides, instruction=instruction)


def _read(rows: Dataset, form: RowForm, name: str, split: str) -> ReadRows:
    source = f"{name}[{split}]"
    try:
        needed = form.needed_columns(rows.column_names)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    # A saved data set may carry a format that makes tensors of its rows.
    plain = rows.with_format(None).select_columns(needed)
    return read_rows(_rows(plain, source), form, source=source, id_prefix=f"{split}-")


def _rows(rows: Dataset, source: str) -> Iterator[Row]:
    number = 0
    try:
        for number, columns in enumerate(rows):
            yield Row(f"{source} row {number}", str(number), columns)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: a row after row {number} is not UTF-8 ({error}); save its file as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: a row after row {number} cannot be read: {error}") from error


def _splits(
    name: str, config_name: str | None, revision: str | None, wanted: Sequence[str]
) -> dict[str, Dataset]:
    """The splits asked for, memory-mapped."""
    import datasets

    folder = Path(name).expanduser()
    if revision is not None and folder.is_dir():
        raise DataError(f"revision is {revision!r}, but {name} is a folder and has none; remove it")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        if config_name is not None:
            raise DataError(
                f"config_name is {config_name!r}, but the saved data set {name} has none; remove it"
            )
        return _chosen(_saved_splits(folder), wanted, name)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(
            f"folder {name} does not exist; give a folder with a data set, or a hub name such as "
            "'openai/gsm8k'"
        )
    try:
        builder = datasets.load_dataset_builder(
            str(folder) if folder.is_dir() else name, config_name, revision=revision
        )
        _check_revision(builder, name, revision)
        builder.download_and_prepare()
        there = builder.info.splits or {}
        _refuse_absent(wanted, list(there), name)
        for split in wanted:
            if there[split].num_examples == 0:
                raise DataError(f"{name}[{split}] holds no row; it needs at least one")
        return {split: builder.as_dataset(split=split) for split in wanted}
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_not_loaded(name, error)) from error


def _saved_splits(folder: Path) -> dict[str, Dataset]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except IndexError as error:  # all the library says of a data set that was saved empty
        raise DataError(
            f"the data set saved in {folder} cannot be read ({error}); is one without rows in it?"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the data set saved in {folder} cannot be read: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        return {str(split): rows for split, rows in saved.items()}
    return {str(saved.split or "train"): saved}


def _chosen(splits: Mapping[str, Dataset], wanted: Sequence[str], name: str) -> dict[str, Dataset]:
    _refuse_absent(wanted, list(splits), name)
    return {split: splits[split] for split in wanted}


def _refuse_absent(wanted: Sequence[str], there: Sequence[str], name: str) -> None:
    for split in wanted:
        if split not in there:
            raise DataError(f"data set {name} has no split {split!r}; it has {list(there)}")


def _check_revision(builder: DatasetBuilder, name: str, revision: str | None) -> None:
    """Refuse a cached copy that is not, or not surely, of the revision asked for.

    Without the hub the library takes its newest cached copy, whatever revision is named.
    """
    is_cached_copy = type(builder).__module__.startswith("datasets.packaged_modules.cache.")
    if revision is None or not is_cached_copy or builder.hash == revision:
        return
    what = "another" if _COMMIT.fullmatch(revision) else "not comparable with it"
    raise DataError(
        f"the hub cannot be reached, and the cached copy of {name} is of commit {builder.hash}; "
        f"revision {revision!r} is {what}; name that commit, or go online"
    )


def _not_loaded(name: str, error: Exception) -> str:
    reasons = [str(error).strip(), str(error.__cause__ or "").strip()]
    lines = ("; ".join(line for line in reason.splitlines() if line) for reason in reasons)
    why = ": ".join(line for line in lines if line) or type(error).__name__
    return (
        f"data set {name} cannot be loaded ({type(error).__name__}: {why}); give a hub name that "
        "can be reached or is in the cache (HF_HUB_OFFLINE forbids reaching it), or a folder"
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """The library's bars off: a command prints its own lines, and JSON must stay alone."""
    import datasets

    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
