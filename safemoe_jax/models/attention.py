"""Grouped-query attention over a row, or over a row and its cache.

Legend: B rows, T queries, S keys, D model width, N query heads, G key/value heads, Q = N / G, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.linear import Linear
from safemoe_jax.models.norms import RMSNorm
from safemoe_jax.models.rope import rotate

_LEAST_BLOCK, _MOST_BLOCKS = 128, 8


class LayerCache(NamedTuple):
    """The stacked keys and values of a segment, and where this layer writes.

    keys_RBGSH, values_RBGSH: the whole stack, updated in place by the scan that carries it. Heads come before
    slots, so that a decoding step reads it as it lies (slots first cost twice the step's attention on a CPU).
    index: this layer's place in the stack. slot: the first key slot to write.
    """

    keys_RBGSH: jax.Array
    values_RBGSH: jax.Array
    index: jax.Array
    slot: jax.Array


class Attention(nnx.Module):
    """Projections, optional q/k norm and clamp, rotary embedding, softmax attention."""

    def __init__(self, config: ModelConfig) -> None:
        d_model, head_dim = config.d_model, config.head_dim
        q_width, kv_width = config.n_heads * head_dim, config.n_kv_heads * head_dim
        options = {"lora": config.lora, "bias": config.attention_bias}
        self.q_proj = Linear("q_proj", d_model, q_width, ("embed", "heads"), **options)
        self.k_proj = Linear("k_proj", d_model, kv_width, ("embed", "kv_heads"), **options)
        self.v_proj = Linear("v_proj", d_model, kv_width, ("embed", "kv_heads"), **options)
        self.o_proj = Linear(
            "o_proj", q_width, d_model, ("heads", "embed"), lora=config.lora, bias=config.output_bias
        )
        has_norm = config.qk_norm == "full"
        self.q_norm = RMSNorm(q_width, config.norm_eps, "heads") if has_norm else None
        self.k_norm = RMSNorm(kv_width, config.norm_eps, "kv_heads") if has_norm else None
        self.clip, self.head_dim = config.clip_qkv, head_dim

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask_BTS: jax.Array,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends; with a cache, writes this call's keys and values into it and attends to all of its slots.

        Args:
            x_BTD: normalised hidden states.
            rope: cosines and sines of the T positions.
            mask_BTS: bool, True where a query may see a key (S = T, or the cache's length).
            cache: keys and values so far.

        Returns:
            The attention output [B, T, D] and the updated cache.
        """
        q_BTNH, k_BTGH, v_BTGH = self._project(x_BTD)
        q_BTNH, k_BTGH = rotate(q_BTNH, rope), rotate(k_BTGH, rope)
        if cache is not None:
            cache = _write(cache, k_BTGH, v_BTGH)
            k_BGSH = jax.lax.dynamic_index_in_dim(cache.keys_RBGSH, cache.index, keepdims=False)
            v_BGSH = jax.lax.dynamic_index_in_dim(cache.values_RBGSH, cache.index, keepdims=False)
            y_BTNH = attend_heads_first(q_BTNH, k_BGSH, v_BGSH, mask_BTS)
        else:
            y_BTNH = attend(q_BTNH, k_BTGH, v_BTGH, mask_BTS)
        return self.o_proj(y_BTNH.reshape(*x_BTD.shape[:2], -1)), cache

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (jnp.clip(value, -self.clip, self.clip) for value in (q, k, v))
        return tuple(value.reshape(*x_BTD.shape[:2], -1, self.head_dim) for value in (q, k, v))


def attend(q_BTNH: jax.Array, k_BSGH: jax.Array, v_BSGH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """`attend_heads_first` for keys and values as they are projected."""
    return attend_heads_first(q_BTNH, k_BSGH.transpose(0, 2, 1, 3), v_BSGH.transpose(0, 2, 1, 3), mask_BTS)


def attend_heads_first(
    q_BTNH: jax.Array, k_BGSH: jax.Array, v_BGSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Causal scaled dot-product attention; scores and softmax in float32.

    Query t must see no key behind slot t when T > 1: the queries are taken in blocks, and a block never
    touches the keys behind it, which saves up to half of the scores.

    Returns:
        [B, T, N, H] in the dtype of q.
    """
    length, groups = q_BTNH.shape[1], k_BGSH.shape[1]
    q_BTGQH = q_BTNH.reshape(*q_BTNH.shape[:2], groups, -1, q_BTNH.shape[-1])
    # Heads come before positions: every product below is then a plain batched matrix product.
    q_BGQTH = q_BTGQH.transpose(0, 2, 3, 1, 4) * q_BTNH.shape[-1] ** -0.5
    block = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
    if length <= block:
        y_BGQTH = _attend_block(q_BGQTH, k_BGSH, v_BGSH, mask_BTS)
    else:
        blocks = [
            _attend_block(
                q_BGQTH[:, :, :, start : start + block],
                k_BGSH[:, :, : start + block],
                v_BGSH[:, :, : start + block],
                mask_BTS[:, start : start + block, : start + block],
            )
            for start in range(0, length, block)
        ]
        y_BGQTH = jnp.concatenate(blocks, axis=3)
    return y_BGQTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _attend_block(q_BGQTH: jax.Array, k_BGSH: jax.Array, v_BGSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    scores = jnp.einsum("BGQTH,BGSH->BGQTS", q_BGQTH, k_BGSH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    # Softmax with the division after the second product, where it touches H numbers a query and not S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total_BGQT1 = weights.sum(axis=-1, keepdims=True)
    y_BGQTH = jnp.einsum(
        "BGQTS,BGSH->BGQTH", weights.astype(v_BGSH.dtype), v_BGSH, preferred_element_type=jnp.float32
    )
    return (y_BGQTH / total_BGQT1).astype(q_BGQTH.dtype)


def _write(cache: LayerCache, k_BTGH: jax.Array, v_BTGH: jax.Array) -> LayerCache:
    start = (cache.index, 0, 0, cache.slot, 0)

    def write(stack_RBGSH: jax.Array, new_BTGH: jax.Array) -> jax.Array:
        new_1BGTH = new_BTGH.transpose(0, 2, 1, 3)[None].astype(stack_RBGSH.dtype)
        return jax.lax.dynamic_update_slice(stack_RBGSH, new_1BGTH, start)

    return cache._replace(
        keys_RBGSH=write(cache.keys_RBGSH, k_BTGH), values_RBGSH=write(cache.values_RBGSH, v_BTGH)
    )
