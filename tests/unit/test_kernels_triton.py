"""A decoding step's GPU kernels against torch's operations; they need a GPU with Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.models import tiny_model

from gmpo.kernels import triton_norm
from gmpo.kernels.decoding import add_norm
from gmpo.kernels.library import kernels_off
from gmpo.policy.llama import LlamaBody
from gmpo.sampler.attention import attention_of_fixed_rows, walks_fixed_rows
from gmpo.sampler.cache import FixedRows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@every_precision
@pytest.mark.parametrize("has_added", [True, False])
def test_a_norm_is_that_of_torch(dtype: torch.dtype, has_added: bool):
    torch.manual_seed(0)
    stream, weight = torch.randn(70, 576), torch.randn(576).to(dtype)
    added = torch.randn(70, 576).to(dtype) if has_added else None
    far, far_added = stream.cuda(), None if added is None else added.cuda()
    assert triton_norm.adds_norm(far, far_added, weight.cuda())
    normed = add_norm(far, far_added, weight.cuda(), eps=1e-5)
    with kernels_off():
        expected = add_norm(stream, added, weight, eps=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(far.cpu(), stream)
    torch.testing.assert_close(normed.cpu(), expected, rtol=tolerance, atol=tolerance)


@every_precision
@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("llama", 1), ("qwen3", 1)])
@torch.no_grad()
def test_attention_is_that_of_torch(
    family: str, layer: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    body = LlamaBody(tiny_model(family, dtype=dtype).cuda())
    heads, dim = body.num_key_heads, body.head_dim
    # Lengths of nothing, of a part of a block, of whole blocks and of all there is room for.
    table = torch.tensor([[7, 7, 7, 7], [0, 2, 1, 0], [0, 33, 64, 128], [0, 5, 32, 63]])
    rows = FixedRows(
        prompts=torch.randn(2, 2, 3, heads, 128, dim).cuda(),
        own=torch.randn(2, 2, 8, heads, 64, dim).cuda(),
        table=table.cuda(),
        prompt_positions=128,
        own_positions=64,
    )
    other = replace(rows, own=rows.own.clone())
    projected = torch.randn(4, (body.num_heads + 2 * heads) * dim).to("cuda", dtype)
    assert walks_fixed_rows(body, rows.own)
    attended = attention_of_fixed_rows(body, rows)(layer, projected.clone())
    monkeypatch.setattr("gmpo.kernels.triton_decoding.has_triton", lambda: False)
    expected = attention_of_fixed_rows(body, other)(layer, projected.clone())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attended, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rows.own, other.own, rtol=1e-5, atol=1e-5)
