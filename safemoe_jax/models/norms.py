"""Normalisation layers: float32 inside, the input's dtype out. Legend: X any leading axes, D width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.params import ParamSpec


class RMSNorm(nnx.Module):
    """Root-mean-square norm; the scale is applied in the activations' dtype."""

    def __init__(self, width: int, eps: float, axis: str = "norm") -> None:
        self.scale = nnx.Param(ParamSpec((width,), (axis,), "ones"))
        self.eps = eps

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Normalises the last axis; same shape and dtype out."""
        return self.scale[...].astype(x_XD.dtype) * unit_rms(x_XD, self.eps).astype(x_XD.dtype)


class RMSNormFloat32(nnx.Module):
    """Root-mean-square norm; the scale is applied in float32, before the cast back (gpt_oss)."""

    def __init__(self, width: int, eps: float, axis: str = "norm") -> None:
        self.scale = nnx.Param(ParamSpec((width,), (axis,), "ones"))
        self.eps = eps

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Normalises the last axis; same shape and dtype out."""
        return (self.scale[...].astype(jnp.float32) * unit_rms(x_XD, self.eps)).astype(x_XD.dtype)


class LayerNorm(nnx.Module):
    """Layer norm (mean and variance) with scale and bias, applied in float32 (phimoe)."""

    def __init__(self, width: int, eps: float, axis: str = "norm") -> None:
        self.scale = nnx.Param(ParamSpec((width,), (axis,), "ones"))
        self.bias = nnx.Param(ParamSpec((width,), (axis,), "zeros"))
        self.eps = eps

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Normalises the last axis; same shape and dtype out."""
        x32_XD = x_XD.astype(jnp.float32)
        centred_XD = x32_XD - jnp.mean(x32_XD, axis=-1, keepdims=True)
        variance_X1 = jnp.mean(jnp.square(centred_XD), axis=-1, keepdims=True)
        normal_XD = centred_XD * jax.lax.rsqrt(variance_X1 + self.eps)
        scale_D, bias_D = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (normal_XD * scale_D + bias_D).astype(x_XD.dtype)


_KINDS = {"rms": RMSNorm, "rms_float32": RMSNormFloat32, "layer": LayerNorm}


def model_norm(config: ModelConfig) -> RMSNorm | RMSNormFloat32 | LayerNorm:
    """A norm of the residual stream, of the kind that the config names."""
    return _KINDS[config.norm](config.d_model, config.norm_eps)


def unit_rms(x_XD: jax.Array, eps: float) -> jax.Array:
    """The last axis divided by its root mean square, float32."""
    x32_XD = x_XD.astype(jnp.float32)
    variance_X1 = jnp.mean(jnp.square(x32_XD), axis=-1, keepdims=True)
    return x32_XD * jax.lax.rsqrt(variance_X1 + eps)
