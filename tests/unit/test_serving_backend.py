"""The requests that pass between gateway, router and backends."""

from __future__ import annotations

import pytest

from gmpo.serving.backend import GenerationRequest


def test_a_request_has_either_messages_or_a_prompt():
    with pytest.raises(AssertionError, match="either"):
        GenerationRequest(id="r", route="chat", model="m")
