"""Weights with a low-rank update that is added where they are used, and anew in the backward pass.

The sum is as large as the weight. Kept for the backward pass it would be a copy of every layer's experts, so
only the base and the factors are kept.

Legend: X leading axes (experts), I inputs, O outputs, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from safemoe_jax.models.quantised import Quantised, Weight, dense, multiply, weight_shape


class Adapted(NamedTuple):
    """The weight base + a b, [X, I, O]; the adapter's scale is within b."""

    base: Weight
    a_XIr: jax.Array
    b_XrO: jax.Array


AnyWeight = Weight | Adapted


def base_of(weight: AnyWeight) -> Weight:
    """The weight without its update."""
    return weight.base if isinstance(weight, Adapted) else weight


def on_base(weight: AnyWeight, base: Weight) -> AnyWeight:
    """Another weight with the same update, if any."""
    return weight._replace(base=base) if isinstance(weight, Adapted) else base


def shape_of(weight: AnyWeight) -> tuple[int, ...]:
    """[X, I, O] of the weight, however it is held."""
    return weight_shape(base_of(weight))


def effective(weight: AnyWeight, dtype: jnp.dtype | str) -> jax.Array:
    """All of the weight in this dtype, its update included."""
    if not isinstance(weight, Adapted):
        return dense(weight, dtype)
    return dense(weight.base, dtype) + (weight.a_XIr @ weight.b_XrO).astype(dtype)


def pull_back(weight: AnyWeight, d_weight_XIO: jax.Array) -> AnyWeight | None:
    """Cotangents of the parts from that of `effective(weight)`; None for those of a quantised weight."""
    if isinstance(weight, Quantised):
        return None
    if not isinstance(weight, Adapted):
        return d_weight_XIO.astype(weight.dtype)
    update, transpose = jax.vjp(jnp.matmul, weight.a_XIr, weight.b_XrO)
    return Adapted(pull_back(weight.base, d_weight_XIO), *transpose(d_weight_XIO.astype(update.dtype)))


def times(product: Callable, x: jax.Array, weight: AnyWeight, others: Any = None) -> jax.Array:
    """product(x, the effective weight in the dtype of x, others); no sum or float copy is kept for gradients.

    Args:
        product: a function of the module level (it is compared by identity), linear in x and in the weight.
        x: what is multiplied.
        weight: a frozen one where it is quantised.
        others: what else the product needs; gets no gradient.
    """
    if isinstance(weight, Adapted):
        return _multiply_adapted(product, x, weight, others)
    if isinstance(weight, Quantised):
        return multiply(product, x, weight, others)
    return product(x, weight.astype(x.dtype), others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_adapted(product: Callable, x: jax.Array, weight: Adapted, others: Any) -> jax.Array:
    return product(x, effective(weight, x.dtype), others)


def _multiply_forward(product: Callable, x: jax.Array, weight: Adapted, others: Any) -> tuple:
    return _multiply_adapted(product, x, weight, others), (x, weight, others)


def _multiply_backward(product: Callable, saved: tuple, d_y: jax.Array) -> tuple:
    x, weight, others = saved
    _, transpose = jax.vjp(lambda x, w: product(x, w, others), x, effective(weight, x.dtype))
    d_x, d_weight = transpose(d_y)
    return d_x, pull_back(weight, d_weight), None


_multiply_adapted.defvjp(_multiply_forward, _multiply_backward)
