"""A round on disk: bit for bit what was sampled, whole or not at all, refused where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.disks import fill, small_disk
from tests.rollout_groups import group, random_groups, rollout

from gmpo.errors import CheckpointError, RunFolderError
from gmpo.records import Group
from gmpo.rewards import ScoredGroups
from gmpo.saved_rounds import SampledRound, forget_rounds, load_round, save_round


def sampled(groups: list[Group]) -> SampledRound:
    scored = ScoredGroups(
        groups=tuple(groups),
        num_rollouts=sum(len(group.rollouts) for group in groups),
        num_errors=1,
        num_unrewarded=0,
        num_truncated=3,
        num_zeroed=0,
        num_timeouts=2,
        grading={"timeouts": 2, "graded": 5},
        component_errors={"correct": 1},
        metrics={"depth": [1 / 3, 2.0]},
    )
    trained = tuple(range(1, len(groups)))
    return SampledRound(scored=scored, trained=trained, rollout_seconds=1.5, reward_seconds=0.25)


@pytest.fixture
def round_of_two() -> SampledRound:
    first, second = random_groups([[1, 2], [3]], [[3, 1], [2, 4]])
    failed = rollout([7], index=2, prompt_id="p1", reward=None, error="grading: timed out")
    tool = rollout([7, 8, 9], index=3, prompt_id="p1", from_policy=[True, False, True], reward=0.1)
    components = {"correct": 0.1, "format": 1 / 3}
    with_parts = replace(
        tool, rewards=components, text="42 \N{SNOWMAN}\n", notes={"a": 0.1, "b": "x"}
    )
    return sampled([first, replace(second, rollouts=(*second.rollouts, failed, with_parts))])


def assert_same(a: SampledRound, b: SampledRound) -> None:
    assert replace(a, scored=replace(a.scored, groups=())) == replace(
        b, scored=replace(b.scored, groups=())
    )
    for ours, theirs in zip(a.scored.groups, b.scored.groups, strict=True):
        assert ours.prompt == theirs.prompt
        for one, other in zip(ours.rollouts, theirs.rollouts, strict=True):
            assert vars(one).keys() == vars(other).keys()
            for name, value in vars(one).items():
                if isinstance(value, np.ndarray):
                    assert value.dtype == vars(other)[name].dtype
                    np.testing.assert_array_equal(value, vars(other)[name])
                else:
                    assert value == vars(other)[name], name


def prompts(value: SampledRound) -> list:
    return [each.prompt for each in value.scored.groups]


def test_a_round_comes_back_bit_for_bit(round_of_two: SampledRound, tmp_path: Path):
    path = save_round(tmp_path / "rounds", 3, round_of_two)
    assert path == tmp_path / "rounds" / "round-000003.npz"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    again = load_round(tmp_path / "rounds", 3, prompts(round_of_two))
    assert again is not None
    assert_same(again, round_of_two)


def test_prompts_that_the_round_did_not_take_may_follow(round_of_two: SampledRound, tmp_path: Path):
    save_round(tmp_path, 3, round_of_two)
    more = [group([9], [rollout([1], prompt_id="later")]).prompt]
    again = load_round(tmp_path, 3, prompts(round_of_two) + more)
    assert again is not None
    assert_same(again, round_of_two)
    assert again.trained_groups == again.scored.groups[1:]


def test_log_probabilities_keep_their_precision(tmp_path: Path):
    for dtype in (np.float32, np.float64):
        value = sampled([group([1], [rollout([5], logprobs=[-1 / 3], dtype=dtype)])])
        save_round(tmp_path, 1, value)
        again = load_round(tmp_path, 1, prompts(value))
        assert again is not None
        assert_same(again, value)


def test_a_round_that_was_not_saved_is_none(round_of_two: SampledRound, tmp_path: Path):
    assert load_round(tmp_path / "rounds", 1, prompts(round_of_two)) is None
    save_round(tmp_path, 1, round_of_two)
    assert load_round(tmp_path, 2, prompts(round_of_two)) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_damaged_file_is_named(share: float, round_of_two: SampledRound, tmp_path: Path):
    path = save_round(tmp_path, 1, round_of_two)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError) as caught:
        load_round(tmp_path, 1, prompts(round_of_two))
    assert str(caught.value).startswith(f"saved rollouts {path} are damaged or of another task (")
    assert str(caught.value).endswith("; remove the file to sample the round again")


def test_a_flipped_bit_is_noticed(round_of_two: SampledRound, tmp_path: Path):
    path = save_round(tmp_path, 1, round_of_two)
    content = bytearray(path.read_bytes())
    place = content.index(round_of_two.scored.groups[0].rollouts[0].sampler_logprobs.tobytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        load_round(tmp_path, 1, prompts(round_of_two))


def test_rollouts_of_other_prompts_are_refused(round_of_two: SampledRound, tmp_path: Path):
    save_round(tmp_path, 1, round_of_two)
    with pytest.raises(CheckpointError, match=r"'p0' stands where 'p1' was expected"):
        load_round(tmp_path, 1, prompts(round_of_two)[::-1])
    with pytest.raises(CheckpointError, match="of another task"):
        load_round(tmp_path, 1, prompts(round_of_two)[:1])


def test_rounds_that_a_checkpoint_covers_are_forgotten(round_of_two: SampledRound, tmp_path: Path):
    for number in (1, 2, 3):
        save_round(tmp_path, number, round_of_two)
    removed = forget_rounds(tmp_path, up_to=2)
    assert [path.name for path in removed] == ["round-000001.npz", "round-000002.npz"]
    assert [path.name for path in tmp_path.iterdir()] == ["round-000003.npz"]
    assert forget_rounds(tmp_path / "absent", up_to=9) == []


def test_a_full_disk_leaves_no_half_round(round_of_two: SampledRound, tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        before = save_round(disk / "rounds", 1, round_of_two)
        content = before.read_bytes()
        fill(disk)
        with pytest.raises(RunFolderError) as caught:
            save_round(disk / "rounds", 2, round_of_two)
        assert str(caught.value) == (
            f"{disk}/rounds/round-000002.npz cannot be written: No space left on device; free "
            "space, then continue with --resume"
        )
        assert [path.name for path in (disk / "rounds").iterdir()] == [before.name]
        assert before.read_bytes() == content
