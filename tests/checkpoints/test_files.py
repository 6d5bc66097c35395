"""Streamed safetensors against the safetensors library, and writing that is whole or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from safemoe_jax.checkpoints.atomic import new_file, new_folder
from safemoe_jax.checkpoints.safetensors_files import (
    TRANSPOSE_BYTES,
    Planned,
    Reader,
    all_finite,
    list_tensors,
    read_arrays,
    read_metadata,
    transpose,
    write,
    write_arrays,
)
from safemoe_jax.errors import InputError

ARRAYS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(5, dtype=np.uint16),
    "c": np.linspace(-3, 3, 12).astype(ml_dtypes.bfloat16).reshape(3, 2, 2),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.full((), 2.5, np.float32),
}


def test_the_library_reads_what_is_streamed(tmp_path):
    planned = [Planned(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    write(tmp_path / "x.safetensors", planned, (array for array in ARRAYS.values()), {"format": "pt"})
    got = load_file(tmp_path / "x.safetensors")
    assert set(got) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_transposed_view_is_written_in_its_own_order(tmp_path):
    array = ARRAYS["a.weight"].T
    write(tmp_path / "x", [Planned("t", array.shape, array.dtype)], iter([array]), {})
    np.testing.assert_array_equal(load_file(tmp_path / "x")["t"], array)


def test_reads_what_the_library_writes(tmp_path):
    save_file(ARRAYS, tmp_path / "x", {"made": "here"})
    assert read_metadata(tmp_path / "x") == {"made": "here"}
    assert {k: (e.shape, e.dtype) for k, e in list_tensors(tmp_path / "x").items()} == {
        name: (array.shape, array.dtype) for name, array in ARRAYS.items()
    }
    for name, array in read_arrays(tmp_path / "x"):
        np.testing.assert_array_equal(array, ARRAYS[name])
    with Reader() as reader:
        got = reader.read(list_tensors(tmp_path / "x")["a.weight"], (slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(got, ARRAYS["a.weight"][1:3, 2:5])


def test_arrays_in_memory(tmp_path):
    write_arrays(tmp_path / "x", ARRAYS, {"k": "v"})
    got = load_file(tmp_path / "x")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (513, 256), (2, 257, 300), (2, 3, 5, 4)])
def test_transposing_by_tiles(dtype, shape):
    """Within a larger array on either side, which keeps what lies around."""
    rows = np.random.default_rng(0).normal(size=shape).astype(dtype)
    out = np.full([*shape[:-2], shape[-1] + 2, shape[-2] + 3], 7, dtype)
    wide = np.concatenate([rows, rows], axis=-1)
    scratch = np.empty(TRANSPOSE_BYTES, np.uint8)
    transpose(wide[..., : shape[-1]], out[..., 1:-1, 2:-1], scratch)
    np.testing.assert_array_equal(out[..., 1:-1, 2:-1], np.swapaxes(rows, -1, -2))
    out[..., 1:-1, 2:-1] = 7
    assert (out == 7).all()


def test_every_bfloat16_that_is_not_finite_is_found():
    """All 65536 of them, each among ordinary numbers of both signs."""
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    want = np.isfinite(every.astype(np.float32))
    ordinary = np.array([-1.5, 0.0, 3.0], ml_dtypes.bfloat16)
    found = [all_finite(np.concatenate([ordinary, [number]])) for number in every]
    np.testing.assert_array_equal(found, want)
    assert all_finite(every[want]) and all_finite(every[:0])


def test_a_failed_block_leaves_what_was_there(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError, match="half way"), new_file(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    with pytest.raises(RuntimeError, match="half way"), new_folder(tmp_path / "d") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError("half way")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"


def test_a_whole_block_takes_the_name(tmp_path):
    (tmp_path / "f").write_text("old")
    with new_file(tmp_path / "f") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "f").read_text() == "old"
    with new_folder(tmp_path / "deep" / "d") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "deep" / "d").exists()
    assert (tmp_path / "f").read_text() == "new" and (tmp_path / "deep" / "d" / "x").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["deep", "f"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"), new_file(tmp_path / "file" / "below") as temporary:
        temporary.write_text("never")
    with pytest.raises(InputError, match="already there"), new_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_filled_meanwhile_is_kept(tmp_path):
    with pytest.raises(InputError, match="already there"), new_folder(tmp_path / "d") as temporary:
        (temporary / "x").write_text("ours")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "y").write_text("theirs")
    assert os.listdir(tmp_path) == ["d"] and os.listdir(tmp_path / "d") == ["y"]


KILLED = """
import os, signal, sys
from safemoe_jax.checkpoints.atomic import new_file, new_folder
with new_folder(sys.argv[1]) as folder, new_file(sys.argv[2]) as file:
    (folder / "half").write_text("x")
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_write(repository, tmp_path):
    """Only of the same target, and only if its process is gone."""
    folder, file = tmp_path / "out", tmp_path / "file"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    run = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(file)], env=environment)
    assert run.returncode == -signal.SIGKILL
    left = {path.name.split(".writing-")[0]: path for path in tmp_path.iterdir()}
    assert left.keys() == {".out", ".file"}
    stem = left[".out"].name.rpartition("-")[0]
    kept = [
        tmp_path / f"{stem}-{os.getppid()}",
        tmp_path / ".out.writing-another_host-1",
        tmp_path / f"{stem}-notes",
        left[".file"],
    ]
    for path in kept[:3]:
        path.mkdir()
    with new_folder(folder) as temporary:
        (temporary / "whole").write_text("x")
    assert {*tmp_path.iterdir()} == {folder, *kept}
    with new_file(file) as temporary:
        temporary.write_text("whole")
    assert {*tmp_path.iterdir()} == {folder, file, *kept[:3]}
