"""Qwen2-MoE against transformers."""

from __future__ import annotations

from transformers import Qwen2MoeConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import TINY, Variant

BASE = TINY | dict(
    intermediate_size=40,
    num_key_value_heads=4,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=4,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
)


def published() -> Qwen2MoeConfig:
    """Qwen1.5-MoE-A2.7B: biases on q, k and v, a gated shared expert in every layer, not renormalised."""
    return Qwen2MoeConfig(**BASE)


def everything() -> Qwen2MoeConfig:
    """Windows in some layers, dense layers, no biases, grouped heads, renormalised, tied."""
    changed = dict(
        num_hidden_layers=4,
        num_key_value_heads=2,
        num_experts_per_tok=3,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=3,
        qkv_bias=False,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 300.0, "rope_type": "default"},
    )
    return Qwen2MoeConfig(**BASE | changed)


VARIANTS = (Variant("published", published), Variant("everything", everything))
