"""Losses on the router beside the task's (for pretraining): even load, and logits that stay small.

Both are means over the real tokens of all MoE layers together; without a MoE layer both are 0.

Shapes: L MoE layers, B batch rows, T row length, E experts, K experts a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def load_balancing_loss(router_logits: jax.Array, token_mask: jax.Array, *, top_k: int) -> jax.Array:
    """E * sum_e f_e p_e, a float32 scalar; top_k when the load is even, up to E when it is not.

    f_e is the mean number of times that a token's top-k choice names expert e, p_e its mean probability,
    both over the tokens of all layers together, as in transformers' ``load_balancing_loss_func`` (Switch
    Transformer, arXiv 2101.03961, equations 4-6, extended to top-k). The gradient flows through p_e only.
    It is one formula for all families, as there: softmax and top-k of the raw logits, also where the network
    chooses by another rule (a correction bias, groups of experts). The load that this evens out is then not
    the network's own.

    Args:
        router_logits: raw router logits ``[L, B, T, E]``, any float dtype.
        token_mask: ``[B, T]``, non-zero for real tokens; padding counts for nothing.
        top_k: experts a token.
    """
    if router_logits.shape[0] == 0:
        return jnp.zeros((), jnp.float32)
    logits = router_logits.astype(jnp.float32)
    n_experts = logits.shape[-1]
    share_BT = _token_shares(token_mask, logits.shape[0])
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, chosen_LBTK = jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)
    load_LBTE = jax.nn.one_hot(chosen_LBTK, n_experts, dtype=jnp.float32).sum(axis=-2)
    load_E = jnp.einsum("lbte,bt->e", load_LBTE, share_BT)
    probability_E = jnp.einsum("lbte,bt->e", probabilities, share_BT)
    return n_experts * jnp.sum(load_E * probability_E)


def z_loss(router_logits: jax.Array, token_mask: jax.Array) -> jax.Array:
    """Mean of logsumexp(logits)^2, a float32 scalar (ST-MoE, arXiv 2202.08906, equation 5).

    The published formula is of one layer; here it is the mean over layers, so that its weight does not
    depend on the depth.

    Args:
        router_logits: raw router logits ``[L, B, T, E]``, any float dtype.
        token_mask: ``[B, T]``, non-zero for real tokens; padding counts for nothing.
    """
    if router_logits.shape[0] == 0:
        return jnp.zeros((), jnp.float32)
    size_LBT = jax.nn.logsumexp(router_logits.astype(jnp.float32), axis=-1)
    return jnp.einsum("lbt,bt->", size_LBT**2, _token_shares(token_mask, router_logits.shape[0]))


def _token_shares(token_mask: jax.Array, n_layers: int) -> jax.Array:
    """Each token's weight in a mean over all tokens and layers, [B, T]; 0 for padding."""
    counts_BT = (token_mask != 0).astype(jnp.float32)
    return counts_BT / (jnp.maximum(counts_BT.sum(), 1.0) * n_layers)
