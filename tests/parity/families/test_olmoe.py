"""OLMoE against transformers."""

from __future__ import annotations

from transformers import OlmoeConfig

from tests.parity.families.facts import *  # noqa: F403 - every fact is a test of this file
from tests.parity.families.harness import TINY, Variant

BASE = TINY | dict(intermediate_size=16, num_experts=8, num_experts_per_tok=2)


def published() -> OlmoeConfig:
    """OLMoE-1B-7B: as many key heads as query heads, no clamp, no renormalisation, untied."""
    return OlmoeConfig(**BASE)


def everything() -> OlmoeConfig:
    """Every other switch."""
    return OlmoeConfig(
        **BASE | dict(num_experts_per_tok=3),
        num_key_value_heads=2,
        clip_qkv=0.9,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={"rope_theta": 300.0, "rope_type": "default"},
    )


VARIANTS = (Variant("published", published), Variant("everything", everything))
