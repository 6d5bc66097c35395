"""One decoder layer, MoE or dense. Legend: B rows, T positions, D model width, E experts."""

from __future__ import annotations

import jax
from flax import nnx

from safemoe_jax.models.attention import Attention, Row, Traits
from safemoe_jax.models.config import Compute, ModelConfig
from safemoe_jax.models.expert_stack import Place
from safemoe_jax.models.experts import MoE
from safemoe_jax.models.feed_forward import FeedForward
from safemoe_jax.models.kv_cache import KeysValues, LayerCache
from safemoe_jax.models.mla import LatentAttention
from safemoe_jax.models.norms import model_norm


class Layer(nnx.Module):
    """One pre-norm decoder layer; `kind` as in `LayerConfig`."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        self.input_norm = model_norm(config)
        self.attention = Attention(config) if config.mla is None else LatentAttention(config)
        self.post_attention_norm = model_norm(config)
        if kind == "moe":
            self.moe = MoE(config)
        else:
            self.mlp = FeedForward(config, config.dense_dim)
        self.kind, self.residual_scale = kind, config.residual_scale

    def attend(
        self, x_BTD: jax.Array, row: Row, traits: Traits, cache: LayerCache | None
    ) -> tuple[jax.Array, KeysValues]:
        """Attention with its residual, and these tokens' keys and values."""
        with jax.named_scope("attention"):
            y_BTD, new = self.attention(self.input_norm(x_BTD), row, traits, cache)
        return self._add(x_BTD, y_BTD), new

    def route(self, x_BTD: jax.Array) -> jax.Array:
        """Router logits [B, T, E] of the states after attention; no expert is computed."""
        return self.moe.router(self.post_attention_norm(x_BTD))

    def feed_forward(
        self,
        x_BTD: jax.Array,
        row: Row,
        forced_logits_BTE: jax.Array | None,
        place: Place,
        compute: Compute,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Experts or dense feed-forward with their residual, and the router logits of a MoE layer."""
        h_BTD, logits_BTE = self.post_attention_norm(x_BTD), None
        if self.kind == "moe":
            with jax.named_scope("moe"):
                y_BTD, logits_BTE = self.moe(h_BTD, forced_logits_BTE, row.forced_BT, place, compute)
        else:
            with jax.named_scope("mlp"):
                y_BTD = self.mlp(h_BTD)
        return self._add(x_BTD, y_BTD), logits_BTE

    def _add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        return x_BTD + (y_BTD if self.residual_scale == 1 else y_BTD * self.residual_scale)
