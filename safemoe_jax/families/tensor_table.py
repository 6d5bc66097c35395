"""One declarative table a family: where each parameter lies in a checkpoint, read in both directions.

A row says under which name a parameter is published and whether it is transposed there; further sources of
the same row are other layouts that are read but never written. `resolve` matches a table with the tensors
that a checkpoint has and reports everything that does not fit; `published` gives the tensors to write.
Nothing here touches a file.

Legend: R layers of a segment, E experts, D model width, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import ParamSpec, is_adapter

_LAYER_NAME = re.compile(r"segments\.(\d+)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Source:
    """Where one parameter lies on disk.

    Attributes:
        name: tensor name; `{layer}` and `{expert}` stand for indices, and without `{expert}` the tensor holds
            all experts along its first axis.
        transpose: its last two axes are swapped on disk.
        part: (i, n): it is the i-th of n equal parts that the disk tensor concatenates along its second last
            axis (last axis where not transposed).
    """

    name: str
    transpose: bool = False
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Row:
    """A parameter and its sources, the published one first.

    A parameter of a layer goes by its name after `segments.<s>.<p>.`.
    """

    name: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class TensorTable:
    """All rows of a family.

    Attributes:
        rows: one for every parameter that the network can declare.
        ignored: regular expressions of tensor names that carry no parameter (buffers of old exports).
        tied: disk name -> disk name whose copy it is when the embeddings are tied.
    """

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] | None = None

    def row(self, name: str) -> Row:
        """The row of a flat parameter name."""
        match = _LAYER_NAME.fullmatch(name)
        wanted = match[3] if match else name
        return next(row for row in self.rows if row.name == wanted)


class Piece(NamedTuple):
    """One disk tensor's share of one parameter.

    Attributes:
        at: leading indices of the parameter that it fills: (), (r,) or (r, e).
        name: disk tensor.
        shape: the disk tensor's full shape.
        source: how the two map onto each other.
    """

    at: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    source: Source

    def disk_index(self, index: Sequence[slice]) -> tuple[slice, ...]:
        """The disk tensor's index of a block of this piece, given as slices with start and stop."""
        index = list(index)
        part, of = self.source.part
        if of > 1:
            width = self.shape[-2 if self.source.transpose else -1] // of
            index[-1] = slice(index[-1].start + part * width, index[-1].stop + part * width)
        if self.source.transpose:
            index[-1], index[-2] = index[-2], index[-1]
        return tuple(index)


def linear(name: str, disk: str) -> tuple[Row, Row]:
    """A projection: kernel [in, out] is torch's weight [out, in] transposed; bias as it is."""
    kernel = Row(f"{name}.kernel", (Source(f"{disk}.weight", transpose=True),))
    return kernel, Row(f"{name}.bias", (Source(f"{disk}.bias"),))


def same(name: str, disk: str) -> Row:
    """A tensor with the same layout on disk."""
    return Row(name, (Source(disk),))


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
    """Parameter -> the disk tensors to write, in the published layout (adapters left out)."""
    return {
        name: pieces(config, name, spec.shape, table.row(name).sources[0])
        for name, spec in specs.items()
        if not is_adapter(name)
    }


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
        found: disk tensor name -> shape.
        where: the checkpoint, for messages.

    Raises:
        InputError: a tensor is missing, given in two layouts, of another shape, or mapped to no parameter.
    """
    plan = {
        name: _choose(config, name, spec, table.row(name), found, where)
        for name, spec in specs.items()
        if not is_adapter(name)
    }
    used = {piece.name for places in plan.values() for piece in places}
    copies = set(table.tied or {}) if config.tie_embeddings else set()
    for name in sorted(set(found) - used - copies):
        if not any(re.fullmatch(pattern, name) for pattern in table.ignored):
            raise InputError(
                f"tensor '{name}' maps to no parameter of model_type {config.family}",
                where=where,
                expected="what config.json declares (check num_hidden_layers, num_experts, attention_bias)",
            )
    return plan


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
    present = [layout for layout in layouts if any(piece.name in found for piece in layout)]
    if len(present) > 1:
        both = [next(piece.name for piece in layout if piece.name in found) for layout in present]
        raise InputError(
            f"duplicate: tensors '{both[0]}' and '{both[1]}' both give {name}",
            where=where,
            expected="one layout, per expert or fused",
        )
    chosen = present[0] if present else layouts[0]
    for piece in chosen:
        if piece.name not in found:
            raise InputError(
                f"tensor '{piece.name}' is missing",
                where=where,
                expected=f"a tensor of shape {list(piece.shape)}",
            )
        if tuple(found[piece.name]) != piece.shape:
            raise InputError(
                f"tensor '{piece.name}' has shape {list(found[piece.name])}",
                where=where,
                expected=f"shape {list(piece.shape)}, as config.json declares",
            )
    return chosen
