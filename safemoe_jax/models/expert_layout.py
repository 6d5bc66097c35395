"""Where each (token, expert) pair sits once the pairs are sorted by expert, and the moves in and out of that order.

Legend: T tokens, K experts a token (top-k), N = T*K pairs, E experts, D model width, B rows in a block, C blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """The N = T*K (token, expert) pairs sorted by expert; a stable order, so results do not depend on chance.

    order_N:   int32, pair number t*K+k of the row in each place; ``order_N // K`` is the row's token.
    place_TK:  int32, the inverse: the place of pair (t, k).
    counts_E:  int32, rows of each expert.
    """

    order_N: jax.Array
    place_TK: jax.Array
    counts_E: jax.Array

    @property
    def token_N(self) -> jax.Array:
        """int32 [N], the token whose row is in each place."""
        return self.order_N // self.place_TK.shape[1]

    @property
    def used(self) -> jax.Array:
        """int32 scalar, rows that belong to one of the E experts; the rows behind them belong to none."""
        return self.counts_E.sum()


class Blocks(NamedTuple):
    """Blocks of B consecutive sorted rows that share an expert; the last block of an expert may reach past its rows.

    expert_C: int32, the block's expert. start_C: int32, its first place. stop_C: int32, one behind its last own row.
    in_use:   int32 scalar; the blocks behind it are empty and start at place N.
    """

    expert_C: jax.Array
    start_C: jax.Array
    stop_C: jax.Array
    in_use: jax.Array


def sort_pairs(experts_TK: jax.Array, n_experts: int) -> Pairs:
    """Sorts the pairs by expert. ``experts_TK`` int32; values outside [0, n_experts) go behind all experts' rows."""
    T, K = experts_TK.shape
    expert_N = experts_TK.reshape(-1).astype(jnp.int32)
    expert_N = jnp.where((expert_N < 0) | (expert_N >= n_experts), n_experts, expert_N)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    place_N = jnp.zeros_like(order_N).at[order_N].set(jnp.arange(T * K, dtype=jnp.int32), unique_indices=True)
    ends_E = jnp.searchsorted(expert_N[order_N], jnp.arange(n_experts, dtype=jnp.int32), side="right")
    counts_E = jnp.diff(ends_E, prepend=0).astype(jnp.int32)
    return Pairs(order_N, place_N.reshape(T, K), counts_E)


def cut_blocks(pairs: Pairs, block_rows: int, multiple: int) -> Blocks:
    """Cuts the sorted rows into blocks of ``block_rows``; the table's length is a multiple of ``multiple``."""
    n_pairs, n_experts = pairs.order_N.size, pairs.counts_E.size
    most = n_pairs // block_rows + min(n_experts, n_pairs)
    blocks_E = -(-pairs.counts_E // block_rows)
    ends_E, stops_E = jnp.cumsum(blocks_E), jnp.cumsum(pairs.counts_E)
    block_C = jnp.arange(-(-most // multiple) * multiple, dtype=jnp.int32)
    expert_C = jnp.minimum(jnp.searchsorted(ends_E, block_C, side="right"), n_experts - 1).astype(jnp.int32)
    nth_C = block_C - (ends_E - blocks_E)[expert_C]
    start_C = (stops_E - pairs.counts_E)[expert_C] + nth_C * block_rows
    in_use = ends_E[-1]
    start_C = jnp.where(block_C < in_use, start_C, n_pairs)
    return Blocks(expert_C, start_C, jnp.where(block_C < in_use, stops_E[expert_C], n_pairs), in_use)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, pairs: Pairs) -> jax.Array:
    """Rows [N,D] of the tokens in sorted order. Its transpose is a gather through ``place_TK``, never a scatter."""
    return x_TD[pairs.token_N]


def _dispatch_forward(x_TD, pairs):
    return dispatch(x_TD, pairs), pairs


def _dispatch_backward(pairs, d_rows_ND):
    d_x_TD = d_rows_ND[pairs.place_TK].sum(1, dtype=jnp.float32).astype(d_rows_ND.dtype)
    return d_x_TD, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def collect(rows_ND: jax.Array, pairs: Pairs) -> jax.Array:
    """The rows back in token order, [T,K,D]. Its transpose is a gather through ``order_N``, never a scatter."""
    return rows_ND[pairs.place_TK]


def _collect_forward(rows_ND, pairs):
    return collect(rows_ND, pairs), pairs


def _collect_backward(pairs, d_rows_TKD):
    return d_rows_TKD.reshape(-1, d_rows_TKD.shape[-1])[pairs.order_N], None


collect.defvjp(_collect_forward, _collect_backward)
