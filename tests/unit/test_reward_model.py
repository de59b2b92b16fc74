"""A sequence classifier as a reward: batched, its own template and context, other heads refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import CHARACTERS, SPECIAL, character_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from gmpo.errors import ModelError
from gmpo.rewards import RewardFault
from gmpo.rewards.classifier import ClassifierReward, load_classifier_reward


def saved(
    folder: Path, *, outputs: int = 1, chat: bool = True, pad: bool = True, positions: int = 64
) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        num_labels=outputs,
        pad_token_id=0 if pad else None,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    model.save_pretrained(folder)
    character_tokenizer(chat=chat, pad=pad).save_pretrained(folder)
    return str(folder)


def loaded(name: str) -> ClassifierReward:
    return load_classifier_reward(name, device=torch.device("cpu"), dtype=torch.float32)


def chats(*pairs: tuple[str, str]) -> dict[str, list]:
    return {
        "prompts": [[{"role": "user", "content": question}] for question, _ in pairs],
        "completions": [[{"role": "assistant", "content": answer}] for _, answer in pairs],
    }


def logit(reward: ClassifierReward, text: str) -> float:
    """The slow and obvious way: one text, no padding."""
    token_ids = torch.tensor([reward.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return float(reward.model(token_ids).logits[0, 0])


PAIRS = [("2+2?", "4"), ("What is 12 * 12?", "It is 144."), ("1?", ""), ("7+1?", "9")]


def test_a_batch_gives_what_each_rendered_chat_gives_alone(tmp_path: Path):
    reward = loaded(saved(tmp_path))
    alone = [logit(reward, f"<user>{q}<end><assistant>{a}<end>") for q, a in PAIRS]
    assert len({round(value, 3) for value in alone}) == len(PAIRS)
    assert reward(**chats(*PAIRS)) == pytest.approx(alone, abs=1e-5)


def test_small_batches_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reward = loaded(saved(tmp_path))
    together = reward(**chats(*PAIRS))
    monkeypatch.setattr("gmpo.rewards.classifier._BATCH_TOKENS", 1)
    assert reward(**chats(*PAIRS)) == pytest.approx(together, abs=1e-5)


def test_without_a_template_turns_are_joined_by_line_breaks(tmp_path: Path):
    reward = loaded(saved(tmp_path, chat=False))
    assert reward(**chats(("2+2?", "4"))) == pytest.approx([logit(reward, "2+2?\n4")], abs=1e-5)


def test_plain_texts_are_joined_as_they_are(tmp_path: Path):
    reward = loaded(saved(tmp_path))
    values = reward(prompts=["2+2 ="], completions=[" 4"])
    assert values == pytest.approx([logit(reward, "2+2 = 4")], abs=1e-5)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path: Path):
    reward = loaded(saved(tmp_path, pad=False, chat=False))
    alone = [logit(reward, f"{q}\n{a}") for q, a in PAIRS]
    assert reward(**chats(*PAIRS)) == pytest.approx(alone, abs=1e-5)


def test_a_text_beyond_the_context_is_a_fault_of_its_own_row_and_not_cut(tmp_path: Path):
    reward = loaded(saved(tmp_path, positions=20))
    # 4 + 13 characters, two turns' openings and ends: 21 tokens
    long = ("2+2?", "1234567890123")
    first, second = reward(**chats(("2+2?", "4"), long))
    assert isinstance(first, float)
    assert second == RewardFault(
        what="cannot be given: prompt and completion have 21 tokens, and the reward model takes "
        "20; lower sampling.max_length"
    )


@pytest.mark.parametrize("reserved", ["\U000f0000", "\U000f0001"])
def test_a_character_that_rendering_drops_is_a_fault_of_its_own_row(tmp_path: Path, reserved: str):
    reward = loaded(saved(tmp_path))
    asked, answered, sound = reward(**chats((f"2{reserved}", "4"), ("2", f"4{reserved}"), PAIRS[0]))
    for fault in (asked, answered):
        assert isinstance(fault, RewardFault) and f"U+{ord(reserved):X}" in fault.what
    assert sound == pytest.approx(reward(**chats(PAIRS[0]))[0], abs=1e-5)


def test_it_carries_no_gradient(tmp_path: Path):
    reward = loaded(saved(tmp_path))
    assert not any(weight.requires_grad for weight in reward.model.parameters())
    assert not reward.model.training


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        loaded(name)
    return str(caught.value)


def test_a_head_of_another_size_is_refused(tmp_path: Path):
    name = saved(tmp_path, outputs=3)
    assert refusal(name) == (
        f"reward model {name!r} has 3 outputs; it must have one (num_labels = 1), which is the "
        "reward"
    )


def test_a_model_that_was_never_a_classifier_is_refused(tmp_path: Path):
    from tests.models import save_tiny

    name = save_tiny(tmp_path)
    assert refusal(name).startswith(f"reward model {name!r} lacks the weights ['score.weight']")


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    assert refusal(str(tmp_path)).startswith(f"cannot load reward model {str(tmp_path)!r}: ")
