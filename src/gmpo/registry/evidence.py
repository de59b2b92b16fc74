"""Evidence for a promotion: of these two versions, and of the champion that serves now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gmpo.errors import PromotionRefused
from gmpo.store import Champion

__all__ = ["WITHDRAWN", "require_evidence", "stale_reason"]

WITHDRAWN = "withdrawn"
"""Outcome that takes a pass back: something spoke against the version since."""


def require_evidence(
    evidence: Mapping[str, Any],
    *,
    champion: str | None,
    candidate: str,
    newest: Mapping[str, Any] | None,
) -> int:
    """The revision of the champion that a pass about these two was measured against.

    Args:
        evidence: the gate's decision, as JSON.
        champion: version that it must have been compared with.
        candidate: version that it must be about.
        newest: what the store last holds about the candidate against that champion; None if
            nothing. It may have been withdrawn, or decided anew.

    Raises:
        PromotionRefused: it is something else; the message says what.
    """
    if champion is None:
        raise PromotionRefused(
            "the evidence names no champion that the candidate was compared with; adopt the first "
            f"version (gmpo registry adopt NAME {candidate} --store STORE), and have the gate "
            f"decide about later ones (gmpo gate CHAMPION {candidate} --suite SUITE --store STORE "
            "--name NAME)"
        )
    outcome = evidence.get("outcome")
    if outcome != "pass":
        raise PromotionRefused(
            f"the gate's answer about {candidate} is {outcome!r}, not 'pass': "
            f"{evidence.get('sentence', 'no decision was given')}; nothing was promoted"
        )
    about = (evidence.get("champion"), evidence.get("candidate"))
    if about != (champion, candidate):
        raise PromotionRefused(
            f"the evidence is about {about[1]} against {about[0]}, not about {candidate} against "
            f"{champion}; gate the candidate against the champion"
        )
    revision = evidence.get("champion_revision")
    if not isinstance(revision, int):
        raise PromotionRefused(
            f"the evidence about {candidate} does not say when its champion {champion} served "
            "(champion_revision), so it may be older than a rollback; gate the candidate with "
            "gmpo gate ... --store STORE --name NAME"
        )
    _refuse_outdated(candidate, newest)
    return revision


def _refuse_outdated(candidate: str, newest: Mapping[str, Any] | None) -> None:
    """Refuse a pass that was taken back, or that a later answer of the gate is not."""
    if newest is None or newest.get("outcome") == "pass":
        return
    since = f"and was answered {newest.get('outcome')!r} since"
    if newest.get("outcome") == WITHDRAWN:
        since = "and was withdrawn since"
    raise PromotionRefused(
        f"{candidate} passed the gate {since}: {newest.get('sentence', 'no reason given')}; gate "
        "it again if it is to serve all the same"
    )


def stale_reason(history: Sequence[Champion], *, revision: int, candidate: str) -> str | None:
    """Why evidence counts no more; None if the champion that it was measured against still serves.

    A version that was replaced and came back is another champion: what was decided before may be
    about a candidate that was released and disappointed.

    Args:
        history: of the champions, oldest first.
        revision: of the champion that the candidate was measured against.
        candidate: version that the evidence is about.
    """
    now = history[-1] if history else None
    if now is None or now.revision == revision:
        return None
    later = [row for row in history if row.revision > revision]
    since = f"{', '.join(row.version for row in later)} served since"
    if any(row.version == candidate for row in later):
        why = later[-1].reason.get("why", "no reason given")
        since = f"{candidate} was promoted since and taken back ({why})"
    return (
        f"the evidence about {candidate} was measured against champion {revision} of "
        f"{now.name!r}, and champion {now.revision}, {now.version}, serves by now: {since}; gate "
        "the candidate against it again"
    )
