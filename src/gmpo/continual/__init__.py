"""Continual learning: cycles that bring new data into the model that serves, or leave it as it is.

`gmpo.continual.plan` says what a cycle is to do, and `gmpo.continual.work` does it with real
models. None of these modules loads torch when it is imported.
"""

from gmpo.continual.cycle import (
    ControllerSettings,
    CycleWaits,
    CycleWork,
    Moment,
    abandon_cycle,
    learning_champion,
    lease_name,
    open_cycle,
    run_cycle,
)

__all__ = [
    "ControllerSettings",
    "CycleWaits",
    "CycleWork",
    "Moment",
    "abandon_cycle",
    "learning_champion",
    "lease_name",
    "open_cycle",
    "run_cycle",
]
