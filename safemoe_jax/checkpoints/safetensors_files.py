"""Safetensors files, one tensor in memory at a time: reading blocks, writing in a stream.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), the raw data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from safemoe_jax.errors import InputError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PAGE = 4096
_TILE, _PADDED = 256, 288
TRANSPOSE_BYTES = _TILE * _PADDED * 8


class Entry(NamedTuple):
    """A tensor in a file, whose bytes begin at `start`."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """Reads blocks of tensors of several files, from several threads at a time.

    Bytes go from the file into the array that wants them. Nothing is mapped into memory: pages of a map stay
    in this process's resident set, and their faults cost more than the copy.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def read(self, entry: Entry, index: Sequence[slice] | None = None) -> np.ndarray:
        """A block of a tensor, or all of it.

        Raises:
            InputError: the file is missing or has fewer bytes than its header says.
        """
        index = [slice(0, n) for n in entry.shape] if index is None else index
        out = np.empty([len(range(i.start, i.stop, i.step or 1)) for i in index], entry.dtype)
        self.read_into(entry, index, out)
        return out

    def read_into(self, entry: Entry, index: Sequence[slice], out: np.ndarray) -> None:
        """Reads a block of a tensor into an array of the same element type and of the block's shape.

        Args:
            entry: the tensor.
            index: a slice of each of its axes, with start and stop.
            out: filled; read into without a further copy where it is contiguous as the block is in the file.

        Raises:
            InputError: as `read`.
        """
        if out.size:
            self._read(entry, entry.start, entry.shape, tuple(index), out)

    def _read(
        self, entry: Entry, start: int, shape: tuple[int, ...], index: tuple[slice, ...], out: np.ndarray
    ) -> None:
        """Reads runs of rows where less than a page lies between two of them, otherwise row by row."""
        if not shape:
            self._fill(entry, start, out)
            return
        row, rows = math.prod(shape[1:]) * entry.dtype.itemsize, index[0]
        step = rows.step or 1
        if len(out) > 1 and step * row - _span(shape[1:], index[1:], entry.dtype.itemsize) >= _PAGE:
            for target, i in zip(out, range(rows.start, rows.stop, step), strict=True):
                self._read(entry, start + i * row, shape[1:], index[1:], target)
        elif len(out) == 1 and len(shape) > 1:
            self._read(entry, start + rows.start * row, shape[1:], index[1:], out[0])
        else:
            whole = (rows.stop - rows.start, *shape[1:])
            direct = out.shape == whole and out.flags.c_contiguous
            block = out if direct else np.empty(whole, entry.dtype)
            self._fill(entry, start + rows.start * row, block)
            if not direct:
                copy(block[(slice(None, None, step), *index[1:])], out)

    def _fill(self, entry: Entry, start: int, out: np.ndarray) -> None:
        target = memoryview(out.reshape(-1).view(np.uint8))
        file, done = self._open(entry.path), 0
        while done < len(target):
            count = os.preadv(file, [target[done:]], start + done)
            if count == 0:
                raise InputError(
                    "the file ends before its last tensor does",
                    where=str(entry.path),
                    expected="a complete file (fetch or copy it again; this one may be truncated)",
                )
            done += count

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


def _span(shape: Sequence[int], index: Sequence[slice], itemsize: int) -> int:
    """Bytes from the first element of a block to behind its last one."""
    last = 0
    for size, part in zip(shape, index, strict=True):
        step = part.step or 1
        last = last * size + (len(range(part.start, part.stop, step)) - 1) * step
    return (last + 1) * itemsize


def copy(source: np.ndarray, out: np.ndarray) -> None:
    """Copies, converting the element type, without holding the interpreter's lock for 16-bit floats."""
    if source.dtype == out.dtype and source.dtype == ml_dtypes.bfloat16:
        out.view(np.uint16)[...] = source.view(np.uint16)
    elif source.dtype == ml_dtypes.bfloat16 and out.dtype == np.float32:
        # A bfloat16 is the upper half of a float32.
        whole = out.view(np.uint32)
        whole[...] = source.view(np.uint16)
        whole <<= 16
    else:
        out[...] = source


def transpose(rows: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """out[..., i, o] = rows[..., o, i] of the same element type, several times as fast as NumPy does it.

    Tile by tile, each copied first to memory whose rows are some bytes longer than a power of two. Numbers
    that lie below one another would otherwise fall to the same few places of the cache and evict each other.

    Args:
        rows: what to transpose, at most 8 bytes a number.
        out: filled.
        scratch: uint8 [TRANSPOSE_BYTES], overwritten; new memory for each call would cost more than the rest.
    """
    if rows.ndim > 2:
        for one, target in zip(rows, out, strict=True):
            transpose(one, target, scratch)
        return
    rows, out = (array.view(f"u{array.itemsize}") for array in (rows, out))
    tile = scratch.view(rows.dtype)[: _TILE * _PADDED].reshape(_TILE, _PADDED)
    height, width = rows.shape
    for i, j in itertools.product(range(0, height, _TILE), range(0, width, _TILE)):
        source = rows[i : i + _TILE, j : j + _TILE]
        part = tile[: source.shape[0], : source.shape[1]]
        part[...] = source
        out[j : j + _TILE, i : i + _TILE] = part.T


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite; fast where all are finite."""
    if array.dtype == ml_dtypes.bfloat16:
        # Infinity and NaNs are the largest bits of either sign: of all int16, and of all uint16.
        largest = array.view(np.int16).max(initial=0), array.view(np.uint16).max(initial=0)
        return bool(largest[0] < 0x7F80 and largest[1] < 0xFF80)
    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass: a NaN or an infinity shows in the sum, which may also overflow by itself.
        return bool(np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all())


def list_tensors(path: Path) -> dict[str, Entry]:
    """The tensors of a file, from its header alone.

    Raises:
        InputError: the file is missing, truncated or no safetensors file, or a dtype is not supported.
    """
    _open(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, field in header.items():
        if field["dtype"] not in DTYPES:
            raise InputError(
                f"tensor '{name}' has dtype {field['dtype']}", where=str(path), expected=", ".join(DTYPES)
            )
    return {
        name: Entry(
            path, tuple(field["shape"]), DTYPES[field["dtype"]], 8 + length + field["data_offsets"][0]
        )
        for name, field in header.items()
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The text fields of a file's header.

    Raises:
        InputError: as `list_tensors`.
    """
    with _open(path) as file:
        return dict(file.metadata() or {})


def write(
    path: Path, planned: Sequence[Planned], arrays: Iterable[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one file, taking the arrays one after the other.

    Args:
        path: where; the caller gives a temporary name (`checkpoints.atomic`).
        planned: names, shapes and dtypes, in the order of the arrays.
        arrays: the data.
        metadata: text fields of the header.
    """
    with open(path, "wb") as file:
        file.write(_header(planned, metadata))
        for plan, array in zip(planned, arrays, strict=True):
            assert array.shape == plan.shape and array.dtype == plan.dtype, plan.name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays that are in memory already, largest element type first so that all stay aligned."""
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    planned = [Planned(name, arrays[name].shape, arrays[name].dtype) for name in names]
    write(path, planned, (arrays[name] for name in names), metadata)


def read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a file in turn.

    Raises:
        InputError: as `list_tensors`.
    """
    with Reader() as reader:
        for name, entry in list_tensors(path).items():
            yield name, reader.read(entry)


def _header(planned: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for plan in planned:
        header[plan.name] = {
            "dtype": _NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise InputError("file not found", where=str(path), expected="a safetensors file") from error
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"not a whole safetensors file: {error}",
            where=str(path),
            expected="a complete file (fetch or copy it again; this one may be truncated)",
        ) from error
