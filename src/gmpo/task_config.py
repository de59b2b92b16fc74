"""The `[task]` table of a recipe: one form for each kind of task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ArithmeticTask",
    "BundledTask",
    "CountdownTask",
    "DatasetTask",
    "GivenTask",
    "GymTask",
    "JsonlTask",
    "Table",
    "TaskConfig",
]


class Table(BaseModel):
    """A table of a recipe: frozen; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class _TaskTable(Table):
    held_out_items: int = Field(default=500, ge=1)
    """Items kept for evaluation, never trained on, disjoint in meaning from the training items."""
    split_seed: int = 0
    """Seed of the split into training and held-out items, apart from the training seed."""


class ArithmeticTask(_TaskTable):
    """Procedural arithmetic, e.g. "What is 12 + 7?"."""

    kind: Literal["arithmetic"]
    """Selects this table."""
    operators: tuple[Literal["+", "-", "*"], ...] = Field(default=("+",), min_length=1)
    """Operators drawn from."""
    min_operand: int = 0
    """Smallest operand."""
    max_operand: int = 50
    """Largest operand."""
    num_terms: int = Field(default=2, ge=2, le=8)
    """Operands an expression has."""
    train_items: int | None = Field(default=None, ge=1)
    """Most training items; None takes all of a small space and 10,000 of a large one."""
    instruction: str = "Answer with just the number."
    """Sentence after the question."""


class CountdownTask(_TaskTable):
    """Procedural countdown: reach a target with the given numbers, each used once."""

    kind: Literal["countdown"]
    """Selects this table."""
    num_numbers: int = Field(default=3, ge=2, le=6)
    """Numbers an item offers."""
    max_number: int = Field(default=20, ge=2)
    """Largest number offered."""
    max_target: int = Field(default=100, ge=1)
    """Largest target."""
    train_items: int = Field(default=10_000, ge=1)
    """Training items."""
    instruction: str = "Answer with just the expression."
    """Sentence after the question."""


class _RowsTable(_TaskTable):
    held_out_items: int | None = Field(default=None, ge=1)  # type: ignore[assignment]
    """Held-out items; None takes all rows of the held-out side where one is named, and else splits
    500 off the training rows."""
    instruction: str = ""
    """Sentence after each problem."""
    prompt_column: str | None = None
    """Column of the problem, a text or a chat; None is `prompt`, or else `problem`."""
    answer_column: str | None = None
    """Column of the reference answer or of a list of accepted forms; None is `answer` and
    `answers`."""
    id_column: str | None = None
    """Column of the id; None is `id` where it is there."""
    keep_columns: tuple[str, ...] | None = None
    """Other columns that reward functions get; None is all."""
    answer_marked: bool = False
    r"""Whether the answer column holds a worked solution that marks its final answer, as in
    `\boxed{}` or after `####`."""
    where: dict[str, tuple[bool | int | float | str, ...]] = Field(default={})
    """Training rows count only if each column named here has one of the values listed for it; rows
    split off them too."""
    held_out_where: dict[str, tuple[bool | int | float | str, ...]] = Field(default={})
    """The same for the rows of a held-out side that is named."""
    unusable_rows: Literal["refuse", "drop"] = "refuse"
    """What is done with a row without usable problem or answer, and with a training problem that is
    also held out; drop leaves it out and says how many there were."""


class JsonlTask(_RowsTable):
    """JSON Lines with a problem and its answer in every row."""

    kind: Literal["jsonl"]
    """Selects this table."""
    path: str | tuple[str, ...]
    """Training rows: a file, a folder of them, or several of these."""
    held_out_path: str | tuple[str, ...] | None = None
    """Held-out rows; None splits `held_out_items` rows off `path`, equal texts on one side."""


class DatasetTask(_RowsTable):
    """A data set of the `datasets` library (extra `data`)."""

    kind: Literal["dataset"]
    """Selects this table."""
    name: str
    """A hub name, a folder that `save_to_disk` wrote, or a folder of data files."""
    config_name: str | None = None
    """Configuration of a data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; None is the newest."""
    split: str = "train"
    """Split of the training rows."""
    held_out_split: str | None = None
    """Split of the held-out rows; None splits `held_out_items` rows off `split`, equal texts on one
    side."""


class GymTask(_TaskTable):
    """A task of reasoning-gym (extra `gym`), judged by its own scorer."""

    kind: Literal["gym"]
    """Selects this table."""
    name: str
    """Task, as in `reasoning_gym.create_dataset`."""
    options: dict[str, Any] = Field(default={})
    """The task's own settings, as in `reasoning_gym.create_dataset`, but seed and size."""
    train_items: int = Field(default=2000, ge=1)
    """Training items."""
    instruction: str = ""
    """Sentence after each question."""


class BundledTask(_TaskTable):
    """Word problems that come with the package."""

    kind: Literal["svamp", "gsm8k"]
    """Selects this table and the data set."""
    instruction: str = "Answer with just the number."
    """Sentence after each problem."""


class GivenTask(_TaskTable):
    """Items that a Python caller handed over: a record of them, from which none can be made."""

    kind: Literal["given"]
    """Selects this table; `GMPOTrainer` writes it."""
    train_items: int = Field(ge=1)
    """Training items that were given."""
    held_out_items: int = Field(default=0, ge=0)
    """Held-out items that were given; 0 evaluates nothing."""
    digest: str
    """Of all items; a run is resumed with the same ones only."""


TaskConfig = Annotated[
    ArithmeticTask | CountdownTask | JsonlTask | DatasetTask | GymTask | BundledTask | GivenTask,
    Field(discriminator="kind"),
]
"""The `[task]` table; its `kind` selects which keys it has."""
