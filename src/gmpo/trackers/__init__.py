"""A run's metrics in tools that people watch: Trackio, MLflow, TensorBoard, W&B, Prometheus."""

from gmpo.trackers.feed import Trackers
from gmpo.trackers.tools import TrackedRun, require_packages

__all__ = ["TrackedRun", "Trackers", "require_packages"]
