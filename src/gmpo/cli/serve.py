"""`gmpo serve`."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmpo.cli.conventions import model_name, refuses_clearly, say, warn
from gmpo.config import ModelConfig
from gmpo.errors import ConfigError, DependencyError, GmpoError, ModelError
from gmpo.recipe import load_recipe

if TYPE_CHECKING:
    from gmpo.serving.access import ApiKeys
    from gmpo.serving.anomaly_watch import AnomalyWatch
    from gmpo.serving.app import GatewayLimits
    from gmpo.serving.engine import EmbeddedBackend, EngineLimits, ServedModel
    from gmpo.serving.entrance import Entrance
    from gmpo.serving.figures import GatewayFigures
    from gmpo.serving.following import ChampionFollower
    from gmpo.serving.recording import EventWriter
    from gmpo.store import ModelVersion, Store

__all__ = ["serve"]

_INTERRUPTED = 130


_LearnAnew = Annotated[
    bool,
    typer.Option("--learn-anew", help="Forget what --store says is usual for these models."),
]
_RecordTexts = Annotated[
    bool,
    typer.Option(
        "--record-texts",
        help='Keep texts in --store too, of requests that say "store": true; see docs/data.md.',
    ),
]
_Name = Annotated[
    str | None, typer.Option(help="What clients call it; default: the last part of MODEL.")
]
_Keys = Annotated[
    Path | None, typer.Option(help="File of API keys, one a line; default: GMPO_API_KEYS.")
]
_StoreUrl = Annotated[
    str | None, typer.Option(help="Where answers are recorded: a SQLite file or a PostgreSQL URL.")
]
_Follow = Annotated[
    str | None,
    typer.Option(help="Model of --store whose champion is served, once it is not MODEL."),
]
_Dtype = Annotated[
    str | None, typer.Option(help="fp32, bf16 or auto; default: the run's own, or auto.")
]
_MaxRunning = Annotated[
    int, typer.Option(min=1, help="Completions taken at once; other requests wait.")
]
_DrainSeconds = Annotated[
    float, typer.Option(min=0.0, help="How long requests may go on after SIGTERM.")
]


@refuses_clearly
def serve(
    model: Annotated[str, typer.Argument(help="Model name, model folder, or run folder.")],
    name: _Name = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8000,
    api_keys: _Keys = None,
    store: _StoreUrl = None,
    follow: _Follow = None,
    dtype: _Dtype = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Completions decoded together.")] = 32,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024,
    max_running: _MaxRunning = 64,
    max_queued: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    queue_seconds: Annotated[float, typer.Option(min=0.0, help="Longest wait.")] = 30.0,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest answer.")] = 600.0,
    drain_seconds: _DrainSeconds = 30.0,
    learn_anew: _LearnAnew = False,
    record_texts: _RecordTexts = False,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Longest body.")] = 1 << 20,
) -> None:
    """Serve a model to OpenAI's clients until SIGTERM or Ctrl-C; SIGHUP loads MODEL anew."""
    _require_packages()
    from gmpo.serving.access import read_api_keys
    from gmpo.serving.admission import AdmissionLimits
    from gmpo.serving.app import GatewayLimits
    from gmpo.serving.engine import EngineLimits
    from gmpo.serving.entrance import EntranceLimits
    from gmpo.serving.server import bound_socket

    keys = read_api_keys(api_keys)
    if not keys and not _is_loopback(host):
        warn(f"no API keys are set: whoever reaches {host} may ask; set GMPO_API_KEYS")
    limits = GatewayLimits(
        entrance=EntranceLimits(max_body_bytes=max_body_bytes),
        admission=AdmissionLimits(
            max_running=max_running, max_queued=max_queued, queue_seconds=queue_seconds
        ),
        request_seconds=request_seconds,
    )
    engine = EngineLimits(
        max_rows=max_rows, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens
    )
    given = {"--follow": follow, "--learn-anew": learn_anew, "--record-texts": record_texts}
    if store is None and any(given.values()):
        option = next(name for name, value in given.items() if value)
        raise ConfigError(f"{option} is about what a store holds; say which with --store")
    recording = _recording(store, learn_anew=learn_anew, record_texts=record_texts)
    with bound_socket(host, port) as bound, recording as records:
        changes = _Changes(
            backend=_backend(model, dtype, name or _last_part(model), engine),
            model=model,
            dtype=dtype,
            max_rows=max_rows,
            events=records.events,
        )
        gateway = _gateway(changes.backend, limits, keys, records)
        follower = None if follow is None else _follower(records, follow, changes)
        _run(gateway, bound, changes, follower, records.watch, drain_seconds)


def _require_packages() -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise DependencyError(
                f"gmpo serve needs {package}; install it with pip install 'gmpo[serve]'"
            )


@dataclass(frozen=True, kw_only=True)
class _Records:
    """The gateway's figures, and its store with what writes to it, where there is one."""

    figures: GatewayFigures
    watch: AnomalyWatch
    events: EventWriter | None = None
    store: Store | None = None


@contextmanager
def _recording(url: str | None, *, learn_anew: bool, record_texts: bool) -> Iterator[_Records]:
    """Open the store, and write what waits before it is closed."""
    from gmpo.host_memory import resident_bytes
    from gmpo.serving.anomaly_watch import AnomalyWatch, stored_baselines
    from gmpo.serving.figures import GatewayFigures
    from gmpo.serving.recording import EventWriter
    from gmpo.store import open_store

    if url is None:
        figures = GatewayFigures()
        yield _Records(figures=figures, watch=AnomalyWatch(figures))
        return
    opened = open_store(url)
    baselines = {} if learn_anew else stored_baselines(opened)
    gauges: GatewayFigures | None = None

    def sample() -> dict[str, float]:
        going_on = {} if gauges is None else gauges.gauges()
        return {"memory_bytes": resident_bytes(), **going_on}

    writer = EventWriter(opened, sample=sample, record_texts=record_texts)
    gauges = figures = GatewayFigures(events=writer.counts)
    try:
        watch = AnomalyWatch(figures, put=writer.put, baselines=baselines)
        yield _Records(figures=figures, watch=watch, events=writer, store=opened)
    finally:
        writer.close()
        opened.close()
        if writer.num_lost or writer.num_refused:
            warn(
                f"{writer.num_lost} events were lost and {writer.num_refused} refused by store "
                f"{opened.where}; {writer.num_written} were written"
            )


def _backend(model: str, dtype: str | None, name: str, limits: EngineLimits) -> EmbeddedBackend:
    from gmpo.serving.engine import EmbeddedBackend, load_served_model

    config = _model_config(model, dtype)
    loaded = load_served_model(config, max_rows=limits.max_rows, warn=warn)
    return EmbeddedBackend(loaded, name=name, limits=limits)


def _gateway(
    backend: EmbeddedBackend, limits: GatewayLimits, keys: ApiKeys, records: _Records
) -> Entrance:
    from gmpo.serving.app import build_gateway
    from gmpo.serving.backend import OneBackendRouter

    return build_gateway(
        OneBackendRouter(backend),
        limits=limits,
        keys=keys,
        observers=(
            records.watch.observe,
            *(() if records.events is None else (records.events.observe,)),
        ),
        figures=records.figures,
    )


@dataclass(frozen=True, kw_only=True)
class _Changes:
    """Changes of the weights that serve."""

    backend: EmbeddedBackend
    model: str
    dtype: str | None
    max_rows: int
    events: EventWriter | None

    async def reload(self) -> None:
        """Load the model anew; if that fails, the old one goes on serving."""
        before = self.backend.model_version
        try:
            await self._swap(lambda: self._load(_model_config(self.model, self.dtype)))
        except GmpoError as error:
            self.complain(f"{error}; version {before} goes on serving")
            return
        if self.backend.model_version == before:
            warn(f"the weights are still version {before}; nothing changed")

    async def serve(self, version: ModelVersion) -> None:
        """Serve a registered version, prompted as the model is."""

        def load() -> ServedModel:
            config = _model_config(self.model, self.dtype).model_copy(update={"name": version.path})
            loaded = self._load(config)
            # In bf16 the loaded weights have another digest than those on disk.
            if version.version in (loaded.version, _version_on_disk(Path(version.path))):
                return replace(loaded, version=version.version)
            raise ModelError(
                f"the weights at {version.path} are version {loaded.version}; somebody changed "
                "them: restore them, or register them as what they are"
            )

        await self._swap(load)

    def complain(self, message: str) -> None:
        """Say on stderr what could not be done."""
        say("error", message, style="red")

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


def _follower(records: _Records, name: str, changes: _Changes) -> ChampionFollower:
    from gmpo.serving.following import ChampionFollower

    assert records.store is not None
    return ChampionFollower(
        records.store,
        name,
        serve=changes.serve,
        served=lambda: changes.backend.model_version,
        tell=changes.complain,
    )


def _run(
    gateway: Entrance,
    bound: socket.socket,
    changes: _Changes,
    follower: ChampionFollower | None,
    watch: AnomalyWatch,
    drain_seconds: float,
) -> None:
    """Serve until a signal ends it."""
    from gmpo.serving.server import GatewayServer, ServerSettings

    server = GatewayServer(
        gateway,
        settings=ServerSettings(drain_seconds=drain_seconds),
        reload=changes.reload if follower is None else follower.look_again,
        started=lambda: _announce(changes.backend, bound),
        beside=(watch.run, *(() if follower is None else (follower.run,))),
    )
    asyncio.run(server.serve(sockets=[bound]))
    if server.num_cut:
        warn(
            f"{server.num_cut} requests had not ended after {drain_seconds:g} seconds and were cut"
        )
    if server.ended_by == signal.SIGINT:
        raise typer.Exit(_INTERRUPTED)


def _model_config(model: str, dtype: str | None) -> ModelConfig:
    """A run's newest checkpoint, prompted as in training, or a model by name."""
    if dtype not in (None, "auto", "fp32", "bf16"):
        raise ConfigError(f"--dtype is {dtype!r}; allowed: fp32, bf16, auto")
    recipe = Path(model) / "recipe.toml"
    trained = load_recipe(recipe).model if recipe.is_file() else ModelConfig()
    changed = {"name": model_name(model), **({} if dtype is None else {"dtype": dtype})}
    return trained.model_copy(update=changed)


def _version_on_disk(folder: Path) -> str | None:
    from gmpo.model_files import holds_weights, weights_version

    return weights_version(folder) if holds_weights(folder) else None


def _last_part(model: str) -> str:
    return Path(model).name or model


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _announce(backend: EmbeddedBackend, bound: socket.socket) -> None:
    host, port = bound.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(
        f"serving {backend.name} (version {backend.model_version}) at http://{where}/v1",
        flush=True,
    )
