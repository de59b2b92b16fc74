"""What a federation does: who trains on what, how updates become a model, what is asked of it."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gmpo.config import RunConfig
from gmpo.errors import ConfigError
from gmpo.federated.settings import CLIENT_NAME, MOST_UPDATES, AggregationSettings
from gmpo.gate.policy import GatePolicy
from gmpo.recipe import apply_override, load_recipe, recipe_of_table, recipe_values, settings_of
from gmpo.task_config import JsonlTask, Table

__all__ = [
    "FederatedPlan",
    "Federation",
    "JudgingSettings",
    "load_federated_plan",
    "resolve_federation",
]


class JudgingSettings(Table):
    """What the server asks a new model before the next round begins with it."""

    suites: dict[str, str] = Field(default={})
    """File of each suite's items, by name: rows of `prompt` or `problem`, and `answer`. None asks
    what the recipe's task holds out."""
    items: int | None = Field(default=None, ge=2)
    """Items of each suite that are asked, at most; None asks all."""
    samples: int = Field(default=1, ge=1)
    """Completions an item; 1 asks greedily, more are sampled."""
    degradation_limit: float = Field(default=0.05, gt=0, lt=0.5)
    """Margin of the gate, a share of all items; on each of several suites twice as much."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Error rate of its decisions."""
    in_doubt: Literal["accept", "keep"] = "accept"
    """What becomes of a model that is shown neither to be worse nor not to be worse: rounds are
    small steps, and few items rule no drop out. A release needs a pass of `gmpo gate`."""

    @field_validator("suites")
    @classmethod
    def _names_are_names(cls, suites: dict[str, str]) -> dict[str, str]:
        for name in suites:
            if not CLIENT_NAME.fullmatch(name) or name == "overall":
                raise ValueError(
                    f"suite {name!r} must begin with a letter or digit, go on with letters, "
                    "digits, '.', '_' or '-', and not be 'overall', which is all of them"
                )
        return suites

    def policy(self) -> GatePolicy:
        """The gate's margins and levels."""
        return GatePolicy(
            degradation_limit=self.degradation_limit, alpha=self.alpha, growth_limits={}
        )


class FederatedPlan(Table):
    """A federation as its TOML file says it."""

    recipe: str = "quickstart"
    """Bundled recipe or path: what every client trains by, its task apart."""
    overrides: tuple[str, ...] = ()
    """`table.key=value` of that recipe."""
    rounds: int = Field(default=4, ge=1)
    """Times that clients train and a new model is made; `training.rounds` of the recipe are the
    local rounds of one client in one of them."""
    clients: dict[str, dict[str, Any]] = Field(min_length=2, max_length=MOST_UPDATES)
    """By name what a client's recipe has of its own, as tables: mostly a `task`. A task with a
    `kind` stands in place of the recipe's, one without changes its keys."""
    aggregation: AggregationSettings = AggregationSettings()
    """From updates to the next model."""
    judging: JudgingSettings = JudgingSettings()
    """What the next model is asked."""
    gap_items: int = Field(default=16, ge=0)
    """Items on which each new model is compared with the exact geometric mean of the clients'
    policies; 0 leaves it out."""

    @field_validator("clients")
    @classmethod
    def _names_are_names(cls, clients: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in clients:
            if not CLIENT_NAME.fullmatch(name):
                raise ValueError(
                    f"client {name!r} must begin with a letter or digit and go on with letters, "
                    "digits, '.', '_' or '-'"
                )
        alike = Counter(name.casefold() for name in clients)
        if len(alike) < len(clients):
            twice = [name for name in clients if alike[name.casefold()] > 1]
            raise ValueError(f"clients {', '.join(twice)} differ in case alone; rename them")
        return clients

    @model_validator(mode="after")
    def _enough_are_asked(self) -> FederatedPlan:
        least = self.aggregation.min_clients
        if least is not None and least > len(self.clients):
            raise ValueError(
                f"aggregation.min_clients is {least}, and there are {len(self.clients)} clients"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A plan with its recipes read.

    Attributes:
        plan: as it was written.
        recipe: of the server: how the model is loaded and asked.
        clients: the recipe of each client.
    """

    plan: FederatedPlan
    recipe: RunConfig
    clients: Mapping[str, RunConfig]

    def as_dict(self) -> dict[str, Any]:
        """For `federation.json`; `from_dict` brings it back."""
        return {
            "plan": self.plan.model_dump(mode="json", exclude_none=True),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "clients": {
                name: recipe.model_dump(mode="json", exclude_none=True)
                for name, recipe in self.clients.items()
            },
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, source: str) -> Federation:
        """As `as_dict` wrote it.

        Args:
            table: what it wrote.
            source: for messages.

        Raises:
            ConfigError: it is not of this version.
        """
        return cls(
            plan=settings_of(FederatedPlan, table["plan"], of="plan"),
            recipe=recipe_of_table(table["recipe"], source=source),
            clients={
                name: recipe_of_table(recipe, source=f"{source}, client {name}")
                for name, recipe in table["clients"].items()
            },
        )

    def differences(self, other: Federation) -> list[str]:
        """What another one has otherwise, key by key, in words."""
        mine, theirs = self._flat(), other._flat()
        return [
            f"{key} is {theirs.get(key, 'absent')!r}, and was {mine.get(key, 'absent')!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def _flat(self) -> dict[str, Any]:
        flat: dict[str, Any] = {f"recipe: {k}": v for k, v in recipe_values(self.recipe).items()}
        for name, recipe in self.clients.items():
            flat |= {f"client {name}: {key}": v for key, v in recipe_values(recipe).items()}
        # The gap is only measured: nothing else depends on it.
        told = {"recipe", "overrides", "clients", "gap_items"}
        own = self.plan.model_dump(mode="json", exclude=told)
        return flat | {f"plan: {key}": value for key, value in own.items()}


def load_federated_plan(path: Path, overrides: Sequence[str] = ()) -> FederatedPlan:
    """The plan of a TOML file.

    Args:
        path: of the file.
        overrides: `key=value` of the plan, e.g. `rounds=2` or `aggregation.rule=mean`.

    Raises:
        ConfigError: it cannot be read, has an unknown key (the nearest is offered), or a value that
            is not allowed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"plan {path} cannot be read: {error}") from None
    for override in overrides:
        apply_override(table, override)
    return settings_of(FederatedPlan, table, of="plan")


def resolve_federation(plan: FederatedPlan) -> Federation:
    """The plan with the recipe of every client; files are named from the root.

    Raises:
        ConfigError: there is no such recipe, or what a client changes is not allowed.
    """
    recipe = load_recipe(plan.recipe, plan.overrides)
    if recipe.evaluation.measure != "accuracy":
        raise ConfigError(
            f"evaluation.measure is {recipe.evaluation.measure!r}, and the server of a federation "
            "judges by graded answers; set it to 'accuracy' and name items with judging.suites"
        )
    base = recipe.model_dump(mode="json", exclude_none=True)
    clients = {
        name: recipe_of_table(_changed(base, own), source=f"client {name} of the plan")
        for name, own in plan.clients.items()
    }
    clients = {name: _rooted(client) for name, client in clients.items()}
    suites = {name: str(Path(path).absolute()) for name, path in plan.judging.suites.items()}
    judging = plan.judging.model_copy(update={"suites": suites})
    plan = plan.model_copy(update={"judging": judging})
    for name, client in clients.items():
        if client.model != recipe.model:
            raise ConfigError(
                f"client {name} changes [model]; all clients train the round's model as it is "
                "loaded by the recipe: set it there"
            )
    return Federation(plan=plan, recipe=_rooted(recipe), clients=clients)


def _rooted(recipe: RunConfig) -> RunConfig:
    """The recipe with its task's files as they are found from any folder."""
    task = recipe.task
    if not isinstance(task, JsonlTask):
        return recipe

    def rooted(path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(path, str):
            return str(Path(path).absolute())
        return tuple(str(Path(one).absolute()) for one in path)

    held_out = task.held_out_path
    paths = {
        "path": rooted(task.path),
        "held_out_path": None if held_out is None else rooted(held_out),
    }
    return recipe.model_copy(update={"task": task.model_copy(update=paths)})


def _changed(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's tables with a client's own keys in them."""
    found = dict(base)
    for key, value in own.items():
        there = found.get(key)
        replaces = key == "task" and isinstance(value, Mapping) and "kind" in value
        if isinstance(value, Mapping) and isinstance(there, Mapping) and not replaces:
            found[key] = _changed(there, value)
        else:
            found[key] = value
    return found
