"""The experts' feed-forward for a few rows an expert, without gradients, on a CPU: what decoding needs.

With a few rows for each of many experts the time goes into reading weights and into starting operations. So
a turn computes the first `SLOTS` rows of several experts that lie side by side in the stack, in `CHAINS`
products that do not wait for each other. What an expert has beyond that follows by itself. An expert without
rows is multiplied in vain.

Legend: T tokens, K experts a token (top-k), D model width, I inputs, O outputs, E experts, N experts that are
multiplied together, S slots (rows) of an expert in a turn, R rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from safemoe_jax.models.activation import Activation
from safemoe_jax.models.adapted import AnyWeight
from safemoe_jax.models.expert_layout import Pairs
from safemoe_jax.models.expert_stack import Stack
from safemoe_jax.models.expert_weight import project, take_several

SLOTS = 8
"""Rows of an expert in a turn. Measured: with 6 too many experts need a second turn, 12 compute too much."""

CHAINS = 2
"""Products of a turn that are independent, each of two experts. Measured: one product of four experts takes a
tenth longer; eight chains hold more weights than a cache of 32 MB."""


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
    n_tokens, top_k = weights_TK.shape
    n_experts = pairs.counts_E.size
    together = next(n for n in (2, 1) if n_experts % n == 0)
    chains = CHAINS if n_experts // together % CHAINS == 0 else 1
    start_E = jnp.cumsum(pairs.counts_E) - pairs.counts_E
    more_E = jnp.maximum(-(-pairs.counts_E // SLOTS) - 1, 0)  # turns beyond the first
    stop_E = jnp.cumsum(more_E)

    def fill(
        start_N: jax.Array, count_N: jax.Array, first_row: jax.Array | int
    ) -> tuple[jax.Array, jax.Array]:
        """Token and weight in every slot [N, S], for experts' rows from `first_row` on."""
        row_S = first_row + jnp.arange(SLOTS)
        pair_NS = pairs.order_N.at[start_N[:, None] + row_S].get(mode="clip")
        # An empty slot has no token, and its row is dropped: with weight zero it might still be infinite.
        token_NS = jnp.where(row_S < count_N[:, None], pair_NS // top_k, n_tokens)
        return token_NS, weights_TK.reshape(-1)[pair_NS].astype(jnp.float32)

    def compute(
        expert: jax.Array, token_NS: jax.Array, weight_NS: jax.Array, stack: Stack
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens [R] and weighted outputs [R, D] of the slots of N experts from this one on."""
        rows_NSD = x_TD.at[token_NS].get(mode="clip")
        gate = _project(rows_NSD, stack.gate, stack.gate_bias, first_group, expert)
        up = _project(rows_NSD, stack.up, stack.up_bias, first_group, expert)
        act = activation.forward(gate, up).astype(x_TD.dtype)
        out_NSD = _project(act, stack.down, stack.down_bias, first_group, expert)
        out_NSD = weight_NS[..., None] * out_NSD
        return token_NS.reshape(-1), out_NSD.reshape(-1, out_NSD.shape[-1])

    def add(state: tuple[jax.Array, Stack], parts: list[tuple]) -> tuple[jax.Array, Stack]:
        y_TD, stack = state
        token_R, out_RD = (jnp.concatenate(part) for part in zip(*parts, strict=True))
        # The barrier has the reason that it has in the loop over blocks: no conversion of the whole stack.
        return y_TD.at[token_R].add(out_RD, mode="drop"), lax.optimization_barrier(stack)

    first_slots = fill(start_E, pairs.counts_E, 0)  # of all experts at once: fewer operations in a turn

    def first_turn(number: jax.Array, state: tuple[jax.Array, Stack]) -> tuple[jax.Array, Stack]:
        experts = [(number * chains + chain) * together for chain in range(chains)]
        slots = [_some(first_slots, expert, together) for expert in experts]
        return add(state, [compute(e, *filled, state[1]) for e, filled in zip(experts, slots, strict=True)])

    def further_turn(number: jax.Array, state: tuple[jax.Array, Stack]) -> tuple[jax.Array, Stack]:
        expert = (number >= stop_E).sum()
        turn = number - stop_E[expert] + more_E[expert] + 1
        filled = fill(*_some((start_E, pairs.counts_E), expert, 1), SLOTS * turn)
        return add(state, [compute(expert, *filled, state[1])])

    state = jnp.zeros(x_TD.shape, jnp.float32), stack
    state = lax.fori_loop(0, n_experts // (chains * together), first_turn, state)
    return lax.fori_loop(0, stop_E[-1], further_turn, state)[0]


def _some(arrays: tuple[jax.Array, ...], expert: jax.Array, count: int) -> list[jax.Array]:
    return [lax.dynamic_slice_in_dim(array, expert, count) for array in arrays]


def _project(
    rows_NSI: jax.Array,
    weights: AnyWeight,
    bias: jax.Array | None,
    first_group: jax.Array,
    expert: jax.Array,
) -> jax.Array:
    """Each expert's rows times its matrix, plus its bias where there is one; float32 [N,S,O]."""
    n_together = rows_NSI.shape[0]
    weights_NIO = take_several(weights, first_group, expert, n_together, rows_NSI.dtype)
    out_NSO = project(rows_NSI, weights_NIO)
    if bias is None:
        return out_NSO
    bias_NO = lax.dynamic_slice_in_dim(bias, first_group + expert, n_together)
    return out_NSO + bias_NO[:, None].astype(jnp.float32)
