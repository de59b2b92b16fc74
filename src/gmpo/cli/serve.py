"""`gmpo serve`."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmpo.cli.conventions import model_name, refuses_clearly, say, warn
from gmpo.config import ModelConfig
from gmpo.errors import ConfigError, DependencyError, GmpoError
from gmpo.recipe import load_recipe

if TYPE_CHECKING:
    from gmpo.serving.access import ApiKeys
    from gmpo.serving.app import GatewayLimits
    from gmpo.serving.engine import EmbeddedBackend, EngineLimits, ServedModel
    from gmpo.serving.entrance import Entrance
    from gmpo.serving.figures import GatewayFigures
    from gmpo.serving.recording import EventWriter

__all__ = ["serve"]

_INTERRUPTED = 130


@refuses_clearly
def serve(
    model: Annotated[str, typer.Argument(help="Model name, model folder, or run folder.")],
    name: Annotated[
        str | None, typer.Option(help="What clients call it; default: the last part of MODEL.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; default: GMPO_API_KEYS.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Where answers are recorded: a SQLite file or a PostgreSQL URL."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or auto; default: the run's own, or auto.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Completions decoded together.")] = 32,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024,
    max_running: Annotated[
        int, typer.Option(min=1, help="Completions taken at once; other requests wait.")
    ] = 64,
    max_queued: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    queue_seconds: Annotated[float, typer.Option(min=0.0, help="Longest wait.")] = 30.0,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest answer.")] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="How long requests may go on after SIGTERM.")
    ] = 30.0,
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
    with bound_socket(host, port) as bound, _recording(store) as (figures, events):
        load = _loader(model, dtype, engine)
        backend = _backend(load, name or _last_part(model), engine)
        gateway = _gateway(backend, limits, keys, figures, events)
        reload = partial(_reload, backend, load, events)
        _run(gateway, bound, reload, drain_seconds, partial(_announce, backend, host))


def _require_packages() -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise DependencyError(
                f"gmpo serve needs {package}; install it with pip install 'gmpo[serve]'"
            )


@contextmanager
def _recording(store: str | None) -> Iterator[tuple[GatewayFigures, EventWriter | None]]:
    """The gateway's figures, and what writes its events where there is a store for them."""
    from gmpo.host_memory import resident_bytes
    from gmpo.serving.figures import GatewayFigures
    from gmpo.serving.recording import EventWriter
    from gmpo.store import open_store

    if store is None:
        yield GatewayFigures(), None
        return
    opened = open_store(store)
    figures: GatewayFigures | None = None

    def sample() -> dict[str, float]:
        going_on = {} if figures is None else figures.gauges()
        return {"memory_bytes": resident_bytes(), **going_on}

    writer = EventWriter(opened, sample=sample)
    figures = GatewayFigures(events=writer.counts)
    try:
        yield figures, writer
    finally:
        writer.close()
        opened.close()
        if writer.num_lost or writer.num_refused:
            warn(
                f"{writer.num_lost} events were lost and {writer.num_refused} refused by store "
                f"{opened.where}; {writer.num_written} were written"
            )


def _loader(model: str, dtype: str | None, limits: EngineLimits) -> Callable[[], ServedModel]:
    from gmpo.serving.engine import load_served_model

    def load() -> ServedModel:
        config = _model_config(model, dtype)
        return load_served_model(config, max_rows=limits.max_rows, warn=warn)

    return load


def _backend(load: Callable[[], ServedModel], name: str, limits: EngineLimits) -> EmbeddedBackend:
    from gmpo.serving.engine import EmbeddedBackend

    return EmbeddedBackend(load(), name=name, limits=limits)


def _gateway(
    backend: EmbeddedBackend,
    limits: GatewayLimits,
    keys: ApiKeys,
    figures: GatewayFigures,
    events: EventWriter | None,
) -> Entrance:
    from gmpo.serving.app import build_gateway
    from gmpo.serving.backend import OneBackendRouter

    return build_gateway(
        OneBackendRouter(backend),
        limits=limits,
        keys=keys,
        observers=() if events is None else (events.observe,),
        figures=figures,
    )


def _run(
    gateway: Entrance,
    bound: socket.socket,
    reload: Callable[[], Awaitable[None]],
    drain_seconds: float,
    announce: Callable[[int], None],
) -> None:
    """Serve until a signal ends it."""
    from gmpo.serving.server import GatewayServer, ServerSettings

    server = GatewayServer(
        gateway,
        settings=ServerSettings(drain_seconds=drain_seconds),
        reload=reload,
        started=lambda: announce(bound.getsockname()[1]),
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


def _last_part(model: str) -> str:
    return Path(model).name or model


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _announce(backend: EmbeddedBackend, host: str, port: int) -> None:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(
        f"serving {backend.name} (version {backend.model_version}) at http://{where}/v1",
        flush=True,
    )


async def _reload(
    backend: EmbeddedBackend, load: Callable[[], ServedModel], events: EventWriter | None
) -> None:
    """Load the model anew; if that fails, the old one goes on serving."""
    try:
        swap = await backend.swap(load)
    except GmpoError as error:
        say("error", f"{error}; version {backend.model_version} goes on serving", style="red")
        return
    if swap.version == swap.previous:
        warn(f"the weights are still version {swap.version}; nothing changed")
        return
    warn(f"version {swap.version} serves in place of {swap.previous}")
    if events is not None:
        from gmpo.store import Event

        payload = {"previous": swap.previous, "version": swap.version, "seconds": swap.seconds}
        events.put(
            Event(kind="swap", time=time.time(), payload=payload, model_version=swap.version)
        )
