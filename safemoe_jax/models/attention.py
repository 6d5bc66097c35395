"""Grouped-query attention over a row, or over a row and its cache.

Legend: B rows, T queries, S keys, D model width, N query heads, G key/value heads, Q = N / G, H head width,
W value width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.models.config import LayerConfig, ModelConfig
from safemoe_jax.models.kv_cache import KeysValues, LayerCache
from safemoe_jax.models.linear import Linear
from safemoe_jax.models.norms import RMSNorm, unit_rms
from safemoe_jax.models.params import ParamSpec
from safemoe_jax.models.rope import Tables, rotate

_LEAST_BLOCK, _MOST_BLOCKS = 128, 8


class Row(NamedTuple):
    """What every layer of one pass shares.

    rope: cosines and sines of the T positions.
    mask_BTS: bool, True where a query may see a key, before windows and chunks (S = T, or the cache's slots).
    positions_BT, key_positions_BS: int32, positions of queries and of keys within their sample.
    forced_BT: bool, where routing is overridden, or None.
    """

    rope: Tables
    mask_BTS: jax.Array
    positions_BT: jax.Array
    key_positions_BS: jax.Array
    forced_BT: jax.Array | None


class Traits(NamedTuple):
    """What attention does in one layer (`LayerConfig`): Python values where all layers of a scan agree, which
    costs nothing, scanned scalars where they differ."""

    window: int | jax.Array = 0
    chunk: int | jax.Array = 0
    rope: bool | jax.Array = True
    temperature: bool | jax.Array = False

    @classmethod
    def of(cls, layer: LayerConfig) -> Traits:
        """The traits of one layer, as Python values."""
        return cls(layer.window, layer.chunk, layer.rope, layer.temperature)


class Attention(nnx.Module):
    """Projections, q/k norm and clamp, positions, softmax attention; what the config leaves out is absent."""

    def __init__(self, config: ModelConfig) -> None:
        d_model, head_dim = config.d_model, config.head_dim
        q_width, kv_width = config.n_heads * head_dim, config.n_kv_heads * head_dim
        options = {"lora": config.lora, "quantisation": config.quantisation}
        biased = {**options, "bias": config.attention_bias}
        self.q_proj = Linear("q_proj", d_model, q_width, ("embed", "heads"), **biased)
        self.k_proj = Linear("k_proj", d_model, kv_width, ("embed", "kv_heads"), **biased)
        self.v_proj = Linear("v_proj", d_model, kv_width, ("embed", "kv_heads"), **biased)
        self.o_proj = Linear(
            "o_proj", q_width, d_model, ("heads", "embed"), **options, bias=config.output_bias
        )
        if config.qk_norm == "full":
            self.q_norm = RMSNorm(q_width, config.norm_eps, "heads")
            self.k_norm = RMSNorm(kv_width, config.norm_eps, "kv_heads")
        elif config.qk_norm == "head":
            self.q_norm, self.k_norm = (RMSNorm(head_dim, config.norm_eps) for _ in range(2))
        self.sinks = nnx.Param(ParamSpec((config.n_heads,), ("heads",))) if config.sinks else None
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, row: Row, traits: Traits, cache: LayerCache | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """Attends to the tokens given and to what the cache holds.

        Args:
            x_BTD: normalised hidden states.
            row: positions and mask.
            traits: this layer's window, chunk, rotation and temperature.
            cache: keys and values so far; only with T = 1.

        Returns:
            The attention output [B, T, D], and the keys [B, T, G, H] and values of these tokens.
        """
        q_BTNH, k_BTGH, v_BTGH = self._project(x_BTD)
        q_BTNH, k_BTGH = self._place(q_BTNH, k_BTGH, row, traits)
        y_BTNH = attend_row(
            (q_BTNH, k_BTGH, v_BTGH),
            layer_mask(row, traits),
            cache,
            scale=self.config.attention_scale,
            sinks_N=None if self.sinks is None else self.sinks[...],
        )
        return self.o_proj(y_BTNH.reshape(*x_BTD.shape[:2], -1)), (k_BTGH, v_BTGH)

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        config, clip = self.config, self.config.clip_qkv
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (value.reshape(*x_BTD.shape[:2], -1, config.head_dim) for value in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if clip is not None:
            q, k, v = (jnp.clip(value, -clip, clip) for value in (q, k, v))
        return q, k, v

    def _place(
        self, q_BTNH: jax.Array, k_BTGH: jax.Array, row: Row, traits: Traits
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and keys with their positions in them."""
        config, tables = self.config, layer_tables(row.rope, traits)
        if tables is not None:
            q_BTNH, k_BTGH = (
                rotate(x, tables, interleaved=config.rope.interleaved) for x in (q_BTNH, k_BTGH)
            )
        if tables is not None and config.qk_norm == "l2_after_rope":
            q_BTNH, k_BTGH = (_where(traits.rope, _unit(x, config.norm_eps), x) for x in (q_BTNH, k_BTGH))
        if traits.temperature is not False and config.query_temperature is not None:
            scale, floor = config.query_temperature
            past_BT = jnp.floor((row.positions_BT.astype(jnp.float32) + 1) / floor)
            factor_BT11 = (1 + scale * jnp.log1p(past_BT))[:, :, None, None]
            q_BTNH = _where(traits.temperature, (q_BTNH * factor_BT11).astype(q_BTNH.dtype), q_BTNH)
        return q_BTNH, k_BTGH


def layer_tables(rope: Tables, traits: Traits) -> Tables | None:
    """The rotary tables of one layer; None where it is known not to rotate."""
    if isinstance(traits.rope, bool):
        return rope if traits.rope else None
    # A layer that does not rotate turns by the angle 0.
    cos, sin = rope
    return jnp.where(traits.rope, cos, 1.0), jnp.where(traits.rope, sin, 0.0)


def layer_mask(row: Row, traits: Traits) -> jax.Array:
    """Which keys each query sees in one layer, bool [B, T, S]."""
    mask_BTS = row.mask_BTS
    query_BT1, key_B1S = row.positions_BT[:, :, None], row.key_positions_BS[:, None, :]
    if not _is_zero(traits.window):
        mask_BTS = mask_BTS & (key_B1S > query_BT1 - traits.window)
    if not _is_zero(traits.chunk):
        mask_BTS = mask_BTS & (key_B1S // traits.chunk == query_BT1 // traits.chunk)
    return mask_BTS


def attend_row(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    mask_BTS: jax.Array,
    cache: LayerCache | None,
    *,
    scale: float | None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Attention over the row's own keys (S = T), or of a new token over the cache's slots and itself."""
    if cache is None:
        return attend(*qkv, mask_BTS, scale=scale, sinks_N=sinks_N)
    return cache.read(partial(attend_cached, qkv, mask_BTS, scale=scale, sinks_N=sinks_N))


def attend(
    q_BTNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGW: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """`attend_heads_first` for keys and values as they are projected."""
    k_BGSH, v_BGSW = k_BSGH.transpose(0, 2, 1, 3), v_BSGW.transpose(0, 2, 1, 3)
    return attend_heads_first(q_BTNH, k_BGSH, v_BGSW, mask_BTS, scale=scale, sinks_N=sinks_N)


def attend_heads_first(
    q_BTNH: jax.Array,
    k_BGSH: jax.Array,
    v_BGSW: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Causal scaled dot-product attention; scores and softmax in float32, also where q is bfloat16 and where
    transformers' eager attention rounds them (`tests/parity/families/test_bfloat16_rules.py` says where).

    Query t must see no key behind slot t when T > 1: the queries are taken in blocks, and a block never
    touches the keys behind it, which saves up to half of the scores.

    Args:
        q_BTNH, k_BGSH, v_BGSW: queries, keys, values.
        mask_BTS: bool, True where a query sees a key.
        scale: factor of the scores; H ** -0.5 by default.
        sinks_N: a logit a query head that joins the softmax and carries no value.

    Returns:
        [B, T, N, W] in the dtype of q.
    """
    length = q_BTNH.shape[1]
    q_BGQTH, sinks_GQ11 = _by_group(q_BTNH, sinks_N, k_BGSH.shape[1], scale)
    block = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
    if length <= block:
        y_BGQTW = _attend_block(q_BGQTH, k_BGSH, v_BGSW, mask_BTS, sinks_GQ11)
    else:
        blocks = [
            _attend_block(
                q_BGQTH[:, :, :, start : start + block],
                k_BGSH[:, :, : start + block],
                v_BGSW[:, :, : start + block],
                mask_BTS[:, start : start + block, : start + block],
                sinks_GQ11,
            )
            for start in range(0, length, block)
        ]
        y_BGQTW = jnp.concatenate(blocks, axis=3)
    return y_BGQTW.transpose(0, 3, 1, 2, 4).reshape(*q_BTNH.shape[:3], -1)


def attend_cached(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    mask_B1S: jax.Array,
    k_BGSH: jax.Array,
    v_BGSW: jax.Array,
    *,
    scale: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Attention of one new token a row over the slots that the mask lets it see, and over itself.

    Both parts are weighed by the sums of their softmaxes (FlashAttention's merge of blocks), so that nothing
    has to be written into the cache first.

    Args:
        qkv: query [B, 1, N, H], key [B, 1, G, H] and value [B, 1, G, W] of the token.
        mask_B1S: bool; may be False throughout.
        k_BGSH, v_BGSW: what the slots hold.
        scale, sinks_N: as in `attend_heads_first`.

    Returns:
        [B, 1, N, W] in the dtype of the query.
    """
    q_B1NH, k_B1GH, v_B1GW = qkv
    q_BGQ1H, sinks_GQ11 = _by_group(q_B1NH, sinks_N, k_BGSH.shape[1], scale)
    seen_BGQ1W, log_sum_BGQ11 = _attend_with_sums(q_BGQ1H, k_BGSH, v_BGSW, mask_B1S, sinks_GQ11)
    own_BGQ11 = _product("BGQTH,BTGH->BGQT", q_BGQ1H, k_B1GH)[..., None]
    own_share_BGQ11 = jax.nn.sigmoid(own_BGQ11 - log_sum_BGQ11)
    own_BG11W = v_B1GW.transpose(0, 2, 1, 3)[:, :, None].astype(jnp.float32)
    y_BGQ1W = seen_BGQ1W + own_share_BGQ11 * (own_BG11W - seen_BGQ1W)
    return y_BGQ1W.reshape(*q_B1NH.shape[:3], -1).astype(q_B1NH.dtype)


def _by_group(
    q_BTNH: jax.Array, sinks_N: jax.Array | None, groups: int, scale: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Scaled queries [B, G, Q, T, H] and float32 sinks [G, Q, 1, 1].

    Heads come before positions: every product is then a plain batched matrix product.
    """
    rows, length, _, width = q_BTNH.shape
    q_BTGQH = q_BTNH.reshape(rows, length, groups, -1, width)
    q_BGQTH = q_BTGQH.transpose(0, 2, 3, 1, 4) * (width**-0.5 if scale is None else scale)
    return q_BGQTH, None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(groups, -1, 1, 1)


@jax.custom_vjp
def _attend_block(
    q_BGQTH: jax.Array,
    k_BGSH: jax.Array,
    v_BGSW: jax.Array,
    mask_BTS: jax.Array,
    sinks_GQ11: jax.Array | None,
) -> jax.Array:
    """Softmax attention of some queries. The backward pass computes the weights anew, as FlashAttention does
    (arXiv 2205.14135, algorithm 4): nothing of size T x S is kept for it."""
    return _attend_with_sums(q_BGQTH, k_BGSH, v_BGSW, mask_BTS, sinks_GQ11)[0].astype(q_BGQTH.dtype)


def _attend_with_sums(
    q_BGQTH: jax.Array,
    k_BGSH: jax.Array,
    v_BGSW: jax.Array,
    mask_BTS: jax.Array,
    sinks_GQ11: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The output [B,G,Q,T,W] and the log of each softmax's sum [B,G,Q,T,1], float32."""
    scores = _masked_scores(q_BGQTH, k_BGSH, mask_BTS)
    largest_BGQT1 = scores.max(axis=-1, keepdims=True)
    if sinks_GQ11 is not None:
        largest_BGQT1 = jnp.maximum(largest_BGQT1, sinks_GQ11)
    # Softmax with the division after the second product, where it touches W numbers a query and not S.
    weights = jnp.exp(scores - largest_BGQT1)
    total_BGQT1 = weights.sum(axis=-1, keepdims=True)
    if sinks_GQ11 is not None:
        total_BGQT1 = total_BGQT1 + jnp.exp(sinks_GQ11 - largest_BGQT1)
    y_BGQTW = _product("BGQTS,BGSW->BGQTW", weights.astype(v_BGSW.dtype), v_BGSW) / total_BGQT1
    return y_BGQTW, largest_BGQT1 + jnp.log(total_BGQT1)


def _attend_block_forward(*inputs: jax.Array | None) -> tuple[jax.Array, tuple]:
    y_BGQTW, log_sum_BGQT1 = _attend_with_sums(*inputs)
    y_BGQTW = y_BGQTW.astype(inputs[0].dtype)
    return y_BGQTW, (*inputs, y_BGQTW, log_sum_BGQT1)


def _attend_block_backward(saved: tuple, d_y_BGQTW: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BGQTH, k_BGSH, v_BGSW, mask_BTS, sinks_GQ11, y_BGQTW, log_sum_BGQT1 = saved
    weights = jnp.exp(_masked_scores(q_BGQTH, k_BGSH, mask_BTS) - log_sum_BGQT1)
    d_weights = _product("BGQTW,BGSW->BGQTS", d_y_BGQTW, v_BGSW)
    mean_BGQT1 = (d_y_BGQTW.astype(jnp.float32) * y_BGQTW.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (weights * (d_weights - mean_BGQT1)).astype(q_BGQTH.dtype)
    d_q_BGQTH = _product("BGQTS,BGSH->BGQTH", d_scores, k_BGSH)
    d_k_BGSH = _product("BGQTS,BGQTH->BGSH", d_scores, q_BGQTH)
    d_v_BGSW = _product("BGQTS,BGQTW->BGSW", weights.astype(d_y_BGQTW.dtype), d_y_BGQTW)
    d_sinks_GQ11 = None
    if sinks_GQ11 is not None:
        share_BGQT1 = jnp.exp(sinks_GQ11 - log_sum_BGQT1)
        d_sinks_GQ11 = -(share_BGQT1 * mean_BGQT1).sum(axis=(0, 3))[..., None]
    return (
        d_q_BGQTH.astype(q_BGQTH.dtype),
        d_k_BGSH.astype(k_BGSH.dtype),
        d_v_BGSW.astype(v_BGSW.dtype),
        None,
        d_sinks_GQ11,
    )


_attend_block.defvjp(_attend_block_forward, _attend_block_backward)


def _masked_scores(q_BGQTH: jax.Array, k_BGSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    scores = _product("BGQTH,BGSH->BGQTS", q_BGQTH, k_BGSH)
    return jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _unit(x_BTNH: jax.Array, eps: float) -> jax.Array:
    return unit_rms(x_BTNH, eps).astype(x_BTNH.dtype)


def _where(flag: bool | jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    if isinstance(flag, bool):
        return yes if flag else no
    return jnp.where(flag, yes, no)


def _is_zero(limit: int | jax.Array) -> bool:
    return isinstance(limit, int) and limit == 0
