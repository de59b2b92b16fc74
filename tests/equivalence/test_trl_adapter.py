"""TRL's trainer with gmpo's loss has gmpo's gradient, however its steps are split."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts.replay import LIMITS, Replayed, relative_difference, through_gmpo, through_trl
from tests.models import character_tokenizer, tiny_model
from tests.rollout_groups import VOCABULARY
from tests.trl_trainers import rounds_of, tolerated, trainer_of
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

from gmpo.adapters.trl import TRLGMPOTrainer
from gmpo.errors import NonFiniteError
from gmpo.objective import gmpo_terms, step_diagnostics

pytestmark = tolerated


@functools.cache
def replayed(kind: type[GRPOTrainer], optimizer: str = "sgd", **options: Any) -> Replayed:
    return through_trl(
        tiny_model(), character_tokenizer(), rounds_of("gmpo", optimizer), kind=kind, **options
    )


# --- whole rounds ---


@pytest.mark.parametrize("optimizer", list(LIMITS))
def test_the_adapter_moves_the_weights_as_gmpo_does(optimizer: str):
    theirs = replayed(TRLGMPOTrainer, optimizer)
    ours, _ = through_gmpo(tiny_model(), rounds_of("gmpo", optimizer), theirs.steps)
    gap = relative_difference(theirs.update, ours)
    print(f"\nadapter, {optimizer}: {gap:.2e}")
    assert gap <= LIMITS[optimizer]


@pytest.mark.parametrize("cut", [False, True])
def test_the_adapter_moves_the_weights_as_trls_own_gmpo_where_that_is_right(cut: bool):
    ours = replayed(TRLGMPOTrainer, mask_truncated_completions=cut)
    theirs = replayed(GMPOTrainer, mask_truncated_completions=cut)
    assert ours.steps == theirs.steps
    assert relative_difference(ours.update, theirs.update) <= 1e-5


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("cut", [False, True])
def test_the_split_into_accumulated_micro_batches_does_not_change_the_update(
    micro_batches: int, cut: bool
):
    whole = replayed(TRLGMPOTrainer, mask_truncated_completions=cut)
    split = replayed(
        TRLGMPOTrainer,
        mask_truncated_completions=cut,
        per_device_train_batch_size=4 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=4 * micro_batches,
    )
    joined = [
        list(itertools.chain(*split.steps[first : first + micro_batches]))
        for first in range(0, len(split.steps), micro_batches)
    ]
    assert joined == whole.steps
    assert relative_difference(split.update, whole.update) <= 1e-5


def test_rows_whose_tokens_are_all_masked_are_counted_in_the_log():
    counts = [line["rows_without_tokens"] for line in lines_of(mask_truncated_completions=True)]
    assert sum(counts) == 16  # every second of 32 completions
    assert not any(line["rows_without_tokens"] for line in lines_of())


def lines_of(**options: Any) -> list[dict[str, float]]:
    logged = replayed(TRLGMPOTrainer, **options).logged
    return [line for line in logged if "grad_norm" in line]


def test_clip_share_and_ratio_range_are_logged_from_the_tensors_of_the_loss():
    theirs = replayed(TRLGMPOTrainer)
    _, figures = through_gmpo(
        tiny_model(), rounds_of("gmpo", "sgd"), theirs.steps, skips_dead_rows=False
    )
    assert len(figures) == len(lines_of()) == 8
    for line, expected in zip(lines_of(), figures, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(
            expected, rel=1e-3, abs=1e-5
        )


def test_the_tiny_model_trains_through_trls_own_sampling(tmp_path: Path):
    model = tiny_model()
    before = model.model.embed_tokens.weight.detach().clone()
    trainer = trainer_of(
        TRLGMPOTrainer,
        model=model,
        output_dir=str(tmp_path),
        max_steps=8,
        max_completion_length=6,
        learning_rate=1e-3,
        logging_steps=1,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(lines) == 8
    assert max(line["grad_norm"] for line in lines) > 0
    # The first step of a round is on-policy; a later one is not.
    assert lines[0]["ratio/min"] == pytest.approx(1.0, abs=1e-4)
    assert max(line["ratio/max"] for line in lines) > 1.01
    assert not torch.equal(before, model.model.embed_tokens.weight)


# --- one micro-batch ---


@functools.cache
def idle(kind: type[GRPOTrainer]) -> Any:
    """Shared by tests that only ask for its loss."""
    return trainer_of(kind)


def inputs_of(**changes: Any) -> dict[str, Any]:
    """4 rows as TRL hands them out: lengths 5, 2, 3 and 1, far enough off-policy for every clip."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]])
    drawn = torch.randint(5, VOCABULARY, (4, 8), generator=generator)
    inputs = {
        "prompt_ids": drawn[:, :3] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": drawn[:, 3:] * mask,
        "completion_mask": mask,
        "advantages": torch.tensor([1.2, -0.7, 0.9, -1.4]),
    }
    with torch.no_grad():
        own, _ = idle(TRLGMPOTrainer)._scores(idle(TRLGMPOTrainer).model, inputs)
    inputs["old_per_token_logps"] = own - torch.randn(own.shape, generator=generator)
    return {**inputs, **changes}


def loss_and_gradient(trainer: Any, inputs: dict[str, Any]) -> tuple[float, Tensor]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([w.grad.flatten() for w in trainer.model.parameters()])


def expected_loss(inputs: dict[str, Any]) -> Tensor:
    """Mean of gmpo's own loss over the rows."""
    trainer = idle(TRLGMPOTrainer)
    own, _ = trainer._scores(trainer.model, inputs)
    terms = gmpo_terms(
        policy_logprobs=own,
        old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"],
        mask=inputs["completion_mask"].bool(),
    )
    return terms.loss.mean()


def test_the_loss_and_its_gradient_are_those_of_gmpo_terms_and_of_trls_gmpo():
    inputs = inputs_of()
    loss, gradient = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    assert loss == pytest.approx(expected_loss(inputs).item(), rel=1e-6)
    trls_loss, trls_gradient = loss_and_gradient(idle(GMPOTrainer), inputs)
    assert loss == pytest.approx(trls_loss, rel=1e-5)
    torch.testing.assert_close(gradient, trls_gradient, rtol=1e-4, atol=1e-6)


def test_the_clip_is_the_configs_low_and_high_in_log_space():
    trainer = trainer_of(TRLGMPOTrainer, epsilon=0.1, epsilon_high=0.3)
    inputs = inputs_of()
    with torch.no_grad():
        own, _ = trainer._scores(trainer.model, inputs)
    expected = gmpo_terms(
        policy_logprobs=own,
        old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"],
        mask=inputs["completion_mask"].bool(),
        clip_low=0.1,
        clip_high=0.3,
    )
    loss, _ = loss_and_gradient(trainer, inputs)
    assert loss == pytest.approx(expected.loss.mean().item(), rel=1e-6)
    assert loss != pytest.approx(expected_loss(inputs).item(), rel=1e-2)


def test_a_zero_advantage_with_a_huge_ratio_gives_no_gradient_where_trls_gmpo_gives_nan():
    inputs = inputs_of(advantages=torch.tensor([1.2, 0.0, 0.9, -1.4]))
    expected_value, expected = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    far = inputs["old_per_token_logps"].clone()
    far[1] -= 200.0
    inputs["old_per_token_logps"] = far
    loss, gradient = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    assert loss == expected_value
    assert torch.equal(gradient, expected)
    trls_loss, _ = loss_and_gradient(idle(GMPOTrainer), inputs)
    assert trls_loss != trls_loss


def test_without_old_logprobs_the_step_is_on_policy():
    inputs = inputs_of(old_per_token_logps=None)
    loss, gradient = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    assert loss == pytest.approx(-(1.2 - 0.7 + 0.9 - 1.4) / 4, abs=1e-6)
    _, expected = loss_and_gradient(idle(GMPOTrainer), inputs)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_sequence_weight_of_vllm_multiplies_its_sequences_loss():
    weights = torch.tensor([[0.5], [2.0], [0.0], [1.0]])
    inputs = inputs_of(importance_sampling_ratio=weights)
    loss, gradient = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    plain = inputs_of()
    rows = [
        loss_and_gradient(
            idle(TRLGMPOTrainer),
            {name: value[row : row + 1] for name, value in plain.items()},
        )
        for row in range(4)
    ]
    assert loss == pytest.approx(
        sum(w * each for w, (each, _) in zip(weights.flatten().tolist(), rows, strict=True)) / 4,
        rel=1e-5,
    )
    expected = sum(w * g for w, (_, g) in zip(weights.flatten(), rows, strict=True)) / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_sequence_that_vllm_masks_gives_nothing_even_where_its_ratio_overflows():
    inputs = inputs_of(importance_sampling_ratio=torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    expected_value, expected = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    far = inputs["old_per_token_logps"].clone()
    far[1] -= 200.0
    inputs["old_per_token_logps"] = far
    loss, gradient = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    assert loss == expected_value
    assert torch.equal(gradient, expected)


def test_a_tools_tokens_do_not_count():
    tools = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    inputs = inputs_of(tool_mask=tools)
    loss, gradient = loss_and_gradient(idle(TRLGMPOTrainer), inputs)
    trls_loss, expected = loss_and_gradient(idle(GMPOTrainer), inputs)
    assert loss == pytest.approx(trls_loss, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert loss != pytest.approx(loss_and_gradient(idle(TRLGMPOTrainer), inputs_of())[0], rel=1e-3)


@pytest.mark.parametrize("corrects", [False, True])
def test_the_kl_term_is_trls_with_and_without_its_bias_correction(
    corrects: bool, monkeypatch: pytest.MonkeyPatch
):
    # GRPO's trainer is the one that has both; what beta adds to its loss is the KL term.
    grpo = trainer_of(
        GRPOTrainer, config=GRPOConfig, loss_type="grpo", use_bias_correction_kl=corrects
    )
    ours = idle(TRLGMPOTrainer)
    monkeypatch.setattr(ours.args, "use_bias_correction_kl", corrects)
    reference = 0.3 * torch.sin(torch.arange(20.0)).view(4, 5)
    inputs = inputs_of()
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"] + reference
    added = []
    for trainer in (ours, grpo):
        monkeypatch.setattr(trainer, "beta", 0.5)
        loss, gradient = loss_and_gradient(trainer, inputs)
        monkeypatch.setattr(trainer, "beta", 0.0)
        without, gradient_without = loss_and_gradient(trainer, inputs)
        added.append((loss - without, gradient - gradient_without))
    assert added[0][0] == pytest.approx(added[1][0], rel=1e-4)
    torch.testing.assert_close(added[0][1], added[1][1], rtol=1e-3, atol=1e-5)
    logged = [trainer._metrics["train"]["kl"][-1] for trainer in (ours, grpo)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_a_micro_batch_whose_tokens_are_all_masked_gives_zero_and_no_figures():
    trainer = idle(TRLGMPOTrainer)
    trainer._metrics["train"].clear()
    inputs = inputs_of(tool_mask=torch.zeros(4, 5, dtype=torch.long))
    loss, gradient = loss_and_gradient(trainer, inputs)
    assert loss == 0 and not gradient.any()
    metrics = trainer._metrics["train"]
    assert metrics["rows_without_tokens"] == [4.0]
    assert all(value != value for value in metrics["ratio/min"])  # left out of TRL's means
    assert "entropy" not in metrics


def test_only_training_divides_by_the_accumulated_micro_batches(monkeypatch: pytest.MonkeyPatch):
    trainer, inputs = idle(TRLGMPOTrainer), inputs_of()
    whole, _ = loss_and_gradient(trainer, inputs)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 4)
    assert loss_and_gradient(trainer, inputs)[0] == pytest.approx(whole / 4)
    trainer.model.eval()
    try:
        assert loss_and_gradient(trainer, inputs)[0] == pytest.approx(whole)
    finally:
        trainer.model.train()


def test_a_loss_that_is_not_finite_stops_before_the_weights_move():
    inputs = inputs_of()
    inputs["old_per_token_logps"][1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the loss is \[nan\] \(one a process\) in step 0"):
        idle(TRLGMPOTrainer)._compute_loss(idle(TRLGMPOTrainer).model, inputs)


def test_the_figures_of_a_micro_batch_are_those_of_step_diagnostics():
    trainer, inputs = idle(TRLGMPOTrainer), inputs_of()
    trainer._metrics["train"].clear()
    own, _ = trainer._scores(trainer.model, inputs)
    mask = inputs["completion_mask"].bool()
    terms = gmpo_terms(
        policy_logprobs=own,
        old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"],
        mask=mask,
    )
    expected = step_diagnostics([terms], [mask])
    loss_and_gradient(trainer, inputs)
    for name, value in expected.items():
        assert trainer._metrics["train"][name] == [pytest.approx(value, rel=1e-5)], name
