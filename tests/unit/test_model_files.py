"""A version is a digest of names and values: whoever computes it, from whichever files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import FAMILIES, tiny_model

from gmpo.errors import ModelError
from gmpo.model_files import file_digest, holds_adapter, model_paths, weights_version
from gmpo.policy.load import load_model, model_version


def saved(folder: Path, **options: object) -> Path:
    tiny_model(**options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_version_from_the_files_is_that_of_the_loaded_model(family: str, tmp_path: Path):
    folder = saved(tmp_path / "model", family=family)
    assert weights_version(folder) == model_version(load_model(str(folder), dtype="fp32"))


def test_untied_heads_count(tmp_path: Path):
    folder = saved(tmp_path / "model", tied=False)
    assert weights_version(folder) == model_version(load_model(str(folder), dtype="fp32"))


def test_a_head_that_is_stored_twice_counts_once(tmp_path: Path):
    folder = saved(tmp_path / "model")
    before = weights_version(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert weights_version(folder) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_formats_are_widened(dtype: torch.dtype, tmp_path: Path):
    folder = saved(tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    assert weights_version(folder) == model_version(load_model(str(folder), dtype="fp32"))


def test_shards_do_not_matter_and_any_value_does(tmp_path: Path):
    folder = saved(tmp_path / "model")
    before = weights_version(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    assert weights_version(folder) == before
    tensors[names[0]][0] += 1e-3
    save_file({name: tensors[name] for name in names[:3]}, folder / "model-0.safetensors")
    assert weights_version(folder) != before
    save_file({names[-1]: tensors[names[-1]]}, folder / "model-0.safetensors")
    with pytest.raises(ModelError, match="leave one of them"):
        weights_version(folder)


def test_an_adapter_is_its_factors_scale_and_base(tmp_path: Path):
    config = {"base_model_name_or_path": "a", "r": 2, "lora_alpha": 4}
    factors = {"base_model.model.q.lora_A.weight": torch.ones(2, 2)}

    def version(**changed: object) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        save_file(factors, tmp_path / "adapter_model.safetensors")
        return weights_version(tmp_path)

    assert holds_adapter(tmp_path) is False
    seen = {version(), version(base_model_name_or_path="b"), version(lora_alpha=8)}
    assert len(seen) == 3 and holds_adapter(tmp_path)
    assert version(peft_version="x") == version()


def test_what_is_no_model_or_damaged_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="holds no model"):
        weights_version(tmp_path)
    folder = saved(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:4], whole[:-1], b"\xff" * 20, b"\x02" + b"\0" * 7 + b"{x"):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="damaged or cut short"):
            weights_version(folder)
    save_file({"a": torch.ones(2, dtype=torch.int8)}, file)
    with pytest.raises(ModelError, match="as I8"):
        weights_version(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        weights_version(folder)


def test_files_are_listed_once_and_hidden_ones_are_none(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("b.json", "sub/a.json", ".lock"):
        (tmp_path / name).write_text(name)
    assert model_paths(tmp_path) == [tmp_path / "b.json", tmp_path / "sub" / "a.json"]
    assert file_digest(tmp_path / "b.json")[:8] == "32af381d"
