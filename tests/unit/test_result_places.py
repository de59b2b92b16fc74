"""Where benchmarks and scripts may put their results: found out before any work."""

from __future__ import annotations

import ast
from argparse import ArgumentTypeError
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from benchmarks.options import BenchmarkError, plot_file, plotted_results_file, results_file
from benchmarks.results import Results, write_figure, write_results
from matplotlib.figure import Figure
from tests.disks import as_another_user, fill, resize, small_disk

REPOSITORY = Path(__file__).parents[2]
NEEDED = {
    "device_decode": ["--config", "none"],
    "vs_trl": ["--workload", "short"],
    "vs_vllm": ["--no-build", "--venv", "none"],
    "vs_vllm_served": ["--no-build", "--venv", "none"],
}
BENCHMARKS = (
    *("device_decode", "growth", "learning_curves", "load", "roofline", "shared_cores"),
    *("time_to_accuracy", "upstream_latency", "vs_trl", "vs_vllm", "vs_vllm_served"),
)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_in_place_of_the_file_is_refused_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        import_module(f"benchmarks.{name}").main([*NEEDED.get(name, []), "--json", str(tmp_path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    wanted = f"--json: '{tmp_path}' is a folder; name a file in it, such as {tmp_path}/results.json"
    assert wanted in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["growth", "learning_curves", "time_to_accuracy", "vs_trl"])
def test_a_name_that_the_plot_would_take_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "out.png"
    with pytest.raises(SystemExit) as ended:
        import_module(f"benchmarks.{name}").main([*NEEDED.get(name, []), "--json", str(file)])
    assert ended.value.code == 2
    assert f"'{file}' does not end in .json; name a file that does" in capsys.readouterr().err
    assert not file.exists()


def test_the_folder_is_made_and_nothing_else(tmp_path: Path):
    file = tmp_path / "new" / "folder" / "results.json"
    assert results_file(str(file)) == plotted_results_file(str(file)) == file
    assert file.parent.is_dir() and not list(file.parent.iterdir())


def test_a_file_to_be_gone_on_with_stays_as_it_is(tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text('{"setting": 1}')
    before = file.stat()
    plotted_results_file(str(file))
    assert file.read_text() == '{"setting": 1}'
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_not_there_yet_is_no_file(tmp_path: Path):
    with pytest.raises(ArgumentTypeError, match=r"new/' is a folder; name a file in it"):
        results_file(f"{tmp_path}/new/")
    assert not (tmp_path / "new").exists()


def test_a_folder_where_the_plot_goes_is_refused(tmp_path: Path):
    (tmp_path / "results.png").mkdir()
    with pytest.raises(ArgumentTypeError, match=r"results\.png' is a folder"):
        plotted_results_file(str(tmp_path / "results.json"))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("{file}/results.json", "cannot be written: .*; name a file elsewhere, or see to space"),
        ("{folder}/" + 300 * "n", "cannot be written: File name too long; name a file elsewhere"),
        ("/dev/null", "is no ordinary file; name another"),
    ],
)
def test_what_cannot_be_written_is_refused(place: str, reason: str, tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ArgumentTypeError, match=reason):
        results_file(place.format(file=file, folder=tmp_path))


def test_a_place_without_permission_is_refused():
    with TemporaryDirectory() as name:
        folder = Path(name)
        for each, mode in (("locked", 0o555), ("open", 0o777)):
            (folder / each).mkdir()
            (folder / each / "results.json").touch(0o444)
            (folder / each).chmod(mode)
        folder.chmod(0o755)
        with as_another_user():
            for file in ("open/results.json", "locked/results.json", "locked/new.json"):
                with pytest.raises(ArgumentTypeError, match="cannot be written: Permission denied"):
                    results_file(str(folder / file))
        (folder / "locked").chmod(0o755)  # so that it can be removed


def test_a_full_disk_is_found_before_and_told_in_one_line_afterwards(tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        file = disk / "results.json"
        results = Results(file, {"rounds": 1})
        results.save()
        stored = file.read_text()
        fill(disk)
        with pytest.raises(ArgumentTypeError, match="No space left on device"):
            results_file(str(file))
        results.content["rewards"] = list(range(3000))
        with pytest.raises(BenchmarkError, match=r"cannot be written: No space left .* run this"):
            results.save()
        assert file.read_text() == stored, "an unfinished file took the place of a whole one"
        resize(disk, kilobytes=256)
        results.save()
        assert Results(file, {"rounds": 1}).content["rewards"] == list(range(3000))


def test_results_in_place_of_a_folder_are_told_in_one_line(tmp_path: Path):
    with pytest.raises(BenchmarkError, match="cannot be written: Is a directory"):
        write_results(tmp_path, {})


def test_a_plot_is_written_whole_or_told_in_one_line(tmp_path: Path):
    figure = Figure()
    write_figure(tmp_path / "new" / "plot.png", figure)
    write_figure(tmp_path / "plot.svg", figure)
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        plot = disk / "plot.png"
        plot.write_bytes(b"of a run before")
        fill(disk)
        with pytest.raises(BenchmarkError, match=r"plot\.png cannot be written: No space left"):
            write_figure(plot, figure, dpi=300)
        assert plot.read_bytes() == b"of a run before"


def test_a_plot_has_a_pictures_name(tmp_path: Path):
    assert plot_file(str(tmp_path / "plot.png")) == tmp_path / "plot.png"
    with pytest.raises(ArgumentTypeError, match=r"ends in \.png or \.svg or \.pdf"):
        plot_file(str(tmp_path / "plot.json"))


def test_every_script_tries_the_place_of_its_results():
    found = {}
    for path in [*(REPOSITORY / "benchmarks").glob("*.py"), *(REPOSITORY / "scripts").glob("*.py")]:
        text = path.read_text()
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and "--json" in map(constant, call.args):
                (kind,) = (ast.unparse(each.value) for each in call.keywords if each.arg == "type")
                is_plotted = 'arguments.json.with_suffix(".png")' in text
                wanted = "plotted_results_file" if is_plotted else "results_file"
                found[path.name] = kind == wanted
    assert len(found) > 20
    assert [name for name, is_tried in found.items() if not is_tried] == []


def constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None
