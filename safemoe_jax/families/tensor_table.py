"""One declarative table a family: where each parameter lies in a checkpoint, read in both directions.

A row says under which name a parameter is published and how it lies there; further sources of the same row
are other layouts that are read but never written. `resolve` matches a table with the tensors that a
checkpoint has and reports everything that does not fit; `published` gives the tensors to write.
Nothing here touches a file. `families.common_rows` has the rows that most families share.

Legend: R layers of a segment, E experts, D model width, F expert width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import ParamSpec, is_adapter

_LAYER_NAME = re.compile(r"segments\.(\d+)\.(\d+)\.(.+)")
# MXFP4: numbers that share one scale, and bytes that hold them.
PACK, PACK_BYTES = 32, 16
# FP8 (DeepSeek-V3): the ending of the tensor of scales beside a weight, and the side of a scaled square.
SCALES, SCALED = "_scale_inv", 128


@dataclass(frozen=True)
class Source:
    """Where one parameter lies on disk.

    Attributes:
        name: tensor name; `{layer}` and `{expert}` stand for indices, and without `{expert}` the tensor holds
            all experts along its first axis.
        transpose: its last two axes are swapped on disk.
        part: (i, n): it is the i-th of n equal parts that the disk tensor holds along its second last axis
            (last axis where not transposed).
        interleaved: the parts alternate, i::n, instead of following one another.
        packed: stored as MXFP4, in `{name}_blocks` and `{name}_scales`; read, never written.
        boxed: the disk tensor has one more axis in front, of length 1.
    """

    name: str
    transpose: bool = False
    part: tuple[int, int] = (0, 1)
    interleaved: bool = False
    packed: bool = False
    boxed: bool = False


@dataclass(frozen=True)
class Row:
    """A parameter and its sources, the published one first; the last unpacked one is transformers' in memory.

    A parameter of a layer goes by its name after `segments.<s>.<p>.`.

    Attributes:
        name: the parameter.
        sources: where it may lie.
        float32: it stays float32 in a bfloat16 model (a correction bias decides by small differences).
    """

    name: str
    sources: tuple[Source, ...]
    float32: bool = False

    @property
    def in_memory(self) -> Source:
        """How transformers holds the parameter, which is what adapters name."""
        return [source for source in self.sources if not source.packed][-1]


@dataclass(frozen=True)
class TensorTable:
    """All rows of a family.

    Attributes:
        rows: one for every parameter that the network can declare, whatever the config.
        ignored: regular expressions of tensor names that carry no parameter (buffers of old exports).
        tied: disk name -> disk name whose copy it is when the embeddings are tied.
        prefixes: prefixes of tensor names that are dropped on reading (a model nested in a larger one).
        left_out: regular expressions of tensors of modules that this project does not compute (images, the
            prediction of further tokens); the user is told of them. `{n_layers}` stands for the number.
    """

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] | None = None
    prefixes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        """The row of a flat parameter name."""
        match = _LAYER_NAME.fullmatch(name)
        wanted = match[3] if match else name
        found = [row for row in self.rows if row.name == wanted]
        assert len(found) == 1, f"{len(found)} rows for {wanted}"
        return found[0]

    def plain_name(self, name: str) -> str:
        """A tensor's name without the prefix."""
        return next((name.removeprefix(p) for p in self.prefixes if name.startswith(p)), name)


class Piece(NamedTuple):
    """One disk tensor's share of one parameter.

    Attributes:
        at: leading indices of the parameter that it fills: (), (r,) or (r, e).
        name: disk tensor (without the endings of a packed one).
        shape: the disk tensor's full shape (of a packed one, its numbers').
        source: how the two map onto each other.
    """

    at: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    source: Source

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is in the file: the tensor itself, or a packed one's two."""
        if not self.source.packed:
            return {self.name: self.shape}
        scales = (*self.shape[:-1], self.shape[-1] // PACK)
        return {f"{self.name}_blocks": (*scales, PACK_BYTES), f"{self.name}_scales": scales}

    def disk_index(self, index: Sequence[slice]) -> tuple[slice, ...]:
        """The disk tensor's index of a block of this piece, given as slices with start and stop."""
        index = list(index)
        part, of = self.source.part
        if of > 1 and self.source.interleaved:
            index[-1] = slice(index[-1].start * of + part, (index[-1].stop - 1) * of + part + 1, of)
        elif of > 1:
            width = self.shape[-2 if self.source.transpose else -1] // of
            index[-1] = slice(index[-1].start + part * width, index[-1].stop + part * width)
        if self.source.transpose:
            index[-1], index[-2] = index[-2], index[-1]
        return (slice(0, 1), *index) if self.source.boxed else tuple(index)


def linear(name: str, *disks: str) -> tuple[Row, Row]:
    """A projection: kernel [in, out] is torch's weight [out, in] transposed; bias as it is."""
    kernel = Row(f"{name}.kernel", tuple(Source(f"{disk}.weight", transpose=True) for disk in disks))
    return kernel, Row(f"{name}.bias", tuple(Source(f"{disk}.bias") for disk in disks))


def same(name: str, *disks: str, float32: bool = False) -> Row:
    """A tensor with the same layout on disk."""
    return Row(name, tuple(map(Source, disks)), float32)


def expert(name: str, disk: str, fused: str, part: tuple[int, int] = (0, 1)) -> Row:
    """An expert matrix: published as one [out, in] an expert, also read as a part of [E, n * out, in]."""
    return Row(name, (Source(disk, transpose=True), Source(fused, transpose=True, part=part)))


def pieces(config: ModelConfig, name: str, shape: Sequence[int], source: Source) -> tuple[Piece, ...]:
    """The disk tensors that make up a parameter of this shape, under this source."""
    depth = ("{layer}" in source.name) + ("{expert}" in source.name)
    inner = list(shape[depth:])
    inner[-1] *= source.part[1]
    if source.transpose:
        inner[-1], inner[-2] = inner[-2], inner[-1]
    if source.boxed:
        inner.insert(0, 1)
    places = [()]
    for size in shape[:depth]:
        places = [(*place, i) for place in places for i in range(size)]
    return tuple(
        Piece(place, _disk_name(config, name, source, place), tuple(inner), source) for place in places
    )


def _disk_name(config: ModelConfig, name: str, source: Source, place: tuple[int, ...]) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return source.name
    segment = config.segments[int(match[1])]
    layer = segment.first_layer + place[0] * len(segment.pattern) + int(match[2])
    return source.name.format(layer=layer, expert=place[1] if len(place) > 1 else None)


def published(
    config: ModelConfig, table: TensorTable, specs: Mapping[str, ParamSpec]
) -> dict[str, tuple[Piece, ...]]:
    """Parameter -> its pieces in the published layout (adapters left out). Parts share a disk tensor."""
    return {
        name: pieces(config, name, spec.shape, table.row(name).sources[0])
        for name, spec in specs.items()
        if not is_adapter(name)
    }


def by_tensor(plan: Mapping[str, Sequence[Piece]]) -> dict[str, list[tuple[str, Piece]]]:
    """Disk tensor -> the parameters that fill it, each with its piece, in the plan's order."""
    tensors: dict[str, list[tuple[str, Piece]]] = {}
    for parameter, places in plan.items():
        for piece in places:
            tensors.setdefault(piece.name, []).append((parameter, piece))
    return tensors


def resolve(
    config: ModelConfig,
    table: TensorTable,
    specs: Mapping[str, ParamSpec],
    found: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, tuple[Piece, ...]]:
    """Parameter -> the disk tensors to read it from.

    Args:
        config: the network.
        table: its family's table.
        specs: its declared parameters.
        found: disk tensor name (without prefixes) -> shape.
        where: the checkpoint, for messages.

    Raises:
        InputError: a tensor is missing, given in two layouts, of another shape, or mapped to no parameter.
    """
    plan = {
        name: _choose(config, name, spec, table.row(name), found, where)
        for name, spec in specs.items()
        if not is_adapter(name)
    }
    used = {name for places in plan.values() for piece in places for name in piece.tensors}
    used |= {f"{name}{SCALES}" for name in used}
    copies = set(table.tied or {}) if config.tie_embeddings else set()
    patterns = (*table.ignored, *_left_out_patterns(config, table))
    for name in sorted(set(found) - used - copies):
        if not any(re.fullmatch(pattern, name) for pattern in patterns):
            raise InputError(
                f"tensor '{name}' maps to no parameter of model_type {config.family}",
                where=where,
                expected="what config.json declares (check num_hidden_layers, num_experts, attention_bias)",
            )
    return plan


def left_out(config: ModelConfig, table: TensorTable, names: Sequence[str]) -> dict[str, int]:
    """First part of the name (of a layer, with its number) -> tensors of modules that are not computed."""
    patterns = _left_out_patterns(config, table)
    skipped = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
    return dict(Counter(re.match(r"(model\.layers\.\d+|[^.]*)", name)[0] for name in skipped))


def _left_out_patterns(config: ModelConfig, table: TensorTable) -> list[str]:
    return [pattern.replace("{n_layers}", str(config.n_layers)) for pattern in table.left_out]


def _choose(
    config: ModelConfig,
    name: str,
    spec: ParamSpec,
    row: Row,
    found: Mapping[str, tuple[int, ...]],
    where: str,
) -> tuple[Piece, ...]:
    """The pieces of the one layout of this row that the checkpoint has (published where it has none)."""
    layouts = [pieces(config, name, spec.shape, source) for source in row.sources]
    present = [layout for layout in layouts if any(n in found for piece in layout for n in piece.tensors)]
    if len(present) > 1:
        both = [next(n for piece in layout for n in piece.tensors if n in found) for layout in present]
        raise InputError(
            f"duplicate: tensors '{both[0]}' and '{both[1]}' both give {name}",
            where=where,
            expected="one layout, per expert or fused",
        )
    chosen = present[0] if present else layouts[0]
    for tensor, shape in (item for piece in chosen for item in piece.tensors.items()):
        if tensor not in found:
            raise InputError(
                f"tensor '{tensor}' is missing", where=where, expected=f"a tensor of shape {list(shape)}"
            )
        if tuple(found[tensor]) != shape:
            raise InputError(
                f"tensor '{tensor}' has shape {list(found[tensor])}",
                where=where,
                expected=f"shape {list(shape)}, as config.json declares",
            )
    return chosen
