"""The router: logits over experts, and the choice of experts from logits.

Legend: X any leading axes, D model width, E experts, K experts chosen for a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.linear import Linear


class Router(Linear):
    """A linear layer whose output is the raw router logits, float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__("gate", config.d_model, config.n_experts, ("embed", "router"), lora=config.lora)

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Router logits [X, E], float32, before any softmax."""
        return super().__call__(x_XD).astype(jnp.float32)


def choose_experts(logits_XE: jax.Array, top_k: int, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """Softmax over all experts, then the k largest.

    Args:
        logits_XE: router logits, float32.
        top_k: K.
        renormalise: whether the chosen probabilities are divided by their sum.

    Returns:
        Combine weights [X, K] float32 and expert indices [X, K] int32, largest first.
    """
    weights_XK, experts_XK = jax.lax.top_k(jax.nn.softmax(logits_XE, axis=-1), top_k)
    if renormalise:
        weights_XK = weights_XK / jnp.sum(weights_XK, axis=-1, keepdims=True)
    return weights_XK, experts_XK
