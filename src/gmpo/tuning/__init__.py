"""Tuning studies: a search over settings, then its best ones held against the recipe itself.

`gmpo.tuning.trials` runs one; it needs optuna, as `gmpo.tuning.search` does, so both are imported
by their own names.
"""

__all__: list[str] = []
