"""The router: logits over experts, and the choice of experts from logits.

Legend: X any leading axes, D model width, E experts, K experts chosen for a token, G groups of experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from safemoe_jax.errors import InputError
from safemoe_jax.models.config import ModelConfig, RoutingConfig
from safemoe_jax.models.linear import Linear
from safemoe_jax.models.params import ParamSpec


class Router(Linear):
    """A linear layer whose output is the raw router logits, float32."""

    def __init__(self, config: ModelConfig) -> None:
        routing, n_experts = config.routing, config.n_experts
        super().__init__(
            "gate", config.d_model, n_experts, ("embed", "router"), lora=config.lora, bias=routing.bias
        )
        correction = ParamSpec((n_experts,), ("router",), "zeros")
        self.correction_bias = nnx.Param(correction) if routing.correction_bias else None
        self.in_float32 = routing.float32_logits

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Router logits [X, E], float32, before any softmax; with the router's bias, not the correction."""
        x_XD = x_XD.astype(jnp.float32) if self.in_float32 else x_XD
        return super().__call__(x_XD).astype(jnp.float32)


def choose_experts(
    logits_XE: jax.Array, config: ModelConfig, correction_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their combine weights, by the config's rule (`RoutingConfig`).

    Gradients reach the logits through the weights; a choice has none, nor has the correction, which decides
    choices only.

    Args:
        logits_XE: router logits, float32.
        config: the network; its routing, top_k and norm_topk_prob decide.
        correction_E: the router's correction bias where the config has one (or, for logits of many layers,
            their biases with axes that broadcast).

    Returns:
        Combine weights [X, K] float32 and expert indices [X, K] int32, best first.

    Raises:
        InputError: no such routing, or the correction is missing where the config has one (or the reverse).
    """
    routing = config.routing
    if routing.correction_bias != (correction_E is not None):
        raise InputError(
            "correction bias missing" if routing.correction_bias else "a correction bias that is not used",
            where="choose_experts",
            expected="the router's correction_bias where routing.correction_bias is set, and only there",
        )
    weights_XK, experts_XK = _pick(logits_XE, config, correction_E)
    if config.norm_topk_prob:
        sum_X1 = jnp.sum(weights_XK, axis=-1, keepdims=True) + routing.weight_floor
        weights_XK = weights_XK / (
            jnp.maximum(sum_X1, routing.smallest_sum) if routing.smallest_sum else sum_X1
        )
    return (weights_XK if routing.scale == 1 else weights_XK * routing.scale), experts_XK


def _pick(
    logits_XE: jax.Array, config: ModelConfig, correction_E: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Experts and their weights before renormalisation and scale."""
    routing, top_k = config.routing, config.top_k
    match routing.kind:
        case "softmax":
            return _best(jax.nn.softmax(logits_XE, axis=-1), top_k, routing, correction_E)
        case "sigmoid":
            return _best(jax.nn.sigmoid(logits_XE), top_k, routing, correction_E)
        case "softmax_chosen":
            chosen_XK, experts_XK = jax.lax.top_k(logits_XE, top_k)
            return jax.nn.softmax(chosen_XK, axis=-1), experts_XK
        case "sigmoid_input":
            chosen_XK, experts_XK = jax.lax.top_k(logits_XE, top_k)
            return jax.nn.sigmoid(chosen_XK), experts_XK
        case "sparsemixer":
            return _sparsemixer(logits_XE, top_k, routing.jitter)
    kinds = "softmax, softmax_chosen, sigmoid_input, sigmoid or sparsemixer"
    raise InputError(f"no routing {routing.kind!r}", where="routing.kind", expected=kinds)


def _best(
    scores_XE: jax.Array, top_k: int, routing: RoutingConfig, correction_E: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The k best scores: by score plus correction, within the best groups."""
    if correction_E is None and routing.top_groups == routing.groups:
        return jax.lax.top_k(scores_XE, top_k)
    choice_XE = scores_XE if correction_E is None else scores_XE + correction_E.astype(scores_XE.dtype)
    choice_XE = jax.lax.stop_gradient(choice_XE)
    if routing.top_groups < routing.groups:
        choice_XE = jnp.where(_in_best_groups(choice_XE, routing), choice_XE, -jnp.inf)
    experts_XK = jax.lax.top_k(choice_XE, top_k)[1]
    return jnp.take_along_axis(scores_XE, experts_XK, axis=-1), experts_XK


def _in_best_groups(choice_XE: jax.Array, routing: RoutingConfig) -> jax.Array:
    """bool [X, E]: whether an expert is in one of the groups that are compared best."""
    n_experts = choice_XE.shape[-1]
    choice_XGE = choice_XE.reshape(*choice_XE.shape[:-1], routing.groups, n_experts // routing.groups)
    counted = {"max": 1, "top2": 2}[routing.group_score]
    score_XG = jnp.sum(jax.lax.top_k(choice_XGE, counted)[0], axis=-1)
    best_XG = jax.nn.one_hot(jax.lax.top_k(score_XG, routing.top_groups)[1], routing.groups).sum(-2) > 0
    return jnp.repeat(best_XG, n_experts // routing.groups, axis=-1)


def _sparsemixer(logits_XE: jax.Array, top_k: int, jitter: float) -> tuple[jax.Array, jax.Array]:
    """One expert after the other: the largest logit left, weighted by its softmax among those close to it.

    An expert is close if (largest - s) / max(|s|, largest) <= 2 * jitter; those already taken are out. Each
    pick has its own softmax, so that the weights do not sum to 1. This is the published rule in evaluation
    (arXiv 2409.12136); in training its authors sample the picks and estimate the gradient. Here training
    uses the same picks, and their weights' plain derivative.
    """
    left_XE, weights, experts = logits_XE, [], []
    for _ in range(top_k):
        experts_X = jnp.argmax(left_XE, axis=-1)
        largest_X1 = jnp.max(jax.lax.stop_gradient(left_XE), axis=-1, keepdims=True)
        fixed_XE = jax.lax.stop_gradient(logits_XE)
        distance_XE = (largest_X1 - fixed_XE) / jnp.maximum(jnp.abs(fixed_XE), largest_X1)
        share_XE = jax.nn.softmax(jnp.where(distance_XE > 2 * jitter, -jnp.inf, left_XE), axis=-1)
        weights.append(jnp.take_along_axis(share_XE, experts_X[..., None], axis=-1))
        experts.append(experts_X)
        left_XE = jnp.where(jax.nn.one_hot(experts_X, logits_XE.shape[-1], dtype=bool), -jnp.inf, left_XE)
    return jnp.concatenate(weights, axis=-1), jnp.stack(experts, axis=-1).astype(jnp.int32)
