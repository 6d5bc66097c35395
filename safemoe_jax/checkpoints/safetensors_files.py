"""Safetensors files, one tensor in memory at a time: reading slices, writing in a stream.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), the raw data.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
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
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAPPED_BYTES = 64 * 2**20


class Entry(NamedTuple):
    """A tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype


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
    """Reads slices of tensors of several files.

    The library maps a file into memory, and every page read stays in this process's resident set until the
    file is closed. So the file is opened anew after some reading: memory stays near the largest slice.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file = None
        self._read = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, path: Path, name: str, index: Sequence[slice]) -> np.ndarray:
        """A slice of a tensor.

        Raises:
            InputError: the file is not a whole safetensors file.
        """
        if path != self._path or self._read > _MAPPED_BYTES:
            self._close()
            self._path, self._file = path, _open(path)
        if not index:
            return self._file.get_tensor(name)
        view = self._file.get_slice(name)
        part = view[tuple(index)]
        # A narrow slice still touches the pages of every row that it crosses.
        self._read += len(part) * math.prod(view.get_shape()[1:]) * part.itemsize
        return part

    def _close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._path, self._file, self._read = None, None, 0


def list_tensors(path: Path) -> dict[str, Entry]:
    """The tensors of a file, from its header alone.

    Raises:
        InputError: the file is missing, truncated or no safetensors file, or a dtype is not supported.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(path))
        entries = {}
        for name in file.keys():  # noqa: SIM118 (no iterator)
            view = file.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise InputError(
                    f"tensor '{name}' has dtype {view.get_dtype()}",
                    where=str(path),
                    expected=", ".join(DTYPES),
                )
            entries[name] = Entry(path, tuple(view.get_shape()), DTYPES[view.get_dtype()])
        return entries


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
        for name in list_tensors(path):
            yield name, reader.read(path, name, ())


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
