"""The method itself: penalty, drift and routing override, pure functions on arrays of router logits."""

from safemoe_jax.routing.drift import drift, top_k_overlap
from safemoe_jax.routing.override import RoutingOverride, at_last_token, last_token_mask, make_override
from safemoe_jax.routing.penalty import alignment_penalty, layer_divergence, layer_selection, token_divergence

__all__ = [
    "RoutingOverride",
    "alignment_penalty",
    "at_last_token",
    "drift",
    "last_token_mask",
    "layer_divergence",
    "layer_selection",
    "make_override",
    "token_divergence",
    "top_k_overlap",
]
