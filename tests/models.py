"""Tiny random models and a tokenizer, made in memory: every architecture the tests run on."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")


def character_tokenizer(*, chat: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, so that tests can read token ids."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
        **({"pad_token": "<pad>"} if pad else {}),
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tied: bool = True,
    layers: int = 2,
) -> PreTrainedModel:
    """A random small model whose logits are spread enough for draws to differ."""
    shared = {
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    grouped = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **shared,
    }
    configs = {
        "llama": lambda: LlamaConfig(**grouped),
        "qwen2": lambda: Qwen2Config(**grouped),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=8),
        "mistral": lambda: MistralConfig(**grouped, sliding_window=None),
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=256, **shared),
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configs[family](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = 1
    return model.eval()


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0) -> str:
    """A tiny model's folder with its tokenizer, as a user would have it."""
    tiny_model(family, seed=seed).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)
