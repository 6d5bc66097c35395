"""A random OLMoE of three layers, as small as blocks of 64 weights allow."""

from __future__ import annotations

import jax

from safemoe_jax.models import ModelConfig, declare, initialise
from safemoe_jax.models.params import Params

OLMOE = ModelConfig(
    family="olmoe",
    vocab_size=96,
    d_model=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    norm_eps=1e-3,
    n_experts=6,
    top_k=2,
    expert_dim=64,
    qk_norm="full",
)


def drawn(config: ModelConfig = OLMOE) -> Params:
    """Random float parameters."""
    return initialise(declare(config), jax.random.key(0), stddev=0.2)
