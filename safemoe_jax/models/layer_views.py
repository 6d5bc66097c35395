"""Expert matrices once more as one array a layer, in the same memory, for decoding on a CPU.

There XLA copies a slice of a stack before it multiplies it. While decoding, where a few rows meet every
expert, the copy costs as much as the product, and twice that where two cores share no cache: each may copy
what the other multiplies. A whole array is multiplied where it lies.

Legend: R repeats of a segment's pattern, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.experts import MATRICES
from safemoe_jax.models.params import Weights

_ALIGNMENT = 64
"""Bytes. XLA takes over memory that begins at a multiple of it, and copies other memory."""


def with_layer_views(config: ModelConfig, weights: Weights, compute: Compute) -> Weights:
    """The same weights, with the float32 expert stacks [R, E, I, O] viewed as R arrays [E, I, O].

    Nothing is copied. On other platforms, on several devices, and for weights that have to be converted
    before each product, there is nothing to be gained: the weights stay as they are.

    Args:
        weights: actual arrays, not those of a traced function.
    """
    if compute.jnp_dtype != jnp.float32:
        return weights
    layers = {}
    for s, segment in enumerate(config.segments):
        for p, kind in enumerate(segment.pattern):
            names = [f"segments.{s}.{p}.moe.experts.{matrix}" for matrix in MATRICES if kind == "moe"]
            layers |= {n: _views(weights.frozen[n]) for n in names if _can_be_viewed(weights.frozen.get(n))}
    return weights._replace(layers=layers)


def _can_be_viewed(stack: jax.Array | None) -> bool:
    if not isinstance(stack, jax.Array) or stack.dtype != jnp.float32:
        return False
    if [device.platform for device in stack.devices()] != ["cpu"]:
        return False
    return stack.unsafe_buffer_pointer() % _ALIGNMENT == 0 and stack.nbytes // len(stack) % _ALIGNMENT == 0


def _views(stack_REIO: jax.Array) -> tuple[jax.Array, ...]:
    (device,) = stack_REIO.devices()
    return tuple(jax.device_put(layer_EIO, device, may_alias=True) for layer_EIO in np.asarray(stack_REIO))
