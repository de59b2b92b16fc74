"""`gmpo serve`."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gmpo.cli.conventions import is_given, is_loopback, refuses_clearly, warn
from gmpo.cli.serve_backends import Asked, Behind, Recorder, build_behind, wanted
from gmpo.errors import ConfigError
from gmpo.own_servers import require_serving
from gmpo.shared_cores import share_cores

if TYPE_CHECKING:
    from gmpo.serving.access import ApiKeys
    from gmpo.serving.admission import AdmissionLimits
    from gmpo.serving.anomaly_watch import AnomalyWatch
    from gmpo.serving.answer_record import AnswerRecord
    from gmpo.serving.answering import Observer
    from gmpo.serving.app import GatewayLimits
    from gmpo.serving.engine import EngineLimits
    from gmpo.serving.entrance import Entrance
    from gmpo.serving.feedback import FeedbackDesk
    from gmpo.serving.figures import GatewayFigures
    from gmpo.serving.router import VariantRouter
    from gmpo.serving.routing_config import RoutingConfig
    from gmpo.serving.server import ServerSettings

__all__ = ["serve"]

_INTERRUPTED = 130


_RecordTexts = Annotated[
    bool,
    typer.Option(
        "--record-texts",
        help='Keep texts in --store too, of requests that say "store": true; see docs/data.md.',
    ),
]
_LearnAnew = Annotated[
    bool,
    typer.Option("--learn-anew", help="Forget what --store says is usual for these models."),
]
_Model = Annotated[
    str | None,
    typer.Argument(
        help="Model name, model folder, or run folder; the model's name there with --upstream."
    ),
]
_Upstream = Annotated[
    str | None,
    typer.Option(help="OpenAI-compatible server that has MODEL, e.g. http://127.0.0.1:8001/v1."),
]
_Config = Annotated[
    Path | None, typer.Option(help="TOML of backends, fallback, experiment, quality, shadow.")
]
_Experiment = Annotated[
    str | None, typer.Option(help="Experiment of --store that splits the traffic.")
]
_Task = Annotated[
    str | None,
    typer.Option(help="Recipe or run folder whose task's scorer grades answers; docs/routing.md."),
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
_MaxConnections = Annotated[
    int, typer.Option(min=1, help="Open connections, idle ones too; 503 beyond them.")
]
_DrainSeconds = Annotated[
    float, typer.Option(min=0.0, help="How long requests may go on after SIGTERM.")
]


@refuses_clearly
def serve(
    context: typer.Context,
    model: _Model = None,
    name: _Name = None,
    upstream: _Upstream = None,
    config: _Config = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8000,
    api_keys: _Keys = None,
    store: _StoreUrl = None,
    follow: _Follow = None,
    experiment: _Experiment = None,
    task: _Task = None,
    dtype: _Dtype = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Completions decoded together.")] = 32,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024,
    max_running: _MaxRunning = 64,
    max_queued: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    queue_seconds: Annotated[float, typer.Option(min=0.0, help="Longest wait for a turn.")] = 30.0,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest answer.")] = 600.0,
    max_connections: _MaxConnections = 512,
    drain_seconds: _DrainSeconds = 30.0,
    learn_anew: _LearnAnew = False,
    record_texts: _RecordTexts = False,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Longest body.")] = 1 << 20,
) -> None:
    """Serve models to OpenAI's clients until SIGTERM or Ctrl-C; SIGHUP loads them anew."""
    require_serving("gmpo serve")
    from gmpo.serving.admission import AdmissionLimits
    from gmpo.serving.server import ServerSettings, bound_socket

    keys = _keys(api_keys, host)
    asked = Asked(
        model=model,
        name=name,
        upstream=upstream,
        dtype=dtype,
        follow=follow,
        experiment=experiment,
        task=task,
        config=config,
    )
    recording = _recording(store, learn_anew=learn_anew, record_texts=record_texts)
    with bound_socket(host, port) as bound, recording as records:
        found = wanted(asked, records.recorder)
        if found.config.follows:  # `gmpo learn` trains beside it, on this machine as a rule
            share_cores()
        _refuse_unused(context, found.config)
        engine_limits = partial(_engine_limits, max_rows, max_prompt_tokens, max_tokens)
        behind = build_behind(found, engine_limits, records.recorder)
        behind.lasts("watching for anomalies", records.watch.run)
        admission = AdmissionLimits(
            max_running=max_running, max_queued=max_queued, queue_seconds=queue_seconds
        )
        limits = _limits(admission, max_body_bytes, request_seconds)
        settings = ServerSettings(max_connections=max_connections, drain_seconds=drain_seconds)
        _run(_gateway(behind, limits, keys, records), bound, behind, settings)


def _keys(file: Path | None, host: str) -> ApiKeys:
    """The keys that clients need; a warning where other machines may ask without any."""
    from gmpo.serving.access import read_api_keys

    keys = read_api_keys(file)
    if not keys and not is_loopback(host):
        warn(f"no API keys are set: whoever reaches {host} may ask; set GMPO_API_KEYS")
    return keys


def _engine_limits(max_rows: int, max_prompt_tokens: int, max_tokens: int) -> EngineLimits:
    # Not imported before a model is to be loaded here: it brings torch along.
    from gmpo.serving.engine import EngineLimits

    return EngineLimits(
        max_rows=max_rows, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens
    )


def _refuse_unused(context: typer.Context, config: RoutingConfig) -> None:
    """Refuse a limit that nothing would keep: servers have their own."""
    from gmpo.serving.routing_config import EngineSettings

    if any(isinstance(one, EngineSettings) for one in config.backends.values()):
        return
    for name in ("max_rows", "max_prompt_tokens", "max_tokens"):
        if is_given(context, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is a limit of models in this process, and all models "
                "are at servers; set it there, and leave it out here"
            )


def _limits(
    admission: AdmissionLimits, max_body_bytes: int, request_seconds: float
) -> GatewayLimits:
    from gmpo.serving.app import GatewayLimits
    from gmpo.serving.entrance import EntranceLimits

    entrance = EntranceLimits(max_body_bytes=max_body_bytes)
    return GatewayLimits(entrance=entrance, admission=admission, request_seconds=request_seconds)


@dataclass(frozen=True, kw_only=True)
class _Records:
    """The gateway's figures, and what records, where there is a store."""

    figures: GatewayFigures
    watch: AnomalyWatch
    recorder: Recorder | None = None


@contextmanager
def _recording(url: str | None, *, learn_anew: bool, record_texts: bool) -> Iterator[_Records]:
    """Open the store, and write what waits before it is closed."""
    from gmpo.host_memory import resident_bytes
    from gmpo.serving.anomaly_watch import AnomalyWatch, stored_baselines
    from gmpo.serving.figures import GatewayFigures
    from gmpo.serving.recording import EventWriter
    from gmpo.store import open_store

    if url is None:
        for option, is_given in (("--learn-anew", learn_anew), ("--record-texts", record_texts)):
            if is_given:
                raise ConfigError(f"{option} is about what a store holds; say which with --store")
        figures = GatewayFigures()
        yield _Records(figures=figures, watch=AnomalyWatch(figures))
        return
    opened = open_store(url)
    baselines = {} if learn_anew else stored_baselines(opened)
    gauges: GatewayFigures | None = None

    def sample() -> dict[str, float]:
        going_on = {} if gauges is None else gauges.gauges()
        return {"memory_bytes": resident_bytes(), **going_on}

    writer = EventWriter(opened, sample=sample, record_texts=record_texts, tell=warn)
    gauges = figures = GatewayFigures(events=writer.counts)
    try:
        watch = AnomalyWatch(figures, put=writer.put, baselines=baselines)
        recorder = Recorder(store=opened, events=writer)
        yield _Records(figures=figures, watch=watch, recorder=recorder)
    finally:
        writer.close()
        opened.close()
        if writer.num_lost or writer.num_refused:
            warn(
                f"{_were(writer.num_lost, 'event')} lost and {writer.num_refused} refused by store "
                f"{opened.where}; {_were(writer.num_written, 'event')} written"
            )


def _gateway(behind: Behind, limits: GatewayLimits, keys: ApiKeys, records: _Records) -> Entrance:
    from gmpo.serving.app import build_gateway
    from gmpo.serving.feedback import FeedbackDesk

    recorder = records.recorder
    desk = None if recorder is None else FeedbackDesk(recorder.store, recorder.events.put)
    observers = [] if recorder is None or desk is None else _observers(recorder, desk)
    records.figures.watch_routing(
        behind.counts,
        lambda: behind.router.phases,
        lambda: behind.experiment,
        behind.following,
    )
    return build_gateway(
        behind.router,
        limits=limits,
        keys=keys,
        observers=[records.watch.observe, *observers],
        figures=records.figures,
        feedback=desk,
    )


def _observers(recorder: Recorder, desk: FeedbackDesk) -> list[Observer]:
    """What becomes of an answer that is over, in the store."""
    from gmpo.serving.splitting import outcome_event

    def outcome(record: AnswerRecord) -> None:
        event = outcome_event(record)
        if event is not None:
            recorder.events.put(event)

    return [recorder.events.observe, outcome, desk.observe]


def _run(gateway: Entrance, bound: socket.socket, behind: Behind, settings: ServerSettings) -> None:
    """Serve until a signal ends it."""
    from gmpo.serving.server import GatewayServer

    server = GatewayServer(
        gateway,
        settings=settings,
        reload=behind.reload,
        started=lambda: _announce(behind.router, bound),
        beside=[work.run for work in behind.beside],
    )
    with asyncio.Runner(loop_factory=server.new_loop) as runner:
        runner.run(server.serve(sockets=[bound]))
    if server.hurried_by is not None:
        name = signal.Signals(server.hurried_by).name
        warn(f"a second signal ({name}) ended it: {_were(server.num_cut, 'request')} cut")
        raise typer.Exit(128 + server.hurried_by)
    if server.num_cut:
        limit = f"{settings.drain_seconds:g} s"
        warn(f"{_were(server.num_cut, 'request')} cut, not over after {limit}")
    if server.ended_by == signal.SIGINT:
        raise typer.Exit(_INTERRUPTED)


def _were(count: int, noun: str) -> str:
    return f"1 {noun} was" if count == 1 else f"{count} {noun}s were"


def _announce(router: VariantRouter, bound: socket.socket) -> None:
    host, port = bound.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(
        f"serving {router.model_names[0]} (version {router.model_version}) at http://{where}/v1",
        flush=True,
    )
