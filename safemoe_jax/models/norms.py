"""Normalisation layers. Legend: X any leading axes, D width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.models.params import ParamSpec


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32; the scale is applied in the activations' dtype."""

    def __init__(self, width: int, eps: float, axis: str = "norm") -> None:
        self.scale = nnx.Param(ParamSpec((width,), (axis,), "ones"))
        self.eps = eps

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Normalises the last axis; same shape and dtype out."""
        x32_XD = x_XD.astype(jnp.float32)
        variance_X1 = jnp.mean(jnp.square(x32_XD), axis=-1, keepdims=True)
        return self.scale[...].astype(x_XD.dtype) * (x32_XD * jax.lax.rsqrt(variance_X1 + self.eps)).astype(
            x_XD.dtype
        )
