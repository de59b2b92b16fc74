"""Threads that sleep while they wait, for processes that share a machine's cores.

OpenMP's threads spin between one part of a product and the next, which is quickest while they have
the cores to themselves. Where a server, its candidate and a training run take turns on the same
cores, each spins away the time in which another could have finished. `benchmarks/shared_cores.py`
measures what either way of waiting costs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["share_cores", "sharing_cores"]

_POLICY = "OMP_WAIT_POLICY"
_CHOICES = (_POLICY, "GOMP_SPINCOUNT")


def sharing_cores(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose processes leave the cores to others while they wait.

    Args:
        environment: that they would have otherwise; what it says of waiting is kept.
    """
    if any(name in environment for name in _CHOICES):
        return dict(environment)
    return {**environment, _POLICY: "PASSIVE"}


def share_cores() -> None:
    """Let this process, and those that it starts, leave the cores to others while they wait.

    OpenMP reads the environment once, when torch is imported, so it has to come before that.
    """
    os.environ.update(sharing_cores(os.environ))
