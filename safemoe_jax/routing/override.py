"""Forcing one model's routing into another (the paper's causal test): which tokens get whose router logits.

Shapes: L MoE layers, B batch rows, T row length, E experts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from safemoe_jax.errors import InputError

Where = Literal["last_token", "prompt"]
PLACES: tuple[Where, ...] = ("last_token", "prompt")


class RoutingOverride(NamedTuple):
    """Router logits to route by instead of the model's own, wherever the mask is true.

    router_logits: float ``[L, B, T, E]``. mask: bool ``[B, T]``.
    """

    router_logits: jax.Array
    mask: jax.Array


def make_override(
    router_logits_LBTE: jax.Array, attention_mask_BT: jax.Array, where: Where
) -> RoutingOverride:
    """Override at the last prompt token, or at every prompt token, of right-padded rows.

    Args:
        router_logits_LBTE: the aligned model's router logits for the same rows, float.
        attention_mask_BT: 1 for prompt tokens, 0 for the padding to their right.
        where: ``last_token`` (where the paper measures drift) or ``prompt``.

    Raises:
        InputError: an unknown ``where``.
    """
    if where not in PLACES:
        raise InputError(f"unknown place {where!r}", where="override", expected=" or ".join(PLACES))
    mask_BT = last_token_mask(attention_mask_BT) if where == "last_token" else attention_mask_BT.astype(bool)
    return RoutingOverride(router_logits_LBTE, mask_BT)


def last_token_mask(attention_mask_BT: jax.Array) -> jax.Array:
    """True at the last real token of each right-padded row, bool ``[B, T]``; an empty row has none."""
    length_B = jnp.sum(attention_mask_BT.astype(jnp.int32), axis=1)
    return jnp.arange(attention_mask_BT.shape[1])[None, :] == length_B[:, None] - 1


def at_last_token(values_BTX: jax.Array, attention_mask_BT: jax.Array) -> jax.Array:
    """What stands at the last real token of each right-padded row: ``[B, T, X]`` to ``[B, X]``."""
    last_B = jnp.sum(attention_mask_BT.astype(jnp.int32), axis=1) - 1
    return jnp.take_along_axis(values_BTX, last_B[:, None, None], axis=1)[:, 0]
