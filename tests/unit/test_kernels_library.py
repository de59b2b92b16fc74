"""Compiling and loading: what is said, where the file lies, what happens without a compiler."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gmpo.errors import ConfigError, ModelError
from gmpo.kernels.calls import address, kernel
from gmpo.kernels.library import Build, _built, build, kernels_off, loaded

HAS_COMPILER = shutil.which("cc") is not None
TESTED = ("attention", "decoding", "optimizer", "training")
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which nothing was compiled yet."""
    monkeypatch.setenv("GMPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GMPO_KERNELS", raising=False)
    return tmp_path / "cache" / "kernels"


@needs_compiler
def test_it_is_compiled_once_and_taken_from_the_cache_then(fresh: Path):
    first = _built()
    assert first.library is not None and first.file is not None
    assert first.said == "compiled for this processor, several threads"
    assert first.file.parent == fresh and [*fresh.iterdir()] == [first.file]
    made = first.file.stat().st_mtime_ns
    assert _built().file == first.file
    assert first.file.stat().st_mtime_ns == made


@needs_compiler
def test_the_threads_are_those_of_torch():
    """A second pool of threads would wait for the first one's processors."""
    code = (
        "import torch, gmpo.kernels.library as k; assert k.build().library; "
        "lines = open('/proc/self/maps').read().splitlines(); "
        "print(len({line.split()[-1] for line in lines if 'gomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@needs_compiler
def test_they_compile_and_hold_on_a_processor_with_narrower_vectors(fresh: Path, tmp_path: Path):
    """What the compiler knows of this processor is kept from it; the tests by hand still pass."""
    compiler = tmp_path / "narrow-cc"
    compiler.write_text(
        "#!/bin/sh\nfor word; do shift\n"
        'case "$word" in -march=native|-mprefer-vector-width=512) continue ;; esac\n'
        'set -- "$@" "$word"\ndone\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "by_hand"]
        + [str(Path(__file__).parent / f"test_kernels_{name}.py") for name in TESTED],
        capture_output=True,
        text=True,
        env={**os.environ, "CC": str(compiler), "GMPO_KERNELS": "on"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.split()[0] == "....."
    assert len([*fresh.iterdir()]) == 1, "compiled anew, by the first flags"


def test_without_a_compiler_the_reason_is_said(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert _built() == Build(library=None, said="no C compiler (no-such-compiler) is installed")
    monkeypatch.setenv("GMPO_KERNELS", "on")
    with pytest.raises(ModelError, match=r"GMPO_KERNELS is on.*no-such-compiler"):
        _built()


def test_a_compiler_that_fails_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    broken = fresh.parents[1] / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'cannot find the headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    made = _built()
    assert made.library is None
    assert made.said == f"{broken} does not compile them: cannot find the headers"


def test_off_compiles_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GMPO_KERNELS", "off")
    assert _built() == Build(library=None, said="off by GMPO_KERNELS")
    assert not fresh.exists()


def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GMPO_KERNELS", "no")
    with pytest.raises(ConfigError, match="GMPO_KERNELS is 'no'; allowed are auto, on and off"):
        _built()


@needs_compiler
def test_a_folder_that_others_can_write_is_not_trusted(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = _built()
    assert made.file is not None and made.file.parent == tmp_path / f"gmpo-kernels-{os.getuid()}"
    assert stat.S_IMODE(made.file.parent.stat().st_mode) == 0o700


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced_by_a_folder_of_the_user(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cache").write_text("a file is in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = _built()
    assert made.file is not None and made.file.parent.parent == tmp_path


@needs_compiler
def test_inside_kernels_off_nothing_is_loaded():
    if build().library is None:
        pytest.skip("off by the environment")
    assert loaded() is build().library
    with kernels_off():
        assert loaded() is None
    assert loaded() is build().library


@needs_compiler
def test_other_precisions_take_torchs_operations():
    for dtype in (torch.float64, torch.float16):
        assert kernel("add_norm", "pppppiif", torch.zeros(1, dtype=dtype)) is None


def test_a_tensor_with_gaps_has_no_address():
    with pytest.raises(AssertionError, match="end to end"):
        address(torch.zeros(4, 4).t()[:2])
