"""Keys and values of tokens already seen.

Legend: L layers, B rows, T new tokens, S slots, G key/value heads, H key width, W value width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from safemoe_jax.models.config import ModelConfig


class Cache(NamedTuple):
    """Every layer's keys and values.

    keys_LBGSH, values_LBGSW: one stack for all layers; heads come before slots, so that a decoding step
    reads a layer as it lies (slots first cost twice the step's attention on a CPU).
    positions_BS: int32, the position of what each slot holds; read by layers with a window or a chunk.
    """

    keys_LBGSH: jax.Array
    values_LBGSW: jax.Array
    positions_BS: jax.Array


class LayerCache(NamedTuple):
    """One layer's view of the cache.

    keys_LBGSH, values_LBGSW: the whole stacks, updated in place by the scan that carries them.
    index: this layer's place in them. slot: the first slot to write.
    """

    keys_LBGSH: jax.Array
    values_LBGSW: jax.Array
    index: jax.Array
    slot: jax.Array

    def write(self, k_BTGH: jax.Array, v_BTGW: jax.Array) -> LayerCache:
        """The cache with new keys and values from `slot` on."""
        start = (self.index, 0, 0, self.slot, 0)

        def written(stack: jax.Array, new: jax.Array) -> jax.Array:
            heads_first = new.transpose(0, 2, 1, 3)[None].astype(stack.dtype)
            return jax.lax.dynamic_update_slice(stack, heads_first, start)

        return self._replace(
            keys_LBGSH=written(self.keys_LBGSH, k_BTGH), values_LBGSW=written(self.values_LBGSW, v_BTGW)
        )

    def read(self) -> tuple[jax.Array, jax.Array]:
        """This layer's keys [B, G, S, H] and values [B, G, S, W]."""
        keys = jax.lax.dynamic_index_in_dim(self.keys_LBGSH, self.index, keepdims=False)
        return keys, jax.lax.dynamic_index_in_dim(self.values_LBGSW, self.index, keepdims=False)


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros. Latent attention caches what its heads read: full keys and values."""
    mla = config.mla
    heads = config.n_kv_heads if mla is None else config.n_heads
    key_width = config.head_dim if mla is None else mla.nope_dim + mla.rope_dim
    value_width = config.head_dim if mla is None else mla.v_dim
    shape = (config.n_layers, rows, heads, slots)
    return Cache(
        jnp.zeros((*shape, key_width), dtype),
        jnp.zeros((*shape, value_width), dtype),
        jnp.zeros((rows, slots), jnp.int32),
    )
