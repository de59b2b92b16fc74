"""Versions become labels, of which there are only so many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gmpo.monitoring.version_labels import OTHER, VersionLabels


def test_the_first_versions_keep_their_names_and_the_others_share_one():
    labels = VersionLabels(most=2)
    asked = ["a", None, "b", "c", "a", "d", "c", "b"]
    assert [labels.counted(one) for one in asked] == [
        *("a", None, "b", OTHER, "a", OTHER, OTHER, "b")
    ]
    assert labels.num_folded == 3
    assert [labels.label(one) for one in ("a", "c", None)] == ["a", OTHER, None]
    assert labels.num_folded == 3


@given(st.lists(st.one_of(st.none(), st.text(max_size=2))), st.integers(1, 4))
def test_there_are_never_more_values_than_room_and_one(versions: list[str | None], most: int):
    labels = VersionLabels(most=most)
    seen = [labels.counted(one) for one in versions]
    assert len({one for one in seen if one is not None}) <= most + 1
    kept = list(dict.fromkeys(one for one in versions if one is not None))[:most]
    folded = [one for one in versions if one is not None and one not in kept]
    assert labels.num_folded == len(folded)
