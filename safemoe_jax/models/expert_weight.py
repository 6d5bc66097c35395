"""One expert's weight within a loop over experts, and what is multiplied with it.

A quantised weight is brought back for that expert only. A low-rank update is never added to its base: rows go
through base and factors side by side, so that neither the sum nor its gradient, each as large as the weight,
is ever made.

Legend: G groups in a stack (layers * experts), E experts of one layer, N experts multiplied together, R rows,
I inputs, O outputs, r rank, X either no axis or N.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from safemoe_jax.models.adapted import Adapted, AnyWeight
from safemoe_jax.models.quantised import group_weight, group_weights

Trained = tuple | Adapted | None
"""() for a weight that is differentiated, None for a frozen one; one of these for each part of an adapted
one."""


def take_one(
    weight: AnyWeight, first_group: jax.Array, expert: jax.Array, dtype: jnp.dtype
) -> jax.Array | Adapted:
    """The expert's own weight, [I,O].

    Args:
        weight: [G,I,O] of any kind; factors of an adapted one are those of one layer, [E,I,r] and [E,r,O].
        first_group: where the layer begins in the stack.
        expert: its number within the layer.
        dtype: what a quantised weight is brought back to.
    """
    if not isinstance(weight, Adapted):
        return group_weight(weight, first_group + expert, dtype)
    base_IO = group_weight(weight.base, first_group + expert, dtype)
    return Adapted(base_IO, weight.a_XIr[expert], weight.b_XrO[expert])


def take_several(
    weight: AnyWeight, first_group: jax.Array, expert: jax.Array, count: int, dtype: jnp.dtype
) -> jax.Array | Adapted:
    """As `take_one`, for `count` experts from this one on: [N,I,O]."""
    if not isinstance(weight, Adapted):
        return group_weights(weight, first_group + expert, count, dtype)
    base_NIO = group_weights(weight.base, first_group + expert, count, dtype)
    factors = (lax.dynamic_slice_in_dim(factor, expert, count) for factor in weight[1:])
    return Adapted(base_NIO, *factors)


def project(rows_XRI: jax.Array, weight_XIO: jax.Array | Adapted) -> jax.Array:
    """rows times the weight, float32 [X,R,O]; those through factors are float32 throughout."""
    if not isinstance(weight_XIO, Adapted):
        return _product(rows_XRI, weight_XIO)
    base_XIO, a_XIr, b_XrO = weight_XIO
    return _product(rows_XRI, base_XIO) + _product(_product(_float32(rows_XRI), a_XIr), b_XrO)


def project_back(d_out_RO: jax.Array, weight_IO: jax.Array | Adapted) -> jax.Array:
    """d_out times the transpose of the weight, float32 [R,I]."""
    if not isinstance(weight_IO, Adapted):
        return _product(d_out_RO, weight_IO.T)
    base_IO, a_Ir, b_rO = weight_IO
    return _product(d_out_RO, base_IO.T) + _product(_product(_float32(d_out_RO), b_rO.T), a_Ir.T)


def gradients(
    rows_RI: jax.Array, d_out_RO: jax.Array, weight_IO: jax.Array | Adapted, trained: Trained
) -> jax.Array | Adapted | None:
    """What these rows add to the gradients of the weight's parts, float32; None for frozen parts."""
    if trained is None:
        return None
    if not isinstance(weight_IO, Adapted):
        return _product(rows_RI.T, d_out_RO)
    _, a_Ir, b_rO = weight_IO
    d_base_IO = gradients(rows_RI, d_out_RO, weight_IO.base, trained.base)
    if trained.a_XIr is None and trained.b_XrO is None:
        return Adapted(d_base_IO, None, None)
    rows_RI, d_out_RO = _float32(rows_RI), _float32(d_out_RO)
    d_a_Ir = _product(rows_RI.T, _product(d_out_RO, b_rO.T))
    return Adapted(d_base_IO, d_a_Ir, _product(_product(rows_RI, a_Ir).T, d_out_RO))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """left @ right in the dtype of left, accumulated in float32."""
    return jnp.matmul(left, right.astype(left.dtype), preferred_element_type=jnp.float32)


def _float32(rows: jax.Array) -> jax.Array:
    return rows.astype(jnp.float32)
