"""The weights that engines of `gmpo serve` begin with, and how they change while it serves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gmpo.cli.conventions import model_name, say, warn
from gmpo.config import ModelConfig
from gmpo.errors import GmpoError, ModelError
from gmpo.recipe import load_recipe

if TYPE_CHECKING:
    from gmpo.registry import Registry
    from gmpo.serving.engine import EmbeddedBackend, ServedModel
    from gmpo.serving.following import ChampionFollower
    from gmpo.serving.recording import EventWriter
    from gmpo.serving.routing_config import EngineSettings
    from gmpo.store import ModelVersion, Store

__all__ = ["EngineChanges", "first_weights", "follower_of", "model_config"]


def first_weights(
    config: ModelConfig, store: Store | None, follow: str | None, *, max_rows: int
) -> ServedModel:
    """What an engine serves from its first request on: the champion, if one is followed.

    Where the champion cannot be served, the nearest whole version before it is, and where there is
    none the model itself; both are said.

    Args:
        config: of the model, by which versions are prompted too.
        store: where the champion is; None without one.
        follow: name of the model whose champion is served; None follows none.
        max_rows: completions decoded together.

    Raises:
        gmpo.errors.GmpoError: the model cannot be loaded, or the store not be read.
    """
    from gmpo.serving.engine import load_served_model

    champion = None if store is None or follow is None else store.champion(follow)
    if store is None or follow is None or champion is None:
        return load_served_model(config, max_rows=max_rows, warn=warn)
    version = store.model_version(champion.version)
    try:
        if version is None:
            raise ModelError(
                f"version {champion.version} is not registered, so nobody knows where its weights "
                "are"
            )
        return _load_version(config, version, max_rows=max_rows)
    except GmpoError as error:
        _complain(f"champion {champion.version} of {follow!r} cannot be served: {error}")
    try:
        version = _registry(store).servable(follow)
        if version.version != champion.version:
            loaded = _load_version(config, version, max_rows=max_rows)
            warn(f"version {version.version} serves until {champion.version} is restored")
            return loaded
    except GmpoError as error:
        _complain(f"nothing can be served in place of champion {champion.version}: {error}")
    warn(f"{config.name} serves until the champion of {follow!r} can be served")
    return load_served_model(config, max_rows=max_rows, warn=warn)


def model_config(model: str, dtype: str | None) -> ModelConfig:
    """A run's newest checkpoint, prompted as in training, or a model by name."""
    recipe = Path(model) / "recipe.toml"
    trained = load_recipe(recipe).model if recipe.is_file() else ModelConfig()
    changed = {"name": model_name(model), **({} if dtype is None else {"dtype": dtype})}
    return trained.model_copy(update=changed)


def follower_of(store: Store, name: str, changes: EngineChanges) -> ChampionFollower:
    """What has an engine serve a model's champion, and the version in its place if it cannot."""
    from gmpo.serving.following import ChampionFollower

    registry = _registry(store)
    return ChampionFollower(
        store,
        name,
        serve=changes.serve,
        served=lambda: changes.backend.model_version,
        tell=changes.complain,
        instead=lambda: registry.servable(name),
    )


@dataclass(frozen=True, kw_only=True)
class EngineChanges:
    """Changes of the weights that an engine serves."""

    backend: EmbeddedBackend
    settings: EngineSettings
    max_rows: int
    events: EventWriter | None

    async def reload(self) -> None:
        """Load the model anew; if that fails, the old one goes on serving."""
        before = self.backend.model_version
        try:
            await self._swap(
                lambda: self._load(model_config(self.settings.engine, self.settings.dtype))
            )
        except GmpoError as error:
            self.complain(f"{error}; version {before} goes on serving")
            return
        if self.backend.model_version == before:
            warn(f"the weights are still version {before}; nothing changed")

    async def serve(self, version: ModelVersion) -> None:
        """Serve a registered version, prompted as the model is."""

        def load() -> ServedModel:
            config = model_config(self.settings.engine, self.settings.dtype)
            return _load_version(config, version, max_rows=self.max_rows)

        await self._swap(load)

    def complain(self, message: str) -> None:
        """Say on stderr what could not be done."""
        _complain(message)

    def _load(self, config: ModelConfig) -> ServedModel:
        from gmpo.serving.engine import load_served_model

        return load_served_model(config, max_rows=self.max_rows)

    async def _swap(self, load: Callable[[], ServedModel]) -> None:
        swap = await self.backend.swap(load)
        if swap.version == swap.previous:
            return
        warn(f"version {swap.version} serves in place of {swap.previous}")
        if self.events is not None:
            from gmpo.store import Event

            payload = {"previous": swap.previous, "version": swap.version, "seconds": swap.seconds}
            self.events.put(
                Event(kind="swap", time=time.time(), payload=payload, model_version=swap.version)
            )


def _registry(store: Store) -> Registry:
    from gmpo.registry import Registry

    return Registry(store, Path("models"))  # only asked; versions lie where their rows say


def _load_version(config: ModelConfig, version: ModelVersion, *, max_rows: int) -> ServedModel:
    """A registered version, prompted as the model is.

    Raises:
        ModelError: it cannot be loaded, or the weights there are others.
    """
    from gmpo.serving.engine import load_served_model

    of_version = config.model_copy(update={"name": version.path})
    loaded = load_served_model(of_version, max_rows=max_rows)
    if loaded.version == version.version:
        return loaded
    raise ModelError(
        f"the weights at {version.path} are version {loaded.version}; somebody changed them: "
        "restore them, or register them as what they are"
    )


def _complain(message: str) -> None:
    say("error", message, style="red")
