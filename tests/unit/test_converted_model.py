"""The default model's converted files: made once, whole, whoever is first."""

from __future__ import annotations

from pathlib import Path

from gmpo.policy import load as loading


def test_a_converted_model_that_another_process_finished_first_stays(tmp_path: Path):
    folder = tmp_path / "converted"
    for number in (1, 2):
        partial = tmp_path / f"partial-{number}"
        partial.mkdir()
        (partial / "config.json").write_text(str(number))
        loading._give_name(partial, folder)
        assert (folder / "config.json").read_text() == "1"
        assert not partial.exists()
    # What is no whole model makes room.
    (folder / "config.json").unlink()
    (folder / "half").touch()
    partial.mkdir()
    (partial / "config.json").write_text("3")
    loading._give_name(partial, folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
