"""A run's metrics in the tools people already watch: Trackio, MLflow, TensorBoard, W&B."""

from gmpo.trackers.feed import Trackers
from gmpo.trackers.tools import TrackedRun, require_packages

__all__ = ["TrackedRun", "Trackers", "require_packages"]
