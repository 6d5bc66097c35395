"""Safety routing drift (the paper's metric d) and the overlap of the chosen experts.

Shapes: L MoE layers, B prompts or batch rows, T row length, E experts, k experts chosen a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from safemoe_jax.errors import InputError
from safemoe_jax.routing.penalty import layer_divergence


def drift(
    student_logits: jax.Array, reference_logits: jax.Array, *, token_mask: jax.Array | None = None
) -> jax.Array:
    """Mean KL(reference || student) of each layer at temperature 1: ``[L]`` float32, nats.

    The paper's d(w) is the mean of these over the layers (SafeMoE, "safety routing drift"). It is measured at
    the last prompt token: pass ``[L, B, E]`` of those, or ``[L, B, T, E]`` with a ``token_mask [B, T]``.

    Raises InputError for unequal shapes.
    """
    return layer_divergence(student_logits, reference_logits, temperature=1.0, token_mask=token_mask)


def top_k_overlap(
    student_logits: jax.Array,
    reference_logits: jax.Array,
    *,
    top_k: int,
    token_mask: jax.Array | None = None,
) -> jax.Array:
    """Mean Jaccard index of the two sets of ``top_k`` experts of each layer: ``[L]`` float32 in [0, 1].

    1 means that the same experts are chosen everywhere, 0 that none is shared; shapes as in :func:`drift`.
    Two models can choose the same experts with other weights (overlap 1, drift above 0). An all-zero mask
    gives 0.

    Raises:
        InputError: ``top_k`` outside 1 .. E, or unequal shapes.
    """
    n_experts = student_logits.shape[-1]
    if not 1 <= top_k <= n_experts:
        raise InputError(
            f"top_k is {top_k}", where="top_k", expected=f"1 .. {n_experts}, the number of experts"
        )
    if student_logits.shape != reference_logits.shape:
        raise InputError(
            f"student logits {student_logits.shape} against reference logits {reference_logits.shape}",
            where="reference_logits",
            expected="the same layers, prompts and experts in both",
        )
    chosen_here = _chosen(student_logits, top_k)
    chosen_there = _chosen(reference_logits, top_k)
    shared = jnp.sum(chosen_here * chosen_there, axis=-1)
    jaccard = shared / (2 * top_k - shared)
    weights = jnp.ones(jaccard.shape[1:]) if token_mask is None else jnp.asarray(token_mask, jnp.float32)
    total = jnp.sum(weights)
    return jnp.sum(jaccard * weights, axis=tuple(range(1, jaccard.ndim))) / jnp.where(total > 0, total, 1.0)


def _chosen(logits: jax.Array, top_k: int) -> jax.Array:
    """1.0 at the experts a router with these logits chooses, else 0.0 (ties go to the lower index)."""
    _, index = jax.lax.top_k(logits.astype(jnp.float32), top_k)
    return jnp.sum(jax.nn.one_hot(index, logits.shape[-1]), axis=-2)
