"""A trainer's runs that end early: by a callback or Ctrl-C, and how they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.models import save_tiny
from tests.python_trainers import Listener, common_start, settings, steps, trainer
from tests.tiny_runs import same_weights
from transformers import TrainerCallback

from gmpo.errors import ConfigError, RunFolderError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("llama"))


def test_a_callback_can_end_the_run_which_is_saved_and_goes_on(llama: str, tmp_path: Path):
    said: list[str] = []
    ours = trainer(llama, tmp_path / "run", callbacks=(Listener(end_at=5),), warn=said.append)
    outcome = ours.train(num_epochs=2)
    assert outcome.checkpoint.name == "round-000002"
    assert f"a callback ended the run; {tmp_path / 'run'} goes on with train(resume=True)" in said
    listener = Listener()
    again = trainer(llama, tmp_path / "run", callbacks=(listener,)).train(num_epochs=2, resume=True)
    # As after a resume of transformers: steps and epochs that were done are not told again.
    assert listener.events == ["begin", *steps(9, 12), *steps(13, 16), "epoch", "save", "end"]
    whole = trainer(llama, tmp_path / "whole").train(num_epochs=2)
    assert same_weights(again.checkpoint, whole.checkpoint)


def test_a_callback_can_end_the_run_before_its_first_round(llama: str, tmp_path: Path):
    class Unwilling(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            control.should_training_stop = True

    outcome = trainer(llama, tmp_path / "run", callbacks=(Unwilling(),)).train()
    assert outcome.checkpoint.name == "round-000000" and outcome.metrics == {}
    assert str(outcome) == f"run {tmp_path / 'run'}"
    again = trainer(llama, tmp_path / "run").train(resume=True)
    assert same_weights(again.checkpoint, trainer(llama, tmp_path / "whole").train().checkpoint)


@pytest.mark.parametrize(
    ("strategy", "kl_coefficient"),
    [
        ("no", 0.0),  # interrupted before the first checkpoint
        ("epoch", 0.1),
    ],
)
def test_a_run_that_was_interrupted_goes_on_in_the_same_process(
    strategy: Any, kl_coefficient: float, llama: str, tmp_path: Path
):
    calls: list[int] = []

    def interrupted_once(completions: list[Any], **more: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return common_start(completions, **more)

    ours = trainer(
        llama,
        tmp_path / "run",
        config=settings(tmp_path / "run", kl_coefficient=kl_coefficient),
        reward=interrupted_once,
    )
    with pytest.raises(KeyboardInterrupt):
        ours.train(num_epochs=2, save_strategy=strategy)
    with pytest.raises(RunFolderError, match="already holds a run"):
        ours.train(num_epochs=2, save_strategy=strategy)
    outcome = ours.train(num_epochs=2, save_strategy=strategy, resume=True)
    whole = trainer(
        llama,
        tmp_path / "whole",
        config=settings(tmp_path / "whole", kl_coefficient=kl_coefficient),
    ).train(num_epochs=2, save_strategy=strategy)
    assert same_weights(outcome.checkpoint, whole.checkpoint)
    # The one from before the first round is not kept beside later ones.
    names = {"no": ["round-000004"], "epoch": ["round-000002", "round-000004"]}[strategy]
    assert sorted(path.name for path in (outcome.folder / "checkpoints").iterdir()) == names


def test_without_a_folder_of_its_own_a_run_goes_on_in_the_trainer_that_began_it(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    ours = trainer(
        llama,
        tmp_path,
        config=settings(tmp_path, output_dir=None),
        callbacks=(Listener(end_at=5),),
        warn=said.append,
    )
    with pytest.raises(ConfigError, match=r"needs the run to go on with: GMPOConfig"):
        ours.train(resume=True)
    ended = ours.train(num_epochs=2)
    way_on = "goes on with train(resume=True); in another process with GMPOConfig(output_dir="
    assert any(way_on in sentence for sentence in said)
    outcome = trainer(llama, ended.folder).train(num_epochs=2, resume=True)
    assert ours.train(num_epochs=2, resume=True).folder == outcome.folder == ended.folder
