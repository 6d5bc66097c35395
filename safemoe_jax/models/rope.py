"""Rotary position embedding. Legend: B rows, T positions, N heads, H head width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.models.config import RopeConfig


def rotary_tables(config: RopeConfig, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for every position.

    Args:
        config: base frequency.
        head_dim: H, even.
        positions_BT: int32 positions.

    Returns:
        cos and sin, float32 [B, T, H / 2].
    """
    inverse_frequency = config.theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = positions_BT[..., None].astype(jnp.float32) * inverse_frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (i, i + H / 2) of every head by its position's angle, in float32."""
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
