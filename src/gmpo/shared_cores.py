"""Threads that soon sleep while they wait, for processes that share a machine's cores.

OpenMP's threads spin between one part of a product and the next, which is quickest while they have
the cores to themselves. Where a server, its candidate and a training run take turns on the same
cores, each spins away the time in which another could have finished. Threads that sleep at once
leave the cores to others, but have to be woken many times in every decoding step, which takes a
server alone half as long again. Spinning for some microseconds, about the gap between two
operations, gives most of either; `benchmarks/shared_cores.py` measures all three.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["share_cores", "sharing_cores"]

_POLICY = "OMP_WAIT_POLICY"
_SPINS = "GOMP_SPINCOUNT"
_CHOICES = (_POLICY, _SPINS)
_BRIEFLY = "1000"
"""Turns of the loop in which libgomp's threads wait; 300,000 where nothing is said."""


def sharing_cores(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose processes leave the cores to others while they wait.

    The policy is for other OpenMPs; libgomp, which knows the number of turns, goes by that.

    Args:
        environment: that they would have otherwise; what it says of waiting is kept.
    """
    if any(name in environment for name in _CHOICES):
        return dict(environment)
    return {**environment, _POLICY: "PASSIVE", _SPINS: _BRIEFLY}


def share_cores() -> None:
    """Let this process, and those that it starts, leave the cores to others while they wait.

    OpenMP reads the environment once, when torch is imported, so it has to come before that.
    """
    os.environ.update(sharing_cores(os.environ))
