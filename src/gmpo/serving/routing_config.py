"""The file of `gmpo serve --config`: backends, who is asked first, experiment, quality, shadow."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from gmpo.errors import ConfigError
from gmpo.serving.breaker import BreakerRules
from gmpo.serving.judging import QualitySettings
from gmpo.serving.shadowing import ShadowSettings
from gmpo.serving.upstream import UpstreamSettings
from gmpo.task_config import Table

__all__ = ["EngineSettings", "RoutingConfig", "load_routing_config", "routing_keys"]

_ENGINE, _UPSTREAM = "<engine>", "<upstream>"
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class EngineSettings(Table):
    """A model in this process."""

    engine: str = Field(min_length=1)
    """Model name, model folder, or run folder, as for `gmpo serve MODEL`."""
    dtype: Literal["auto", "fp32", "bf16"] | None = None
    """Precision; None is the run's own, or auto."""
    follow: str | None = None
    """Model of the store whose champion is served, once it is not `engine`."""


def _kind(table: object) -> str:
    keys = table if isinstance(table, Mapping) else vars(table)
    return _UPSTREAM if "url" in keys else _ENGINE


_Backend = Annotated[
    Annotated[EngineSettings, Tag(_ENGINE)] | Annotated[UpstreamSettings, Tag(_UPSTREAM)],
    Discriminator(_kind),
]


class RoutingConfig(Table):
    """Who answers, and who instead."""

    name: _Name
    """What clients call the model."""
    main: str
    """Backend that is asked first where no experiment decides."""
    fallback: tuple[str, ...] = ()
    """Backends that are asked, in this order, when one before them fails."""
    experiment: str | None = None
    """Experiment of the store that splits the traffic; its arms' models are names of backends."""
    backends: dict[_Name, _Backend] = Field(min_length=1)
    """By name: `engine` for a model in this process, `url` and `model` for a server."""
    quality: QualitySettings = QualitySettings()
    """How answers are scored."""
    breaker: BreakerRules = BreakerRules()
    """When a backend that keeps failing is left alone."""
    shadow: ShadowSettings | None = None
    """Backend that answers unseen."""

    @model_validator(mode="after")
    def _known_backends(self) -> RoutingConfig:
        shadow = [] if self.shadow is None else [self.shadow.backend]
        for key, names in (
            ("main", [self.main]),
            ("fallback", self.fallback),
            ("shadow.backend", shadow),
        ):
            unknown = [name for name in names if name not in self.backends]
            if unknown:
                raise ValueError(
                    f"{key} names {unknown[0]!r}, which is no backend; there are "
                    f"{list(self.backends)}"
                )
        if len({self.main, *self.fallback}) < 1 + len(self.fallback):
            raise ValueError(
                f"main {self.main!r} and fallback {list(self.fallback)} name a backend twice"
            )
        if shadow and isinstance(self.backends[shadow[0]], EngineSettings):
            raise ValueError(
                f"shadow.backend {shadow[0]!r} is an engine, which would take the cores of the "
                "served answers; serve it elsewhere and give its url"
            )
        return self

    @property
    def follows(self) -> bool:
        """Whether a model here is the champion of a name in the store."""
        engines = (one for one in self.backends.values() if isinstance(one, EngineSettings))
        return any(engine.follow is not None for engine in engines)

    @property
    def needs_store(self) -> str | None:
        """The first setting that does nothing without a store; None if there is none."""
        if self.experiment is not None:
            return "experiment"
        if self.shadow is not None:
            return "shadow"
        for name, backend in self.backends.items():
            if isinstance(backend, EngineSettings) and backend.follow is not None:
                return f"backends.{name}.follow"
        return None


def load_routing_config(path: Path) -> RoutingConfig:
    """Read a configuration.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has an unknown key (the nearest name
            is offered) or a value that is not allowed.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is not valid TOML: {error}") from None
    try:
        return RoutingConfig.model_validate(table)
    except ValidationError as error:
        found = "; ".join(_explained(dict(problem)) for problem in error.errors())
        raise ConfigError(f"configuration {path}: {found}") from None


def routing_keys() -> list[str]:
    """Every key, tables with a dot; a backend's name is `NAME`."""
    keys = [name for name in RoutingConfig.model_fields if name not in _TABLES]
    for table, models in _TABLES.items():
        place = "backends.NAME" if table == "backends" else table
        keys += [f"{place}.{key}" for model in models for key in model.model_fields]
    return keys


_TABLES: dict[str, tuple[type[BaseModel], ...]] = {
    "backends": (EngineSettings, UpstreamSettings),
    "quality": (QualitySettings,),
    "breaker": (BreakerRules,),
    "shadow": (ShadowSettings,),
}


def _explained(problem: Mapping[str, Any]) -> str:
    place = [str(part) for part in problem["loc"]]
    kind = next((part for part in place if part in (_ENGINE, _UPSTREAM)), None)
    place = [part for part in place if part not in (_ENGINE, _UPSTREAM, "[key]")]
    key = ".".join(place)
    if problem["type"] == "extra_forbidden":
        allowed = _siblings(place, kind)
        near = difflib.get_close_matches(place[-1], allowed, n=1)
        return f"unknown key {key!r}; " + (
            f"did you mean {near[0]!r}?" if near else f"allowed: {allowed}"
        )
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _siblings(place: list[str], kind: str | None) -> list[str]:
    """Keys of the table that a wrong key stands in."""
    if len(place) == 1:
        return list(RoutingConfig.model_fields)
    models = _TABLES[place[0]]
    if kind is not None:
        models = (EngineSettings if kind == _ENGINE else UpstreamSettings,)
    return [key for model in models for key in model.model_fields]
