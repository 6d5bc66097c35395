"""Keys and values of tokens already seen.

A decoding step only reads the cache: its own keys and values come out of the layers and are written at once,
when all layers have run.

Legend: R repeats of a segment's pattern, B rows, T new tokens, S slots, G key/value heads, H key width,
W value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

KeysValues = tuple[jax.Array, jax.Array]
Read = Callable[[jax.Array, jax.Array], Any]
"""What is to be done with a layer's keys [B, G, S, H] and values [B, G, S, W]."""


class Stacked(NamedTuple):
    """Keys [R, B, G, S, H] and values [R, B, G, S, W] of one place in a segment's pattern: heads come before
    slots, so that a decoding step reads a layer as it lies."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def of(cls, new: KeysValues, slots: int) -> Stacked:
        """A cache of that many slots that begins with a prompt's keys [R, B, T, G, H] and values."""
        free = ((0, 0), (0, 0), (0, 0), (0, slots - new[0].shape[2]), (0, 0))
        return cls(*(jnp.pad(_heads_first(part), free) for part in new))

    def write(self, new: KeysValues, slot: jax.Array) -> Stacked:
        """With new keys [R, B, T, G, H] and values from this slot on."""
        return Stacked(
            *(
                lax.dynamic_update_slice(stack, _heads_first(part), (0, 0, 0, slot, 0))
                for stack, part in zip(self, new, strict=True)
            )
        )

    def read(self, repeat: jax.Array, what: Read) -> Any:
        """Does it with one layer's keys and values."""
        return what(*(lax.dynamic_index_in_dim(stack, repeat, keepdims=False) for stack in self))


class Apart(NamedTuple):
    """As `Stacked`, with an array a layer. XLA on a CPU copies a slice of a stack before it multiplies it,
    which is more work than the product; a whole array is read where it lies, in a branch a layer."""

    layers: tuple[Stacked, ...]

    @classmethod
    def of(cls, new: KeysValues, slots: int) -> Apart:
        """As `Stacked.of`."""
        return cls(tuple(Stacked.of(_one(new, repeat), slots) for repeat in range(len(new[0]))))

    def write(self, new: KeysValues, slot: jax.Array) -> Apart:
        """As `Stacked.write`."""
        return Apart(tuple(layer.write(_one(new, r), slot) for r, layer in enumerate(self.layers)))

    def read(self, repeat: jax.Array, what: Read) -> Any:
        """As `Stacked.read`."""
        return lax.switch(repeat, [lambda layer=layer: layer.read(0, what) for layer in self.layers])


class Cache(NamedTuple):
    """Every layer's keys and values.

    segments: for each segment, one cache a place in its pattern.
    positions_BS: int32, the position of what each slot holds; read by layers with a window or a chunk.
    """

    segments: tuple[tuple[Stacked | Apart, ...], ...]
    positions_BS: jax.Array

    def write(self, new: list[tuple[KeysValues, ...]], slot: jax.Array) -> Cache:
        """With what `run_segment` gives for every segment, from this slot on."""
        pairs = (zip(*both, strict=True) for both in zip(self.segments, new, strict=True))
        return self._replace(segments=tuple(tuple(old.write(kv, slot) for old, kv in p) for p in pairs))


class LayerCache(NamedTuple):
    """One layer's view of the cache: that of its place in the pattern, and the repeat that it belongs to."""

    place: Stacked | Apart
    repeat: jax.Array

    def read(self, what: Read) -> Any:
        """Does it with this layer's keys and values."""
        return self.place.read(self.repeat, what)


def _heads_first(part_RBTGX: jax.Array) -> jax.Array:
    return part_RBTGX.transpose(0, 1, 3, 2, 4)


def _one(new: KeysValues, repeat: int) -> KeysValues:
    keys, values = new
    return keys[repeat : repeat + 1], values[repeat : repeat + 1]
