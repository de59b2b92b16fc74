"""Watching models that serve and models that train: alerts, and how they reach people."""

__all__: list[str] = []
