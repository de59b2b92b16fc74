"""Safetensors files read and written a piece at a time, as the library reads and writes them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from gmpo.errors import ModelError
from gmpo.stored_tensors import read_header, stored_tensors, write_tensors


@given(st.lists(array_shapes(min_dims=0, max_dims=3, max_side=5), min_size=1, max_size=4))
def test_what_is_written_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]]
):
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    generator = np.random.default_rng(0)
    tensors = {
        f"t{place}": generator.normal(size=shape).astype(np.float32)
        for place, shape in enumerate(shapes)
    }
    write_tensors(
        path,
        {name: tensor.shape for name, tensor in tensors.items()},
        (tensor.ravel() for tensor in tensors.values()),
        metadata={"who": "north"},
    )
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensor) for name, tensor in tensors.items())
    found, metadata = read_header(path)
    assert metadata == {"who": "north"}
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        pieces = list(found[name].pieces(7))
        assert [len(piece) for piece in pieces[:-1]] == [7] * (len(pieces) - 1)
        assert np.array_equal(np.concatenate(pieces), tensor.ravel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_formats_are_widened_as_torch_widens_them(dtype: torch.dtype, tmp_path: Path):
    values = torch.randn(11, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch({"w": values}, tmp_path / "x.safetensors")
    (tensor,) = stored_tensors(tmp_path).values()
    assert np.array_equal(np.concatenate(list(tensor.pieces(4))), values.float().numpy())


def rewritten(path: Path, **changes: object) -> Path:
    """The file, with other entries of its one tensor."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["w"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_offsets": [0, 400]}, "is at bytes"),
        ({"data_offsets": [24, 0]}, "is at bytes"),
        ({"data_offsets": [-8, 16]}, "sizes that are none"),
        ({"data_offsets": [0.0, 24.0]}, "sizes that are none"),
        ({"shape": [3, 3]}, r"has 24 bytes for shape \(3, 3\)"),
        ({"shape": [-2, -3]}, "sizes that are none"),
        ({"shape": None}, "damaged"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    changes: dict[str, object], said: str, tmp_path: Path
):
    save_file({"w": np.zeros((2, 3), dtype=np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=said):
        read_header(rewritten(tmp_path / "x.safetensors", **changes))


def test_a_header_without_end_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ModelError, match="its header would have"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


def test_a_file_that_is_cut_short_and_one_of_integers_are_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"w": np.zeros(6, dtype=np.float32)}, path)
    (tensor,) = read_header(path)[0].values()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut short"):
        list(tensor.pieces())
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_header(path)
    save_file({"w": np.zeros(6, dtype=np.int32)}, path)
    (tensor,) = read_header(path)[0].values()
    with pytest.raises(ModelError, match="I32"):
        list(tensor.pieces())
