"""Qwen3-MoE against transformers."""

from __future__ import annotations

from transformers import Qwen3MoeConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import TINY, Variant

BASE = TINY | dict(
    intermediate_size=40,
    num_key_value_heads=2,
    head_dim=12,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
)


def published() -> Qwen3MoeConfig:
    """Qwen3-30B-A3B: heads wider than the model divided by their number, every layer MoE, renormalised."""
    return Qwen3MoeConfig(**BASE)


def everything() -> Qwen3MoeConfig:
    """A window in every layer, yarn, biases, dense layers, tied; probabilities as they are."""
    scaling = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
    changed = dict(
        num_hidden_layers=4,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=7,
        attention_bias=True,
        mlp_only_layers=[1],
        decoder_sparse_step=1,
        tie_word_embeddings=True,
        rope_parameters=scaling,
    )
    return Qwen3MoeConfig(**BASE | changed)


VARIANTS = (Variant("published", published), Variant("everything", everything))
