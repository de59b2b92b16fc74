"""Requests made up from the server's own OpenAPI document never make it fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.gateways import RunningGateway, running_gateway, tiny_backend
from tests.models import save_tiny

from gmpo.serving.bodies import ChatBody, CompletionBody
from gmpo.serving.engine import EngineLimits
from gmpo.serving.feedback import FeedbackDesk
from gmpo.serving.recording import EventWriter
from gmpo.store import open_store

ENGINE = EngineLimits(max_rows=8, max_prompt_tokens=64, max_tokens=16)
FAST = 200
MANY = 2000


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    with ExitStack() as stack:
        store = stack.enter_context(open_store(str(tmp_path_factory.mktemp("store") / "s.db")))
        writer = EventWriter(store)
        stack.callback(writer.close)
        yield stack.enter_context(
            running_gateway(
                lambda: tiny_backend(folder, limits=ENGINE),
                feedback=FeedbackDesk(store, writer.put),
            )
        )


def ask_much(gateway: RunningGateway, *, num_requests: int) -> dict[int, int]:
    """Ask every operation of the document; how many answers there were of each status."""
    with gateway.client() as client:
        document = client.get("/openapi.json").json()
        schema = schemathesis.openapi.from_dict(document)
        operations = [found.ok() for found in schema.get_all_operations()]
        posts = [one for one in operations if one.method.upper() == "POST"]
        answers = [one for one in posts if one.path.endswith("/completions")]
        assert len(answers) == 2 and {one.path for one in posts if one not in answers} == {
            "/v1/feedback"
        }
        assert len(operations) == 8
        statuses: dict[int, int] = {}
        for operation in operations:
            # Most of them go where there is most to get wrong.
            share = 0.4 if operation in answers else 0.1 if operation in posts else 0.02
            for status, count in _ask(client, operation, round(share * num_requests)).items():
                statuses[status] = statuses.get(status, 0) + count
    return statuses


def _ask(client: httpx2.Client, operation: Any, count: int) -> dict[int, int]:
    statuses: dict[int, int] = {}
    asked = 0

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), named=st.booleans())
    def ask(case: Any, named: bool) -> None:
        nonlocal asked
        asked += 1
        kwargs = case.as_transport_kwargs(base_url=str(client.base_url))
        if named and isinstance(kwargs.get("json"), dict):
            kwargs["json"] = _for_the_model(kwargs["json"])
        kwargs.pop("cookies", None)
        request = client.build_request(**kwargs)
        response = client.send(request)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code < 500, (kwargs, response.text)
        if response.status_code >= 400 and operation.method.upper() != "HEAD":
            assert response.json()["error"]["message"]

    ask()
    # A small space is exhausted sooner than the count.
    assert asked <= count + 1
    return statuses


def _for_the_model(body: dict[str, Any]) -> dict[str, Any]:
    """The same for a model that is there and without limits beyond its own.

    Otherwise hardly a request would come as far as the engine.
    """
    known = {**ChatBody.model_fields, **CompletionBody.model_fields}
    kept = {name: value for name, value in body.items() if name in known}
    for name in ("max_tokens", "max_completion_tokens", "n"):
        if isinstance(kept.get(name), int):
            kept[name] = min(kept[name], 3)
    return {**kept, "model": "tiny"}


# The gateway serves from a thread of this process, and libraries there may draw from Python's
# global generator between two looks of hypothesis at it.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


def test_made_up_requests_get_no_failure(gateway: RunningGateway):
    statuses = ask_much(gateway, num_requests=FAST)
    assert sum(statuses.values()) >= 0.9 * FAST
    assert statuses[200] >= 10 and statuses[400] >= 50


@pytest.mark.verify
def test_thousands_of_made_up_requests_get_no_failure(gateway: RunningGateway):
    statuses = ask_much(gateway, num_requests=2 * MANY)
    assert sum(statuses.values()) >= MANY
