"""Device correctness without an accelerator: nothing mixes the policy's device with the CPU."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from tests.elsewhere import ELSEWHERE, MixedDevicesError, elsewhere, move_there, values_of
from tests.models import FAMILIES, tiny_model
from tests.rollout_groups import one_step, random_groups
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from gmpo.batch import MicroBatch, StepBatch
from gmpo.policy.head import chunked_token_logprobs
from gmpo.policy.llama import LlamaBody
from gmpo.policy.lora import adapters_of, add_adapters
from gmpo.policy.packed import _query_blocks
from gmpo.policy.prefix import extend
from gmpo.policy.score import BasePolicy, Policy
from gmpo.sampler.decoders import LlamaDecoder, TransformersDecoder
from gmpo.sampler.drawing import draw_tokens
from gmpo.sampler.local import LocalSampler
from gmpo.sampler.requests import SampleRequest, complete
from gmpo.update import (
    LossSettings,
    PolicyOptimizer,
    accumulate_gradients,
    bind_objective,
    gradient_cosine,
    with_old_logprobs,
    with_reference_logprobs,
)

# Mistral and Qwen2 have the operations of Llama, with and without biases.
PATHS = [("llama", "fast"), ("llama", "plain"), ("qwen3", "fast"), ("gpt2", "plain")]
every_path = pytest.mark.parametrize(("family", "engine"), PATHS)
PROMPTS = [[11, 12, 13, 14, 15, 16], [11, 12, 13, 14, 15, 20, 21], [30]]
LENGTHS = [[5, 1], [2, 7], [6, 3]]
ADVANTAGES = [[1.0, -1.0], [0.7, -0.4], [-0.3, 0.3]]


def ignore(_: str) -> None:
    """gpt2 takes the plain path, which is tested where it belongs."""


def step_on(device: str) -> StepBatch:
    return one_step(random_groups(PROMPTS, LENGTHS), ADVANTAGES, device=device)


def settings_of(name: str) -> LossSettings:
    return LossSettings(
        objective=bind_objective(name, clips={}, max_tokens=8),
        temperature=0.9,
        kl_coefficient=0.1,
        entropy_coefficient=0.1,
    )


def one_update(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    engine: str,
    device: str,
    *,
    recomputes: bool = False,
) -> dict:
    """All that a training step does with tensors; its figures."""
    policy = Policy(model, engine=engine, gradient_checkpointing=recomputes, warn=ignore)
    old = BasePolicy(policy) if policy.adapters else Policy(reference, engine=engine, warn=ignore)
    # A large epsilon: a key bias has no gradient but rounding, which AdamW would blow up.
    optimizer = PolicyOptimizer(policy, eps=1e-3)
    gmpo, grpo = settings_of("gmpo"), settings_of("grpo")
    steps, mismatch = with_old_logprobs(policy, [step_on(device)], temperature=0.9)
    (step,) = with_reference_logprobs(old, steps, temperature=0.9)
    assert mismatch is not None
    figures = {"mismatch": mismatch.mean}
    figures["cosine"] = gradient_cosine(policy, step, settings=gmpo, other=grpo)
    measures = accumulate_gradients(policy, step, gmpo)
    figures["norm"] = optimizer.apply_step(learning_rate=1e-2, clip_norm=0.5)
    assert measures.kl_ref_k3 is not None and measures.entropy is not None
    figures |= {"loss": measures.loss, "kl": measures.kl_ref_k3, "entropy": measures.entropy}
    return figures


@pytest.mark.parametrize(
    ("family", "engine", "dtype"),
    [*((*path, torch.float32) for path in PATHS), ("llama", "fast", torch.bfloat16)],
)
def test_an_update_elsewhere_gives_the_cpus_figures_and_weights(
    family: str, engine: str, dtype: torch.dtype
):
    here, reference = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype, seed=1)
    there, far_reference = copy.deepcopy(here), copy.deepcopy(reference)
    expected = one_update(here, reference, engine, "cpu")
    move_there(there)
    move_there(far_reference)
    with elsewhere() as device:
        figures = one_update(there, far_reference, engine, str(device))
    # The optimizer takes torch's loop there and its fused kernel here.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert figures == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for (name, parameter), other in zip(here.named_parameters(), there.parameters(), strict=True):
        assert other.device == ELSEWHERE
        torch.testing.assert_close(
            values_of(other.data), parameter.data, rtol=tolerance, atol=tolerance, msg=name
        )


@every_path
def test_adapters_elsewhere_give_the_cpus_figures_and_weights(family: str, engine: str):
    here = tiny_model(family)
    there = copy.deepcopy(here)
    add_adapters(here, rank=3, alpha=6.0)
    expected = one_update(here, here, engine, "cpu", recomputes=True)
    move_there(there)
    with elsewhere() as device:
        add_adapters(there, rank=3, alpha=6.0)
        figures = one_update(there, there, engine, str(device), recomputes=True)
    assert figures == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for name, layer in adapters_of(there).items():
        for kind in ("lora_A", "lora_B"):
            factor = layer.get_parameter(kind)
            assert factor.device == ELSEWHERE
            ours = here.get_parameter(f"{name}.{kind}")
            torch.testing.assert_close(
                values_of(factor.data), ours.data, rtol=1e-4, atol=1e-4, msg=name
            )


@pytest.mark.parametrize("skips", [False, True])
def test_a_batch_lies_on_the_asked_device(skips: bool):
    with elsewhere() as device:
        step = one_step(
            random_groups(PROMPTS, LENGTHS), ADVANTAGES, skips_dead_rows=skips, device=str(device)
        )
        (batch,) = step.micro_batches
        tensors = [getattr(batch, field.name) for field in fields(MicroBatch)]
        assert {t.device for t in tensors if isinstance(t, Tensor)} == {ELSEWHERE}


@every_path
def test_sampling_elsewhere_gives_the_cpus_completions(family: str, engine: str):
    requests = [
        SampleRequest(id="a", token_ids=[5, 6, 7, 8, 9], num_completions=3, max_tokens=5),
        # 62 tokens and 4 more: the cache of 64 positions has to grow.
        SampleRequest(id="b", token_ids=[5, 6, 7, 8, 10] + [9] * 57, max_tokens=4, top_p=0.9),
        SampleRequest(id="c", token_ids=[20], max_tokens=3, temperature=0.0, top_logprobs=2),
        SampleRequest(id="d", token_ids=[20, 21], max_tokens=2, prompt_logprobs=True),
    ]

    def sample(model: PreTrainedModel, weights: PreTrainedModel) -> dict:
        decoder = (
            LlamaDecoder(LlamaBody(model), max_rows=3)
            if engine == "fast"
            else TransformersDecoder(model)
        )
        sampler = LocalSampler(decoder, context_length=256, max_rows=3)
        sampler.load_weights(1, weights.named_parameters())
        return complete(sampler, requests)

    here, other = tiny_model(family), tiny_model(family, seed=1)
    there, far_other = copy.deepcopy(here), copy.deepcopy(other)
    expected = sample(here, other)
    move_there(there)
    move_there(far_other)
    with elsewhere():
        completions = sample(there, far_other)
    for name, of_one in expected.items():
        for one, far in zip(of_one, completions[name], strict=True):
            assert far.token_ids.tolist() == one.token_ids.tolist()
            assert far.logprobs == pytest.approx(one.logprobs, abs=1e-5)
            assert far.prompt_logprobs == pytest.approx(one.prompt_logprobs, abs=1e-5)
            assert len(far.top_logprobs) == len(one.top_logprobs)


class _Operations(TorchDispatchMode):
    """Counts operations, products, and those that wait for the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(isinstance(arg, Tensor) and arg.device == ELSEWHERE for arg in args)
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        is_read = func is torch.ops.aten._local_scalar_dense.default
        self.waits += is_read and args[0].device == ELSEWHERE
        return func(*args, **(kwargs or {}))


def drawing_elsewhere(rows: int, **settings: float) -> _Operations:
    """What drawing for so many rows does on a device, its settings on the CPU."""
    asked = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | settings
    with elsewhere() as device:
        logits = torch.linspace(-3, 3, rows * 600).view(rows, 600).to(device)
        uniforms = torch.full((rows,), 0.5, dtype=torch.float64).to(device)
        with _Operations() as operations:
            draw_tokens(
                logits,
                uniforms=uniforms,
                **{name: torch.full((rows,), value) for name, value in asked.items()},
            )
    return operations


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 5}]
)
def test_drawing_on_a_device_waits_for_it_once_and_takes_all_rows_together(settings: dict):
    few, many = drawing_elsewhere(2, **settings), drawing_elsewhere(40, **settings)
    assert few.waits == many.waits == 1
    assert few.count == many.count


def test_on_a_device_the_head_runs_in_few_tiles():
    with elsewhere() as device:
        hidden = torch.ones(1100, 4).to(device).requires_grad_()
        weight = torch.ones(5000, 4).to(device).requires_grad_()
        token_ids = torch.zeros(1100, dtype=torch.long).to(device)
        with _Operations() as operations:
            logprobs, _ = chunked_token_logprobs(hidden, weight, token_ids)
            logprobs.sum().backward()
    # A tile's logits twice, and a gradient each of hidden states and weight.
    assert operations.products == 4


def test_on_a_device_a_rows_tokens_attend_together_as_far_as_the_mask_allows(
    monkeypatch: pytest.MonkeyPatch,
):
    body = LlamaBody(tiny_model())
    valid = torch.ones(2, 300, dtype=torch.bool)
    assert len(_query_blocks(valid, 300, body)) == 2
    with elsewhere() as device:
        assert len(_query_blocks(valid.to(device), 300, body)) == 1
        # Two rows, two heads of a key head, 300 x 300 positions: more than half of this.
        monkeypatch.setattr("gmpo.policy.packed._MASK_NUMBERS", 200_000)
        assert len(_query_blocks(valid.to(device), 300, body)) == 2


def test_on_a_device_no_plan_for_the_compiled_attention_is_made(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the compiled attention does not run there")

    monkeypatch.setattr("gmpo.kernels.attention.tree_of", refuse)
    model = tiny_model()
    move_there(model)
    with elsewhere() as device:
        (batch, *_) = step_on(str(device)).micro_batches
        Policy(model, warn=ignore).score(batch)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_scoring_has_a_backward_pass_on_metas_shapes_alone(family: str):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model(family).config)
    body = LlamaBody(model)
    token_ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    lengths = torch.zeros(2, dtype=torch.long, device="meta")
    _, past = extend(body, token_ids, lengths)
    hidden, _ = extend(body, token_ids, lengths, past)
    logprobs, entropy = chunked_token_logprobs(
        body.final_norm(hidden).flatten(0, 1),
        body.head_weight,
        token_ids.flatten(),
        with_entropy=True,
    )
    assert entropy is not None
    (logprobs.sum() + entropy.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.device.type == "meta"


# --- the second device itself ---


def test_the_second_device_holds_values_and_moves_them_on_request():
    with elsewhere() as device:
        made = torch.tensor([1.0, 2.0, 4.0], device=device)
        assert made.device == device
        assert made.tolist() == [1.0, 2.0, 4.0]
        assert int(made.max()) == 4
        assert bool((made > 3).any())
        assert (made * 2 + torch.tensor(1.0)).cpu().tolist() == [3.0, 5.0, 9.0]
        assert torch.arange(3, device=device).device == device
        assert torch.zeros(3).device.type == "cpu"
        made[1:] = torch.zeros(2, device=device)
        assert values_of(made).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "mix",
    [
        lambda far: far + torch.ones(3),
        lambda far: torch.cat((far, torch.ones(1))),
        lambda far: torch.where(torch.ones(3, dtype=torch.bool), far, 0.0),
        lambda far: far.gather(0, torch.zeros(1, dtype=torch.long)),
        lambda far: far.masked_fill(torch.ones(3, dtype=torch.bool), 0.0),
        lambda far: torch.ones(2, 3) @ far,
        lambda far: far.add_(torch.ones(3)),
    ],
)
def test_an_operation_between_the_devices_is_refused(mix):
    with elsewhere() as device:
        far = torch.tensor([1.0, 2.0, 4.0], device=device)
        with pytest.raises(MixedDevicesError, match="tensors of the CPU and of another device"):
            mix(far)


def test_a_batch_left_on_the_cpu_would_be_found():
    model = tiny_model()
    move_there(model)
    with elsewhere() as device:
        policy = Policy(model, warn=ignore)
        (batch, *_) = step_on(str(device)).micro_batches
        policy.score(batch)
        for field in fields(MicroBatch):
            value = getattr(batch, field.name)
            used = field.name not in ("advantages", "sampler_logprobs", "old_logprobs")
            # An index may lie on the CPU: torch moves it.
            used &= field.name not in ("prompt_of_row", "mask")
            if isinstance(value, Tensor) and used:
                with pytest.raises((MixedDevicesError, RuntimeError)):
                    policy.score(replace(batch, **{field.name: value.cpu()}))


# --- a real accelerator, where there is one ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@every_path
def test_an_update_on_cuda_gives_the_cpus_figures(family: str, engine: str):
    here, reference = tiny_model(family), tiny_model(family, seed=1)
    there, far_reference = copy.deepcopy(here).cuda(), copy.deepcopy(reference).cuda()
    expected = one_update(here, reference, engine, "cpu")
    figures = one_update(there, far_reference, engine, "cuda")
    assert figures == pytest.approx(expected, rel=1e-2, abs=1e-3)
