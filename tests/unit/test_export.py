"""Export: what other tools load, and what is refused without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.adapters import adapted_policy
from tests.disks import fill, small_disk
from tests.models import character_tokenizer, save_tiny, tiny_model
from tests.tiny_runs import tiny_recipe, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from gmpo import __version__
from gmpo.checkpoint import TrainingState, save_checkpoint
from gmpo.errors import CheckpointError, DamagedCheckpointError, ExportError
from gmpo.export import export_run
from gmpo.policy.score import Policy
from gmpo.update import PolicyOptimizer

TOKEN_IDS = torch.tensor([[11, 12, 13, 14, 15]])
FAMILIES = ("llama", "gpt2")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks for it
)


def checkpointed(policy: Policy, run: Path, *rounds: int) -> Policy:
    """A run folder with checkpoints of this policy."""
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(run / "recipe.toml", tiny_recipe("model"))
    for number in rounds:
        save_checkpoint(
            run / "checkpoints",
            policy=policy,
            optimizer=PolicyOptimizer(policy).adamw,
            tokenizer=character_tokenizer(),
            state=TrainingState(
                round=number,
                step=0,
                prompts_taken=0,
                mismatch_is_small=None,
                recipe_digest="",
                version="",
            ),
        )
    return policy


def full_run(folder: Path, family: str = "llama", *rounds: int) -> Policy:
    policy = Policy(tiny_model(family, seed=3), warn=lambda _: None)
    return checkpointed(policy, folder / "run", *(rounds or (2,)))


def lora_run(folder: Path, family: str = "llama") -> Policy:
    policy = adapted_policy(family, dtype=torch.float32, alpha=5.0)
    policy.model.name_or_path = save_tiny(folder / "base", family)
    return checkpointed(policy, folder / "run", 2)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS).logits


@pytest.mark.parametrize("kind", [full_run, lora_run])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_folder_loads_with_transformers_and_gives_the_policys_logits(
    family: str, kind: Any, tmp_path: Path
):
    policy = kind(tmp_path, family)
    export_run(tmp_path / "run", tmp_path / "out")
    # Nothing of the run or the base is needed any more.
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(policy.model), rtol=0, atol=1e-5)
    assert model.generation_config.eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == character_tokenizer().chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_folder_loads_with_peft_and_gives_the_policys_logits(family: str, tmp_path: Path):
    policy = lora_run(tmp_path, family)
    export_run(tmp_path / "run", tmp_path / "out", form="peft")
    shutil.rmtree(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(logits(model), logits(policy.model), rtol=0, atol=1e-5)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(found), logits(policy.model), rtol=0, atol=1e-5)


def test_an_untied_model_keeps_its_head(tmp_path: Path):
    policy = checkpointed(Policy(tiny_model(tied=False), warn=lambda _: None), tmp_path / "run", 1)
    export_run(tmp_path / "run", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["lm_head.weight"], policy.model.lm_head.weight.detach())


@pytest.mark.parametrize("kind", [full_run, lora_run])
def test_bf16_is_rounded_once_after_merging(kind: Any, tmp_path: Path):
    policy = kind(tmp_path)
    export_run(tmp_path / "run", tmp_path / "out", precision="bf16")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: tensor.bfloat16() for name, tensor in policy.named_weights()}
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        # Merging may differ in an fp32 rounding, which can fall on the border of a bf16 one.
        torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=0, msg=name)
        assert tensor.dtype == torch.bfloat16
        assert (tensor != expected[name]).sum() <= 1, name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_peft_folder_in_bf16_holds_rounded_factors(tmp_path: Path):
    policy = lora_run(tmp_path)
    export_run(tmp_path / "run", tmp_path / "out", form="peft", precision="bf16")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, weight in policy.trained_weights().items():
        found = tensors[f"base_model.model.{name}.weight"]
        assert torch.equal(found, weight.bfloat16()), name


def test_the_newest_checkpoint_is_taken_unless_another_is_named(tmp_path: Path):
    full_run(tmp_path, "llama", 1, 12)
    assert export_run(tmp_path / "run", tmp_path / "a").round == 12
    exported = export_run(tmp_path / "run", tmp_path / "b", round_number=1)
    assert exported.as_dict() == {
        "destination": str(tmp_path / "b"),
        "format": "transformers",
        "precision": "fp32",
        "checkpoint": str(tmp_path / "run" / "checkpoints" / "round-000001"),
        "round": 1,
    }
    origin = json.loads((tmp_path / "b" / "gmpo.json").read_text())
    assert (origin["round"], origin["gmpo"]) == (1, __version__)
    with pytest.raises(CheckpointError) as caught:
        export_run(tmp_path / "run", tmp_path / "c", round_number=3)
    assert str(caught.value) == (
        f"run {tmp_path / 'run'} has no checkpoint of round 3; it has those of [1, 12]"
    )


def test_a_full_fine_tune_has_no_adapter_to_export(tmp_path: Path):
    full_run(tmp_path)
    with pytest.raises(ExportError) as caught:
        export_run(tmp_path / "run", tmp_path / "out", form="peft")
    assert str(caught.value) == (
        f"run {tmp_path / 'run'} trained all weights, so it has no adapter; export it with "
        "--format transformers, or train with lora.rank above 0"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["a file", "an empty folder", "a dangling link"])
def test_what_is_there_is_not_overwritten(what: str, tmp_path: Path):
    full_run(tmp_path)
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    elif what == "an empty folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError) as caught:
        export_run(tmp_path / "run", out)
    assert str(caught.value) == f"{out} exists and is not overwritten; name a new folder"


def test_a_folder_that_is_no_run_and_a_run_without_a_checkpoint_are_refused(tmp_path: Path):
    with pytest.raises(ExportError) as caught:
        export_run(tmp_path, tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path} is no run folder: it holds no recipe.toml; name a run's folder"
    )
    checkpointed(Policy(tiny_model(), warn=lambda _: None), tmp_path / "run")
    with pytest.raises(CheckpointError, match="has no checkpoint yet; wait for one"):
        export_run(tmp_path / "run", tmp_path / "out")


def test_a_damaged_checkpoint_is_named_and_not_exported(tmp_path: Path):
    full_run(tmp_path)
    weights = tmp_path / "run" / "checkpoints" / "round-000002" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors is not what was written"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_full_disk_leaves_nothing_behind(share: float, tmp_path: Path):
    full_run(tmp_path)
    reference = tmp_path / "reference"
    export_run(tmp_path / "run", reference)
    size = sum(path.stat().st_size for path in reference.iterdir())
    with small_disk(tmp_path / "disk", kilobytes=2_000) as disk:
        fill(disk, leave=int(share * size))
        with pytest.raises(ExportError) as caught:
            export_run(tmp_path / "run", disk / "out")
        assert str(caught.value).startswith(f"{disk / 'out'} could not be written: ")
        assert [path.name for path in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        export_run(tmp_path / "run", disk / "out")
