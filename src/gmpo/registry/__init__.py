"""Model versions: kept whole, promoted on evidence, taken back, and cleared away."""

from gmpo.registry.advice import commands_for
from gmpo.registry.candidates import Candidate
from gmpo.registry.evidence import stale_reason
from gmpo.registry.files import FileCheck, check_files
from gmpo.registry.garbage import Garbage
from gmpo.registry.line import serving_line
from gmpo.registry.registry import Approval, Registry

__all__ = [
    "Approval",
    "Candidate",
    "FileCheck",
    "Garbage",
    "Registry",
    "check_files",
    "commands_for",
    "serving_line",
    "stale_reason",
]
