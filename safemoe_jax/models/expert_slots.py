"""The experts' feed-forward for a few rows an expert, without gradients, on a CPU: what decoding needs.

With a few rows for each of many experts the time goes into reading weights and into starting operations.
Where a layer's matrices are arrays of their own, the first `SLOTS` rows of all its experts are one product,
which reads them where they lie. Out of a stack weights are copied first: there a turn computes these rows for
several experts that lie side by side, in `CHAINS` products that do not wait for each other. What an expert
has beyond that follows by itself. An expert without rows is multiplied in vain.

Legend: T tokens, K experts a token (top-k), D model width, I inputs, O outputs, E experts, N experts that are
multiplied together, S slots (rows) of an expert in a turn, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from safemoe_jax.models.activation import Activation
from safemoe_jax.models.adapted import AnyWeight
from safemoe_jax.models.expert_layout import Pairs
from safemoe_jax.models.expert_stack import OwnArrays, Stack
from safemoe_jax.models.expert_weight import project, take_several

SLOTS = 8
"""Rows of an expert at a time. Measured: with 6 too many experts need a second turn, 12 compute too much."""

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
    own: OwnArrays | None = None,
) -> jax.Array:
    """What `expert_blocks.blocks_ffn` computes, [T,D] float32; not to be differentiated.

    With `own`, float32 weights, only rows beyond the first slots copy any.
    """
    work = _Work(x_TD, weights_TK, pairs, activation)
    if own is None:
        y_TD = _first_rows_in_turns(work, stack, first_group)
    else:
        slots = work.first_slots()
        rows = own.read(stack, first_group, lambda layer: work.rows(*slots, layer, 0, 0))
        y_TD = _add(jnp.zeros(x_TD.shape, jnp.float32), [rows])
    return _with_further_rows(y_TD, work, stack, first_group)


class _Work(NamedTuple):
    """The arguments of `slots_ffn` that all turns share."""

    x_TD: jax.Array
    weights_TK: jax.Array
    pairs: Pairs
    activation: Activation

    def start_E(self) -> jax.Array:
        """Where each expert's pairs begin."""
        return jnp.cumsum(self.pairs.counts_E) - self.pairs.counts_E

    def first_slots(self) -> tuple[jax.Array, jax.Array]:
        """`slots` [E, S] of all experts' first rows."""
        return self.slots(self.start_E(), self.pairs.counts_E, 0)

    def slots(
        self, start_N: jax.Array, count_N: jax.Array, first_row: jax.Array | int
    ) -> tuple[jax.Array, jax.Array]:
        """Token and weight in every slot [N, S], for experts' rows from `first_row` on."""
        n_tokens, top_k = self.weights_TK.shape
        row_S = first_row + jnp.arange(SLOTS)
        pair_NS = self.pairs.order_N.at[start_N[:, None] + row_S].get(mode="clip")
        # An empty slot has no token, and its row is dropped: with weight zero it might still be infinite.
        token_NS = jnp.where(row_S < count_N[:, None], pair_NS // top_k, n_tokens)
        return token_NS, self.weights_TK.reshape(-1)[pair_NS].astype(jnp.float32)

    def rows(
        self,
        token_NS: jax.Array,
        weight_NS: jax.Array,
        stack: Stack,
        first_group: jax.Array | int,
        expert: jax.Array | int,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens [R] and weighted outputs [R, D] of the slots of N experts from this one on."""
        rows_NSD = self.x_TD.at[token_NS].get(mode="clip")
        gate = _project(rows_NSD, stack.gate, stack.gate_bias, first_group, expert)
        up = _project(rows_NSD, stack.up, stack.up_bias, first_group, expert)
        act = self.activation.forward(gate, up).astype(rows_NSD.dtype)
        out_NSD = weight_NS[..., None] * _project(act, stack.down, stack.down_bias, first_group, expert)
        return token_NS.reshape(-1), out_NSD.reshape(-1, out_NSD.shape[-1])


def _first_rows_in_turns(work: _Work, stack: Stack, first_group: jax.Array) -> jax.Array:
    """What the first slots of every expert add, [T,D]."""
    n_experts = work.pairs.counts_E.size
    together = next(n for n in (2, 1) if n_experts % n == 0)
    chains = CHAINS if n_experts // together % CHAINS == 0 else 1
    slots = work.first_slots()  # of all experts at once: fewer operations in a turn

    def turn(number: jax.Array, state: tuple[jax.Array, Stack]) -> tuple[jax.Array, Stack]:
        y_TD, stack = state
        experts = [(number * chains + chain) * together for chain in range(chains)]
        rows = [work.rows(*_some(slots, expert, together), stack, first_group, expert) for expert in experts]
        # The barrier has the reason that it has in the loop over blocks: no conversion of the whole stack.
        return _add(y_TD, rows), lax.optimization_barrier(stack)

    state = jnp.zeros(work.x_TD.shape, jnp.float32), stack
    return lax.fori_loop(0, n_experts // (chains * together), turn, state)[0]


def _with_further_rows(y_TD: jax.Array, work: _Work, stack: Stack, first_group: jax.Array) -> jax.Array:
    """With what the rows beyond the first slots add, one expert a turn."""
    counts_E, start_E = work.pairs.counts_E, work.start_E()
    turns_E = jnp.maximum(-(-counts_E // SLOTS) - 1, 0)
    stop_E = jnp.cumsum(turns_E)

    def turn(number: jax.Array, state: tuple[jax.Array, Stack]) -> tuple[jax.Array, Stack]:
        y_TD, stack = state
        expert = (number >= stop_E).sum()
        first_row = SLOTS * (number - stop_E[expert] + turns_E[expert] + 1)
        slots = work.slots(*_some((start_E, counts_E), expert, 1), first_row)
        return _add(y_TD, [work.rows(*slots, stack, first_group, expert)]), lax.optimization_barrier(stack)

    return lax.fori_loop(0, stop_E[-1], turn, (y_TD, stack))[0]


def _add(y_TD: jax.Array, parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    token_R, out_RD = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return y_TD.at[token_R].add(out_RD, mode="drop")


def _some(arrays: tuple[jax.Array, ...], expert: jax.Array, count: int) -> list[jax.Array]:
    return [lax.dynamic_slice_in_dim(array, expert, count) for array in arrays]


def _project(
    rows_NSI: jax.Array,
    weights: AnyWeight,
    bias: jax.Array | None,
    first_group: jax.Array | int,
    expert: jax.Array | int,
) -> jax.Array:
    """Each expert's rows times its matrix, plus its bias where there is one; float32 [N,S,O]."""
    n_together = rows_NSI.shape[0]
    weights_NIO = take_several(weights, first_group, expert, n_together, rows_NSI.dtype)
    out_NSO = project(rows_NSI, weights_NIO)
    if bias is None:
        return out_NSO
    bias_NO = lax.dynamic_slice_in_dim(bias, first_group + expert, n_together)
    return out_NSO + bias_NO[:, None].astype(jnp.float32)
