"""Frozen weights in 8 or 4 bits: containers, rounding to them, and the way back for the slice in use.

Frozen weights only: a gradient reaches what they are multiplied with, never them. Each product brings its
weights back by itself, in the backward pass anew, so that no float copy is kept.

Both are symmetric (no zero point): a weight is an integer times a scale, so 0 stays 0. Every leading axis
(layers, experts) is kept, so that one expert is sliced out of a stack before it is brought back; a whole
stack never needs to be.

Legend: X leading axes (layers, experts), I inputs, O outputs, P pairs of inputs (I / 2), B blocks of inputs
(I / block).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from safemoe_jax.errors import InputError
from safemoe_jax.models.params import ParamSpec

Quantisation = Literal["int8", "int4", "int4-64"]
"""8 bits a weight; 4 bits with a scale for every 32 inputs, or for every 64."""

INT8_LIMIT = 127
INT4_LIMIT = 7
BLOCKS = (32, 64)
"""Inputs that share a scale in 4 bits."""
_HALVES = np.uint8([[0], [4]])
"""How far the low and the high half of a byte lie up."""


class Int8(NamedTuple):
    """8 bits a weight, one scale an output channel.

    values: int8 [X, I, O].
    scales: float32 [X, 1, O].
    """

    values: jax.Array
    scales: jax.Array


class Int4(NamedTuple):
    """4 bits a weight, one scale a block of inputs of an output channel: 4.25 to 4.5 bits in all.

    packed: uint8 [X, P, O]; the low half holds input 2p, the high half input 2p + 1, both plus 8.
    scales: bfloat16 [X, B, O].
    """

    packed: jax.Array
    scales: jax.Array


PARTS = ("values", "scales")
"""Names of the two arrays of a quantised parameter."""
Quantised = Int8 | Int4
Weight = jax.Array | Quantised
"""A float array, or a quantised one; both [X, I, O]."""


class QuantisedParam(nnx.Module):
    """A frozen weight of a module in two parts, `values` and `scales`, declared by the weight itself."""

    def __init__(self, spec: ParamSpec, quantisation: Quantisation) -> None:
        values, scales = part_specs(spec, quantisation)
        self.values, self.scales = nnx.Param(values), nnx.Param(scales)
        self.container = Int8 if quantisation == "int8" else Int4


def weight_param(spec: ParamSpec, quantisation: Quantisation | None) -> nnx.Param | QuantisedParam:
    """The declaration of a weight, quantised or not."""
    return nnx.Param(spec) if quantisation is None else QuantisedParam(spec, quantisation)


def read_weight(param: nnx.Param | QuantisedParam, dtype: jnp.dtype | str) -> Weight:
    """What a module's weight holds: an array in this dtype, or a quantised one as it is."""
    if isinstance(param, QuantisedParam):
        return param.container(param.values[...], param.scales[...])
    return param[...].astype(dtype)


def part_specs(spec: ParamSpec, quantisation: Quantisation) -> tuple[ParamSpec, ParamSpec]:
    """Declarations of `values` and `scales` of a weight [X, I, O].

    Raises:
        InputError: 4 bits, and the block does not divide the inputs.
    """
    *lead, inputs, outputs = spec.shape
    *lead_axes, _, outputs_axis = spec.axes
    scales_axes = (*lead_axes, None, outputs_axis)
    if quantisation == "int8":
        return spec, ParamSpec((*lead, 1, outputs), scales_axes)
    _check_block(inputs, _block(quantisation))
    scales = ParamSpec((*lead, inputs // _block(quantisation), outputs), scales_axes)
    return ParamSpec((*lead, inputs // 2, outputs), spec.axes), scales


def quantise(weights_XIO: jax.Array, quantisation: Quantisation) -> Quantised:
    """The nearest weights in 8 or 4 bits (`quantise_int8`, `quantise_int4`)."""
    if quantisation == "int8":
        return quantise_int8(weights_XIO)
    return quantise_int4(weights_XIO, _block(quantisation))


def _block(quantisation: Quantisation) -> int:
    return 64 if quantisation == "int4-64" else 32


def _check_block(inputs: int, block: int) -> None:
    if block not in BLOCKS or inputs % block:
        raise InputError(
            f"a block of {block} for {inputs} inputs",
            where="4-bit weights",
            expected=f"{' or '.join(map(str, BLOCKS))}, and a multiple of it as the number of inputs",
        )


def quantise_int8(weights_XIO: jax.Array) -> Int8:
    """The nearest 8-bit weights; no weight moves by more than half its channel's scale.

    Args:
        weights_XIO: kernel(s) of any float dtype, finite; the scale is the channel's largest size / 127.
    """
    weights_XIO = weights_XIO.astype(jnp.float32)
    scales_X1O = jnp.max(jnp.abs(weights_XIO), axis=-2, keepdims=True) / INT8_LIMIT
    return Int8(_rounded(weights_XIO, scales_X1O, INT8_LIMIT).astype(jnp.int8), scales_X1O)


def quantise_int4(weights_XIO: jax.Array, block: int = 32) -> Int4:
    """The nearest 4-bit weights; no weight moves by more than half its block's scale.

    Args:
        weights_XIO: kernel(s) of any float dtype, finite; the scale is the block's largest size / 7, rounded
            to bfloat16 before the weights are rounded to it.
        block: inputs that share a scale.

    Raises:
        InputError: the block is not one of `BLOCKS`, or does not divide the inputs.
    """
    *lead, inputs, outputs = weights_XIO.shape
    _check_block(inputs, block)
    blocks_XBbO = weights_XIO.astype(jnp.float32).reshape(*lead, inputs // block, block, outputs)
    largest_XB1O = jnp.max(jnp.abs(blocks_XBbO), axis=-2, keepdims=True)
    scales_XB1O = (largest_XB1O / INT4_LIMIT).astype(jnp.bfloat16)
    rounded_XBbO = _rounded(blocks_XBbO, scales_XB1O.astype(jnp.float32), INT4_LIMIT)
    pairs_XP2O = (rounded_XBbO + 8).astype(jnp.uint8).reshape(*lead, inputs // 2, 2, outputs)
    packed_XPO = pairs_XP2O[..., 0, :] | (pairs_XP2O[..., 1, :] << 4)
    return Int4(packed_XPO, scales_XB1O[..., 0, :])


def dequantise(quantised: Quantised, dtype: jnp.dtype | str = jnp.float32) -> jax.Array:
    """The weights [X, I, O] in a float dtype; multiplied in float32, then rounded once."""
    if isinstance(quantised, Int8):
        return (quantised.values.astype(jnp.float32) * quantised.scales).astype(dtype)
    packed_XPO, scales_XBO = quantised
    *lead, pairs, outputs = packed_XPO.shape
    # Shifted by constants: stacked, a CPU would copy the halves one number after the other.
    halves_XP2O = packed_XPO[..., None, :] >> _HALVES & 15
    blocks_XBbO = (halves_XP2O.astype(jnp.float32) - 8).reshape(*lead, scales_XBO.shape[-2], -1, outputs)
    weights_XBbO = blocks_XBbO * scales_XBO.astype(jnp.float32)[..., None, :]
    return weights_XBbO.reshape(*lead, 2 * pairs, outputs).astype(dtype)


def take(quantised: Quantised, index: jax.Array | int) -> Quantised:
    """Entry `index` of the first axis (a layer, an expert of a stack): quantised still, nothing else read."""
    entry = [jax.lax.dynamic_index_in_dim(part, index, keepdims=False) for part in quantised]
    return type(quantised)(*entry)


def group_weight(weight: Weight, index: jax.Array | int, dtype: jnp.dtype | str) -> jax.Array:
    """Entry `index` of the first axis as an array; a quantised one in this dtype, another as it is."""
    return dequantise(take(weight, index), dtype) if isinstance(weight, Quantised) else weight[index]


def group_weights(weight: Weight, first: jax.Array | int, count: int, dtype: jnp.dtype | str) -> jax.Array:
    """As `group_weight`, for `count` entries from `first` on: [count, I, O]."""
    entries = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, first, count), weight)
    return dequantise(entries, dtype) if isinstance(weight, Quantised) else entries


def dense(weight: Weight, dtype: jnp.dtype | str) -> jax.Array:
    """All of the weight in this dtype."""
    return dequantise(weight, dtype) if isinstance(weight, Quantised) else weight.astype(dtype)


def weight_shape(weight: Weight) -> tuple[int, ...]:
    """[X, I, O] of the weight, however it is held."""
    if isinstance(weight, Int4):
        *lead, pairs, outputs = weight.packed.shape
        return (*lead, 2 * pairs, outputs)
    return (weight.values if isinstance(weight, Int8) else weight).shape


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(product: Callable, x: jax.Array, weight: Quantised, others: Any = None) -> jax.Array:
    """product(x, weights in the dtype of x, others), linear in x.

    Args:
        product: a function of the module level (it is compared by identity).
        x: what gets the gradient.
        weight: brought back here, and anew in the backward pass.
        others: what else the product needs; gets no gradient.
    """
    return product(x, dequantise(weight, x.dtype), others)


def _multiply_forward(product: Callable, x: jax.Array, weight: Quantised, others: Any) -> tuple:
    # The shape of x travels in an array that costs nothing: the product is linear, x itself is not needed.
    return multiply(product, x, weight, others), (jnp.zeros((0, *x.shape), x.dtype), weight, others)


def _multiply_backward(product: Callable, saved: tuple, d_y: jax.Array) -> tuple:
    empty, weight, others = saved
    zeros = jnp.zeros(empty.shape[1:], empty.dtype)
    _, transpose = jax.vjp(lambda x: product(x, dequantise(weight, x.dtype), others), zeros)
    return *transpose(d_y), None, None


multiply.defvjp(_multiply_forward, _multiply_backward)


def _rounded(weights: jax.Array, scales: jax.Array, limit: int) -> jax.Array:
    """Whole numbers from -limit to limit, float32; all 0 where the scale is 0."""
    return jnp.clip(jnp.round(weights / jnp.where(scales > 0, scales, 1.0)), -limit, limit)
