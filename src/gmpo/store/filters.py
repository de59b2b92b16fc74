"""Which events a question is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement

from gmpo.errors import ConfigError
from gmpo.store.tables import EVENTS

__all__ = ["event_conditions"]


def event_conditions(
    *,
    kinds: Sequence[str] | None,
    since: float | None,
    until: float | None,
    after_id: int | None,
    named: Mapping[str, str | None],
) -> list[ColumnElement[bool]]:
    """What a row of `gmpo_events` has to be; None does not matter.

    Args:
        kinds: one of these.
        since: at this time or later, in unix seconds.
        until: before this time.
        after_id: with a larger id.
        named: columns with these values.

    Raises:
        ConfigError: kinds is one text, whose letters it would be.
    """
    if isinstance(kinds, str):
        raise ConfigError(f"kinds is the string {kinds!r}; it must be a list of kinds")
    columns = EVENTS.c
    return [
        *([] if kinds is None else [columns.kind.in_(kinds)]),
        *([] if since is None else [columns.time >= since]),
        *([] if until is None else [columns.time < until]),
        *([] if after_id is None else [columns.id > after_id]),
        *(columns[name] == value for name, value in named.items() if value is not None),
    ]
