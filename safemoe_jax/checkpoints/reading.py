"""Parameters from the tensors of a checkpoint, straight into the devices' shardings.

Every different share of a parameter gets memory of its own, which JAX's CPU devices take over, others copy.
Several threads fill it in blocks that the processor's cache holds: a block comes from the file in the disk's
order of axes, is checked, and goes transposed to the shares that have a part in it. What is not transposed
and lies in one share is read to its place at once.

Legend: E experts, O outputs, I inputs, G groups of 32 inputs that share a scale.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from safemoe_jax.checkpoints.safetensors_files import (
    TRANSPOSE_BYTES,
    Entry,
    Reader,
    all_finite,
    copy,
    transpose,
)
from safemoe_jax.errors import InputError
from safemoe_jax.families.tensor_table import PACK, SCALED, SCALES, Piece
from safemoe_jax.models.params import ParamSpec
from safemoe_jax.models.quantised import Int4, Int8, Quantisation, Quantised, part_specs, quantise

# Blocks of as many threads as compute and as many that wait for a disk; together about a large cache.
BLOCK_BYTES = 4 * 2**20
THREADS = min(16, 2 * (os.cpu_count() or 1))
ALIGNMENT = 64
Entries = Mapping[str, Entry]
# First and last + 1 of a share along each axis of its parameter.
Bounds = tuple[tuple[int, int], ...]
# FP4 (E2M1) by code; the upper half of the codes is negative. A byte holds two, the lower half first.
_FP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_FP4 = np.concatenate([_FP4, -_FP4])
_FP4_PAIRS = np.stack([np.tile(_FP4, 16), np.repeat(_FP4, 16)], axis=-1)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_NUMBERS = np.arange(256, dtype=np.uint8).view(_FP8).astype(np.float32)
_NOT_A_SCALE = 255
_SCALES = np.ldexp(np.float32(1), np.arange(_NOT_A_SCALE) - 127)


class Job(NamedTuple):
    """A block to read.

    Attributes:
        piece: the disk tensor.
        index: the block within the piece.
        targets: (a part of the block, where in a share's memory it goes).
    """

    piece: Piece
    index: tuple[slice, ...]
    targets: list[tuple[tuple[slice, ...], np.ndarray]]


class Loader:
    """Reads parameters, one share at a time. Use it as a context, which holds threads and open files.

    Args:
        entries: the checkpoint's tensors.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.reader = Reader()
        self._pool = ThreadPoolExecutor(THREADS)
        self._movers = ThreadPoolExecutor(os.cpu_count() or 1)
        self._of_thread = threading.local()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._movers.shutdown(cancel_futures=True)
        self.reader.__exit__()

    def load(
        self,
        spec: ParamSpec,
        places: Sequence[Piece],
        dtype: np.dtype,
        sharding: jax.sharding.Sharding | None,
    ) -> jax.Array:
        """One parameter, on the default device or in a sharding; then only this process's shares are read.

        Raises:
            InputError: a tensor holds NaN or infinite values, or its file is too short.
        """
        if sharding is None:
            whole = tuple((0, n) for n in spec.shape)
            return _put(*self.read_shares(places, whole, [whole], dtype), [None])[0]
        holders = _holders(spec.shape, sharding)
        shares: list[jax.Array] = []
        for region, inside in regions(list(holders)).items():
            read = self.read_shares(places, region, inside, dtype)
            for copies in self._movers.map(_put, read, [holders[bounds] for bounds in inside]):
                shares += copies
        return jax.make_array_from_single_device_arrays(spec.shape, sharding, shares)

    def load_quantised(
        self,
        spec: ParamSpec,
        places: Sequence[Piece],
        quantisation: Quantisation,
        shardings: Sequence[jax.sharding.Sharding] | None,
    ) -> Quantised:
        """A stack of weights [R, ..., I, O] rounded to 8 or 4 bits layer by layer as it is read.

        One layer is in float32 at a time. In a sharding only this process's layers, experts and outputs are
        read, of those all inputs: their scales lie on every device that has some of the inputs.

        Args:
            spec: the weight as it is declared without quantisation.
            places: where it is on disk.
            quantisation: how it is rounded.
            shardings: where `values` and `scales` go; None for the default device.
        """
        kind = Int8 if quantisation == "int8" else Int4
        if shardings is None:
            parts = self._read_rounded(places, [(0, n) for n in spec.shape], quantisation)
            return kind(*(_put(part, [None])[0] for part in parts))
        shapes = [part.shape for part in part_specs(spec, quantisation)]

        def with_all_inputs(share: Bounds) -> Bounds:
            return (*share[:-2], (0, spec.shape[-2]), share[-1])

        held = _holders(shapes[1], shardings[1])
        home, blocks = {}, {}
        for region, inside in regions(list(map(with_all_inputs, held))).items():
            home |= dict.fromkeys(inside, region)
            blocks[region] = self._read_rounded(places, region, quantisation)

        def place(part: int) -> jax.Array:
            def block(index: tuple[slice, ...]) -> np.ndarray:
                share = _bounds(index, shapes[part])
                region = home[with_all_inputs(share)]
                return blocks[region][part][_slices(share, [start for start, _ in region])]

            return jax.make_array_from_callback(shapes[part], shardings[part], block)

        return kind(place(0), place(1))

    def _read_rounded(
        self, places: Sequence[Piece], region: Sequence[tuple[int, int]], quantisation: Quantisation
    ) -> list[np.ndarray]:
        """A block of a stack, all inputs of it, as `values` and `scales`."""
        whole = jax.ShapeDtypeStruct([stop - start for start, stop in region], np.float32)
        parts = jax.eval_shape(functools.partial(quantise, quantisation=quantisation), whole)
        found = [_aligned(part.shape, part.dtype) for part in parts]
        rounded = jax.jit(quantise, static_argnums=1)
        (first, last), *inner = region
        for layer in range(first, last):
            bounds = ((layer, layer + 1), *inner)
            (share,) = self.read_shares(places, bounds, [bounds], np.dtype(np.float32))
            for part, one in zip(found, rounded(share, quantisation), strict=True):
                part[layer - first] = np.asarray(one)[0]
        return found

    def read_shares(
        self, places: Sequence[Piece], region: Bounds, shares: Sequence[Bounds], dtype: np.dtype
    ) -> list[np.ndarray]:
        """Blocks of a parameter, assembled from the disk tensors that they cover.

        Args:
            places: where the parameter is on disk.
            region: what is read.
            shares: blocks that fill it together.
            dtype: of the result.

        Returns:
            An array for each share, contiguous, new and nobody else's.
        """
        arrays = [_aligned([stop - start for start, stop in share], dtype) for share in shares]
        for _ in self._pool.map(self._fill, _jobs(places, region, shares, arrays)):
            pass
        return arrays

    def _fill(self, job: Job) -> None:
        """Reads a block, to its place at once where the memory there has the disk's order."""
        swapped = job.piece.source.transpose
        if not swapped and len(job.targets) == 1:
            _read_block(self.reader, self.entries, job.piece, job.index, job.targets[0][1])
            return
        shape = [part.stop - part.start for part in job.index]
        if swapped:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        dtype, (memory, tile) = job.targets[0][1].dtype, self._scratch()
        rows = memory[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        block = rows.swapaxes(-1, -2) if swapped else rows
        _read_block(self.reader, self.entries, job.piece, job.index, block)
        for part, target in job.targets:
            if swapped:
                transpose(block[part].swapaxes(-1, -2), target, tile)
            else:
                copy(block[part], target)

    def _scratch(self) -> tuple[np.ndarray, np.ndarray]:
        """This thread's memory for a block and for transposing it, which the next block overwrites."""
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = tuple(np.empty(n, np.uint8) for n in (BLOCK_BYTES, TRANSPOSE_BYTES))
        return self._of_thread.scratch


def _put(share: np.ndarray, devices: Sequence[jax.Device | None]) -> list[jax.Array]:
    """Moves a share to the devices that hold it.

    CPU devices all take over its memory, which nobody writes to. Of others the first one copies it, and the
    rest copy from there.
    """
    first = jax.block_until_ready(jax.device_put(share, devices[0]))
    source = share if first.device.platform == "cpu" else first
    return [first, *(jax.block_until_ready(jax.device_put(source, device)) for device in devices[1:])]


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """New memory at an address that JAX's CPU devices take over without a copy.

    They never write to it: the first step that is given it to keep its result in makes new memory instead.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def regions(shares: Sequence[Bounds]) -> dict[Bounds, Sequence[Bounds]]:
    """What a process reads at once to have these different shares of a parameter: region -> its shares.

    The box around all of them where they fill it, so that the file is read in long runs and each byte once;
    otherwise every share by itself, so that nothing is read that no device holds.
    """
    box = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*shares, strict=True))
    # Two shares of one sharding have nothing in common, so they fill the box if they are as large as it.
    if sum(map(_volume, shares)) == _volume(box):
        return {box: shares}
    return {share: [share] for share in shares}


def _holders(shape: Sequence[int], sharding: jax.sharding.Sharding) -> dict[Bounds, list[jax.Device]]:
    """This process's different shares of a parameter, each with the devices that hold it."""
    holders: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        holders.setdefault(_bounds(index, shape), []).append(device)
    return holders


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _volume(bounds: Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)


def _slices(bounds: Sequence[tuple[int, int]], offset: Sequence[int] | None = None) -> tuple[slice, ...]:
    offset = [0] * len(bounds) if offset is None else offset
    return tuple(slice(start - o, stop - o) for (start, stop), o in zip(bounds, offset, strict=True))


def stored_dtype(entries: Entries, piece: Piece) -> np.dtype:
    """The element type of a piece's numbers: of 4 and 8 bits bfloat16, as they are meant to be computed."""
    quantised = piece.source.packed or entries[piece.name].dtype == _FP8
    return np.dtype(ml_dtypes.bfloat16) if quantised else entries[piece.name].dtype


def target_dtype(stored: np.dtype, wanted: str | None) -> np.dtype:
    """The type in memory: as wanted; by default bfloat16 stays and everything else becomes float32."""
    if wanted is None:
        return stored if stored == ml_dtypes.bfloat16 else np.dtype(np.float32)
    return np.dtype(jnp.dtype(wanted))


def _jobs(
    places: Sequence[Piece], region: Bounds, shares: Sequence[Bounds], arrays: Sequence[np.ndarray]
) -> Iterator[Job]:
    """Every piece within the region, cut into blocks of bounded size, each with the shares it goes to."""
    for piece in places:
        depth = len(piece.at)
        if not _has(region[:depth], piece.at):
            continue
        # The shares that have a part in this piece: its bounds there and the memory for it.
        parts = [
            (share[depth:], array[tuple(i - start for (start, _), i in zip(share, piece.at, strict=False))])
            for share, array in zip(shares, arrays, strict=True)
            if _has(share[:depth], piece.at)
        ]
        for block in _cut(_slices(region[depth:]), piece, arrays[0].itemsize):
            yield Job(piece, block, list(_targets(block, parts)))


def _has(bounds: Bounds, at: Sequence[int]) -> bool:
    return all(start <= i < stop for (start, stop), i in zip(bounds, at, strict=True))


def _targets(
    block: Sequence[slice], parts: Sequence[tuple[Bounds, np.ndarray]]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """What a block and each of these parts have in common: its index in the block, its place in the part."""
    for bounds, memory in parts:
        common = [
            (max(b.start, start), min(b.stop, stop)) for b, (start, stop) in zip(block, bounds, strict=True)
        ]
        if all(start < stop for start, stop in common):
            offset = [start for start, _ in bounds]
            yield _slices(common, [b.start for b in block]), memory[_slices(common, offset)]


def _cut(index: tuple[slice, ...], piece: Piece, itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Halves a block along the disk tensor's outermost axis that is longer than 1 until it is small."""
    lengths = [part.stop - part.start for part in index]
    axes = list(range(len(index)))
    if piece.source.transpose:
        axes[-2:] = axes[-1], axes[-2]
    long = [axis for axis in axes if lengths[axis] > 1]
    if not long or int(np.prod(lengths)) * itemsize <= BLOCK_BYTES:
        yield index
        return
    axis = long[0]
    middle = index[axis].start + lengths[axis] // 2
    for half in (slice(index[axis].start, middle), slice(middle, index[axis].stop)):
        yield from _cut((*index[:axis], half, *index[axis + 1 :]), piece, itemsize)


def _read_block(
    reader: Reader, entries: Entries, piece: Piece, index: tuple[slice, ...], out: np.ndarray
) -> None:
    """Reads a block of a piece, converts its numbers and checks them.

    Args:
        index: the block within the piece.
        out: an array of the block's shape; its last two axes are swapped in memory where they are on disk.
    """
    disk_index = piece.disk_index(index)
    target = out.swapaxes(-1, -2) if piece.source.transpose else out
    target = target[None] if piece.source.boxed else target
    if piece.source.packed:
        copy(_unpack(reader, entries, piece, disk_index).astype(out.dtype), target)
    elif entries[piece.name].dtype == _FP8:
        copy(_scaled(reader, entries, piece.name, disk_index).astype(out.dtype), target)
    elif entries[piece.name].dtype == out.dtype:
        reader.read_into(entries[piece.name], disk_index, target)
    else:
        copy(reader.read(entries[piece.name], disk_index), target)
    if not all_finite(target):
        name = next(iter(piece.tensors))
        raise InputError(
            f"tensor '{name}' holds NaN or infinite values",
            where=str(entries[name].path),
            expected="finite weights (the run that wrote them may have diverged)",
        )


def _unpack(reader: Reader, entries: Entries, piece: Piece, index: Sequence[slice]) -> np.ndarray:
    """Numbers of an MXFP4 tensor, float32: FP4 codes times a power of two for each 32 of the last axis."""
    *lead, inputs = index
    first, last = inputs.start // PACK, -(-inputs.stop // PACK)
    blocks, scales = piece.tensors
    codes = reader.read(entries[blocks], (*lead, slice(first, last), slice(0, PACK // 2)))
    exponents_EOG = reader.read(entries[scales], (*lead, slice(first, last)))
    if (exponents_EOG == _NOT_A_SCALE).any():
        raise InputError(
            f"tensor '{scales}' holds scales that are no number",
            where=str(entries[scales].path),
            expected="exponents from 0 to 254",
        )
    numbers = _FP4_PAIRS[codes].reshape(*exponents_EOG.shape, PACK) * _SCALES[exponents_EOG][..., None]
    return numbers.reshape(*numbers.shape[:-2], -1)[
        ..., inputs.start - first * PACK : inputs.stop - first * PACK
    ]


def _scaled(reader: Reader, entries: Entries, name: str, index: Sequence[slice]) -> np.ndarray:
    """Numbers of a block of an FP8 tensor, float32: each times the scale of its square."""
    codes = reader.read(entries[name], index)
    places = [np.arange(part.start, part.stop, part.step or 1) // SCALED for part in index[-2:]]
    squares = tuple(slice(int(place[0]), int(place[-1]) + 1) for place in places)
    scales = reader.read(entries[f"{name}{SCALES}"], (*index[:-2], *squares)).astype(np.float32)
    rows, columns = (place - place[0] for place in places)
    return _FP8_NUMBERS[codes.view(np.uint8)] * scales[..., rows[:, None], columns]


def check_scales(entries: Entries) -> None:
    """FP8 weights and their scales come in pairs that fit each other.

    Raises:
        InputError: a scale is missing, of a wrong shape, or beside a weight of another type.
    """
    for name, entry in entries.items():
        weight = entries.get(name.removesuffix(SCALES)) if name.endswith(SCALES) else None
        if weight is not None and weight.dtype != _FP8:
            raise InputError(
                f"tensor '{name}' scales a tensor of type {weight.dtype}",
                where=str(entry.path),
                expected=f"scales beside {_FP8} only",
            )
        if entry.dtype != _FP8:
            continue
        scales = entries.get(f"{name}{SCALES}")
        shape = (*entry.shape[:-2], *(-(-n // SCALED) for n in entry.shape[-2:]))
        if len(entry.shape) < 2 or scales is None or scales.shape != shape:
            raise InputError(
                f"tensor '{name}' is in FP8, its scales '{name}{SCALES}' are "
                + ("missing" if scales is None else f"of shape {list(scales.shape)}"),
                where=str(entry.path),
                expected=f"scales of shape {list(shape)}, one for each {SCALED} x {SCALED} of a matrix",
            )


def check_tied(reader: Reader, tied: Mapping[str, str], entries: Entries) -> None:
    """A tied model may still carry its output projection; it must then be the embedding, bit for bit.

    Raises:
        InputError: it is not.
    """
    for name, original in tied.items():
        if name not in entries:
            continue
        pair = entries[name], entries[original]
        same = pair[0].shape == pair[1].shape and all(
            np.array_equal(*(reader.read(entry, index) for entry in pair)) for index in _rows(pair[0])
        )
        if not same:
            raise InputError(
                f"tensor '{name}' is not '{original}', but config.json ties them",
                where=str(pair[0].path),
                expected="equal tensors, or tie_word_embeddings false",
            )


def _rows(entry: Entry) -> Iterator[tuple[slice, ...]]:
    step = max(1, BLOCK_BYTES // max(1, int(np.prod(entry.shape[1:])) * entry.dtype.itemsize))
    bounds = [*range(0, entry.shape[0], step), entry.shape[0]]
    for start, stop in itertools.pairwise(bounds):
        yield slice(start, stop), *(slice(0, n) for n in entry.shape[1:])
