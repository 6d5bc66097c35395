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
    student_experts: jax.Array, reference_experts: jax.Array, *, token_mask: jax.Array | None = None
) -> jax.Array:
    """Mean Jaccard index of the two sets of chosen experts of each layer: ``[L]`` float32 in [0, 1].

    1 means that the same experts are chosen everywhere, 0 that none is shared. Two models can choose the same
    experts with other weights (overlap 1, drift above 0). What a network chooses is its own rule's business
    (correction biases, groups of experts): ``models.transformer.chosen_experts`` says it of router logits.

    Args:
        student_experts: indices of the experts chosen, int ``[L, B, k]`` or ``[L, B, T, k]``, in any order,
            none of them twice.
        reference_experts: the same of the other model.
        token_mask: ``[B]`` or ``[B, T]``, as in :func:`drift`; an all-zero mask gives 0.

    Raises:
        InputError: unequal shapes.
    """
    student, reference = jnp.asarray(student_experts), jnp.asarray(reference_experts)
    if student.shape != reference.shape:
        raise InputError(
            f"experts chosen {student.shape} against {reference.shape}",
            where="reference_experts",
            expected="the same layers, prompts and number of experts in both",
        )
    shared = jnp.sum(student[..., :, None] == reference[..., None, :], axis=(-2, -1))
    jaccard = shared / (2 * student.shape[-1] - shared)
    weights = jnp.ones(jaccard.shape[1:]) if token_mask is None else jnp.asarray(token_mask, jnp.float32)
    total = jnp.sum(weights)
    return jnp.sum(jaccard * weights, axis=tuple(range(1, jaccard.ndim))) / jnp.where(total > 0, total, 1.0)
