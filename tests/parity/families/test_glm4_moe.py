"""GLM-4.5 against transformers."""

from __future__ import annotations

from transformers import Glm4MoeConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import Variant

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    attention_bias=True,
    rms_norm_eps=0.02,
    initializer_range=0.25,
    max_position_embeddings=128,
    pad_token_id=0,
    eos_token_id=None,
    rope_theta=100.0,
)


def published() -> Glm4MoeConfig:
    """GLM-4.5-Air: half of a head is rotated, biases on q, k and v, no norms of q and k."""
    return Glm4MoeConfig(**BASE)


def everything() -> Glm4MoeConfig:
    """Every other switch: GLM-4.5's norms of q and k and scale, another share, groups, no biases, tied."""
    return Glm4MoeConfig(
        **BASE
        | dict(
            hidden_size=36,
            head_dim=16,
            use_qk_norm=True,
            attention_bias=False,
            partial_rotary_factor=0.25,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=False,
            n_shared_experts=2,
            num_hidden_layers=4,
            first_k_dense_replace=3,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
            },
        )
    )


VARIANTS = (Variant("published", published), Variant("everything", everything))
