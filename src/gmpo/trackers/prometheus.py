"""A run's figures for Prometheus: a file for node-exporter's textfile collector, and a port."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile

from gmpo.model_files import holds_weights, weights_version
from gmpo.monitoring.training_metrics import TrainingMetrics
from gmpo.trackers.tools import Row, TrackedRun

__all__ = ["PrometheusFile"]

_NAME = "metrics.prom"
_ADDRESS = "127.0.0.1"


class PrometheusFile:
    """`metrics.prom` in the run folder, written anew with each round, and the same on a port.

    Prometheus keeps the history; here is what is now. A run that is resumed shows its last rounds
    until there are new ones.

    Args:
        run: whose folder the file lies in and whose checkpoints name the weights.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, run: TrackedRun) -> None:
        registry = CollectorRegistry()
        self._file = run.folder / _NAME
        self._checkpoints = run.folder / "checkpoints"
        self._versions: dict[str, str | None] = {}
        self._metrics = TrainingMetrics(registry, run=run.name)
        self._registry = registry
        port = run.parameters.get("tracking.prometheus_port")
        self._server = (
            None if port is None else start_http_server(port, addr=_ADDRESS, registry=registry)
        )

    def holds(self, row: Row) -> bool:
        """Nothing is held for good: rows that were written before are shown again."""
        return False

    def write(self, row: Row) -> None:
        """Show a row, by the newest weights from its round or before."""
        if row["kind"] == "step":
            return
        self._metrics.logged(row)
        self._write(last_round=row["round"])

    def close(self) -> None:
        """Leave the file by the last weights, and the port."""
        self._write(last_round=None)
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            thread.join()
            server.server_close()

    def _write(self, *, last_round: int | None) -> None:
        self._metrics.weights(self._version(last_round))
        write_to_textfile(str(self._file), self._registry)

    def _version(self, last_round: int | None) -> str | None:
        found: Path | None = None
        for state in sorted(self._checkpoints.glob("round-*/state.json")):
            if last_round is None or int(state.parent.name.removeprefix("round-")) <= last_round:
                found = state.parent
        if found is None:
            return None
        if found.name not in self._versions:
            # A run with adapters leaves those, not a whole model.
            folders = [found / name for name in ("adapter", "model")]
            version = next((weights_version(one) for one in folders if holds_weights(one)), None)
            self._versions = {found.name: version}
        return self._versions[found.name]
