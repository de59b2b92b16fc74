"""The gate before a release: is the candidate no worse than the champion, and can that be said?"""

from gmpo.gate.decision import decide_gate, drop_p_value, with_anchor
from gmpo.gate.policy import GatePolicy
from gmpo.gate.records import (
    AnchorSuites,
    GateDecision,
    Guardrail,
    PairedSuite,
    SafetyCount,
)

__all__ = [
    "AnchorSuites",
    "GateDecision",
    "GatePolicy",
    "Guardrail",
    "PairedSuite",
    "SafetyCount",
    "decide_gate",
    "drop_p_value",
    "with_anchor",
]
