"""What a tuning study may change: parameters with their ranges, and recipes made of their values.

Parameters are keys of the recipe but for `batch_size`, the rollouts of one optimizer step. A round
has the recipe's number of rollouts whatever is tuned, so that trials cost about the same: a larger
group takes fewer prompts, a smaller batch more steps.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.recipe import put_key, recipe_of_table, recipe_values

__all__ = [
    "TUNABLE",
    "Choices",
    "Parameter",
    "Range",
    "Space",
    "Value",
    "default_space",
    "own_values",
    "read_space",
    "recipe_with",
    "space_from_dict",
    "space_to_dict",
]

Value = int | float | str
"""Of a parameter."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Every number from `low` to `high`, both included; searched by its logarithm if `log`."""

    low: float
    high: float
    log: bool = False

    def holds(self, value: object) -> bool:
        """Whether a value may be taken."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def ends(self) -> tuple[Value, ...]:
        """The values between which all others lie."""
        return self.low, self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (", log" if self.log else "")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One of a few values; a single one is fixed."""

    values: tuple[Value, ...]

    def holds(self, value: object) -> bool:
        """Whether a value may be taken."""
        return value in self.values

    def ends(self) -> tuple[Value, ...]:
        """All of them."""
        return self.values

    def __str__(self) -> str:
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in self.values)


Parameter = Range | Choices
Space = Mapping[str, Parameter]
"""By key."""

_BATCH, _GROUP = "batch_size", "sampling.group_size"

TUNABLE: Mapping[str, type] = {
    _BATCH: int,
    _GROUP: int,
    "sampling.temperature": float,
    "training.learning_rate": float,
    "training.gradient_clip_norm": float,
    "training.weight_decay": float,
    "training.adam_beta1": float,
    "training.adam_beta2": float,
    "training.warmup_steps": int,
    "training.schedule": str,
    "training.final_learning_rate_fraction": float,
    "objective.clip_low": float,
    "objective.clip_high": float,
    "objective.clip_negative_high": float,
    "objective.kl_coefficient": float,
    "objective.entropy_coefficient": float,
    "objective.advantage_scale": str,
    "objective.advantage_eps": float,
    "reward.floor": float,
}
"""Every parameter there is and the kind of its values; only numbers of `float` have ranges."""

_ELSEWHERE = {
    "training.steps_per_round": "it follows from 'batch_size', the rollouts of a step",
    "sampling.prompts_per_round": "it follows from 'sampling.group_size': a round's rollouts stay",
    "training.rounds": "every trial has the recipe's rounds, or it would win by being longer",
    "training.seed": "it is that of all trials; --seeds names those of the last comparison",
    "objective.name": "clips of different objectives have different units; use gmpo compare",
}

_LOG_SPACE = Range(low=0.1, high=0.8)
_RATIO_SPACE = Range(low=0.1, high=0.5)
_CLIPS: Mapping[str, Range] = {
    "gmpo": _LOG_SPACE,
    "gmpo_no_norm": _LOG_SPACE,
    "gmpo_sequence_clip": _LOG_SPACE,
    "grpo": _RATIO_SPACE,
    "dr_grpo": _RATIO_SPACE,
    "gspo": Range(low=1e-4, high=1e-2, log=True),
}
"""By objective, in the objective's own unit; the article's 1.5 to 3 of the ratio is 0.4 to 1.1."""

_COEFFICIENTS = Choices(values=(0.0, 0.001, 0.003, 0.01, 0.03, 0.1))
_STEPS = (2, 4, 8)
_GROUPS = (4, 8, 16)


def default_space(recipe: RunConfig) -> dict[str, Parameter]:
    """The article's parameters as far as the recipe has them, group size and KL coefficient.

    Batch sizes are those of 2, 4 and 8 steps a round, group sizes 4, 8 and 16, where steps take
    whole groups and a round keeps its number of rollouts; what the recipe itself has is among them.
    """
    space: dict[str, Parameter] = {
        "training.learning_rate": Range(low=1e-6, high=1e-3, log=True),
        "objective.entropy_coefficient": _with(
            _COEFFICIENTS.values, recipe.objective.entropy_coefficient
        ),
        "objective.kl_coefficient": _with(_COEFFICIENTS.values, recipe.objective.kl_coefficient),
        **_sizes(recipe),
    }
    if recipe.objective.clips():
        for clip in ("clip_low", "clip_high"):
            space[f"objective.{clip}"] = _CLIPS[recipe.objective.name]
    if recipe.reward.combine == "geometric":
        space["reward.floor"] = Range(low=0.001, high=0.3, log=True)
    return space


def read_space(path: Path, recipe: RunConfig) -> dict[str, Parameter]:
    """The default space with what a TOML file says of single parameters; or the file's alone.

    A table a parameter, `low`, `high` and perhaps `log`, or `choices`; `replace = true` at the top
    leaves out every parameter that the file does not name.

    Raises:
        ConfigError: the file cannot be read, a parameter is unknown (the nearest name is offered)
            or does nothing in this recipe, or a value is not allowed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"space {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"space {path} is not valid TOML: {error}") from None
    replaces = table.pop("replace", False)
    if not isinstance(replaces, bool):
        raise ConfigError(f"space {path}: replace = {replaces!r} must be true or false")
    found = {key: _parameter(path, key, value) for key, value in _flat(path, "", table)}
    space = found if replaces else {**default_space(recipe), **found}
    if not space:
        raise ConfigError(f"space {path} replaces the default one and names no parameter")
    try:
        _require_valid(space, recipe)
    except ConfigError as error:
        raise ConfigError(f"space {path}: {error}") from None
    return space


def own_values(recipe: RunConfig, space: Space) -> dict[str, Value | None]:
    """What the recipe itself has for the parameters of a space; None for a key that is not set."""
    values = recipe_values(recipe)
    clips = {f"objective.{name}": value for name, value in recipe.objective.clips().items()}
    batch = recipe.sampling.prompts_per_round // recipe.training.steps_per_round
    sizes = {_BATCH: batch * recipe.sampling.group_size}
    scale = {"objective.advantage_scale": recipe.objective.scale()}
    known = {**values, **clips, **sizes, **scale}
    return {key: known.get(key) for key in space}


def recipe_with(recipe: RunConfig, values: Mapping[str, Value]) -> RunConfig:
    """The recipe with parameters at these values, a round's number of rollouts kept.

    Raises:
        ConfigError: together they are no recipe.
    """
    table = recipe.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        if key not in (_BATCH, _GROUP):
            put_key(table, key, value)
    own = own_values(recipe, {_BATCH: Choices(values=()), _GROUP: Choices(values=())})
    batch, group = (int(values.get(key, own[key])) for key in (_BATCH, _GROUP))  # type: ignore[arg-type]
    rollouts = recipe.sampling.prompts_per_round * recipe.sampling.group_size
    if rollouts % batch or batch % group:
        raise ConfigError(
            f"batch_size = {batch} with sampling.group_size = {group}: a batch must hold whole "
            f"groups, and the recipe's {rollouts} rollouts a round whole batches"
        )
    table["sampling"] |= {"group_size": group, "prompts_per_round": rollouts // group}
    table["training"]["steps_per_round"] = rollouts // batch
    shown = ", ".join(f"{key} = {value}" for key, value in values.items())
    return recipe_of_table(table, source=f"with {shown}")


def space_to_dict(space: Space) -> dict[str, dict[str, Any]]:
    """For JSON; `space_from_dict` brings it back."""
    return {
        key: {"choices": list(parameter.values)}
        if isinstance(parameter, Choices)
        else {"low": parameter.low, "high": parameter.high, "log": parameter.log}
        for key, parameter in space.items()
    }


def space_from_dict(table: Mapping[str, Mapping[str, Any]]) -> dict[str, Parameter]:
    """A space as `space_to_dict` wrote it."""
    return {
        key: Choices(values=tuple(entry["choices"])) if "choices" in entry else Range(**entry)
        for key, entry in table.items()
    }


def _with(values: Sequence[Value], own: float) -> Choices:
    return Choices(values=tuple(sorted({*values, own})))


def _sizes(recipe: RunConfig) -> dict[str, Parameter]:
    """Batch and group sizes any two of which fit together; left out where there is no choice."""
    group, steps = recipe.sampling.group_size, recipe.training.steps_per_round
    rollouts = recipe.sampling.prompts_per_round * group
    batches = {rollouts // count for count in _STEPS if rollouts % (count * group) == 0}
    batches.add(rollouts // steps)
    groups = {size for size in _GROUPS if all(batch % size == 0 for batch in batches)} | {group}
    found = {_BATCH: sorted(batches), _GROUP: sorted(groups)}
    return {key: Choices(values=tuple(sizes)) for key, sizes in found.items() if len(sizes) > 1}


def _flat(path: Path, prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key and table of each parameter, written as [a.b] or as ["a.b"]."""
    for name, value in table.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in TUNABLE and not _is_parameter(value):
            yield from _flat(path, f"{key}.", value)
        else:
            yield key, value


def _is_parameter(table: Mapping[str, Any]) -> bool:
    return not table or any(not isinstance(value, dict) for value in table.values())


def _parameter(path: Path, key: str, table: object) -> Parameter:
    where = f"space {path}: {key}"
    if key in _ELSEWHERE:
        raise ConfigError(f"{where} is not tuned: {_ELSEWHERE[key]}")
    if key not in TUNABLE:
        near = difflib.get_close_matches(key, TUNABLE, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TUNABLE)}"
        raise ConfigError(f"space {path}: there is no parameter {key!r}; {hint}")
    if not isinstance(table, dict):
        raise ConfigError(f"{where} = {table!r} must be a table with low and high, or choices")
    allowed = ("choices",) if "choices" in table else ("low", "high", "log")
    for name in table:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
            raise ConfigError(f"{where} has no setting {name!r}; {hint}")
    if "choices" in table:
        return _choices(where, table["choices"], TUNABLE[key])
    if TUNABLE[key] is not float:
        raise ConfigError(f"{where} has no range, but choices, e.g. choices = [...]")
    return _range(where, table)


def _choices(where: str, values: object, kind: type) -> Choices:
    accepted = int | float if kind is float else kind
    if (
        not isinstance(values, list)
        or not values
        or len(set(map(str, values))) < len(values)
        or any(isinstance(value, bool) or not isinstance(value, accepted) for value in values)
    ):
        name = {int: "whole numbers", float: "numbers", str: "texts"}[kind]
        raise ConfigError(f"{where}: choices = {values!r} must be a list of {name}, each once")
    return Choices(values=tuple(float(v) if kind is float else v for v in values))


def _range(where: str, table: Mapping[str, Any]) -> Range:
    low, high, log = table.get("low"), table.get("high"), table.get("log", False)
    for name, value in (("low", low), ("high", high)):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ConfigError(f"{where}: {name} = {value!r} must be a number")
    assert low is not None and high is not None
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: log = {log!r} must be true or false")
    if low >= high or (log and low <= 0):
        raise ConfigError(
            f"{where}: low = {low:g} and high = {high:g} must rise, from above 0 with log = true"
        )
    return Range(low=float(low), high=float(high), log=log)


def _require_valid(space: Space, recipe: RunConfig) -> None:
    """Refuse a space that holds what is no recipe, or what changes nothing."""
    if "reward.floor" in space and recipe.reward.combine != "geometric":
        raise ConfigError(
            f"reward.floor does nothing with reward.combine = {recipe.reward.combine!r}; remove it "
            "or set reward.combine to 'geometric'"
        )
    for key, parameter in space.items():
        if key in (_BATCH, _GROUP):
            continue
        for value in parameter.ends():
            recipe_with(recipe, {key: value})
    sizes = {key: space[key].ends() for key in (_BATCH, _GROUP) if key in space}
    for combination in product(*sizes.values()):
        recipe_with(recipe, dict(zip(sizes, combination, strict=True)))
