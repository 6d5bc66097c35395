"""The experts' feed-forward for a few rows an expert, without gradients, on a CPU: what decoding needs.

With a few rows for each of many experts the time goes into reading weights and into starting operations. So
experts that lie side by side in the stack are multiplied together, as one batched product of `SLOTS` rows
each. An expert with more rows takes part in further turns. A neighbour without rows is multiplied in vain.

Legend: T tokens, K experts a token (top-k), D model width, I inputs, O outputs, E experts, N experts that are
multiplied together, M = E / N, S slots (rows) of an expert in a turn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from safemoe_jax.models.activation import Activation
from safemoe_jax.models.expert_layout import Pairs
from safemoe_jax.models.expert_stack import Stack
from safemoe_jax.models.quantised import Weight, group_weights

SLOTS = 8
"""Rows of an expert in a turn. Measured: with 4 too many experts need a second turn, 16 compute too much."""


def few_rows(pairs: Pairs) -> bool:
    """Whether this form is faster than the loop over blocks; measured: between 3 and 5 rows an expert."""
    n_pairs, n_experts = pairs.order_N.size, pairs.counts_E.size
    return 3 * n_experts <= n_pairs <= 5 * n_experts


def slots_ffn(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    stack: Stack,
    first_group: jax.Array,
    pairs: Pairs,
    activation: Activation,
) -> jax.Array:
    """What `expert_blocks.blocks_ffn` computes, [T,D] float32; not to be differentiated."""
    stack = stack.added_up(x_TD.dtype)
    n_tokens, top_k = weights_TK.shape
    together = next(n for n in (4, 2, 1) if pairs.counts_E.size % n == 0)
    start_E = jnp.cumsum(pairs.counts_E) - pairs.counts_E
    turns_M = -(-pairs.counts_E.reshape(-1, together).max(1) // SLOTS)
    stop_M = jnp.cumsum(turns_M)

    def turn(number: jax.Array, state: tuple[jax.Array, Stack]) -> tuple[jax.Array, Stack]:
        y_TD, stack = state
        m = (number >= stop_M).sum()
        row_S = SLOTS * (number - stop_M[m] + turns_M[m]) + jnp.arange(SLOTS)
        start_N, count_N = (
            lax.dynamic_slice_in_dim(a, m * together, together) for a in (start_E, pairs.counts_E)
        )
        pair_NS = pairs.order_N.at[start_N[:, None] + row_S].get(mode="clip")
        # An empty slot has no token, and its row is dropped: with weight zero it might still be infinite.
        token_NS = jnp.where(row_S < count_N[:, None], pair_NS // top_k, n_tokens)
        first = first_group + m * together
        rows_NSD = x_TD.at[token_NS].get(mode="clip")
        gate = _project(rows_NSD, stack.gate, stack.gate_bias, first)
        up = _project(rows_NSD, stack.up, stack.up_bias, first)
        act = activation.forward(gate, up).astype(x_TD.dtype)
        weight_NS = weights_TK.reshape(-1)[pair_NS].astype(jnp.float32)
        out_NSD = weight_NS[..., None] * _project(act, stack.down, stack.down_bias, first)
        # The barrier has the reason that it has in the loop over blocks: no conversion of the whole stack.
        return y_TD.at[token_NS].add(out_NSD, mode="drop"), lax.optimization_barrier(stack)

    return lax.fori_loop(0, stop_M[-1], turn, (jnp.zeros(x_TD.shape, jnp.float32), stack))[0]


def _project(rows_NSI: jax.Array, weights: Weight, bias: jax.Array | None, first: jax.Array) -> jax.Array:
    """Each expert's rows times its matrix, plus its bias where there is one; float32 [N,S,O]."""
    weights_NIO = group_weights(weights, first, rows_NSI.shape[0], rows_NSI.dtype).astype(rows_NSI.dtype)
    batched = ((2,), (1,)), ((0,), (0,))
    out_NSO = lax.dot_general(rows_NSI, weights_NIO, batched, preferred_element_type=jnp.float32)
    if bias is None:
        return out_NSO
    bias_NO = lax.dynamic_slice_in_dim(bias, first, rows_NSI.shape[0])
    return out_NSO + bias_NO[:, None].astype(jnp.float32)
