"""Checkpoints: bit for bit what was saved, whole or not at all, refused where they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.disks import fill, small_disk
from tests.models import character_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gmpo.checkpoint import (
    TrainingState,
    _restore_moments,
    begin_attempt,
    beginning_of_attempt,
    checkpoint_round,
    checkpoints_newest_first,
    latest_checkpoint,
    load_checkpoint,
    load_newest_checkpoint,
    remove_newer_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
)
from gmpo.errors import CheckpointError, DamagedCheckpointError, ModelError, RunFolderError
from gmpo.policy.score import Policy
from gmpo.update import PolicyOptimizer


class Learner:
    """A policy with its optimizer, moved by gradients that depend on the step's number only."""

    def __init__(self, family: str = "llama", *, seed: int = 0, dtype=torch.float32) -> None:
        self.policy = Policy(tiny_model(family, seed=seed, dtype=dtype), engine="plain")
        self.optimizer = PolicyOptimizer(self.policy)
        self.base: Policy | None = None

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for weight in self.policy.masters.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        self.optimizer.apply_step(learning_rate=1e-3, clip_norm=1.0)

    def save(self, folder: Path, *, round_number: int) -> Path:
        return save_checkpoint(
            folder,
            policy=self.policy,
            optimizer=self.optimizer.adamw,
            tokenizer=character_tokenizer(),
            state=state(round_number),
            base=self.base,
        )

    def load(self, path: Path, *, digest: str = "abc") -> TrainingState:
        return load_checkpoint(
            path,
            policy=self.policy,
            optimizer=self.optimizer.adamw,
            recipe_digest=digest,
            base=self.base,
        )

    def load_newest(self, folder: Path, said: list[str]) -> TrainingState | None:
        return load_newest_checkpoint(
            folder,
            policy=self.policy,
            optimizer=self.optimizer.adamw,
            recipe_digest="abc",
            warn=said.append,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.named_weights()}

    def moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}/{key}": value.clone()
            for name, weight in self.policy.masters.items()
            for key, value in self.optimizer.adamw.state[weight].items()
        }


def state(round_number: int) -> TrainingState:
    return TrainingState(
        round=round_number,
        step=4 * round_number,
        prompts_taken=8 * round_number,
        mismatch_is_small=True,
        recipe_digest="abc",
        version="0.1.0",
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def learner() -> Learner:
    learner = Learner()
    for number in range(3):
        learner.step(number)
    return learner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_moments_and_step_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    learner = Learner(dtype=dtype)
    for number in range(3):
        learner.step(number)
    path = learner.save(tmp_path, round_number=3)
    other = Learner(seed=1, dtype=dtype)
    other.step(99)
    assert other.load(path) == state(3)
    assert same(other.weights(), learner.weights())
    assert same(other.moments(), learner.moments())
    moments = other.moments()
    assert {name.rpartition("/")[2] for name in moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert {float(moments[name]) for name in moments if name.endswith("/step")} == {3.0}
    # What the model computes with is the restored weights, not only the masters.
    for (name, ours), theirs in zip(
        other.policy.model.named_parameters(), learner.policy.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_restored_run_takes_the_same_next_step(learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    other = Learner(seed=1)
    other.load(path)
    for each in (learner, other):
        each.step(3)
    assert same(other.weights(), learner.weights())
    assert same(other.moments(), learner.moments())


@pytest.mark.parametrize(("is_fused", "where"), [(True, "meta"), (False, "cpu")])
def test_the_step_counter_lies_where_adamw_looks_for_it(is_fused: bool, where: str):
    # A fused AdamW on a GPU wants it beside the weight; "meta" stands for a device that is not
    # the CPU, on which no AdamW of torch's is fused.
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    policy: Any = SimpleNamespace(masters={"w": weight})
    optimizer: Any = SimpleNamespace(state={}, param_groups=[{"fused": is_fused}])
    table = {"w/step": torch.tensor(3.0), "w/exp_avg": torch.zeros(2)}
    _restore_moments(table, policy, optimizer)
    state = optimizer.state[weight]
    assert {key: value.device.type for key, value in state.items()} == {
        "step": where,
        "exp_avg": "meta",
    }


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path):
    fresh = Learner()
    path = fresh.save(tmp_path, round_number=0)
    other = Learner(seed=1)
    other.step(0)
    other.load(path)
    assert other.moments() == {}
    assert same(other.weights(), fresh.weights())


def test_a_checkpoint_is_named_by_its_round(learner: Learner, tmp_path: Path):
    assert learner.save(tmp_path, round_number=12) == tmp_path / "round-000012"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_model_folder_loads_with_plain_transformers(family: str, tmp_path: Path):
    learner = Learner(family)
    learner.step(0)
    folder = learner.save(tmp_path, round_number=1) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = torch.tensor([tokenizer("What is 1 + 2?")["input_ids"]])
    with torch.no_grad():
        theirs = model.eval()(token_ids).logits
        ours = learner.policy.model(token_ids).logits
    assert torch.equal(theirs, ours)
    assert tokenizer.chat_template == character_tokenizer().chat_template
    assert model.generation_config.eos_token_id == 1


@pytest.mark.parametrize("name", ["model/model.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named(name: str, learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError) as caught:
        learner.load(path)
    assert str(caught.value) == (
        f"checkpoint {path} is damaged: {name} is not what was written; remove the folder to go "
        "on from what was before it"
    )


def test_a_missing_file_is_named(learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: optimizer\.safetensors"):
        learner.load(path)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"digests": {}, "round": 1}'])
def test_an_unreadable_state_is_named(text: str, learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"has no readable state\.json.*remove the folder"):
        learner.load(path)


def test_a_damaged_checkpoint_leaves_the_policy_as_it_was(learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    (path / "optimizer.safetensors").write_bytes(b"")
    other = Learner(seed=1)
    before = other.weights()
    with pytest.raises(CheckpointError):
        other.load(path)
    assert same(other.weights(), before)


def test_a_checkpoint_of_another_recipe_is_refused(learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    with pytest.raises(CheckpointError) as caught:
        learner.load(path, digest="def")
    assert str(caught.value) == (
        f"checkpoint {path} was made with another recipe; resume with the run's own recipe.toml, "
        "or choose another run folder"
    )


def test_a_checkpoint_of_another_model_is_refused(learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    other = Learner("gpt2")
    before = other.weights()
    with pytest.raises(ModelError, match="weights are of another model"):
        other.load(path)
    assert same(other.weights(), before)


def frozen(seed: int) -> Policy:
    model = tiny_model(seed=seed)
    model.requires_grad_(False)
    return Policy(model, engine="plain")


def test_a_checkpoint_of_another_reference_is_refused(learner: Learner, tmp_path: Path):
    without = learner.save(tmp_path / "without", round_number=3)
    learner.base = frozen(0)
    path = learner.save(tmp_path, round_number=3)
    assert learner.load(path) == state(3)
    other = Learner(seed=1)
    before = other.weights()
    other.base = frozen(1)
    with pytest.raises(CheckpointError, match="measures KL to another base model than"):
        other.load(path)
    with pytest.raises(CheckpointError, match="does not say what its run's starting model was"):
        other.load(without)
    assert same(other.weights(), before)
    other.base = None  # nothing is measured to it
    assert other.load(path) == state(3)


def test_the_newest_whole_checkpoint_is_found(learner: Learner, tmp_path: Path):
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    for number in (2, 10, 9):
        learner.save(tmp_path, round_number=number)
    assert latest_checkpoint(tmp_path) == tmp_path / "round-000010"
    (tmp_path / "round-000010" / "state.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "round-000009"


def test_of_no_checkpoint_nothing_is_loaded(learner: Learner, tmp_path: Path):
    assert learner.load_newest(tmp_path / "absent", []) is None


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(learner: Learner, tmp_path: Path):
    learner.save(tmp_path, round_number=2)
    kept = learner.weights()
    learner.step(9)
    damaged = learner.save(tmp_path, round_number=3)
    (damaged / "optimizer.safetensors").write_bytes(b"")
    other, said = Learner(seed=1), list[str]()
    assert other.load_newest(tmp_path, said) == state(2)
    assert same(other.weights(), kept)
    assert said == [
        f"checkpoint {damaged} is damaged: optimizer.safetensors is not what was written; the one "
        "before it is tried"
    ]
    # It is out of the way of retention, and not lost.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-round-000003",
        "round-000002",
    ]
    assert latest_checkpoint(tmp_path) == tmp_path / "round-000002"


def test_a_round_that_is_damaged_once_more_is_out_of_the_way_too(learner: Learner, tmp_path: Path):
    learner.save(tmp_path, round_number=2)
    for _ in range(3):
        damaged = learner.save(tmp_path, round_number=3)
        (damaged / "optimizer.safetensors").write_bytes(b"")
        assert Learner(seed=1).load_newest(tmp_path, []) == state(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "damaged-round-000003",
        "damaged-round-000003-2",
        "damaged-round-000003-3",
        "round-000002",
    ]


def test_a_checkpoint_without_its_state_is_damaged_and_not_overlooked(
    learner: Learner, tmp_path: Path
):
    learner.save(tmp_path, round_number=2)
    stripped = learner.save(tmp_path, round_number=3)
    (stripped / "state.json").unlink()
    said = list[str]()
    assert Learner(seed=1).load_newest(tmp_path, said) == state(2)
    assert len(said) == 1 and f"checkpoint {stripped} has no readable state.json" in said[0]
    assert (tmp_path / "damaged-round-000003").is_dir()
    # Alone, it is no reason to begin anew.
    (tmp_path / "round-000002" / "state.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="round-000002 has no readable"):
        learner.load_newest(tmp_path, [])


def test_where_all_are_damaged_nothing_is_moved(learner: Learner, tmp_path: Path):
    for number in (1, 2):
        path = learner.save(tmp_path, round_number=number)
        (path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"round-000001 is damaged.*no whole check"):
        learner.load_newest(tmp_path, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000001", "round-000002"]


def test_the_round_of_a_checkpoint_is_in_its_name(learner: Learner, tmp_path: Path):
    assert checkpoint_round(learner.save(tmp_path, round_number=17)) == 17


def test_a_half_written_folder_is_not_taken_for_a_checkpoint(learner: Learner, tmp_path: Path):
    path = learner.save(tmp_path, round_number=3)
    shutil.copytree(path, tmp_path / ".round-000004.partial")
    assert latest_checkpoint(tmp_path) == path
    # The next attempt at that round starts from nothing.
    (tmp_path / ".round-000004.partial" / "stray").write_text("x")
    fourth = learner.save(tmp_path, round_number=4)
    assert not (fourth / "stray").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000003", "round-000004"]


def test_saving_a_round_again_replaces_it(learner: Learner, tmp_path: Path):
    learner.save(tmp_path, round_number=3)
    learner.step(7)
    path = learner.save(tmp_path, round_number=3)
    other = Learner(seed=1)
    other.load(path)
    assert same(other.weights(), learner.weights())


def test_only_the_newest_are_kept(learner: Learner, tmp_path: Path):
    for number in (1, 2, 3):
        learner.save(tmp_path, round_number=number)
    assert remove_old_checkpoints(tmp_path, keep=2) == [tmp_path / "round-000001"]
    assert remove_old_checkpoints(tmp_path, keep=2) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000002", "round-000003"]


def test_what_an_attempt_began_from_can_be_spared(learner: Learner, tmp_path: Path):
    for number in range(5):
        learner.save(tmp_path, round_number=number)
    assert beginning_of_attempt(tmp_path) == 0
    begin_attempt(tmp_path / "round-000001", attempt=2)
    remove_newer_checkpoints(tmp_path, than=1)
    assert beginning_of_attempt(tmp_path) == 1
    for number in (2, 3, 4, 5):
        learner.save(tmp_path, round_number=number)
        begin_attempt(tmp_path / f"round-{number:06d}", attempt=2)
    assert beginning_of_attempt(tmp_path) == 1
    remove_old_checkpoints(tmp_path, keep=2, spared=[0, 1])
    kept = [checkpoint_round(path) for path in checkpoints_newest_first(tmp_path)]
    assert kept == [5, 4, 1, 0]
    # One that cannot be read is of no attempt.
    (tmp_path / "round-000001" / "state.json").write_text("{")
    assert beginning_of_attempt(tmp_path) == 4
    assert beginning_of_attempt(tmp_path / "empty") is None


def test_whole_checkpoints_are_kept_whatever_lies_beside_them(learner: Learner, tmp_path: Path):
    """One that lost its state must not push the last good one out."""
    for number in (1, 2, 3):
        learner.save(tmp_path, round_number=number)
    (tmp_path / "round-000003" / "state.json").unlink()
    (tmp_path / "round-of-mine").mkdir()
    half = tmp_path / ".round-000004.partial"
    half.mkdir()
    assert remove_old_checkpoints(tmp_path, keep=1) == [tmp_path / "round-000001", half]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("round-000002", "round-000003", "round-of-mine")
    ]


@pytest.mark.parametrize("share", [0, 0.1, 0.4, 0.7, 0.95])
def test_a_full_disk_leaves_the_checkpoint_before_untouched(
    share: float, learner: Learner, tmp_path: Path
):
    # Room for a share of a checkpoint: weights, tokenizer or moments find the disk full.
    with small_disk(tmp_path / "disk", kilobytes=2_000) as disk:
        first = learner.save(disk / "checkpoints", round_number=1)
        before = files_of(first)
        size = sum(len(content) for content in before.values())
        fill(disk, leave=int(share * size))
        with pytest.raises(RunFolderError) as caught:
            learner.save(disk / "checkpoints", round_number=2)
        assert str(caught.value).startswith(
            f"checkpoint {disk}/checkpoints/round-000002 could not be written: "
        )
        assert "No space left on device" in str(caught.value)
        assert files_of(first) == before
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["round-000001"]
        (disk / "filler").unlink()
        assert learner.save(disk / "checkpoints", round_number=2).is_dir()
