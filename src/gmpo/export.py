"""A run's model for other tools: a plain `transformers` folder, or a PEFT adapter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gmpo.checkpoint import (
    checkpoint_model,
    checkpoint_round,
    checkpoints_newest_first,
    save_tokenizer,
    verified_content,
)
from gmpo.errors import CheckpointError, ConfigError, ExportError
from gmpo.flushing import flush_folder
from gmpo.policy.adapter_files import is_adapter_folder, read_adapter, write_adapter
from gmpo.policy.load import load_model, load_tokenizer
from gmpo.tracking import no_checkpoint, provenance

__all__ = ["Exported", "copy_model", "export_run"]

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written and where it came from."""

    destination: str
    format: str
    precision: str
    checkpoint: str
    round: int

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return asdict(self)


def export_run(
    run: Path,
    destination: Path,
    *,
    form: str = "transformers",
    precision: str = "fp32",
    round_number: int | None = None,
) -> Exported:
    """Write a checkpoint's model to a new folder that needs no `gmpo` to be read.

    Everything goes to a temporary name beside it first and is then renamed. `gmpo.json` in it says
    which run, round and versions it came from.

    Args:
        run: a run folder.
        destination: must not exist.
        form: "transformers" for the whole model, adapters merged, "peft" for the adapters alone.
        precision: "fp32", as training keeps its weights, or "bf16", rounded once, after merging.
        round_number: of the checkpoint; None takes the newest.

    Raises:
        ConfigError: no such form or precision.
        ExportError: there is no such run, the destination exists or cannot be written, or the run
            has no adapters to be exported as such.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if form not in _WRITERS:
        raise ConfigError(f"--format is {form!r}; allowed: {', '.join(_WRITERS)}")
    if precision not in _PRECISIONS:
        raise ConfigError(f"--dtype is {precision!r}; allowed: {', '.join(_PRECISIONS)}")
    checkpoint = _checkpoint(run, round_number)
    source = checkpoint_model(checkpoint)
    if form == "peft" and not is_adapter_folder(source):
        raise ExportError(
            f"run {run} trained all weights, so it has no adapter; export it with --format "
            "transformers, or train with lora.rank above 0"
        )
    if destination.exists() or destination.is_symlink():
        raise ExportError(f"{destination} exists and is not overwritten; name a new folder")
    verified_content(checkpoint)
    exported = Exported(
        destination=str(destination),
        format=form,
        precision=precision,
        checkpoint=str(checkpoint),
        round=checkpoint_round(checkpoint),
    )
    _write_then_rename(destination, lambda partial: _write(partial, source, exported))
    return exported


def copy_model(name: str, destination: Path) -> None:
    """Write a model as a plain `transformers` folder in fp32, adapters merged.

    Args:
        name: a bundled model, a hub name, or the folder of a model or adapter.
        destination: must not exist; gets its name once everything in it is on the disk.

    Raises:
        ExportError: the destination exists or cannot be written.
        ModelError: there is no such model, or it is damaged.
    """
    if destination.exists() or destination.is_symlink():
        raise ExportError(f"{destination} exists and is not overwritten; name a new folder")

    def write(folder: Path) -> None:
        _write_model(folder, name, torch.float32)
        save_tokenizer(load_tokenizer(name), folder)
        origin = {"model": name, **provenance()}
        (folder / "gmpo.json").write_text(json.dumps(origin, indent=1), encoding="utf-8")

    _write_then_rename(destination, write)


def _checkpoint(run: Path, round_number: int | None) -> Path:
    if not (run / "recipe.toml").is_file():
        raise ExportError(f"{run} is no run folder: it holds no recipe.toml; name a run's folder")
    found = checkpoints_newest_first(run / "checkpoints")
    if not found:
        raise CheckpointError(no_checkpoint(run))
    for path in found:
        if round_number in (None, checkpoint_round(path)):
            return path
    rounds = sorted(checkpoint_round(path) for path in found)
    raise CheckpointError(
        f"run {run} has no checkpoint of round {round_number}; it has those of {rounds}"
    )


def _write(folder: Path, source: Path, exported: Exported) -> None:
    _WRITERS[exported.format](folder, source, _PRECISIONS[exported.precision])
    save_tokenizer(load_tokenizer(str(source)), folder)
    origin = {**exported.as_dict(), **provenance()}
    del origin["destination"]
    (folder / "gmpo.json").write_text(json.dumps(origin, indent=1), encoding="utf-8")


def _write_model(folder: Path, source: Path | str, dtype: torch.dtype) -> None:
    model = load_model(str(source), device="cpu", dtype="fp32")
    # Parameters alone: rotary frequencies and other buffers stay as the model keeps them.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)


def _write_adapter(folder: Path, source: Path, dtype: torch.dtype) -> None:
    adapter = read_adapter(source)
    tensors = {name: tensor.to(dtype) for name, tensor in adapter.tensors.items()}
    write_adapter(folder, adapter.config, tensors)


_WRITERS = {"transformers": _write_model, "peft": _write_adapter}


def _write_then_rename(destination: Path, write: Callable[[Path], None]) -> None:
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write(partial)
        flush_folder(partial)
        partial.rename(destination)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{destination} could not be written: {error}; nothing was left there. Free space or "
            "name another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
