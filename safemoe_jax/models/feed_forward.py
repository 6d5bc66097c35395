"""The feed-forward of a dense layer and of a shared expert. Legend: X leading axes, D model width, F inner
width."""

from __future__ import annotations

import jax
from flax import nnx

from safemoe_jax.models.config import ModelConfig
from safemoe_jax.models.linear import Linear


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Its projections answer to the LoRA targets gate_proj, up_proj and down_proj wherever it stands: a target
    names a module by its suffix, so it adapts the dense layers and the shared experts of a model alike.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        d = config.d_model
        options = {"lora": config.lora, "bias": config.mlp_bias, "quantisation": config.quantisation}
        self.gate_proj = Linear("gate_proj", d, width, ("embed", "mlp"), **options)
        self.up_proj = Linear("up_proj", d, width, ("embed", "mlp"), **options)
        self.down_proj = Linear("down_proj", width, d, ("mlp", "embed"), **options)

    def __call__(self, x_XD: jax.Array) -> jax.Array:
        """Applies the layer along the last axis, in the input's dtype."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x_XD)) * self.up_proj(x_XD))
