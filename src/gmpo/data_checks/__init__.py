"""Checks of new rows before anything is trained on them.

`gmpo.data_checks.model`, which has a model answer them, needs torch and is imported by its own
name.
"""

from gmpo.data_checks.quality import (
    BatchReport,
    DataChecks,
    EarlierData,
    RejectedRow,
    checks_of,
    profile_of,
    row_texts,
    validate_batch,
)

__all__ = [
    "BatchReport",
    "DataChecks",
    "EarlierData",
    "RejectedRow",
    "checks_of",
    "profile_of",
    "row_texts",
    "validate_batch",
]
