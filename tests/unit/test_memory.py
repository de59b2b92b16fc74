"""Bytes by arithmetic against bytes that the real code holds; free memory against the system's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.rollout_groups import one_step, random_groups
from transformers import LlamaConfig, LlamaForCausalLM

from gmpo.batch import MicroBatch
from gmpo.memory import (
    MicroBatchSize,
    ModelShape,
    activation_bytes,
    available_bytes,
    cache_bytes,
    head_bytes,
    largest_micro_batch,
    resident_bytes,
    weight_bytes,
)
from gmpo.policy.llama import LlamaBody
from gmpo.policy.prefix import scored_hidden_states
from gmpo.policy.score import Policy
from gmpo.sampler.decoders import LlamaDecoder
from gmpo.update import PolicyOptimizer

VOCABULARY = 101


def shape_of(model: LlamaForCausalLM, *, is_fast: bool = True) -> ModelShape:
    config = model.config
    return ModelShape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=config.intermediate_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocabulary=config.vocab_size,
        width=model.dtype.itemsize,
        is_fast=is_fast,
    )


def llama(
    *,
    layers: int = 2,
    hidden: int = 32,
    feed_forward: int = 48,
    key_value_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype)


def micro_batch(size: MicroBatchSize) -> MicroBatch:
    prompt_ids = torch.arange(size.prompts)[:, None] + torch.arange(size.prompt_tokens)
    rows, length = size.rows, size.completion_tokens
    return MicroBatch(
        prompt_ids=prompt_ids % VOCABULARY,
        prompt_lengths=torch.full((size.prompts,), size.prompt_tokens),
        prompt_of_row=torch.arange(rows) * size.prompts // rows,
        completion_ids=torch.ones(rows, length, dtype=torch.long),
        completion_lengths=torch.full((rows,), length),
        mask=torch.ones(rows, length, dtype=torch.bool),
        advantages=torch.ones(rows),
        sampler_logprobs=torch.zeros(rows, length),
        old_logprobs=torch.zeros(rows, length),
        reference_logprobs=None,
        row_names=tuple(str(row) for row in range(rows)),
    )


def kept_for_backward(model: LlamaForCausalLM, batch: MicroBatch) -> int:
    """Bytes of every tensor that autograd keeps, each memory counted once, weights aside."""
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address would be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scored_hidden_states(LlamaBody(model), batch)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden": 64},
        {"feed_forward": 96},
        {"key_value_heads": 4},
        {"key_value_heads": 1},
    ],
)
@pytest.mark.parametrize(
    "size",
    [
        MicroBatchSize(prompts=1, rows=8, prompt_tokens=20, completion_tokens=9),
        MicroBatchSize(prompts=1, rows=3, prompt_tokens=40, completion_tokens=5),
        MicroBatchSize(prompts=3, rows=12, prompt_tokens=17, completion_tokens=4),
        MicroBatchSize(prompts=1, rows=8, prompt_tokens=20, completion_tokens=1),
    ],
    ids=["many rows", "long prompt", "several prompts", "one token"],
)
def test_a_layer_keeps_exactly_these_bytes(
    sizes: dict[str, int], size: MicroBatchSize, dtype: torch.dtype
):
    two, three = (llama(layers=layers, dtype=dtype, **sizes) for layers in (2, 3))
    batch = micro_batch(size)
    counted = kept_for_backward(three, batch) - kept_for_backward(two, batch)
    assert counted == activation_bytes(shape_of(three), size) - activation_bytes(
        shape_of(two), size
    )


def test_besides_its_layers_a_forward_pass_keeps_little():
    size = MicroBatchSize(prompts=2, rows=16, prompt_tokens=20, completion_tokens=9)
    model = llama(layers=8)
    counted = kept_for_backward(model, micro_batch(size))
    assert counted == pytest.approx(activation_bytes(shape_of(model), size), rel=0.03)


def test_weights_gradients_and_moments_are_what_the_optimizer_holds():
    for dtype in (torch.float32, torch.bfloat16):
        policy = Policy(llama(dtype=dtype), warn=lambda _: None)
        optimizer = PolicyOptimizer(policy)
        optimizer.apply_step(learning_rate=0.0, clip_norm=1.0)
        held = {tensor.data_ptr(): tensor for tensor in policy.model.parameters()}
        for master in policy.masters.values():
            assert master.grad is not None
            moments = [m for m in optimizer.adamw.state[master].values() if m.dim()]
            held |= {t.data_ptr(): t for t in (master, master.grad, *moments)}
        counted = sum(tensor.nbytes for tensor in held.values())
        shape = shape_of(policy.model)
        assert counted == weight_bytes(shape, has_reference=False, keeps_second_gradient=False)


@pytest.mark.parametrize(
    ("dtype", "alone", "reference"), [(torch.float32, 16, 4), (torch.bfloat16, 18, 6)]
)
def test_a_reference_and_a_second_gradient_are_further_copies(
    dtype: torch.dtype, alone: int, reference: int
):
    shape = shape_of(llama(dtype=dtype))

    def per_weight(**extra: bool) -> float:
        arguments = {"has_reference": False, "keeps_second_gradient": False} | extra
        return weight_bytes(shape, **arguments) / shape.num_parameters

    assert per_weight() == alone
    assert per_weight(has_reference=True) == alone + reference
    assert per_weight(keeps_second_gradient=True) == alone + 4


def test_the_cache_is_as_large_as_the_samplers():
    model = llama()
    decoder = LlamaDecoder(LlamaBody(model), max_rows=5)
    (prefill,) = decoder.prefill([[1] * 70], all_logits=False)
    decoder.add_rows(prefill, 3)
    held = sum(cache.nbytes for cache in (*decoder._keys, *decoder._values))
    assert held == cache_bytes(shape_of(model), rows=5, positions=71)


def test_the_head_holds_chunks_or_all_logits():
    shape = shape_of(llama())
    size = MicroBatchSize(prompts=1, rows=64, prompt_tokens=4, completion_tokens=8)
    # 512 positions in chunks of 256, five of them in fp32, and a gradient of 101 x 32
    assert head_bytes(shape, size) == (5 * 256 * 101 + 101 * 32) * 4
    plain = shape_of(llama(), is_fast=False)
    # 64 rows of 12 tokens with logits and their gradient, six tables at 512 positions
    assert head_bytes(plain, size) == (2 * 64 * 12 + 6 * 512) * 101 * 4


def test_long_prompts_repeated_for_their_rows_outweigh_the_head():
    shape = shape_of(llama())
    size = MicroBatchSize(prompts=1, rows=64, prompt_tokens=3000, completion_tokens=2)
    # keys and values of 2 heads x 8 in 2 layers
    assert head_bytes(shape, size) == 64 * 3000 * 2 * 16 * 4 * 2


@given(
    max_tokens=st.integers(1, 300),
    group_size=st.integers(2, 6),
    groups=st.integers(1, 4),
    prompt_tokens=st.integers(1, 30),
    completion_tokens=st.integers(1, 20),
    shares_prompts=st.booleans(),
)
def test_the_largest_micro_batch_is_the_one_that_is_built(
    max_tokens: int,
    group_size: int,
    groups: int,
    prompt_tokens: int,
    completion_tokens: int,
    shares_prompts: bool,
):
    size = largest_micro_batch(
        max_tokens=max_tokens,
        group_size=group_size,
        groups=groups,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        shares_prompts=shares_prompts,
    )
    step = one_step(
        random_groups([[5] * prompt_tokens] * groups, [[completion_tokens] * group_size] * groups),
        [[1.0] * group_size] * groups,
        max_tokens=max_tokens,
        shares_prompts=shares_prompts,
    )
    assert size.rows == max(len(batch.row_names) for batch in step.micro_batches)
    assert size.prompts == len(step.micro_batches[0].prompt_ids)


def test_this_process_holds_memory_and_some_is_free():
    assert 2**26 < resident_bytes() < 2**37
    free = available_bytes()
    assert free is None or 0 < free < 2**50


def system(root: Path, *, groups: str, files: dict[str, str]) -> Path:
    """Files as Linux shows them: 8 GiB available."""
    texts = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n"}
    for name, text in {**texts, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(name: str, *, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{name}/memory.max": f"{limit}\n",
        f"{name}/memory.current": f"{used}\n",
        f"{name}/memory.stat": f"anon {used - cached}\ninactive_file {cached}\n",
    }


def test_without_limits_what_linux_calls_available_is_free(tmp_path: Path):
    root = system(tmp_path, groups="0::/user\n", files=group("sys/fs/cgroup", limit="max", used=0))
    assert available_bytes(root) == 8 * 2**30


def test_the_tightest_group_above_the_process_counts_and_its_file_pages_are_free(tmp_path: Path):
    files = group("sys/fs/cgroup/a/b", limit=str(6 * 2**30), used=2 * 2**30, cached=2**30)
    files |= group("sys/fs/cgroup/a", limit=str(4 * 2**30), used=3 * 2**30, cached=2**29)
    root = system(tmp_path, groups="0::/a/b\n", files=files)
    assert available_bytes(root) == 2**30 + 2**29


def test_the_first_version_of_control_groups_counts_too(tmp_path: Path):
    folder = "sys/fs/cgroup/memory/docker/x"
    files = {
        f"{folder}/memory.limit_in_bytes": str(3 * 2**30),
        f"{folder}/memory.usage_in_bytes": str(2**30),
        f"{folder}/memory.stat": "cache 5\ntotal_inactive_file 0\n",
    }
    root = system(tmp_path, groups="5:cpu,memory:/docker/x\n4:pids:/docker/x\n", files=files)
    assert available_bytes(root) == 2 * 2**30


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path):
    files = group("sys/fs/cgroup", limit="100", used=200)
    assert available_bytes(system(tmp_path, groups="0::/\n", files=files)) == 0


def test_a_system_that_does_not_say_is_not_guessed(tmp_path: Path):
    assert available_bytes(tmp_path) is None
    assert math.isfinite(resident_bytes())
