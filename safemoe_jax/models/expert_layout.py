"""The order of the (token, expert) pairs once sorted by expert, and the moves in and out of that order.

Legend: T tokens, K experts a token (top-k), N = T*K pairs, E experts, D model width, B rows in a block,
C blocks, P places of the aligned layout.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pairs(NamedTuple):
    """The N = T*K (token, expert) pairs sorted by expert; the order is stable, so it does not vary.

    Attributes:
        order_N: int32, the pair number t*K + k in each place.
        place_TK: int32, the inverse: the place of pair (t, k).
        counts_E: int32, rows of each expert. Pairs whose expert is none of the E come last.
    """

    order_N: jax.Array
    place_TK: jax.Array
    counts_E: jax.Array

    @property
    def token_N(self) -> jax.Array:
        """int32 [N], the token in each place."""
        return self.order_N // self.place_TK.shape[1]

    @property
    def used(self) -> jax.Array:
        """int32 scalar, places that belong to one of the E experts."""
        return self.counts_E.sum()


class Blocks(NamedTuple):
    """Blocks of B consecutive places that hold rows of one expert, and padding behind its last row.

    Attributes:
        expert_C: int32, the expert of each block.
        start_C: int32, its first place.
        in_use: int32 scalar, blocks that hold rows.
    """

    expert_C: jax.Array
    start_C: jax.Array
    in_use: jax.Array


class Aligned(NamedTuple):
    """The pairs at places where every expert begins with a new block, and the blocks.

    Attributes:
        pair_P: int32, the pair number in each place; padding has pair 0.
        filled_P: bool, whether a pair is there.
        place_TK: int32, the place of pair (t, k); pairs of no expert share the last place, which is in no
            block.
        blocks: one entry a block size, in the order of the sizes.
    """

    pair_P: jax.Array
    filled_P: jax.Array
    place_TK: jax.Array
    blocks: tuple[Blocks, ...]


def sort_pairs(experts_TK: jax.Array, n_experts: int) -> Pairs:
    """Sorts pairs by expert.

    Args:
        experts_TK: int32; values outside [0, n_experts) belong to no expert and come last.
        n_experts: E.
    """
    expert_N = experts_TK.reshape(-1).astype(jnp.int32)
    expert_N = jnp.where((expert_N < 0) | (expert_N >= n_experts), n_experts, expert_N)
    order_N = _order(expert_N, n_experts + 1)
    place_N = (
        jnp.zeros_like(order_N)
        .at[order_N]
        .set(jnp.arange(order_N.size, dtype=jnp.int32), unique_indices=True)
    )
    ends_E = jnp.searchsorted(expert_N[order_N], jnp.arange(n_experts, dtype=jnp.int32), side="right")
    counts_E = jnp.diff(ends_E, prepend=0).astype(jnp.int32)
    return Pairs(order_N, place_N.reshape(experts_TK.shape), counts_E)


def _order(expert_N: jax.Array, n_values: int) -> jax.Array:
    """int32 [N], the stable order of numbers below `n_values`.

    Number and place in one key, where they fit into it, sort five times as fast on a CPU as an argsort.
    """
    n_pairs = expert_N.size
    if n_values * n_pairs >= 2**31:
        return jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    return jnp.sort(expert_N * n_pairs + jnp.arange(n_pairs, dtype=jnp.int32)) % n_pairs


def align(pairs: Pairs, sizes: tuple[int, ...]) -> Aligned:
    """Gives every expert whole blocks; no two blocks share a place.

    Args:
        pairs: the sorted pairs.
        sizes: rows of a block, largest first, each a multiple of the last. An expert's rows, rounded up to
            the last size, go into as many of the first size as fit, then of the second, and so on.
    """
    n_pairs, n_experts, least = pairs.order_N.size, pairs.counts_E.size, sizes[-1]
    n_places = n_pairs + min(n_experts, n_pairs) * (least - 1) + 1
    rounded_E = -(-pairs.counts_E // least) * least
    start_E = jnp.cumsum(rounded_E) - rounded_E
    stop_E = jnp.cumsum(pairs.counts_E)
    sorted_N = jnp.arange(n_pairs, dtype=jnp.int32)
    expert_N = jnp.minimum(jnp.searchsorted(stop_E, sorted_N, side="right"), n_experts - 1)
    place_N = sorted_N + (start_E - stop_E + pairs.counts_E)[expert_N]
    place_N = jnp.where(sorted_N < pairs.used, place_N, n_places - 1).astype(jnp.int32)
    pair_P = jnp.zeros(n_places, jnp.int32).at[place_N].set(pairs.order_N)
    filled_P = jnp.zeros(n_places, bool).at[place_N].set(True)
    blocks, left_E, next_E = [], rounded_E, start_E
    for rows in sizes:
        blocks_E = left_E // rows
        blocks.append(_number(blocks_E, next_E, rows, n_places // rows))
        left_E, next_E = left_E - blocks_E * rows, next_E + blocks_E * rows
    return Aligned(pair_P, filled_P, place_N[pairs.place_TK], tuple(blocks))


def _number(blocks_E: jax.Array, first_E: jax.Array, rows: int, most: int) -> Blocks:
    """The blocks of one size one after another: blocks_E[e] of them from place first_E[e] on."""
    stop_E, block_C = jnp.cumsum(blocks_E), jnp.arange(max(most, 1), dtype=jnp.int32)
    expert_C = jnp.minimum(jnp.searchsorted(stop_E, block_C, side="right"), blocks_E.size - 1)
    start_C = first_E[expert_C] + (block_C - (stop_E - blocks_E)[expert_C]) * rows
    return Blocks(expert_C.astype(jnp.int32), start_C.astype(jnp.int32), stop_E[-1])


def weighted_sum(rows_PD: jax.Array, weights_TK: jax.Array | None, place_TK: jax.Array) -> jax.Array:
    """sum_k weights[t,k] * rows[place[t,k]] in float32; weights None means ones.

    Written as K gathers and adds because they compile into a single pass over the output, without [T,K,D].
    """
    rows_TD = [rows_PD[place_TK[:, k]].astype(jnp.float32) for k in range(place_TK.shape[1])]
    if weights_TK is not None:
        weights_TK = weights_TK.astype(jnp.float32)
        rows_TD = [weights_TK[:, k, None] * rows for k, rows in enumerate(rows_TD)]
    return sum(rows_TD)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, pairs: Pairs) -> jax.Array:
    """The tokens' rows in sorted order, [N,D]; the transpose is a gather by ``place_TK``, not a scatter."""
    return x_TD[pairs.token_N]


def _dispatch_forward(x_TD: jax.Array, pairs: Pairs) -> tuple[jax.Array, Pairs]:
    return dispatch(x_TD, pairs), pairs


def _dispatch_backward(pairs: Pairs, d_rows_ND: jax.Array) -> tuple[jax.Array, None]:
    return weighted_sum(d_rows_ND, None, pairs.place_TK).astype(d_rows_ND.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def collect(rows_ND: jax.Array, weights_TK: jax.Array, pairs: Pairs) -> jax.Array:
    """sum_k weights[t,k] * rows[place[t,k]], [T,D] float32; the transpose is a gather by ``order_N``."""
    return weighted_sum(rows_ND, weights_TK, pairs.place_TK)


def _collect_forward(rows_ND: jax.Array, weights_TK: jax.Array, pairs: Pairs) -> tuple[jax.Array, tuple]:
    return collect(rows_ND, weights_TK, pairs), (rows_ND, weights_TK, pairs)


def _collect_backward(saved: tuple, d_y_TD: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows_ND, weights_TK, pairs = saved
    d_y_ND = d_y_TD[pairs.token_N].astype(jnp.float32)
    d_weights_N = (d_y_ND * rows_ND).sum(1)
    d_rows_ND = d_y_ND * weights_TK.reshape(-1)[pairs.order_N][:, None]
    return d_rows_ND.astype(rows_ND.dtype), d_weights_N[pairs.place_TK].astype(weights_TK.dtype), None


collect.defvjp(_collect_forward, _collect_backward)
