"""What `gmpo serve` puts behind its gateway: engines, servers, the router over them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gmpo.cli.conventions import warn
from gmpo.cli.serve_weights import EngineChanges, first_weights, follower_of, model_config
from gmpo.errors import ConfigError
from gmpo.serving.supervision import SupervisedTask

if TYPE_CHECKING:
    from gmpo.config import ModelConfig
    from gmpo.serving.backend import Backend
    from gmpo.serving.candidate_shadow import CandidateShadow
    from gmpo.serving.engine import EmbeddedBackend, EngineLimits
    from gmpo.serving.following import ChampionFollower
    from gmpo.serving.judging import AnswerJudge
    from gmpo.serving.recording import EventWriter
    from gmpo.serving.router import VariantRouter
    from gmpo.serving.routing_config import EngineSettings, RoutingConfig
    from gmpo.serving.shadowing import ShadowTraffic
    from gmpo.serving.splitting import TrafficSplit
    from gmpo.serving.upstream import UpstreamBackend
    from gmpo.store import Store

__all__ = ["Asked", "Behind", "Recorder", "Wanted", "build_behind", "wanted"]

_UPSTREAM_KEY = "GMPO_UPSTREAM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of `gmpo serve` that say what is served."""

    model: str | None
    name: str | None
    upstream: str | None
    dtype: str | None
    follow: str | None
    experiment: str | None
    task: str | None
    config: Path | None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be served.

    Attributes:
        config: backends and who is asked first.
        backend_of: backend's name for each model that an experiment's arm may name.
    """

    config: RoutingConfig
    backend_of: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """A store, and what writes to it."""

    store: Store
    events: EventWriter


def wanted(asked: Asked, recorder: Recorder | None) -> Wanted:
    """What the options say.

    Raises:
        ConfigError: they contradict each other, or need a store.
    """
    found = _configured(asked) if asked.config is not None else _named(asked, recorder)
    needs = found.config.needs_store
    if needs is not None and recorder is None:
        option = {"experiment": "--experiment", f"backends.{found.config.main}.follow": "--follow"}
        said = needs if asked.config is not None else option.get(needs, needs)
        raise ConfigError(f"{said} names something in the store; say which with --store")
    return found


def _configured(asked: Asked) -> Wanted:
    from gmpo.serving.routing_config import load_routing_config

    beside = {
        "MODEL": asked.model,
        "--name": asked.name,
        "--upstream": asked.upstream,
        "--dtype": asked.dtype,
        "--follow": asked.follow,
        "--experiment": asked.experiment,
        "--task": asked.task,
    }
    given = [option for option, value in beside.items() if value is not None]
    if given:
        raise ConfigError(f"--config says what is served; leave {given[0]} out")
    assert asked.config is not None
    config = load_routing_config(asked.config)
    return Wanted(config=config, backend_of={name: name for name in config.backends})


def _named(asked: Asked, recorder: Recorder | None) -> Wanted:
    from gmpo.serving.judging import QualitySettings
    from gmpo.serving.routing_config import EngineSettings, RoutingConfig
    from gmpo.serving.upstream import UpstreamSettings

    if asked.model is None:
        raise ConfigError("nothing to serve; name a MODEL, or give --config FILE")
    if asked.dtype not in (None, "auto", "fp32", "bf16"):
        raise ConfigError(f"--dtype is {asked.dtype!r}; allowed: fp32, bf16, auto")
    upstream = asked.upstream
    if upstream is not None and (asked.dtype is not None or asked.follow is not None):
        raise ConfigError("--dtype and --follow are of models here; leave them out with --upstream")
    if upstream is not None and not upstream.startswith(("http://", "https://")):
        raise ConfigError(
            f"--upstream is {upstream!r}; it must begin with http:// or https:// and end with /v1"
        )
    key = _UPSTREAM_KEY if os.environ.get(_UPSTREAM_KEY) else None

    def backend(model: str, follow: str | None = None) -> EngineSettings | UpstreamSettings:
        if upstream is not None:
            return UpstreamSettings(url=upstream, model=model, api_key_env=key)
        # The precision was looked at above; the type alone does not know.
        table = {"engine": model, "dtype": asked.dtype, "follow": follow}
        return EngineSettings.model_validate(table)

    main = asked.name or _last_part(asked.model)
    backends = {main: backend(asked.model, asked.follow)}
    backend_of = {asked.model: main}
    for arm in _other_arms(asked, recorder):
        if arm in backends:
            raise ConfigError(f"{arm!r} is the name of another model too; choose another --name")
        backends[arm], backend_of[arm] = backend(arm), arm
    config = RoutingConfig(
        name=main,
        main=main,
        experiment=asked.experiment,
        backends=backends,
        quality=QualitySettings(task=asked.task),
    )
    return Wanted(config=config, backend_of=backend_of)


def _other_arms(asked: Asked, recorder: Recorder | None) -> list[str]:
    """Models of the experiment besides MODEL."""
    if asked.experiment is None or recorder is None:
        return []
    from gmpo.abtest.plan import plan_of

    found = recorder.store.experiment(asked.experiment)
    models = [] if found is None else list(plan_of(found.config).models.values())
    if found is not None and asked.model not in models:
        raise ConfigError(
            f"experiment {asked.experiment!r} compares {' and '.join(models)}, and MODEL is "
            f"{asked.model}; serve one of the two, or map names to models in --config"
        )
    return [model for model in models if model != asked.model]


class _Counting(Protocol):
    """Something that counts what happens on the way to a backend."""

    @property
    def counts(self) -> Mapping[str, int]:
        """By name."""


@dataclass(kw_only=True)
class Behind:
    """What is behind the gateway.

    Attributes:
        router: chooses who answers.
        counting: what counts things on the way to the backends.
        upstreams: servers among them.
        engines: models of this process among them.
        split: assigns requests to the arms of an experiment, if there is one.
        beside: work that runs while it serves.
        reloads: what SIGHUP does.
        followers: of champions.
    """

    router: VariantRouter
    counting: list[_Counting]
    upstreams: Sequence[UpstreamBackend] = ()
    engines: Sequence[EmbeddedBackend] = ()
    split: TrafficSplit | None = None
    beside: list[SupervisedTask] = field(default_factory=list)
    reloads: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    followers: list[ChampionFollower] = field(default_factory=list)

    def counts(self) -> Mapping[str, int]:
        """What happened on the way to the backends and beside it, by name."""
        found: Counter[str] = Counter()
        for one in self.counting:
            found.update(one.counts)
        found["retries"] = sum(one.num_retries for one in self.upstreams)
        found["engine_failures"] = sum(one.num_failures for one in self.engines)
        found["beside_failures"] = sum(one.num_failures for one in self.beside)
        return found

    def lasts(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Have work go on beside the gateway, whatever happens to it."""
        self.beside.append(SupervisedTask(name, work, tell=warn))

    def following(self) -> list[Mapping[str, object]]:
        """Of each champion that is followed, the version wanted and the one served."""
        return [one.state() for one in self.followers]

    @property
    def experiment(self) -> Mapping[str, object] | None:
        """How the experiment stands that splits the traffic; None where none does."""
        return None if self.split is None else self.split.state()

    async def reload(self) -> None:
        """Load all models of this process anew."""
        if not self.reloads:
            warn("there is no model in this process to load anew")
        for one in self.reloads:
            await one()


def build_behind(
    found: Wanted, engine_limits: Callable[[], EngineLimits], recorder: Recorder | None
) -> Behind:
    """Connect, load and join.

    Args:
        found: what is to be served.
        engine_limits: of models in this process; without any it is not called, nor torch loaded.
        recorder: where experiment, shadow and champion are; None where nothing is recorded.

    Raises:
        gmpo.errors.GmpoError: a model cannot be loaded, or a setting is not allowed.
    """
    from gmpo.serving.judging import AnswerJudge, QualityRules
    from gmpo.serving.router import VariantRouter
    from gmpo.serving.routing_config import EngineSettings
    from gmpo.serving.upstream import UpstreamBackend

    config = found.config
    # What is quickly refused comes before a task is made, and both before models are loaded.
    upstreams = {
        name: UpstreamBackend(name, one)
        for name, one in config.backends.items()
        if not isinstance(one, EngineSettings)
    }
    split = _split(found, recorder)
    models = {
        name: (one, model_config(one.engine, one.dtype))
        for name, one in config.backends.items()
        if isinstance(one, EngineSettings)
    }
    rules = QualityRules.of(config.quality)
    engines = {
        name: _engine(name, model, settings, engine_limits(), recorder)
        for name, (settings, model) in models.items()
    }
    backends: dict[str, Backend] = {**upstreams, **engines}
    judge = AnswerJudge(rules)
    router = VariantRouter(
        config.name,
        backends,
        order=(config.main, *config.fallback),
        judge=judge,
        rules=config.breaker,
    )
    router.splitting = split
    router.shadowing = shadow = _shadow(config, recorder, backends, judge)
    candidates = _candidate_shadow(config, recorder, judge, shadow)
    if candidates is not None:
        router.shadowing = candidates

    behind = Behind(
        router=router,
        counting=[one for one in (router, judge, shadow, candidates, split) if one is not None],
        upstreams=[*upstreams.values()],
        engines=[*engines.values()],
        split=split,
    )
    if split is not None:
        behind.lasts(f"looking at experiment {config.experiment!r}", split.run)
    if candidates is not None:
        behind.lasts("looking for candidates to shadow", candidates.run)
    for engine in engines.values():
        _change(behind, config, engine, engine_limits(), recorder)
    return behind


def _shadow(
    config: RoutingConfig,
    recorder: Recorder | None,
    backends: Mapping[str, Backend],
    judge: AnswerJudge,
) -> ShadowTraffic | None:
    """The backend of the configuration that answers unseen, if there is one."""
    from gmpo.serving.shadowing import ShadowTraffic

    if config.shadow is None or recorder is None:
        return None
    return ShadowTraffic(
        backends[config.shadow.backend],
        config.shadow,
        judge=judge,
        put=recorder.events.put,
    )


def _candidate_shadow(
    config: RoutingConfig,
    recorder: Recorder | None,
    judge: AnswerJudge,
    beside: ShadowTraffic | None,
) -> CandidateShadow | None:
    """What has candidates of continual learning answer too; None where no champion is followed."""
    from gmpo.serving.candidate_shadow import CandidateShadow
    from gmpo.serving.routing_config import EngineSettings

    main = config.backends[config.main]
    if recorder is None or not isinstance(main, EngineSettings) or main.follow is None:
        return None
    return CandidateShadow(
        recorder.store,
        main.follow,
        judge=judge,
        put=recorder.events.put,
        tell=warn,
        beside=beside,
    )


def _split(found: Wanted, recorder: Recorder | None) -> TrafficSplit | None:
    if found.config.experiment is None or recorder is None:
        return None
    from gmpo.serving.splitting import TrafficSplit

    return TrafficSplit(
        recorder.store,
        found.config.experiment,
        backend_of=found.backend_of,
        put=recorder.events.put,
        tell=warn,
    )


def _engine(
    name: str,
    model: ModelConfig,
    settings: EngineSettings,
    limits: EngineLimits,
    recorder: Recorder | None,
) -> EmbeddedBackend:
    from gmpo.serving.engine import EmbeddedBackend

    store = None if recorder is None else recorder.store
    loaded = first_weights(model, store, settings.follow, max_rows=limits.max_rows)
    return EmbeddedBackend(loaded, name=name, limits=limits)


def _change(
    behind: Behind,
    config: RoutingConfig,
    engine: EmbeddedBackend,
    limits: EngineLimits,
    recorder: Recorder | None,
) -> None:
    """Have an engine's weights change on SIGHUP, or with the store's champion."""
    from gmpo.serving.routing_config import EngineSettings

    settings = config.backends[engine.name]
    assert isinstance(settings, EngineSettings)
    changes = EngineChanges(
        backend=engine,
        settings=settings,
        max_rows=limits.max_rows,
        events=None if recorder is None else recorder.events,
    )
    if settings.follow is None or recorder is None:
        behind.reloads.append(changes.reload)
        return
    follower = follower_of(recorder.store, settings.follow, changes)
    behind.followers.append(follower)
    behind.counting.append(follower)
    behind.reloads.append(follower.look_again)
    behind.lasts(f"following the champion of {settings.follow!r}", follower.run)


def _last_part(model: str) -> str:
    return Path(model).name or model
