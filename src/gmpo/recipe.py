"""Recipes found, read, overridden and written: the files behind `gmpo.config`."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.task_config import TaskConfig

__all__ = [
    "apply_override",
    "bundled_recipes",
    "dump_recipe",
    "explain_settings",
    "load_recipe",
    "put_key",
    "recipe_keys",
    "recipe_of_table",
    "recipe_values",
    "settings_of",
]

_Settings = TypeVar("_Settings", bound=BaseModel)


def bundled_recipes() -> dict[str, str]:
    """Name and TOML text of each recipe that comes with the package."""
    folder = resources.files("gmpo") / "recipes"
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe of a bundled name or a path, with `table.key=value` overrides applied.

    A bare name is the bundled recipe where there is one, whatever lies in the current folder; a
    text that ends in .toml or has a path separator is always a path.

    Raises:
        ConfigError: no such recipe, not TOML, an unknown key (the nearest name is offered), or a
            value that is not allowed.
    """
    table = _parse(_recipe_text(source), source=str(source))
    for override in overrides:
        apply_override(table, override)
    return recipe_of_table(table, source=str(source))


def recipe_of_table(table: Mapping[str, Any], *, source: str) -> RunConfig:
    """The recipe that a parsed TOML table is.

    Args:
        table: by key, nested.
        source: where it came from, for messages.

    Raises:
        ConfigError: an unknown key (the nearest name is offered), or a value that is not allowed.
    """
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise ConfigError(_explain(error, source=source)) from None


def dump_recipe(config: RunConfig) -> str:
    """The resolved recipe as TOML; keys that are None are left out, which means the same."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def recipe_values(config: RunConfig) -> dict[str, Any]:
    """The resolved recipe as one flat table, by `table.key`; keys that are None are left out."""
    flat: dict[str, Any] = {}

    def add(prefix: str, table: dict[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    add("", config.model_dump(mode="json", exclude_none=True))
    return flat


def recipe_keys() -> list[str]:
    """Every key a recipe can have, as `table.key`, in order of definition."""
    keys: list[str] = []
    for name, model in _tables():
        keys += [f"{name}.{key}" for key in model.model_fields if f"{name}.{key}" not in keys]
    return keys


def _tables() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in RunConfig.model_fields.items():
        if name == "task":
            union = get_args(TaskConfig)[0]
            yield from (("task", model) for model in get_args(union))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def _recipe_text(source: str | Path) -> str:
    bundled = bundled_recipes()
    name = str(source)
    if name in bundled:  # a bare name; a file of that name is meant by ./NAME or NAME.toml
        return bundled[name]
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"recipe {path} is not UTF-8 text: {error}; save it as UTF-8"
            ) from None
        except OSError as error:
            raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None
    near = difflib.get_close_matches(name, bundled, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"there is no recipe {name!r}: neither a file nor one of {sorted(bundled)}{hint}"
    )


def _parse(text: str, *, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {source} is not valid TOML: {error}") from None


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set what `table.key=value` says in a nested table; the value is TOML, or else a text.

    Raises:
        ConfigError: it has not that form, or what should hold the key is a value.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"override {override!r} is not table.key=value; example: training.rounds=20"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    try:
        put_key(table, path.strip(), value)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def put_key(table: dict[str, Any], path: str, value: object) -> None:
    """Set `table.key` in a nested table.

    Raises:
        ConfigError: what should hold the key is a value.
    """
    *tables, last = path.split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name!r} is a value, not a table")
    table[last] = value


def settings_of(model: type[_Settings], settings: Mapping[str, Any] | str, *, of: str) -> _Settings:
    """The model that settings by name are.

    Args:
        model: a table of settings.
        settings: values by name, or a text of JSON.
        of: what they are settings of, for messages.

    Raises:
        ConfigError: an unknown setting (the nearest name is offered), or a value not allowed.
    """
    try:
        if isinstance(settings, str):
            return model.model_validate_json(settings)
        return model.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(explain_settings(error, model, of=of)) from None


def explain_settings(error: ValidationError, model: type[BaseModel], *, of: str) -> str:
    """A model's validation error as one sentence, with the nearest name of an unknown setting."""
    sentences = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            sentences.append(f"unknown setting {name!r}; {_name_meant(model, problem['loc'])}")
            continue
        if problem["type"] == "missing":
            sentences.append(f"missing setting {name!r}")
            continue
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "value_error":
            # Our own sentences hold the value; that of a whole model would be all of its settings.
            sentences.append(f"{name}: {message}" if name else message)
        else:
            sentences.append(f"{name} = {problem['input']!r}: {message[0].lower()}{message[1:]}")
    return f"{of}: {'; '.join(sentences)}"


def _name_meant(model: type[BaseModel], place: Sequence[str | int]) -> str:
    """What stands beside an unknown setting, where it lies in a table that has one form."""
    table: object = model
    for part in place[:-1]:
        field = table.model_fields.get(str(part)) if _is_table(table) else None
        table = None if field is None else field.annotation
    if not _is_table(table):
        return "leave it out"
    names = list(table.model_fields)
    near = difflib.get_close_matches(str(place[-1]), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {names}"


def _is_table(found: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(found, type) and issubclass(found, BaseModel)


def _explain(error: ValidationError, *, source: str) -> str:
    lines = [_explain_one(dict(problem)) for problem in error.errors()]
    head = f"recipe {source}: "
    return head + (lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines))


def _explain_one(problem: dict[str, Any]) -> str:
    # The discriminated union puts the task's kind into the location.
    place = [str(part) for part in problem["loc"]]
    kind = place.pop(1) if len(place) > 1 and place[0] == "task" else None
    key = ".".join(place)
    kinds = f"one of {', '.join(repr(name) for name in _task_kinds())}"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest_or_all(place, kind)}"
    if problem["type"] == "missing" and key != "task":
        return f"missing key {key!r}; add it to the recipe or pass --set {key}=..."
    if problem["type"] in ("missing", "union_tag_not_found"):
        return f"missing key 'task.kind'; add it to the recipe or pass --set task.kind=..., {kinds}"
    if problem["type"] == "union_tag_invalid":
        return f"task.kind = {problem['ctx']['tag']!r}: must be {kinds}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _nearest_or_all(place: list[str], kind: str | None) -> str:
    """The key most likely meant, of this kind of task or of another table; else all siblings."""
    if len(place) == 1:
        siblings = elsewhere = list(RunConfig.model_fields)
    else:
        siblings = [
            f"{name}.{key}"
            for name, model in _tables()
            if name == place[0] and (kind is None or kind in _kinds_of(model))
            for key in model.model_fields
        ]
        elsewhere = [key for key in recipe_keys() if not key.startswith(f"{place[0]}.")]
    near = difflib.get_close_matches(".".join(place), [*siblings, *elsewhere], n=1)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {siblings}"


def _task_kinds() -> list[str]:
    """Those that a person can choose; items that were given in Python come with no recipe."""
    kinds = [kind for name, model in _tables() if name == "task" for kind in _kinds_of(model)]
    return [kind for kind in kinds if kind != "given"]


def _kinds_of(model: type[BaseModel]) -> tuple[str, ...]:
    return get_args(model.model_fields["kind"].annotation)
