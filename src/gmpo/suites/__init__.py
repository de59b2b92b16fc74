"""Evaluation suites: their items, models asked them, and the scores that come of it.

`gmpo.suites.runs`, which loads the model that is asked, needs torch and is imported by its own
name.
"""

from gmpo.suites.items import (
    DATA_FOLDER_VARIABLE,
    SUITES,
    HubSource,
    Suite,
    SuiteItems,
    check_folder_is_read,
    known_suites,
    suite_items,
)

__all__ = [
    "DATA_FOLDER_VARIABLE",
    "SUITES",
    "HubSource",
    "Suite",
    "SuiteItems",
    "check_folder_is_read",
    "known_suites",
    "suite_items",
]
