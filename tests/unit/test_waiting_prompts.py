"""When prompts that wait are prefilled: together where that is cheaper, and soon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import tiny_model

from gmpo.policy.llama import LlamaBody
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import Completion, SampleRequest


def sampler_of(max_rows: int) -> LocalSampler:
    decoder = LlamaDecoder(LlamaBody(tiny_model(dtype=torch.float64)), max_rows=max_rows)
    return LocalSampler(decoder, context_length=256, max_rows=max_rows)


def request(name: str, **fields: Any) -> SampleRequest:
    return SampleRequest(id=name, token_ids=(7, 30, 12), key=("k", name), **fields)


@pytest.mark.parametrize(("num_waiting", "steps"), [(1, 5), (2, 5), (3, 1)])
def test_few_prompts_wait_for_others_while_many_rows_run_but_not_for_long(
    num_waiting: int, steps: int
):
    sampler = sampler_of(32)
    sampler.submit(request("long", num_completions=24, max_tokens=20))
    sampler.step()
    for number in range(num_waiting):
        sampler.submit(request(f"new {number}", max_tokens=1))
    taken = 0
    while not any(isinstance(event, Completion) for event in sampler.step()):
        taken += 1
    assert taken + 1 == steps
    # The next ones wait anew.
    sampler.submit(request("later", max_tokens=1))
    assert [len(sampler.step()) for _ in range(5)] == [0, 0, 0, 0, 1]


def test_a_prompt_that_runs_already_gets_free_rows_at_once():
    sampler = sampler_of(16)
    sampler.submit(request("short", max_tokens=2))
    sampler.submit(request("group", num_completions=16, max_tokens=8))
    sampler.step()
    (done,) = sampler.step()
    assert isinstance(done, Completion) and done.request_id == "short"
    # 15 of the group ran beside it; its last one takes the row that became free.
    ended = [sum(isinstance(e, Completion) for e in sampler.step()) for _ in range(8)]
    assert ended == [0, 0, 0, 0, 0, 15, 0, 1]
