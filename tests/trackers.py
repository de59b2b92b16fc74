"""Rows that trackers hold, read back from their own files with their own readers."""

from __future__ import annotations

import json
import math
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Point = tuple[str, int, str]
"""Name, step, and value in fp32, in which TensorBoard keeps it."""


def point(name: str, step: int, value: float) -> Point:
    return name, int(step), str(np.float32(value))


def expected_points(rows: list[dict[str, Any]]) -> Counter[Point]:
    """What every tracker must hold after these rows of `metrics.jsonl`."""
    points: Counter[Point] = Counter()
    for row in rows:
        kind = row["kind"]
        for name, value in row.items():
            if name in ("kind", "step"):
                continue
            full = name if name.startswith(f"{kind}/") else f"{kind}/{name}"
            points[point(full, row["step"], math.nan if value is None else value)] += 1
    return points


def trackio_points(project: str, run_id: str) -> Counter[Point]:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs(project, run_id=run_id)
    return Counter(
        point(name, row["step"], value)
        for row in logs
        for name, value in row.items()
        if name not in ("step", "timestamp")
    )


def mlflow_points(uri: str, run_id: str) -> Counter[Point]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    names = client.get_run(run_id).data.metrics
    return Counter(
        point(name, metric.step, metric.value)
        for name in names
        for metric in client.get_metric_history(run_id, name)
    )


def tensorboard_points(folder: Path) -> Counter[Point]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return Counter(
        point(name, event.step, event.value)
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    )


def wandb_points(folder: Path) -> Counter[Point]:
    """Of all offline folders of a run: each process that goes on with it writes one.

    The last one ends with its process: W&B's own process writes it, a moment later than `finish`.
    """
    *earlier, last = sorted(folder.glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(last)):
        assert time.monotonic() < deadline, f"{last} was never ended"
        time.sleep(0.05)
    points: Counter[Point] = Counter()
    for path in (*earlier, last):
        for record in wandb_records(path):
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    points[point(name, record.history.step.num, json.loads(item.value_json))] += 1
    return points


def wandb_records(path: Path) -> Iterator[Any]:
    """W&B's records, in LevelDB's log format: blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    place, whole = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        piece = content[place + 7 : place + 7 + length]
        if not kind or len(piece) < length:
            return  # the rest is not written yet
        whole += piece
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
