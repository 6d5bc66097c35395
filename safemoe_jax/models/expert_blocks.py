"""The experts' feed-forward on a CPU: a loop over blocks of rows, each with its own expert's weights.

Legend: T tokens, K experts a token (top-k), D model width, F expert width, G groups in the weight stack
(layers * experts), E experts, B rows in a block, C blocks, P places of the aligned layout.

Every expert begins at a place of its own block, so blocks share no place: no masks, no dropping, exact. Most
rows go into large blocks, whose products keep all cores busy; an expert's remainder goes into small ones, so
that little is padded. The loops run over the blocks in use only. A block slices its weights out of the stack
of all layers, so that no layer is ever copied. The last place is never written: it stays zero, and pairs that
belong to no expert read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from safemoe_jax.models.activation import Activation
from safemoe_jax.models.adapted import Adapted, AnyWeight, shape_of
from safemoe_jax.models.expert_layout import Aligned, Blocks, Pairs, align, sort_pairs, weighted_sum
from safemoe_jax.models.expert_slots import few_rows, slots_ffn
from safemoe_jax.models.expert_stack import OwnArrays, Stack
from safemoe_jax.models.expert_weight import gradients, project, project_back, take_one

KEPT_NAME = "expert_pre_activations"
"""Name of the residuals for `jax.checkpoint_policies`: 2 * T*K * F * 4 bytes a layer."""


class _Saved(NamedTuple):
    """What the backward pass needs: the arguments, and gate and up before the activation, [P,F] float32.

    `trained` has () for each part of the stack that is differentiated and None for those that are frozen: it
    says so in the structure, so that it is known when the backward pass is traced.
    """

    x_TD: jax.Array
    weights_TK: jax.Array
    stack: Stack
    first_group: jax.Array
    pairs: Pairs
    activation: Activation
    gate_PF: jax.Array
    up_PF: jax.Array
    trained: Stack


def choose_block_rows(n_pairs: int, n_experts: int) -> tuple[int, ...]:
    """Rows of the blocks, largest first, from an expert's mean share of the rows.

    Measured: fewer than 8 rows cost the same as 8, and an expert should be one block, little of it padding;
    so the sizes go up to half as much again as the share, in small steps. Every size is one more loop to
    compile, twelve are the most.
    """
    share = max(1, n_pairs // n_experts)
    share = min(256, 1 << (share.bit_length() - 1))
    if share < 8:
        return (8,)
    step = min(32, max(8, share // 2))
    return tuple(range(max(2 * step, share * 3 // 2), 0, -step))


def blocks_ffn(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    stack: Stack,
    first_group: jax.Array | int,
    n_experts: int,
    activation: Activation,
    own: OwnArrays | None = None,
) -> jax.Array:
    """sum_k weights[t,k] * down_e(activation(gate_e x_t, up_e x_t)) with e = experts[t,k], [T,D] float32.

    Gradients reach x_TD, weights_TK and those parts of the stack that are being differentiated; for frozen
    weights nothing as large as a layer's experts is made, even where they have updates. Without
    differentiation nothing is kept. Experts outside [0, n_experts) contribute zero. With `own` nothing can
    be differentiated.
    """
    pairs = sort_pairs(experts_TK, n_experts)
    if own is not None and few_rows(pairs):
        return slots_ffn(x_TD, weights_TK, stack, first_group, pairs, activation, own)
    return _ffn(x_TD, weights_TK, stack, jnp.asarray(first_group, jnp.int32), pairs, activation)


@jax.custom_vjp
def _ffn(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    stack: Stack,
    first_group: jax.Array,
    pairs: Pairs,
    activation: Activation,
) -> jax.Array:
    """The primal function, which is what runs where nothing is differentiated."""
    if few_rows(pairs):
        return slots_ffn(x_TD, weights_TK, stack, first_group, pairs, activation)
    return _forward(x_TD, weights_TK, stack, first_group, pairs, activation, keep=False)[0]


def _ffn_forward(*primals: object) -> tuple[jax.Array, _Saved]:
    is_primal = lambda leaf: hasattr(leaf, "perturbed")  # noqa: E731
    arguments = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=is_primal)
    y_TD, *kept = _forward(*arguments, keep=True)
    # `jax.checkpoint` never saves what leaves a loop, whatever its policy; it does save named values.
    gate_PF, up_PF = (checkpoint_name(rows_PF, KEPT_NAME) for rows_PF in kept)
    return y_TD, _Saved(*arguments, gate_PF, up_PF, _trained(primals[2]))


def _trained(stack: Stack) -> Stack:
    """The marks of `_Saved`, from a stack of what a rule for derivatives is called with."""

    def mark(part: object) -> tuple | None:
        leaves = jax.tree.leaves(part, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
        return () if any(leaf.perturbed for leaf in leaves) else None

    return jax.tree.map(mark, stack, is_leaf=lambda node: not isinstance(node, Stack | Adapted))


def _ffn_backward(saved: _Saved, d_y_TD: jax.Array | SymbolicZero) -> tuple:
    if isinstance(d_y_TD, SymbolicZero):
        return None, None, None, None, None, None
    d_x_TD, d_weights_TK, d_stack = _backward(saved, d_y_TD)
    return d_x_TD, d_weights_TK, d_stack, None, None, None


_ffn.defvjp(_ffn_forward, _ffn_backward, symbolic_zeros=True)


def _project(
    rows: jax.Array, weights: AnyWeight, bias: jax.Array | None, first_group: jax.Array, expert: jax.Array
) -> jax.Array:
    """rows times one expert's matrix, plus its bias where there is one; float32."""
    out = project(rows, take_one(weights, first_group, expert, rows.dtype))
    return out if bias is None else out + bias[first_group + expert].astype(jnp.float32)


def _write(buffers: list[jax.Array], rows: list[jax.Array], start: jax.Array) -> list[jax.Array]:
    return [lax.dynamic_update_slice_in_dim(b, r, start, 0) for b, r in zip(buffers, rows, strict=True)]


class _Plan(NamedTuple):
    """The layout, the block sizes, and the number of experts a token."""

    layout: Aligned
    sizes: tuple[int, ...]
    top_k: int

    def buffer(self, *width: int) -> jax.Array:
        """A zeroed float32 buffer [P, *width]."""
        return jnp.zeros((self.layout.pair_P.size, *width), jnp.float32)

    def loop(self, visit: Callable, carry: object, stack: Stack) -> object:
        """``carry = visit(expert, take, start, carry, stack)`` for the blocks in use of every size.

        `take(array_P)` gives the block's rows of an array. The stack travels in the carry behind a barrier:
        as a constant of the loop, bfloat16 weights would be converted to float32 before it, the whole stack
        at once.
        """
        for rows, blocks in zip(self.sizes, self.layout.blocks, strict=True):

            def body(block: jax.Array, state: tuple, rows: int = rows, blocks: Blocks = blocks) -> tuple:
                carry, stack = state
                start = blocks.start_C[block]
                take = lambda array_P: lax.dynamic_slice_in_dim(array_P, start, rows)  # noqa: E731
                carry = visit(blocks.expert_C[block], take, start, carry, stack)
                return carry, lax.optimization_barrier(stack)

            carry, stack = lax.fori_loop(0, blocks.in_use, body, (carry, stack))
        return carry


def _plan(pairs: Pairs) -> _Plan:
    sizes = choose_block_rows(pairs.order_N.size, pairs.counts_E.size)
    return _Plan(align(pairs, sizes), sizes, pairs.place_TK.shape[1])


def _forward(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    stack: Stack,
    first_group: jax.Array,
    pairs: Pairs,
    activation: Activation,
    *,
    keep: bool,
) -> list[jax.Array]:
    """y_TD and, where `keep`, gate_PF and up_PF."""
    plan = _plan(pairs)
    layout = plan.layout
    width, expert_width = shape_of(stack.gate)[1:]

    def visit(
        expert: jax.Array, take: Callable, start: jax.Array, buffers: list[jax.Array], stack: Stack
    ) -> list[jax.Array]:
        rows = x_TD[take(layout.pair_P) // plan.top_k]
        gate = _project(rows, stack.gate, stack.gate_bias, first_group, expert)
        up = _project(rows, stack.up, stack.up_bias, first_group, expert)
        act = activation.forward(gate, up).astype(rows.dtype)
        out = _project(act, stack.down, stack.down_bias, first_group, expert)
        return _write(buffers, [out, gate, up] if keep else [out], start)

    kept = [plan.buffer(expert_width), plan.buffer(expert_width)] if keep else []
    out_PD, *kept = plan.loop(visit, [plan.buffer(width), *kept], stack)
    return [weighted_sum(out_PD, weights_TK, layout.place_TK), *kept]


def _backward(saved: _Saved, d_y_TD: jax.Array) -> tuple[jax.Array, jax.Array, Stack]:
    """Cotangents of x_TD, weights_TK and the parts of the stack, None for frozen ones.

    The weight's cotangent is taken before ``down`` (its transpose applied to d_y), so that the experts'
    outputs need not be kept.
    """
    x_TD, weights_TK, stack, first_group, pairs, activation = saved[:6]
    plan = _plan(pairs)
    layout = plan.layout
    weight_P = weights_TK.astype(jnp.float32).reshape(-1)[layout.pair_P]
    d_y_TD = d_y_TD.astype(x_TD.dtype)

    def visit(expert: jax.Array, take: Callable, start: jax.Array, carry: tuple, stack: Stack) -> tuple:
        buffers, sums = carry
        matrices = gate_w, up_w, down_w = [take_one(w, first_group, expert, x_TD.dtype) for w in stack[:3]]
        token, weight = take(layout.pair_P) // plan.top_k, take(weight_P)[:, None]
        gate, up = take(saved.gate_PF), take(saved.up_PF)
        d_y = d_y_TD[token]
        d_act = project_back(d_y, down_w)
        act, d_gate, d_up = activation.backward(gate, up, d_act * weight)
        d_gate, d_up = d_gate.astype(d_y.dtype), d_up.astype(d_y.dtype)
        d_rows = project_back(d_gate, gate_w) + project_back(d_up, up_w)
        d_weight = jnp.sum(d_act * act, 1)
        if stack.down_bias is not None:
            d_weight += d_y.astype(jnp.float32) @ stack.down_bias[first_group + expert].astype(jnp.float32)
        buffers = _write(buffers, [d_rows, d_weight], start)
        if jax.tree.leaves(sums):
            own = take(layout.filled_P)[:, None]
            d_gate, d_up, d_out = (jnp.where(own, d, 0) for d in (d_gate, d_up, d_y * weight))
            act = jnp.where(own, act * weight, 0).astype(d_y.dtype)
            rows, d_outs = (x_TD[token], x_TD[token], act), (d_gate, d_up, d_y)
            terms = Stack(
                *map(gradients, rows, d_outs, matrices, saved.trained[:3]),
                *map(_bias_gradient, (d_gate, d_up, d_out), saved.trained[3:]),
            )
            sums = jax.tree.map(lambda s, term: s.at[expert].add(term), sums, terms)
        return buffers, sums

    sums = _zero_sums(saved.trained, stack, pairs.counts_E.size)
    buffers = [plan.buffer(x_TD.shape[1]), plan.buffer()]
    (d_rows_PD, d_weight_P), sums = plan.loop(visit, (buffers, sums), stack)
    d_x_TD = weighted_sum(d_rows_PD, None, layout.place_TK).astype(x_TD.dtype)
    d_weights_TK = d_weight_P[layout.place_TK].astype(weights_TK.dtype)
    return d_x_TD, d_weights_TK, _in_stack(sums, stack, first_group)


def _bias_gradient(d_out: jax.Array, trained: tuple | None) -> jax.Array | None:
    return None if trained is None else d_out.astype(jnp.float32).sum(0)


def _zero_sums(trained: Stack, stack: Stack, n_experts: int) -> Stack:
    """Zeros [E, ...] float32 for the parts that train, None for the others."""
    zeros = lambda mark, part: None if mark is None else jnp.zeros((n_experts, *part.shape[1:]), jnp.float32)  # noqa: E731
    return jax.tree.map(zeros, trained, stack, is_leaf=lambda mark: mark is None or mark == ())


def _in_stack(sums: Stack, stack: Stack, first_group: jax.Array) -> Stack:
    """The experts' gradients at their place in each part of the stack, in its dtype; None for frozen ones."""

    def place(part: jax.Array | None, whole: object) -> jax.Array | None:
        if part is None:
            return None
        part = part.astype(whole.dtype)
        if part.shape == whole.shape:
            return part
        return lax.dynamic_update_slice_in_dim(jnp.zeros_like(whole), part, first_group, 0)

    return jax.tree.map(place, sums, stack, is_leaf=lambda part: part is None)
