"""Runs that train adapters alone: what they move, save and resume, and what the command does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.commands import gmpo, process, refusal
from tests.models import save_tiny, tiny_model
from tests.tiny_runs import metric_lines, tiny_recipe
from transformers import AutoModelForCausalLM

from gmpo.assembly import build_parts
from gmpo.errors import CheckpointError
from gmpo.policy.score import BasePolicy
from gmpo.training import TrainingResult, train

ADAPTER = "adapter/adapter_model.safetensors"


def ignore(_: str) -> None:
    """gpt2 takes the plain path, which is tested where it belongs."""


def run(model: str, folder: Path, *, resume: bool = False, **changes: Any) -> TrainingResult:
    recipe = tiny_recipe(
        model, **{"lora": {"rank": 4}, "objective__kl_coefficient": 0.01, **changes}
    )
    return train(recipe, folder=folder, resume=resume, warn=ignore)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        family: save_tiny(tmp_path_factory.mktemp(family), family) for family in ("llama", "gpt2")
    }


@pytest.fixture(scope="module")
def finished(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return run(
        models["llama"],
        tmp_path_factory.mktemp("runs") / "run",
        checkpoint={"every_rounds": 1, "keep": 2},
    )


def same_adapter(left: Path, right: Path) -> bool:
    a, b = load_file(left / ADAPTER), load_file(right / ADAPTER)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_adapters_move_and_the_sampler_follows_them(
    family: str, models: dict[str, str], tmp_path: Path
):
    result = run(models[family], tmp_path / "run")
    factors = load_file(result.checkpoint / ADAPTER)
    assert all(tensor.any() for name, tensor in factors.items() if "lora_B" in name)
    for line in metric_lines(result.folder, "round"):
        # In the second round the adapters have moved; both sides still compute the same.
        assert line["rollout/mismatch_max"] < 1e-4
        assert line["rollout/old_from_sampler"] == 1.0
    last = metric_lines(result.folder, "step")[-1]
    assert last["kl_ref/k3"] > 0  # away from the base, which is the reference


def test_a_checkpoint_holds_adapters_and_their_moments_alone(finished: TrainingResult):
    assert sorted(path.name for path in finished.checkpoint.iterdir()) == [
        "adapter",
        "optimizer.safetensors",
        "state.json",
    ]
    factors, moments = (
        load_file(finished.checkpoint / name) for name in (ADAPTER, "optimizer.safetensors")
    )
    # 14 layers with two factors; AdamW keeps two moments and a counter of each.
    assert (len(factors), len(moments)) == (28, 3 * 28)
    assert (
        sum(t.numel() for t in moments.values())
        == 2 * sum(t.numel() for t in factors.values()) + 28
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_resumed_run_is_the_uninterrupted_run(
    family: str, models: dict[str, str], tmp_path: Path
):
    changes = {
        "training__rounds": 3,
        "training__schedule": "cosine",
        "training__gradient_checkpointing": True,
        "checkpoint": {"every_rounds": 1, "keep": 9},
    }
    straight = run(models[family], tmp_path / "straight", **changes)
    killed = tmp_path / "killed"
    shutil.copytree(straight.folder, killed)
    for number in (2, 3):
        shutil.rmtree(killed / "checkpoints" / f"round-{number:06d}")
    resumed = run(models[family], killed, resume=True, **changes)
    assert same_adapter(resumed.checkpoint, straight.checkpoint)
    moments = [load_file(r.checkpoint / "optimizer.safetensors") for r in (straight, resumed)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_a_run_is_not_resumed_on_another_base(models: dict[str, str], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(models["llama"], model)
    result = run(str(model), tmp_path / "run")
    changed = tiny_model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    changed.save_pretrained(model)
    with pytest.raises(CheckpointError) as caught:
        run(str(model), tmp_path / "run", resume=True)
    assert str(caught.value) == (
        f"checkpoint {result.checkpoint} holds adapters of another base model than {str(model)!r} "
        "is now; bring back the model it was trained on, or choose another run folder"
    )


def test_gradient_checkpointing_changes_nothing_but_memory(models: dict[str, str], tmp_path: Path):
    for engine in ("fast", "plain"):
        ends = [
            run(
                models["llama"],
                tmp_path / f"{engine}-{on}",
                training__engine=engine,
                training__gradient_checkpointing=on,
                training__rounds=1,
            ).checkpoint
            for on in (False, True)
        ]
        assert same_adapter(*ends)


def test_the_reference_is_the_base_without_a_second_model(models: dict[str, str]):
    def reference_of(**changes: Any) -> object:
        parts = build_parts(tiny_recipe(models["llama"], **changes), warn=ignore)
        parts.close()
        return parts.reference

    adapted = {"lora": {"rank": 4}}
    assert isinstance(reference_of(**adapted, objective__kl_coefficient=0.1), BasePolicy)
    assert not isinstance(reference_of(objective__kl_coefficient=0.1), BasePolicy)
    assert reference_of(**adapted) is None


def test_full_fine_tuning_is_the_default(models: dict[str, str]):
    parts = build_parts(tiny_recipe(models["llama"]), warn=ignore)
    parts.close()
    assert not parts.policy.adapters
    assert parts.policy.trained_weights().keys() == parts.policy.masters.keys()


def test_alpha_is_twice_the_rank_unless_it_is_given(models: dict[str, str]):
    for lora, expected in (({"rank": 4}, 2.0), ({"rank": 4, "alpha": 1.0}, 0.25)):
        parts = build_parts(tiny_recipe(models["llama"], lora=lora), warn=ignore)
        parts.close()
        assert {layer.scale for layer in parts.policy.adapters.values()} == {expected}


# The command


def test_evaluate_asks_the_run_with_its_adapters(finished: TrainingResult):
    result = gmpo("evaluate", finished.folder, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert found["accuracy"] == finished.after[0].accuracy


def test_sample_draws_what_the_exported_model_draws(finished: TrainingResult, tmp_path: Path):
    assert gmpo("export", finished.folder, tmp_path / "out").exit_code == 0
    drawn = [
        gmpo("sample", model, "1+2", "--max-tokens", "12", "--dtype", "fp32", "--json").stdout
        for model in (finished.folder, tmp_path / "out")
    ]
    texts = [[c["text"] for c in json.loads(each)["completions"]] for each in drawn]
    assert texts[0] == texts[1]


def test_export_says_what_it_wrote(finished: TrainingResult, tmp_path: Path):
    done = process("export", finished.folder, tmp_path / "a", "--dtype", "bf16")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == f"{tmp_path / 'a'} holds {finished.checkpoint} for transformers, in bf16\n"
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").dtype == torch.bfloat16
    result = gmpo(
        *("export", finished.folder, tmp_path / "b", "--format", "peft"),
        *("--checkpoint", "1", "--json"),
    )
    first = finished.checkpoint.with_name("round-000001")
    assert json.loads(result.stdout) == {
        "destination": str(tmp_path / "b"),
        "format": "peft",
        "precision": "fp32",
        "checkpoint": str(first),
        "round": 1,
    }
    ours, theirs = (
        load_file(tmp_path / "b" / "adapter_model.safetensors"),
        load_file(first / ADAPTER),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_export_refuses_in_one_line(finished: TrainingResult, tmp_path: Path):
    (tmp_path / "there").mkdir()
    assert refusal("export", finished.folder, tmp_path / "there") == (
        f"{tmp_path / 'there'} exists and is not overwritten; name a new folder"
    )
    assert "is no run folder" in refusal("export", tmp_path, tmp_path / "new")
    assert refusal("export", finished.folder, tmp_path / "new", "--format", "onnx") == (
        "--format is 'onnx'; allowed: transformers, peft"
    )
    assert refusal("export", finished.folder, tmp_path / "new", "--dtype", "fp16") == (
        "--dtype is 'fp16'; allowed: fp32, bf16"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('lora.targets=["q_prj"]', "lora.targets names 'q_prj', but no linear layer"),
        ("lora.dropout=0.1", "unknown key 'lora.dropout'; "),
        ("lora.rank=-1", "lora.rank = -1: input should be greater than or equal to 0"),
        ("lora.alpha=0", "lora.alpha = 0: input should be greater than 0"),
    ],
)
def test_a_recipe_with_impossible_adapters_is_refused(
    override: str, said: str, model: str, recipe: str, tmp_path: Path
):
    message = refusal(
        *("train", recipe, "--run", tmp_path / "r", "--set", f"model.name={model}"),
        *("--set", "lora.rank=4", "--set", override),
    )
    assert said in message


def test_adapter_keys_without_a_rank_are_refused(model: str, recipe: str, tmp_path: Path):
    arguments = ("--run", tmp_path / "r", "--set", f"model.name={model}")
    assert refusal("train", recipe, *arguments, "--set", "lora.alpha=8").endswith(
        "lora: lora.alpha = 8.0 needs adapters, and lora.rank is 0; set lora.rank, e.g. to 16, or "
        "remove lora.alpha"
    )


def test_an_adapters_folder_can_be_trained_on(finished: TrainingResult, tmp_path: Path):
    adapter = finished.checkpoint / "adapter"
    result = run(str(adapter), tmp_path / "next", training__rounds=1)
    config = json.loads((result.checkpoint / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(adapter)
    before = result.before[0].outcomes
    assert before == finished.after[0].outcomes
