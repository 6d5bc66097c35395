"""The experts' feed-forward on a CPU: a loop over blocks of rows, each one GEMM chain with its expert's weights.

Legend: T tokens, K experts a token (top-k), N = T*K pairs sorted by expert, D model width, F expert width,
G groups in the weight stack (layers * experts), E experts, B rows in a block, P = N + B places of a padded buffer.

Blocks are visited in ascending order and each writes all its B rows, so what a block writes behind the end of its
expert's rows is overwritten by the next block: no masks, nothing dropped, exact. The trip count is the number of blocks
in use, and a block's weights are sliced straight out of the stack of all layers, so no layer is ever copied.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from safemoe_jax.models.expert_layout import Blocks, Pairs, cut_blocks, sort_pairs

LANES = (
    2  # blocks in one loop body; they do not depend on each other, so the runtime may run them side by side
)


class Stack(NamedTuple):
    """Expert weights: gate and up [G,D,F], down [G,F,D]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def choose_block_rows(n_pairs: int, n_experts: int) -> int:
    """Rows in a block: about half an expert's mean share, a power of two between 8 and 128."""
    share = max(1, n_pairs // n_experts)
    return min(128, max(8, 1 << (share.bit_length() - 1)))


def blocks_ffn(x_TD, weights_TK, experts_TK, stack: Stack, first_group, n_experts: int) -> jax.Array:
    """sum_k weights[t,k] * down_e(silu(gate_e x_t) * up_e x_t), e = experts[t,k]; [T,D] in the dtype of ``x_TD``."""
    pairs = sort_pairs(experts_TK, n_experts)
    return _ffn(x_TD, weights_TK, stack, jnp.asarray(first_group, jnp.int32), pairs)


@partial(jax.custom_vjp)
def _ffn(x_TD, weights_TK, stack, first_group, pairs):
    return _forward(x_TD, weights_TK, stack, first_group, pairs, keep=False)[0]


def _ffn_forward(x, weights, stack, first_group, pairs):
    trainable = any(leaf.perturbed for leaf in stack)
    x_TD, weights_TK, first_group = x.value, weights.value, first_group.value
    stack, pairs = jax.tree.map(lambda leaf: leaf.value, (stack, pairs), is_leaf=_is_primal)
    y_TD, hidden = _forward(x_TD, weights_TK, stack, first_group, pairs, keep=True)
    return y_TD, (x_TD, weights_TK, stack, first_group, pairs, hidden, (() if trainable else None))


def _is_primal(leaf):
    return hasattr(leaf, "perturbed")


def _ffn_backward(saved, d_y_TD):
    x_TD, weights_TK, stack, first_group, pairs, hidden, trainable = saved
    if isinstance(d_y_TD, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    d_x, d_weights, d_stack = _backward(
        x_TD, weights_TK, stack, first_group, pairs, hidden, d_y_TD, trainable is not None
    )
    return d_x, d_weights, d_stack, None, None


_ffn.defvjp(_ffn_forward, _ffn_backward, symbolic_zeros=True)


def _padded_tokens(pairs: Pairs, block_rows: int) -> jax.Array:
    return jnp.pad(pairs.token_N, (0, block_rows))


def _dot(a, b, contract):
    return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=jnp.float32)


def _over_blocks(blocks: Blocks, visit, carry):
    """``carry = visit(carry, block numbers)`` for LANES blocks at a time, in ascending order."""

    def body(i, carry):
        return visit(carry, [i * LANES + lane for lane in range(LANES)])

    return lax.fori_loop(0, -(-blocks.in_use // LANES), body, carry)


def _forward(x_TD, weights_TK, stack, first_group, pairs, *, keep):
    n_pairs, D, F = pairs.order_N.size, x_TD.shape[1], stack.gate.shape[2]
    block_rows = choose_block_rows(n_pairs, pairs.counts_E.size)
    blocks = cut_blocks(pairs, block_rows, LANES)
    token_P = _padded_tokens(pairs, block_rows)
    places = n_pairs + block_rows
    kept = [jnp.zeros((places, F), jnp.float32) for _ in range(2)] if keep else []

    def one(block):
        group, start = first_group + blocks.expert_C[block], blocks.start_C[block]
        rows = x_TD[lax.dynamic_slice_in_dim(token_P, start, block_rows)]
        gate, up = _dot(rows, stack.gate[group], (1, 0)), _dot(rows, stack.up[group], (1, 0))
        out = _dot((jax.nn.silu(gate) * up).astype(x_TD.dtype), stack.down[group], (1, 0))
        return start, [out, gate, up] if keep else [out]

    def visit(buffers, numbers):
        for start, rows in [one(number) for number in numbers]:
            buffers = [
                lax.dynamic_update_slice_in_dim(b, r, start, 0) for b, r in zip(buffers, rows, strict=True)
            ]
        return buffers

    out_PD, *kept = _over_blocks(blocks, visit, [jnp.zeros((places, D), jnp.float32), *kept])
    return _combine(out_PD, weights_TK, pairs).astype(x_TD.dtype), kept


def _combine(rows_PD, weights_TK, pairs):
    own_TK = pairs.place_TK < pairs.used
    rows_TKD = jnp.where(own_TK[..., None], rows_PD[pairs.place_TK], 0.0)
    return jnp.einsum("tk,tkd->td", weights_TK.astype(jnp.float32), rows_TKD)


def _backward(x_TD, weights_TK, stack, first_group, pairs, hidden, d_y_TD, trainable):
    n_pairs, D = pairs.order_N.size, x_TD.shape[1]
    block_rows = choose_block_rows(n_pairs, pairs.counts_E.size)
    blocks = cut_blocks(pairs, block_rows, LANES)
    token_P = _padded_tokens(pairs, block_rows)
    weight_P = jnp.pad(weights_TK.reshape(-1).astype(jnp.float32)[pairs.order_N], (0, block_rows))
    gate_PF, up_PF = hidden
    dtype = x_TD.dtype
    places = n_pairs + block_rows
    n_experts = pairs.counts_E.size

    def one(block):
        expert, start = blocks.expert_C[block], blocks.start_C[block]
        group = first_group + expert
        rows_of = lambda buffer: lax.dynamic_slice_in_dim(buffer, start, block_rows)  # noqa: E731
        token = rows_of(token_P)
        gate, up, weight = rows_of(gate_PF), rows_of(up_PF), rows_of(weight_P)
        d_y = d_y_TD[token]
        d_act = _dot(d_y, stack.down[group], (1, 1))
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        d_weight = jnp.sum(d_act * silu * up, 1)
        d_act = d_act * weight[:, None]
        d_gate = (d_act * up * (sigmoid + silu * (1 - sigmoid))).astype(dtype)
        d_up = (d_act * silu).astype(dtype)
        d_rows = _dot(d_gate, stack.gate[group], (1, 1)) + _dot(d_up, stack.up[group], (1, 1))
        if not trainable:
            return start, [d_rows, d_weight], expert, None
        own = (start + jnp.arange(block_rows) < blocks.stop_C[block])[:, None]
        rows, d_gate, d_up = x_TD[token], jnp.where(own, d_gate, 0), jnp.where(own, d_up, 0)
        d_out = jnp.where(own, d_y * weight[:, None], 0).astype(dtype)
        act = jnp.where(own, silu * up, 0).astype(dtype)
        return (
            start,
            [d_rows, d_weight],
            expert,
            (
                _dot(rows, d_gate, (0, 0)),
                _dot(rows, d_up, (0, 0)),
                _dot(act, d_out, (0, 0)),
            ),
        )

    def visit(carry, numbers):
        buffers, sums = carry
        for start, rows, expert, d_stack in [one(number) for number in numbers]:
            buffers = [
                lax.dynamic_update_slice_in_dim(b, r, start, 0) for b, r in zip(buffers, rows, strict=True)
            ]
            if trainable:
                sums = [s.at[expert].add(d) for s, d in zip(sums, d_stack, strict=True)]
        return buffers, sums

    buffers = [jnp.zeros((places, D), jnp.float32), jnp.zeros((places,), jnp.float32)]
    sums = [jnp.zeros((n_experts, *w.shape[1:]), jnp.float32) for w in stack] if trainable else []
    (d_rows_PD, d_weight_P), sums = _over_blocks(blocks, visit, (buffers, sums))
    own_TK = pairs.place_TK < pairs.used
    d_x_TD = jnp.where(own_TK[..., None], d_rows_PD[pairs.place_TK], 0.0).sum(1)
    d_weights_TK = jnp.where(own_TK, d_weight_P[pairs.place_TK], 0.0)
    d_stack = None
    if trainable:
        if stack.gate.shape[0] != n_experts:
            sums = [
                lax.dynamic_update_slice_in_dim(jnp.zeros(w.shape, jnp.float32), s, first_group, 0)
                for w, s in zip(stack, sums, strict=True)
            ]
        d_stack = Stack(*(s.astype(w.dtype) for s, w in zip(sums, stack, strict=True)))
    return d_x_TD.astype(dtype), d_weights_TK.astype(weights_TK.dtype), d_stack
